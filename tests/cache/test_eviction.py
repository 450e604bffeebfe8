"""The eviction policy against a model that does the same with lists, and against a scan."""

import itertools
import random
from collections.abc import Callable

import pytest
from cachetools import LRUCache
from hypothesis import example, given
from hypothesis import strategies as st

from vddkfs.cache.eviction import MOST_USES, EvictionCache

Key = tuple[int, int]


class Thing:
    """An item that knows its key."""

    def __init__(self, key: Key, weight: int = 1) -> None:
        self.key = key
        self.weight = weight
        self.uses = 0

    def use(self, times: int = 1) -> None:
        """Do what readers do."""
        for _ in range(times):
            if self.uses < MOST_USES:
                self.uses += 1


def anything(_thing: Thing) -> bool:
    return True


def key(number: int) -> Key:
    return (0, number)


def filled(*numbers: int, weight: int = 1) -> EvictionCache[Key, Thing]:
    cache: EvictionCache[Key, Thing] = EvictionCache()
    for number in numbers:
        cache[key(number)] = Thing(key(number), weight)
    return cache


def emptied(cache: EvictionCache[Key, Thing], may: Callable[[Thing], bool] = anything) -> list[int]:
    """Return the numbers of all that is evicted, in that order."""
    return [thing.key[1] for thing in iter(lambda: cache.evict(may), None)]


def test_it_is_a_mapping_with_a_size() -> None:
    cache = filled(1, 2)
    cache[key(3)] = Thing(key(3), 16)
    assert (len(cache), cache.currsize) == (3, 18)
    assert key(3) in cache
    assert cache[key(3)].weight == 16
    assert cache.get(key(4)) is None
    with pytest.raises(KeyError):
        cache[key(4)]
    assert cache.pop(key(3)).key == key(3)
    assert cache.pop(key(3), None) is None
    del cache[key(1)]
    with pytest.raises(KeyError):
        del cache[key(1)]
    assert (list(cache), cache.currsize) == ([key(2)], 1)


def test_an_item_that_is_there_is_replaced() -> None:
    cache = filled(1, 2)
    other = Thing(key(1), 16)
    cache[key(1)] = other
    assert cache[key(1)] is other
    assert (len(cache), cache.currsize) == (2, 17)
    assert emptied(cache) == [2, 1]
    assert cache.currsize == 0


def test_what_was_never_used_goes_in_its_order() -> None:
    assert emptied(filled(*range(50))) == list(range(50))


def test_uses_count_from_the_insertion_on() -> None:
    cache = filled(1)
    thing = Thing(key(2))
    thing.use()
    cache[key(2)] = thing
    assert thing.uses == 0


def test_what_was_used_stays_longer_the_more_it_was_used() -> None:
    cache = filled(*range(20))
    # Leaving the small part takes all uses; then those of the main part count.
    for number in range(4):
        cache[key(number)].use(3)
    assert emptied(cache)[:16] == list(range(4, 20))
    cache = filled(*range(20))
    for number in range(4):
        cache[key(number)].use()
    assert cache.evict(anything) is not None
    for number in range(4):
        cache[key(number)].use(number)
    assert emptied(cache)[-4:] == [0, 1, 2, 3]


def test_what_comes_back_soon_is_in_the_main_part() -> None:
    cache = filled(*range(20))
    gone = cache.evict(anything)
    assert gone is not None
    cache[gone.key] = gone
    assert cache.ghosts_weight == 0
    assert emptied(cache)[-1] == gone.key[1]


@pytest.mark.parametrize("how", ["pop", "del"])
def test_what_was_dropped_on_purpose_is_new_when_it_comes_back(how: str) -> None:
    cache = filled(*range(20))
    if how == "pop":
        cache.pop(key(0))
    else:
        del cache[key(0)]
    assert cache.ghosts_weight == 0
    cache[key(0)] = Thing(key(0))
    cache[key(20)] = Thing(key(20))
    assert emptied(cache)[-2:] == [0, 20]


