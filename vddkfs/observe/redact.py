"""What never gets into a log: secrets in every disguise, and what looks like a secret.

The one place for this: the daemon's log filter and the workers' output both come here. The daemon
never learns a secret, so it has the patterns only (``redact``); a worker that read a secret makes a
``Redactor`` of it, which also finds that secret where no pattern would.

A library may tell a secret in the form it just had at hand: encoded for a URL, escaped for XML or
JSON, in base64 or in hex, also in levels one upon the other. Whatever of it is found is replaced by
``xxx``. What is not found: a secret that was compressed, encrypted or reversed, or that was broken
in two by something that is not part of an encoding.

Imports the standard library only, because workers use it.
"""

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from html.entities import codepoint2name
from itertools import groupby
from typing import Final, NamedTuple

MASK: Final = "xxx"
SHORTEST: Final = 4
"""Characters of the shortest secret that is replaced wherever it stands."""
_LEAST_REACH: Final = 256
"""Characters: no word of a pattern is longer, nor is any password that somebody types."""
_PASSES: Final = 16

_WORDS: Final = (
    # "pass" alone is the end of other words (compass); the longer ones tell a secret anywhere.
    r"(?:(?<![a-z])pass|passw(?:or)?d|passphrase|cookie|token|ticket|secret|"
    r"vmware_soap_session|vmware-api-session-id)"
)
_HINTS: Final = ("pass", "cookie", "token", "ticket", "secret", "session")
_QUOTE: Final = r"""(?:\\*["'])?"""
_EQUALS: Final = rf"{_QUOTE}\s*(?:[=:]|%3d)\s*"


class _Pattern(NamedTuple):
    """A *regex* whose group ``s`` (or all of it, if it has none) is secret.

    It is only tried on texts that hold one of *hints*, in lower case if *fold*. *lead* is how many
    characters of base64 before it tell something of the secret as well.
    """

    regex: re.Pattern[str]
    hints: tuple[str, ...] = ()
    fold: bool = False
    lead: int = 0


_LOOKS_SECRET: Final = (
    # The password of a URL: all between the user's name and the last @ before a space.
    _Pattern(re.compile(r"(?<=\w)://[^\s/:]*:(?P<s>\S{1,1024})@"), ("://",)),
    # password=..., "password": "...", 'vc_password': '...', and the other names of such things.
    # A quote that is never closed (the line was cut) reaches to the end. What was replaced already,
    # in a worker, stays as it is, without the bracket after it.
    _Pattern(
        re.compile(
            rf"(?i){_WORDS}{_EQUALS}"
            r"""(?P<s>xxx(?=[\])}>"'\s,;]|$)|\\+".*?(?:\\+"|$)|"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|"""
            r"""(?:&[#\w]{1,32};|[^\s,;])+)"""
        ),
        _HINTS,
        fold=True,
    ),
    # <password>...</password>, with a namespace, attributes or CDATA, and escaped itself.
    _Pattern(
        re.compile(
            rf"(?is)(?:<|&lt;)[\w.:-]{{0,64}}?{_WORDS}\b(?:(?!>|&gt;).){{0,256}}?(?<!/)(?:>|&gt;)"
            r"(?P<s><!\[CDATA\[.*?(?:\]\]>|\Z)|(?:(?!<|&lt;).)+)"
        ),
        _HINTS,
        fold=True,
    ),
    _Pattern(
        re.compile(
            rf"(?i)authorization{_EQUALS}{_QUOTE}(?:basic|bearer|negotiate|ntlm)\s+"
            r"""(?P<s>[^\s"',;\\]+)"""
        ),
        ("authorization",),
        fold=True,
    ),
)


