"""EngineConfig refuses values that no engine can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dswire.errors import EngineFailed
from support.tiny_llama import engine_config


def test_a_good_configuration_is_kept() -> None:
    config = engine_config(Path("model"), dtype="bfloat16", device="cuda:1")
    assert (config.dtype, config.device) == ("bfloat16", "cuda:1")


@pytest.mark.parametrize(
    ("device", "mirror", "mirrored"), [("cpu", False, False), ("cpu", True, True), ("cuda:0", False, True)]
)
def test_a_pool_that_cannot_be_mapped_has_a_mirror(device: str, mirror: bool, mirrored: bool) -> None:
    assert engine_config(Path("model"), device=device, mirror=mirror).mirrored == mirrored


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"device": "tpu"}, "tpu"),
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": -1}, "num_blocks"),
        ({"threads": 0}, "threads"),
        ({"max_model_len": 0}, "max_model_len"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineFailed, match=words):
        engine_config(Path("model"), **changes)
