"""Is a request something that can be served? Every refusal names the parameter, its value and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from dswire.errors import InvalidRequest, PromptTooLong
from dswire.messages.client import Sampling, Submit

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
#: choices of one request
MAX_CHOICES = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
#: roles that a chat may have; a chat template may know fewer
ROLES = ("system", "user", "assistant", "tool")

#: (field, lowest, highest) of the numeric parameters
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_k", 0, math.inf),
    ("top_p", 1e-6, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("min_tokens", 0, math.inf),
    ("max_tokens", 1, math.inf),
    ("n", 1, MAX_CHOICES),
    ("logprobs", 0, MAX_LOGPROBS),
    ("seed", -(2**63), 2**64 - 1),
)


def check_submit(submit: Submit) -> None:
    """Everything that needs no tokens. Raises :class:`InvalidRequest`."""
    if not REQUEST_ID.fullmatch(submit.request_id):
        raise InvalidRequest(
            f"request_id {submit.request_id[:140]!r}: 1 to 128 characters of [A-Za-z0-9_.:-] are allowed"
        )
    given = [name for name in ("prompt", "chat", "prompt_ids") if getattr(submit, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(f"exactly one of prompt, chat and prompt_ids is needed, given: {given or 'none'}")
    if len(getattr(submit, given[0])) == 0:
        raise InvalidRequest(f"{given[0]} is empty", remedy="give at least one token of prompt")
    for number, turn in enumerate(submit.chat or ()):
        if turn.role not in ROLES:
            raise InvalidRequest(f"chat[{number}].role {turn.role[:40]!r}: must be one of {', '.join(ROLES)}")
    deadline_s = submit.deadline_s
    if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s > 0):
        raise InvalidRequest(f"deadline_s {deadline_s}: must be a positive number of seconds")
    check_sampling(submit.sampling)


def check_sampling(sampling: Sampling) -> None:
    """Ranges of all sampling parameters. Raises :class:`InvalidRequest`."""
    for name, low, high in _RANGES:
        value = getattr(sampling, name)
        # written so that NaN is refused too
        if value is not None and not low <= value <= high:
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise InvalidRequest(f"{name} {value}: must be at least {low:g}{upper}")
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(f"min_tokens {sampling.min_tokens} is above max_tokens {sampling.max_tokens}")
    if len(sampling.stop) > MAX_STOPS or len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequest(f"at most {MAX_STOPS} stop strings and {MAX_STOP_TOKENS} stop tokens are allowed")
    for stop in sampling.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"a stop string of {len(stop)} characters: 1 to {MAX_STOP_CHARS} are allowed")


def check_tokens(prompt_ids: Sequence[int], sampling: Sampling, *, vocab_size: int, room: int) -> None:
    """What needs tokens. ``room``: tokens that prompt and output may have together.

    Raises :class:`InvalidRequest` or :class:`PromptTooLong`.
    """
    if not prompt_ids:
        raise InvalidRequest("the prompt has no tokens", remedy="give at least one token of prompt")
    for name, tokens in (("prompt_ids", prompt_ids), ("stop_token_ids", sampling.stop_token_ids)):
        wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise InvalidRequest(f"{name} has token {wrong}, the model's tokens are 0 to {vocab_size - 1}")
    if len(prompt_ids) >= room:
        raise PromptTooLong(f"the prompt has {len(prompt_ids)} tokens, prompt and output may have {room} together")
