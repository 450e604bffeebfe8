"""The content id (CID) of a base that is written: changed once, in its place in the descriptor.

Whoever keeps something of the disk's content, links above it first of all, knows by it that the
content is another. It is on the disk before anything else is written: after a crash, a new id with
the old content costs nothing, an old id with new content would deceive.
"""

import os
import re
import threading

from vddkfs.engines.vmdk.descriptor import MAX_DESCRIPTOR_BYTES
from vddkfs.engines.vmdk.link import OpenLink
from vddkfs.engines.vmdk.sparse import HEADER_BYTES, MAGIC, parse_header
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.write.writable import Loss, WritableFile, open_writable, refusal

_LINE = re.compile(
    rb"(?:^|[\r\n])[ \t]*CID[ \t]*=[ \t]*\"?(?:0x)?([0-9a-f]{1,8})[ \t]*\"?[ \t]*(?=[\r\n\0]|$)",
    re.I,
)


class ContentId:
    """Gives the descriptor of *link* the content id *wanted*, of eight hexadecimal digits.

    An id with fewer digits gets the last of those: it is written in its place. Raises the refusal
    (EROFS) if the descriptor cannot be written.
    """

    def __init__(self, link: OpenLink, wanted: str) -> None:
        self._lock = threading.Lock()
        self._wanted = wanted.encode()
        self._changed = False
        path = link.info.path
        with open(path, "rb", buffering=0) as found:
            fd = open_writable(found.fileno(), path)
        self._file = WritableFile(fd, path, path, Loss())
        stamp = link.info.identity.files[0]
        try:
            now = os.fstat(fd)
            if (now.st_dev, now.st_ino) != (stamp.device, stamp.inode):
                raise refusal(path, "another file has taken its name", "mount again")
            if self._find() is None:
                raise refusal(path, "no line of its descriptor is found to have its content id")
        except BaseException:
            self._file.close()
            raise

    def change(self) -> None:
        """See to it that the id is the wanted one, on the disk. Any thread. Raises EngineError."""
        if self._changed:
            return
        with self._lock:
            if self._changed:
                return
            place = self._find()
            if place is None:
                raise refusal(self._file.path, "its descriptor has no content id any more")
            offset, old = place
            new = self._wanted[-len(old) :]
            if old.lower() != new:
                self._file.write(new, offset, 0)
                self._file.sync()
            self._changed = True

    def close(self) -> None:
        """Close the descriptor."""
        self._file.close()

    def _find(self) -> tuple[int, bytes] | None:
        """Return the byte of the file where the id is, and the id."""
        begin, size = 0, self._file.size()
        head = self._file.read(min(size, HEADER_BYTES), 0, 0)
        if head.startswith(MAGIC):
            header = parse_header(head, printable(self._file.path), size)
            begin = header.descriptor_offset * 512
            size = header.descriptor_sectors * 512
        raw = self._file.read(min(size, MAX_DESCRIPTOR_BYTES), begin, 0)
        match = _LINE.search(raw.split(b"\0", 1)[0])
        return None if match is None else (begin + match.start(1), match[1])
