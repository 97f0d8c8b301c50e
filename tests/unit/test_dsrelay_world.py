"""Random lives of two relays: whatever happens, no stream outlives its reader and nothing is held for ever."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dskv.handle import KvHandle
from support.relay_desk import LEASE_S
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

    @rule(owner=OWNERS, reader=READERS, blocks=st.integers(3, 12))
    def begin(self, owner: str, reader: str, blocks: int) -> None:
        """A transfer that has come some way."""
        self.offer(owner, blocks)
        self.world.pull(reader, self.offered[-1])
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
        for owner in world.prefills.values():
            assert not owner.handles, "an owner never got its blocks back"
        assert not any(world.streams.values())


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
            while world.decodes[reader].copies:
                world.copy(reader, right=wrong == 1)
                wrong += 1
        assert (wrong, world.decodes[reader].done, world.prefills[owner].handles) == (2, 1, {})
