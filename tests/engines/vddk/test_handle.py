"""An open disk, with the stub."""

import mmap
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.vddk.conftest import Bench, MakeKit
from vddkfs.engines.vddk.codes import RetryClass, VixFailure
from vddkfs.engines.vddk.handle import merged
from vddkfs.engines.vddk.layouts import OpenFlag
from vddkfs.errors import EngineError


def memory(count: int) -> memoryview:
    return memoryview(bytearray(count * 512))


def content(start: int, count: int) -> bytes:
    return b"".join(bytes([(start + i) & 255]) * 512 for i in range(count))


@pytest.mark.parametrize(("release", "logical"), [("6.5.2", None), ("6.7.0", None), ("7.0.3", 512)])
def test_info_by_release(make_kit: MakeKit, release: str, logical: int | None) -> None:
    bench = Bench(make_kit(release)).start()
    with bench.open("x") as disk:
        info = disk.info()
    assert (info.capacity, info.links, info.adapter) == (1000, 2, "lsilogic")
    assert (info.parent_hint, info.uuid) == ("parent.vmdk", "an uuid")
    assert info.physical_geometry.cylinders == 4
    assert info.bios_geometry.sectors == 3
    assert info.logical_sector_bytes == logical
    assert info.physical_sector_bytes == (logical and 4096)
    assert bench.said("free info") == [f"free info of {64 if logical else 56}"]
    bench.library.exit()


def test_what_is_there_and_what_is_not(make_kit: MakeKit) -> None:
    bench = Bench(make_kit("6.5.2", "-DNO_ASYNC")).start()
    with bench.open("x") as disk:
        for use in (
            disk.wait,
            disk.flush,
            lambda: disk.query_allocated(0, 128),
            lambda: disk.read_async(0, 1, memory(1), print),
        ):
            with pytest.raises(EngineError, match=r"VDDK 6\.5\.2 has no VixDiskLib_"):
                use()
        into = memory(2)
        disk.read(7, 2, into)
        assert bytes(into) == content(7, 2)
    assert not bench.library.has("ReadAsync")
    bench.library.exit()


def test_open_failure_names_the_disk(bench: Bench) -> None:
    with pytest.raises(VixFailure, match="none: the file does not exist") as caught:
        bench.open("none")
    assert caught.value.cause == "VixDiskLib_Open: VIX_E_FILE_NOT_FOUND (4)"


def test_flags_and_transport(bench: Bench) -> None:
    with bench.open("x", OpenFlag.READ_ONLY | OpenFlag.SKIPZ) as disk:
        assert disk.transport_mode() == "nbdssl"
    assert "flags=68" in bench.said("open")[0]
    disk.close()
    with pytest.raises(ValueError, match="closed"):
        disk.read(0, 1, memory(1))


def test_metadata(bench: Bench) -> None:
    with bench.open("x") as disk:
        assert disk.metadata() == {"adapterType": "lsilogic", "uuid": "60 00 C2 9a"}


def test_read_write_and_their_figures(bench: Bench) -> None:
    with bench.open("x") as disk:
        into = memory(4)
        disk.read(3, 4, into)
        assert bytes(into) == content(3, 4)
        disk.write(9, 1, memoryview(b"\xab" * 512))
        disk.flush()
        with pytest.raises(VixFailure, match="past the disk's end"):
            disk.read(999, 2, memory(2))
    assert bench.said("write") == ["write 9 1 ab"]
    figures = bench.library.statistics()["VixDiskLib_Read"]
    assert (figures.count, figures.failures, figures.bytes) == (2, 1, 2048)


def test_bad_buffers(bench: Bench) -> None:
    with bench.open("x") as disk:
        with pytest.raises(ValueError, match="not 2 sectors"):
            disk.read(0, 2, memory(1))
        with pytest.raises(ValueError, match="not 0 sectors"):
            disk.read(0, 0, memory(0))
        with pytest.raises((BufferError, TypeError)):
            disk.read(0, 1, memoryview(bytes(512)))
    with mmap.mmap(-1, 4096) as area, memoryview(area) as whole:
        with bench.open("x", OpenFlag.UNBUFFERED) as disk:
            with pytest.raises(ValueError, match="aligned"), whole[100:612] as odd:
                disk.read(0, 1, odd)
            with whole[512:1024] as even:
                disk.read(5, 1, even)
        assert area[512:1024] == content(5, 1)


def test_a_host_without_memory_asks_for_smaller_requests(bench: Bench) -> None:
    with bench.open("memory") as disk, pytest.raises(VixFailure) as caught:
        disk.read(0, 1, memory(1))
    assert caught.value.retry_class is RetryClass.SMALLER


def test_completion_on_a_thread_of_the_library(bench: Bench) -> None:
    done = threading.Event()
    told: list[tuple[int, int]] = []

    def complete(code: int) -> None:
        told.append((code, threading.get_ident()))
        done.set()

    with mmap.mmap(-1, 4096) as area, bench.open("thread") as disk:
        whole = memoryview(area)
        part = whole[:1024]
        disk.read_async(2, 2, part, complete)
        assert done.wait(10)
        disk.wait()
        # Nothing holds on to the memory any more.
        part.release()
        whole.release()
        assert area[:1024] == content(2, 2)
    assert told[0][0] == 0
    assert told[0][1] != threading.get_ident()
    assert ("VixDiskLib_ReadAsync", 1024, 0) in bench.traced


