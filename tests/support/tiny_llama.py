"""Small random Llama models, made by transformers, and an engine driven without any service around it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from dsengine.config import EngineConfig
from dsengine.runner import Engine, StepItem
from dsengine.sampler import Sampled, SamplerState
from dswire.messages.client import Sampling
from support.tokenizers_here import byte_level, save

disable_progress_bar()

VOCAB = 211
GREEDY = Sampling(temperature=0, ignore_eos=True)


def make_model(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a model of two layers with weights large enough that logits differ well; returns ``path``."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default, which would hide a bias that is not added
                parameter.normal_(std=0.3)
    model.save_pretrained(path)
    return path


def edit_config(model_dir: Path, **changes: Any) -> None:
    """Change keys of ``config.json``; None removes one."""
    path = model_dir / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def engine_config(model_dir: Path, **changes: Any) -> EngineConfig:
    """An engine in float32 on one CPU thread."""
    settings: dict[str, Any] = {
        "model_dir": model_dir,
        "dtype": "float32",
        "device": "cpu",
        "block_size": 16,
        "num_blocks": 64,
        "segment": None,
        "threads": 1,
        "max_model_len": 256,
    }
    return EngineConfig(**settings | changes)


class Run:
    """Sequences on an engine: hands out blocks, keeps tokens. Blocks are never contiguous on purpose."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        count = engine.pool.num_blocks
        self._free = [*range(1, count, 2), *range(0, count, 2)]
        self.prompts: list[list[int]] = []
        self.outputs: list[list[Sampled]] = []
        self.blocks: list[list[int]] = []
        self.samplers: list[SamplerState] = []

    def prefill(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling], outputs: Sequence[Sequence[int]] = ()
    ) -> None:
        """Add sequences in one batch, resumed behind ``outputs`` where given."""
        first = len(self.prompts)
        items = []
        made = outputs or [()] * len(prompts)
        for prompt, params, done in zip(prompts, sampling, made, strict=True):
            tokens = [*prompt, *done]
            blocks = [self._free.pop() for _ in range(self.engine.pool.layout.blocks_for(len(tokens)))]
            sampler = self.engine.sampler(params, prompt, done)
            items.append(StepItem(tokens, 0, blocks, sampler))
            self.prompts.append(tokens)
            self.blocks.append(blocks)
            self.samplers.append(sampler)
            self.outputs.append([])
        self.take(range(first, len(self.prompts)), self.engine.step(items))

    def decode(self, rows: Sequence[int]) -> None:
        """One step of the sequences ``rows``."""
        self.take(rows, self.engine.step(self.items(rows)))

    def items(self, rows: Sequence[int]) -> list[StepItem]:
        """One token more for each of the sequences ``rows``."""
        items = []
        for row in rows:
            position = len(self.prompts[row]) + len(self.outputs[row]) - 1
            if position // self.engine.pool.layout.block_size == len(self.blocks[row]):
                self.blocks[row].append(self._free.pop())
            token = self.outputs[row][-1].token
            items.append(StepItem([token], position, self.blocks[row], self.samplers[row]))
        return items

    def take(self, rows: Sequence[int], drawn: Sequence[Sampled | None]) -> None:
        """What a step drew for the sequences ``rows``."""
        for row, sampled in zip(rows, drawn, strict=True):
            assert sampled is not None
            self.outputs[row].append(sampled)

    def release(self, row: int) -> None:
        """Give the blocks of sequence ``row`` back."""
        self._free.extend(self.blocks[row])
        self.blocks[row] = []

    def tokens(self, row: int) -> list[int]:
        """What sequence ``row`` has drawn."""
        return [sampled.token for sampled in self.outputs[row]]


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
) -> list[list[int]]:
    """``count`` tokens for each prompt, all prompts in one batch."""
    run = Run(engine)
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    run.prefill(prompts, each)
    for _ in range(count - 1):
        run.decode(range(len(prompts)))
    return [run.tokens(row) for row in range(len(prompts))]


class Reference:
    """The same model in transformers, float32, eager attention."""

    def __init__(self, model_dir: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval()
        self.model.generation_config.eos_token_id = None

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """``[tokens, vocab_size]``."""
        with torch.no_grad():
            out: torch.Tensor = self.model(torch.tensor([list(tokens)])).logits[0]
        return out

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy continuation of exactly ``count`` tokens."""
        with torch.no_grad():
            ids = torch.tensor([list(prompt)])
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return [int(token) for token in out[0, len(prompt) :]]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """``length`` random tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return [int(token) for token in torch.randint(3, VOCAB, (length,), generator=generator)]


def odd_model(path: Path, layers: int = 3) -> Path:
    """A tokenizer, and a model with a vocabulary and layers that two ranks cannot halve."""
    made = save(path, byte_level())
    return make_model(made, vocab_size=301, num_hidden_layers=layers, max_position_embeddings=256)


def engine_alone(model_dir: Path, prompts: Sequence[Sequence[int]], count: int, **changes: Any) -> list[list[int]]:
    """What a system of that model is to answer."""
    engine = Engine(engine_config(model_dir, **changes))
    made = generate(engine, prompts, count)
    engine.close()
    return made