def test_what_is_demoted_goes_next() -> None:
    cache = filled(*range(20))
    for number in range(20):
        cache[key(number)].use(3)
    cache.demote(key(7))
    cache.demote(key(3))
    assert emptied(cache)[:2] == [7, 3]
    assert cache.ghosts_weight == 0


def test_what_is_used_after_it_was_demoted_stays() -> None:
    cache = filled(*range(20))
    cache.demote(key(7))
    cache.demote(key(3))
    cache[key(7)].use()
    order = emptied(cache)
    assert (order[0], order[-1]) == (3, 7)


def test_demoting_what_is_gone_does_nothing() -> None:
    cache = filled(1)
    cache.demote(key(2))
    assert emptied(cache) == [1]
    cache.demote(key(1))
    assert (len(cache), cache.currsize) == (0, 0)


def test_the_pinned_stay_and_none_may_go_if_all_are_pinned() -> None:
    cache = filled(*range(20))
    cache.demote(key(1))
    cache[key(2)].use()
    pinned = {key(0), key(1), key(2)}
    assert emptied(cache, lambda thing: thing.key not in pinned) == list(range(3, 20))
    assert set(cache) == pinned
    assert cache.evict(lambda _thing: False) is None
    assert (len(cache), cache.currsize) == (3, 3)
    assert sorted(emptied(cache)) == [0, 1, 2]


def test_the_pinned_are_looked_at_seldom() -> None:
    cache = filled(*range(4000))
    pinned = {key(number) for number in range(0, 100)}
    looks = 0

    def may(thing: Thing) -> bool:
        nonlocal looks
        looks += 1
        return thing.key not in pinned

    for number in range(4000, 14_000):
        assert cache.evict(may) is not None
        cache[key(number)] = Thing(key(number))
    assert pinned <= set(cache)
    assert looks < 10_000 * 1.2


def test_one_eviction_looks_at_some_only_however_hot_all_are() -> None:
    cache = filled(*range(10_000))
    for thing in cache.values():
        thing.use(3)
    assert cache.evict(anything) is not None
    assert sum(thing.uses < 3 for thing in cache.values()) < 300


def test_clear_forgets_everything() -> None:
    cache = filled(*range(100), weight=16)
    for number in range(10):
        cache.demote(key(number))
    for _ in range(20):
        cache.evict(anything)
    cache[key(90)].use()
    assert cache.ghosts_weight
    cache.clear()
    assert (len(cache), cache.currsize, cache.ghosts_weight) == (0, 0, 0)
    assert cache.evict(anything) is None
    cache[key(1)] = Thing(key(1))
    assert emptied(cache) == [1]


def test_a_scan_does_not_flush_what_is_read_again_and_again() -> None:
    """LRU, beside it, keeps nearly nothing of the same reads."""
    capacity, dice = 1000, random.Random(1)
    working_set = [key(number) for number in range(700)]
    ours: EvictionCache[Key, Thing] = EvictionCache()
    lru: LRUCache[Key, None] = LRUCache(capacity)

    def read(wanted: Key) -> tuple[bool, bool]:
        hit = wanted in ours
        if hit:
            ours[wanted].use()
        else:
            while ours.currsize >= capacity:
                assert ours.evict(anything) is not None
            ours[wanted] = Thing(wanted)
        lru_hit = wanted in lru
        if lru_hit:
            lru[wanted]
        else:
            lru[wanted] = None
        return hit, lru_hit

    for _ in range(2):
        for wanted in dice.sample(working_set, len(working_set)):
            read(wanted)
    hits = lru_hits = reads = 0
    again = itertools.cycle(dice.sample(working_set, len(working_set)))
    for number in range(10 * capacity):
        read((1, number))
        hit, lru_hit = read(next(again))
        reads, hits, lru_hits = reads + 1, hits + hit, lru_hits + lru_hit
    assert hits / reads >= 0.9
    assert lru_hits / reads < 0.5


