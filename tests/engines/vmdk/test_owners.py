"""Long chains: what is remembered of the walk down them is right, whatever the links are like."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vddkfs.engines.vmdk import VmdkEngine, owners
from vddkfs.engines.vmdk.owners import Owners

Read = Callable[..., bytes]
SECTORS = 2 * 8192
"""Regions of granules of 8 sectors have 8192 sectors."""


class Chain:
    """Links of hosted sparse grains of random sizes, and what each image shows."""

    def __init__(self, make: Any, seed: int, links: int) -> None:
        draw = random.Random(seed)
        self.paths: list[str] = []
        self.images: list[bytes] = []
        content = bytes(SECTORS * 512)
        for number in range(links):
            grain = draw.choice([8, 16, 64, 128])
            # A parent may be shorter than its child, or longer.
            capacity = SECTORS - draw.choice([0, 0, 0, 1, 100, 9000]) if number else SECTORS
            grains = {
                draw.randrange(-(-capacity // grain)): self._grain(draw, grain) for _ in range(12)
            }
            name = f"{seed}-{number}.vmdk"
            hint = f"{seed}-{number - 1}.vmdk" if number else ""
            parent = "12345678" if number else "ffffffff"
            path = make.sparse(
                name, capacity, grains, grain=grain, zero_flag=True, parent=parent, hint=hint
            )
            self.paths.append(path)
            content = self._below(content, capacity)
            image = bytearray(content)
            for index, data in grains.items():
                begin = index * grain * 512
                data = bytes(grain * 512) if isinstance(data, int) else data
                image[begin : begin + len(data)] = data
            content = bytes(image[: capacity * 512])
            self.images.append(content)

    @staticmethod
    def _grain(draw: random.Random, grain: int) -> bytes | int:
        return 1 if draw.random() < 0.2 else draw.randbytes(64) * (grain * 8)

    @staticmethod
    def _below(content: bytes, capacity: int) -> bytes:
        return content[: capacity * 512].ljust(capacity * 512, b"\0")


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 1 << 30), links=st.integers(5, 12))
def test_every_image_at_every_place(make: Any, read: Read, seed: int, links: int) -> None:
    chain, draw = Chain(make, seed, links), random.Random(seed)
    engine = VmdkEngine(chain.paths)
    try:
        for image in range(links):
            content = chain.images[image]
            capacity = len(content) // 512
            for turn in range(90):
                count = draw.choice([1, 8, 8, 8, 9, 128])
                # The same few regions again and again, at places of all kinds.
                sector = draw.randrange(max(1, capacity - count))
                sector -= draw.choice([0, sector % 8])
                count = min(count, capacity - sector)
                wanted = content[sector * 512 :][: count * 512]
                assert read(engine, sector, count, image=image, direct=turn % 7 == 0) == wanted
                buffer = bytearray(count * 512)
                if engine.read_nowait(image, sector, count, memoryview(buffer), False):
                    assert buffer == wanted
            assert read(engine, 0, capacity, image=image) == content
    finally:
        engine.close()


def warm(engine: VmdkEngine, read: Read, image: int) -> None:
    for _ in range(40):
        read(engine, 8, 8, image=image)


def make_deep(make: Any, links: int = 8) -> list[str]:
    """Make a chain in whose base alone there is something."""
    paths = [make.sparse("0.vmdk", 8192, {0: b"base" * 1024}, grain=8)]
    for number in range(1, links):
        hint = f"{number - 1}.vmdk"
        paths.append(make.sparse(f"{number}.vmdk", 8192, {}, grain=8, parent="12345678", hint=hint))
    return paths


def test_a_long_chain_is_walked_a_few_times_only(
    make: Any, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VmdkEngine(make_deep(make))
    asked: list[int] = []
    plain = Owners.top

    def top(self: Owners, image: int, sector: int, count: int) -> int:
        asked.append(plain(self, image, sector, count))
        return asked[-1]

    monkeypatch.setattr(Owners, "top", top)
    warm(engine, read, 7)
    assert asked[:16] == [7] * 16
    assert set(asked[17:]) == {0}, "the base is asked at once"
    engine.close()


@pytest.mark.parametrize("how", ["revalidate", "renew"])
def test_the_leaf_may_change(make: Any, read: Read, how: str) -> None:
    paths = make_deep(make)
    engine = VmdkEngine(paths)
    warm(engine, read, 7)
    before = Path(paths[-1]).read_bytes()
    make.sparse("7.vmdk", 8192, {1: b"leaf" * 1024}, grain=8, parent="12345678", hint="6.vmdk")
    fresh = Path(paths[-1]).read_bytes()
    assert fresh != before
    assert read(engine, 8, 8, image=7) == bytes(4096), "what is remembered"
    getattr(engine, how)()
    assert read(engine, 8, 8, image=7) == b"leaf" * 1024
    assert read(engine, 8, 8, image=6) == bytes(4096)
    engine.close()


def test_the_base_may_be_written(make: Any, read: Read) -> None:
    """Whether the base has a grain is never remembered."""
    paths = make_deep(make)
    engine = VmdkEngine(paths)
    warm(engine, read, 7)
    make.sparse("0.vmdk", 8192, {1: b"more" * 1024}, grain=8)
    engine._links[0].extents[0].forget()
    assert read(engine, 8, 8, image=7) == b"more" * 1024
    engine.close()


def test_the_trap(make: Any, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a short link is nothing, though a lower one has something there."""
    paths = [make.sparse("0.vmdk", 4096, {500: b"deep" * 1024}, grain=8)]
    for number in range(1, 7):
        capacity = 2048 if number == 3 else 4096
        hint = f"{number - 1}.vmdk"
        paths.append(
            make.sparse(f"{number}.vmdk", capacity, {}, grain=8, parent="12345678", hint=hint)
        )
    engine = VmdkEngine(paths)
    for _ in range(40):
        assert read(engine, 4000, 8, image=6) == bytes(4096)
    engine.close()
    plain = owners._set

    def blind(found: bytearray, first: int, stop: int, number: int) -> None:
        if number != owners._MIXED:
            plain(found, first, stop, number)

    monkeypatch.setattr(owners, "_set", blind)
    engine = VmdkEngine(paths)
    read(engine, 4000, 8, image=0)
    found = {read(engine, 4000, 8, image=6) for _ in range(40)}
    assert b"deep" * 1024 in found
    engine.close()
