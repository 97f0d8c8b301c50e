"""What the engine of each rank of an instance is told. No torch here: rank hosts have none."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dsengine.config import EngineConfig
from dstopology.resolved import Instance, Topology


def rank_configs(
    topology: Topology, instance: Instance, model_dir: Path, blocks: int, *, mapped: bool
) -> list[EngineConfig]:
    """By rank, as the host that has ``model_dir`` sees it; ``blocks``: of the KV pool, which others may map."""
    return [
        EngineConfig(
            model_dir=model_dir,
            dtype=topology.model.dtype,
            device="cpu" if device.startswith("cpu") else device,
            block_size=instance.block_size,
            num_blocks=blocks,
            segment=segment if mapped else None,
            threads=instance.threads,
            max_model_len=topology.model.max_model_len,
            quantization=topology.model.quantization,
            max_batch=instance.max_batch if instance.role == "decode" else 0,
        )
        for device, segment in zip(instance.devices, rank_segments(instance), strict=True)
    ]


def rank_segments(instance: Instance) -> list[Path]:
    """The file of each rank's pool, or of its mirror."""
    path = instance.segment
    if len(instance.devices) == 1:
        return [path]
    return [path.with_suffix(f".{rank}{path.suffix}") for rank in range(len(instance.devices))]


def form_of(topology: Topology, instance: Instance) -> str:
    """Digest of what all ranks of an instance must have in common, beside the model's files."""
    model = topology.model
    told = (
        *(instance.name, instance.tp, instance.pp, instance.nodes, instance.devices, instance.block_size),
        *(model.dtype, model.quantization, model.max_model_len),
    )
    return hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()
