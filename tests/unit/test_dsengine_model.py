"""Which path serves a model, and what there is to say when memory does not suffice for it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsengine.architecture import Architecture
from dsengine.foreign_shape import ForeignShape
from dsengine.model import load_model, load_shape
from dsengine.runner import Engine
from dsengine.weights import Checkpoint
from dswire.errors import EngineFailed, ModelNotFound, OutOfMemory, UnsupportedModel
from support.tiny_llama import GREEDY, Run, edit_config, engine_config, make_model, prompt_of

CPU = torch.device("cpu")
NO_ROOM = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"


def test_the_log_tells_of_the_lean_decoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = load_shape(make_model(tmp_path))
    assert isinstance(shape, Architecture)
    with caplog.at_level(logging.INFO, "dsengine"):
        load_model(shape, engine_config(tmp_path, kernels=False), CPU)
    assert "LlamaForCausalLM is served by the lean decoder" in caplog.text


def test_a_feature_that_only_transformers_has(tmp_path: Path) -> None:
    edit_config(make_model(tmp_path), hidden_act="relu2")
    assert isinstance(load_shape(tmp_path), ForeignShape)


def test_what_neither_path_has_is_told_in_the_words_of_the_lean_one(tmp_path: Path) -> None:
    edit_config(make_model(tmp_path), quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModel, match=r"not supported: quantised weights \(quantization_config\)"):
        load_shape(tmp_path)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        load_shape(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(NO_ROOM),
        RuntimeError("unable to mmap 9 bytes from file </m>: Cannot allocate memory (12)"),
        MemoryError("Cannot allocate memory (os error 12)"),
    ],
)
def test_no_room_for_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    shape = load_shape(make_model(tmp_path))

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Checkpoint, "take", fail)
    size = (tmp_path / "model.safetensors").stat().st_size
    with pytest.raises(
        OutOfMemory, match=f"no room on cpu for the weights of .*, {size} bytes of files, as float32"
    ):
        load_model(shape, engine_config(tmp_path), CPU)


def test_another_error_of_torch_is_not_taken_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = load_shape(make_model(tmp_path))

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Checkpoint, "take", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        load_model(shape, engine_config(tmp_path), CPU)


def test_weights_that_are_no_numbers_show_in_the_logits(tmp_path: Path) -> None:
    path = make_model(tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.full((48,), math.nan)}, path)
    with pytest.raises(EngineFailed, match=r"rows \[0\]"):
        Run(Engine(engine_config(tmp_path))).prefill([prompt_of(5)], [GREEDY])
