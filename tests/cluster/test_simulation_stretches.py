"""Stretches of steps that are run as one, against the same steps told one by one: nobody can tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from dskv.layout import KvLayout
from dssim.failure import parse
from dssim.records import Run
from dssim.system import System
from dssim.times import INSTANT, FlatTransfer, Linear, LinearTimes, TransferTimes
from dssim.workload import Arrival, arrivals, gaps, histogram
from support.topologies import Desk

LAYOUT = KvLayout(2, 2, 4, 16, "float16")
TIMES = LinearTimes(Linear(0.02, 1e-4), Linear(0.01, 1e-6, 0.0, 1e-4))
#: all steps equally long, so that instances step at the same instants
EVEN = LinearTimes(Linear(0.25), Linear(0.125))
#: a step's message takes longer than the next steps
FAR = FlatTransfer(0.03, 0.07, 2e6, 3e6)

TOPOLOGIES = {
    "1p1d": "kv: {blocks: 600}",
    "2p3d": "kv: {blocks: 600}\nprefill: 2\ndecode: 3",
    "short of blocks": "kv: {blocks: 50}",
    "short of places": "kv: {blocks: 600}\ndecode: {replicas: 2, max_queue: 3, max_batch: 2}",
    "tcp": "kv: {blocks: 600}\nforce_transport: tcp",
    "colocated": "mode: colocated\nkv: {blocks: 300}\ndecode: {replicas: 2, max_batch_tokens: 128}",
    "conditional": "mode: conditional\nconditional: {threshold_tokens: 100}\nkv: {blocks: 600}\ndecode: 2",
    "pipelines": "kv: {blocks: 600}\ndecode: {pp: 2}",
    "KV is kept": "kv: {blocks: 50}\nrelay: {keep: 64KiB}",
}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def workload(count: int, rate: float, seed: int) -> list[Arrival]:
    random = Random(seed)
    return arrivals(gaps("gamma", rate, random, 3.0), histogram("humaneval", random), count)


def run(
    desk: Desk,
    text: str,
    asked: Sequence[Arrival],
    times: LinearTimes = TIMES,
    transfers: TransferTimes = INSTANT,
    failures: Sequence[str] = (),
    *,
    single_steps: bool = False,
) -> Run:
    topology = desk.load("model: {path: nowhere, dtype: float16}\n" + text)
    system = System(
        topology,
        LAYOUT,
        lambda instance: times,
        transfers,
        validate=not single_steps,
        keep_steps=True,
        single_steps=single_steps,
    )
    return system.run(asked, failures=parse(failures, topology))


def assert_alike(one: Run, other: Run) -> None:
    assert one.records == other.records
    assert one.seen == other.seen
    assert (one.begun_s, one.simulated_s) == (other.begun_s, other.simulated_s)
    assert one.held == other.held == {}


@pytest.mark.parametrize(("rate", "transfers"), [(2.0, FlatTransfer()), (12.0, FAR)], ids=["calm", "busy"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_stretches_are_single_steps(desk: Desk, name: str, rate: float, transfers: TransferTimes) -> None:
    text, asked = TOPOLOGIES[name], workload(12, rate, len(name))
    single = run(desk, text, asked, TIMES, transfers, single_steps=True)
    assert_alike(run(desk, text, asked, TIMES, transfers), single)


@pytest.mark.parametrize("name", ["2p3d", "short of blocks", "colocated"])
def test_events_of_one_time_keep_their_order(desk: Desk, name: str) -> None:
    random = Random(7)
    asked = [Arrival(number // 4 * 0.5, random.randrange(1, 60), random.randrange(1, 40)) for number in range(16)]
    single = run(desk, TOPOLOGIES[name], asked, EVEN, INSTANT, single_steps=True)
    assert_alike(run(desk, TOPOLOGIES[name], asked, EVEN, INSTANT), single)


@pytest.mark.parametrize("keep", ["", "\nrelay: {keep: 1MiB}"], ids=["", "kept"])
def test_what_a_process_had_said_when_it_died_counts(desk: Desk, keep: str) -> None:
    text, asked = TOPOLOGIES["2p3d"] + keep, workload(14, 3.0, 5)
    failures = ["decode-0@1.2s+1s", "decode-1@2.345s+1s", "relay-n0@3s+1s", "decode-2@4s"]
    single = run(desk, text, asked, TIMES, FAR, failures, single_steps=True)
    assert single.seen.failures
    assert_alike(run(desk, text, asked, TIMES, FAR, failures), single)


@pytest.mark.parametrize("transfers", [FlatTransfer(), FAR], ids=["near", "far"])
def test_a_deadline_within_the_step_of_a_sequence_that_is_alone(desk: Desk, transfers: TransferTimes) -> None:
    # the step ends, and there is nobody any more whose token could be told
    text = TOPOLOGIES["1p1d"] + "\nrouter: {max_deadline_s: 2}"
    asked = [Arrival(number * 3.0, 20, 400 + number) for number in range(6)]
    single = run(desk, text, asked, TIMES, transfers, single_steps=True)
    assert {one.error for one in single.records} == {"deadline_exceeded"}
    assert_alike(run(desk, text, asked, TIMES, transfers), single)
