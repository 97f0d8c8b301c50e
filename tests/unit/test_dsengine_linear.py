"""The packed product against the plain one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dsengine import linear
from dsengine.linear import Linear


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33, 200])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_product(rows: int, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(37, 24, generator=generator).to(dtype)
    offset = torch.randn(37, generator=generator).to(dtype) if bias else None
    x = torch.randn(rows, 24, generator=generator).to(dtype)
    got = Linear(weight, offset)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, functional.linear(x, weight, offset), rtol=tolerance, atol=tolerance * 5)


def test_a_row_of_a_view_with_gaps() -> None:
    weight, x = torch.randn(5, 8), torch.randn(4, 3, 8)[:, 1]
    torch.testing.assert_close(Linear(weight)(x), functional.linear(x, weight))


def test_without_onednn_there_is_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight, x = torch.randn(5, 8), torch.randn(3, 8)
    assert linear._pack(weight) is None
    assert torch.equal(Linear(weight)(x), functional.linear(x, weight))


def test_float16_works_whatever_the_cpu_can() -> None:
    weight, x = torch.randn(5, 8).half(), torch.randn(3, 8).half()
    torch.testing.assert_close(Linear(weight)(x), functional.linear(x, weight), rtol=1e-2, atol=1e-2)
