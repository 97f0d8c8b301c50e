"""A checkpoint gives exactly its tensors, or says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsengine.weights import Checkpoint
from dswire.errors import ModelNotFound, UnsupportedModel

CPU = torch.device("cpu")
A, B = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)


def checkpoint(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Checkpoint:
    save_file(dict(tensors), path / "model.safetensors")
    return Checkpoint(path, dtype, CPU)


def test_take_converts(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, {"a": A}, torch.bfloat16).take("a", (2, 3))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), A)


def test_pieces_are_stacked_in_the_order_given(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"a": A, "b": B, "bias": A[0].clone()})
    one, two, bias = opened.view("b", (2, 3)), opened.view("a", (2, 3)), opened.view("bias", (3,))
    assert torch.equal(opened.stack([one, two[1:], one[:1]]), torch.cat((B, A[1:], B[:1])))
    assert torch.equal(opened.stack([one[:, 1:]]), B[:, 1:])
    assert torch.equal(opened.stack([bias]), A[0])
    opened.finish()


def test_a_tensor_lives_on_after_the_files_are_closed(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"a": A})
    found = opened.take("a", (2, 3))
    opened.finish()
    del opened
    assert torch.equal(found, A)


def test_shards(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = Checkpoint(tmp_path, torch.float32, CPU)
    assert torch.equal(
        torch.cat((opened.take("a", (2, 3)), opened.take("b", (2, 3), slice(1, 2)))), torch.cat((A, B[1:]))
    )
    opened.finish()
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"two\.safetensors"):
        Checkpoint(tmp_path, torch.float32, CPU)


def test_missing_tensor(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="tensor b is missing"):
        checkpoint(tmp_path, {"a": A}).take("b", (2, 3))


def test_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"a has shape \[2, 3\], config.json asks for \[3, 2\]"):
        checkpoint(tmp_path, {"a": A}).take("a", (3, 2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_one_byte_is_no_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModel, match="quantised"):
        checkpoint(tmp_path, {"a": A.to(dtype)}).take("a", (2, 3))


def test_a_checkpoint_of_the_bare_model_has_shorter_names(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"decoder.a.weight": A})
    assert opened.root_of("model.decoder.", "a") == "decoder."
    assert opened.root_of("model.", "b") == "model."  # neither is there: the error names what the family calls it
    assert checkpoint(tmp_path, {"model.a.weight": A}).root_of("model.", "a") == "model."


def test_surplus_tensors_are_refused_unless_skipped(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"a": A, "b": B, "c": A + 1})
    opened.take("a", (2, 3))
    opened.skip("b")
    opened.skip("not there")
    with pytest.raises(UnsupportedModel, match=r"1 tensors have no place .* such as c"):
        opened.finish()


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00garbage")
    with pytest.raises(ModelNotFound, match=name):
        Checkpoint(tmp_path, torch.float32, CPU)


def test_a_cut_file(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"a": A})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelNotFound, match="cannot be read"):
        Checkpoint(tmp_path, torch.float32, CPU)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelNotFound, match=r"no model\.safetensors"):
        Checkpoint(tmp_path, torch.float32, CPU)
