"""Which instances hand KV over to which, and what keeps those from it that have stages on several nodes.

Such an instance hands the KV of a layer over within the node that has it, so the other side must have the same
layers there. All instances of one node can hand over to each other and, by their relays, to those of other nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dskv.shards import stage_layers
from dstopology.modelfacts import ModelFacts
from dstopology.problems import Key, Problems
from dstopology.resolved import Instance
from dstopology.schema import File

_OTHER = {"prefill": "decode", "decode": "prefill"}


def pairs(instances: Sequence[Instance]) -> Iterator[tuple[Instance, Instance]]:
    """Each prefill instance with each decode instance that its KV can go to."""
    for owner in instances:
        for reader in instances:
            if (owner.role, reader.role) == ("prefill", "decode") and owner.hands_over_to(reader):
                yield owner, reader


def check_partners(instances: Sequence[Instance], problems: Problems) -> None:
    """Tell of an instance whose KV nobody could be handed, or that could be handed nobody's."""
    paired = {one.name for pair in pairs(instances) for one in pair}
    lonely = [one for one in instances if one.name not in paired]
    for one in [one for one in lonely if one.hosts] or lonely:
        stages = " and ".join(f"{run.end - run.first} on {run.node}" for run in one.runs)
        where = f"has of {one.pp} stages {stages}" if one.hosts else f"is on {one.node} alone"
        other = _OTHER[one.role]
        reason = (
            f"{one.name} {where}, and no {other} instance is like that: "
            "the KV of stages on several nodes is handed over stage by stage, each within its node"
        )
        remedy = f"have the stages of a {other} instance on the same nodes, in the same order and parts"
        problems.add((one.role, "place"), reason, remedy)


def check_settings(file: File, spread: Instance, problems: Problems) -> None:
    """Tell of settings by which KV would have to leave the nodes of ``spread``'s stages."""
    remedy = "leave the key out, or place each instance on one node"
    if file.force_transport not in (None, "shm") or "shm" not in file.relay.transports:
        at: Key = ("force_transport",) if "shm" in file.relay.transports else ("relay", "transports")
        problems.add(at, f"stages of {spread.name} on several nodes hand their KV over by shm", remedy)
    if file.relay.keep is not None:
        reason = f"the KV of {spread.name} lies on several nodes, and no relay sees the whole of it"
        problems.add(("relay", "keep"), reason, remedy)


def check_layers(facts: ModelFacts, instances: Sequence[Instance], problems: Problems) -> None:
    """Tell of stages that make the same part of the model on a node and still not the same layers."""
    for owner, reader in pairs(instances):
        if not owner.hosts or max(owner.pp, reader.pp) > facts.layers:
            continue
        for run, here, there in zip(owner.runs, _ends(owner, facts), _ends(reader, facts), strict=True):
            if here == there:
                continue
            reason = (
                f"of {facts.layers} layers {owner.name} has those up to {here} on {run.node}, and {reader.name} "
                f"those up to {there}: the KV of a layer is handed over within its node"
            )
            problems.add((reader.role, "pp"), reason, f"choose the pp of {owner.name}, which is {owner.pp}")
            break


def _ends(instance: Instance, facts: ModelFacts) -> list[int]:
    """Behind the last layer of each run of stages."""
    stages = stage_layers(facts.layers, instance.pp)
    return [stages[one.end - 1][1] for one in instance.runs]
