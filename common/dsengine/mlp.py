"""The feed-forward part of a layer: one network, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dsengine.architecture import Activation
from dsengine.linear import AnyLinear

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Mlp:
    """``down(act(up(x)))``."""

    def __init__(self, up: AnyLinear, down: AnyLinear, activation: Activation) -> None:
        self.up = up
        self.down = down
        self._act = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``."""
        return self.down(self._act(self.up(x)))


class GatedMlp:
    """``down(act(gate(x)) * up(x))``, gate and up in one product."""

    def __init__(self, gate_up: AnyLinear, down: AnyLinear, activation: Activation) -> None:
        self.gate_up = gate_up
        self.down = down
        self._act = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self._act(gate) * up)


class SharedExpert:
    """The expert that every token goes to, weighted by a gate of its own."""

    def __init__(self, gate: AnyLinear, mlp: GatedMlp) -> None:
        self.gate = gate
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``."""
        return torch.sigmoid(self.gate(x)) * self.mlp(x)


class MixtureOfExperts:
    """Each token goes to the ``per_token`` experts that the router likes best (arXiv 2401.04088).

    Experts are added in the order of their numbers, whatever comes with a token in its batch.
    """

    def __init__(
        self,
        router: AnyLinear,
        experts: Sequence[GatedMlp],
        per_token: int,
        renormalise: bool,
        shared: SharedExpert | None,
    ) -> None:
        self.router = router
        self.experts = experts
        self.shared = shared
        self._per_token = per_token
        self._renormalise = renormalise

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``."""
        weights, chosen = self.router(x).float().softmax(-1).topk(self._per_token, -1)
        if self._renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for number in sorted(set(chosen.flatten().tolist())):
            rows, slots = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, rows, self.experts[number](x[rows]) * weights[rows, slots, None])
        return out if self.shared is None else out + self.shared(x)


AnyMlp = Mlp | GatedMlp | MixtureOfExperts
