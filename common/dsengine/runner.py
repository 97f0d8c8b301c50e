"""The engine: one replica of a model on one device, its KV pool, and the two kinds of step.

It knows blocks by number and sequences by their tokens; who owns a block, what a request is and when it ends is the
business of the services. Not for use by two threads at once.

Invariant: a step either returns a token for every item and has moved every sampler, or raises and has moved none;
it may then be asked for again, whole or item by item (KV is written to the same places).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dsengine.attention import DecodeAttention, PrefillAttention
from dsengine.config import EngineConfig, ModelInfo
from dsengine.model import Model, is_out_of_memory, load_model, load_shape
from dsengine.native.decoder import NativeDecoder, Span
from dsengine.pool import KvPool
from dsengine.sampler import Sampled, SamplerState, sample
from dskv.layout import KvLayout
from dswire.errors import EngineFailed, OutOfMemory, UnsupportedModel
from dswire.messages.client import Sampling

#: one kind of step in torch: model, spans, rows wanted -> logits
_TorchLogits = Callable[[Model, Sequence[Span], Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class PrefillItem:
    """A sequence whose KV is computed from its first token on."""

    #: prompt, and outputs made before
    token_ids: Sequence[int]
    #: at least as many as the tokens need; only those are written
    blocks: Sequence[int]
    sampler: SamplerState


@dataclass(frozen=True, slots=True)
class DecodeItem:
    """A sequence whose KV lies in ``blocks`` up to, and not with, ``token``."""

    #: drawn last
    token: int
    #: index of ``token`` in its sequence
    position: int
    #: hold ``position + 1`` tokens or more
    blocks: Sequence[int]
    sampler: SamplerState


class Engine:
    """A loaded model."""

    def __init__(self, config: EngineConfig) -> None:
        """Load weights and allocate the pool.

        Raises :class:`~dswire.errors.ModelNotFound`, :class:`UnsupportedModel`, :class:`OutOfMemory` or, for a
        device that is not there, :class:`EngineFailed`.
        """
        self._device = _device(config.device)
        torch.set_num_threads(config.threads)
        shape = load_shape(config.model_dir)
        if config.max_model_len > shape.max_positions:
            raise UnsupportedModel(
                f"max_model_len {config.max_model_len} is more than the model's {shape.max_positions} positions",
                remedy=f"set model.max_model_len to at most {shape.max_positions}",
            )
        self.model = ModelInfo(
            vocab_size=shape.vocab_size,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_model_len=config.max_model_len,
            eos_ids=shape.eos_ids,
            dtype=config.dtype,
        )
        self._model = load_model(shape, config, self._device)
        layout = KvLayout(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            block_size=config.block_size,
            dtype=config.dtype,
        )
        self.pool = KvPool(layout, config.num_blocks, self._device, config.segment)

    def sampler(self, sampling: Sampling, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> SamplerState:
        """The sampler of a sequence that has ``output_ids`` already."""
        return SamplerState(sampling, prompt_ids, output_ids, self.model.eos_ids)

    def prefill(self, batch: Sequence[PrefillItem]) -> list[Sampled]:
        """Compute the KV of whole sequences into their blocks and draw the next token of each.

        Raises :class:`EngineFailed` or :class:`OutOfMemory`.
        """
        if not batch:
            return []
        for item in batch:
            self._check(item.token_ids, len(item.token_ids), item.blocks)
        ends = accumulate(len(item.token_ids) for item in batch)
        spans = [Span(item.token_ids, 0, item.blocks) for item in batch]
        logits = self._run(spans, [end - 1 for end in ends], self._torch_prefill)
        return sample(logits, [item.sampler for item in batch])

    def decode(self, batch: Sequence[DecodeItem]) -> list[Sampled]:
        """Write the KV of each item's token and draw the next one.

        Raises :class:`EngineFailed` or :class:`OutOfMemory`.
        """
        if not batch:
            return []
        for item in batch:
            self._check((item.token,), item.position + 1, item.blocks)
        spans = [Span((item.token,), item.position, item.blocks) for item in batch]
        logits = self._run(spans, range(len(batch)), self._torch_decode)
        return sample(logits, [item.sampler for item in batch])

    def close(self) -> None:
        """Give the memory back and remove the pool's file. Doing it twice is harmless."""
        if isinstance(self._model, NativeDecoder):
            self._model.close()
        self.pool.close()

    def _run(self, spans: Sequence[Span], picked: Sequence[int], torch_logits: _TorchLogits) -> Tensor:
        """Logits ``[len(picked), vocab_size]`` of the rows ``picked``, which count through all spans."""
        if isinstance(self._model, NativeDecoder):
            return self._model.forward(spans, picked, self.pool)
        try:
            with torch.inference_mode():
                return torch_logits(self._model, spans, picked)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"no room on {self._device} for a step of {sum(len(span.tokens) for span in spans)} tokens",
                remedy="lower the batch limits or kv.memory in the topology",
            ) from error

    def _torch_prefill(self, model: Model, spans: Sequence[Span], picked: Sequence[int]) -> Tensor:
        lengths = [len(span.tokens) for span in spans]
        attention = PrefillAttention(self.pool, lengths, [span.blocks for span in spans])
        tokens = torch.tensor([token for span in spans for token in span.tokens]).to(self._device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self._device)
        return model.run(tokens, positions, attention, torch.tensor(picked).to(self._device))

    def _torch_decode(self, model: Model, spans: Sequence[Span], picked: Sequence[int]) -> Tensor:
        starts = [span.start for span in spans]
        attention = DecodeAttention(self.pool, starts, [span.blocks for span in spans])
        tokens = torch.tensor([span.tokens[0] for span in spans]).to(self._device)
        return model.run(tokens, torch.tensor(starts).to(self._device), attention, None)

    def _check(self, tokens: Sequence[int], length: int, blocks: Sequence[int]) -> None:
        """Refuse what would read or write memory of others."""
        model, pool = self.model, self.pool
        if not 0 < length <= model.max_model_len:
            raise EngineFailed(f"a sequence of {length} tokens came, of 1 to {model.max_model_len} are allowed")
        if min(tokens) < 0 or max(tokens) >= model.vocab_size:
            raise EngineFailed(f"a token outside the vocabulary of {model.vocab_size} came")
        needed = pool.layout.blocks_for(length)
        if len(blocks) < needed:
            raise EngineFailed(f"{length} tokens need {needed} blocks, {len(blocks)} came")
        if min(blocks) < 0 or max(blocks) >= pool.num_blocks:
            raise EngineFailed(f"a block outside the pool of {pool.num_blocks} came")


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineFailed(f"device {name} is not there: this process sees {torch.cuda.device_count()} GPUs")
    return device
