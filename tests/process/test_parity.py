"""The whole path gives the tokens that ``transformers`` gives, over both transports, whatever runs beside.

``generate`` of transformers makes a token at a time and is slow, so by default it answers every fifth prompt, and
for the others one forward pass over prompt and answer shows that each token of ours is the one it would have
chosen. Over TCP every third prompt is asked. ``DS_FULL_PARITY=1`` lets ``generate`` answer all, over both.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
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
IDLE_LIMIT_S = 60.0
FULL = bool(os.environ.get("DS_FULL_PARITY"))

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

        # two threads that wait for each other take many times as long where others use the cores too
        torch.set_num_threads(1)
        self._torch = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        #: answers that were compared already, for the other transport's sake
        self._known: dict[tuple[int, ...], list[int]] = {}
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def greedy(self, prompt_ids: list[int]) -> list[int]:
        """Up to ``NEW_TOKENS`` new tokens, the end token included."""
        ids = self._torch.tensor([prompt_ids])
        made = self._model.generate(
            ids, attention_mask=self._torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        return [int(token) for token in made[0, len(prompt_ids) :]]

    def chosen(self, prompt_ids: list[int], answer: Sequence[int]) -> list[int]:
        """The likeliest token in the place of each token of ``answer``, all before it being given."""
        whole = (*prompt_ids, *answer)
        if whole not in self._known:
            with self._torch.inference_mode():
                logits = self._model(self._torch.tensor([whole]), logits_to_keep=len(answer) + 1).logits[0]
            self._known[whole] = [int(token) for token in logits[:-1].argmax(-1)]
        return self._known[whole]


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
    asked += [({"prompt": prompt}, encode(prompt)) for prompt in human_eval(12)]
    for question in CHATS:
        messages = [{"role": "user", "content": question}]
        ids = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        asked.append(({"messages": messages}, ids))
    return asked


@pytest.fixture(scope="module")
def expected(reference: Reference, questions: list[tuple[dict[str, Any], list[int]]]) -> list[list[int] | None]:
    step = 1 if FULL else 5
    return [reference.greedy(ids) if at % step == 0 else None for at, (_, ids) in enumerate(questions)]


@pytest.fixture(scope="module")
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


async def _compare(
    system: System,
    reference: Reference,
    questions: list[tuple[dict[str, Any], list[int]]],
    expected: list[list[int] | None],
) -> None:
    answers = await _ask_all(system, questions, temperature=0.0, max_tokens=NEW_TOKENS)
    for (_, ids), answer, generated in zip(questions, answers, expected, strict=True):
        tokens = list(answer.choices[0].token_ids)
        assert answer.usage.prompt_tokens == len(ids)
        wanted = generated or reference.chosen(ids, tokens)
        assert tokens == wanted, f"prompt of {len(ids)} tokens"
    await asyncio.to_thread(system.await_idle, IDLE_LIMIT_S)


@pytest.mark.parametrize("system", ["shm"], indirect=True)
async def test_greedy_equals_transformers(
    system: System,
    reference: Reference,
    questions: list[tuple[dict[str, Any], list[int]]],
    expected: list[list[int] | None],
) -> None:
    assert len(questions) >= 36
    await _compare(system, reference, questions, expected)


@pytest.mark.parametrize("system", ["shm"], indirect=True)
async def test_text_is_the_decoded_tokens(
    system: System, reference: Reference, questions: list[tuple[dict[str, Any], list[int]]]
) -> None:
    answers = await _ask_all(system, questions[-8:], temperature=0.0, max_tokens=NEW_TOKENS)
    for answer in answers:
        choice = answer.choices[0]
        assert choice.text == reference.tokenizer.decode(choice.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("system", ["shm"], indirect=True)
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


@pytest.mark.parametrize("system", ["tcp"], indirect=True)
async def test_greedy_equals_transformers_over_tcp(
    system: System,
    reference: Reference,
    questions: list[tuple[dict[str, Any], list[int]]],
    expected: list[list[int] | None],
) -> None:
    step = 1 if FULL else 3
    await _compare(system, reference, questions[::step], expected[::step])
