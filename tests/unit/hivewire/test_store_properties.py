"""Properties: the in-memory store answers as a simple model does, and a mirror survives any sequence of faults."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from hivewire.errors import HivewireError, RevisionConflict
from hivewire.store.api import (
    Compare,
    CreateRevisionIs,
    Delete,
    IsAbsent,
    KeyValue,
    ModRevisionIs,
    Op,
    Put,
    WatchEvents,
)
from hivewire.store.memory import MemoryStore
from hivewire.store.mirror import Mirror, MirrorSettings
from tests.fakes.clock import FakeClock

KEYS = ("a/1", "a/2", "a/3", "b/1", "b/2")
PREFIXES = ("", "a/", "b/", "b/2")

keys = st.sampled_from(KEYS)
values = st.binary(max_size=2)
ops = st.one_of(st.builds(Put, keys, values), st.builds(Delete, keys))
op_lists = st.lists(ops, max_size=4, unique_by=lambda op: op.key)
revisions = st.integers(0, 12)
compares = st.one_of(
    st.builds(ModRevisionIs, keys, revisions), st.builds(CreateRevisionIs, keys, revisions), st.builds(IsAbsent, keys)
)
txns = st.tuples(st.lists(compares, max_size=1), op_lists)


@dataclass
class Model:
    """All revisions of the store, each a whole dict."""

    past: list[dict[str, KeyValue]] = field(default_factory=lambda: [{}, {}])

    def holds(self, compare: Compare) -> bool:
        item = self.past[-1].get(compare.key)
        match compare:
            case ModRevisionIs(_, revision):
                return revision == (item.mod_revision if item else 0)
            case CreateRevisionIs(_, revision):
                return revision == (item.create_revision if item else 0)
            case IsAbsent():
                return item is None

    def apply(self, ops: list[Op]) -> None:
        revision, new = len(self.past), dict(self.past[-1])
        for op in ops:
            old = new.pop(op.key, None)
            if isinstance(op, Put):
                created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
                new[op.key] = KeyValue(op.key, op.value, created, revision, version)
        if new != self.past[-1]:
            self.past.append(new)

    def list(self, prefix: str, revision: int) -> tuple[KeyValue, ...]:
        return tuple(item for key, item in sorted(self.past[revision].items()) if key.startswith(prefix))


@given(st.lists(txns, max_size=30), st.integers(0, 30))
def test_the_memory_store_answers_as_the_model(steps: list[tuple[list[Compare], list[Op]]], compact_at: int) -> None:
    """Any sequence of transactions gives the model's revisions, conflicts, lists now and in the past, and watches."""
    store, model = MemoryStore(), Model()
    floor = 1
    for number, (guards, writes) in enumerate(steps):
        if all(map(model.holds, guards)):
            model.apply(writes)
            assert store.txn(guards, writes) == len(model.past) - 1
        else:
            try:
                store.txn(guards, writes)
            except RevisionConflict:
                pass
            else:
                raise AssertionError("a guard that does not hold was accepted")
        if number == compact_at:
            floor = store.revision
            store.compact(floor)
    for prefix in PREFIXES:
        for revision in range(floor, len(model.past)):
            assert store.list(prefix, revision=revision).items == model.list(prefix, revision)
        check_watch(store, model, prefix, floor)
    for key in KEYS:
        assert store.get(key) == model.past[-1].get(key)


def check_watch(store: MemoryStore, model: Model, prefix: str, floor: int) -> None:
    """A watch from the first revision after `floor` replays the model's revisions one by one."""
    watch = store.open_watch()
    watch.add(prefix, floor + 1)
    items = {item.key: item for item in model.list(prefix, floor)}
    while (got := watch.next(0.0)) is not None:
        if not isinstance(got, WatchEvents):
            continue
        for event in got.events:
            items.pop(event.key, None)
            if event.item:
                items[event.key] = event.item
        assert tuple(items[key] for key in sorted(items)) == model.list(prefix, got.revision)
    assert tuple(items[key] for key in sorted(items)) == model.list(prefix, len(model.past) - 1)
    watch.close()


actions = st.one_of(
    st.tuples(st.just("txn"), op_lists),
    st.tuples(st.just("lease"), keys),
    st.tuples(st.just("step"), st.none()),
    st.tuples(st.just("advance"), st.sampled_from([0.01, 0.1, 5.0, 20.0, 700.0])),
    st.tuples(st.just("follow"), st.sampled_from(PREFIXES)),
    st.tuples(st.just("unfollow"), st.sampled_from(PREFIXES)),
    st.tuples(st.sampled_from(["drop", "break", "compact", "away", "back", "fail", "wipe", "lose answer"]), st.none()),
)


class World:
    """A store with faults, a mirror of it, and a copy kept only from what the mirror told."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.mirror = Mirror(
            self.store,
            self.tell,
            settings=MirrorSettings(),
            clock=self.clock,
            rng=random.Random(0),  # noqa: S311
        )
        self.copies: dict[str, dict[str, KeyValue]] = {}
        self.followed: set[str] = set()

    def tell(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        """Take over only the keys that are said to have changed."""
        assert prefix in self.followed
        assert complete or prefix in self.copies, "the first report of a prefix is a complete one"
        items, copy = self.mirror.items(prefix), self.copies.setdefault(prefix, {})
        for key in changed_keys:
            copy.pop(key, None)
            if key in items:
                copy[key] = items[key]

    def do(self, name: str, argument: object) -> None:
        store, faults = self.store, self.store.faults
        match name, argument:
            case "txn", list(ops):
                self.attempt(lambda: store.txn((), ops))
            case "lease", str(key):
                self.attempt(lambda: store.put(key, b"", store.grant_lease(10)))
            case "step", _:
                self.mirror.step(0.0)
            case "advance", float(seconds):
                self.clock.advance(seconds)
            case "follow", str(prefix):
                self.followed.add(prefix)
                self.mirror.follow(prefix)
            case "unfollow", str(prefix):
                self.followed.discard(prefix)
                self.copies.pop(prefix, None)
                self.mirror.unfollow(prefix)
            case "drop", _:
                faults.drop_watches()
            case "break", _:
                faults.break_watches()
            case "compact", _:
                faults.compact_now()
            case "away", _:
                faults.set_unavailable(True)
            case "back", _:
                faults.set_unavailable(False)
            case "fail", _:
                faults.fail_next_calls(2)
            case "wipe", _:
                faults.wipe()
            case "lose answer", _:
                faults.lose_next_answers(1)
            case _:
                raise AssertionError(name)

    def attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except HivewireError:
            return

    def settle(self) -> None:
        """End all faults and let enough time pass for the watchdog and every retry."""
        self.store.faults.set_unavailable(False)
        self.store.faults.fail_next_calls(0)
        for _ in range(12):
            self.clock.advance(5.0)
            for _ in range(4):
                self.mirror.step(0.0)
                self.clock.advance(0.02)


@settings(max_examples=300, deadline=None)
@given(st.lists(actions, max_size=40), st.sets(st.sampled_from(PREFIXES), min_size=1))
def test_a_mirror_ends_equal_to_the_store(steps: list[tuple[str, object]], prefixes: set[str]) -> None:
    """After any writes, faults and followings the mirror, and whoever believed its reports, equal a list."""
    world = World()
    for prefix in sorted(prefixes):
        world.do("follow", prefix)
    for name, argument in steps:
        world.do(name, argument)
    world.settle()
    assert world.mirror.healthy
    for prefix in world.followed:
        expected = {item.key: item for item in world.store.list(prefix).items}
        assert dict(world.mirror.items(prefix)) == expected
        assert world.copies[prefix] == expected
