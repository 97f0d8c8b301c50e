"""Time of single GPU kernels from first principles, each with a few efficiencies that are fitted.

Written with operators only, so that the same formula takes numbers and, in :mod:`dsplan.fit`, whole columns of
measurements. Each formula adds up, as a p-norm, the times that its bounds would take alone (a roofline with a soft
knee): arithmetic, memory, and the serial path of one tile. What a multiprocessor does in order takes cycles, not
seconds, so that it carries over to a device of another clock. Parameters are tuples in the order of ``*_NAMES``;
all are positive. Seconds, bytes, elements of two bytes.
"""

from __future__ import annotations

from typing import Any

from dsplan.devices import Device

GEMM_NAMES = ("launch_cycles", "flops_share", "bytes_share", "edge_bytes", "knee", "split_cycles")
CONTEXT_NAMES = ("launch_cycles", "flops_share", "serial_cycles", "knee", "row_bytes", "wave", "width")
GENERATION_NAMES = (
    "launch_cycles",
    "bytes_share",
    "flops_share",
    "serial_cycles",
    "knee",
    "head_cycles",
    "extra_tokens",
    "ungrouped_serial_cycles",
)
ALLREDUCE_NAMES = ("launch_s", "hop_s", "bytes_share")

#: rows and columns of the tiles that a library chooses from for a GEMM, and the parts it may cut the inner sum in
GEMM_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64), (16, 64))
GEMM_SPLITS = (1, 2, 4, 8)
#: rows of a tile of attention
TILE = 128
#: share of the memory bandwidth that reading one thing after the other has, as GEMMs of few rows have it
STREAM_SHARE = 0.85
#: head dimension that kernels are tuned for
HEAD_DIM = 128
#: from this size on an all-reduce is done by NCCL, below by one kernel over peer memory, too
LARGE_ALLREDUCE = 8 << 20
#: an all-reduce over PCIe: a step of the ring, the share of the link that two devices have, and how that falls with
#: their number, as they share bridges and sockets. Set on NCCL's times on 2, 4 and 8 RTX PRO 6000 (PCIe 5) in
#: aiconfigurator's tables; those of L40S were held out
BUS_HOP_S, BUS_SHARE, BUS_CROWDING = 2.2e-6, 0.64, 0.3

#: a number, or a column of numbers
Real = Any
Parameters = tuple[float, ...]


