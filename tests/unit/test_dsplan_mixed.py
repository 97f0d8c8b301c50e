"""Replicas that read prompts beside what they decode, by hand and in general."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsplan import capacity
from dsplan.confirm import simulated
from dsplan.devices import find_device
from dsplan.goodput import Slo, make_workload
from dsplan.latency import Instance
from dsplan.linear import distserve_latency
from dsplan.mixed import MixedUnit, serve_mixed
from dsplan.oracles import Oracles
from dsplan.paper import from_linear
from dsplan.placement import Group, Spec
from dsplan.question import Question
from dsplan.queueing import PrefillUnit, Request
from dsplan.roofline import RooflineLatency
from dsplan.search import Parallel
from dsplan.shapes import find_model
from dssim.express.build import library


@dataclass(frozen=True)
class PerToken:
    """A millisecond for each row of a step."""

    stages: int = 1

    def prefill_stage_s(self, tokens: int, squares: int, count: int) -> float:
        return tokens * 1e-3 / self.stages

    def decode_step_s(self, batch: int, tokens: int) -> float:
        return batch * 1e-3

    def mixed_stage_s(self, tokens: float, squares: float, count: int, batch: int, context: float) -> float:
        return (tokens + batch) * 1e-3 / self.stages


def unit(budget: int = 512, kv_tokens: int = 10_000, instance: Instance | None = None) -> MixedUnit:
    return MixedUnit(instance or PerToken(), kv_tokens, 64, budget)


def test_a_prompt_alone_is_read_in_chunks_and_then_decoded() -> None:
    served = serve_mixed([(0.0, 1000, 11)], [], [unit(512)], 0)
    assert served.ttft_s == pytest.approx([1.0])
    assert served.tpot_s == pytest.approx([0.001])


def test_who_decodes_waits_for_a_chunk_and_not_for_the_whole_prompt() -> None:
    requests: list[Request] = [(0.0, 100, 11), (0.1, 1000, 1)]
    small, large = (serve_mixed(requests, [], [unit(budget)], 0) for budget in (101, 2000))
    # ten tokens, each beside a chunk of 100 tokens; or one beside all of the prompt, and nine alone
    assert small.tpot_s[0] == pytest.approx(0.101)
    assert large.tpot_s[0] == pytest.approx((1.001 + 9 * 0.001) / 10)
    assert large.ttft_s[1] < small.ttft_s[1]


def test_a_full_pool_holds_prompts_back() -> None:
    requests: list[Request] = [(0.0, 90, 21), (0.0, 90, 21)]
    roomy, tight = (serve_mixed(requests, [], [unit(kv_tokens=tokens)], 0) for tokens in (1000, 150))
    assert (roomy.kv_waits, tight.kv_waits) == (0, 1)
    assert tight.ttft_s[1] > roomy.ttft_s[1]


def test_conditional_mode_sends_only_long_prompts_to_prefill() -> None:
    requests: list[Request] = [(0.0, 100, 2), (0.0, 1000, 2)]
    prefill = PrefillUnit(PerToken(), 512, transfer_token_s=1e-3)
    served = serve_mixed(requests, [prefill], [unit()], 500)
    assert served.ttft_s == pytest.approx([0.1, 1.0])
    assert served.transfer_s == pytest.approx([0.0, 1.0])


def test_short_prompts_go_to_prefill_too_while_decode_has_enough_to_read() -> None:
    requests: list[Request] = [(0.0, 400, 1), (0.001, 400, 1), (0.002, 400, 1)]
    served = serve_mixed(requests, [PrefillUnit(PerToken(), 400)], [unit(400)], 500)
    # the second still finds fewer than 500 tokens there, the third does not
    assert served.ttft_s == pytest.approx([0.4, 0.799, 0.4])


def test_a_prompt_alone_passes_all_stages_of_a_pipeline() -> None:
    served = serve_mixed([(0.0, 100, 1)], [], [unit(instance=PerToken(stages=4))], 0)
    assert served.ttft_s == pytest.approx([0.1])


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 3000), st.integers(1, 300)), min_size=1, max_size=40))
def test_every_request_is_read_and_made(drawn: list[tuple[float, int, int]]) -> None:
    requests = sorted(drawn)
    served = serve_mixed(requests, [PrefillUnit(PerToken(), 512)], [unit(), unit()], 1500)
    for (_, prompt, output), ttft, tpot in zip(requests, served.ttft_s, served.tpot_s, strict=True):
        assert ttft >= prompt * 1e-3 - 1e-9
        assert (tpot == 0.0) == (output == 1)


LINEAR = distserve_latency("OPT-13B", "a100-80g").instance(2, 1)


def test_the_steady_state_by_hand() -> None:
    requests: list[Request] = [(0.0, 100, 11)] * 10
    # 105.5 tokens are held on average, so ten run; one of them ends each step, and one prompt is read: 110 rows
    assert capacity.steady_rate(unit(kv_tokens=1056), requests) == pytest.approx(1 / 0.110)
    # a budget of 60 rows: 50 of the 100 tokens that are needed
    assert capacity.steady_rate(unit(60, kv_tokens=1056), requests) == pytest.approx(0.52 / 0.060, rel=0.1)


INSTANCES: dict[str, Instance] = {
    "linear": LINEAR,
    "linear pp 2": distserve_latency("OPT-13B", "a100-80g").instance(1, 2),
    "paper": from_linear(find_model("OPT-13B"), 2, LINEAR),
    "roofline": RooflineLatency(find_model("Mixtral-8x7B"), find_device("h100")).instance(2, 1),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_a_mixed_step_takes_longer_than_either_of_its_parts_and_less_than_both(name: str) -> None:
    one = INSTANCES[name]
    for tokens, batch, held in ((256, 8, 4000), (2048, 64, 60_000)):
        mixed = one.mixed_stage_s(tokens, tokens**2, 1, batch, held)
        alone = one.prefill_stage_s(tokens, tokens**2, 1), one.decode_step_s(batch, held) / one.stages
        assert max(alone) * 0.999 <= mixed <= sum(alone) * 1.05


@pytest.mark.parametrize("name", INSTANCES)
def test_no_replica_serves_more_than_its_bound(name: str) -> None:
    one = INSTANCES[name]
    requests: list[Request] = [(0.0, 300 + 17 * (i % 40), 1 + i % 150) for i in range(400)]
    bound = capacity.mixed_rate(one, requests)
    for budget in (256, 2048):
        served = serve_mixed(requests, [], [MixedUnit(one, 100_000, 512, budget)], 0)
        spent = max(t + p * (r[2] - 1) for t, p, r in zip(served.ttft_s, served.tpot_s, requests, strict=True))
        assert len(requests) / spent <= bound * 1.03


def test_requests_that_never_meet_are_served_each_alone() -> None:
    instance = RooflineLatency(find_model("Llama-3-8B"), find_device("h100")).instance(1, 1)
    requests = [(10.0 * number, 300, 20) for number in range(5)]
    served = serve_mixed(requests, [], [unit(512, 10_000, instance)], 0)
    assert served.ttft_s == pytest.approx([served.ttft_s[0]] * 5)
    assert served.tpot_s == pytest.approx([served.tpot_s[0]] * 5)


@pytest.mark.parametrize(("tp", "pp", "rate"), [(4, 1, 9.0), (1, 2, 2.5)])
def test_a_colocated_replica_does_as_the_simulator_says(tp: int, pp: int, rate: float) -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    question = Question(
        shape=find_model("OPT-13B"),
        device=find_device("a100-80g"),
        latency=distserve_latency("OPT-13B", "a100-80g"),
        nodes=1,
        devices_per_node=4,
        workload=make_workload("sharegpt", 2000),
        slo=Slo(0.25, 0.1),
    )
    spec = Spec("", Group(Parallel(tp, pp), 0), Group(Parallel(tp, pp), 1), "colocated", budget=2048)
    _, run, _ = simulated(question, spec, rate, 0, 2000)
    served = Oracles(question).units(spec).serve(question.workload.at(rate, 0.0, 2))
    for told, measured in (
        (served.ttft_s, [record.ttft_s for record in run.records]),
        (served.tpot_s, [record.tpot_s for record in run.records]),
    ):
        for place in (1000, 1800):
            assert sorted(told)[place] == pytest.approx(sorted(measured)[place], rel=0.05)