class Redactor:
    """Replaces *secrets*, and what looks like one, by ``xxx``. It holds the secrets: keep it safe.

    A secret of fewer than 4 characters is replaced only where a password is expected
    (``password=abc``, ``user:abc@``). Such a short text is also part of ordinary words, numbers and
    base64: replacing it everywhere would make the log unreadable, and the places of the gaps would
    tell what it is.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # One that holds another goes first for no reason but a stable order: spans are joined.
        wanted = sorted({secret for secret in secrets if secret}, key=lambda s: (-len(s), s))
        self._patterns = list(_LOOKS_SECRET)
        self.reach = _LEAST_REACH
        """Characters: no disguise of a secret is longer."""
        for secret in wanted:
            self._patterns += _long(secret) if len(secret) >= SHORTEST else _short(secret)
            self.reach = max(self.reach, _widest(secret))

    def __repr__(self) -> str:
        return f"Redactor({MASK})"

    def redact(self, text: str) -> str:
        """Return *text* with ``xxx`` for every secret."""
        for _ in range(_PASSES):
            spans = self._spans(text, context=False)
            if not spans:
                return text
            parts, at = [], 0
            for start, stop in spans:
                parts += [text[at:start], MASK]
                at = stop
            new = "".join(parts) + text[at:]
            if new == text:
                return text
            # Once more: what stands around a gap may now be a secret (of "xx", "y" and the like).
            text = new
        return MASK

    def cut(self, text: str, anywhere: bool = False) -> int:
        """Return how many characters of *text*, the beginning of a line, can be let out already.

        The rest may be the beginning of a secret, or the end of a pattern of which more is to come.
        A cut is made after a blank, because most patterns hold none, or *anywhere* outside of a
        secret, for a text of which the rest is thrown away.
        """
        end = len(text) - self.reach
        if end <= 0:
            return 0
        spans = self._spans(text, context=True)
        before = -1
        while end != before:
            before = end
            if not anywhere:
                end = max(text.rfind(" ", 0, end), text.rfind("\t", 0, end)) + 1
            end = min((start for start, stop in spans if start < end < stop), default=end)
        return end

    def _spans(self, text: str, context: bool) -> list[tuple[int, int]]:
        """Return where secrets are, with all that their patterns matched if *context*.

        In order; those that touch are one. All are looked for in the same text: replacing one by
        one would spoil the second of two that overlap, and leave its rest to be read.
        """
        found: list[tuple[int, int]] = []
        lower = text.lower()
        for regex, hints, fold, lead in self._patterns:
            where = lower if fold else text
            if hints and not any(hint in where for hint in hints):
                continue
            group = "s" if "s" in regex.groupindex and not context else 0
            for match in regex.finditer(text):
                start, stop = match.span(group)
                if lead and start and text[start - 1] in _BASE64:
                    start -= 1
                found.append((start, stop))
        found.sort()
        spans: list[tuple[int, int]] = []
        for start, stop in found:
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
            else:
                spans.append((start, stop))
        return spans


_ANY: Final = Redactor()


def redact(text: str) -> str:
    """Return *text* with what looks like a secret replaced by ``xxx``."""
    return _ANY.redact(text)


def _long(secret: str) -> Iterator[_Pattern]:
    """Yield what finds *secret* anywhere."""
    # Lines lose the blanks at their ends, and with them those of a secret that stands there.
    stripped = secret.strip()
    yield _Pattern(re.compile(_written(stripped if len(stripped) >= SHORTEST else secret)))
    for raw in _encodings(secret, "utf-8", "latin-1", "utf-16-le"):
        pairs = (("[ :,]{0,2}(?:0[xX])?" if at else "") + _digits(b, 2) for at, b in enumerate(raw))
        yield _Pattern(re.compile("".join(pairs)))
        yield from _base64(raw)


def _short(secret: str) -> Iterator[_Pattern]:
    """Yield what finds *secret* where a password is expected."""
    written = f"(?P<s>{_written(secret)})"
    yield _Pattern(re.compile(rf"(?i:{_WORDS}{_EQUALS}{_QUOTE}){written}"), _HINTS, fold=True)
    yield _Pattern(re.compile(f":{written}@"), (":",))


def _widest(secret: str) -> int:
    """Return a number of characters that no disguise of *secret* exceeds."""
    # The widest form of an ASCII character is eight backslashes with u{000041}, of another one four
    # bytes with eight backslashes and three octal digits each.
    return sum(24 if char.isascii() else 48 for char in secret) + 16


def _encodings(text: str, *names: str) -> list[bytes]:
    """Return *text* as bytes in each encoding that can say it, without doubles."""
    found: dict[bytes, None] = {}
    for name in names:
        try:
            found[text.encode(name, "strict" if name == "latin-1" else "surrogatepass")] = None
        except UnicodeEncodeError:
            continue
    return list(found)


def _digits(number: int, width: int) -> str:
    """Return a regex for *number* in hexadecimal digits of either case."""
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in f"{number:0{width}x}")


# --- the text itself, each of its characters in clear or in one of its escapes

_BACKSLASHES: Final = r"\\{1,8}"
"""An escape within up to three levels of strings within strings."""
_CONTROLS: Final = {"\a": "a", "\b": "b", "\t": "t", "\n": "n", "\v": "v", "\f": "f", "\r": "r"}


def _written(secret: str) -> str:
    """Return a regex for *secret*, each character in clear or escaped for a URL, XML or strings.

    Character by character, because which ones are escaped is the encoder's choice. All repetitions
    are bounded, which keeps the search fast and ``_widest`` true.
    """
    parts = []
    for char, run in groupby(secret):
        count = len(list(run))
        if char == "\\":
            # Doubled by each level of strings. As one run, so that there is one way to match it.
            parts.append(rf"(?:(?:{_escaped(char)}){{{count}}}|\\{{{count},{8 * count}}})")
        elif char == " ":
            # Who joins lines, or fills paragraphs, makes one blank of many.
            parts.append(f"{_character(char)}{{1,{count}}}")
        else:
            parts += [_character(char)] * count
    return "".join(parts)


def _character(char: str) -> str:
    """Return a regex for *char*; every branch begins with a literal, which makes ``re`` fast."""
    forms = [_escaped(char)]
    if not (char.isascii() and char.isalnum()):
        forms.append(_BACKSLASHES + re.escape(char))
    if char == " ":
        forms.append(r"\+")
    if char == "'":
        forms.append(r"'\\{1,8}''")
    return f"(?:{'|'.join(forms)}|{re.escape(char)})"


def _escaped(char: str) -> str:
    """Return the branches of a regex for *char* as ``%41``, ``&#65;``, ``\\u0041`` and the like."""
    code = ord(char)
    several = _encodings(char, "utf-8", "latin-1")
    percent = ["".join("%(?:25){0,3}" + _digits(b, 2) for b in raw) for raw in several]
    name = "apos" if char == "'" else codepoint2name.get(code)
    entity = [f"#0{{0,5}}{code};", f"#[xX]0{{0,5}}{_digits(code, 1)};"]
    entity += [f"{name};"] if name else []
    units = char.encode("utf-16-be", "surrogatepass")
    words = [int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2)]
    string = [
        _BACKSLASHES.join(f"u{_digits(word, 4)}" for word in words),
        f"U{_digits(code, 8)}",
        rf"u\{{0{{0,5}}{_digits(code, 1)}\}}",
    ]
    for raw in several:
        string.append(_BACKSLASHES.join(f"x{_digits(byte, 2)}" for byte in raw))
        string.append(_BACKSLASHES.join(f"{byte:03o}" for byte in raw))
    if char in _CONTROLS:
        string.append(_CONTROLS[char])
    entities, strings = "|".join(entity), "|".join(string)
    return "|".join([*percent, f"&(?:amp;){{0,2}}(?:{entities})", f"{_BACKSLASHES}(?:{strings})"])


