"""The simulator against the cluster of these tests, whose shells were written apart: the same ledgers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import pytest

from dssim.failure import Failure, parse
from dssim.records import Run
from dssim.system import System
from dssim.times import Chunk, FlatTransfer
from dssim.workload import Arrival
from dswire.messages import client
from support.cluster import Cluster, Shape
from support.handles import LAYOUT
from support.processes import Pace
from support.raw_client import Heard, RawClient
from support.topologies import Desk

#: all steps take the same, since the two tell reading and decoding apart differently
STEP_S = 0.0097391
#: no sum of some is a sum of others, so that no two events come at one time, where rounding would order them
PACE = Pace(prefill_s=STEP_S, seal_s=0.0021973, copy_s=0.0103571, keep_s=0.0103571, step_s=STEP_S)
#: a message's way
WAY_S = 0.0011


class Even(Random):
    """Delays that are always in the middle of what they may be."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


@dataclass(frozen=True)
class Times:
    """Steps that take as long as the cluster's."""

    def prefill_s(self, lengths: Sequence[int]) -> float:
        return STEP_S

    def decode_s(self, context_lengths: Sequence[int]) -> float:
        return STEP_S

    def mixed_s(self, chunks: Sequence[Chunk], context_lengths: Sequence[int]) -> float:
        return STEP_S


class Transfers(FlatTransfer):
    """Ways and copies that take as long as the cluster's."""

    def message_s(self, same_node: bool) -> float:
        return WAY_S

    def seal_s(self, nbytes: int) -> float:
        return PACE.seal_s

    def copy_s(self, nbytes: int) -> float:
        return PACE.copy_s


CASES = {
    "2p2d": (
        Shape(prefill=("n0", "n0"), decode=("n0", "n0")),
        "prefill: {replicas: 2, max_batch: 8, max_batch_tokens: 64, max_queue: 16}\n"
        "decode: {replicas: 2, max_batch: 16, max_batch_tokens: 64, max_queue: 64}\n"
        "kv: {blocks: 64, block_size: 4}",
    ),
    "blocks fall short": (
        Shape(decode_blocks=28, prefill_blocks=40),
        "prefill: {max_batch: 8, max_batch_tokens: 64, max_queue: 16, kv: {blocks: 40}}\n"
        "decode: {max_batch: 16, max_batch_tokens: 64, max_queue: 64, kv: {blocks: 28}}\nkv: {block_size: 4}",
    ),
    "blocks fall short, KV is kept": (
        Shape(decode_blocks=28, prefill_blocks=40, keep_blocks=32),
        "prefill: {max_batch: 8, max_batch_tokens: 64, max_queue: 16, kv: {blocks: 40}}\n"
        "decode: {max_batch: 16, max_batch_tokens: 64, max_queue: 64, kv: {blocks: 28}}\n"
        f"kv: {{block_size: 4}}\nrelay: {{keep: {32 * LAYOUT.block_nbytes}, lease_s: 10}}",
    ),
    "conditional": (
        Shape(mode="conditional", threshold_tokens=20),
        "mode: conditional\nconditional: {threshold_tokens: 20}\n"
        "prefill: {max_batch: 8, max_batch_tokens: 64, max_queue: 16}\n"
        "decode: {max_batch: 16, max_batch_tokens: 64, max_queue: 64}\nkv: {blocks: 64, block_size: 4}",
    ),
}


def workload(seed: int) -> list[Arrival]:
    random, at_s, made = Random(seed), 0.0, []
    for _ in range(25):
        at_s += random.expovariate(40.0)
        made.append(Arrival(at_s, random.randint(2, 60), random.randint(1, 40)))
    return made


def die(cluster: Cluster, failure: Failure) -> None:
    def revive() -> None:
        cluster.start(failure.name)

    cluster.kill(failure.name)
    if failure.down_s is not None:
        cluster.clock.after(failure.down_s, revive)


def in_cluster(shape: Shape, asked: Sequence[Arrival], failures: Sequence[Failure]) -> list[client.Ledger]:
    """Ledgers of the requests."""
    cluster = Cluster(shape, start=False)
    cluster.random = cluster.wires._random = Even(0)
    for name in ("router-0", *shape.roles):
        cluster.start(name)
    cluster.pace = PACE
    cluster.until(lambda: all(one.ready for one in cluster.processes.values()))
    raw, start = cluster.client(), cluster.now
    for number, one in enumerate(asked):
        sampling = client.Sampling(max_tokens=one.output_tokens, ignore_eos=True, seed=0)
        submit = client.Submit(str(number), prompt_ids=(100 + number,) * one.prompt_tokens, sampling=sampling)
        raw.requests[str(number)] = Heard(submit)
        cluster.clock.at(start + one.at_s, partial(RawClient.say, raw, submit))
    for failure in failures:
        cluster.clock.at(start + failure.at_s, partial(die, cluster, failure))
    cluster.until(lambda: all(one.end for one in raw.requests.values()))
    return [raw.requests[str(number)].finished.ledger for number in range(len(asked))]


def alike(
    directory: Path, shape: Shape, text: str, asked: Sequence[Arrival], failures: Sequence[str] = ()
) -> tuple[Run, list[client.Ledger]]:
    """The simulated run, after its ledgers were found to be those of the cluster; and those."""
    topology = Desk(directory).load("model: {path: nowhere, dtype: float16}\n" + text)
    dying = parse(failures, topology)
    run = System(topology, LAYOUT, lambda instance: Times(), Transfers(), validate=True).run(asked, failures=dying)
    records = sorted(run.records, key=lambda one: one.number)
    found = [one.ledger for one in records if one.ledger is not None]
    ledgers = [msgspec.structs.astuple(one) for one in in_cluster(shape, asked, dying)]
    assert [msgspec.structs.astuple(one) for one in found] == [pytest.approx(one, abs=1e-6) for one in ledgers]
    assert run.held == {}
    return run, found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_the_ledgers_of_both_are_the_same(tmp_path: Path, name: str, seed: int) -> None:
    shape, text = CASES[name]
    run, ledgers = alike(tmp_path, shape, text, workload(seed))
    assert run.seen.preemptions or not name.startswith("blocks fall short")
    assert any(one.resume_s for one in ledgers) == bool(shape.keep_blocks)


@pytest.mark.parametrize("seed", range(3))
def test_the_ledgers_of_both_are_the_same_after_a_death(tmp_path: Path, seed: int) -> None:
    shape, text = CASES["2p2d"]
    keeps = f"\nrelay: {{keep: {64 * LAYOUT.block_nbytes}, lease_s: 10}}"
    _, ledgers = alike(tmp_path, replace(shape, keep_blocks=64), text + keeps, workload(seed), ["decode-0@0.3s+1s"])
    assert any(one.resume_s for one in ledgers)
