"""A mixture of experts against its definition, written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsengine.linear import Linear
from dsengine.mlp import GatedMlp, MixtureOfExperts, SharedExpert

HIDDEN, SIZE, COUNT = 12, 8, 5


def matrix(rows: int, columns: int, seed: int) -> Linear:
    return Linear(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def expert(seed: int) -> GatedMlp:
    return GatedMlp(matrix(2 * SIZE, HIDDEN, seed), matrix(HIDDEN, SIZE, seed + 100), "silu")


def some_tokens(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))


def written_out(x: Tensor, per_token: int, renormalise: bool) -> Tensor:
    """One token ``[hidden]``."""
    likes = matrix(COUNT, HIDDEN, 50)(x[None])[0].softmax(0)
    best = sorted(range(COUNT), key=lambda number: -float(likes[number]))[:per_token]
    total = sum(float(likes[number]) for number in best) if renormalise else 1.0
    parts = [float(likes[number]) / total * expert(number)(x[None])[0] for number in best]
    return torch.stack(parts).sum(0)


def mixture(per_token: int, renormalise: bool, shared: SharedExpert | None = None) -> MixtureOfExperts:
    experts = [expert(number) for number in range(COUNT)]
    return MixtureOfExperts(matrix(COUNT, HIDDEN, 50), experts, per_token, renormalise, shared)


@pytest.mark.parametrize("per_token", [1, 2, COUNT])
@pytest.mark.parametrize("renormalise", [False, True])
def test_each_token_meets_its_best_experts(per_token: int, renormalise: bool) -> None:
    x = some_tokens(9)
    want = torch.stack([written_out(row, per_token, renormalise) for row in x])
    torch.testing.assert_close(mixture(per_token, renormalise)(x), want)


def test_the_shared_expert_is_weighted_by_its_own_gate() -> None:
    x = some_tokens(4)
    shared = SharedExpert(matrix(1, HIDDEN, 60), expert(61))
    added = mixture(2, True, shared)(x) - mixture(2, True)(x)
    torch.testing.assert_close(added, matrix(1, HIDDEN, 60)(x).sigmoid() * expert(61)(x))


def test_a_token_does_not_depend_on_its_batch() -> None:
    x, moe = some_tokens(9), mixture(2, True)
    together = moe(x)
    for row in range(9):
        assert torch.equal(moe(x[row : row + 1])[0], together[row])
