"""For all tests: helper modules beside the tests are imported as ``tests.ROOM.MODULE``."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
