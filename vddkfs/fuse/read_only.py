"""The refusal of every request that would change something."""

import errno
from collections.abc import Awaitable, Callable

from vddkfs.fuse.session import pyfuse3


class ReadOnly(pyfuse3.Operations):
    """Handlers that end with EROFS, whatever is asked of them."""


def _refuse(name: str) -> Callable[..., Awaitable[None]]:
    async def refuse(self: ReadOnly, *args: object, **kwargs: object) -> None:
        raise pyfuse3.FUSEError(errno.EROFS)

    refuse.__name__ = name
    refuse.__doc__ = "Refuse: nothing of the mount can be changed."
    return refuse


for _name in (
    "setattr",
    "mknod",
    "mkdir",
    "unlink",
    "rmdir",
    "symlink",
    "rename",
    "link",
    "write",
    "create",
    "setxattr",
    "removexattr",
):
    setattr(ReadOnly, _name, _refuse(_name))
