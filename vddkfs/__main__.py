"""``python -m vddkfs``."""

import sys

from vddkfs.cli import main

sys.exit(main())
