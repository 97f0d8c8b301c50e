"""Random lives of a system: whatever happens in whatever order, requests end once and right, nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.cluster import LEASE_S, ROUTER, TCP, TWO_NODES, Cluster, Shape
from support.raw_client import Heard

SMALL = Shape(prefill_blocks=24, decode_blocks=20, decode_batch=6, prefill_queue=4)
SHAPES = (
    SMALL,
    replace(SMALL, direct=False),
    replace(SMALL, prefill=TWO_NODES.prefill, decode=TWO_NODES.decode),
    replace(SMALL, prefill=("n0", "n1"), decode=("n0", "n1")),
    replace(TCP, prefill=("n0", "n0"), decode=("n0",), decode_blocks=24),
    replace(SMALL, prefill=(), decode=("n0", "n0"), mode="colocated", decode_tokens=12),
    replace(SMALL, prefill=(), mode="colocated", decode_tokens=16, prefill_priority=True, stages=2),
    replace(SMALL, mode="conditional", threshold_tokens=20, decode_tokens=8),
    replace(SMALL, target_tokens=16, stages=3, prefix_cache=False),
    replace(SMALL, decode=("n0", "n0"), keep_blocks=24),
    replace(SMALL, prefill=("n0", "n1"), decode=("n0", "n1"), keep_blocks=12),
    replace(TCP, prefill=("n0",), decode=("n0", "n0"), decode_blocks=24, keep_blocks=40),
    replace(SMALL, direct=False, collective="gloo", prefill=("n0", "n0"), decode=("n0", "n0"), keep_blocks=12),
    replace(SMALL, direct=False, collective="gloo", prefill=("n0", "n1"), decode=("n0", "n1")),
    replace(SMALL, prefill=("n0", "n1"), decode=("n0", "n1"), pairs=True),
    replace(
        SMALL,
        prefill=("n0", "n1"),
        decode=("n0", "n1"),
        pairs=True,
        mode="conditional",
        threshold_tokens=8,
        target_tokens=8,
        part_tokens=4,
        decode_queue=2,
    ),
    replace(SMALL, target_tokens=8, part_tokens=4, decode=("n0", "n0")),
    replace(SMALL, target_tokens=12, part_tokens=8, direct=False, prefill=("n0", "n0"), stages=2),
    replace(SMALL, target_tokens=8, part_tokens=4, prefill=("n0", "n1"), decode=("n0", "n1")),
    replace(SMALL, target_tokens=8, part_tokens=4, direct=False, collective="gloo", decode=("n0", "n0")),
)
CLIENTS = ("c", "d")
#: codes that trouble may lead to
TYPED = {
    "cancelled",
    "deadline_exceeded",
    "no_instance",
    "overloaded",
    "transfer_failed",
    "unknown_request",
    "worker_lost",
}

#: seconds before it, what, and numbers to choose by
Step: TypeAlias = tuple[float, str, int, int]


@dataclass
class Life:
    """A cluster, and the steps that can be taken with it."""

    cluster: Cluster
    submitted: int = 0
    #: whether an owner of KV, or one who knows who reads it, has died, or anybody was taken for dead
    bereft: bool = False

    def take(self, what: str, one: int, two: int) -> None:
        """Take a step."""
        steps: dict[str, Callable[[int, int], None]] = {
            "submit": self.submit,
            "cancel": self.cancel,
            "kill": self.kill,
            "start": self.start,
            "cut": self.cut,
            "reset": self.reset,
            "stall": self.stall,
            "leave": self.leave,
        }
        steps[what](one, two)

    def submit(self, one: int, two: int) -> None:
        client = self.cluster.client(CLIENTS[one % 2])
        if not client.talking:
            return
        self.submitted += 1
        client.submit(
            f"r{self.submitted}",
            1 + two % 40,
            max_tokens=1 + one % 17,
            n=1 + one % 3 // 2,
            deadline_s=30.0 if two % 5 == 0 else None,
        )

    def cancel(self, one: int, two: int) -> None:
        client = self.cluster.client(CLIENTS[one % 2])
        if client.requests:
            client.cancel(list(client.requests)[two % len(client.requests)])

    def kill(self, one: int, two: int) -> None:
        names = sorted(self.cluster.processes)
        if names:
            name = names[one % len(names)]
            self.bereft |= name.startswith(("prefill", "relay"))
            self.cluster.kill(name)

    def start(self, one: int, two: int) -> None:
        names = sorted({ROUTER, *self.cluster.shape.roles} - set(self.cluster.processes))
        if names:
            self.cluster.start(names[one % len(names)])

    def cut(self, one: int, two: int) -> None:
        names = sorted(self.cluster.shape.roles)
        others = [ROUTER, *(name for name in names if name.startswith("relay"))]
        name, other = names[one % len(names)], others[two % len(others)]
        seconds = (0.5, 3.0, 6.2, 8.0, 15.0)[two % 5]
        self.bereft |= seconds > self.cluster.shape.worker_lease_s
        self.cluster.wires.cut(name, other, seconds)

    def reset(self, one: int, two: int) -> None:
        names = sorted(self.cluster.shape.roles)
        others = [ROUTER, *(name for name in names if name.startswith("relay"))]
        self.cluster.wires.reset(names[one % len(names)], others[two % len(others)])

    def stall(self, one: int, two: int) -> None:
        names = sorted(self.cluster.processes)
        if names:
            seconds = (0.2, 2.0, 7.0)[two % 3]
            self.bereft |= seconds > self.cluster.shape.worker_lease_s
            self.cluster.stall(names[one % len(names)], seconds)

    def leave(self, one: int, two: int) -> None:
        client = self.cluster.client(CLIENTS[one % 2])
        if two % 2:
            client.leave()
        else:
            client.talking = False

    def end(self) -> None:
        """Everything is started again; all that can end does."""
        cluster = self.cluster
        for name in sorted({ROUTER, *cluster.shape.roles} - set(cluster.processes)):
            cluster.start(name)
        heard = [one for each in cluster.clients.values() if each.talking for one in each.requests.values()]
        cluster.until(lambda: all(one.end for one in heard), cluster.shape.max_deadline_s + 10.0)
        for each in cluster.clients.values():
            for one in each.requests.values():
                check(cluster, one)
        cluster.run(LEASE_S + 1.0 + cluster.shape.client_lease_s)
        assert cluster.held() == {}
        assert self.bereft or not cluster.corrupt()
        assert not cluster.endings


def check(cluster: Cluster, heard: Heard) -> None:
    """Tokens are those of an undisturbed run; the end is good, or typed."""
    sampling = heard.submit.sampling
    for choice in range(sampling.n):
        tokens = heard.tokens(choice)
        assert tokens == cluster.script.output(f"{heard.submit.request_id}/{choice}", len(tokens))
        assert heard.end != "finished" or len(tokens) == sampling.max_tokens
    assert heard.end in TYPED | {"", "finished"}


steps = st.lists(
    st.tuples(
        st.sampled_from((0.0, 0.003, 0.01, 0.03, 0.1, 0.5, 2.0, 7.0)),
        st.sampled_from(
            ("submit",) * 8 + ("cancel",) * 2 + ("kill", "start", "start", "cut", "reset", "stall", "leave")
        ),
        st.integers(0, 1000),
        st.integers(0, 1000),
    ),
    max_size=40,
)


def live(shape: int, seed: int, taken: list[Step]) -> Life:
    life = Life(Cluster(SHAPES[shape], seed=seed))
    for delay_s, what, one, two in taken:
        life.cluster.run(delay_s)
        life.take(what, one, two)
    life.end()
    return life


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=st.integers(0, len(SHAPES) - 1), seed=st.integers(0, 9), taken=steps)
def test_any_life_ends_well(shape: int, seed: int, taken: list[Step]) -> None:
    live(shape, seed, taken)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=st.integers(0, len(SHAPES) - 1), seed=st.integers(0, 9), taken=steps)
def test_the_same_seed_is_the_same_life(shape: int, seed: int, taken: list[Step]) -> None:
    assert live(shape, seed, taken).cluster.trace == live(shape, seed, taken).cluster.trace
