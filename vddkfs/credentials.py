"""Where the credentials are: found, checked and opened here, and read in the worker only.

They come from the file of ``credentials=FILE``, from the credential ``vddkfs`` that systemd gave
the service (``LoadCredential=vddkfs:FILE``), or from a prompt, in this order; never from argv or
the environment. What is returned is a descriptor. The process that calls this never has a secret in
its memory, and so neither does the daemon, which is forked from it: what is typed at the prompt
goes from a child process into a sealed file in memory. ``engines.vddk.secrets`` tells the format.
"""

import contextlib
import fcntl
import getpass
import os
import stat
import sys
import warnings
from collections.abc import Callable
from typing import Final

from vddkfs.errors import AccessDenied, UsageError

_CREDENTIAL: Final = "vddkfs"
"""The name of the credential in the folder of systemd."""
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_FILE_ADVICE: Final = (
    "give credentials=FILE, a file of mode 0600 with the lines user=NAME and password=SECRET"
)

Prompt = Callable[[], tuple[str, str]]
"""Asks for user name and password. May raise EOFError and UsageError."""


def ask(server: str = "") -> tuple[str, str]:
    """Ask the terminal for the user name and the password, and return them.

    Raises EOFError if the input ends, UsageError if the password would be shown as it is typed.
    """
    where = f" for {server}" if server else ""
    print(f"User name{where}: ", end="", file=sys.stderr, flush=True)
    user = sys.stdin.readline()
    if not user.endswith("\n"):
        raise EOFError
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return user.strip(), getpass.getpass(f"Password{where}: ")
        except getpass.GetPassWarning:
            raise UsageError(
                "the terminal cannot hide what is typed", advice=_FILE_ADVICE
            ) from None


def open_credentials(option: str, prompt: Prompt = ask) -> int:
    """Return a descriptor, close-on-exec, of the credentials; the caller closes it.

    *option* is the value of ``credentials=``, empty if it was not given. *prompt* is called in a
    child process, and only if stdin is a terminal; waits for the person there. Not to be called
    where there are threads. Raises UsageError if there are no credentials, AccessDenied if they are
    not to be read, or if others may read them as well.
    """
    if option:
        return _open_file(option)
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if folder:
        path = os.path.join(folder, _CREDENTIAL)
        with contextlib.suppress(FileNotFoundError):
            return _open_file(path, systemd=True)
    if not os.isatty(0):
        raise UsageError("no credentials were given", advice=_FILE_ADVICE)
    return _from_prompt(prompt)


def _open_file(path: str, systemd: bool = False) -> int:
    """Return a descriptor of the file at *path*; raise if it is not fit for secrets.

    Looks at the opened file and not at the path, which may be another file a moment later. Raises
    FileNotFoundError if *systemd* (such a file may be absent).
    """
    try:
        # Not blocking: the open of a named pipe would wait for somebody who writes.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except FileNotFoundError:
        if systemd:
            raise
        raise UsageError(f"credentials={path} does not exist", advice=_FILE_ADVICE) from None
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise AccessDenied(
            f"credentials={path} cannot be opened",
            cause=cause or "",
            advice="make it readable for whoever mounts, and for nobody else",
        ) from None
    try:
        _check(path, os.fstat(fd), systemd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(path: str, found: os.stat_result, systemd: bool) -> None:
    """Raise unless *found*, what fstat says of the file, is fit for secrets."""
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"credentials={path} is not a regular file", advice=_FILE_ADVICE)
    owner, me = found.st_uid, os.geteuid()
    if owner not in (me, 0):
        raise AccessDenied(
            f"credentials={path} belongs to the user {owner}, who can change it",
            advice=f"chown {me} {path}",
        )
    # Where the service has a user of its own, systemd gives it the file by an access control list,
    # which shows as a right of the group root.
    allowed = stat.S_IRGRP if systemd and owner == 0 and found.st_gid == 0 else 0
    if stat.S_IMODE(found.st_mode) & 0o077 & ~allowed:
        raise AccessDenied(
            f"credentials={path} is open to others (mode {stat.S_IMODE(found.st_mode):04o})",
            advice=f"chmod 0600 {path}",
        )


def _from_prompt(prompt: Prompt) -> int:
    """Return a descriptor of a sealed file in memory with what a child process asked for."""
    fd = os.memfd_create("vddkfs-credentials", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _ask_and_exit(prompt, fd)
        _, status = os.waitpid(child, 0)
        if status != 0:
            raise UsageError("no user name and password were given", advice=_FILE_ADVICE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _ask_and_exit(prompt: Prompt, fd: int) -> None:
    """Write what *prompt* returns to *fd*, and end this process: with 0 if that went well."""
    code = 1
    try:
        user, password = prompt()
        if user and password and not set("\n\0") & set(user + password):
            # A terminal that does not speak UTF-8 gives surrogates, which come back as its bytes.
            text = f"user={user}\npassword={password}\n"
            data = text.encode(errors="surrogateescape")
            code = 0 if os.write(fd, data) == len(data) else 1
    except UsageError as error:
        print(f"vddkfs: {error}", file=sys.stderr, flush=True)
    except (EOFError, KeyboardInterrupt):
        # The line of the prompt is not finished yet.
        print(file=sys.stderr, flush=True)
    except BaseException as error:
        # Its text and its traceback may hold what was typed.
        print(f"vddkfs: the prompt failed: {type(error).__name__}", file=sys.stderr, flush=True)
    finally:
        # Not through the interpreter's exit: this is a copy of the caller.
        os._exit(code)
