"""Time of single GPU kernels from first principles, each with a few efficiencies that are fitted.

Written with operators only, so that the same formula takes numbers and, in :mod:`dsplan.fit`, whole columns of
measurements. Each formula adds up, as a p-norm, the times that its bounds would take alone (a roofline with a soft
knee): arithmetic, memory, and the serial path of one tile. Parameters are tuples in the order of ``*_NAMES``; all
are positive. Seconds, bytes, elements of two bytes.
"""

from __future__ import annotations

from typing import Any

from dsplan.devices import Device

GEMM_NAMES = ("launch_s", "flops_share", "bytes_share", "serial_s", "knee", "wave", "activation")
CONTEXT_NAMES = ("launch_s", "flops_share", "serial_s", "knee", "bytes_share", "wave", "width")
GENERATION_NAMES = (
    "launch_s",
    "bytes_share",
    "flops_share",
    "serial_s",
    "knee",
    "head_s",
    "extra_tokens",
    "ungrouped_serial_s",
)
ALLREDUCE_NAMES = ("launch_s", "hop_s", "bytes_share")

#: rows and columns of a tile of a GEMM, rows of one of attention
TILE = 128
#: head dimension that kernels are tuned for
HEAD_DIM = 128
#: from this size on an all-reduce is done by NCCL, below by one kernel over peer memory
LARGE_ALLREDUCE = 4 << 20

#: a number, or a column of numbers
Real = Any
Parameters = tuple[float, ...]


def _waves(tiles: Real, device: Device) -> Real:
    """How much longer whole rounds of tiles take than an even spread would."""
    units = device.multiprocessors
    return -(-tiles // units) * units / tiles


def gemm_s(p: Parameters, device: Device, m: Real, n: Real, k: Real, groups: Real = 1) -> Real:
    """(m, k) x (k, n); with ``groups`` the rows go evenly to as many matrices (the experts of a mixture)."""
    launch, flops_share, bytes_share, serial, knee, wave, activation = p
    tiles = groups * -(-(m / groups) // TILE) * -(-n // TILE)
    arithmetic = 2 * m * n * k / (device.flops * flops_share) * _waves(tiles, device) ** wave
    memory = 2 * (m * k * activation + groups * k * n + m * n * activation) / (device.bytes_per_s * bytes_share)
    return launch + (arithmetic**knee + memory**knee + (serial * k) ** knee) ** (1 / knee)


def context_s(p: Parameters, device: Device, batch: Real, tokens: Real, heads: Real, kv: Real, dim: Real) -> Real:
    """Causal attention of ``batch`` prompts of ``tokens`` each."""
    launch, flops_share, serial, knee, bytes_share, wave, width = p
    flops_share = flops_share * (dim / HEAD_DIM) ** width
    tiles = -(-tokens // TILE) * batch * heads
    flops = 2 * batch * heads * dim * tokens * tokens
    arithmetic = flops / (device.flops * flops_share) * _waves(tiles, device) ** wave
    memory = 4 * batch * tokens * dim * (heads + kv) / (device.bytes_per_s * bytes_share)
    return launch + (arithmetic**knee + memory**knee + (serial * tokens) ** knee) ** (1 / knee)


def generation_s(
    p: Parameters, device: Device, batch: Real, tokens: Real, heads: Real, kv: Real, dim: Real
) -> Real:
    """One query for each of ``batch`` sequences of ``tokens`` each.

    Heads that share no KV may have a kernel of their own, which does not split a long context.
    """
    launch, bytes_share, flops_share, serial, knee, head, extra, ungrouped = p
    serial = serial + ungrouped * (heads == kv)
    memory = 4 * batch * kv * dim * (tokens + extra) / (device.bytes_per_s * bytes_share)
    arithmetic = 4 * batch * heads * dim * (tokens + extra) / (device.flops * flops_share)
    bounds = memory**knee + arithmetic**knee + (serial * tokens) ** knee + (batch * kv * head) ** knee
    return launch + bounds ** (1 / knee)


def allreduce_s(p: Parameters, device: Device, ranks: Real, nbytes: Real) -> Real:
    """Sum over ``ranks`` devices of a node, of one of the two regimes (:data:`LARGE_ALLREDUCE`)."""
    launch, hop, bytes_share = p
    volume = 2 * (ranks - 1) / ranks * nbytes
    return launch + hop * ranks + volume / (device.node_bytes_per_s * bytes_share)
