"""What fits a device: weights, activations, and how many tokens of KV are left.

Weights of the fullest rank with its share of the embeddings, activations of the largest step, KV replicated where
TP exceeds the KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsplan.devices import Device
from dsplan.errors import DoesNotFit
from dsplan.shapes import ModelShape

#: share of a device's memory that is used at all
USABLE = 0.95
#: tokens of the largest step, for which memory is kept
STEP_TOKENS = 8192
#: tokens of a block
BLOCK_TOKENS = 16
#: what the runtime, the CUDA context and communication buffers take of each device (hand-set)
RUNTIME_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the fullest rank of an instance, and the tokens its KV pool holds."""

    weights_nbytes: int
    activations_nbytes: int
    kv_tokens: int


def activations_nbytes(shape: ModelShape, tp: int, step_tokens: int) -> int:
    """The residual stream twice, the widest intermediate, and the logits of 256 rows in float32."""
    inner = max(shape.intermediate, shape.active * shape.expert_width + shape.shared_width)
    wide = (2 if shape.gated else 1) * inner // tp
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tp
    return step_tokens * (2 * shape.hidden + max(wide, qkv)) * shape.item_nbytes + 256 * 4 * shape.vocab // tp


def memory(shape: ModelShape, device: Device, tp: int, pp: int, step_tokens: int = STEP_TOKENS) -> Memory:
    """What an instance of that TP and PP holds; ``kv_tokens`` is 0 where the weights alone are too many."""
    layers = -(-shape.layers // pp)
    embeddings = (1 if pp > 1 or shape.tied else 2) * shape.vocab * shape.hidden
    weights = (layers * shape.layer_weights + embeddings) * shape.item_nbytes // tp
    activations = activations_nbytes(shape, tp, step_tokens)
    free = int(device.memory_nbytes * USABLE) - RUNTIME_NBYTES - weights - activations
    kv_heads = max(shape.kv_heads // tp, 1)
    token = 2 * layers * kv_heads * shape.head_dim * shape.item_nbytes
    tokens = max(free, 0) // (token * BLOCK_TOKENS) * BLOCK_TOKENS
    return Memory(weights, activations, tokens)


def fitting(
    shape: ModelShape, device: Device, degrees: list[tuple[int, int]], sequence_tokens: int
) -> list[tuple[int, int]]:
    """Those (tp, pp) that hold the weights and one sequence. Raises :class:`DoesNotFit` where none does."""
    fits = [(tp, pp) for tp, pp in degrees if memory(shape, device, tp, pp).kv_tokens >= sequence_tokens]
    if not fits:
        most = max(degrees, key=lambda one: one[0] * one[1], default=(1, 1))
        found = memory(shape, device, *most)
        raise DoesNotFit(
            f"{shape.name} ({shape.weights_nbytes / 2**30:.0f} GiB of weights) fits no allowed placement on "
            f"{device.name}: at TP {most[0]} PP {most[1]} a device of {device.memory_nbytes / 2**30:.0f} GiB takes "
            f"{found.weights_nbytes / 2**30:.1f} GiB of weights and has room for {found.kv_tokens} tokens of KV, "
            f"{sequence_tokens} are needed",
            remedy="allow more nodes or devices, a larger device, or a smaller model or dtype",
        )
    return fits
