"""The configuration file that InitEx is given: ours, with the operator's lines in it.

One ``name=value`` on a line; lines that begin with ``#`` are comments. A name that the operator's
file (``vddk_config=``) sets is not set by us, except ``tmpDirectory``: each worker has its own,
which is emptied after it (K05), and which Cleanup finds again.

Values of ours, and where they are from:

- Timeouts of the NFC protocol, in milliseconds: what the vendor's guide recommends to start with.
  They bound what hangs inside the library (K09); vddkfs's own deadlines are above them.
- NFC buffers: 4 of 16 x 64 KiB, with which a public measurement of ten VMs on one host came from
  348 to 505 MB/s, and one VM lost nothing.
- Log levels: what our own log keeps apart, more of it when *debug* is set.
"""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vddkfs.errors import AccessDenied, SourceMissing, UsageError

TMP_DIRECTORY: Final = "tmpDirectory"
MAX_BYTES: Final = 1 << 20
"""Of the operator's file."""

_NFC = "vixDiskLib.nfc."
_SERVER = "vixDiskLib.nfcFssrvr"
TIMEOUTS_MS: Final[dict[str, int]] = {
    f"{_NFC}AcceptTimeoutMs": 180_000,
    f"{_NFC}RequestTimeoutMs": 180_000,
    f"{_NFC}ReadTimeoutMs": 60_000,
    f"{_NFC}WriteTimeoutMs": 600_000,
    f"{_SERVER}.TimeoutMs": 0,
    f"{_SERVER}Write.TimeoutMs": 0,
}
BUFFERS: Final[dict[str, int]] = {
    "vixDiskLib.nfcAio.Session.BufSizeIn64KB": 16,
    "vixDiskLib.nfcAio.Session.BufCount": 4,
}
_TRANSPORT_LOG = "vixDiskLib.transport.LogLevel"
_NFC_LOG = f"{_NFC}LogLevel"
NORMAL_LOG: Final[dict[str, int]] = {_TRANSPORT_LOG: 3, _NFC_LOG: 1}
"""Audit and error: the library's own defaults."""
DEBUG_LOG: Final[dict[str, int]] = {_TRANSPORT_LOG: 5, _NFC_LOG: 4}
"""Verbose and debug."""

_LOG_FILE = "log.filename"


@dataclass(frozen=True, slots=True)
class Configuration:
    """The text of a file for InitEx, and what the operator should know about theirs."""

    text: str
    warnings: tuple[str, ...] = ()


def read_operators(path: str) -> str:
    """Return the content of the operator's file. Raises a VddkfsError that says what is wrong."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SourceMissing(f"vddk_config={path} does not exist") from error
    except OSError as error:
        raise AccessDenied(
            f"vddk_config={path} cannot be read", cause=error.strerror or str(error)
        ) from error
    if len(raw) > MAX_BYTES or b"\0" in raw:
        raise UsageError(f"vddk_config={path} is not a configuration file of VDDK")
    return raw.decode(errors="surrogateescape")


def generate(
    tmp_directory: str, operators: str = "", *, debug: bool = False, name: str = "vddk_config"
) -> Configuration:
    """Return the configuration for a worker whose private folder is *tmp_directory*.

    *operators* is the text of the operator's file, which warnings call *name*.
    """
    if any(character in tmp_directory for character in '\n\r"'):
        raise ValueError("the path of a temporary folder has a character that VDDK cannot read")
    warnings: list[str] = []
    theirs: list[str] = []
    named: set[str] = set()
    for number, line in enumerate(operators.splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, equals, _ = text.partition("=")
        key = key.strip().lower()
        if not equals or not key:
            warnings.append(f"{name}, line {number}: not name=value, left out")
        elif key == TMP_DIRECTORY.lower():
            warnings.append(
                f"{name}, line {number}: {TMP_DIRECTORY} is left out, every worker has its own"
            )
        else:
            if key == _LOG_FILE:
                warnings.append(
                    f"{name}, line {number}: VDDK writes that log itself, so secrets in it are not "
                    "made unreadable"
                )
            named.add(key)
            theirs.append(text)
    ours = {**TIMEOUTS_MS, **BUFFERS, **(DEBUG_LOG if debug else NORMAL_LOG)}
    lines = [f"{TMP_DIRECTORY}={tmp_directory}"]
    lines += [f"{key}={value}" for key, value in ours.items() if key.lower() not in named]
    return Configuration("\n".join([*lines, *theirs]) + "\n", tuple(warnings))


def write(configuration: Configuration, path: Path) -> None:
    """Write the file at *path*, which must not exist, for its owner alone."""
    path.touch(mode=stat.S_IRUSR | stat.S_IWUSR, exist_ok=False)
    path.write_text(configuration.text, errors="surrogateescape")
