"""What a worker says, in real processes: each line with its level, and never a secret."""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.engines import output
from vddkfs.engines.output import parse_line

SECRET = "S3cr3t-probe"
SECONDS = 20.0

HEAD = f"""
import ctypes, logging, os, signal, sys, threading
from vddkfs.engines import output
from vddkfs.engines.output import WorkerOutput
from vddkfs.observe.redact import Redactor
libc = ctypes.CDLL(None)
SECRET = {SECRET!r}
def start(patience=0.01):
    return WorkerOutput(Redactor([SECRET]), patience=patience)
def wait():
    '''Wait for the test's word.'''
    return sys.stdin.readline()
"""


class Child:
    """A process that runs *code* with its stderr on a pipe to the test, as a worker has."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", HEAD + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr is not None
        self.data = b""

    def go(self) -> None:
        """Let it go on after a ``wait()``."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def wait(self, words: bytes) -> bytes:
        """Return all that came so far, as soon as *words* are in it."""
        assert self.process.stderr is not None
        while words not in self.data:
            ready, _, _ = select.select([self.process.stderr], [], [], SECONDS)
            assert ready, self.data
            piece = os.read(self.process.stderr.fileno(), 65536)
            assert piece, self.data
            self.data += piece
        return self.data

    def end(self, code: int = 0) -> list[tuple[int, str]]:
        """Return the lines that came, once the process has ended with *code*."""
        printed, rest = self.process.communicate(timeout=SECONDS)
        self.data += rest
        assert printed == b"", "nothing goes past the lines"
        assert self.process.returncode == code, self.data.decode()
        assert SECRET.encode() not in self.data
        return [parse_line(line) for line in self.data.splitlines()]


@contextmanager
def child(code: str) -> Iterator[Child]:
    found = Child(code)
    try:
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            found.process.kill()
        found.process.communicate()


def lines_of(code: str, exit_code: int = 0) -> list[tuple[int, str]]:
    with child(code) as found:
        return found.end(exit_code)


def test_without_it_a_secret_that_a_library_prints_gets_out() -> None:
    """The trap that the rest of this file is about."""
    with child("os.write(2, b'login as root with ' + SECRET.encode())") as found:
        assert found.wait(SECRET.encode())


def test_prints_from_everywhere_come_as_lines_that_say_where_from() -> None:
    assert lines_of("""
out = start()
os.write(1, b"one\\n")
out.close()
""") == [(logging.INFO, "stdout: one")]
    found = lines_of("""
out = start()
print("of Python"); sys.stdout.flush()
print("of Python's stderr", file=sys.stderr)
libc.puts(b"of C")
libc.perror(b"of C's stderr")
os.system("echo of a child")
print("not flushed")
libc.printf(b"not finished")
out.close()
""")
    assert {level for level, _ in found} == {logging.INFO}
    texts = [text for _, text in found]
    assert [text for text in texts if text.startswith("stdout: ")] == [
        "stdout: of Python",
        "stdout: of C",
        "stdout: of a child",
        "stdout: not flushed",
        "stdout: not finished",
    ]
    errors = [text for text in texts if text.startswith("stderr: ")]
    assert errors[0] == "stderr: of Python's stderr"
    assert errors[1].startswith("stderr: of C's stderr: ")


def test_a_line_of_c_comes_before_the_process_ends() -> None:
    """The C library would keep 4 KiB of what goes into a pipe, and lose it at a crash."""
    with child("out = start(); libc.puts(b'whole'); wait(); os.kill(os.getpid(), 9)") as found:
        assert found.wait(b"\n") == b"<6>stdout: whole\n"
        found.go()
        assert found.end(-signal.SIGKILL) == [(logging.INFO, "stdout: whole")]


@pytest.mark.parametrize(
    ("level", "digit"),
    [("CRITICAL", 3), ("ERROR", 3), ("WARNING", 4), ("INFO", 6), ("DEBUG", 7), ("NOTSET", 7)],
)
def test_what_is_said_has_its_level(level: str, digit: int) -> None:
    with child(f"start().say(logging.{level}, 'text')") as found:
        assert found.wait(b"\n") == b"<%d>text\n" % digit
        found.end()


def test_what_is_said_is_redacted_split_and_escaped() -> None:
    found = lines_of(r"""
out = start()
out.say(logging.WARNING, f"one {SECRET}\r\n\n  two\x1b[31m\0\t\u202e \x85\x9b\npassword=abc  \n")
out.say(logging.ERROR, "caf\udce9 \U0001f600")
out.say(logging.ERROR, "")
out.redactor = Redactor(["other line", "two\nlines"])
out.say(logging.DEBUG, "any other line, two\nlines and more")
""")
    assert found == [
        (logging.WARNING, "one xxx"),
        (logging.WARNING, "  two\\x1b[31m\\x00\t\\u202e \\x85\\x9b"),
        (logging.WARNING, "password=xxx"),
        (logging.ERROR, "caf\\udce9 😀"),
        (logging.DEBUG, "any xxx, xxx and more"),
    ]


