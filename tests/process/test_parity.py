"""The whole path gives the tokens that ``transformers`` gives: in every mode, over both transports, whatever runs
beside.

``generate`` of transformers makes a token at a time and is slow, so by default it answers every fifth prompt, and
for the others one forward pass over prompt and answer shows that each token of ours is the one it would have
chosen. Where decode instances read prompts every fourth one is asked. ``DS_FULL_PARITY=1`` lets ``generate`` answer
all, everywhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsclient import AsyncClient, Choice, Completion
from dsengine.store import resolve
from support.prompts import CHATS, LENGTHS, human_eval, long_text
from support.system import System, running_system

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(400)]

MODEL = "smollm2-135m-instruct"
NEW_TOKENS = 24
IDLE_LIMIT_S = 60.0
FULL = bool(os.environ.get("DS_FULL_PARITY"))

TOPOLOGIES = {
    "disaggregated": """
model: {path: smollm2-135m-instruct, dtype: float32, max_model_len: 4096}
router: {frontend: "tcp://127.0.0.1:{port}"}
kv: {memory: 1GiB}
""",
    # in small pieces: prompts are read over many steps, beside others that decode
    "colocated": """
model: {path: smollm2-135m-instruct, dtype: float32, max_model_len: 4096}
mode: colocated
router: {frontend: "tcp://127.0.0.1:{port}"}
decode: {max_batch_tokens: 96}
kv: {memory: 1GiB}
""",
    # the KV of what decode does not read itself goes over TCP
    "conditional": """
model: {path: smollm2-135m-instruct, dtype: float32, max_model_len: 4096}
mode: conditional
conditional: {threshold_tokens: 32}
router: {frontend: "tcp://127.0.0.1:{port}"}
prefill: {max_batch_tokens: 256}
relay: {port: {port}}
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
        return await client.chat(messages, **arguments, **sampling)
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


@pytest.mark.parametrize("system", ["disaggregated"], indirect=True)
async def test_greedy_equals_transformers(
    system: System,
    reference: Reference,
    questions: list[tuple[dict[str, Any], list[int]]],
    expected: list[list[int] | None],
) -> None:
    assert len(questions) >= 36
    await _compare(system, reference, questions, expected)


@pytest.mark.parametrize("system", ["disaggregated"], indirect=True)
async def test_text_is_the_decoded_tokens(
    system: System, reference: Reference, questions: list[tuple[dict[str, Any], list[int]]]
) -> None:
    answers = await _ask_all(system, questions[-8:], temperature=0.0, max_tokens=NEW_TOKENS)
    for answer in answers:
        choice = answer.choices[0]
        assert choice.text == reference.tokenizer.decode(choice.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("system", ["disaggregated"], indirect=True)
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


@pytest.mark.parametrize("system", ["colocated", "conditional"], indirect=True)
async def test_greedy_equals_transformers_where_decode_reads_prompts(
    system: System,
    reference: Reference,
    questions: list[tuple[dict[str, Any], list[int]]],
    expected: list[list[int] | None],
) -> None:
    step = 1 if FULL else 4
    await _compare(system, reference, questions[::step], expected[::step])


def _varied(ids: list[int]) -> list[dict[str, Any]]:
    """Prompts that begin alike, every way to draw, and every way to end."""
    greedy = {"temperature": 0.0, "logprobs": 2}
    drawn = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "presence_penalty": 0.4, "logprobs": 2}
    return [
        {"prompt_ids": ids[:600], "max_tokens": 12, **greedy},
        {"prompt_ids": [*ids[:288], *ids[700:730]], "max_tokens": 12, **drawn},
        {"prompt_ids": ids[:64], "max_tokens": 16, "n": 2, **drawn},
        {"prompt_ids": ids[:20], "max_tokens": 1, **greedy},
        {"prompt": "The capital of France is", "max_tokens": 24, "stop": (".",), **greedy},
        {"messages": [{"role": "user", "content": "What is 7 times 6?"}], "max_tokens": 24, **greedy},
    ]


@pytest.fixture(scope="module")
def told() -> list[Completion]:
    """What the first mode that was asked has said, for the others to say the same."""
    return []


@pytest.mark.parametrize("system", TOPOLOGIES, indirect=True)
async def test_every_mode_says_the_same_twice(
    system: System, questions: list[tuple[dict[str, Any], list[int]]], told: list[Completion]
) -> None:
    """Tokens, log-probabilities and ends; the second time by KV that was kept."""
    varied: list[tuple[dict[str, Any], list[int]]] = [
        (one, []) for one in _varied(max((ids for _, ids in questions), key=len))
    ]
    first = await _ask_all(system, varied)
    second = await _ask_all(system, varied)
    assert {choice.finish_reason for one in first for choice in one.choices} == {"stop", "length"}
    told[:] = told or first
    for answers in (first, second):
        for one, wanted in zip(answers, told, strict=True):
            assert one.usage == wanted.usage
            assert one.ledger.retries == 0
            for mine, theirs in zip(one.choices, wanted.choices, strict=True):
                assert (mine.token_ids, mine.text) == (theirs.token_ids, theirs.text)
                assert mine.finish_reason == theirs.finish_reason
                assert _logprobs(mine) == pytest.approx(_logprobs(theirs), abs=1e-4)
    await asyncio.to_thread(system.await_idle, IDLE_LIMIT_S)
    with system.client() as client:
        cached = sum(one.cached_tokens for one in client.status().workers)
    # at least all but the last blocks of the long prompts
    assert cached > 850


def _logprobs(choice: Choice) -> list[float]:
    return [value for one in choice.logprobs for value in (one.logprob, *(logprob for _, _, logprob in one.top))]
