"""The tokens of a workload's prompts: alike where the workload says so, and nowhere else.

Prompts that begin with the same hashes begin with the same tokens, and their KV can be shared (``dssched.prefix``).
What a system answered is no part of the prompts that follow in a trace, so KV made by decode is never found again.
"""

from __future__ import annotations

from itertools import chain

from dssim.workload import HASHED_TOKENS, Arrival

#: tokens from here on are of one request only
_OWN = 2**52
#: all tokens are below
VOCABULARY = 2**53


def own(number: int) -> int:
    """The token of what no other request's prompt has."""
    return _OWN + number


def hashed(one: int) -> int:
    """The token of what a hash stands for; 0 is as good as any other, but answers are made of 1."""
    return 2 + one % (_OWN - 2)


def prompt(number: int, arrival: Arrival) -> tuple[int, ...]:
    """Tokens of a workload's request with that number."""
    length = arrival.prompt_tokens
    if not arrival.hashes:
        return (own(number),) * length
    parts = [(hashed(one),) * HASHED_TOKENS for one in arrival.hashes]
    known = tuple(chain.from_iterable(parts))[:length]
    return known + (own(number),) * (length - len(known))
