"""Too little room: bursts, preemption, full queues, engines that fail."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from dswire.errors import EngineFailed, OutOfMemory, Overloaded
from dswire.messages.client import StatusQuery
from support.cluster import GLOO, TCP, TWO_NODES, Cluster, Shape
from support.raw_client import Heard

TIGHT = Shape(prefill_blocks=32, decode_blocks=14, decode_batch=8)


def check_all(cluster: Cluster, heard: list[Heard], limit_s: float = 110.0) -> None:
    """All end well, with the right tokens; nothing is held."""
    cluster.until(lambda: all(one.end for one in heard), limit_s)
    for one in heard:
        assert one.end == "finished"
        sampling = one.submit.sampling
        for choice in range(sampling.n):
            name = f"{one.submit.request_id}/{choice}"
            assert one.tokens(choice) == cluster.script.output(name, sampling.max_tokens)
            assert one.finish_reason(choice) == "length"
    cluster.run(1)
    assert cluster.held() == {}
    assert not cluster.corrupt()


def preemptions(cluster: Cluster) -> int:
    return sum("Preempted(" in line and "router-0/" in line for line in cluster.trace)


@pytest.mark.parametrize("shape", [TIGHT, replace(TIGHT, direct=False), replace(TIGHT, decode=("n1",))])
@pytest.mark.parametrize("seed", range(3))
def test_preempted_sequences_go_on_where_they_were(shape: Shape, seed: int) -> None:
    cluster = Cluster(shape, seed=seed)
    heard = [cluster.client().submit(f"r{number}", 6 + number, max_tokens=24) for number in range(8)]
    check_all(cluster, heard)
    assert preemptions(cluster) > 0
    assert all(one.finished.ledger.retries == 0 for one in heard)


def test_the_oldest_sequence_is_never_preempted_by_younger_ones() -> None:
    cluster = Cluster(TIGHT)
    first = cluster.client().submit("first", 8, max_tokens=40)
    cluster.until(lambda: len(first.tokens()) > 2)
    others = [cluster.client().submit(f"r{number}", 8, max_tokens=30) for number in range(6)]
    cluster.until(lambda: bool(first.end))
    assert preemptions(cluster) > 0
    assert not any("Preempted(key=KvKey(sequence='first/0'" in line for line in cluster.trace)
    check_all(cluster, [first, *others])


def test_a_sequence_as_large_as_the_pool_runs_alone() -> None:
    cluster = Cluster(TIGHT)
    heard = [cluster.client().submit(f"r{number}", 26, max_tokens=30) for number in range(3)]
    check_all(cluster, heard)


def test_max_tokens_is_cut_to_what_fits() -> None:
    cluster = Cluster(TIGHT)
    heard = cluster.client().submit("r", 26, max_tokens=1000)
    cluster.until(lambda: bool(heard.end))
    assert heard.finish_reason() == "length"
    assert heard.finished.usage.completion_tokens == 14 * 4 - 26


@pytest.mark.parametrize("shape", [Shape(), TCP, GLOO, TWO_NODES])
def test_a_burst_waits_in_prefill_memory_and_loses_nothing(shape: Shape) -> None:
    cluster = Cluster(replace(shape, decode_batch=2))
    heard = [cluster.client().submit(f"r{number}", 5, max_tokens=6) for number in range(30)]
    check_all(cluster, heard)
    assert all(one.finished.ledger.retries == 0 for one in heard)


def test_a_full_decode_queue_costs_no_attempt() -> None:
    cluster = Cluster(Shape(decode_batch=2, decode_queue=4))
    heard = [cluster.client().submit(f"r{number}", 5, max_tokens=6) for number in range(30)]
    check_all(cluster, heard)
    assert all(one.finished.ledger.retries == 0 for one in heard)


def test_many_choices_share_prompt_and_request() -> None:
    cluster = Cluster(TIGHT)
    heard = cluster.client().submit("r", 9, max_tokens=12, n=7)
    check_all(cluster, [heard])
    assert heard.finished.usage == type(heard.finished.usage)(9, 7 * 12)


def test_more_requests_than_the_router_takes_are_refused_and_harm_nobody() -> None:
    cluster = Cluster(Shape(max_requests=4))
    heard = [cluster.client().submit(f"r{number}", 9, max_tokens=12) for number in range(9)]
    cluster.until(lambda: all(one.end for one in heard))
    assert [one.end for one in heard] == ["finished"] * 4 + ["overloaded"] * 5
    check_all(cluster, [*heard[:4], cluster.client().submit("later", 9, max_tokens=12)])


def test_work_spreads_over_instances() -> None:
    cluster = Cluster(Shape(prefill=("n0", "n0"), decode=("n0", "n0")))
    heard = [cluster.client().submit(f"r{number}", 20, max_tokens=20) for number in range(8)]
    used: set[str] = set()

    def done() -> bool:
        used.update(one.hello.name for one in cluster.router.workers if one.sequences)
        return all(one.end for one in heard)

    cluster.until(done)
    assert used == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
    check_all(cluster, heard)


# engines that fail


def test_a_failing_sequence_fails_alone() -> None:
    cluster = Cluster()
    cluster.prefill_errors["bad/0"] = EngineFailed("no such kernel").info()
    bad, good = (cluster.client().submit(name, 9, max_tokens=5) for name in ("bad", "good"))
    check_all(cluster, [good])
    assert bad.end == "engine_failed"


def test_one_failing_choice_ends_the_request() -> None:
    cluster = Cluster()
    cluster.prefill_errors["bad/1"] = OutOfMemory("the batch does not fit").info()
    bad = cluster.client().submit("bad", 9, max_tokens=50, n=3)
    cluster.until(lambda: bool(bad.end))
    assert bad.end == "out_of_memory"
    cluster.run(2)
    assert cluster.held() == {}


def test_a_passing_failure_is_tried_again() -> None:
    cluster = Cluster()
    cluster.prefill_errors["r/0"] = Overloaded("not now").info()
    heard = cluster.client().submit("r", 9, max_tokens=5)
    check_all(cluster, [heard])
    assert heard.finished.ledger.retries == 1


# retries


def has_more(heard: Heard, tokens: int) -> bool:
    return len(heard.tokens()) > tokens


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_lost_workers_use_up_the_retries(retries: int) -> None:
    cluster = Cluster(Shape(retries=retries))
    heard = cluster.client().submit("r", 9, max_tokens=1000)
    for attempt in range(retries + 1):
        assert heard.end == ""
        cluster.until(partial(has_more, heard, 2 + 10 * attempt))
        cluster.restart("decode-0")
    cluster.until(lambda: bool(heard.end))
    assert heard.end == "worker_lost"
    assert heard.tokens() == cluster.script.output("r/0", len(heard.tokens()))
    cluster.run(2)
    assert cluster.held() == {}


def test_without_instances_a_request_fails_in_time() -> None:
    cluster = Cluster(start=False)
    cluster.start("router-0")
    heard = cluster.client().submit("r", 9)
    cluster.until(lambda: bool(heard.end), 32.0)
    assert heard.end == "no_instance"
    assert heard.ended_at is not None
    assert heard.ended_at >= cluster.clock.now - 1.0


def test_the_status_tells_what_runs() -> None:
    cluster = Cluster()
    cluster.hold("step")
    heard = cluster.client().submit("r", 9, max_tokens=5)
    cluster.until(lambda: bool(cluster.decode().steps))
    cluster.run(1.1)
    cluster.client().say(StatusQuery())
    cluster.run(0.1)
    report = cluster.client().status()
    assert report.requests == {"decoding": 1}
    workers = {one.name: one for one in report.workers}
    assert {one.state for one in workers.values()} == {"up"}
    assert workers["decode-0"].running == 1
    assert workers["decode-0"].blocks_held == 3
    assert workers["prefill-0"].blocks_held == 0
    cluster.release()
    check_all(cluster, [heard])
