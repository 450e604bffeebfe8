"""How the values of options are written: each function reads one, and raises ValueError, saying
what is wanted, if it is none."""

import re
from collections.abc import Callable
from typing import Final

MIB: Final = 1024 * 1024
TRANSPORTS: Final = ("file", "san", "hotadd", "nbdssl", "nbd")
_UNITS: Final = {"": 1, "k": 1024, "m": MIB, "g": 1024 * MIB, "t": 1024 * 1024 * MIB}


def size(text: str) -> int:
    """Return the bytes of ``256M`` and the like. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,15})([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise ValueError("a size such as 256M is wanted")
    return int(match[1]) * _UNITS[match[2]]


def cache_size(text: str) -> int:
    value = size(text)
    if not 4 * MIB <= value <= 1024**4:
        raise ValueError("at least 4M and at most 1T is wanted")
    return value


def block_size(text: str) -> int:
    value = size(text)
    if not 4096 <= value <= MIB or value & (value - 1):
        raise ValueError("a power of two from 4K to 1M is wanted")
    return value


def readahead(text: str) -> int:
    value = size(text)
    if value > 1024 * MIB:
        raise ValueError("at most 1G is wanted")
    return value


def seconds(text: str) -> float:
    if text == "forever":
        return float("inf")
    value = float(text)
    if not 0.1 <= value < 1e9:
        raise ValueError("a number of seconds, at least 0.1, is wanted")
    return value


def seconds_or_never(text: str) -> float:
    return 0.0 if text in ("0", "never") else seconds(text)


def count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 10_000:
        raise ValueError("a number from 0 to 10000 is wanted")
    return value


def port(text: str) -> int:
    value = int(text)
    if not 0 < value < 65536:
        raise ValueError("a port number is wanted")
    return value


def absolute_path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("an absolute path is wanted")
    return text


def overlay(text: str) -> str:
    if text != "tmp" and not text.startswith("/"):
        raise ValueError("tmp, or the absolute path of a folder, is wanted")
    return text


def thumbprint(text: str) -> str:
    value = text.upper()
    if not re.fullmatch(r"([0-9A-F]{2}:){19,31}[0-9A-F]{2}", value):
        raise ValueError("the SHA-1 or SHA-256 of a certificate, AB:CD:..., is wanted")
    return value


def transports(text: str) -> tuple[str, ...]:
    names = tuple(text.split(":"))
    unknown = [name for name in names if name not in TRANSPORTS]
    if unknown or len(set(names)) != len(names):
        known = ", ".join(TRANSPORTS)
        raise ValueError(f"names out of {known}, in order of preference, with colons are wanted")
    return names


def devices(text: str) -> tuple[str, ...]:
    if text == "auto":
        return ()
    # Colons stand in names as well, such as those of /dev/disk/by-path.
    names = tuple(re.split(r":(?=/)", text))
    if not all(re.fullmatch(r"/.*[^/:]", name) for name in names):
        raise ValueError("auto, or absolute paths of block devices with colons, is wanted")
    return names


def numeric_id(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32 - 1:
        raise ValueError("a numeric id is wanted")
    return value


def umask(text: str) -> int:
    value = int(text, 8)
    if not 0 <= value <= 0o777:
        raise ValueError("three octal digits are wanted")
    return value


def one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError("one of " + ", ".join(words) + " is wanted")
        return text

    return read


def log_target(text: str) -> str:
    if text in ("auto", "stderr", "syslog") or text.startswith("/"):
        return text
    raise ValueError("stderr, syslog, auto or an absolute path is wanted")


def flag(_text: str) -> bool:
    return True
