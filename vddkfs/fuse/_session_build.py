"""Builds ``vddkfs.fuse._session``, the C module of session_hooks.c (cffi, API mode).

Run by setup.py when the package is installed; needs libfuse3's headers and pkg-config.
"""

import os
import subprocess
from pathlib import Path

from cffi import FFI

DECLARATIONS = """
void set_wanted(unsigned background, int auto_inval);
unsigned agreed_value(int which);
int reply_lseek(uint64_t req, int64_t offset);
int reply_error(uint64_t req, int error);
int notify_inode(uint64_t ino, int64_t offset, int64_t length);
const char *library_version(void);
extern "Python" void vddkfs_on_lseek(
    uint64_t req, uint64_t ino, uint64_t fh, int64_t offset, int whence);
"""


def _pkg_config(*arguments: str) -> list[str]:
    """Return pkg-config's answer for fuse3; nothing where it has none: the compiler will say."""
    command = [os.environ.get("PKG_CONFIG", "pkg-config"), *arguments, "fuse3"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.split()


def builder() -> FFI:
    """Return the FFI builder of the module."""
    here = Path(__file__).parent
    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    ffi.set_source(
        "vddkfs.fuse._session",
        (here / "session_hooks.c").read_text(encoding="ascii"),
        extra_compile_args=["-fvisibility=hidden", *_pkg_config("--cflags")],
        extra_link_args=_pkg_config("--libs") or ["-lfuse3"],
    )
    return ffi


if __name__ == "__main__":
    builder().compile(verbose=True)
