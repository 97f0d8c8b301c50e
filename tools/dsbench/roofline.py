"""The least time that a step can take on a machine (the roofline model, doi 10.1145/1498765.1498785).

With ``W`` elements in the weight matrices that a token meets, of ``i`` bytes each, ``L`` layers, ``H`` heads and
``K`` KV heads of ``D`` dimensions, cached in ``c`` bytes each::

    decode   bytes = i W + c B C L 2 K D      flops = 2 B W + 4 B C L H D           B sequences of C tokens
    prefill  bytes = i W + c T L 2 K D        flops = 2 T (W - V h) + 2 V h + 2 T² L H D   T tokens
    seconds = max(bytes / bandwidth, flops / peak)

Of a mixture of experts, a step reads those that its tokens go to, as many as there are on average where all are
equally liked, and a token multiplies with its own. A prefill makes one row of logits. Embeddings looked up, norms
and softmax count as nothing. Bandwidth and peak are what this machine does in the same rounds, at the same number
of threads: :mod:`dsbench.systems.machine`.

That limit takes memory and arithmetic of a whole step to be at work side by side. But each kernel of a step needs
what the one before it made, and where products are bound by arithmetic and attention by memory the two wait for
each other. So there is a second figure, of the same bytes and operations: a roofline for each kind of kernel, one
after the other::

    seconds = max(layers' products) + max(attention) + max(output head)

It is no bound: who asks for a layer's cache while products run can stay below it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsbench.machine import Machine
from dsbench.points import Point
from dsengine.architecture import Architecture
from dskv.layout import ITEM_NBYTES
from dstopology.modelfacts import INT8_ITEM_NBYTES


@dataclass(frozen=True, slots=True)
class Work:
    """What one step cannot do without."""

    nbytes: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        """The roofline."""
        return max(self.nbytes / machine.bytes_per_s, self.flops / machine.flops_per_s)

    def __add__(self, other: Work) -> Work:
        return Work(self.nbytes + other.nbytes, self.flops + other.flops)


def matrix_elements(arch: Architecture, tokens: int) -> tuple[float, float]:
    """Elements of all layers' matrices: those that ``tokens`` tokens have read, and those that each multiplies."""
    attention = arch.hidden_size * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    dense = (3 if arch.mlp.gated else 2) * arch.hidden_size * arch.mlp.size
    sparse = sum(plan.sparse for plan in arch.plan)
    same = arch.layers * attention + (arch.layers - sparse) * dense
    if arch.experts is None:
        return same, same
    experts = arch.experts
    every = arch.hidden_size * (experts.count + 3 * experts.shared_size + bool(experts.shared_size))
    each = 3 * arch.hidden_size * experts.size
    met = experts.count * (1 - (1 - experts.per_token / experts.count) ** tokens)
    return same + sparse * (every + met * each), same + sparse * (every + experts.per_token * each)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The work of one step by kinds of kernels, which need each other's results."""

    #: products of the layers
    layers: Work
    attention: Work
    #: product of the output head
    head: Work

    @property
    def whole(self) -> Work:
        """Of the step."""
        return self.layers + self.attention + self.head

    def seconds_in_turn(self, machine: Machine) -> float:
        """The sum of their rooflines."""
        return sum(one.seconds(machine) for one in (self.layers, self.attention, self.head))


def kernels(arch: Architecture, point: Point) -> Kernels:
    """Bytes and operations of one step at ``point``."""
    rows = point.batch if point.phase == "decode" else point.context
    read, used = matrix_elements(arch, rows)
    head = arch.vocab_size * arch.embedding_size
    item = INT8_ITEM_NBYTES if point.dtype == "int8" else ITEM_NBYTES[point.dtype]
    kept = ITEM_NBYTES["bfloat16" if point.dtype == "int8" else point.dtype]
    cached = arch.layers * 2 * arch.kv_heads * arch.head_dim
    scores = arch.layers * arch.heads * arch.head_dim
    keys = point.batch * point.context
    pairs = 4 * keys if point.phase == "decode" else 2 * point.context**2
    return Kernels(
        layers=Work(item * read, 2 * rows * used),
        attention=Work(kept * keys * cached, pairs * scores),
        head=Work(item * head, 2 * point.batch * head),
    )
