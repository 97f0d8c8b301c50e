"""The registry of workers, and of clients."""

from __future__ import annotations

import pytest

from dsrouter.clients import Clients
from dsrouter.workers import Workers
from dswire.messages import PROTOCOL, worker
from support.handles import LAYOUT

MODEL = worker.ModelIdentity("tiny", "f", "float16")
ROLES = {"relay-n0": "relay", "prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}


def hello(name: str, blocks: int = 8) -> worker.WorkerHello:
    capacity = None if ROLES[name] == "relay" else worker.Capacity(blocks, LAYOUT)
    model = None if ROLES[name] == "relay" else MODEL
    return worker.WorkerHello(PROTOCOL, name, ROLES[name], "n0", "1", model, capacity)


@pytest.fixture
def workers() -> Workers:
    made = Workers(ROLES, MODEL)
    for name in ("relay-n0", "decode-0", "decode-1"):
        made.join(10.0, f"{name}/1", hello(name))
    return made


def test_who_is_behind_a_connection(workers: Workers) -> None:
    found = workers.at("decode-0/1")
    assert found is not None
    assert found is workers.get("decode-0")
    assert workers.at("decode-0/2") is None
    assert workers.get(None) is None
    workers.leave(11.0, found)
    assert workers.at("decode-0/1") is None
    assert [one.hello.name for one in workers.role("decode")] == ["decode-1"]


def test_the_least_loaded_is_chosen_and_ties_go_round(workers: Workers) -> None:
    chosen = []
    for number in range(4):
        target = workers.choose("decode", 10)
        assert target is not None
        chosen.append(target.hello.name)
        target.add(f"r{number}/0", 5)
    assert chosen == ["decode-0", "decode-1", "decode-0", "decode-1"]
    light = workers.get("decode-1")
    assert light is not None
    light.remove("r1/0")
    light.remove("nobody/0")
    light.grow("r3/0")
    assert light.tokens == 6
    assert workers.choose("decode", 10) is light
    assert workers.choose("decode", 2) is light
    light.add("r5/0", 1)
    assert workers.choose("decode", 2) is None
    assert workers.choose("prefill", 10) is None


def test_whose_relay_is_lost_hands_nothing_over_until_it_is_back(workers: Workers) -> None:
    relay = workers.get("relay-n0")
    assert relay is not None
    workers.leave(12.0, relay)
    assert workers.choose("decode", 10) is None
    assert workers.choose("decode", 10, shares=False) is not None
    assert workers.down_since("decode", 1.0) == 12.0
    workers.join(13.0, "relay-n0/2", hello("relay-n0"))
    assert workers.choose("decode", 10) is not None
    assert workers.down_since("decode", 1.0) is None


def test_the_smallest_pool_bounds_a_request(workers: Workers) -> None:
    assert workers.room() == 8 * LAYOUT.block_size
    workers.join(11.0, "prefill-0/1", hello("prefill-0", 5))
    assert workers.room() == 5 * LAYOUT.block_size
    assert Workers(ROLES, MODEL).room() is None


def test_since_when_a_role_is_down(workers: Workers) -> None:
    assert workers.down_since("decode", 1.0) is None
    assert workers.down_since("prefill", 1.0) == 1.0
    for at, name in ((20.0, "decode-1"), (25.0, "decode-0")):
        gone = workers.get(name)
        assert gone is not None
        workers.leave(at, gone)
    assert workers.down_since("decode", 1.0) == 25.0
    workers.join(30.0, "decode-0/2", hello("decode-0"))
    assert workers.down_since("decode", 1.0) is None
    assert [one.state for one in workers.status(31.0)] == ["up", "missing", "up", "lost"]


def test_a_client_lives_for_a_lease_after_it_was_heard() -> None:
    clients = Clients(6.0)
    clients.hello(10.0, "client:a")
    assert clients.heard(12.0, "client:b") is None
    assert clients.silent(16.0) == []
    clients.unreachable("client:a")
    clients.unreachable("client:b")
    known = clients.get("client:a")
    assert known is not None
    reachable = [known.reachable]
    clients.heard(12.0, "client:a")
    assert [*reachable, known.reachable] == [False, True]
    assert clients.silent(18.0) == []
    assert clients.silent(18.1) == [known]
    assert clients.leave("client:a") is known
    assert clients.leave("client:a") is None
