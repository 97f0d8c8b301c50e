"""What gets lost, late or mixed up, and how the system comes out of it."""

from __future__ import annotations

import pytest

import dsprefill.state
from dskv.handle import KvKey
from dsrouter.events import Tokenize
from dsrouter.flow import INSTANCE_WAIT_S
from dswire.errors import ErrorInfo
from dswire.machine import Received
from dswire.messages import client, worker
from support.cluster import LEASE_S, ROUTER, Cluster, Shape
from support.processes import RouterProcess
from support.raw_client import Heard
from support.stages import STAGES, TARGET, Stage, at_decode, at_prefill

STAGE = {stage.name: stage for stage in STAGES}


def finish(cluster: Cluster, heard: Heard, limit_s: float = 10.0, free_s: float = LEASE_S) -> None:
    """The request ends well and soon, and leaves nothing behind."""
    cluster.until(lambda: bool(heard.end), limit_s)
    assert heard.end == "finished"
    sampling = heard.submit.sampling
    assert heard.tokens() == cluster.script.output(f"{heard.submit.request_id}/0", sampling.max_tokens)
    cluster.run(free_s)
    assert cluster.held() == {}


# lost messages


@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("worker_name", ["prefill-0", "decode-0"])
def test_connection_to_the_router_breaks_unnoticed(stage: Stage, worker_name: str) -> None:
    cluster, heard = stage.bring()
    if stage.missing:
        cluster.start(stage.missing)
        cluster.run(0.001)
    cluster.release()
    cluster.wires.reset(worker_name, ROUTER)
    finish(cluster, heard)


def test_work_that_never_arrives_is_done_again() -> None:
    cluster = Cluster()
    heard = cluster.client().submit(TARGET, 20, max_tokens=5)
    cluster.until(lambda: f"{TARGET}/0" in cluster.router.flow.choices)
    cluster.wires.reset("prefill-0", ROUTER)
    finish(cluster, heard)


def test_tokens_that_never_arrive_are_made_again() -> None:
    cluster = Cluster()
    heard = cluster.client().submit(TARGET, 20, max_tokens=30)
    cluster.until(lambda: len(heard.tokens()) == 8)
    for _ in range(5):
        cluster.wires.reset("decode-0", ROUTER)
        cluster.run(0.0005)
    finish(cluster, heard)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.shape.nodes == ("n0",)], ids=str)
@pytest.mark.parametrize("worker_name", ["prefill-0", "decode-0"])
def test_connection_to_the_relay_breaks_unnoticed(stage: Stage, worker_name: str) -> None:
    cluster, heard = stage.bring()
    if stage.missing:
        cluster.start(stage.missing)
    cluster.release()
    for _ in range(10):
        cluster.wires.reset(worker_name, "relay-n0")
        cluster.run(0.002)
    finish(cluster, heard, 4 * LEASE_S, 4 * LEASE_S)


# a relay that is away


def test_cancel_while_the_relay_is_away() -> None:
    cluster, heard = STAGE["placing"].bring()
    cluster.kill("relay-n0")
    cluster.run(7)
    cluster.client().cancel(TARGET)
    cluster.run(0.5)
    assert heard.end == "cancelled"
    assert at_prefill(cluster) is dsprefill.state.Phase.DOOMED
    cluster.start("relay-n0")
    cluster.run(3)
    assert cluster.held() == {}


def test_cancel_while_the_relay_is_away_for_good() -> None:
    cluster, heard = STAGE["placing"].bring()
    cluster.kill("relay-n0")
    cluster.run(7)
    cluster.client().cancel(TARGET)
    cluster.run(LEASE_S + 1)
    assert heard.end == "cancelled"
    assert cluster.held() == {}


def test_requests_that_come_while_the_relay_is_away_wait_for_it() -> None:
    cluster = Cluster()
    cluster.run(1)
    cluster.kill("relay-n0")
    cluster.run(1)
    heard = [cluster.client().submit(f"r{number}", 20, max_tokens=5) for number in range(3)]
    # far longer than prefill would keep KV that nobody comes for, as often as a request is tried
    cluster.run(25)
    assert not any(one.end for one in heard)
    assert cluster.prefill().pool.held == 0
    cluster.start("relay-n0")
    for one in heard:
        finish(cluster, one)
        assert one.finished.ledger.retries == 0


def test_requests_fail_when_the_relay_does_not_come_back() -> None:
    cluster = Cluster()
    cluster.run(1)
    cluster.kill("relay-n0")
    cluster.run(1)
    heard = cluster.client().submit(TARGET, 20, max_tokens=5)
    cluster.run(INSTANCE_WAIT_S + 2)
    assert heard.end == "no_instance"
    error = heard.events[-1]
    assert isinstance(error, client.Failed)
    assert error.error.message == "no relay beside a prefill instance was up for 30 s"
    assert cluster.held() == {}


# the same request again


@pytest.mark.parametrize("name", [stage.name for stage in STAGES if not stage.blocked and not stage.missing])
def test_submitted_again_to_a_restarted_router(name: str) -> None:
    cluster, _ = STAGE[name].bring()
    cluster.client().talking = False
    cluster.restart(ROUTER)
    cluster.run(4)
    heard = cluster.client("again").submit(TARGET, 17, max_tokens=9)
    cluster.run(0.5)
    cluster.release()
    finish(cluster, heard)


