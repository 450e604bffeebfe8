"""For all tests: helper modules beside the tests are imported as ``tests.ROOM.MODULE``."""

import signal
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


def pytest_configure() -> None:
    """Let programs that tests start be interrupted, wherever these tests were started.

    What a shell runs in the background ignores SIGINT, and what nohup runs SIGHUP; so would
    everything below it.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual or signal.SIG_DFL)
