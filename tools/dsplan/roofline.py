"""A latency model of any decoder on any device of the table, from first principles.

A step is the sum of its kernels (:mod:`dsplan.kernels`, with the efficiencies of ``data/efficiency.json``): for
each layer four GEMMs, attention, the element-wise kernels as memory traffic, and with TP two all-reduces; then the
output matrix, and with PP a send between stages. A mixture of experts computes for the active experts of each
token and reads those that any token of the step goes to. On top comes the software: a time for each step, more with
several ranks, and one for each layer below which the host cannot launch a layer's kernels (zero with CUDA graphs).
Those depend on the serving software, not on the device, and so do the libraries whose kernels it runs:
:data:`STACKS` names what is known of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files

from dsplan import kernels
from dsplan.devices import POOLED, Device
from dsplan.errors import PlanInput, ProfileMismatch
from dsplan.kernels import TILE, Parameters
from dsplan.shapes import ModelShape

#: latency of a message between two devices, in seconds (aiconfigurator's p2p_latency)
SEND_S = 10e-6
#: passes over the residual stream and the wide activations of a layer, in elements a token: two norms (read and
#: write), two residual sums (two reads, one write), rotary and cache writes of Q and K
RESIDUAL_PASSES = 10
#: element-wise kernels of a layer: two norms with the residual sums, rotary, the write of K and V, the activation.
#: Each takes what any kernel takes to begin and to end, as a GEMM's launch; so do norms of Q and of K
ELEMENTWISE = 5
HEAD_NORMS = 2
#: of a mixture: the choice of experts, the gathering of their rows, the sum of what they give
MIXTURE_ELEMENTWISE = 3
#: arithmetic under steady load, to that of kernels measured one at a time: power holds the clock down. Set on the
#: GEMMs of Llama-2 on A100 in Vidur's tables; those of Llama-3 and on H100 were held out
SUSTAINED = 0.87
#: place of the share of arithmetic in the parameters of a kernel, and of that of memory
_FLOPS_SHARE = {"gemm": 1, "context": 1}
_BYTES_SHARE = {"gemm": 2, "generation": 1}
#: memory bandwidth of a device to that of the machine that its kernels were fitted on. The A100s of the tables of
#: aiconfigurator and of Vidur stream weights with 0.73 and 0.85 of the peak: taken is the (geometric) mean of both
STREAMING = {"a100-80g": 1.08}
#: rows that are told apart, beyond a tile
ROWS = 16
#: tokens of a step beyond which vLLM of 2023 takes longer for each, as Splitwise's authors found
STEADY_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Stack:
    """What serving software adds to the kernels."""

    about: str
    #: scheduling, input preparation, sampling: once a step; and what telling several ranks adds
    step_s: float
    ranks_s: float = 0.0
    #: the host launches the kernels of one layer in no less
    layer_s: float = 0.0
    #: for each sequence of a step
    sequence_s: float = 0.0
    #: for each prompt and each rank that it is handed to
    prompt_rank_s: float = 0.0
    #: for each token of a step beyond :data:`STEADY_TOKENS`, with more than two ranks: seen, and not explained
    excess_s: float = 0.0
    #: end of the names of its GEMMs and all-reduces in ``data/efficiency.json``; "" for those of today
    library: str = ""


STACKS = {
    "graphs": Stack("decode in CUDA graphs; 1.5 ms a step is hand-set", 1.5e-3),
    "nccl-2023": Stack(
        "an engine in C++ of 2023, as DistServe's: its libraries, all-reduce by NCCL; 2 ms a step is hand-set",
        2e-3,
        library="_2023",
    ),
    "eager-2023": Stack(
        "vLLM of 2023 without CUDA graphs, ranks told by Ray: set on Splitwise's A100 rows of Llama-2-70B at TP 2 "
        "and 8; what a step takes on one rank is that of Vidur's tables",
        1e-3,
        ranks_s=5e-3,
        layer_s=0.48e-3,
        sequence_s=0.4e-3,
        prompt_rank_s=2.5e-3,
        excess_s=80e-6,
        library="_2023",
    ),
}


def find_stack(name: str) -> Stack:
    """The stack of that name. Raises :class:`PlanInput`."""
    if name not in STACKS:
        raise PlanInput(f"there is no stack {name}", remedy=f"choose one of {', '.join(STACKS)}")
    return STACKS[name]


@cache
def efficiencies(name: str) -> dict[str, Parameters]:
    """Parameters of a device under steady load, by kernel. Raises :class:`PlanInput` for an unknown name."""
    devices = json.loads(files("dsplan").joinpath("data/efficiency.json").read_text())["devices"]
    if name not in devices:
        raise PlanInput(f"there are no efficiencies named {name}", remedy=f"choose one of {', '.join(devices)}")
    fitted = {kernel: list(values) for kernel, values in devices[name].items()}
    for kernel, place in _FLOPS_SHARE.items():
        fitted[kernel][place] *= SUSTAINED
    for kernel, place in _BYTES_SHARE.items():
        fitted[kernel][place] *= STREAMING.get(name, 1.0)
    return {kernel: tuple(values) for kernel, values in fitted.items()}


@dataclass(frozen=True, slots=True)
class RooflineInstance:
    """One instance. ``spread``: whether its stages are on different nodes; ``across``: whether its ranks are."""

    shape: ModelShape
    device: Device
    stack: Stack
    tp: int
    stages: int
    spread: bool = False
    across: bool = False
    #: times of a layer without attention, by rows: they do not depend on anything else
    _dense: dict[int, float] = field(default_factory=dict, compare=False, repr=False)
    #: times of GEMMs by their sizes, shared by the instances of a latency model
    _gemms: dict[tuple[float, ...], float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def _layers(self) -> float:
        return self.shape.layers / self.stages

    def _kernels(self) -> dict[str, Parameters]:
        return efficiencies(self.device.efficiency)

    def _gemm_s(self, m: float, n: float, k: float, groups: float = 1) -> float:
        sizes = m, n, k, groups
        if sizes not in self._gemms:
            fitted = self._kernels()[f"gemm{self.stack.library}"]
            self._gemms[sizes] = float(kernels.gemm_s(fitted, self.device, m, n, k, groups))
        return self._gemms[sizes]

    def layer_dense_s(self, rows: int) -> float:
        """One layer over ``rows`` tokens, all but attention; many rows are rounded up to :data:`ROWS`."""
        rows = rows if rows <= TILE else -(-rows // ROWS) * ROWS
        if rows not in self._dense:
            self._dense[rows] = self._layer_dense_s(rows)
        return self._dense[rows]

    def _layer_dense_s(self, rows: int) -> float:
        s, tp = self.shape, self.tp
        heads, kv = s.heads * s.head_dim / tp, max(s.kv_heads / tp, 1) * s.head_dim
        total = self._gemm_s(rows, heads + 2 * kv, s.hidden)
        total += self._gemm_s(rows, s.hidden, heads)
        total += self._moved_s(rows * (RESIDUAL_PASSES * s.hidden + 2 * (heads + kv)))
        total += self._launches_s(ELEMENTWISE + HEAD_NORMS * s.head_norms)
        if s.sparse < 1:
            total += (1 - s.sparse) * self._mlp_s(rows, s.intermediate)
        if s.sparse:
            total += s.sparse * self._mixture_s(rows)
        return float(total + 2 * self.allreduce_s(rows * s.hidden * s.item_nbytes))

    def _mlp_s(self, rows: float, width: int, groups: float = 1) -> float:
        """Two GEMMs and what is between them."""
        hidden = self.shape.hidden
        inner = width / self.tp
        wide = (2 if self.shape.gated else 1) * inner
        total = self._gemm_s(rows, wide, hidden, groups)
        total += self._gemm_s(rows, hidden, inner, groups)
        return total + self._moved_s(rows * (wide + inner))

    def _mixture_s(self, rows: int) -> float:
        """Router, experts and shared experts of a layer; the rows are gathered, and added up again."""
        s = self.shape
        total = self._gemm_s(rows, s.experts, s.hidden)
        total += self._mlp_s(rows * s.active, s.expert_width, s.hit_experts(rows))
        total += self._moved_s(3 * rows * s.active * s.hidden) + self._launches_s(MIXTURE_ELEMENTWISE)
        return total + (self._mlp_s(rows, s.shared_width) if s.shared_width else 0.0)

    def _moved_s(self, elements: float) -> float:
        """Element-wise kernels that read or write as many."""
        share = self._kernels()[f"gemm{self.stack.library}"][2]
        return elements * self.shape.item_nbytes / (self.device.bytes_per_s * share)

    def _launches_s(self, count: int) -> float:
        """As many kernels that have next to nothing to do."""
        return count * self._kernels()[f"gemm{self.stack.library}"][0] / self.device.clock_hz

    def allreduce_s(self, nbytes: float) -> float:
        """Sum over the TP ranks: by NCCL or, below a size and where that is quicker, over peer memory of NVLink."""
        if self.tp == 1:
            return 0.0
        device = self.device
        if self.across:
            # a ring is as fast as its slowest link, and no switch or peer reaches into another node
            device = replace(device, node_bytes_per_s=device.network_bytes_per_s, switch_adds=False)
        elif self.tp > device.nvlinked:
            return float(kernels.bus_allreduce_s(device, self.tp, nbytes))
        fitted, size = self._kernels(), (device, self.tp, nbytes)
        if self.stack.library:
            return float(kernels.nccl_s(fitted[f"allreduce{self.stack.library}"], *size))
        large = float(kernels.switched_allreduce_s(fitted["allreduce_large"], *size))
        if nbytes >= kernels.LARGE_ALLREDUCE or self.across:
            return large
        return min(large, float(kernels.allreduce_s(fitted["allreduce_small"], *size)))

    def _send_s(self, rows: float) -> float:
        near = self.device.link_bytes_per_s(self.tp * self.stages)
        link = self.device.network_bytes_per_s if self.spread else near
        return SEND_S + rows * self.shape.hidden * self.shape.item_nbytes / link

    def _output_s(self, rows: int) -> float:
        columns = self.shape.vocab / self.tp
        return self._gemm_s(rows, columns, self.shape.hidden)

    def _software_s(self, kernels_s: float, count: int, prompts: int = 0, rows: int = 0) -> float:
        """``count`` sequences of one stage's batch, of which ``prompts`` with ``rows`` tokens are read."""
        stack, slow = self.stack, self.device.host_factor
        host_s = stack.step_s + stack.sequence_s * count + stack.prompt_rank_s * self.tp * prompts
        host_s += stack.ranks_s if self.tp > 1 else 0.0
        host_s += stack.excess_s * max(rows - STEADY_TOKENS, 0) if self.tp > 2 else 0.0
        return max(kernels_s, slow * self._layers * stack.layer_s) + slow * host_s / self.stages

    def _reading_s(self, tokens: float, squares: float) -> float:
        """Attention of a layer over prompts, or over chunks with end^2 - start^2 for their squares."""
        s, each = self.shape, squares / tokens
        kv = max(s.kv_heads / self.tp, 1)
        fitted = self._kernels()["context"]

        def layer_s(length: float) -> float:
            size = (tokens / length, length, s.heads / self.tp, kv, s.head_dim)
            return float(kernels.context_s(fitted, self.device, *size))

        if each <= s.window or not s.windowed:
            return layer_s(each)
        # a prompt whose tokens look back as far, on average, as those of this one through the window
        near = 2 * s.window - s.window**2 / each
        return (1 - s.windowed) * layer_s(each) + s.windowed * layer_s(near)

    def _making_s(self, batch: float, context: float) -> float:
        """Attention of a layer over one token for each sequence."""
        s, fitted = self.shape, self._kernels()["generation"]
        kv = max(s.kv_heads / self.tp, 1)
        each = context / batch

        def layer_s(length: float) -> float:
            size = (batch, length, s.heads / self.tp, kv, s.head_dim)
            return float(kernels.generation_s(fitted, self.device, *size))

        if each <= s.window or not s.windowed:
            return layer_s(each)
        return (1 - s.windowed) * layer_s(each) + s.windowed * layer_s(s.window)

    def prefill_stage_s(self, tokens: int, squares: int, count: int) -> float:
        """Kernels of the last stage (the output matrix is its), which is the slowest."""
        return self.mixed_stage_s(tokens, squares, count, 0, 0)

    def mixed_stage_s(self, tokens: float, squares: float, count: int, batch: int, context: float) -> float:
        """All rows go through the matrices together."""
        rows = math.ceil(tokens) + batch
        layer = self.layer_dense_s(rows)
        layer += self._reading_s(tokens, squares) if tokens else 0.0
        layer += self._making_s(batch, context) if batch else 0.0
        send = self._send_s(rows) if self.stages > 1 else 0.0
        total = self._layers * layer + self._output_s(count + batch)
        return self._software_s(total, count + batch, count, rows) + send

    def decode_step_s(self, batch: int, tokens: int) -> float:
        """``stages`` micro-batches go round; a token for each sequence takes all of them."""
        micro = -(-batch // self.stages)
        layer = self.layer_dense_s(micro) + self._making_s(micro, tokens / batch * micro)
        send = self._send_s(micro) if self.stages > 1 else 0.0
        total = self._layers * layer + self._output_s(micro)
        return self.stages * (self._software_s(total, batch) + send)


@dataclass(frozen=True, slots=True)
class RooflineLatency:
    """Any TP and PP of one model on one device."""

    shape: ModelShape
    device: Device
    stack: Stack = STACKS["graphs"]
    #: ranks of an instance that one node holds; stages of larger ones talk over the network
    node_devices: int = 8
    _gemms: dict[tuple[float, ...], float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def source(self) -> str:
        """For people."""
        whose = self.device.efficiency
        fitted = "pooled over other GPUs" if whose.startswith(POOLED) else f"fitted on {whose}"
        return f"roofline of {self.shape.name} on {self.device.name}, kernel efficiencies {fitted}"

    def degrees(self) -> tuple[int, ...] | None:
        """Any."""
        return None

    def instance(self, tp: int, pp: int) -> RooflineInstance:
        """Raises :class:`ProfileMismatch` for a TP or PP that cannot cut the model."""
        if self.shape.heads % tp or not 0 < pp <= self.shape.layers:
            raise ProfileMismatch(
                f"{self.shape.name} with {self.shape.heads} heads and {self.shape.layers} layers cannot be cut "
                f"by TP {tp} and PP {pp}",
                remedy="choose a TP that divides the heads and a PP of at most the layers",
            )
        spread, across = tp * pp > self.node_devices, tp > self.node_devices
        return RooflineInstance(self.shape, self.device, self.stack, tp, pp, spread, across, _gemms=self._gemms)
