"""Memory, Algorithms 1 and 2, and whole plans."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dsctl.plan import command
from dsplan import report
from dsplan.confirm import agreed, confirm, confirmations, simulable
from dsplan.devices import find_device
from dsplan.errors import DoesNotFit, PlanInput, UnreachableSlo
from dsplan.goodput import Slo, make_workload
from dsplan.linear import distserve_latency
from dsplan.memory import distserve_kv_tokens, fitting, memory
from dsplan.planner import Plan, Planner, Question
from dsplan.queueing import serve
from dsplan.search import Pair, Parallel, Tried, algorithm1, algorithm2, fill, pairs_of, replicas, space
from dsplan.shapes import find_model
from dsplan.topology_file import text
from dstopology.load import load

MEASURED = Path(__file__).parents[3] / "shared" / "data" / "gpu"
A100 = find_device("a100-80g")


def test_kv_capacity_matches_rows_of_distserves_table() -> None:
    for model, tp, pp, tokens in (
        ("OPT-13B", 1, 1, 66_144),
        ("OPT-13B", 2, 1, 163_008),
        ("OPT-13B", 4, 1, 356_736),
        ("OPT-66B", 2, 1, 11_600),
        ("OPT-66B", 8, 1, 212_304),
        ("OPT-175B", 3, 3, 76_192),
    ):
        assert distserve_kv_tokens(find_model(model), A100, tp, pp) == pytest.approx(tokens, rel=0.004)


def test_kv_capacity_matches_every_row_of_distserves_table() -> None:
    table = MEASURED / "distserve" / "max_num_tokens.csv"
    if not table.exists():
        pytest.skip("DistServe's table is not on this host")
    for row in csv.DictReader(table.read_text().splitlines()):
        shape, tp, pp = find_model(row["model"]), int(row["tp"]), int(row["pp"])
        expected = int(row["max_num_tokens"])
        assert distserve_kv_tokens(shape, A100, tp, pp) == pytest.approx(expected, rel=0.004)


def test_memory_counts_weights_activations_and_kv() -> None:
    shape = find_model("Llama-3-70B")
    one, eight = memory(shape, A100, 1, 1), memory(shape, A100, 8, 1)
    assert one.kv_tokens == 0
    assert eight.weights_nbytes == pytest.approx(shape.weights_nbytes / 8, rel=0.01)
    used = eight.weights_nbytes + eight.activations_nbytes + eight.kv_tokens * shape.kv_token_nbytes // 8
    assert used < A100.memory_nbytes


def test_a_model_that_fits_nowhere_is_told_with_numbers() -> None:
    with pytest.raises(DoesNotFit, match="325 GiB of weights"):
        fitting(find_model("OPT-175B"), A100, [(1, 1), (2, 1)], 2048)


def test_the_space_is_the_loops_of_algorithm_1() -> None:
    assert {(one.tp, one.pp) for one in space(1, 2)} == {(1, 1), (1, 2), (2, 1)}
    assert Parallel(8, 4) in space(4, 8)
    assert all(one.devices <= 32 for one in space(4, 8))


rates = st.dictionaries(st.sampled_from(space(2, 4)), st.floats(0, 100), min_size=1)


@given(prefill=rates, decode=rates, slack=st.floats(1, 3))
def test_algorithm_1_finds_the_most_goodput_per_device_pruned_or_not(
    prefill: dict[Parallel, float], decode: dict[Parallel, float], slack: float
) -> None:
    found = algorithm1(
        space(2, 4),
        lambda one: prefill.get(one, 0.0),
        lambda one: decode.get(one, 0.0),
        lambda one: prefill.get(one, 0.0) * slack,
        lambda one: decode.get(one, 0.0) * slack,
    )
    for best, table in ((found.prefill, prefill), (found.decode, decode)):
        most = max(rate / one.devices for one, rate in table.items())
        assert (best.per_device if best is not None else 0.0) == most


@given(st.lists(st.floats(0, 100), min_size=12, max_size=12), st.floats(1, 2))
def test_algorithm_2_finds_the_same_with_bounds(drawn: list[float], slack: float) -> None:
    pairs = pairs_of(2, 4, lambda one: one.tp <= 2 and one.pp <= 2)
    table = dict(zip(pairs, drawn * len(pairs), strict=False))
    plain = algorithm2(pairs, table.__getitem__)
    pruned = algorithm2(pairs, table.__getitem__, [lambda pair: table[pair] * slack])
    assert (plain.best is None) == (pruned.best is None)
    if plain.best is not None and pruned.best is not None:
        assert pruned.best.per_device == plain.best.per_device == max(r / p.devices for p, r in table.items())


def test_pairs_stay_in_a_node_and_count_all_stages() -> None:
    pairs = pairs_of(2, 4, lambda one: True)
    assert all(pair.prefill.devices + pair.decode.devices <= 4 for pair in pairs)
    pair = Pair(2, Parallel(2, 1), Parallel(1, 2))
    assert pair in pairs
    assert (pair.devices, pair.whole_prefill, pair.whole_decode) == (8, Parallel(2, 2), Parallel(1, 4))


def test_replicas_are_rounded_up() -> None:
    assert [replicas(rate, 2.0) for rate in (0.1, 2.0, 2.1, 6.0)] == [1, 1, 2, 3]


def test_filling_a_cluster_balances_the_phases() -> None:
    prefill, decode = Tried(Parallel(2, 1), 5.6), Tried(Parallel(1, 1), 10.0)
    filled = fill([prefill], [decode], 5)
    assert filled == (prefill, 2, decode, 1)
    assert fill([prefill], [decode], 2) is None


def question(**changes: object) -> Question:
    base = Question(
        shape=find_model("OPT-13B"),
        device=A100,
        latency=distserve_latency("OPT-13B", "a100-80g"),
        nodes=1,
        devices_per_node=3,
        workload=make_workload("sharegpt", 2000),
        slo=Slo(0.25, 0.1),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Planner(question()).run()


def test_three_devices_for_13b_serve_about_what_the_papers_system_did(plan: Plan) -> None:
    """Its goodput on three devices was 2.3 a device, in runs of 300 requests; longer ones fill KV memory."""
    chosen = plan.chosen
    assert chosen.devices <= 3
    assert chosen.prefill.devices + chosen.decode.devices == chosen.devices
    assert chosen.goodput.low <= chosen.goodput.rate <= chosen.goodput.high
    assert 0.7 < chosen.per_device.rate < 2.6


@pytest.mark.parametrize(
    ("rate", "measured"), [(0.25, 1.0), (0.5, 1.0), (1.0, 0.9967), (1.5, 0.9967), (2.0, 0.9367)]
)
def test_attainment_of_the_papers_system_up_to_its_knee(rate: float, measured: float) -> None:
    """What the DistServe paper measured: OPT-13B on ShareGPT, prefill TP 2, decode TP 1, 300 requests; rate a
    device.

    Beyond the knee the approximation is lower than what was measured (0.75 against 0.85 at 2.5).
    """
    planner = Planner(question())
    link = A100.node_bytes_per_s
    prefill, decode = [planner.prefill_unit(Parallel(2, 1), link)], [planner.decode_unit(Parallel(1, 1))]
    shares = []
    for seed in range(8):
        drawn = make_workload("sharegpt", 300, seed).requests
        served = serve([(at / (3 * rate), prompt, output) for at, prompt, output in drawn], prefill, decode)
        good = [t <= 0.25 and p <= 0.1 for t, p in zip(served.ttft_s, served.tpot_s, strict=True)]
        shares.append(sum(good) / len(good))
    assert sum(shares) / len(shares) == pytest.approx(measured, abs=0.035)


def test_a_plan_is_json(plan: Plan) -> None:
    found = json.loads(json.dumps(report.data(plan)))
    assert set(found["prefill"]) == {"tp", "pp", "replicas"}
    for key in ("decode", "mode", "goodput_per_device", "interval", "search_seconds", "candidates", "oracle"):
        assert key in found
    assert "not simulated in this release" in " ".join(found["notes"])


def test_the_topology_loads_and_has_the_placement(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text(plan))
    topology = load(path, {"DS_HOME": str(tmp_path), "DS_RUN_DIR": str(tmp_path)})
    assert len(topology.role("prefill")) == plan.chosen.prefill.replicas
    assert {one.tp for one in topology.role("decode")} == {plan.chosen.decode.parallel.tp}
    assert topology.slo.ttft_s == pytest.approx(0.25)
    used = [device for one in topology.instances for device in one.devices]
    assert len(used) == len(set(used)) == plan.chosen.devices


def test_the_simulator_agrees_at_half_the_goodput() -> None:
    planner = Planner(question(devices_per_node=2, latency=distserve_latency("OPT-13B", "a100-80g")))
    planner.allowed = {one for one in planner.allowed if one.pp == 1}
    plan = planner.run()
    assert simulable(plan)
    assert confirm(plan, 60, plan.chosen.goodput.rate / 2).attainment >= 0.9


def test_the_simulators_goodput_is_the_highest_rate_that_attains() -> None:
    plan = Planner(question(devices_per_node=2, latency=distserve_latency("OPT-13B", "a100-80g"))).run()
    optimistic = dataclasses.replace(plan.chosen.goodput, rate=plan.chosen.goodput.rate * 2)
    plan.chosen = dataclasses.replace(plan.chosen, goodput=optimistic)
    runs = confirmations(plan, 60)
    found = agreed(plan, runs)
    assert len(runs) > 1
    assert found.attainment >= 0.9 > runs[0].attainment
    assert all(one.rate <= found.rate for one in runs if one.attainment >= 0.9)


def test_a_wanted_rate_is_met_by_enough_replicas() -> None:
    plan = Planner(question(devices_per_node=8, algorithm="high", rate=12.0)).run()
    assert plan.chosen.goodput.rate >= 12.0 * 0.97


@pytest.mark.parametrize(
    ("slo", "words"),
    [(Slo(0.005, 0.1), "a TTFT of 5 ms cannot be had"), (Slo(0.25, 0.001), "a TPOT of 1 ms cannot be had")],
)
def test_an_objective_out_of_reach_is_named_with_the_best(slo: Slo, words: str) -> None:
    with pytest.raises(UnreachableSlo, match=words) as caught:
        Planner(question(slo=slo)).run()
    assert "the best is" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": 0}, "nodes 0 is absurd"),
        ({"devices_per_node": 1000}, "devices per node 1000"),
        ({"slo": Slo(float("nan"), 0.1)}, "TTFT objective"),
        ({"slo": Slo(0.1, 0.1, 1.5)}, "attainment 1.5"),
        ({"rate": -1.0}, "rate -1"),
    ],
)
def test_absurd_numbers_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(PlanInput, match=words):
        Planner(question(**changes))


def test_the_command_writes_json_and_a_topology(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    arguments = [
        "--model",
        "OPT-13B",
        "--devices-per-node",
        "2",
        "--workload",
        "fixed:200,20",
        "--no-check",
        "--json",
    ]
    result = CliRunner().invoke(command, [*arguments, "--write", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["prefill"]["replicas"], found["decode"]["replicas"], found["devices"]) == (1, 1, 2)
    assert yaml.safe_load(path.read_text())["prefill"]["tp"] == found["prefill"]["tp"]
