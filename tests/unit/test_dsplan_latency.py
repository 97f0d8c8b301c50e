"""The latency models against hand-computed values and the published figures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsplan import kernels
from dsplan.devices import checked, find_device, known_devices
from dsplan.errors import PlanInput, ProfileMismatch
from dsplan.latency import Steps, saturating_tokens
from dsplan.linear import distserve_latency, published
from dsplan.paper import from_linear
from dsplan.roofline import STACKS, RooflineLatency, efficiencies
from dsplan.shapes import find_model, known_models, shape_of

LINEAR = distserve_latency("OPT-13B", "a100-80g")


@pytest.mark.parametrize(("tp", "milliseconds"), [(1, 46.4), (2, 31.8), (4, 21.9)])
def test_decode_of_128_sequences_of_256_tokens_is_as_the_profile_says(tp: int, milliseconds: float) -> None:
    assert LINEAR.instance(tp, 1).decode_step_s(128, 128 * 256) * 1e3 == pytest.approx(milliseconds, abs=0.05)


def test_prefill_by_hand() -> None:
    expected_ms = 18.10254647486372 + 0.1019122572698738 * 512 + 7.122264314252114e-06 * 512 * 512
    assert LINEAR.instance(1, 1).prefill_stage_s(512, 512 * 512, 1) == pytest.approx(expected_ms / 1e3)


def test_pipeline_divides_the_stage_and_adds_a_millisecond_for_each_stage() -> None:
    whole = LINEAR.instance(1, 1).prefill_stage_s(1000, 1_000_000, 1)
    assert LINEAR.instance(1, 4).prefill_stage_s(1000, 1_000_000, 1) == pytest.approx(whole / 4 + 4e-3)


def test_small_and_large_batches_have_their_own_fit() -> None:
    fit = published()["engines"]["distserve"]["OPT-13B"]["1"]
    instance = LINEAR.instance(1, 1)
    for batch, part in ((94, "decode_small"), (95, "decode_large")):
        a, b, c = fit[part]
        assert instance.decode_step_s(batch, 5000) == pytest.approx((a + b * 5000 + c * batch) / 1e3)


def test_both_engines_are_there_and_the_factors_set_by_hand_are_named() -> None:
    assert published()["hand_set"]["distserve"] == {"prefill": 1.1, "decode": 1.0}
    assert distserve_latency("OPT-66B", "a100-80g", "vllm").degrees() == (2, 3, 4, 8)
    slower = distserve_latency("OPT-13B", "a100-80g", "vllm").instance(1, 1)
    assert slower.prefill_stage_s(512, 512**2, 1) > LINEAR.instance(1, 1).prefill_stage_s(512, 512**2, 1)


@pytest.mark.parametrize(("model", "device"), [("OPT-13B", "h100"), ("Llama-3-8B", "a100-80g")])
def test_a_profile_of_another_model_or_device_is_refused(model: str, device: str) -> None:
    with pytest.raises(ProfileMismatch, match="the profile of distserve"):
        distserve_latency(model, device)


def test_a_missing_tp_is_refused_by_name() -> None:
    with pytest.raises(ProfileMismatch, match="no times for TP 8, only for TP 1, 2, 4"):
        LINEAR.instance(8, 1)


def test_appendix_a_equals_the_linear_prefill_and_decode_but_for_the_batch() -> None:
    shape, linear = find_model("OPT-13B"), LINEAR.instance(2, 1)
    paper = from_linear(shape, 2, linear)
    assert paper.prefill_stage_s(700, 300_000, 2) == pytest.approx(linear.prefill_stage_s(700, 300_000, 2))
    batch_s = linear.decode_small[2] * 8 / 1e3
    assert paper.decode_step_s(8, 4000) == pytest.approx(linear.decode_step_s(8, 4000) - batch_s)


def test_appendix_a_by_hand() -> None:
    paper = dataclasses.replace(
        from_linear(find_model("OPT-13B"), 1, LINEAR.instance(1, 1)), c1=1.0, c2=2.0, c3=3.0, c4=5.0, c5=7.0
    )
    h, m = 5120, 20480
    assert paper.prefill_stage_s(10, 100, 1) == 40 * h * h + 20 * h * m + 2 * 3 * h * 100 / 16 + 3
    assert paper.decode_step_s(4, 10) == 5 * (4 * h * h + 2 * h * m) + 7 * 3 * h * 10


def test_steps_are_what_the_simulator_wants() -> None:
    steps = Steps(LINEAR.instance(1, 2))
    assert steps.prefill_s([100, 200]) == pytest.approx(2 * LINEAR.instance(1, 2).prefill_stage_s(300, 50_000, 2))
    assert steps.decode_s([100, 200]) == LINEAR.instance(1, 2).decode_step_s(2, 300)


def test_lm_of_13b_on_a100_is_near_the_papers_512() -> None:
    assert 384 <= saturating_tokens(LINEAR.instance(1, 1)) <= 1024


@pytest.mark.parametrize("device", known_devices())
def test_roofline_never_beats_the_peak_rates(device: str) -> None:
    hardware = find_device(device)
    for shape in map(find_model, known_models()):
        instance = RooflineLatency(shape, hardware).instance(1, 1)
        active = dataclasses.replace(shape, experts=shape.active)
        weights = shape.layers * active.layer_weights
        assert instance.prefill_stage_s(4096, 4096**2, 1) > 2 * weights * 4096 / hardware.flops * 0.99
        assert instance.decode_step_s(1, 1000) > weights * shape.item_nbytes / hardware.bytes_per_s * 0.99


@pytest.mark.parametrize("device", known_devices())
def test_shares_of_the_peak_rates_are_such_as_are_published(device: str) -> None:
    hardware, shape = find_device(device), find_model("Llama-3-8B")
    instance = RooflineLatency(shape, hardware).instance(1, 1)
    weights = shape.layers * shape.layer_weights
    assert 0.45 < 2 * weights * 4096 / hardware.flops / instance.prefill_stage_s(4096, 4096**2, 1) < 0.75
    read = (weights + shape.vocab * shape.hidden) * shape.item_nbytes
    assert 0.35 < read / hardware.bytes_per_s / instance.decode_step_s(1, 512) < 0.85


@given(batch=st.integers(1, 256), context=st.integers(1, 4000), tp=st.sampled_from([1, 2, 4, 8]))
def test_roofline_decode_grows_with_context_and_is_finite(batch: int, context: int, tp: int) -> None:
    instance = RooflineLatency(find_model("Llama-3-8B"), find_device("h100")).instance(tp, 1)
    short, long = (instance.decode_step_s(batch, batch * n) for n in (context, 4 * context))
    assert 0 < short <= long < math.inf


@given(
    device=st.sampled_from(known_devices()),
    model=st.sampled_from(["OPT-175B", "Llama-3-8B", "SmolLM2-135M", "Mixtral-8x7B", "BLOOM-176B", "Qwen3-32B"]),
    stack=st.sampled_from(sorted(STACKS)),
    tp=st.sampled_from([1, 2, 4, 8]),
    sizes=st.lists(st.integers(1, 20_000), min_size=2, max_size=2),
    batches=st.lists(st.integers(1, 600), min_size=2, max_size=2),
)
def test_roofline_takes_longer_over_more_on_any_device(
    device: str, model: str, stack: str, tp: int, sizes: list[int], batches: list[int]
) -> None:
    shape = find_model(model)
    tp = tp if shape.heads % tp == 0 else 1
    one = RooflineLatency(shape, find_device(device), STACKS[stack]).instance(tp, 1)
    (few, many), (less, more) = sorted(batches), sorted(sizes)
    slack = 1 + 1e-9
    assert one.prefill_stage_s(less, less**2, 1) <= one.prefill_stage_s(more, more**2, 1) * slack
    assert (
        one.prefill_stage_s(few * 99, few * 99**2, few)
        <= one.prefill_stage_s(many * 99, many * 99**2, many) * slack
    )
    assert one.decode_step_s(few, few * less) <= one.decode_step_s(few, few * more) * slack
    assert one.decode_step_s(few, few * less) <= one.decode_step_s(many, many * less) * slack


@pytest.mark.parametrize("device", ["a100-80g", "h100", "h200", "h20", "b200", "v100-32g"])
@pytest.mark.parametrize("model", ["OPT-66B", "Llama-3-70B", "Mixtral-8x22B"])
def test_more_ranks_are_quicker_where_links_are(device: str, model: str) -> None:
    latency = RooflineLatency(find_model(model), find_device(device))
    each = [latency.instance(tp, 1) for tp in (1, 2, 4, 8)]
    for tokens in (64, 4096):
        times = [one.prefill_stage_s(tokens, tokens**2, 1) for one in each]
        assert times == sorted(times, reverse=True)
    for batch in (1, 256):
        times = [one.decode_step_s(batch, batch * 1000) for one in each]
        assert times == sorted(times, reverse=True)


def test_roofline_refuses_a_tp_that_cuts_no_heads() -> None:
    with pytest.raises(ProfileMismatch, match="cannot be cut by TP 7"):
        RooflineLatency(find_model("OPT-13B"), find_device("a100-80g")).instance(7, 1)


def test_stages_over_the_network_are_slower_than_in_a_node() -> None:
    shape, device = find_model("OPT-66B"), find_device("a100-80g")
    near = RooflineLatency(shape, device, STACKS["graphs"], 8).instance(4, 2)
    far = RooflineLatency(shape, device, STACKS["graphs"], 4).instance(4, 2)
    assert far.prefill_stage_s(2048, 2048**2, 1) > near.prefill_stage_s(2048, 2048**2, 1)


def test_a_switch_that_adds_up_is_used_where_a_ring_sends_more() -> None:
    adds = find_device("h100")
    ring = dataclasses.replace(adds, switch_adds=False)
    bound = (0.0, 0.0, 1.0)
    times = [[kernels.switched_allreduce_s(bound, one, ranks, 1e9) for one in (adds, ring)] for ranks in (2, 4, 8)]
    assert [round(quick / slow, 3) for quick, slow in times] == [1.0, 0.833, 0.643]
    assert not find_device("a100-80g").switch_adds
    assert not find_device("h100-pcie").switch_adds


@pytest.mark.parametrize(("device", "tp"), [("l40s", 4), ("l40s", 8), ("h100-pcie", 4), ("h100-nvl", 4)])
def test_ranks_without_nvlink_between_them_add_up_over_the_hosts_bus(device: str, tp: int) -> None:
    shape, alone = find_model("Llama-3-70B"), find_device(device)
    joined = dataclasses.replace(alone, nvlinked=8)
    bus, nvlink = (RooflineLatency(shape, one).instance(tp, 1) for one in (alone, joined))
    for nbytes in (1 << 14, 1 << 20, 1 << 26):
        assert bus.allreduce_s(nbytes) > nvlink.allreduce_s(nbytes)
        assert bus.allreduce_s(nbytes) > 2 * (tp - 1) / tp * nbytes / alone.link_bytes_per_s(tp)
        assert bus.allreduce_s(nbytes) < bus.allreduce_s(2 * nbytes)
    assert RooflineLatency(shape, find_device("h100-nvl")).instance(2, 1).allreduce_s(1 << 20) < 1e-4


def test_an_all_reduce_over_the_bus_by_hand() -> None:
    device = find_device("l40s")
    hops, rate = 2 * 3, device.node_bytes_per_s * kernels.BUS_SHARE / 2**kernels.BUS_CROWDING
    by_hand = hops * (kernels.BUS_HOP_S + (1 << 20) / 4 / rate)
    assert kernels.bus_allreduce_s(device, 4, 1 << 20) == pytest.approx(by_hand)


def test_each_element_wise_kernel_takes_a_launch() -> None:
    plain, device = find_model("Llama-3-8B"), find_device("h100")
    normed = dataclasses.replace(plain, head_norms=True)
    without, with_it = (RooflineLatency(one, device).instance(1, 1) for one in (plain, normed))
    launch_s = efficiencies("h100")["gemm"][0] / device.clock_hz
    more_s = with_it.decode_step_s(1, 100) - without.decode_step_s(1, 100)
    assert more_s == pytest.approx(2 * plain.layers * launch_s)
    assert find_model("Qwen3-8B").head_norms
    assert not find_model("Qwen2.5-7B").head_norms


def test_vllm_of_2023_takes_longer_for_tokens_beyond_2048_where_more_than_two_ranks_add_up() -> None:
    shape, device = find_model("Llama-2-70B"), find_device("a100-80g")
    calm = dataclasses.replace(STACKS["eager-2023"], excess_s=0.0)
    for tp, tokens, excess_s in ((2, 4096, 0.0), (4, 2048, 0.0), (4, 4096, 2048 * 80e-6)):
        with_it, without = (
            RooflineLatency(shape, device, stack).instance(tp, 1).prefill_stage_s(tokens, tokens**2, 1)
            for stack in (STACKS["eager-2023"], calm)
        )
        assert with_it - without == pytest.approx(excess_s)


def test_efficiencies_of_the_measured_devices_are_plausible() -> None:
    for device in ("a100-80g", "h100", "h200"):
        _, arithmetic, memory, *_ = efficiencies(device)["gemm"]
        assert 0.6 < arithmetic < 1.0
        assert 0.6 < memory < 1.0
    with pytest.raises(PlanInput, match="no efficiencies named tpu"):
        efficiencies("tpu")


def test_absurd_devices_and_unknown_names_are_refused() -> None:
    with pytest.raises(PlanInput, match="network_bytes_per_s 25 is absurd"):
        checked(dataclasses.replace(find_device("h100"), network_bytes_per_s=25))
    with pytest.raises(PlanInput, match="device h900 is not known"):
        find_device("h900")


def test_a_config_json_is_a_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 100, "vocab_size": 1000, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = find_model(str(tmp_path))
    assert (shape.head_dim, shape.kv_heads, shape.gated, shape.tied) == (16, 2, True, False)
    assert shape.layer_weights == 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 100
    assert shape.kv_token_nbytes == 2 * 2 * 2 * 16 * 2


def test_configs_of_older_families_are_read_by_their_own_names() -> None:
    bloom = {"model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 10}
    assert shape_of("b", bloom).hidden == 64
    falcon = {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    falcon |= {"vocab_size": 10, "multi_query": True, "num_kv_heads": 2}
    assert shape_of("f", falcon | {"new_decoder_architecture": True}).kv_heads == 2
    assert shape_of("f", falcon).kv_heads == 1
    mpt = {"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 10}
    assert (shape_of("m", mpt).layers, shape_of("m", mpt).gated) == (2, False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"hidden_size": 64, "num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 512}, "latent attention"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(PlanInput, match=words):
        shape_of("odd", config)


def test_a_model_that_is_nowhere_is_refused() -> None:
    with pytest.raises(PlanInput, match="neither a known name nor a readable"):
        find_model("/nowhere/model")


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("OPT-13B", 12.85e9),
        ("OPT-66B", 65.7e9),
        ("OPT-175B", 174.6e9),
        ("Llama-3-8B", 8.03e9),
        ("Mixtral-8x7B", 46.7e9),
        ("Qwen3-30B-A3B", 30.5e9),
    ],
)
def test_known_models_have_the_published_number_of_parameters(model: str, parameters: float) -> None:
    assert find_model(model).weights_nbytes / 2 == pytest.approx(parameters, rel=0.005)


def test_a_mixture_reads_the_experts_that_its_tokens_go_to() -> None:
    shape = find_model("Mixtral-8x7B")
    assert shape.hit_experts(1) == pytest.approx(2)
    assert shape.hit_experts(2) == pytest.approx(8 - 8 * 0.75**2)
    assert shape.hit_experts(1000) == pytest.approx(8)


def test_a_mixture_decodes_like_its_active_part_alone_and_like_all_of_it_in_a_batch() -> None:
    mixture, dense = (
        RooflineLatency(find_model(name), find_device("h100")).instance(2, 1)
        for name in ("Mixtral-8x7B", "Mistral-7B")
    )
    assert 1.2 < mixture.decode_step_s(1, 512) / dense.decode_step_s(1, 512) < 2.2
    assert mixture.decode_step_s(64, 64 * 512) / dense.decode_step_s(64, 64 * 512) > 3
    assert 1.3 < mixture.prefill_stage_s(4096, 4096**2, 1) / dense.prefill_stage_s(4096, 4096**2, 1) < 2.5


def test_dense_layers_and_shared_experts_of_a_mixture_are_told_apart() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
    config |= {"intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
    shape = shape_of("mixed", config)
    assert (shape.sparse, shape.shared_width, shape.expert_width) == (0.75, 32, 32)
    mixed = 3 * 64 * (8 * 32 + 32) + 64 * 8
    assert shape.layer_weights == pytest.approx(4 * 64 * 64 + 0.25 * 3 * 64 * 256 + 0.75 * mixed, rel=0.01)
    with pytest.raises(PlanInput, match="9 active experts of 8"):
        shape_of("mixed", config | {"num_experts_per_tok": 9})


def test_a_model_of_this_hosts_store_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_HOME", str(tmp_path))
    directory = tmp_path / "models" / "mine-8b"
    directory.mkdir(parents=True)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    (directory / "config.json").write_text(json.dumps({**sizes, "vocab_size": 100}))
    assert find_model("mine-8b").name == "mine-8b"
    with pytest.raises(PlanInput, match=r"config.json \(No such file or directory\)"):
        find_model("mine-9b")


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 8, "intermediate_size": 128}
SMALL |= {"vocab_size": 100}


@pytest.mark.parametrize(
    ("told", "share"),
    [
        ({"sliding_window": 512}, 1.0),
        ({"sliding_window": None}, 0.0),
        ({"sliding_window": 512, "use_sliding_window": False}, 0.0),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 6}, 0.25),
        ({"sliding_window": 512, "sliding_window_pattern": 4}, 0.75),
        ({"sliding_window": 512, "model_type": "gemma2"}, 0.5),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 4}, 0.5),
    ],
)
def test_sliding_windows_are_read_from_the_config(told: dict[str, object], share: float) -> None:
    assert shape_of("w", SMALL | told).windowed == share


@given(length=st.integers(1, 60_000), batch=st.integers(1, 64))
def test_a_window_bounds_attention_and_nothing_else(length: int, batch: int) -> None:
    whole = find_model("Llama-3-8B")
    times = []
    for window, share in ((0, 0.0), (4096, 0.5), (4096, 1.0)):
        shape = dataclasses.replace(whole, window=window, windowed=share)
        one = RooflineLatency(shape, find_device("h100")).instance(1, 1)
        times.append((one.prefill_stage_s(length, length**2, 1), one.decode_step_s(batch, batch * length)))
    for some, half, every in zip(*times, strict=True):
        if length <= 4096:
            assert some == half == every
        elif length > 3 * 4096:
            assert some > half > every
        else:
            # kernels work in tiles: a little less work may take as long, or a little longer
            assert some > every * 0.98


def test_ranks_of_several_nodes_wait_for_the_network() -> None:
    latency = RooflineLatency(find_model("Llama-3-70B"), find_device("h100"), node_devices=4)
    within, across = (latency.instance(tp, 1) for tp in (4, 8))
    near = RooflineLatency(find_model("Llama-3-70B"), find_device("h100"), node_devices=8).instance(8, 1)
    for nbytes in (1 << 14, 1 << 20, 1 << 26):
        assert across.allreduce_s(nbytes) > near.allreduce_s(nbytes)
        assert across.allreduce_s(nbytes) > within.allreduce_s(nbytes)


def test_quantised_checkpoints_are_not_taken_for_16_bits() -> None:
    with pytest.raises(PlanInput, match="quantised"):
        shape_of("q", SMALL | {"quantization_config": {"quant_method": "fp8"}})