def test_what_is_said_before_a_crash_is_there() -> None:
    found = lines_of(
        "out = start(); out.say(logging.ERROR, 'the last words'); os.kill(os.getpid(), 11)",
        -signal.SIGSEGV,
    )
    assert found == [(logging.ERROR, "the last words")]


def test_a_crash_loses_lines_and_never_shows_a_part_of_a_secret() -> None:
    code = """
out = start()
os.write(1, b"whole\\n")
os.write(1, b"with " + SECRET[:6].encode())
wait()
ctypes.string_at(0)
"""
    with child(code) as found:
        found.wait(b"whole\n")
        found.go()
        found.end(-signal.SIGSEGV)
        assert found.data == b"<6>stdout: whole\n"


def test_the_faulthandler_can_write_past_the_lines() -> None:
    code = """
import faulthandler
out = start()
faulthandler.enable(out.original)
ctypes.string_at(0)
"""
    found = lines_of(code, -signal.SIGSEGV)
    assert found[0] == (logging.WARNING, "Fatal Python error: Segmentation fault")


@pytest.mark.parametrize("size", [1, 2, 5, 7])
@pytest.mark.parametrize("fd", [1, 2])
def test_a_secret_in_many_writes_is_caught(fd: int, size: int) -> None:
    found = lines_of(f"""
out = start()
text = ("log in with " + SECRET + " and caf\\xe9\\n").encode() * 3
for at in range(0, len(text), {size}):
    os.write({fd}, text[at : at + {size}])
out.close()
""")
    name = "stdout" if fd == 1 else "stderr"
    assert found == [(logging.INFO, f"{name}: log in with xxx and café")] * 3


def test_each_stream_has_its_own_lines() -> None:
    found = lines_of("""
out = start()
os.write(1, b"with S3cr")
os.write(2, b"other ")
os.write(1, b"3t-probe")
os.write(2, b"S3cr3t-pro")
os.write(2, b"be")
out.close()
""")
    assert sorted(found) == [
        (logging.INFO, "stderr: other xxx"),
        (logging.INFO, "stdout: with xxx"),
    ]


def test_a_long_unfinished_line_is_cut_where_no_secret_can_be() -> None:
    """Its beginning is shown after the patience; its end, as long as a secret may be, is not."""
    code = """
out = start()
os.write(1, b"begin " + b"word " * 400 + SECRET[:7].encode())
wait()
os.write(1, SECRET[7:].encode() + b" end\\n")
out.close()
"""
    with child(code) as found:
        first = found.wait(b"\n")
        assert first.startswith(b"<6>stdout: begin word word ")
        assert b"S3cr" not in first
        found.go()
        lines = found.end()
    joined = " ".join(text.removeprefix("stdout: ") for _, text in lines)
    assert joined == "begin " + "word " * 400 + "xxx end"


def test_a_short_unfinished_line_is_held_back() -> None:
    """However long it takes: the other stream shows that the patience is over."""
    code = """
out = start()
os.write(1, b"Password: " + SECRET[:7].encode())
os.write(2, b"word " * 400)
wait()
os.write(1, SECRET[7:].encode() + b"\\n")
out.close()
"""
    with child(code) as found:
        assert b"stdout" not in found.wait(b"word\n")
        found.go()
        assert (logging.INFO, "stdout: Password: xxx") in found.end()


@pytest.mark.parametrize("ending", ["", "\\n"])
@pytest.mark.parametrize("text", ["x", "x "])
def test_a_line_without_end_is_cut_and_costs_no_memory(text: str, ending: str) -> None:
    found = lines_of(f"""
import resource
out = start(patience=1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
piece = {text!r}.encode() * (65536 // len({text!r}))
for _ in range(1024):
    os.write(1, piece)
os.write(1, SECRET.encode() + b"{ending}")
os.write(1, b"next\\n")
out.close()
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
out.say(logging.DEBUG, f"{{more < 16384}}")
""")
    texts = [text for _, text in found]
    assert texts.pop() == "True", "less than 16 MiB more"
    if ending:
        assert texts.pop() == "stdout: next"
    whole = "".join(texts)
    assert whole.endswith(" [cut]")
    assert output.LONGEST - 1024 < len(whole) < output.LONGEST + 100


def test_a_secret_across_the_place_where_a_line_is_cut_is_not_shown() -> None:
    found = lines_of("""
out = start(patience=1000)
for at in range(1, len(SECRET)):
    text = "y" * (output.LONGEST - at) + SECRET + "\\n"
    os.write(2, text.encode())
    out.say(logging.ERROR, text)
out.close()
""")
    text = "\n".join(text for _, text in found)
    assert text.count("[cut]") == 2 * (len(SECRET) - 1)
    assert "S" not in text


def test_long_lines_come_in_pieces_that_the_kernel_does_not_mix() -> None:
    found = lines_of("""
out = start(patience=1000)
os.write(1, "é".encode() * 5000 + b"\\n")
out.close()
""")
    assert [level for level, _ in found] == [logging.INFO] * 3
    assert "".join(text for _, text in found) == "stdout: " + "é" * 5000
    assert all(len(text.encode()) <= 4000 < select.PIPE_BUF for _, text in found)


