"""Redaction: no disguise of a secret survives, wherever it stands, and the rest stays as it is."""

import html
import json
import re
import time
import urllib.parse
from base64 import b64encode, standard_b64encode, urlsafe_b64encode
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vddkfs.observe import redact as module
from vddkfs.observe.redact import Redactor, redact

SECRET = 'S3cr3t/+ "pro&be"<\\>\'é€😀 =100%'


def percent_all(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def numeric(text: str) -> str:
    return "".join(f"&#{ord(char)};" for char in text)


def lower_percent(text: str) -> str:
    return re.sub("%..", lambda found: found[0].lower(), urllib.parse.quote(text, safe=""))


DISGUISES: dict[str, Callable[[str], str]] = {
    "clear": lambda s: s,
    "url, all bytes": percent_all,
    "url, all bytes, lower case": lambda s: percent_all(s).lower(),
    "url, unsafe bytes": lambda s: urllib.parse.quote(s, safe=""),
    "url, unsafe bytes, lower case": lower_percent,
    "url, slashes kept": urllib.parse.quote,
    "url, of a form": urllib.parse.quote_plus,
    "url, twice": lambda s: urllib.parse.quote(urllib.parse.quote(s, safe="")),
    "xml": html.escape,
    "xml, without quotes": lambda s: html.escape(s, quote=False),
    "xml, twice": lambda s: html.escape(html.escape(s)),
    "xml, apostrophes by name": lambda s: html.escape(s).replace("&#x27;", "&apos;"),
    "xml, numbers": numeric,
    "xml, ascii": lambda s: s.encode("ascii", "xmlcharrefreplace").decode(),
    "json": lambda s: json.dumps(s)[1:-1],
    "json, utf-8": lambda s: json.dumps(s, ensure_ascii=False)[1:-1],
    "json in json": lambda s: json.dumps(json.dumps(s))[3:-3],
    "json, with escaped slashes": lambda s: json.dumps(s)[1:-1].replace("/", "\\/"),
    "a string of Python": lambda s: repr(s)[1:-1],
    "bytes of Python": lambda s: repr(s.encode())[2:-1],
    "ascii of Python": lambda s: ascii(s)[1:-1],
    "octal": lambda s: "".join(f"\\{byte:03o}" for byte in s.encode()),
    "in apostrophes of a shell": lambda s: s.replace("'", "'\\''"),
    "base64": lambda s: standard_b64encode(s.encode()).decode(),
    "base64, without padding": lambda s: standard_b64encode(s.encode()).decode().rstrip("="),
    "base64url": lambda s: urlsafe_b64encode(s.encode()).decode(),
    "base64url, without padding": lambda s: urlsafe_b64encode(s.encode()).decode().rstrip("="),
    "base64 in a url": lambda s: urllib.parse.quote(b64encode(s.encode()).decode(), safe=""),
    "base64 of utf-16": lambda s: b64encode(s.encode("utf-16-le")).decode(),
    "hex": lambda s: s.encode().hex(),
    "hex, upper case": lambda s: s.encode().hex().upper(),
    "hex, a dump": lambda s: s.encode().hex(" "),
    "hex, of utf-16": lambda s: s.encode("utf-16-le").hex(),
}

# Making a Redactor takes milliseconds, which a busy machine makes many more of.
few = settings(max_examples=40, deadline=None)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
secrets = st.text(st.characters(exclude_categories=["Cs"]), min_size=4, max_size=24)
awkward = st.text("ab\\/\"'<>&;%+ =#?x0é", min_size=4, max_size=12)


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize(
    "secret",
    [SECRET, "S3cr3t-probe", "abcd", "\\\\\\\\", "a\\\\b\\\\\\", "p  w d", "  pw ", "????"],
)
def test_a_secret_is_found_in_each_disguise(disguise: str, secret: str) -> None:
    hidden = DISGUISES[disguise](secret)
    found = Redactor([secret]).redact(f"before[{hidden}]after")
    assert hidden not in found
    assert found.startswith("before[")
    assert found.endswith("]after")
    rest = found.removeprefix("before[").removesuffix("]after")
    # A blank at the ends, padding, or what escapes the first character may be left, and no more.
    assert "xxx" in rest
    assert re.fullmatch(r"(?:[\\ ]|%20|%2520|\+|&#32;|20| )*xxx(?:[= ]|%3D|%20|\+)*", rest) or (
        secret != secret.strip()
    )


@pytest.mark.parametrize("disguise", DISGUISES)
@few
@given(secret=secrets | awkward, before=texts, after=texts)
def test_no_disguise_survives(disguise: str, secret: str, before: str, after: str) -> None:
    hidden = DISGUISES[disguise](secret)
    redactor = Redactor([secret])
    found = redactor.redact(before + hidden + after)
    assert hidden not in found
    assert redactor.redact(found) == found


@few
@given(
    secret=secrets, before=st.binary(max_size=20), after=st.binary(max_size=20), url=st.booleans()
)
def test_a_secret_within_a_longer_base64_text_is_found(
    secret: str, before: bytes, after: bytes, url: bool
) -> None:
    encode = urlsafe_b64encode if url else b64encode
    text = encode(before + secret.encode() + after).decode()
    found = Redactor([secret]).redact(text)
    assert "xxx" in found
    # All characters that have bits of the secret are gone: what is left tells nothing of it.
    first, last = len(before) * 8 // 6, -(-8 * (len(before) + len(secret.encode())) // 6)
    assert len(found.replace("xxx", "", 1)) <= len(text) - (last - first)
    assert text[:first].startswith(found.partition("xxx")[0])


@few
@given(secret=secrets)
def test_a_secret_in_basic_authorization_is_found(secret: str) -> None:
    token = b64encode(f"root:{secret}".encode()).decode()
    for line in (f"Authorization: Basic {token}", f"sending {token} to the host"):
        found = Redactor([secret]).redact(line)
        assert token not in found
        assert b64encode(secret.encode()).decode().rstrip("=")[:-1] not in found


@few
@given(st.lists(secrets | awkward, min_size=2, max_size=4), st.lists(texts, min_size=5, max_size=5))
def test_several_secrets_are_all_found_also_where_they_overlap(
    several: list[str], between: list[str]
) -> None:
    redactor = Redactor(several)
    text = "".join(part for pair in zip(several, between, strict=False) for part in pair)
    found = redactor.redact(text)
    assert not any(secret in found for secret in several if secret.strip() and secret != "xxx")
    assert "abcdef" not in Redactor(["abcd", "cdef"]).redact("abcdef")
    assert Redactor(["abcd", "cdef"]).redact("-abcdef-") == "-xxx-", "no rest of the second one"


words = st.text("abcdefghijklmnopqrstuvwxyz .,-/()#", max_size=80)


@few
@given(
    secret=st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=6, max_size=30),
    line=words.filter(lambda line: "pass" not in line),
)
@example(secret="S3CR3T", line="VixDiskLib_Read: 16 sectors at 4096 of [ds] web01/web01.vmdk: 0")
@example(secret="S3CR3T", line="2025-11-22T18:41:00.000Z info -[7F00] [Originator@6876] NBD_ReadV")
@example(secret="S3CR3T", line="s3cr3t and s3cr3T are other words")
def test_ordinary_lines_stay(secret: str, line: str) -> None:
    assert Redactor([secret]).redact(line) == line
    assert redact(line) == line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password=abc, user=root", "password=xxx, user=root"),
        ('{"password": "a"}', '{"password": xxx}'),
        ("nfc://root:abc@host", "nfc://root:xxx@host"),
        ("root:abc@host", "root:xxx@host"),
        ("root:%61%62%63@host", "root:xxx@host"),
        ("abc of abcde: 61 62 63, YWJj", "abc of abcde: 61 62 63, YWJj"),
    ],
)
def test_a_very_short_secret_is_replaced_only_where_a_password_is_expected(
    text: str, expected: str
) -> None:
    assert Redactor(["abc", "a", ""]).redact(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password: hunter2", "password: xxx"),
        ("guestPassword=hunter2", "guestPassword=xxx"),
        ("?password%3Dhunter2", "?password%3Dxxx"),
        ("password=hunt&amp;er2 next", "password=xxx next"),
        (r"{\"password\": \"hunter 2\", \"x\": 1}", r"{\"password\": xxx, \"x\": 1}"),
        ('password="hunter 2', "password=xxx"),
        ("<password>hunter 2</password>", "<password>xxx</password>"),
        ("<a:passWord t='s'>hunter2</a:passWord>", "<a:passWord t='s'>xxx</a:passWord>"),
        ("<password>hunter2", "<password>xxx"),
        ("<password>one\ntwo</password>", "<password>xxx</password>"),
        ("<password><![CDATA[a<b]]></password>", "<password>xxx</password>"),
        ("&lt;password&gt;hunter2&lt;/password&gt;", "&lt;password&gt;xxx&lt;/password&gt;"),
        ("<password/>text", "<password/>text"),
        ("<password></password>", "<password></password>"),
        ("Authorization: Basic aHVudGVyMg==", "Authorization: Basic xxx"),
        ("authorization: bearer ab.cd-ef, next", "authorization: bearer xxx, next"),
        ('{"Authorization": "Bearer ab.cd"}', '{"Authorization": "Bearer xxx"}'),
        ("https://root:hunter2@host/x", "https://root:xxx@host/x"),
        ("https://:hunter2@host/x", "https://:xxx@host/x"),
        ("vmware_soap_session=52ab-cd; Path=/", "vmware_soap_session=xxx; Path=/"),
        ('Set-Cookie: vmware_soap_session="52ab"; Path=/', "Set-Cookie: xxx; Path=/"),
        ('vmware_soap_session="\\"52ab\\""; Path=/', "vmware_soap_session=xxx; Path=/"),
        ("vmware-api-session-id: 52abcd", "vmware-api-session-id: xxx"),
    ],
)
def test_what_looks_like_a_secret_is_replaced(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


def test_a_known_secret_goes_whole_where_a_pattern_would_take_a_part() -> None:
    assert redact("password=two, words") == "password=xxx, words"
    assert Redactor(["two, words"]).redact("password=two, words") == "password=xxx"


def test_a_secret_that_is_a_word_of_a_pattern_does_not_spoil_it() -> None:
    assert Redactor(["password"]).redact("password=hunter2") == "xxx=xxx"


@pytest.mark.parametrize("secret", ["xxxx", "xxxxx", "axxx", "=xxx", "password=xxx", "xxx=xxx"])
def test_a_secret_like_the_mask_comes_to_an_end(secret: str) -> None:
    redactor = Redactor([secret])
    for text in (secret, secret * 50, "x" * 1000, f"a{secret}a", f"password={secret}"):
        assert secret not in redactor.redact(text)


def test_it_does_not_show_its_secrets() -> None:
    assert "S3cr3t" not in repr(Redactor(["S3cr3t"]))


@few
@given(secrets | awkward | st.just("\\" * 9) | st.just("😀" * 5) | st.just("ϑ" * 5))
def test_no_disguise_is_longer_than_said(secret: str) -> None:
    redactor = Redactor([secret])
    for pattern in redactor._patterns[len(module._LOOKS_SECRET) :]:
        parsed = re._parser.parse(pattern.regex.pattern)  # type: ignore[attr-defined]
        assert parsed.getwidth()[1] + pattern.lead <= module._widest(secret) <= redactor.reach or (
            module._widest(secret) <= redactor.reach == module._LEAST_REACH
        )


# --- where an unfinished line may be cut


@few
@given(
    disguise=st.sampled_from(sorted(DISGUISES)),
    at=st.integers(0, 900),
    anywhere=st.booleans(),
    secret=secrets | awkward | st.just(SECRET),
)
def test_a_cut_never_lets_a_part_of_a_secret_out(
    disguise: str, at: int, anywhere: bool, secret: str
) -> None:
    redactor = Redactor([secret])
    filler = "lorem ipsum " * 200
    line = filler[:at] + DISGUISES[disguise](secret) + filler
    whole = redactor.redact(line)
    for length in range(redactor.reach, len(line), 37):
        part = line[:length]
        end = redactor.cut(part, anywhere)
        assert end <= length - redactor.reach
        joined = redactor.redact(part[:end]) + redactor.redact(line[end:])
        assert joined == whole


@pytest.mark.parametrize(
    "secret",
    ["password=HUNTER", '"password": "HUNTER 2', "nfc://root:HUNTER@h", "<password>HUNTER 2"],
)
def test_a_cut_does_not_part_a_password_from_its_name(secret: str) -> None:
    redactor = Redactor()
    for blanks in range(redactor.reach + 40):
        text = "a " * 200 + secret + " b" * (blanks // 2)
        end = redactor.cut(text)
        joined = redactor.redact(text[:end]) + redactor.redact(text[end:])
        assert "HUNTER" not in joined
        assert end <= len(text) - redactor.reach


def test_a_cut_lets_ordinary_text_out() -> None:
    redactor = Redactor(["S3cr3t-probe"])
    assert redactor.cut("a " * 1000) == 2000 - redactor.reach
    assert redactor.cut("short") == 0
    assert redactor.cut("a" * 1000) == 0, "one word may be anything"
    assert redactor.cut("a" * 1000, anywhere=True) == 1000 - redactor.reach


# --- speed: 256 KiB in a fraction of a second is linear; quadratic would take minutes

STRETCHES = ["a", "A", "7", "\\", "%", "%25", "&", "&amp;", "<", "'", '"', "://", " ", "53 ", "Uz"]
STRETCHES += ["password", "password:", "<password>", "token=", "a.b-c_", "x=1;", "S3cr3t-prob", "@"]


@pytest.mark.parametrize("stretch", STRETCHES)
def test_long_lines_take_linear_time(stretch: str) -> None:
    redactor = Redactor(["S3cr3t-probe", SECRET, "\\\\\\\\", "52b3ef12-" * 6])
    line = (stretch * (1 << 18))[: 1 << 18]
    start = time.process_time()
    redactor.redact(line)
    redactor.cut(line)
    assert time.process_time() - start < 5
