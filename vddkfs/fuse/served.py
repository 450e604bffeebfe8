"""What readers of the mount were answered, counted: for status and metrics."""

from vddkfs.engines.histogram import Histogram


class Served:
    """Of one image, since the mount began: each read of one of its files, its partitions' too.

    ``times`` has the seconds from the kernel's request to the answer, ``bytes`` what was answered;
    ``write_times`` and ``written`` are the same of writes. *errors* of all requests failed.
    """

    __slots__ = ("bytes", "errors", "times", "write_times", "written")

    def __init__(self) -> None:
        self.bytes = 0
        self.errors = 0
        self.times = Histogram()
        self.written = 0
        self.write_times = Histogram()
