"""The engine: one replica of a model on one device, its KV pool, and its step.

It knows blocks by number and sequences by their tokens; who owns a block, what a request is and when it ends is the
business of the services. Not for use by two threads at once.

Invariant: a step either returns a token for every item that has a sampler and has moved those samplers, or raises
and has moved none; it may then be asked for again, whole or item by item (KV is written to the same places).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsengine import drawing
from dsengine.architecture import Architecture
from dsengine.attention import PagedAttention
from dsengine.config import EngineConfig, ModelInfo
from dsengine.model import Model, Shape, is_out_of_memory, load_model, load_shape
from dsengine.native.decoder import NativeDecoder
from dsengine.parallel import WHOLE, Part, Peers
from dsengine.pool import KvPool
from dsengine.sampler import Drawing, Sampled, SamplerState, sample
from dsengine.span import Span
from dskv.layout import KvLayout
from dskv.shards import shards
from dswire.errors import DsError, EngineFailed, OutOfMemory, UnsupportedModel
from dswire.messages.client import Sampling
from dswire.messages.ranks import MirrorWay

if TYPE_CHECKING:
    from dsengine.gpu.steps import GpuSteps


@dataclass(frozen=True, slots=True)
class StepItem(Span):
    """What a step does for one sequence: a whole prompt, a chunk of one, or one token more."""

    #: draws the token behind the span; None while more of the prompt is to come
    sampler: SamplerState | None


class Engine:
    """A loaded model, or one rank's part of it."""

    def __init__(self, config: EngineConfig, part: Part = WHOLE, peers: Peers | None = None) -> None:
        """Load the weights of ``part`` and allocate its pool; ``peers`` are the ranks that have the rest.

        Raises :class:`~dswire.errors.ModelNotFound`, :class:`UnsupportedModel`, :class:`OutOfMemory` or, for a
        device that is not there, :class:`EngineFailed`.
        """
        self._device = device_of(config.device)
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
        self._model = load_model(shape, config, self._device, part, peers)
        self._draw: Drawing = drawing.draw
        if isinstance(self._model, NativeDecoder):
            self._draw = self._model.draw
            # Little is left to torch: its threads would spin, after every step, on the cores that those of the
            # kernels need.
            torch.set_num_threads(1)
        #: of the whole model; that of :attr:`pool` has this rank's layers and heads
        self.layout = KvLayout(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            block_size=config.block_size,
            dtype=config.dtype,
        )
        mine = shards(self.layout, part.tp, part.pp, [""] * part.tp * part.pp)[part.rank]
        layout = mine.layout(self.layout)
        self.pool = KvPool(layout, config.num_blocks, self._device, config.segment, mirrored=config.mirrored)
        self._gpu = self._gpu_steps(shape, config, part)

    def sampler(self, sampling: Sampling, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> SamplerState:
        """The sampler of a sequence that has ``output_ids`` already."""
        return SamplerState(sampling, prompt_ids, output_ids, self.model.eos_ids)

    def step(self, batch: Sequence[StepItem]) -> list[Sampled | None]:
        """Write the KV of every item's tokens, and draw the next token of each that has a sampler.

        No two items are of one sequence. Raises :class:`EngineFailed` or :class:`OutOfMemory`.
        """
        return self.launch(batch)()

    def launch(self, batch: Sequence[StepItem]) -> Callable[[], list[Sampled | None]]:
        """Begin a step, without waiting for anything; what is returned ends it, and is :meth:`step`'s second half.

        Steps end in the order in which they began. Raises :class:`EngineFailed` for a batch that cannot be.
        """
        for item in batch:
            self._check(item)
        ends = accumulate(len(item.tokens) for item in batch)
        wanted = [
            (end - 1, item.sampler) for end, item in zip(ends, batch, strict=True) if item.sampler is not None
        ]
        rows = [row for row, _ in wanted]
        if batch:
            self._tell(batch, rows)
        return partial(self._finish, batch, rows, [sampler for _, sampler in wanted])

    def forward(self, spans: Sequence[Span], picked: Sequence[int]) -> Tensor | None:
        """Logits ``[len(picked), vocab_size]`` of the rows ``picked``, which count through all spans.

        None at a rank that does not draw.
        """
        if isinstance(self._model, NativeDecoder):
            return self._model.forward(spans, picked, self.pool)
        try:
            with torch.inference_mode():
                return self._run_torch(self._model, spans, picked)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"no room on {self._device} for a step of {sum(len(span.tokens) for span in spans)} tokens",
                remedy="lower the batch limits or kv.memory in the topology",
            ) from error

    def mirror(self, blocks: Sequence[int], way: MirrorWay) -> None:
        """Copy ``blocks`` between the pool and its mirror, for a thread beside the steps.

        No step that is under way or comes meanwhile may write them. Raises :class:`EngineFailed` for lost ranks.
        """
        assert self.pool.mirror is not None, "only what cannot be mapped is mirrored"
        self.pool.mirror.copy(blocks, way)

    @property
    def kernel_s(self) -> float | None:
        """Wall time that all steps so far have spent inside the compiled kernels; None without them."""
        return self._model.spent_s if isinstance(self._model, NativeDecoder) else None

    @property
    def lost(self) -> DsError | None:
        """Why no step will ever succeed again; None while all is well."""
        return None

    def watch(self, on_lost: Callable[[DsError], object]) -> None:
        """Call ``on_lost``, in any thread and at most once, when no step will ever succeed again."""

    def abandon(self) -> None:
        """Remove what would outlive this process. Never blocks."""
        if self.pool.segment is not None:
            self.pool.segment.unlink()

    def close(self) -> None:
        """Give the memory back and remove the pool's file. Doing it twice is harmless."""
        if isinstance(self._model, NativeDecoder):
            self._model.close()
        self.pool.close()

    def _tell(self, batch: Sequence[StepItem], picked: Sequence[int]) -> None:
        """Tell the other ranks of a step, where there are any."""

    def _finish(
        self, batch: Sequence[StepItem], picked: Sequence[int], samplers: Sequence[SamplerState]
    ) -> list[Sampled | None]:
        logits = self.forward(batch, picked) if batch else None
        drawn = iter(sample(logits, samplers, self._draw) if samplers and logits is not None else ())
        return [None if item.sampler is None else next(drawn) for item in batch]

    def _gpu_steps(self, shape: Shape, config: EngineConfig, part: Part) -> GpuSteps | None:
        if self._device.type != "cuda" or not config.kernels or not isinstance(shape, Architecture):
            return None
        # Triton comes with torch where that is made for GPUs
        from dsengine.gpu.steps import open_steps

        assert not isinstance(self._model, NativeDecoder), "those are for CPUs"
        return open_steps(self._model, shape, config, self.pool, part)

    def _run_torch(self, model: Model, spans: Sequence[Span], picked: Sequence[int]) -> Tensor | None:
        if self._gpu is not None:
            return self._gpu.run(spans, picked)
        tokens = torch.tensor([token for span in spans for token in span.tokens])
        positions = torch.tensor([at for span in spans for at in range(span.start, span.end)])
        rows = None if len(picked) == len(tokens) else torch.tensor(picked, dtype=torch.int64).to(self._device)
        attention = PagedAttention(self.pool, spans)
        return model.run(tokens.to(self._device), positions.to(self._device), attention, rows)

    def _check(self, span: Span) -> None:
        """Refuse what would read or write memory of others."""
        model, pool = self.model, self.pool
        if span.start < 0 or not span.tokens or span.end > model.max_model_len:
            raise EngineFailed(
                f"{len(span.tokens)} tokens from position {span.start} on came, of sequences of 1 to "
                f"{model.max_model_len} tokens"
            )
        if min(span.tokens) < 0 or max(span.tokens) >= model.vocab_size:
            raise EngineFailed(f"a token outside the vocabulary of {model.vocab_size} came")
        needed = pool.layout.blocks_for(span.end)
        if len(span.blocks) < needed:
            raise EngineFailed(f"{span.end} tokens need {needed} blocks, {len(span.blocks)} came")
        if min(span.blocks) < 0 or max(span.blocks) >= pool.num_blocks:
            raise EngineFailed(f"a block outside the pool of {pool.num_blocks} came")


def device_of(name: str) -> torch.device:
    """The device. Raises :class:`EngineFailed` for a GPU that is not there."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineFailed(f"device {name} is not there: this process sees {torch.cuda.device_count()} GPUs")
    return device
