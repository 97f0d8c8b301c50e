"""Whether KV can go from GPU to GPU of a host by CUDA IPC, as far as a topology tells."""

from __future__ import annotations

from collections.abc import Sequence

from dstopology.resolved import Instance, Relay


def obstacle(instances: Sequence[Instance], relays: Sequence[Relay]) -> tuple[str, str] | None:
    """Why it cannot, and what to do about it; None where it can."""
    for one in instances:
        if not one.devices[0].startswith("cuda"):
            return f"{one.name} is on {one.devices[0]}", "place it on cuda:N"
        if len(one.devices) > 1:
            return f"{one.name} has {len(one.devices)} ranks", "give it one GPU"
        if one.node != instances[0].node:
            return f"{one.name} is on another node than {instances[0].name}", "use one node"
        if one.block_size != instances[0].block_size:
            return f"{one.name} and {instances[0].name} have blocks of different sizes", "make them equal"
    if any(relay.keep_nbytes for relay in relays):
        return "KV that a relay keeps lies in the host's memory", "leave out relay.keep"
    return None
