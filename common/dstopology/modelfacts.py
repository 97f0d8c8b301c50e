"""What a topology needs to know of its model, read from ``config.json`` where the model is on this host.

A model that is not here, or whose files cannot be understood, gives None: the checks that need it are left to
the engine, which says more about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dshost.home import home
from dskv.layout import ITEM_NBYTES, KvLayout

#: values of ``architectures`` that the engine computes by itself; others run through transformers' modules, which
#: take one rank and no quantisation. As in :data:`dsengine.families.FAMILIES`, which this package does not import.
OWN_ARCHITECTURES = frozenset(
    {
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "OPTForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "SmolLM3ForCausalLM",
    }
)


#: bytes of a weight in int8 and of its share of a scale, two bytes for 32 of them (dsengine/int8.py)
INT8_ITEM_NBYTES = 1 + 2 / 32


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shape and size of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    #: tokens of a sequence
    max_positions: int
    #: bytes of the weights per byte of an element
    parameters: int
    #: of those, in tables of embeddings
    embedded: int = 0
    #: the first of ``architectures``; None where that is not told
    architecture: str | None = None

    @property
    def foreign(self) -> bool:
        """Only transformers' modules can run it."""
        return self.architecture is not None and self.architecture not in OWN_ARCHITECTURES

    def kv_layout(self, block_size: int, dtype: str) -> KvLayout:
        """Layout of the KV blocks of an instance that holds the whole model."""
        return KvLayout(self.layers, self.kv_heads, self.head_dim, block_size, dtype)

    def weights_nbytes(self, dtype: str, quantization: str | None = None) -> int:
        """Bytes of the weights as ``dtype``; with ``int8`` all but the embeddings are in that, near enough."""
        if quantization == "int8":
            return int(self.parameters * INT8_ITEM_NBYTES) + self.embedded * ITEM_NBYTES[dtype]
        return self.parameters * ITEM_NBYTES[dtype]


def written_path(path: str, topology: Path) -> str:
    """``model.path`` with a local path made absolute; it is relative to the topology's directory."""
    expanded = Path(path).expanduser()
    candidate = (topology.parent / expanded).absolute()
    explicit = path.startswith((".", "~", "/")) or expanded.suffix == ".gguf"
    return str(candidate.resolve()) if explicit or candidate.is_dir() else path


def model_name(path: str) -> str:
    """What clients call the model at ``path``."""
    return Path(path).name.removesuffix(".gguf")


def read(path: str, env: Mapping[str, str]) -> ModelFacts | None:
    """Facts of the model at ``path`` (as :func:`written_path` gives it), or None when it is not to be had here."""
    directory = Path(path) if Path(path).is_absolute() else home(env) / "models" / path
    try:
        config = json.loads((directory / "config.json").read_bytes())
        files = [file.stat().st_size for file in directory.glob("*.safetensors")]
        return _facts(config, sum(files))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _facts(config: Mapping[str, Any], files_nbytes: int) -> ModelFacts:
    heads = int(config["num_attention_heads"])
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return ModelFacts(
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        max_positions=int(config["max_position_embeddings"]),
        parameters=files_nbytes // ITEM_NBYTES[stored],
        architecture=next((name for name in config.get("architectures") or () if isinstance(name, str)), None),
        embedded=int(config.get("vocab_size", 0)) * int(config["hidden_size"]),
    )
