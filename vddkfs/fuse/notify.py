"""What the kernel is told to forget: pages of our files, and names.

The kernel waits, inside the notification, for reads of those pages that it has sent and that are
not answered. A thread that waits there cannot be killed, and keeps a daemon that is killed, with
the mount and all its readers, from ever going away. So the reads that are under way are waited for
here first, where a wait can be given up; with a disk that hangs the kernel is not told at all.

Notifications are made in threads, because it is this process that answers the reads; nothing that
reads need is held meanwhile.
"""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Final

import trio

from vddkfs.fuse import session
from vddkfs.fuse.session import pyfuse3
from vddkfs.fuse.tree import Tree, Window

log = logging.getLogger(__name__)

_THREADS: Final = 32


class KernelPages:
    """The kernel's pages of the files of *tree*."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        # Of its own, so that these threads keep nobody who makes memory for reads waiting.
        self._limiter = trio.CapacityLimiter(_THREADS)

    async def drop(self, inode: int, start: int = 0, size: int = 0) -> bool:
        """Have the kernel forget *size* bytes from *start*, 0: all that follow.

        What it reads later it reads anew, and reads that began before this call have ended when it
        returns. Says whether the kernel knew the inode: it has nothing of others. Without the C
        module everything is forgotten. Raises OSError; when cancelled, old pages may be left.
        """
        node = self._tree.nodes.get(inode)
        if isinstance(node, Window):
            await node.reads.drained()
        return await self._tell(functools.partial(session.forget_pages, inode, start, size))

    def forget(self, nursery: trio.Nursery, forgotten: Sequence[tuple[int, str, int]]) -> None:
        """Have the kernel forget names and pages, soon, without waiting for it here.

        *forgotten* is (folder, name, inode). The daemon's end must not wait for the kernel.
        """
        for folder, name, inode in forgotten:
            nursery.start_soon(self._forget, folder, name, inode)

    async def _forget(self, folder: int, name: str, inode: int) -> None:
        entry = functools.partial(pyfuse3.invalidate_entry, folder, os.fsencode(name))
        for telling in (functools.partial(self._tell, entry), functools.partial(self.drop, inode)):
            try:
                await telling()
            except Exception as error:  # such as no thread to be had: the mount goes on
                log.warning("the kernel may keep old data of %s: %s", name, error)

    async def _tell(self, call: Callable[[], None]) -> bool:
        """Make *call* in a thread; say whether the kernel knew what it is about."""
        try:
            await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
        except FileNotFoundError:
            return False
        return True
