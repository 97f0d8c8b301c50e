"""Why a decode instance does not take a sequence."""

from __future__ import annotations

from dsdecode.sequence import key_of
from dskv.reshard import difference
from dssched.instance import InstanceConfig
from dswire.errors import DsError, InvalidRequest, Overloaded
from dswire.messages.worker import DecodeWork, PrefillWork


def refusal(
    work: DecodeWork | PrefillWork, config: InstanceConfig, waiting: int, *, dropped: bool
) -> DsError | None:
    """The reason, or None; ``waiting``: sequences that wait already, ``dropped``: this one was here, and goes."""
    name, capacity = config.name, config.capacity
    longest = len(work.prompt_ids) + work.sampling.max_tokens
    if dropped:
        return Overloaded(f"{name} still drops {key_of(work)}")
    if waiting >= config.max_queue:
        return Overloaded(f"{waiting} sequences wait at {name} already")
    if capacity.layout.blocks_for(longest) > capacity.blocks:
        room = capacity.blocks * capacity.layout.block_size
        return InvalidRequest(
            f"prompt and max_tokens are {longest} tokens, the KV pool of {name} has room for {room}",
            remedy="lower max_tokens, or raise kv.memory in the topology",
        )
    return difference(work.handle.layout, capacity.layout) if isinstance(work, DecodeWork) else None
