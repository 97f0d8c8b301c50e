"""The compiled simulation against the machines: the same records, to the last bit."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from dskv.layout import KvLayout
from dsplan.latency import Steps
from dsplan.linear import LinearInstance
from dssim.express.build import library
from dssim.express.run import Goal, run
from dssim.system import System
from dssim.times import INSTANT, FlatTransfer, Linear, LinearTimes, Sums
from dssim.workload import Arrival, arrivals, fixed, gaps, histogram
from dstopology.resolved import Instance, Topology
from support.topologies import Desk

LAYOUT = KvLayout(2, 2, 4, 16, "float16")
TIMES = LinearTimes(Linear(0.02, 1e-4, 1e-8), Linear(0.01, 1e-6, 0.0, 1e-4), Linear(0.012, 2e-6, 0.0, 5e-5), 20)
#: seals, copies and streams that queue, and no two of the ways equally long
SLOW = FlatTransfer(0.0013, 0.0021, 2e6, 3e6, 4e6)

NODES = (
    "kv: {blocks: 1500}\nsecurity: off\nnodes:\n"
    "- {name: a, host: 10.0.0.1, devices: [cpu:0, cpu:1, cpu:2]}\n"
    "- {name: b, host: 10.0.0.2, devices: [cpu:0, cpu:1, cpu:2]}\n"
    "- {name: c, host: 10.0.0.3, devices: [cpu:0, cpu:1, cpu:2, cpu:3, cpu:4, cpu:5]}\n"
)
#: a pair whose stages are on both nodes, and two instances of one
SPREAD = (
    "prefill: {pp: 2, place: [[a/cpu:0, b/cpu:0], [c/cpu:0, c/cpu:1], [c/cpu:2, c/cpu:3]]}\n"
    "decode: {pp: 2, place: [[a/cpu:1, b/cpu:1], [c/cpu:4, c/cpu:5]]}\n"
)
#: instances of both roles on both nodes
MIXED = "prefill: {place: [a/cpu:0, b/cpu:0]}\ndecode: {place: [a/cpu:1, b/cpu:1, b/cpu:2]}"
TOPOLOGIES = {
    "1p1d": "kv: {blocks: 1500}",
    "3p2d": "kv: {blocks: 1500}\nprefill: 3\ndecode: 2",
    "prefill waits for blocks": "prefill: {kv: {blocks: 120}}\ndecode: {kv: {blocks: 1500}}",
    "short of queue": "kv: {blocks: 1500}\nrouter: {max_requests: 20}\n"
    "prefill: {max_queue: 2}\ndecode: {max_queue: 3, max_batch: 4}",
    "chunks": "kv: {blocks: 1500}\nprefill: {max_batch_tokens: 64, max_batch: 3}\ndecode: 2",
    "colocated": "mode: colocated\nkv: {blocks: 1500}\ndecode: {replicas: 2, max_batch_tokens: 100}",
    "prompts first": "mode: colocated\nkv: {blocks: 1500}\ndecode: {replicas: 2, prefill_priority: true}",
    "conditional": "mode: conditional\nconditional: {threshold_tokens: 150}\nkv: {blocks: 1500}",
    "pipelines": "kv: {blocks: 1500}\nprefill: {pp: 2, max_batch_tokens: 128}\ndecode: {pp: 3}",
    "copied when granted": "kv: {blocks: 1500}\nrelay: {verify: false}\ndecode: 2",
    "by tcp within a node": "kv: {blocks: 1500}\nforce_transport: tcp\ndecode: 2",
    "two nodes": NODES + "prefill: {place: [a/cpu:0]}\ndecode: {place: [b/cpu:0, b/cpu:1]}",
    "near and far": NODES + "router: {node_affinity: 0.3}\n" + MIXED,
    "all by tcp": NODES + "force_transport: tcp\n" + MIXED,
    "colocated on two nodes": NODES + "mode: colocated\ndecode: {place: [a/cpu:1, b/cpu:1, b/cpu:2]}",
    "pairs": NODES + SPREAD,
    "pairs short of room": NODES + SPREAD.replace("decode: {", "decode: {max_queue: 8, "),
    "colocated pipelines": "mode: colocated\nkv: {blocks: 1500}\ndecode: {pp: 2, max_batch_tokens: 100}",
}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    if library() is None:
        pytest.skip("no C++ compiler")
    return Desk(tmp_path)


def load(desk: Desk, text: str) -> Topology:
    return desk.load("model: {path: nowhere, dtype: float16}\n" + text)


def bursts(count: int, seed: int) -> list[Arrival]:
    random = Random(seed)
    return arrivals(gaps("gamma", 30.0, random, 3.0), histogram("humaneval", random), count)


def conversations(count: int, seed: int) -> list[Arrival]:
    """Prompts that begin with one of a few texts, or alone; some answers outgrow small pools."""
    random = Random(seed)
    begins = [tuple(random.randrange(50) for _ in range(2)) for _ in range(4)]
    made, at_s = [], 0.0
    for _ in range(count):
        at_s += random.expovariate(random.choice([5.0, 30.0, 200.0]))
        hashes = (*random.choice(begins)[: random.randrange(3)], random.randrange(10**6))
        length = random.choice([random.randrange(1, 300), len(hashes) * 512 - random.randrange(512)])
        made.append(Arrival(at_s, length, random.choice([1, 2, 30, 100, 300]), hashes))
    return made


@pytest.mark.parametrize("transfers", [FlatTransfer(), SLOW], ids=["quick", "slow"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_records_are_those_of_the_machines(desk: Desk, name: str, transfers: FlatTransfer) -> None:
    topology, asked = load(desk, TOPOLOGIES[name]), bursts(60, len(name))
    fast = run(topology, LAYOUT, lambda instance: TIMES, transfers, asked)
    slow = System(topology, LAYOUT, lambda instance: TIMES, transfers).run(asked)
    assert fast is not None
    assert fast.records == slow.records
    assert fast.seen.busy_s == slow.seen.busy_s
    assert (fast.begun_s, fast.simulated_s) == (slow.begun_s, slow.simulated_s)


@pytest.mark.parametrize("kept", ["true", "false"])
@pytest.mark.parametrize("name", [name for name, text in TOPOLOGIES.items() if "kv: {blocks: 1500}" in text])
def test_they_are_theirs_where_blocks_fall_short_and_prompts_begin_alike(desk: Desk, name: str, kept: str) -> None:
    pool = f"kv: {{blocks: 120, prefix_cache: {kept}}}"
    topology, asked = load(desk, TOPOLOGIES[name].replace("kv: {blocks: 1500}", pool)), conversations(80, len(name))
    fast = run(topology, LAYOUT, lambda instance: TIMES, SLOW, asked)
    slow = System(topology, LAYOUT, lambda instance: TIMES, SLOW).run(asked)
    assert fast is not None
    assert fast.records == slow.records
    assert fast.seen.busy_s == slow.seen.busy_s
    assert fast.seen.preemptions == slow.seen.preemptions


def test_what_was_preempted_is_found_again_in_the_pools(desk: Desk) -> None:
    found = []
    for kept in ("true", "false"):
        topology = load(desk, f"kv: {{blocks: 128, prefix_cache: {kept}}}")
        asked = arrivals(gaps("constant", 1000.0, Random(0)), fixed(64, 300), 16)
        fast = run(topology, LAYOUT, lambda instance: TIMES, SLOW, asked)
        slow = System(topology, LAYOUT, lambda instance: TIMES, SLOW).run(asked)
        assert fast is not None
        assert fast.records == slow.records
        assert fast.seen.preemptions == slow.seen.preemptions > 10
        assert all(one.ledger is not None and one.output_tokens == 300 for one in fast.records)
        found.append(fast.seen.busy_s["prefill-0"])
    # the prompts of those that are read again are still there
    assert found[0] < found[1]


@pytest.mark.parametrize("name", ["3p2d", "colocated", "pipelines"])
def test_times_of_the_planner_are_asked_for(desk: Desk, name: str) -> None:
    def times(instance: Instance) -> Steps:
        fit = LinearInstance((18.1, 0.1, 7e-6), (9.9, 6e-4, 0.04), (7.2, 6e-4, 0.16), 10, instance.pp)
        return Steps(fit)

    topology, asked = load(desk, TOPOLOGIES[name]), bursts(40, 7)
    fast = run(topology, LAYOUT, times, SLOW, asked)
    assert fast is not None
    assert fast.records == System(topology, LAYOUT, times, SLOW).run(asked).records


def test_a_run_is_over_when_its_goal_is_out_of_reach(desk: Desk) -> None:
    topology, asked = load(desk, TOPOLOGIES["1p1d"]), bursts(200, 3)
    whole = run(topology, LAYOUT, lambda instance: TIMES, SLOW, asked)
    assert whole is not None
    ttft_s, tpot_s = 0.1, 0.02
    missed = [one for one in whole.records if one.number >= 20 and (one.ttft_s > ttft_s or one.tpot_s > tpot_s)]
    assert len(missed) > 50
    reached = run(topology, LAYOUT, lambda instance: TIMES, SLOW, asked, Goal(ttft_s, tpot_s, 20, len(missed)))
    assert reached is not None
    assert reached.records == whole.records
    cut = run(topology, LAYOUT, lambda instance: TIMES, SLOW, asked, Goal(ttft_s, tpot_s, 20, 30))
    assert cut is not None
    # the one too many was the last to end
    assert cut.records == whole.records[: whole.records.index(missed[30]) + 1]


def test_errors_of_times_are_raised(desk: Desk) -> None:
    class Broken(Steps):
        def summed_s(self, step: Sums) -> float:
            raise ArithmeticError("no time")

    broken = Broken(LinearInstance((18.1, 0.1, 7e-6), (9.9, 6e-4, 0.04), (7.2, 6e-4, 0.16), 10))
    with pytest.raises(ArithmeticError, match="no time"):
        run(load(desk, TOPOLOGIES["1p1d"]), LAYOUT, lambda instance: broken, SLOW, bursts(3, 1))


def test_events_of_one_time_keep_their_order(desk: Desk) -> None:
    topology, asked = load(desk, "kv: {blocks: 1500}\nprefill: 2\ndecode: 2"), [Arrival(0.0, 16, 5)] * 20
    times = LinearTimes(Linear(1.0), Linear(0.125))
    fast = run(topology, LAYOUT, lambda instance: times, INSTANT, asked)
    assert fast is not None
    assert fast.records == System(topology, LAYOUT, lambda instance: times, INSTANT).run(asked).records


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("kv: {blocks: 64}", [Arrival(0.0, 1000, 25)]),
        ("kv: {blocks: 64}\nrouter: {max_deadline_s: 1}", [Arrival(0.0, 10, 900)]),
        ("kv: {blocks: 64}\nrelay: {lease_s: 2}\ndecode: {max_queue: 1}", [Arrival(0.0, 10, 200)] * 2),
        ("kv: {blocks: 64}\nrelay: {keep: 1MiB}", [Arrival(0.0, 10, 20)]),
    ],
    ids=["no room", "deadline", "lease", "KV is kept"],
)
def test_what_is_out_of_the_ordinary_is_left_to_the_machines(desk: Desk, text: str, asked: list[Arrival]) -> None:
    assert run(load(desk, text), LAYOUT, lambda instance: TIMES, FlatTransfer(), asked) is None


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/g++"])
def test_without_a_compiler_that_works_there_is_no_compiled_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("DS_HOME", str(tmp_path))
    assert library.__wrapped__() is None


def test_without_it_the_machines_are_to_be_asked(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dssim.express.run.library", lambda: None)
    topology = load(desk, TOPOLOGIES["1p1d"])
    assert run(topology, LAYOUT, lambda instance: TIMES, SLOW, bursts(3, 1)) is None


def test_the_mean_wait_of_a_hundred_thousand_is_that_of_m_d_1(desk: Desk) -> None:
    rate, step_s, requests = 50.0, 0.01, 100_000
    topology = load(desk, "prefill: {max_batch: 1}\nkv: {blocks: 64}\nrouter: {max_requests: 100000}")
    times = LinearTimes(Linear(step_s), Linear(0.1))
    asked = arrivals(gaps("poisson", rate, Random(1)), fixed(1, 1), requests)
    found = run(topology, LAYOUT, lambda instance: times, INSTANT, asked)
    assert found is not None
    mean_s = sum(record.ttft_s for record in found.records) / requests
    # DistServe (OSDI 2024), section 3.1, equation 1: D + R D^2 / (2 (1 - R D))
    assert mean_s == pytest.approx(step_s + rate * step_s**2 / (2 * (1 - rate * step_s)), rel=0.01)
