"""The SDK's machine against the real router machine, through restarts and broken connections."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.cluster import LEASE_S, ROUTER, Cluster
from support.sdk_client import SdkClient, Told

#: codes that trouble with the router may lead to
TYPED = {"finished", "cancelled", "router_lost", "unknown_request"}
#: seconds before it, what, and a number to choose by
Step: TypeAlias = tuple[float, str, int]


def client_of(cluster: Cluster) -> SdkClient:
    return SdkClient("sdk", cluster.clock, cluster.wires, ROUTER)


def check(cluster: Cluster, told: Told) -> None:
    sampling = told.submit.sampling
    tokens = told.tokens()
    assert tokens == cluster.script.output(f"{told.submit.request_id}/0", len(tokens))
    assert told.end in TYPED
    assert told.end != "finished" or len(tokens) == sampling.max_tokens


def test_a_request_from_hello_to_finish() -> None:
    cluster = Cluster()
    told = client_of(cluster).submit("r", 9, max_tokens=12)
    cluster.until(lambda: bool(told.end))
    assert told.end == "finished"
    check(cluster, told)


def test_a_request_that_the_router_had_not_answered_survives_its_restart() -> None:
    cluster = Cluster()
    cluster.kill(ROUTER)
    told = client_of(cluster).submit("r", 9, max_tokens=12)
    cluster.run(3)
    cluster.start(ROUTER)
    cluster.until(lambda: bool(told.end), 20)
    assert told.end == "finished"


def test_a_request_that_had_begun_ends_with_the_router() -> None:
    cluster = Cluster()
    told = client_of(cluster).submit("r", 9, max_tokens=40)
    cluster.until(lambda: len(told.tokens()) > 5)
    cluster.restart(ROUTER)
    cluster.until(lambda: bool(told.end), 20)
    assert told.end == "router_lost"
    cluster.run(LEASE_S + 1)
    assert cluster.held() == {}


@pytest.mark.parametrize("times", [1, 5, 20])
def test_events_that_a_broken_connection_took_come_again(times: int) -> None:
    cluster = Cluster()
    told = client_of(cluster).submit("r", 9, max_tokens=40)
    cluster.until(lambda: len(told.tokens()) > 5)
    for _ in range(times):
        cluster.wires.reset("sdk", ROUTER)
        cluster.run(0.01)
    cluster.until(lambda: bool(told.end), 20)
    assert told.end == "finished"
    check(cluster, told)


def test_a_request_that_nobody_reads_is_stopped() -> None:
    cluster = Cluster()
    client = client_of(cluster)
    told = client.submit("r", 9, max_tokens=200)
    cluster.until(lambda: len(told.tokens()) > 5)
    client.leave("r")
    cluster.run(1)
    assert cluster.router.ended == {"cancelled": 1}
    assert cluster.held() == {}


def test_closing_stops_everything() -> None:
    cluster = Cluster()
    client = client_of(cluster)
    told = [client.submit(f"r{number}", 9, max_tokens=200) for number in range(4)]
    cluster.until(lambda: all(len(one.tokens()) > 5 for one in told))
    client.close()
    assert {one.end for one in told} == {"cancelled"}
    cluster.run(1)
    assert cluster.router.ended == {"cancelled": 4}
    assert cluster.held() == {}


steps = st.lists(
    st.tuples(
        st.sampled_from((0.0, 0.003, 0.03, 0.1, 0.5, 2.0, 7.0)),
        st.sampled_from(("submit",) * 5 + ("cancel", "leave", "reset", "cut", "kill", "start", "stall")),
        st.integers(0, 100),
    ),
    max_size=30,
)


def trouble(cluster: Cluster, what: str, one: int) -> None:
    """Something happens to the router or to the connection."""
    up = ROUTER in cluster.processes
    if what == "reset":
        cluster.wires.reset("sdk", ROUTER)
    elif what == "cut":
        cluster.wires.cut("sdk", ROUTER, (0.5, 3.0, 6.2, 12.0)[one % 4])
    elif what == "stall" and up:
        cluster.stall(ROUTER, (0.5, 3.0)[one % 2])
    elif what == "kill" and up:
        cluster.kill(ROUTER)
    elif what == "start" and not up:
        cluster.start(ROUTER)


def live(seed: int, taken: list[Step]) -> None:
    """Take all steps, start what is down, and wait for every end."""
    cluster = Cluster(seed=seed)
    client = client_of(cluster)
    left: set[str] = set()
    for delay_s, what, one in taken:
        cluster.run(delay_s)
        name = f"r{one % (len(client.requests) or 1)}"
        if what == "submit":
            client.submit(f"r{len(client.requests)}", 1 + one % 30, max_tokens=1 + one % 20)
        elif what == "cancel":
            client.cancel(name)
        elif what == "leave":
            client.leave(name)
            left.add(name)
        else:
            trouble(cluster, what, one)
    trouble(cluster, "start", 0)
    read = [told for name, told in client.requests.items() if name not in left]
    cluster.until(lambda: all(told.end for told in read), 150.0)
    for told in read:
        check(cluster, told)
    cluster.run(3 * LEASE_S)
    assert cluster.held() == {}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 9), taken=steps)
def test_any_life_ends_every_request_once(seed: int, taken: list[Step]) -> None:
    live(seed, taken)
