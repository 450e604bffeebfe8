"""What a request may end with: a FUSEError, and nothing else, which would end the mount."""

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, ParamSpec, TypeVar

from vddkfs.errors import VddkfsError
from vddkfs.fuse.session import pyfuse3

log = logging.getLogger(__name__)

_TOLD_AS_THEY_ARE: Final = (errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

P = ParamSpec("P")
R = TypeVar("R")


def guarded(handler: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Let only FUSEError out of *handler*."""

    @functools.wraps(handler)
    async def guard(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except VddkfsError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except Exception as error:
            log.exception("a bug in vddkfs: %s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return guard


def file_errno(error: VddkfsError) -> int:
    """Return what the user of a file is told: its data changed, or cannot be had.

    The file is there, whatever is missing behind it: ENOENT and the like would mislead.
    """
    return error.errno if error.errno in _TOLD_AS_THEY_ARE else errno.EIO
