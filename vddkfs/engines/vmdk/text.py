"""The text files of VMware: lines of ``key = "value"``, in whatever encoding their host used.

Pure functions, shared by the VMDK descriptor and the .vmx. What is read here comes from the guest's
administrator or worse, so nothing is evaluated and every pattern is linear in its input.
"""

import codecs
import re

_DECLARED = re.compile(
    rb"^[ \t]*\.?encoding[ \t]*=[ \t]*\"?([\w-]{1,32})\"?[ \t]*\r?$", re.I | re.M
)
_TEXT_CODECS = re.compile(
    r"utf-8|windows-125\d|cp\d{3,4}|iso-8859-\d{1,2}|us-ascii|gbk|gb2312|gb18030|big5|"
    r"shift_jis|euc-(jp|kr)|koi8-r",
    re.I,
)
_PAIR = re.compile(r"[ \t]*([^\s=#\"]+)[ \t]*=[ \t]*(.*)")


def decode(raw: bytes) -> str:
    """Return *raw* as text: UTF-8, else as its ``encoding=`` line says, else byte for byte.

    The last resort keeps odd bytes as surrogate escapes, so that a file name in them still opens.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    declared = _DECLARED.search(raw)
    if declared:
        name = declared.group(1).decode("ascii", "replace")
        if _TEXT_CODECS.fullmatch(name):
            try:
                return codecs.decode(raw, name)
            except (UnicodeDecodeError, LookupError):
                pass
    return raw.decode("utf-8", "surrogateescape")


def pair(line: str) -> tuple[str, str] | None:
    """Return (key, value) of a ``key = value`` line, None for any other line.

    The key is in lower case, because VMware ignores it. A quoted value ends at the line's last
    quotation mark, so that one inside a file name does no harm.
    """
    match = _PAIR.match(line)
    if match is None:
        return None
    value = match.group(2).strip()
    if value.startswith('"'):
        end = value.rfind('"')
        value = value[1:end] if end > 0 else value[1:]
    return match.group(1).lower(), value


def printable(text: str) -> str:
    """Return *text*, which an unknown file gave, in a form that is safe in a log or a terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )
