"""Half precision and int8 weights through a whole system: the KV that is handed over is in that dtype too."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsclient import Client
from dsengine.runner import Engine
from support.system import running_system
from support.tiny_llama import engine_config, generate, make_model, prompt_of
from support.tokenizers_here import byte_level, save

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]

TOPOLOGY = """
model: {{path: {model}, dtype: float16, quantization: int8, max_model_len: 256}}
router: {{frontend: "tcp://127.0.0.1:{{port}}"}}
kv: {{memory: 8MiB}}
"""


def test_float16_with_int8_weights_answers_as_the_engine_does(tmp_path: Path) -> None:
    model = make_model(save(tmp_path, byte_level()), vocab_size=300, max_position_embeddings=256)
    prompts = [prompt_of(length) for length in (1, 17, 60)]
    engine = Engine(engine_config(model, dtype="float16", quantization="int8"))
    wanted = generate(engine, prompts, 8)
    engine.close()
    with running_system(TOPOLOGY.format(model=model)) as system:
        assert system.topology.model.weights == "float16, int8 weights"
        with Client(system.address) as client:
            for prompt, tokens in zip(prompts, wanted, strict=True):
                made = client.generate(prompt_ids=prompt, temperature=0.0, max_tokens=8, ignore_eos=True)
                assert list(made.choices[0].token_ids) == tokens
