"""The queueing oracle against the paper's closed forms, and by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsplan import capacity
from dsplan.errors import PlanInput
from dsplan.goodput import LONG, Counts, Slo, Units, Workload, counts, experience, goodput, make_workload
from dsplan.queueing import DecodeUnit, PrefillUnit, Request, serve


def single(rate: float, service_s: float) -> float:
    """Equation 1 of the DistServe paper: mean TTFT of M/D/1, ``D + R D^2 / (2 (1 - R D))``."""
    return service_s + rate * service_s**2 / (2 * (1 - rate * service_s))


def inter_op(rate: float, service_s: float) -> float:
    """Equation 2: two pipeline stages, ``D + R D^2 / (4 (2 - R D))``."""
    return service_s + rate * service_s**2 / (4 * (2 - rate * service_s))


def intra_op(rate: float, service_s: float, speedup: float) -> float:
    """Equation 3: two devices share each layer, ``D / K + R D^2 / (2 K (K - R D))``."""
    return service_s / speedup + rate * service_s**2 / (2 * speedup * (speedup - rate * service_s))


@dataclass(frozen=True)
class Constant:
    """A step of a length of its own, whatever is in it."""

    prefill_s: float = 0.2
    decode_s: float = 0.01
    stages: int = 1

    def prefill_stage_s(self, tokens: int, squares: int, count: int) -> float:
        return self.prefill_s

    def decode_step_s(self, batch: int, tokens: int) -> float:
        return self.decode_s

    def mixed_stage_s(self, tokens: float, squares: float, count: int, batch: int, context: float) -> float:
        return self.prefill_s if tokens else self.decode_s


@pytest.mark.parametrize(
    ("rate", "inter", "intra"),
    [
        (0.5, 0.2056, 0.1255),
        (1, 0.2125, 0.1357),
        (2, 0.2333, 0.1699),
        (3, 0.275, 0.2588),
        (3.5, 0.3167, 0.3922),
        (4, 0.4, 1.0588),
    ],
)
def test_equations_2_and_3_give_the_points_of_figure_4(rate: float, inter: float, intra: float) -> None:
    """x of the figure is the rate for each of two devices; D is 0.2 s and K 1.7."""
    assert inter_op(2 * rate, 0.2) == pytest.approx(inter, abs=1e-4)
    assert intra_op(2 * rate, 0.2, 1.7) == pytest.approx(intra, abs=1e-4)


def _poisson(rate: float, count: int, tokens: int = 512) -> list[Request]:
    random, at, made = Random(7), 0.0, []
    for _ in range(count):
        at += random.expovariate(rate)
        made.append((at, tokens, 1))
    return made


@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_prefill_is_m_d_1(rate: float) -> None:
    served = serve(_poisson(rate, 40_000), [PrefillUnit(Constant(0.2), 512)], [])
    assert sum(served.ttft_s) / 40_000 == pytest.approx(single(rate, 0.2), rel=0.02)


@pytest.mark.parametrize("rate", [2.0, 6.0])
def test_a_pipeline_of_two_is_equation_2(rate: float) -> None:
    served = serve(_poisson(rate, 40_000), [PrefillUnit(Constant(0.1, stages=2), 512)], [])
    assert sum(served.ttft_s) / 40_000 == pytest.approx(inter_op(rate, 0.2), rel=0.02)


def test_tensor_parallelism_is_equation_3() -> None:
    served = serve(_poisson(4.0, 40_000), [PrefillUnit(Constant(0.2 / 1.7), 512)], [])
    assert sum(served.ttft_s) / 40_000 == pytest.approx(intra_op(4.0, 0.2, 1.7), rel=0.02)


def test_short_prompts_share_a_batch_and_long_ones_do_not() -> None:
    requests = [(0.0, 512, 1), (0.1, 200, 1), (0.1, 200, 1), (0.1, 400, 1)]
    served = serve(requests, [PrefillUnit(Constant(1.0), 512)], [])
    assert served.ttft_s == pytest.approx([1.0, 1.9, 1.9, 2.9])


def test_a_request_alone_by_hand() -> None:
    served = serve([(0.0, 100, 11)], [PrefillUnit(Constant(0.2), 512, transfer_token_s=1e-3)], [_decode()])
    assert served.transfer_s == pytest.approx([0.1])
    # ten steps, half a step to join, and the transfer
    assert served.tpot_s == pytest.approx([(10.5 * 0.01 + 0.1) / 10])


def _decode(kv_tokens: int = 1 << 20) -> DecodeUnit:
    return DecodeUnit(Constant(), kv_tokens)


def test_one_token_needs_no_decode() -> None:
    assert serve([(0.0, 100, 1)], [PrefillUnit(Constant(), 512)], [_decode()]).tpot_s == [0.0]


def test_a_full_pool_holds_the_next_back() -> None:
    requests = [(0.0, 90, 11), (0.0, 90, 11)]
    roomy, tight = (serve(requests, [], [_decode(tokens)]) for tokens in (1000, 150))
    assert roomy.kv_waits == 0
    assert tight.kv_waits == 1
    assert sorted(tight.tpot_s)[1] == pytest.approx(2 * roomy.tpot_s[0])


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 3000), st.integers(1, 300)), min_size=1, max_size=60))
def test_every_request_ends_after_it_began(drawn: list[tuple[float, int, int]]) -> None:
    requests = sorted(drawn)
    served = serve(requests, [PrefillUnit(Constant(), 512)] * 2, [_decode(4000)] * 2)
    assert all(seconds >= 0.2 - 1e-9 for seconds in served.ttft_s)
    for (_, _, output), tpot in zip(requests, served.tpot_s, strict=True):
        assert (tpot == 0.0) == (output == 1)
        assert output == 1 or tpot >= 0.01 - 1e-9


def test_more_replicas_are_never_worse_on_average() -> None:
    requests = _poisson(8.0, 4000)
    one, two = (serve(requests, [PrefillUnit(Constant(0.1), 512)] * n, []) for n in (1, 2))
    assert sum(two.ttft_s) < sum(one.ttft_s)


def test_capacity_of_prefill_and_decode_by_hand() -> None:
    requests = [(0.0, 512, 11)] * 10
    assert capacity.prefill_rate(PrefillUnit(Constant(0.2), 512), requests) == pytest.approx(5.0)
    # 517.5 tokens are held: 10 sequences fit, ten steps of 10 ms each
    assert capacity.decode_rate(_decode(5175), requests) == pytest.approx(10 / 0.1)


def test_goodput_finds_the_step_and_its_interval() -> None:
    def attain(rate: float) -> Counts:
        hits = 100 if rate <= 3.0 else 50
        return Counts(100, hits, 100 - hits, 0)

    found = goodput(attain, 0.9, most=50.0)
    assert 3.0 * 0.98 <= found.rate <= 3.0
    assert found.low <= found.rate <= found.high
    assert goodput(lambda rate: Counts(10, 0, 10, 0), 0.9).rate == 0.0
    assert goodput(lambda rate: Counts(100, 100, 0, 0), 0.9, most=7.0).rate == 7.0


def test_attainment_is_of_both_objectives_by_the_same_request() -> None:
    workload = Workload("two", tuple((float(i), 512 if i % 2 else 100, 2 if i % 3 else 1) for i in range(2000)))
    seen = counts(workload, 0.001, Slo(1.0, 0.012), Units((PrefillUnit(Constant(), 512),), (_decode(),)))
    assert seen.hits + seen.ttft_misses + seen.tpot_misses == seen.count
    assert seen.tpot_misses > 0


def test_percentiles_and_attainment_of_one_run_agree() -> None:
    workload = Workload("same", tuple((float(i), 200, 11) for i in range(1000)))
    slo, units = Slo(0.21, 0.011), Units((PrefillUnit(Constant(), 512),), (_decode(),))
    seen = experience(workload, 1.0, slo, units)
    assert seen.share == counts(workload, 1.0, slo, units).share == 1.0
    assert seen.ttft_s == pytest.approx({50: 0.2, 90: 0.2, 99: 0.2})
    assert seen.tpot_s[50] == pytest.approx(0.0105)


def test_a_queue_that_grows_slowly_shows_in_a_long_run() -> None:
    workload = Workload("same", tuple((float(i), 200, 2) for i in range(12_000)))
    # a tenth more than one instance reads
    slo, units, rate = Slo(30.0, 1.0), Units((PrefillUnit(Constant(), 200, max_batch=1),), (_decode(),)), 5.5
    assert experience(workload, rate, slo, units).share == 1.0
    assert experience(workload, rate, slo, units, LONG).share < 0.9


def test_a_handful_of_requests_is_no_workload(tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "10,10\n" * 5)
    with pytest.raises(PlanInput, match="has 5 requests"):
        make_workload(str(path))


def test_workloads_are_the_same_for_the_same_seed() -> None:
    assert make_workload("sharegpt", 50, 1) == make_workload("sharegpt", 50, 1)
    assert make_workload("sharegpt", 50, 1) != make_workload("sharegpt", 50, 2)
