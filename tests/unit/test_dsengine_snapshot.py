"""What a model directory must hold, and what tells two models apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsengine.snapshot import check, identity, weight_files
from dswire.errors import ModelNotFound, UnsupportedModel


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    save_file({"a": torch.arange(4096.0), "b": torch.zeros(8)}, directory / "model.safetensors")
    return directory


def shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors")
    names = {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_whole_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert check(Path("model")) == model


def test_shards_come_in_order(model: Path) -> None:
    shard(model)
    assert [file.name[:11] for file in weight_files(check(model))] == ["model-00001", "model-00002"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(ModelNotFound, match=name):
        check(model)


def test_missing_shard_is_named(model: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="model-00002"):
        check(model)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_damaged_index(model: Path, index: str) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelNotFound, match="damaged"):
        check(model)


def test_index_stays_in_its_directory(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../model.safetensors"}}')
    assert weight_files(model) == [model / "model.safetensors"]


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        check(model)


def test_copies_are_one_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other" / "model")
    assert identity(model) == identity(tmp_path / "other" / "model")
    assert identity(model).name == "model"
    assert len(identity(model).fingerprint) == 64


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_file_is_another_model(model: Path, name: str) -> None:
    before = identity(model)
    (model / name).write_text('{"other": 1}')
    assert identity(model) != before


def test_fine_tune_is_another_model(model: Path) -> None:
    before = identity(model)
    nbytes = (model / "model.safetensors").stat().st_size
    save_file({"a": torch.arange(4096.0) + 1, "b": torch.zeros(8)}, model / "model.safetensors")
    assert (model / "model.safetensors").stat().st_size == nbytes
    assert identity(model) != before


def test_weights_that_were_cut_short(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    for nbytes in (0, 4, 20):
        (model / "model.safetensors").write_bytes(content[:nbytes])
        with pytest.raises(ModelNotFound, match="cut short"):
            identity(model)