def test_bytes_that_are_no_text_are_shown_and_hide_no_secret() -> None:
    found = lines_of("""
out = WorkerOutput(Redactor(["p\\xe4ssw\\xf6rt"]))
os.write(1, b"caf\\xe9 and p\\xe4ssw\\xf6rt\\n")
os.write(1, b"\\xc3")
out.close()
""")
    assert [text for _, text in found] == ["stdout: caf\\xe9 and xxx", "stdout: \\xc3"]


def test_many_threads_say_and_print_whole_lines() -> None:
    found = lines_of("""
out = start()
def work(number):
    for at in range(200):
        out.say(logging.DEBUG, f"thread {number} says {at} {SECRET}")
        os.write(1 + number % 2, f"thread {number} prints {at} {SECRET}\\n".encode())
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for each in threads: each.start()
for each in threads: each.join()
out.close()
""")
    assert len(found) == 8 * 200 * 2
    for number in range(8):
        name = "stderr" if number % 2 else "stdout"
        said = [(logging.DEBUG, f"thread {number} says {at} xxx") for at in range(200)]
        printed = [(logging.INFO, f"{name}: thread {number} prints {at} xxx") for at in range(200)]
        assert [line for line in found if line in set(said)] == said
        assert [line for line in found if line in set(printed)] == printed


def test_after_the_end_nothing_gets_out_but_what_is_said() -> None:
    found = lines_of("""
out = start()
os.write(1, b"before")
out.close()
out.close()
os.write(1, SECRET.encode()); os.write(2, SECRET.encode() + b"\\n")
libc.puts(SECRET.encode())
print(SECRET, file=sys.stderr)
out.say(logging.ERROR, f"after {SECRET}")
print(SECRET)
""")
    assert found == [(logging.INFO, "stdout: before"), (logging.ERROR, "after xxx")]


def test_a_child_of_the_library_that_stays_does_not_hold_up_the_end() -> None:
    code = """
reading, writing = os.pipe()
out = start()
if os.fork() == 0:
    os.close(writing)
    os.read(reading, 1)
    os._exit(0)
os.close(reading)
os.write(1, b"text")
out.close(seconds=1000)
out.say(logging.INFO, "closed")
"""
    assert [text for _, text in lines_of(code)] == ["stdout: text", "closed"]


def test_a_library_that_closes_its_streams_does_no_harm() -> None:
    found = lines_of("""
out = start()
os.write(1, b"first")
os.close(1)
os.write(2, b"second\\n")
os.close(2)
out.say(logging.INFO, "said")
out._thread.join()
sys.stdout = sys.stderr = open(os.devnull, "w")
out.close()
""")
    assert sorted(text for _, text in found) == ["said", "stderr: second", "stdout: first"]


def test_a_daemon_that_is_gone_is_no_error() -> None:
    with child("out = start(); wait(); print('x' * 9999); out.say(40, 'y'); out.close()") as found:
        assert found.process.stderr is not None
        found.process.stderr.close()
        found.process.stderr = None
        found.go()
        assert found.process.wait(SECONDS) == 0


def test_a_daemon_that_does_not_read_holds_up_the_end_for_a_limited_time() -> None:
    code = """
out = start()
def talk():
    while True:
        out.say(logging.INFO, "y" * 3000)
threading.Thread(target=talk, daemon=True).start()
wait()
os.write(1, b"text\\n")
out.close(seconds=0.1)
os._exit(5)
"""
    with child(code) as found:
        assert found.process.stderr is not None
        found.go()
        assert found.process.wait(SECONDS) == 5


def test_it_leaves_no_descriptor_to_a_program_that_the_library_starts() -> None:
    found = lines_of("""
out = start()
import subprocess
code = "import os; print(len(os.listdir('/proc/self/fd')))"
subprocess.run([sys.executable, "-I", "-c", code], close_fds=False)
out.close()
""")
    assert found == [(logging.INFO, "stdout: 4")], "three, and that of the listing"


# --- the daemon's end


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"<3>text\n", (logging.ERROR, "text")),
        (b"<4>text", (logging.WARNING, "text")),
        (b"<5>text", (logging.INFO, "text")),
        (b"<6>stdout: <3>text", (logging.INFO, "stdout: <3>text")),
        (b"<7> text  ", (logging.DEBUG, " text")),
        (b"<0>text", (logging.CRITICAL, "text")),
        (b"<8>text", (logging.WARNING, "<8>text")),
        (b"<3", (logging.WARNING, "<3")),
        (b"Could not find platform independent libraries", None),
        (b"<6>caf\xe9", (logging.INFO, "caf\ufffd")),
        (b"", (logging.WARNING, "")),
    ],
)
def test_the_daemon_understands_every_line(line: bytes, expected: tuple[int, str] | None) -> None:
    assert parse_line(line) == (expected or (logging.WARNING, line.decode()))


@given(st.binary())
def test_no_line_is_an_error_for_the_daemon(line: bytes) -> None:
    level, text = parse_line(line)
    assert level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
    assert isinstance(text, str)
