"""When a sequence is over."""

from __future__ import annotations

from dswire.messages.client import Sampling


def finish_reason(token: int, made: int, sampling: Sampling, eos_ids: frozenset[int]) -> str:
    """ "stop", "length", or "" while the sequence goes on.

    ``token`` is the latest, ``made`` counts the output tokens with it. The model's end tokens count unless
    ``ignore_eos``; neither they nor ``stop_token_ids`` end anything before ``min_tokens``.
    """
    stops = token in sampling.stop_token_ids or (token in eos_ids and not sampling.ignore_eos)
    if stops and made > sampling.min_tokens:
        return "stop"
    return "length" if made >= sampling.max_tokens else ""
