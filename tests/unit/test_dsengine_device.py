"""What a step asks of a device that is not the host: nothing comes back from it before its logits do.

The device is torch's ``meta``, whose tensors have no bytes: whatever looks at one, or mixes one with the host's,
raises. So a GPU is never waited for within a step, but by mixtures of experts, which look at what each router says;
how it computes is for ``tests/gpu``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsengine import runner
from dsengine.config import EngineConfig
from dsengine.decoder import Decoder
from dsengine.runner import Engine
from dsengine.span import Span
from support.tiny_families import make_family

FAMILIES = (
    *("llama with yarn", "mistral", "smollm3", "qwen3", "gemma2", "gemma3", "phi3 with longrope", "opt", "gpt2"),
    "gpt-neox",
)
PROMPT = Span([1] * 20, 0, (0, 1))
CHUNK = Span([1, 2, 3], 17, (4, 5))
SINGLES = [Span([1], 30, (2, 3)), Span([5], 100, (6, 7, 8, 9, 10, 11, 12))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "device_of", lambda name: torch.device("meta"))
    config = EngineConfig(
        model_dir=make_family(tmp_path, family),
        dtype="bfloat16",
        device="cuda:0",
        block_size=16,
        num_blocks=32,
        segment=None,
        threads=1,
        max_model_len=128,
    )
    engine = Engine(config)
    assert isinstance(engine._model, Decoder)
    for spans, picked in (
        ([PROMPT, SINGLES[0], CHUNK, SINGLES[1]], [19, 20, 23, 24]),
        ([PROMPT], [19]),
        ([CHUNK], []),
        (SINGLES, [0, 1]),
    ):
        logits = engine.forward(spans, picked)
        assert logits is not None
        assert logits.shape == (len(picked), engine.model.vocab_size)
        assert logits.device.type == "meta"
