"""Whether a model fits its topology: shape, lengths, slots, memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstopology import fit
from dstopology.modelfacts import ModelFacts, read
from support.topologies import Desk


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """With a model ``tiny``: 2 layers, 4 heads, 2 KV heads of 8, 2048 positions; 256 bytes of KV a token."""
    desk = Desk(tmp_path)
    desk.model()
    return desk


def test_facts_come_from_the_models_own_config(desk: Desk) -> None:
    facts = read("tiny", desk.env)
    assert facts is not None
    assert facts == ModelFacts(
        layers=2, heads=4, kv_heads=2, head_dim=8, max_positions=2048, parameters=1024, embedded=facts.embedded
    )
    assert facts.weights_nbytes("bfloat16") == 2048
    assert facts.weights_nbytes("bfloat16", "int8") == 1024 + 64 + 2 * facts.embedded
    assert facts.kv_layout(16, "float32").block_nbytes == 2 * 2 * 2 * 16 * 8 * 4


def test_facts_of_other_configs(desk: Desk) -> None:
    desk.model("old", num_key_value_heads=None, head_dim=16, dtype=None, torch_dtype="float16")
    facts = read("old", desk.env)
    assert facts is not None
    assert (facts.kv_heads, facts.head_dim, facts.parameters) == (4, 16, 2048)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"num_attention_heads": "x"}', '{"num_attention_heads": 0}'])
def test_a_model_that_cannot_be_understood_is_left_to_the_engine(desk: Desk, content: str) -> None:
    directory = desk.directory / "home" / "models" / "odd"
    directory.mkdir()
    (directory / "config.json").write_text(content)
    assert read("odd", desk.env) is None
    assert desk.load("model: odd\n").model.max_model_len == 8192


def test_heads_and_layers_must_be_divisible(desk: Desk) -> None:
    found = desk.problems("model: tiny\nprefill: {tp: 8}\ndecode:\n  tp: 3\n  pp: 3\n")
    assert found == [
        "2: prefill.tp: the model's 4 attention heads cannot be divided by tp 8",
        "4: decode.tp: the model's 4 attention heads cannot be divided by tp 3",
        "5: decode.pp: the model has 2 layers, too few for 3 stages",
    ]
    desk.model("odd", num_attention_heads=12, num_key_value_heads=4)
    told = "the model's 4 KV heads can neither be divided by tp 6 nor be held by equally many ranks each"
    assert desk.problems("model: odd\nprefill: {tp: 6}\n") == [f"2: prefill.tp: {told}"]


def test_kv_heads_that_several_ranks_hold_take_their_room(desk: Desk) -> None:
    once, twice = (desk.load(f"model: tiny\nkv: {{memory: 100KiB}}\ndecode: {{tp: {tp}}}\n") for tp in (2, 4))
    assert (once.model.max_model_len, twice.model.max_model_len) == (400, 192)


def test_the_length_is_what_model_and_pools_take(desk: Desk) -> None:
    assert desk.load("model: tiny\n").model.max_model_len == 2048
    assert desk.load("model: tiny\nkv: {blocks: 3}\n").model.max_model_len == 48
    assert desk.load("model: tiny\nkv: {memory: 100KiB}\n").model.max_model_len == 400
    assert desk.load("model: tiny\ndecode: {kv: {blocks: 4}}\n").model.max_model_len == 64


def test_a_length_that_cannot_be_served_is_refused(desk: Desk) -> None:
    told = "1: model.max_model_len: 2049 tokens are too many: the model takes 2048"
    assert desk.problems("model: {path: tiny, max_model_len: 2049}\n") == [told]
    told = "1: model.max_model_len: 2048 tokens are too many: the KV pool of prefill-0 holds 400"
    assert desk.problems("model: {path: tiny, max_model_len: 2048}\nprefill: {kv: {memory: 100KiB}}\n") == [told]
    told = "2: kv: the KV pool of prefill-0 has no room for even one block"
    assert told in desk.problems("model: tiny\nkv: {memory: 1KiB}\n")


def test_room_for_kept_kv_must_hold_a_block_where_prompts_are_read(desk: Desk) -> None:
    told = "2: relay.keep: 2KiB cannot hold a KV block of 4KiB"
    assert desk.problems("model: tiny\nrelay: {keep: 2KiB}\n") == [told]
    relay = desk.load("model: tiny\nrelay: {keep: 1MiB}\n").relays[0]
    assert (relay.keep_nbytes, relay.keep.suffix) == (1 << 20, ".keep")
    assert desk.load("model: tiny\n").relays[0].keep_nbytes == 0


def test_what_does_not_fit_the_host_is_refused_with_its_parts(desk: Desk) -> None:
    desk.model("huge", files_nbytes=1 << 40)
    found = desk.problems("model: huge\nkv: {memory: 700TiB}\n")
    assert len(found) == 2
    memory, shared = found
    assert memory.startswith("2: kv: this host has ")
    assert "weights 2048GiB, KV pools 1433600GiB" in memory
    assert shared.startswith(f"2: kv: {desk.directory} has room for ")


def test_other_hosts_and_gpus_are_not_judged_by_this_hosts_memory(desk: Desk) -> None:
    kv = "kv: {memory: 700TiB}\n"
    far = "nodes: [{name: far, host: far-away.example, devices: [cpu:0, cpu:1]}]\nsecurity: off\n"
    assert desk.problems(f"model: tiny\n{kv}{far}") == []
    assert desk.problems(f"model: tiny\n{kv}nodes: [{{name: g, devices: [cuda:0, cuda:1]}}]\n") == []


def test_the_smaller_of_memory_and_container_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(fit, "MEMINFO", meminfo)
    monkeypatch.setattr(fit, "CGROUP_LIMIT", limit)
    assert fit.memory_nbytes() is None
    meminfo.write_text("MemTotal:       1000 kB\nMemFree:         10 kB\n")
    assert fit.memory_nbytes() == 1000 * 1024
    limit.write_text("max\n")
    assert fit.memory_nbytes() == 1000 * 1024
    limit.write_text("4096\n")
    assert fit.memory_nbytes() == 4096


def test_a_foreign_model_takes_one_rank_and_no_int8(desk: Desk) -> None:
    desk.model("foreign", architectures=["Olmo2ForCausalLM"])
    desk.model("own", architectures=["LlamaForCausalLM"])
    assert desk.problems("model: foreign\n") == []
    for key in ("tp", "pp"):
        text = f"model: {{}}\nprefill: {{{key}: 2}}\n"
        assert desk.problems(text.replace("{}", "own", 1)) == []
        assert desk.problems(text.replace("{}", "foreign", 1)) == [
            f"2: prefill.{key}: Olmo2ForCausalLM runs through transformers' modules, which take one rank only"
        ]
    assert desk.problems("model: {path: own, quantization: int8}\n") == []
    assert desk.problems("model: {path: foreign, quantization: int8}\n") == [
        "1: model.quantization: Olmo2ForCausalLM runs through transformers' modules, which have no such weights"
    ]


def test_sizes_for_people() -> None:
    assert [fit.shown(one) for one in (0, 1023, 1024, 1536, 512 << 20, 5 << 30)] == [
        "0B",
        "1023B",
        "1KiB",
        "1.5KiB",
        "512MiB",
        "5GiB",
    ]
    assert fit.shown(1537, up=True) == "2KiB"
