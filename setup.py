"""The one thing that pyproject.toml cannot say: how the C module is built, and that it may fail.

Without it vddkfs still mounts, with smaller requests and without SEEK_HOLE, and says so.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

from vddkfs.fuse._session_build import builder

extension = builder().distutils_extension(tmpdir="build")
extension.optional = True

setup(ext_modules=[extension])