class Model:
    """The same policy in the plainest words. Queues are lists of things, the next one first."""

    def __init__(self) -> None:
        self.small: list[Thing] = []
        self.main: list[Thing] = []
        self.demoted: list[Thing] = []
        self.ghosts: list[tuple[Key, int]] = []
        self.largest = 0

    @property
    def things(self) -> list[Thing]:
        return self.small + self.main + self.demoted

    @property
    def size(self) -> int:
        return sum(thing.weight for thing in self.things)

    def find(self, wanted: Key) -> Thing | None:
        return next((thing for thing in self.things if thing.key == wanted), None)

    def remove(self, thing: Thing) -> None:
        for queue in (self.small, self.main, self.demoted):
            if thing in queue:
                queue.remove(thing)

    def insert(self, thing: Thing) -> None:
        before = self.find(thing.key)
        if before is not None:
            self.remove(before)
        remembered = [ghost for ghost in self.ghosts if ghost[0] == thing.key]
        self.ghosts = [ghost for ghost in self.ghosts if ghost not in remembered]
        (self.main if remembered else self.small).append(thing)
        self.largest = max(self.largest, self.size)

    def demote(self, thing: Thing) -> None:
        self.remove(thing)
        self.demoted.append(thing)

    def evict(self, pinned: set[Key]) -> Thing | None:
        uses = {thing.key: thing.uses for thing in self.things}
        size = self.size
        aside: list[tuple[list[Thing], Thing]] = []
        found = None
        while found is None and (self.small or self.main or self.demoted):
            small = 10 * sum(thing.weight for thing in self.small) > size or not self.main
            queue = self.demoted or (self.small if small and self.small else self.main)
            thing = queue.pop(0)
            if uses[thing.key]:
                uses[thing.key] = uses[thing.key] - 1 if queue is self.main else 0
                self.main.append(thing)
            elif thing.key in pinned:
                aside.append((queue, thing))
            else:
                found = thing
                if queue is self.small:
                    self.ghosts.append((thing.key, thing.weight))
                    while 10 * sum(weight for _, weight in self.ghosts) > 9 * size:
                        self.ghosts.pop(0)
        for queue, thing in aside:
            queue.append(thing)
        return found


numbers = st.integers(0, 24)
steps = st.one_of(
    st.tuples(st.just("insert"), numbers, st.sampled_from([1, 1, 1, 16])),
    st.tuples(st.just("use"), numbers, st.integers(1, 5)),
    st.tuples(st.just("evict"), st.sets(numbers, max_size=8), st.just(0)),
    st.tuples(st.just("demote"), numbers, st.just(0)),
    st.tuples(st.just("drop"), numbers, st.just(0)),
)


@given(st.lists(steps, max_size=150))
@example(
    [("insert", 0, 1), ("insert", 1, 1), ("use", 0, 1), ("evict", set(), 0), ("evict", set(), 0)]
)
def test_it_does_as_the_model_does(steps: list[tuple[str, object, int]]) -> None:
    cache: EvictionCache[Key, Thing] = EvictionCache()
    model = Model()
    for what, argument, more in steps:
        if what == "evict":
            assert isinstance(argument, set)
            pinned = {key(number) for number in argument}
            expected = model.evict(pinned)
            assert cache.evict(lambda thing, pinned=pinned: thing.key not in pinned) is expected
            assert expected is None or expected.key not in pinned
            assert expected is not None or {thing.key for thing in model.things} <= pinned
        else:
            assert isinstance(argument, int)
            there = model.find(key(argument))
            if what == "insert":
                thing = Thing(key(argument), more)
                cache[thing.key] = thing
                model.insert(thing)
            elif there is None:
                cache.demote(key(argument))
                assert cache.pop(key(argument), None) is None
            elif what == "use":
                there.use(more)
            elif what == "demote":
                cache.demote(there.key)
                model.demote(there)
            else:
                del cache[there.key]
                model.remove(there)
        # Nothing is lost, nothing is there twice, and all sizes are exact.
        assert {thing.key: thing for thing in model.things} == dict(cache)
        assert len(cache) == len(model.things)
        assert cache.currsize == model.size
        assert cache.ghosts_weight == sum(weight for _, weight in model.ghosts)
        assert 10 * cache.ghosts_weight <= 9 * model.largest
    left = emptied(cache)
    assert sorted(left) == sorted(thing.key[1] for thing in model.things)
    assert (len(cache), cache.currsize) == (0, 0)
