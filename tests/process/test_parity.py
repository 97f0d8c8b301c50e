"""The whole path gives the tokens that ``transformers`` gives, over both transports, whatever runs beside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsclient import AsyncClient, Completion
from dsengine.store import resolve
from support.prompts import CHATS, LENGTHS, human_eval, long_text
from support.system import System, running_system

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(400)]

MODEL = "smollm2-135m-instruct"
NEW_TOKENS = 24

TOPOLOGIES = {
    "shm": """
model: {path: smollm2-135m-instruct, dtype: float32, max_model_len: 4096}
router: {frontend: "tcp://127.0.0.1:{port}"}
kv: {memory: 1GiB}
""",
    "tcp": """
model: {path: smollm2-135m-instruct, dtype: float32, max_model_len: 4096}
router: {frontend: "tcp://127.0.0.1:{port}"}
relay: {staging: 64MiB, port: {port}}
force_transport: tcp
kv: {memory: 1GiB}
""",
}


class Reference:
    """What ``transformers`` says, one prompt at a time."""

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def greedy(self, prompt_ids: list[int]) -> list[int]:
        """Up to ``NEW_TOKENS`` new tokens, the end token included."""
        ids = self._torch.tensor([prompt_ids])
        made = self._model.generate(
            ids, attention_mask=self._torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        return [int(token) for token in made[0, len(prompt_ids) :]]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(resolve(MODEL))


@pytest.fixture(scope="module")
def questions(reference: Reference) -> list[tuple[dict[str, Any], list[int]]]:
    """(arguments of ``generate`` or ``chat``, prompt tokens by transformers' tokenizer)."""
    encode = reference.tokenizer.encode
    whole = encode(long_text())
    asked: list[tuple[dict[str, Any], list[int]]] = []
    for at, length in enumerate(LENGTHS):
        ids = whole[at : at + length]
        asked.append(({"prompt_ids": ids}, ids))
    asked += [({"prompt": prompt}, encode(prompt)) for prompt in human_eval(24)]
    for question in CHATS:
        messages = [{"role": "user", "content": question}]
        ids = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        asked.append(({"messages": messages}, ids))
    return asked


@pytest.fixture(scope="module")
def expected(reference: Reference, questions: list[tuple[dict[str, Any], list[int]]]) -> list[list[int]]:
    return [reference.greedy(ids) for _, ids in questions]


@pytest.fixture(scope="module", params=sorted(TOPOLOGIES))
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    with running_system(TOPOLOGIES[request.param]) as running:
        yield running


async def _ask(client: AsyncClient, arguments: dict[str, Any], **sampling: Any) -> Completion:
    arguments = dict(arguments)
    messages = arguments.pop("messages", None)
    if messages is not None:
        return await client.chat(messages, **sampling)
    return await client.generate(**arguments, **sampling)


async def _ask_all(
    system: System, asked: list[tuple[dict[str, Any], list[int]]], **sampling: Any
) -> list[Completion]:
    async with AsyncClient(system.address) as client:
        return await asyncio.gather(*(_ask(client, arguments, **sampling) for arguments, _ in asked))


async def test_greedy_equals_transformers(
    system: System, questions: list[tuple[dict[str, Any], list[int]]], expected: list[list[int]]
) -> None:
    assert len(questions) >= 36
    answers = await _ask_all(system, questions, temperature=0.0, max_tokens=NEW_TOKENS)
    for (_, ids), answer, tokens in zip(questions, answers, expected, strict=True):
        assert answer.usage.prompt_tokens == len(ids)
        assert list(answer.choices[0].token_ids) == tokens, f"prompt of {len(ids)} tokens"
    system.await_idle(5.0)


async def test_text_is_the_decoded_tokens(
    system: System, reference: Reference, questions: list[tuple[dict[str, Any], list[int]]]
) -> None:
    answers = await _ask_all(system, questions[-8:], temperature=0.0, max_tokens=NEW_TOKENS)
    for answer in answers:
        choice = answer.choices[0]
        assert choice.text == reference.tokenizer.decode(choice.token_ids, skip_special_tokens=True)


async def test_seeded_sampling_does_not_depend_on_the_batch(
    system: System, questions: list[tuple[dict[str, Any], list[int]]]
) -> None:
    sampling = {
        "temperature": 0.9,
        "top_p": 0.95,
        "seed": 11,
        "max_tokens": 16,
        "logprobs": 2,
        "presence_penalty": 0.4,
    }
    some = questions[:12]
    async with AsyncClient(system.address) as client:
        alone = [await _ask(client, arguments, **sampling) for arguments, _ in some]
    together = await _ask_all(system, some, **sampling)
    for one, other in zip(alone, together, strict=True):
        assert one.choices[0].token_ids == other.choices[0].token_ids
        assert one.choices[0].text == other.choices[0].text
    assert len({answer.choices[0].token_ids for answer in alone}) > 1