# --- base64, where the secret may stand anywhere in what was encoded

_ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BASE64: Final = frozenset(_ALPHABET + "-_")
_BASE64_FORMS: Final = {"+": "(?:[+-]|%2[bB])", "/": r"(?:\\?/|_|%2[fF])"}


def _base64(raw: bytes) -> Iterator[_Pattern]:
    """Yield what finds *raw* in base64, for each of the three places it can have in a group.

    Six bits make a character. Those with bits of *raw* only are its core, the same whatever stands
    around it. The character before the core and the one after it hold bits of a neighbour too.
    """
    for before in range(3):
        bits = 8 * (before + len(raw))
        text = b64encode(bytes(before) + raw).decode()
        core = text[-(-8 * before // 6) : bits // 6]
        after = ""
        if bits % 6:
            low = _ALPHABET.index(text[bits // 6])
            options = "".join(_ALPHABET[low : low + (1 << (6 - bits % 6))])
            options += "".join("-_"["+/".index(c)] for c in options if c in "+/")
            after = f"[{re.escape(options)}]?"
        # A stretch that is written in one way only: looking for it first is much faster.
        hint = max(re.split("[+/]", core), key=len)
        regex = "".join(_BASE64_FORMS.get(char, char) for char in core) + after
        yield _Pattern(re.compile(regex), (hint,) if hint else (), lead=int(before > 0))