def test_memory_under_way_cannot_be_unmapped(bench: Bench) -> None:
    area = mmap.mmap(-1, 4096)
    told: list[int] = []
    with bench.open("zero") as disk:
        with memoryview(area) as whole:
            part = whole[:512]
            disk.read_async(1, 1, part, told.append)
        del part
        with pytest.raises(BufferError):
            area.close()
        # A return of 0 is not taken for a completion; Wait is.
        assert told == []
        assert disk.under_way == 1
        disk.wait()
        assert told == [0]
    area.close()


@pytest.mark.parametrize("how", ["inline", "zero and callback"])
def test_completion_inside_the_call(bench: Bench, how: str) -> None:
    told: list[int] = []
    with bench.open(how) as disk:
        into = memory(1)
        disk.read_async(4, 1, into, told.append)
        assert told == [0]
        assert disk.under_way == 0
        disk.wait()
    assert told == [0]
    assert bytes(into) == content(4, 1)


def test_completion_inside_the_call_may_issue_the_next(bench: Bench) -> None:
    told: list[int] = []
    with bench.open("inline") as disk:

        def again(code: int) -> None:
            told.append(code)
            if len(told) < 5:
                disk.read_async(0, 1, memory(1), again)

        disk.read_async(0, 1, memory(1), again)
    assert told == [0] * 5


def test_a_failed_completion(bench: Bench) -> None:
    told: list[int] = []
    with bench.open("fail") as disk:
        disk.read_async(0, 1, memory(1), told.append)
    assert told == [14011]
    assert bench.library.failure(told[0], "ReadAsync").retry_class is RetryClass.RECONNECT


def test_a_request_that_was_not_taken(bench: Bench) -> None:
    told: list[int] = []
    with bench.open("refuse") as disk:
        with pytest.raises(VixFailure, match="connection was lost"):
            disk.read_async(0, 1, memory(1), told.append)
        assert disk.under_way == 0
    assert told == []


@pytest.mark.parametrize(
    ("how", "complaint"), [("twice", "not under way"), ("both", "that it had completed")]
)
def test_an_odd_library_completes_once(bench: Bench, how: str, complaint: str) -> None:
    told: list[int] = []
    with bench.open(how) as disk:
        disk.read_async(0, 1, memory(1), told.append)
    assert told == [0]
    assert any(complaint in text for level, text in bench.lines if level == "warning")


def test_closing_waits_for_what_is_under_way(bench: Bench) -> None:
    told: list[int] = []
    disk = bench.open("thread")
    into = memory(1)
    disk.read_async(6, 1, into, told.append)
    disk.close()
    assert told == [0]
    assert bench.said("close") == ["close thread threads=0"]


def test_write_async(bench: Bench) -> None:
    told: list[int] = []
    with bench.open("x") as disk:
        disk.write_async(3, 1, memoryview(b"\x5a" * 512), told.append)
        disk.flush()
    assert told == [0]
    assert bench.said("write") == ["write 3 1 5a"]


def test_allocated_blocks_with_the_tail(bench: Bench) -> None:
    with bench.open("x") as disk:
        # 1000 sectors are 7 chunks of 128 and a tail of 104, which the library cannot be asked.
        assert disk.query_allocated(0, 1000) == [(128, 128), (512, 256), (896, 104)]
        assert bench.said("query") == ["query 0 896 128"]
        assert disk.query_allocated(200, 330) == [(200, 56), (512, 18)]
        assert bench.said("query")[-1] == "query 128 512 128"
        assert disk.query_allocated(950, 500) == [(950, 50)]
        assert len(bench.said("query")) == 2
        assert disk.query_allocated(0, 1000, chunk=1024) == [(0, 1000)]
        with pytest.raises(ValueError, match="chunk"):
            disk.query_allocated(0, 1000, chunk=100)


def test_allocated_blocks_in_slices(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vddkfs.engines.vddk.handle.MAX_CHUNKS", 3)
    with bench.open("x") as disk:
        assert disk.query_allocated(0, 896) == [(128, 128), (512, 256)]
    assert bench.said("query") == ["query 0 384 128", "query 384 384 128", "query 768 128 128"]
    assert len(bench.said("free blocks")) == 3


def test_an_absurd_list_of_blocks_is_not_believed(bench: Bench) -> None:
    with bench.open("absurd") as disk, pytest.raises(EngineError, match="1000000"):
        disk.query_allocated(0, 896)
    assert bench.said("free blocks")


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20))),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_merged_is_the_same_set_of_sectors(
    blocks: list[tuple[int, int]], start: int, end: int
) -> None:
    result = merged(blocks, start, end)
    sectors = {s for o, n in blocks for s in range(o, o + n) if start <= s < end}
    assert {s for o, n in result for s in range(o, o + n)} == sectors
    assert all(n > 0 for _, n in result)
    assert all(a + n < b for (a, n), (b, _) in pairwise(result))
