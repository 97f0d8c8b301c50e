"""Random lives of two relays: whatever happens, no slot has two users and nothing is held for ever."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dskv.handle import KvHandle
from dswire.messages import kv
from support.relay_desk import LEASE_S, TIMEOUT_S
from support.relay_world import NODES, RelayWorld

OWNERS = st.sampled_from([f"prefill-{node}" for node in NODES])
READERS = st.sampled_from([f"decode-{node}" for node in NODES])
WORKERS = OWNERS | READERS
PICK = st.integers(0, 1_000)
#: nothing outlives the last interest in it by more, in seconds
LONGEST_S = LEASE_S + 1.0


class RelayLives(RuleBasedStateMachine):
    """Offers, pulls, aborts, losses, restarts and time, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = RelayWorld()
        self.world.run_dry()
        self.offered: list[KvHandle] = []

    @rule(owner=OWNERS, blocks=st.integers(1, 9))
    def offer(self, owner: str, blocks: int) -> None:
        before = set(self.world.prefills[owner].handles)
        self.world.offer(owner, blocks)
        handles = self.world.prefills[owner].handles
        self.offered += [handles[key] for key in handles if key not in before]

    @rule(owner=OWNERS, reader=READERS, blocks=st.integers(3, 12), work=st.integers(0, 3))
    def begin(self, owner: str, reader: str, blocks: int, work: int) -> None:
        """A transfer that has come some way."""
        self.offer(owner, blocks)
        self.world.pull(reader, self.offered[-1])
        self.world.run_dry()
        for _ in range(work):
            self.stage(owner, work)
            self.world.run_dry()

    @precondition(lambda self: self.offered)
    @rule(reader=READERS, pick=PICK)
    def pull(self, reader: str, pick: int) -> None:
        self.world.pull(reader, self.offered[-1 - pick % min(4, len(self.offered))])

    @rule(reader=READERS, pick=PICK)
    def abort(self, reader: str, pick: int) -> None:
        pulls = list(self.world.decodes[reader].pulls)
        if pulls:
            self.world.abort(reader, pulls[pick % len(pulls)])

    @rule(owner=OWNERS, pick=PICK)
    def withdraw(self, owner: str, pick: int) -> None:
        keys = list(self.world.prefills[owner].handles)
        if keys:
            self.world.withdraw(owner, keys[pick % len(keys)])

    @rule(reader=READERS)
    def extend(self, reader: str) -> None:
        self.world.extend(reader)

    @rule(owner=OWNERS, pick=PICK)
    def stage(self, owner: str, pick: int) -> None:
        stages = self.world.prefills[owner].stages
        if stages:
            self.world.stage(owner, pick % len(stages))

    @rule(reader=READERS, right=st.booleans())
    def copy(self, reader: str, right: bool) -> None:
        if self.world.decodes[reader].copies:
            self.world.copy(reader, right=right)

    @rule(count=st.integers(1, 12), pick=PICK)
    def deliver(self, count: int, pick: int) -> None:
        for at in range(count):
            links = self.world.busy_links()
            if links:
                self.world.deliver(links[(pick + at) % len(links)])

    @rule()
    def work(self) -> None:
        """Everybody does everything there is to do."""
        self.world.run_dry()
        self.world.work()

    @rule()
    def run_dry(self) -> None:
        """The network keeps up."""
        self.world.run_dry()

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 11.0, 31.0]), deliver=st.booleans())
    def wait(self, seconds: float, deliver: bool) -> None:
        self.world.advance(seconds, deliver=deliver)

    @rule(name=WORKERS)
    def restart_worker(self, name: str) -> None:
        self.world.restart_worker(name)

    @rule(name=WORKERS)
    def lose_worker(self, name: str) -> None:
        one = (self.world.prefills | self.world.decodes)[name]
        self.world.lose(one.node, f"worker:{name}")

    @rule(node=st.sampled_from(NODES), fetching=st.booleans())
    def lose_relay(self, node: str, fetching: bool) -> None:
        other = NODES[1 - NODES.index(node)]
        self.world.lose(node, f"relay:{other}" if fetching else f"fetcher:relay-{other}")

    @rule(node=st.sampled_from(NODES))
    def restart_relay(self, node: str) -> None:
        self.world.restart_relay(node)

    @invariant()
    def nobody_complains(self) -> None:
        assert not self.world.complaints

    def teardown(self) -> None:
        """Nobody does any work any more, pings aside: everything is given back."""
        world = self.world
        for name in (*world.prefills, *world.decodes):
            world.greet(name)
        world.advance(LONGEST_S, deliver=True)
        world.run_dry()
        for relay in world.relays.values():
            assert not relay.ledger.handles
            assert not relay.ledger.early
            assert not relay.outgoing.transfers
            assert not relay.outgoing.asked
            assert not relay.incoming.transfers
            assert relay.incoming.slots.held == 0
        for owner in world.prefills.values():
            assert not owner.handles, "an owner never got its blocks back"
        # an owner that was asked for a copy and never ends it keeps the slot from others for a while
        world.advance(TIMEOUT_S, deliver=True)
        assert not any(relay.outgoing.slots.held for relay in world.relays.values())


RelayLives.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestRelayLives = RelayLives.TestCase


def test_everything_arrives_when_nobody_fails() -> None:
    world = RelayWorld()
    world.run_dry()
    for owner in world.prefills:
        for blocks in (1, 2, 5, 9):
            world.offer(owner, blocks)
    handles = [handle for owner in world.prefills.values() for handle in owner.handles.values()]
    for at, handle in enumerate(handles):
        world.pull(f"decode-n{at % 2}", handle)
    for _ in range(60):
        world.run_dry()
        world.work()
    assert sum(reader.done for reader in world.decodes.values()) == len(handles)
    assert not any(owner.handles for owner in world.prefills.values())


def test_what_was_wrong_comes_once_more() -> None:
    for owner, reader in (("prefill-n0", "decode-n0"), ("prefill-n0", "decode-n1"), ("prefill-n1", "decode-n1")):
        world = RelayWorld()
        world.run_dry()
        world.offer(owner, 5)
        (handle,) = world.prefills[owner].handles.values()
        world.pull(reader, handle)
        wrong = 0
        for _ in range(20):
            world.run_dry()
            while world.prefills[owner].stages:
                world.stage(owner, 0)
            world.run_dry()
            while world.decodes[reader].copies:
                ready = world.decodes[reader].copies[0]
                last = isinstance(ready, kv.KvGrant) or ready.chunk.first + ready.chunk.count == 5
                world.copy(reader, right=not last or wrong == 1)
                wrong += last
        assert (wrong, world.decodes[reader].done, world.prefills[owner].handles) == (2, 1, {})


def test_a_late_write_into_a_slot_spoils_nobody() -> None:
    world = RelayWorld()
    world.run_dry()
    owner, reader = world.prefills["prefill-n0"], world.decodes["decode-n1"]
    world.offer(owner.name, 4)
    (old,) = owner.handles.values()
    world.pull(reader.name, old)
    world.run_dry()
    assert len(owner.stages) == 2, "both slots are under the owner's pen"
    world.abort(reader.name, old.key)
    world.run_dry()
    world.offer(owner.name, 4)
    (new,) = owner.handles.values()
    world.pull(reader.name, new)
    for _ in range(6):
        world.run_dry()
        # the aborted transfer's copies end last, all before the network moves
        for stage in sorted(owner.stages, key=lambda stage: stage.key == old.key):
            world.stage(owner.name, owner.stages.index(stage))
        world.run_dry()
        world.work()
    assert reader.done == 1
