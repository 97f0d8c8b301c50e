"""The simulator: the real machines, wired from a topology, under a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import pytest

from dskv.layout import KvLayout
from dssim.failure import parse
from dssim.pipeline import Pipeline
from dssim.prompts import prompt
from dssim.records import Record, Run
from dssim.system import System
from dssim.times import INSTANT, FlatTransfer, Linear, LinearTimes, TransferTimes
from dssim.workload import Arrival, arrivals, fixed, gaps, histogram
from dswire.errors import BadInput
from support.topologies import Desk

#: a block is 1,024 bytes
LAYOUT = KvLayout(2, 2, 4, 16, "float16")
FLAT = LinearTimes(Linear(1.0), Linear(0.1))
REAL = LinearTimes(Linear(0.02, 1e-4), Linear(0.01, 1e-6, 0.0, 1e-4))

TOPOLOGIES = {
    "1p1d": "kv: {blocks: 600}",
    "2p2d": "kv: {blocks: 600}\nprefill: 2\ndecode: 2",
    "short of blocks": "kv: {blocks: 128}",
    "short of queue": "kv: {blocks: 600}\nrouter: {max_requests: 20}\n"
    "prefill: {max_queue: 2}\ndecode: {max_queue: 3}",
    "tcp in one node": "kv: {blocks: 600}\nforce_transport: tcp",
    "in parts": "kv: {blocks: 600}\nforce_transport: tcp\nprefill: {max_batch_tokens: 64}\ndecode: 2",
    "two nodes": "kv: {blocks: 600}\nsecurity: off\nnodes:\n"
    "  - {name: a, host: 10.0.0.1, devices: [cpu:0]}\n  - {name: b, host: 10.0.0.2, devices: [cpu:0]}",
    "colocated": "mode: colocated\nkv: {blocks: 600}\ndecode: {replicas: 2, max_batch_tokens: 128}",
    "conditional": "mode: conditional\nconditional: {threshold_tokens: 100}\nkv: {blocks: 600}",
    "blocks of two sizes": "kv: {blocks: 600}\ndecode: {kv: {blocks: 1200, block_size: 8}}",
    "pipelines": "kv: {blocks: 600}\nprefill: {pp: 2, max_batch_tokens: 128}\ndecode: {pp: 3}",
    "KV is kept": "kv: {blocks: 600}\ndecode: 2\nrelay: {keep: 1MiB}",
}
FLAT_TRANSFER = FlatTransfer()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def system(
    desk: Desk,
    text: str,
    times: LinearTimes = REAL,
    transfers: TransferTimes = FLAT_TRANSFER,
    *,
    validate: bool = True,
) -> System:
    topology = desk.load("model: {path: nowhere, dtype: float16}\n" + text)
    return System(topology, LAYOUT, lambda instance: times, transfers, validate=validate)


def sharegpt(count: int, rate: float, seed: int) -> list[Arrival]:
    random = Random(seed)
    drawn = histogram("humaneval", random)
    return arrivals(gaps("gamma", rate, random, 2.0), drawn, count)


def by_number(run: Run) -> list[Record]:
    return sorted(run.records, key=lambda record: record.number)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_request_ends_once_and_everything_is_given_back(desk: Desk, name: str) -> None:
    workload = sharegpt(40, 40.0, seed=3)
    run = system(desk, TOPOLOGIES[name]).run(workload)
    records = by_number(run)
    assert [record.number for record in records] == list(range(40))
    assert run.held == {}
    for record, wanted in zip(records, workload, strict=True):
        assert record.prompt_tokens == wanted.prompt_tokens
        assert record.error or record.output_tokens == wanted.output_tokens
        assert record.at_s == pytest.approx(wanted.at_s)
    refused = {record.error for record in records} - {""}
    assert refused == ({"overloaded"} if name == "short of queue" else set())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_ledger_adds_up_to_what_the_client_saw(desk: Desk, name: str) -> None:
    transfers = FlatTransfer()
    run = system(desk, TOPOLOGIES[name], transfers=transfers, validate=False).run(sharegpt(40, 40.0, seed=4))
    for record in [record for record in run.records if not record.error]:
        assert record.ledger is not None
        told = msgspec.structs.asdict(record.ledger)
        others = ("ttft_s", "total_s", "transfer_hidden_s", "retries")
        stages = sum(value for stage, value in told.items() if stage not in others)
        both_ways_s = 2 * transfers.message_s(False)
        assert stages == pytest.approx(told["total_s"])
        assert record.total_s == pytest.approx(told["total_s"] + both_ways_s)
        assert record.ttft_s == pytest.approx(told["ttft_s"] + both_ways_s)


def test_transfers_are_hidden_behind_the_reading_of_long_prompts(desk: Desk) -> None:
    slow = FlatTransfer(network_bytes_per_s=1e6)
    workload = arrivals(gaps("constant", 0.1, Random(0)), fixed(1024, 4), 4)
    text = "kv: {blocks: 600}\nforce_transport: tcp\nprefill: {max_batch_tokens: 128}\nrelay: {overlap: OVERLAP}"
    shown = []
    for overlap in ("auto", "off"):
        run = system(desk, text.replace("OVERLAP", overlap), transfers=slow).run(workload)
        ledgers = [record.ledger for record in run.records if record.ledger is not None]
        assert len(ledgers) == 4
        shown.append((ledgers[0].transfer_hidden_s, ledgers[0].transfer_s))
    (hidden, rest), (nothing, whole) = shown
    assert nothing == 0.0
    # seven parts of eight are on their way while the next is read
    assert rest < whole / 4
    assert hidden + rest == pytest.approx(whole, rel=0.2)


def test_sequences_give_way_for_want_of_blocks_and_lose_nothing(desk: Desk) -> None:
    text = TOPOLOGIES["short of blocks"]
    run = system(desk, text).run(arrivals(gaps("constant", 1000.0, Random(0)), fixed(16, 300), 16))
    assert run.seen.preemptions > 0
    assert all(record.output_tokens == 300 and not record.error for record in run.records)
    assert run.held == {}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_same_workload_is_the_same_run(desk: Desk, name: str) -> None:
    def run() -> tuple[Sequence[Record], int]:
        done = system(desk, TOPOLOGIES[name], validate=False).run(sharegpt(40, 40.0, seed=5))
        return done.records, done.happenings

    assert run() == run()


def test_a_trace_by_hand_without_ways(desk: Desk) -> None:
    text = "prefill: {max_batch: 1}\nkv: {blocks: 64}"
    run = system(desk, text, FLAT, INSTANT).run([Arrival(0.0, 16, 3), Arrival(0.5, 16, 2)])
    first, second = by_number(run)
    # prefill from 0 to 1, two decode steps of 0.1
    assert [first.ttft_s, first.tpot_s, first.total_s] == pytest.approx([1.0, 0.1, 1.2])
    # waits for it from 0.5 to 1, prefill until 2, one decode step
    assert [second.ttft_s, second.total_s] == pytest.approx([1.5, 1.6])
    assert second.ledger is not None
    assert [second.ledger.prefill_queue_s, second.ledger.prefill_s] == pytest.approx([0.5, 1.0])
    assert second.ledger.first_step_s == pytest.approx(0.1)
    assert run.simulated_s == pytest.approx(2.1)
    assert run.seen.busy_s == pytest.approx({"prefill-0": 2.0, "decode-0": 0.3})


def test_a_trace_by_hand_with_ways(desk: Desk) -> None:
    transfers = FlatTransfer(0.01, 0.02, LAYOUT.block_nbytes / 0.3, LAYOUT.block_nbytes / 0.4, 0.0)
    run = system(desk, "kv: {blocks: 64}", FLAT, transfers).run([Arrival(0.0, 16, 2)])
    (only,) = run.records
    # client to router 0.02, to prefill 0.01, its step 1, back 0.01 and 0.02
    assert only.ttft_s == pytest.approx(1.06)
    # sealed at 1.33; router 1.34, decode 1.35, copied 1.75, granted at 1.37, step 1.85, router, client
    assert only.total_s == pytest.approx(1.88)
    assert only.ledger is not None
    assert only.ledger.transfer_s == pytest.approx(0.40)


def test_sequences_decode_together_in_the_steps_that_they_can_share(desk: Desk) -> None:
    times = LinearTimes(Linear(1.0), Linear(0.0, 0.0, 0.0, 0.1))
    text = "prefill: {max_batch: 2}\nkv: {blocks: 64}"
    run = system(desk, text, times, INSTANT).run([Arrival(0.0, 16, 3), Arrival(0.0, 16, 2), Arrival(0.0, 16, 1)])
    ends = [record.at_s + record.total_s for record in by_number(run)]
    # the first goes alone at 0; the two others together at 1, when the first begins its two steps alone
    assert ends == pytest.approx([1.2, 2.1, 2.0])


@pytest.mark.parametrize(("requests", "slowest_s"), [(1, 0.8), (2, 1.6)])
def test_transfers_share_the_way_out_of_a_node(desk: Desk, requests: int, slowest_s: float) -> None:
    transfers = FlatTransfer(0, 0, 0, 0, LAYOUT.block_nbytes / 0.1)
    text = TOPOLOGIES["two nodes"].replace("4KiB", "1KiB")
    run = system(desk, text, LinearTimes(Linear(1.0), Linear(0.1)), transfers).run(
        [Arrival(0.0, 128, 2)] * requests
    )
    waits = [record.ledger.transfer_s for record in by_number(run) if record.ledger is not None]
    # the first is prefilled alone, and its eight blocks have left before the others come
    assert max(waits) >= 0.8
    assert waits[0] == pytest.approx(0.8)
    assert run.simulated_s >= 1.0 + slowest_s


@pytest.mark.parametrize("name", ["2p2d", "two nodes", "KV is kept"])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "relay-"])
def test_what_a_process_held_when_it_died_is_made_again(desk: Desk, name: str, victim: str) -> None:
    one = system(desk, TOPOLOGIES[name])
    victim = next(found for found in one.processes if found.startswith(victim))
    run = one.run(sharegpt(30, 40.0, seed=3), failures=parse([f"{victim}@0.5s+1s"], one.topology))
    assert all(not record.error for record in run.records)
    assert run.held == {}
    assert [(found, came) for _, found, came in run.seen.failures] == [(victim, False), (victim, True)]
    retries = [record.ledger.retries for record in run.records if record.ledger is not None]
    # a relay is busy only while KV goes through it, and no copy on its node waits for its word
    assert any(retries) == (not victim.startswith("relay-"))


@pytest.mark.parametrize(
    ("keep", "total_s", "resume_s", "read_s"),
    [
        # the death at 1.8 shows at 2, when workers are pinged; read again until 3, two blocks copied, 13 steps
        ("", 4.8, 0.0, 2.0),
        # its block is copied until 2.25, the tokens made so far read in a step of 1, 13 steps
        ("\nrelay: {keep: 1KiB}", 4.55, 1.5, 1.0),
    ],
    ids=["", "kept"],
)
def test_a_death_by_hand(desk: Desk, keep: str, total_s: float, resume_s: float, read_s: float) -> None:
    transfers = FlatTransfer(0.0, 0.0, 0.0, LAYOUT.block_nbytes / 0.25, 0.0)
    one = system(desk, "kv: {blocks: 64}\ndecode: 2" + keep, FLAT, transfers)
    # read until 1, copied until 1.25, the sixth token at 1.75
    run = one.run([Arrival(0.0, 16, 20)], failures=parse(["decode-0@1.8s"], one.topology))
    (only,) = run.records
    assert only.ledger is not None
    assert [only.total_s, only.ledger.resume_s] == pytest.approx([total_s, resume_s])
    assert run.seen.busy_s["prefill-0"] == pytest.approx(read_s)
    assert run.held == {}


@pytest.mark.parametrize(("keep", "second_s"), [("", 2.25), ("\nrelay: {keep: 2KiB}", 2.5)], ids=["", "kept"])
def test_prefill_has_its_blocks_back_when_they_are_kept(desk: Desk, keep: str, second_s: float) -> None:
    transfers = FlatTransfer(0.0, 0.0, 0.0, LAYOUT.block_nbytes / 0.25, 0.0)
    text = "prefill: {kv: {blocks: 1}}\ndecode: {kv: {blocks: 64}}" + keep
    run = system(desk, text, FLAT, transfers).run([Arrival(0.0, 14, 2)] * 2)
    assert [one.ttft_s for one in by_number(run)] == pytest.approx([1.0, second_s])


def test_what_the_dead_had_queued_for_the_dead_is_lost(desk: Desk) -> None:
    one = system(desk, TOPOLOGIES["1p1d"])
    failures = parse(["relay-n0@0.4+1.5", "prefill-0@0.8+8", "decode-0@1+0.2"], one.topology)
    run = one.run(sharegpt(20, 30.0, seed=1), failures=failures)
    assert all(not record.error for record in run.records)
    assert run.held == {}


def test_requests_end_though_the_only_instance_never_comes_back(desk: Desk) -> None:
    one = system(desk, TOPOLOGIES["1p1d"])
    run = one.run(sharegpt(30, 40.0, seed=3), failures=parse(["decode-0@0.9"], one.topology))
    assert {record.error for record in run.records} == {"", "no_instance"}
    assert run.held == {}


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["decode-0"], "not understood"),
        (["decode-0@-1"], "not understood"),
        (["decode-7@1"], "no decode-7"),
        (["router-0@1"], "the router"),
        (["decode-0@1", "decode-0@9"], "is down then"),
        (["decode-0@1s+3s", "decode-0@2s"], "is down then"),
    ],
)
def test_failures_that_make_no_sense_are_refused(desk: Desk, texts: list[str], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        parse(texts, system(desk, TOPOLOGIES["1p1d"]).topology)


def test_the_mean_wait_of_a_single_server_is_that_of_m_d_1(desk: Desk) -> None:
    rate, step_s = 50.0, 0.01
    text = "prefill: {max_batch: 1}\nkv: {blocks: 64}\nrouter: {max_requests: 100000}"
    one = system(desk, text, LinearTimes(Linear(step_s), Linear(0.1)), INSTANT, validate=False)
    run = one.run(arrivals(gaps("poisson", rate, Random(1)), fixed(1, 1), 5_000))
    assert all(not record.error for record in run.records)
    mean_s = sum(record.ttft_s for record in run.records) / 5_000
    # DistServe (OSDI 2024), section 3.1, equation 1: D + R D^2 / (2 (1 - R D))
    assert mean_s == pytest.approx(step_s + rate * step_s**2 / (2 * (1 - rate * step_s)), rel=0.05)


def test_steps_follow_each_other_through_the_stages(desk: Desk) -> None:
    text = "prefill: {pp: 2, max_batch: 1}\ndecode: {pp: 2}\nkv: {blocks: 64}"
    run = system(desk, text, FLAT, INSTANT).run([Arrival(0.0, 16, 3)] * 3)
    # half a second in each stage; the third begins when the first has left
    assert [one.ttft_s for one in by_number(run)] == pytest.approx([1.0, 1.5, 2.0])
    # decode's steps too take 0.05 in each stage, and nobody is in anybody's way
    assert [one.tpot_s for one in run.records] == pytest.approx([0.1] * 3)
    assert run.seen.busy_s == pytest.approx({"prefill-0": 1.5, "decode-0": 0.3})


def test_prompts_are_read_beside_what_decodes_where_nothing_is_disaggregated(desk: Desk) -> None:
    text = "mode: colocated\nkv: {blocks: 64}"
    run = system(desk, text, FLAT, INSTANT).run([Arrival(0.0, 16, 3), Arrival(1.05, 16, 2)])
    first, second = by_number(run)
    # reads until 1, a step until 1.1, and then one that reads the other prompt as well, until 2.1
    assert [first.ttft_s, first.total_s] == pytest.approx([1.0, 2.1])
    assert [second.ttft_s, second.total_s] == pytest.approx([2.1 - 1.05, 2.2 - 1.05])


def test_short_prompts_are_read_by_decode_in_conditional_mode(desk: Desk) -> None:
    text = "mode: conditional\nconditional: {threshold_tokens: 50}\nkv: {blocks: 64}"
    run = system(desk, text, FLAT, INSTANT).run([Arrival(0.0, 16, 1), Arrival(0.0, 160, 1), Arrival(9.0, 40, 1)])
    assert run.seen.busy_s == {"prefill-0": 1.0, "decode-0": 2.0}


@pytest.mark.parametrize(("keep", "read"), [("true", [1024, 512, 1000]), ("false", [1024, 1024, 1000])])
def test_prompts_that_begin_alike_are_read_once(desk: Desk, keep: str, read: list[int]) -> None:
    text = f"kv: {{blocks: 600, prefix_cache: {keep}}}"
    alike = [Arrival(0.0, 1024, 1, (7, 8)), Arrival(9.0, 1024, 1, (7, 9)), Arrival(18.0, 1000, 1)]
    run = system(desk, text, LinearTimes(Linear(0.0, 0.001), Linear(0.1)), INSTANT).run(alike)
    assert [one.ttft_s for one in by_number(run)] == pytest.approx([tokens / 1000 for tokens in read])


@pytest.mark.parametrize(
    ("hashes", "length", "shared"),
    [((1, 2), 1024, 1024), ((1, 3), 1024, 512), ((4, 5), 1024, 0), ((), 1024, 0), ((1, 2), 2000, 1024)],
)
def test_prompts_share_the_tokens_of_their_hashes(hashes: tuple[int, ...], length: int, shared: int) -> None:
    one = prompt(0, Arrival(0.0, 1100, 1, (1, 2)))
    other = prompt(1, Arrival(0.0, length, 1, hashes))
    assert (len(one), len(other)) == (1100, length)
    same = [a == b for a, b in zip(one, other, strict=False)]
    assert same == [place < shared for place in range(len(same))]


def test_a_short_step_waits_behind_a_long_one_in_every_stage() -> None:
    pipeline = Pipeline(3)
    assert pipeline.step(0.0, 3.0) == (0.0, 3.0)
    # waits for 1 to enter, and then in each stage
    assert pipeline.step(0.0, 0.3) == pytest.approx((1.0, 3.1))
    assert pipeline.step(9.0, 0.3) == pytest.approx((9.0, 9.3))


@pytest.mark.parametrize(
    ("chunks", "contexts", "seconds"),
    [
        ([(0, 10)], [], 1.0 + 10 * 0.1 + 100 * 0.01),
        ([(10, 20)], [], 1.0 + 10 * 0.1 + 300 * 0.01),
        ([], [50, 50], 3.0 + 100 * 0.001 + 2 * 0.5),
        # rows make 1 + 12 * 0.1, reading the weights for decode takes longer
        ([(0, 10)], [50, 50], 3.0 + 2 * 0.5 + 100 * 0.01 + 100 * 0.001),
        ([(0, 60)], [50, 50], 1.0 + 62 * 0.1 + 3600 * 0.01 + 100 * 0.001),
    ],
)
def test_a_mixed_step_reads_the_weights_once(
    chunks: list[tuple[int, int]], contexts: list[int], seconds: float
) -> None:
    times = LinearTimes(Linear(1.0, 0.1, 0.01), Linear(3.0, 0.001, 0.0, 0.5))
    assert times.mixed_s(chunks, contexts) == pytest.approx(seconds)
