"""Does the model fit: its shape the parallelism, its sequences the KV pools, and everything the host's memory.

What is compared is what a host has in all, not what happens to be free: the answer is the same before the system
runs and while it does.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dskv.shards import copies
from dstopology.endpoints import is_local
from dstopology.modelfacts import ModelFacts
from dstopology.placement import WorkerRole
from dstopology.problems import Problems
from dstopology.resolved import Instance, Node, Relay
from dstopology.schema import GroupSection

#: the default of model.max_model_len where model and pools would allow more
USUAL_MODEL_LEN = 8192

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_shape(facts: ModelFacts, groups: Mapping[WorkerRole, GroupSection], problems: Problems) -> None:
    """Tell of a tp that cannot share the heads out, of a pp larger than the number of layers, and of either where
    the model takes one rank only."""
    for role, group in groups.items():
        if facts.foreign and group.tp * group.pp > 1:
            reason = f"{facts.architecture} runs through transformers' modules, which take one rank only"
            key = "tp" if group.tp > 1 else "pp"
            problems.add((role, key), reason, "leave tp and pp out, or use a model of another family")
            continue
        if facts.heads % group.tp:
            reason = f"the model's {facts.heads} attention heads cannot be divided by tp {group.tp}"
            problems.add((role, "tp"), reason, f"choose a tp that divides {facts.heads}")
        elif facts.kv_heads % group.tp and group.tp % facts.kv_heads:
            reason = f"the model's {facts.kv_heads} KV heads can neither be divided by tp {group.tp} nor be held by"
            remedy = (
                f"choose a tp that divides {facts.heads}, and that divides {facts.kv_heads} or is a multiple of it"
            )
            problems.add((role, "tp"), f"{reason} equally many ranks each", remedy)
        if facts.layers < group.pp:
            reason = f"the model has {facts.layers} layers, too few for {group.pp} stages"
            problems.add((role, "pp"), reason, f"choose a pp of at most {facts.layers}")


def block_nbytes(instance: Instance, facts: ModelFacts, dtype: str) -> int:
    """Bytes of one KV block over all ranks of an instance, some of which may hold the same heads."""
    return facts.kv_layout(instance.block_size, dtype).block_nbytes * copies(facts.kv_heads, instance.tp)


def pool_nbytes(instance: Instance, facts: ModelFacts, dtype: str) -> int:
    """Bytes of the KV pools of an instance."""
    if instance.kv_blocks is None:
        return instance.kv_memory_nbytes
    return instance.kv_blocks * block_nbytes(instance, facts, dtype)


def pool_tokens(instance: Instance, facts: ModelFacts | None, dtype: str) -> int | None:
    """Tokens that the KV pool of an instance holds; None when that depends on a model that is not here."""
    if instance.kv_blocks is not None:
        return instance.kv_blocks * instance.block_size
    if facts is None:
        return None
    return instance.kv_memory_nbytes // block_nbytes(instance, facts, dtype) * instance.block_size


def model_len(
    wanted: int | None,
    facts: ModelFacts | None,
    instances: Sequence[Instance],
    dtype: str,
    problems: Problems,
) -> int:
    """``model.max_model_len``; tells of one that the model or a pool cannot take."""
    limits = [(facts.max_positions, "the model takes")] if facts is not None else []
    for instance in instances:
        tokens = pool_tokens(instance, facts, dtype)
        if tokens == 0:
            reason = f"the KV pool of {instance.name} has no room for even one block"
            problems.add(("kv",), reason, "raise kv.memory, or give kv.blocks instead")
        elif tokens is not None:
            limits.append((tokens, f"the KV pool of {instance.name} holds"))
    least, what = min(limits, default=(USUAL_MODEL_LEN, ""))
    if wanted is None:
        return min(least, USUAL_MODEL_LEN)
    if limits and wanted > least:
        remedy = f"lower it to {least}" + (", or raise kv.memory or kv.blocks" if "pool" in what else "")
        problems.add(("model", "max_model_len"), f"{wanted} tokens are too many: {what} {least}", remedy)
    return wanted


def check_keep(facts: ModelFacts, relay: Relay, block_size: int, dtype: str, problems: Problems) -> None:
    """Tell of room for kept KV that cannot hold one block."""
    block = facts.kv_layout(block_size, dtype).block_nbytes
    if relay.keep_nbytes < block:
        reason = f"{shown(relay.keep_nbytes)} cannot hold a KV block of {shown(block)}"
        problems.add(("relay", "keep"), reason, f"raise it to {shown(block, up=True)} for each block to keep")


def check_memory(
    facts: ModelFacts,
    dtype: str,
    quantization: str | None,
    nodes: Sequence[Node],
    instances: Sequence[Instance],
    relays: Sequence[Relay],
    shm_dir: Path,
    problems: Problems,
) -> None:
    """Tell when this host has too little memory, or too little shared memory, for its part of the topology."""
    local = {node.name for node in nodes if is_local(node.host)}
    mine = [(one, _share(one, local)) for one in instances if one.devices[0].startswith("cpu")]
    pools = sum(round(share * pool_nbytes(one, facts, dtype)) for one, share in mine)
    kept = sum(relay.keep_nbytes for relay in relays if relay.node in local)
    shared = pools + kept
    weights = round(sum(share for _, share in mine) * facts.weights_nbytes(dtype, quantization))
    parts = f"weights {shown(weights)}, KV pools {shown(pools)}"
    if kept:
        parts += f", kept KV {shown(kept)}"
    remedy = "lower kv.memory or relay.keep, have fewer instances, or use a smaller dtype or model"
    has = memory_nbytes()
    if has is not None and weights + shared > has:
        reason = f"this host has {shown(has)} of memory, and {shown(weights + shared)} are needed: {parts}"
        problems.add(("kv",), reason, remedy)
    room = mount_nbytes(shm_dir)
    if room is not None and shared > room:
        reason = f"{shm_dir} has room for {shown(room)}, and {shown(shared)} are needed: {parts}"
        problems.add(("kv",), reason, f"{remedy}; or enlarge that mount, or set DS_SHM_DIR to another")


def _share(instance: Instance, nodes: Collection[str]) -> float:
    """Which share of an instance is on ``nodes``, about: stages are of nearly one size."""
    return sum(node in nodes for node in instance.nodes) / len(instance.nodes)


def memory_nbytes() -> int | None:
    """Bytes of memory that this host or container may use; None where that cannot be read."""
    found = []
    try:
        lines = MEMINFO.read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")))
        # "max" where there is no limit: no number
        found.append(int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError, StopIteration):
        pass
    return min(found, default=None)


def mount_nbytes(directory: Path) -> int | None:
    """Bytes of the file system that holds ``directory``; None where that cannot be read."""
    try:
        mount = os.statvfs(directory)
    except OSError:
        return None
    return mount.f_blocks * mount.f_frsize


def shown(nbytes: int, *, up: bool = False) -> str:
    """Bytes for people: ``512MiB``; with ``up`` rounded up to a whole unit that a size may be given in."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{-(-nbytes // unit)}{name}" if up else f"{nbytes / unit:.1f}".removesuffix(".0") + name
    return f"{nbytes}B"
