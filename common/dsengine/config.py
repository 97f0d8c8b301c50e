"""What an engine is told at its start, and what it tells about its model.

No torch here: a router or a tool may read these without loading it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from dskv.layout import ITEM_NBYTES
from dswire.errors import EngineFailed


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One model replica on one device. Raises :class:`EngineFailed` for values that no engine can have."""

    #: a Hugging Face directory: config.json and safetensors
    model_dir: Path
    #: dtype of weights, activations and KV; key of :data:`dskv.layout.ITEM_NBYTES`
    dtype: str
    #: ``cpu`` or ``cuda:N``
    device: str
    #: tokens in a KV block
    block_size: int
    #: blocks in the KV pool
    num_blocks: int
    #: file to create for a KV pool, or its mirror, that other processes of the host can map; None keeps it private
    segment: Path | None
    #: CPU threads of one operation; a setting of the whole process
    threads: int
    #: tokens of the longest sequence, outputs included
    max_model_len: int
    #: ``int8`` makes the weights of matrices int8 at load, see :mod:`dsengine.int8`; None leaves them in ``dtype``
    quantization: str | None = None
    #: sequences of a step for which a GPU's decode steps are recorded; 0: for none
    max_batch: int = 0
    #: use the kernels (:mod:`dsengine.native`, :mod:`dsengine.gpu`) where they can serve; ``DS_KERNELS=off`` to try
    #: without
    kernels: bool = field(default_factory=lambda: os.environ.get("DS_KERNELS") != "off")
    #: keep the KV pool of a CPU out of the file, which then mirrors it as that of a GPU; ``DS_KV_MIRROR=on`` to try
    mirror: bool = field(default_factory=lambda: os.environ.get("DS_KV_MIRROR") == "on")

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_NBYTES:
            raise EngineFailed(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_NBYTES)}")
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise EngineFailed(f"device {self.device!r} is neither cpu nor cuda:N")
        if self.quantization not in (None, "int8"):
            raise EngineFailed(f"quantization {self.quantization!r} is not one of int8")
        if self.quantization and self.device != "cpu":
            raise EngineFailed(f"int8 weights are for the cpu, not for {self.device}")
        for name in ("block_size", "num_blocks", "threads", "max_model_len"):
            if getattr(self, name) < 1:
                raise EngineFailed(f"{name} is {getattr(self, name)}, it must be at least 1")

    @property
    def mirrored(self) -> bool:
        """Whether others see the KV pool by way of a mirror, for lack of a way to map it."""
        return self.mirror or self.device != "cpu"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rest of the system needs to know of a loaded model."""

    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    #: tokens of the longest sequence that the engine accepts, outputs included
    max_model_len: int
    #: tokens with which the model ends its answer
    eos_ids: frozenset[int]
    #: dtype of weights and KV by its name
    dtype: str
