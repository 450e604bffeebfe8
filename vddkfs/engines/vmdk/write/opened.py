"""A base that was opened to be written: nobody else writes it, and it is known that it can be.

All of that is settled when it is opened, with a refusal (EROFS) that says why not, rather than at
the first write.
"""

from vddkfs.engines.vmdk.link import OpenLink
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.write.base import BaseWriter
from vddkfs.engines.vmdk.write.content_id import ContentId
from vddkfs.engines.vmdk.write.locks import Tell, lock_to_write


class WritableBase:
    """Writes *link*, which is open, and which nobody else writes until ``close``.

    At the first write its content id becomes *content_id*, unless that is empty. *tell* gets the
    lines that an operator should read. Raises the refusal, or EngineError if the disk fails.
    """

    def __init__(self, link: OpenLink, content_id: str, tell: Tell) -> None:
        info = link.info
        self._content_id: ContentId | None = None
        self._locks = lock_to_write(info, tell)
        self._writer: BaseWriter | None = None
        try:
            self._writer = BaseWriter(link)
            if content_id:
                self._content_id = ContentId(link, content_id)
            self._writer.prove()
        except BaseException:
            self._close()
            raise
        if info.change_tracking:
            tell(
                f"{printable(info.path)}: changed-block tracking of this disk is wrong once it is "
                "written: reset it (disable and enable it) before the next incremental backup"
            )

    @property
    def _open(self) -> BaseWriter:
        if self._writer is None:
            raise ValueError("the base is closed")
        return self._writer

    def write(self, sector: int, data: memoryview) -> None:
        """See ``BaseWriter``."""
        if self._content_id is not None:
            self._content_id.change()
        self._open.write(sector, data)

    def flush(self) -> None:
        """See ``BaseWriter``."""
        self._open.flush()

    def follow(self, link: OpenLink) -> None:
        """See ``BaseWriter``."""
        self._open.follow(link)

    def close(self) -> None:
        """Flush, and let others write. Raises EngineError if data was lost; all is closed then."""
        self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        finally:
            if self._content_id is not None:
                self._content_id.close()
                self._content_id = None
            self._locks.close()
