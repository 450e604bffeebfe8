"""Running things as a user without rights, wherever Python and the project are installed."""

import sys
import tempfile
from pathlib import Path
from shlex import quote

from tests.end_to_end.mounting import COMMAND, Done, run

NOBODY = 65534
AS_NOBODY = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--")


def as_nobody(*command: str | Path) -> Done:
    """Run a command as another user."""
    return run(*AS_NOBODY, *command)


def script_as_nobody(script: str, *arguments: str | Path, device_mode: str = "666") -> Done:
    """Run a shell script as another user, who has no home and little environment.

    In it $vddkfs is the installed command. What it mounts, it sees alone.
    """
    clean = f"env -i PATH=/usr/bin:/bin vddkfs={quote(str(COMMAND))}"
    drop = f'exec {" ".join(AS_NOBODY)} {clean} sh -c {quote(script)} sh "$@"'
    with tempfile.TemporaryDirectory(prefix="vddkfs-test.") as hold:
        line = "\n".join([*_opened_up(hold, device_mode), drop])
        return run("unshare", "-m", "sh", "-c", line, "sh", *arguments)


def vddkfs_as_nobody(*arguments: str | Path) -> Done:
    """Run the installed command as another user."""
    return script_as_nobody('exec "$vddkfs" "$@"', *arguments)


def _opened_up(hold: str, device_mode: str) -> list[str]:
    """Return shell commands that let other users reach Python and the project, which may lie in
    somebody's home, and the FUSE device; to be run in a mount namespace of its own.
    """
    closed: dict[Path, Path] = {}
    for path in {Path(sys.base_prefix).resolve(), COMMAND.parents[2].resolve()}:
        for ancestor in reversed(path.parents):
            if not ancestor.stat().st_mode & 0o001:
                closed[path] = ancestor
                break
    commands = ["set -e"]
    for number, path in enumerate(closed):
        kept = f"{hold}/{number}"
        commands += [f"mkdir {kept}", f"mount --bind {quote(str(path))} {kept}"]
    for ancestor in sorted(set(closed.values())):
        commands.append(f"mount -t tmpfs -o mode=755 none {quote(str(ancestor))}")
    for number, path in enumerate(closed):
        place = quote(str(path))
        commands += [f"mkdir -p {place}", f"mount --move {hold}/{number} {place}"]
    commands += [
        f"mknod -m {device_mode} {hold}/fuse c 10 229",
        f"mount --bind {hold}/fuse /dev/fuse",
    ]
    return commands
