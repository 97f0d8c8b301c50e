"""Models without a description here, run by transformers' own modules over the engine's paged KV.

Their attention layers come back to the engine through transformers' attention interface; everything else (weights,
norms, rope, MLPs) is transformers'. Slower than the lean decoder, and the whole price of a model nobody described.

Invariant: a model that loads gives, for a probe prefilled in part and then decoded, the logits that transformers
computes for it on its own; a model for which that is not so (it keeps other state than K and V, or its attention
knows something that is not told here) is refused with :class:`UnsupportedModel`, as is one that hands its attention
an argument unknown here.
"""

from __future__ import annotations

from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from dsengine.architecture import AttentionRule
from dsengine.attention import Attention, PagedAttention
from dsengine.config import EngineConfig
from dsengine.foreign_shape import ForeignShape
from dsengine.pool import DTYPES, KvPool
from dsengine.span import Span
from dskv.layout import KvLayout
from dswire.errors import ModelNotFound, UnsupportedModel

_NAME = "distserve_paged"
_PROBE_TOKENS = 9
#: largest difference of the probe's logits, as a part of the largest logit
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
_step: ContextVar[_Step] = ContextVar("_step")


class _Step:
    """One forward pass: where its layers attend, and what they were seen to do."""

    def __init__(self, attention: Attention, shape: ForeignShape) -> None:
        self.attention = attention
        self.shape = shape
        self.layers: list[int] = []
        self.windows: set[int | None] = set()


class ForeignModel:
    """A causal language model of transformers."""

    def __init__(self, config: EngineConfig, shape: ForeignShape, device: torch.device) -> None:
        """Load and probe. Raises :class:`UnsupportedModel` or :class:`ModelNotFound`."""
        self._shape = shape
        self._model = _load(config, device)
        self._probe(config, device)

    def run(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """``tokens`` ``[n]`` at ``positions`` ``[n]`` -> logits ``[rows, vocab_size]`` float32; None: all rows."""
        return self._run(tokens, positions, _Step(attention, self._shape), rows)

    def _run(self, tokens: Tensor, positions: Tensor, step: _Step, rows: Tensor | None) -> Tensor:
        token = _step.set(step)
        try:
            out = self._model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=0 if rows is None else rows,
            )
        finally:
            _step.reset(token)
        logits: Tensor = out.logits[0].float()
        return logits

    def _probe(self, config: EngineConfig, device: torch.device) -> None:
        shape = self._shape
        count = min(_PROBE_TOKENS, config.max_model_len)
        tokens = torch.arange(1, count + 1, device=device) * 7919 % shape.vocab_size
        positions = torch.arange(count, device=device)
        pool = KvPool(KvLayout(shape.layers, shape.kv_heads, shape.head_dim, 4, config.dtype), 4, device)
        # A whole part, a chunk, and single tokens.
        borders = sorted({0, max(1, count - 5), max(1, count - 2), max(1, count - 1), count})
        got = []
        with torch.inference_mode():
            for start, end in pairwise(borders):
                span = Span(tokens[start:end].tolist(), start, [2, 0, 1])
                step = _Step(PagedAttention(pool, [span]), shape)
                got.append(self._run(tokens[start:end], positions[start:end], step, None))
            self._check_layers(config, step)
            self._model.set_attn_implementation("eager")
            want = self._model(input_ids=tokens[None], use_cache=False).logits[0].float()
            self._model.set_attn_implementation(_NAME)
        off = float((torch.cat(got) - want).abs().max() / want.abs().max())
        if not off <= _TOLERANCE[config.dtype]:
            raise UnsupportedModel(
                f"{config.model_dir}: {shape.name} on the paged KV cache is off by {off:.2g} of its largest logit: "
                "it has state or attention that the engine does not know"
            )

    def _check_layers(self, config: EngineConfig, step: _Step) -> None:
        shape = self._shape
        if step.layers != list(range(shape.layers)):
            raise UnsupportedModel(
                f"{config.model_dir}: {shape.name} attends in layers {step.layers} of {shape.layers}: only models "
                "whose every layer attends once are supported"
            )
        window = shape.window
        if window is not None and window < config.max_model_len and window not in step.windows:
            raise UnsupportedModel(
                f"{config.model_dir}: {shape.name} does not tell its attention of its window of {window}",
                remedy=f"set model.max_model_len to at most {window}",
            )


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention: each ``[1, heads, tokens, head_dim]``, to ``[1, tokens, heads, head_dim]``."""
    step = _step.get()
    _refuse_unknown(step.shape, module, attention_mask, others)
    layer: int = module.layer_idx
    step.layers.append(layer)
    step.windows.add(sliding_window)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    shape = step.shape
    if k.shape[1:] != (shape.kv_heads, shape.head_dim) or v.shape[1] != shape.kv_heads:
        raise UnsupportedModel(
            f"{shape.name}: layer {layer} has keys of {list(k.shape[1:])} and values of {list(v.shape[1:])} (heads "
            f"and size), config.json tells of {[shape.kv_heads, shape.head_dim]}"
        )
    size = v.shape[-1]
    padded = functional.pad(v, (0, shape.head_dim - size))
    mixed = step.attention(layer, q, torch.cat((k, padded), 1), AttentionRule(scaling, sliding_window, softcap))
    return mixed[None, :, :, :size].contiguous(), None


def _refuse_unknown(shape: ForeignShape, module: Any, mask: Tensor | None, others: dict[str, Any]) -> None:
    """An argument that changes the result, and that is not computed here."""
    harmless = ("dropout", "is_causal", "position_ids", "use_cache", "cache_position")
    unknown = [
        key
        for key, value in others.items()
        if key not in harmless and not key.startswith("output_") and value is not None and value is not False
    ]
    if mask is not None:
        unknown.append("a mask of its own")
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        unknown.append("sight of later tokens")
    if unknown:
        raise UnsupportedModel(f"{shape.name}: its attention is not covered: {', '.join(unknown)}")


AttentionInterface.register(_NAME, _attend)


def _load(config: EngineConfig, device: torch.device) -> Any:
    hf_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            config.model_dir,
            dtype=DTYPES[config.dtype],
            attn_implementation=_NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        raise ModelNotFound(f"{config.model_dir}: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        if "DefaultCPUAllocator" in str(error):
            raise
        raise UnsupportedModel(f"{config.model_dir}: transformers cannot load it: {error}") from error
    for what, names in (("are missing", info["missing_keys"]), ("have no place", info["unexpected_keys"])):
        if names:
            raise UnsupportedModel(f"{config.model_dir}: {len(names)} tensors {what}, such as {min(names)}")
    return model.to(device).eval()
