"""The driver behind ``contrib/fuzz``: seeds, the targets one after another, what came of it."""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
SHARE = {"folder": 4.0, "check": 2.0}
"""How much more time a target gets than the others."""

_EXECUTED = re.compile(r"^stat::number_of_executed_units:\s*(\d+)", re.M)
_LIMITS = (
    "-max_len=65536",
    "-len_control=0",
    "-timeout=20",
    "-rss_limit_mb=1024",
    "-print_final_stats=1",
    "-verbosity=1",
)


def main() -> int:
    """Fuzz for a while; return 1 if something was found, 2 if it did not run."""
    options = _options()
    chosen = options.target or list(TARGETS)
    weights = {name: SHARE.get(name, 1.0) for name in chosen}
    total = 0
    failed: list[Path] = []
    broken = False
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vddkfs-fuzz-", dir=memory) as scratch:
        for name in chosen:
            seconds = max(1, round(options.seconds * weights[name] / sum(weights.values())))
            executed, found, sound = _run(name, seconds, options, Path(scratch))
            print(f"{name:<12} {executed:>9} executions", flush=True)
            total += executed
            failed += found
            broken |= not sound
    print(f"{'in total':<12} {total:>9} executions", flush=True)
    for path in failed:
        _explain(path)
    if broken and not failed:
        print("contrib/fuzz: a target did not run to its end; see above", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="contrib/fuzz")
    parser.add_argument("seconds", type=int, nargs="?", default=60)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    return parser.parse_args()


def _run(
    name: str, seconds: int, options: argparse.Namespace, scratch: Path
) -> tuple[int, list[Path], bool]:
    """Run one target; return how often, the inputs that failed, and whether it ran."""
    start = scratch / name / "seeds"
    files = scratch / name / "files"
    corpus = options.corpus / name if options.corpus else scratch / name / "corpus"
    findings = scratch / name / "findings"
    for folder in (start, files, corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for seed, raw in seeds(name):
        (start / seed).write_bytes(raw)
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.fuzz",
        name,
        *_LIMITS,
        f"-max_total_time={seconds}",
        f"-dict={ROOT / 'tests/fuzz/vmdk.dict'}",
        f"-artifact_prefix={findings}/",
        str(corpus),
        str(start),
    ]
    jobs, logs = [], []
    for number in range(max(options.jobs, 1)):
        log = scratch / name / f"log-{number}"
        logs.append(log)
        with log.open("wb") as out:
            environment = {**os.environ, "TMPDIR": str(files)}
            jobs.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
            )
    try:
        codes = [job.wait(seconds * 3 + 120) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()
    executed = 0
    for log, code in zip(logs, codes, strict=True):
        said = log.read_text(errors="replace")
        counted = _EXECUTED.search(said)
        executed += int(counted.group(1)) if counted else 0
        if code:
            print(_gist(said), file=sys.stderr)
    return executed, _keep(name, findings, options), not any(codes)


def _gist(said: str) -> str:
    """Return of a failed run's output what tells the failure."""
    begin = said.find(" === Uncaught Python exception")
    lines = said[max(begin, 0) :].splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    return "\n".join(lines[:40] if begin >= 0 else lines[-40:])


def _keep(name: str, findings: Path, options: argparse.Namespace) -> list[Path]:
    """Move what failed to a place that stays; return the files there."""
    kept = []
    place = options.corpus / "findings" if options.corpus else ROOT / "build" / "fuzz"
    for path in sorted(findings.iterdir()):
        place.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        target = place / f"{name}-{digest}.bin"
        shutil.move(path, target)
        kept.append(target)
    return kept


def _explain(path: Path) -> None:
    name = path.name.split("-")[0]
    print(
        f"\nFAILED: {path}\n"
        f"  try it again:     .venv/bin/python -m tests.fuzz.shrink {path}\n"
        f"                    (which also leaves out what does not matter)\n"
        f"  make it a test:   cp {path} tests/fuzz/findings/{name}-WHAT-IT-SHOWS.bin\n"
        f"                    .venv/bin/python -m pytest tests/fuzz"
    )


if __name__ == "__main__":
    sys.exit(main())