def _waves(tiles: Real, device: Device) -> Real:
    """How much longer whole rounds of tiles take than an even spread would."""
    units = device.multiprocessors
    return -(-tiles // units) * units / tiles


def _larger(a: Real, b: Real) -> Real:
    return (a + b + abs(a - b)) / 2


def _smaller(a: Real, b: Real) -> Real:
    return (a + b - abs(a - b)) / 2


def gemm_s(p: Parameters, device: Device, m: Real, n: Real, k: Real, groups: Real = 1) -> Real:
    """(m, k) x (k, n); with ``groups`` the rows go evenly to as many matrices (the experts of a mixture).

    By the best of :data:`GEMM_TILES`, each over all of k or over a part of it (:data:`GEMM_SPLITS`): whole waves of
    tiles, of which each takes what its arithmetic or the bytes of its two edges take, whatever is longer. Parts of
    k are written out in 32 bits, read, and added up.
    """
    launch, flops_share, bytes_share, edge_bytes, knee, split = p
    units, clock = device.multiprocessors, device.clock_hz
    memory = 2 * (m * k + groups * k * n + m * n) / (device.bytes_per_s * bytes_share)
    best: Real = None
    for rows, columns in GEMM_TILES:
        arithmetic = 2 * rows * columns * units / (device.flops * flops_share)
        step_s = _larger(arithmetic, 2 * (rows + columns) / (edge_bytes * clock))
        tiles = groups * -(-(m / groups) // rows) * -(-n // columns)
        for parts in GEMM_SPLITS:
            time = ((-(-tiles * parts // units) * k / parts * step_s) ** knee + memory**knee) ** (1 / knee)
            if parts > 1:
                time = time + split / clock + 8 * parts * m * n / (device.bytes_per_s * bytes_share)
            best = time if best is None else _smaller(best, time)
    return launch / clock + best


def context_s(p: Parameters, device: Device, batch: Real, tokens: Real, heads: Real, kv: Real, dim: Real) -> Real:
    """Causal attention of ``batch`` prompts of ``tokens`` each.

    Its rows go through the multiprocessors with ``row_bytes`` a cycle of each: on most devices that bounds short
    prompts, and not memory.
    """
    launch, flops_share, serial, knee, row_bytes, wave, width = p
    clock = device.clock_hz
    flops_share = flops_share * (dim / HEAD_DIM) ** width
    whole = -(-tokens // TILE)
    tiles = whole * batch * heads
    flops = 2 * batch * heads * dim * tokens * TILE * whole
    arithmetic = flops / (device.flops * flops_share) * _waves(tiles, device) ** wave
    nbytes = 4 * batch * tokens * dim * (heads + kv)
    through_s = nbytes / (row_bytes * device.multiprocessors * clock)
    moved = _larger(nbytes / (device.bytes_per_s * STREAM_SHARE), through_s)
    bounds = arithmetic**knee + moved**knee + (serial * tokens / clock) ** knee
    return launch / clock + bounds ** (1 / knee)


def generation_s(
    p: Parameters, device: Device, batch: Real, tokens: Real, heads: Real, kv: Real, dim: Real
) -> Real:
    """One query for each of ``batch`` sequences of ``tokens`` each.

    Heads that share no KV may have a kernel of their own, which does not split a long context.
    """
    launch, bytes_share, flops_share, serial, knee, head, extra, ungrouped = p
    clock = device.clock_hz
    serial = (serial + ungrouped * (heads == kv)) / clock
    memory = 4 * batch * kv * dim * (tokens + extra) / (device.bytes_per_s * bytes_share)
    arithmetic = 4 * batch * heads * dim * (tokens + extra) / (device.flops * flops_share)
    bounds = memory**knee + arithmetic**knee + (serial * tokens) ** knee
    bounds = bounds + (batch * kv * head / clock) ** knee
    return launch / clock + bounds ** (1 / knee)


def allreduce_s(p: Parameters, device: Device, ranks: Real, nbytes: Real) -> Real:
    """Sum over ``ranks`` devices of a node, each of which sends all parts but its own twice: as in a ring."""
    return _moved_s(p, device, ranks, 2 * (ranks - 1) / ranks * nbytes)


def switched_allreduce_s(p: Parameters, device: Device, ranks: Real, nbytes: Real) -> Real:
    """The same by NCCL: in a ring or, where that is less, by a switch that adds up.

    To that one each sends what it has, and the sum of its part comes back to be sent to all.
    """
    parts = 2 * (ranks - 1) / ranks
    if device.switch_adds:
        parts = _smaller(parts, (ranks + 1) / ranks)
    return _moved_s(p, device, ranks, parts * nbytes)


def bus_allreduce_s(device: Device, ranks: Real, nbytes: Real) -> Real:
    """The same in a ring over PCIe, through the bridges of the host."""
    rate = device.link_bytes_per_s(ranks) * BUS_SHARE / (ranks / 2) ** BUS_CROWDING
    return 2 * (ranks - 1) * (BUS_HOP_S + nbytes / ranks / rate)


def nccl_s(p: Parameters, device: Device, ranks: Real, nbytes: Real) -> Real:
    """The same by NCCL of 2023 without CUDA graphs: of any size, in a ring, and launched by the host."""
    launch, hop, bytes_share = p
    return allreduce_s((launch * device.host_factor, hop, bytes_share), device, ranks, nbytes)


def _moved_s(p: Parameters, device: Device, ranks: Real, nbytes: Real) -> Real:
    launch, hop, bytes_share = p
    return launch + hop * ranks + nbytes / (device.node_bytes_per_s * bytes_share)