@pytest.mark.parametrize("name", [stage.name for stage in STAGES if not stage.blocked and not stage.missing])
def test_the_same_id_for_another_prompt_after_good_bye(name: str) -> None:
    cluster, _ = STAGE[name].bring()
    cluster.client().leave()
    cluster.run(0.01)
    heard = cluster.client("again").submit(TARGET, 17, max_tokens=9)
    cluster.run(0.05)
    cluster.release()
    finish(cluster, heard)


def test_tokens_of_an_earlier_submission_are_not_taken_for_the_later_one() -> None:
    cluster = Cluster()
    cluster.hold("tokenize")
    cluster.client().submit(TARGET, "one", max_tokens=3)
    cluster.run(0.01)
    cluster.client().leave()
    cluster.run(0.01)
    heard = cluster.client("again").submit(TARGET, "another", max_tokens=3)
    cluster.run(0.01)
    cluster.release()
    finish(cluster, heard)
    assert heard.finished.usage == client.Usage(prompt_tokens=7, completion_tokens=3)


# late and repeated messages


def test_messages_of_earlier_attempts_change_nothing() -> None:
    cluster, heard = STAGE["decoding"].bring()
    one = at_decode(cluster)
    assert one is not None
    assert one.handle is not None
    key, handle = one.key, one.handle
    router = cluster.processes[ROUTER]
    at = {role: next(peer for peer in router.peers if peer.startswith(role)) for role in ("prefill", "decode")}
    before = len(heard.tokens())
    late = [
        (at["prefill"], worker.PrefillDone(key, 5, 0.1, 0.1)),
        (at["prefill"], worker.KvSealed(handle)),
        (at["decode"], worker.StepDone((worker.TokenMade(key, 0, 5),))),
        (at["decode"], worker.StepDone((worker.TokenMade(KvKey(key.sequence, key.epoch + 1), before, 5),))),
        (at["decode"], worker.StepDone((worker.TokenMade(KvKey("nobody/0", 0), 1, 5),))),
        (at["decode"], worker.Preempted(KvKey(key.sequence, key.epoch - 1))),
        (at["prefill"], worker.SequenceFailed(KvKey(key.sequence, key.epoch - 1), _error())),
    ]
    for peer, message in late:
        router.feed(Received(cluster.now, peer, message))
    cluster.release()
    finish(cluster, heard)
    assert heard.finished.ledger.retries == 0


def test_work_that_comes_twice_is_done_once() -> None:
    cluster, heard = STAGE["queued-at-prefill"].bring()
    one = next(one for one in cluster.prefill().sequences.values() if one.key.sequence == f"{TARGET}/0")
    cluster.processes["prefill-0"].feed(Received(cluster.now, "router", one.reading.work))
    cluster.release()
    finish(cluster, heard)


def test_decode_work_that_comes_twice_is_done_once() -> None:
    cluster, heard = STAGE["decoding"].bring()
    one = at_decode(cluster)
    assert one is not None
    assert one.handle is not None
    work = worker.DecodeWork(one.handle, one.prompt_ids, tuple(one.output_ids), one.sampling)
    cluster.processes["decode-0"].feed(Received(cluster.now, "router", work))
    cluster.release()
    finish(cluster, heard)


def test_aborts_of_what_is_not_there_change_nothing() -> None:
    cluster = Cluster()
    for name in ("prefill-0", "decode-0"):
        cluster.processes[name].feed(Received(cluster.now, "router", worker.Abort(KvKey("nobody/0", 3))))
    finish(cluster, cluster.client().submit(TARGET, 20, max_tokens=5))


# hellos


def test_a_worker_that_is_asked_for_its_hello_many_times_joins_once() -> None:
    cluster = Cluster(Shape(retries=0))
    busy = [cluster.client().submit(f"r{number}", 20, max_tokens=40) for number in range(6)]
    cluster.until(lambda: all(len(one.tokens()) > 3 for one in busy))
    cluster.restart(ROUTER)
    more = [cluster.client("d").submit(f"s{number}", 20, max_tokens=10) for number in range(6)]
    cluster.until(lambda: all(one.end for one in more))
    assert {one.end for one in more} == {"finished"}


@pytest.mark.parametrize("away_s", [3.0, 9.0, 30.0])
def test_hellos_that_pile_up_while_the_router_is_away_cost_no_attempt(away_s: float) -> None:
    cluster = Cluster(Shape(retries=0))
    cluster.kill(ROUTER)
    heard = [cluster.client().submit(f"r{number}", 9, max_tokens=5) for number in range(4)]
    cluster.run(away_s)
    cluster.start(ROUTER)
    cluster.until(lambda: all(one.end for one in heard), 10)
    assert {one.end for one in heard} == {"finished"}


def test_the_router_tokenises_only_texts() -> None:
    cluster = Cluster()
    process = cluster.processes[ROUTER]
    assert isinstance(process, RouterProcess)
    peer = "client:x"
    process.feed(Received(cluster.now, peer, client.ClientHello(1)))
    by_ids = process.machine.handle(Received(cluster.now, peer, client.Submit("a", prompt_ids=(1, 2))))
    by_text = process.machine.handle(Received(cluster.now, peer, client.Submit("b", prompt="x")))
    assert [isinstance(action, Tokenize) for action in by_text] == [True]
    assert not any(isinstance(action, Tokenize) for action in by_ids)


def _error() -> ErrorInfo:
    return ErrorInfo("worker_lost", "late news")
