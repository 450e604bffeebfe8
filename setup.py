"""The one thing that pyproject.toml cannot say: how the C modules are built, and that it may fail.

Without that of fuse/ vddkfs still mounts, with smaller requests and without SEEK_HOLE, and says so.
Without that of engines/vddk/ remote reads cost more CPU.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

from vddkfs.engines.vddk import _reads_build
from vddkfs.fuse import _session_build

extensions = [
    build.builder().distutils_extension(tmpdir="build") for build in (_session_build, _reads_build)
]
for extension in extensions:
    extension.optional = True

setup(ext_modules=extensions)
