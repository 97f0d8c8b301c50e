"""Clients that come back, that share ids, that are not heard, and the account of their requests' time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from dswire.errors import ErrorInfo
from dswire.machine import Received
from dswire.messages import client
from support.cluster import ROUTER, TCP, TWO_NODES, Cluster, Shape
from support.raw_client import Heard

#: stages up to the first token, as ``client.Ledger`` groups them
FIRST = ("router_queue_s", "prefill_queue_s", "prefill_s", "prefill_wire_s")
TOTALS = ("ttft_s", "total_s", "retries")


def half_way(cluster: Cluster, **sampling: Any) -> Heard:
    """A request that decodes."""
    heard = cluster.client().submit("r", 9, max_tokens=20, **sampling)
    cluster.until(lambda: len(heard.tokens()) > 5)
    return heard


def ended(cluster: Cluster, heard: Heard) -> None:
    cluster.until(lambda: bool(heard.end))
    assert heard.end == "finished"
    assert heard.tokens() == cluster.script.output("r/0", 20)


# reconnect


def test_what_is_missed_while_the_connection_is_down_comes_on_attach() -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    for _ in range(5):
        cluster.wires.reset("c", ROUTER)
        cluster.run(0.01)
    ended(cluster, heard)


def test_what_is_missed_while_the_client_cannot_be_reached_comes_on_attach() -> None:
    cluster = Cluster(Shape(client_lease_s=20))
    heard = half_way(cluster)
    cluster.wires.cut("c", ROUTER, 10.0)
    cluster.run(9)
    assert cluster.router.ended == {"finished": 1}
    assert not heard.end
    ended(cluster, heard)


@pytest.mark.parametrize("have", [-1, 0, 1, 7, 22, 1000])
def test_attach_replays_from_any_number_on(have: int) -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    ended(cluster, heard)
    process = cluster.processes[ROUTER]
    actions = process.machine.handle(Received(cluster.now, "client:c", client.Attach("r", have)))
    assert [action.message for action in actions] == heard.events[max(0, have) :]


def test_submitting_again_attaches_instead_of_starting_another() -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    cluster.client().say(heard.submit)
    ended(cluster, heard)
    assert cluster.router.ended == {"finished": 1}


def test_an_end_is_remembered_for_a_lease_and_no_longer() -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    ended(cluster, heard)
    cluster.run(cluster.shape.client_lease_s - 1)
    assert "r" in cluster.router.requests
    cluster.run(1.1)
    assert not cluster.router.requests
    answer = cluster.processes[ROUTER].machine.handle(Received(cluster.now, "client:c", client.Attach("r", 3)))
    assert [action.message.error.code for action in answer] == ["unknown_request"]


def test_an_id_serves_again_once_its_end_is_forgotten() -> None:
    cluster = Cluster()
    ended(cluster, half_way(cluster))
    cluster.run(7)
    ended(cluster, half_way(cluster))


def test_a_restarted_router_says_that_it_knows_nothing() -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    cluster.restart(ROUTER)
    cluster.until(lambda: bool(heard.end), 10)
    assert heard.end == "unknown_request"
    again = cluster.client().submit("r", 9, max_tokens=20)
    ended(cluster, again)


# other people's requests


def test_a_second_client_can_neither_attach_nor_cancel_nor_take_the_id() -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    thief = cluster.client("thief")
    thief.requests["r"] = stolen = Heard(heard.submit)
    thief.say(client.Attach("r", 0))
    cluster.until(lambda: bool(stolen.end), 1)
    assert stolen.end == "unknown_request"
    thief.cancel("r")
    thief.requests["r"] = taken = Heard(heard.submit)
    thief.say(heard.submit)
    cluster.until(lambda: bool(taken.end), 1)
    assert taken.end == "duplicate_request"
    ended(cluster, heard)


def test_one_client_leaving_leaves_the_others_alone() -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    other = cluster.client("other").submit("o", 9, max_tokens=20)
    cluster.until(lambda: len(other.tokens()) > 2)
    cluster.client("other").leave()
    ended(cluster, heard)
    assert cluster.router.ended == {"finished": 1, "cancelled": 1}


# clients that are not known


def test_a_client_without_a_hello_is_asked_for_it() -> None:
    cluster = Cluster()
    process = cluster.processes[ROUTER]
    submit = client.Submit("r", prompt="hi")
    for message in (submit, client.Cancel("r"), client.Attach("r", 0), client.ClientPing(), client.StatusQuery()):
        actions = process.machine.handle(Received(cluster.now, "client:new", message))
        assert [action.message for action in actions] == [client.ClientHelloWanted()]


def test_a_client_of_another_protocol_is_refused() -> None:
    cluster = Cluster()
    machine = cluster.router
    actions = machine.handle(Received(cluster.now, "client:new", client.ClientHello(99)))
    assert [type(action).__name__ for action in actions] == ["Send"]
    refusals = [action.message for action in actions if hasattr(action, "message")]
    assert [one.error.code for one in refusals if isinstance(one, client.ClientRefused)] == ["version_mismatch"]
    assert machine.clients.get("client:new") is None


def test_a_client_that_only_listens_lives_as_long_as_it_pings() -> None:
    cluster = Cluster()
    cluster.hold("step")
    heard = cluster.client().submit("r", 9, max_tokens=20)
    cluster.run(30)
    cluster.release()
    ended(cluster, heard)


# refused requests


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"prompt_ids": (1, 2, 1000)}, "invalid_request"),
        ({"prompt_ids": (-1,)}, "invalid_request"),
        ({"prompt_ids": ()}, "invalid_request"),
        ({"prompt_ids": None}, "invalid_request"),
        ({"prompt": "and a text"}, "invalid_request"),
        ({"prompt_ids": tuple(range(300))}, "prompt_too_long"),
        ({"sampling": client.Sampling(temperature=-1)}, "invalid_request"),
        ({"sampling": client.Sampling(stop_token_ids=(5000,))}, "invalid_request"),
        ({"deadline_s": 0.0}, "invalid_request"),
        ({"deadline_s": float("nan")}, "invalid_request"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_is_lost(change: dict[str, object], code: str) -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    submit = msgspec.structs.replace(client.Submit("bad", prompt_ids=(1, 2, 3)), **change)
    bad = cluster.client().requests["bad"] = Heard(submit)
    cluster.client().say(submit)
    cluster.until(lambda: bool(bad.end), 1)
    assert bad.end == code
    last = bad.events[-1]
    assert isinstance(last, client.Failed)
    assert isinstance(last.error, ErrorInfo)
    assert last.number == 0
    ended(cluster, heard)


# how answers end


def test_the_end_token_ends_a_choice() -> None:
    cluster = Cluster()
    cluster.script.ends["r/0"] = 7
    heard = cluster.client().submit("r", 9, max_tokens=20)
    cluster.until(lambda: bool(heard.end))
    assert heard.finish_reason() == "stop"
    assert heard.tokens() == cluster.script.output("r/0", 8)


def test_the_end_token_at_once_needs_no_decode() -> None:
    cluster = Cluster()
    cluster.kill("decode-0")
    cluster.script.ends["r/0"] = 0
    heard = cluster.client().submit("r", 9, max_tokens=20)
    cluster.until(lambda: bool(heard.end), 5)
    assert (heard.end, heard.finish_reason()) == ("finished", "stop")
    assert cluster.held() == {}


def test_one_token_needs_no_decode() -> None:
    cluster = Cluster()
    cluster.kill("decode-0")
    heard = cluster.client().submit("r", 9, max_tokens=1)
    cluster.until(lambda: bool(heard.end), 5)
    assert (heard.end, heard.finish_reason()) == ("finished", "length")
    assert cluster.held() == {}


@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_stop_string_ends_a_choice_and_drops_it_everywhere(at: int) -> None:
    cluster = Cluster()
    stop = f"<{cluster.script.token('r/0', at)}>"
    heard = cluster.client().submit("r", 9, max_tokens=20, stop=[stop])
    cluster.until(lambda: bool(heard.end))
    assert heard.finish_reason() == "stop"
    assert heard.tokens() == cluster.script.output("r/0", at + 1)
    assert stop not in "".join(event.text for event in heard.events if isinstance(event, client.Output))
    cluster.run(1)
    assert cluster.held() == {}


def test_a_stop_token_ends_a_choice_unless_it_comes_too_early() -> None:
    cluster = Cluster()
    early, late = cluster.script.token("r/0", 2), cluster.script.token("r/0", 6)
    heard = cluster.client().submit("r", 9, max_tokens=20, stop_token_ids=[early, late], min_tokens=5)
    cluster.until(lambda: bool(heard.end))
    assert heard.tokens() == cluster.script.output("r/0", 7)


# the account


def check_account(heard: Heard) -> client.Ledger:
    """All stages add up to the total, those before the first token to TTFT; none is negative."""
    ledger = heard.finished.ledger
    stages = {name: value for name, value in msgspec.structs.asdict(ledger).items() if name not in TOTALS}
    assert all(value >= -1e-9 for value in stages.values()), stages
    assert sum(stages.values()) == pytest.approx(ledger.total_s, abs=1e-9)
    if not ledger.retries and not ledger.retry_s:
        assert sum(stages[name] for name in FIRST) == pytest.approx(ledger.ttft_s, abs=1e-9)
    return ledger


@pytest.mark.parametrize("shape", [Shape(), TCP, TWO_NODES, Shape(decode_batch=2, prefill_queue=2)])
def test_the_ledger_adds_up(shape: Shape) -> None:
    cluster = Cluster(shape)
    heard = [
        cluster.client().submit(f"r{number}", "x" * (number + 1), max_tokens=1 + number) for number in range(12)
    ]
    began = cluster.now
    cluster.until(lambda: all(one.end for one in heard))
    for one in heard:
        ledger = check_account(one)
        assert one.ended_at is not None
        # what the client sees is this and two messages on the wire
        assert 0 < (one.ended_at - began) - ledger.total_s < 0.01
    assert heard[0].finished.ledger.decode_s == 0.0
    assert heard[11].finished.ledger.decode_s > 0.0


def test_the_ledger_books_what_a_lost_worker_cost() -> None:
    cluster = Cluster()
    heard = half_way(cluster)
    cluster.kill("decode-0")
    cluster.run(5)
    cluster.start("decode-0")
    ended(cluster, heard)
    ledger = check_account(heard)
    assert ledger.retries == 1
    assert ledger.ttft_s < 1.0
    assert ledger.placement_s + ledger.retry_s > 4.0


def test_the_ledger_of_many_choices_is_that_of_the_last() -> None:
    cluster = Cluster(Shape(decode_batch=2))
    heard = cluster.client().submit("r", 9, max_tokens=10, n=5)
    cluster.until(lambda: bool(heard.end))
    check_account(heard)


def test_the_ledger_adds_up_under_preemption() -> None:
    cluster = Cluster(Shape(prefill_blocks=32, decode_blocks=14, decode_batch=8))
    heard = [cluster.client().submit(f"r{number}", 8, max_tokens=24) for number in range(8)]
    cluster.until(lambda: all(one.end for one in heard))
    for one in heard:
        check_account(one)
    assert any(one.finished.ledger.retry_s for one in heard)
