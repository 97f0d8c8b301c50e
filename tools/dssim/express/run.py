"""Simulation without messages, compiled: a hundred times as fast as the machines, and with the same results.

It is for systems in which nothing out of the ordinary happens: :func:`run` says None for what it cannot do, and the
machines are to be asked then. It tells what became of requests, how busy instances were, and how many sequences
gave way, but of nothing inside.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dskv.layout import KvLayout
from dssim.express.build import library
from dssim.express.structs import (
    LEDGER,
    ArrivalStruct,
    Ask,
    InstanceStruct,
    LinearStruct,
    ResultStruct,
    SettingsStruct,
)
from dssim.prompts import hashed, own
from dssim.records import Observations, Record, Run
from dssim.system import System
from dssim.times import FlatTransfer, Linear, LinearTimes, StepTimes, SummedTimes, Sums, TransferTimes
from dssim.workload import HASHED_TOKENS, Arrival
from dstopology.resolved import LOCAL, Instance, Topology
from dswire.messages.client import Ledger

_ENDLESS = 2**62
#: outcomes, as in world.h
_DONE, _SHORT_OF_BLOCKS, _OUT_OF_REACH = 0, 1, 5


class Goal(NamedTuple):
    """What a run is for: that all but ``misses`` of the requests from number ``first`` on meet both objectives."""

    ttft_s: float
    tpot_s: float
    first: int
    misses: int


def run(
    topology: Topology,
    layout: KvLayout,
    times: Callable[[Instance], StepTimes],
    transfers: TransferTimes,
    arrivals: Sequence[Arrival],
    goal: Goal | None = None,
) -> Run | None:
    """The run that :class:`System` would make of the same arguments, but for what was seen inside; with a ``goal``
    only until that is out of reach.

    None where something in them is beyond it, where a request or the way to its KV took longer than any may, and
    where there is no C++ compiler.
    """
    instances = (*topology.role("prefill"), *topology.role("decode"))
    each = [one for one in map(times, instances) if isinstance(one, LinearTimes | SummedTimes)]
    if len(each) < len(instances) or not isinstance(transfers, FlatTransfer):
        return None
    simulate = library() if _ordinary(topology, layout, arrivals) else None
    if simulate is None:
        return None
    began, began_cpu = time.perf_counter(), time.process_time()
    begun_s = System(topology, layout, times, transfers).begin()
    settings = _settings(topology, layout, transfers, len(arrivals), begun_s)
    structs = _instances(topology, layout, instances, transfers, each)
    wanted, hashes = _wanted(arrivals)
    busy, happenings, preemptions = (ctypes.c_double * len(each))(), ctypes.c_int64(), ctypes.c_int64()
    counts = ctypes.byref(happenings), ctypes.byref(preemptions)
    # what pools keep of prompts that differ matters only once a sequence is read again, and takes time
    for keeps in (False, True) if not len(hashes) else (True,):
        settings.keeps = keeps
        if goal is not None:
            settings.ttft_s, settings.tpot_s, settings.first, settings.misses = goal
        results, asked = (ResultStruct * len(arrivals))(), _Asked(each)
        outcome = simulate(
            ctypes.byref(settings), structs, wanted, hashes, Ask(asked.seconds), results, busy, *counts
        )
        asked.raise_any()
        if outcome != _SHORT_OF_BLOCKS:
            break
    if outcome not in (_DONE, _OUT_OF_REACH):
        return None
    records = _records(arrivals, results, begun_s)
    ended_s = max((one.at_s + one.total_s for one in records), default=0.0)
    seen = Observations(
        busy_s={one.name: s for one, s in zip(instances, busy, strict=True) if s}, preemptions=preemptions.value
    )
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    return Run(records, ended_s, begun_s, wall_s, cpu_s, happenings.value, seen, {})


def _never(step: Sums) -> float:
    raise AssertionError(f"{step} is told by a linear form")


class _Asked:
    """Answers the compiled code, which knows nothing of exceptions."""

    def __init__(self, each: Sequence[LinearTimes | SummedTimes]) -> None:
        # such a type is found out slowly, and not for each step
        self._each = [one.summed_s if isinstance(one, SummedTimes) else _never for one in each]
        self._error: BaseException | None = None

    def seconds(self, instance: int, *sums: int) -> float:
        """Time of a step."""
        try:
            return self._each[instance](Sums(*sums))
        except BaseException as error:  # noqa: BLE001 - it is raised when the compiled code has returned
            self._error = self._error or error
            return 0.0

    def raise_any(self) -> None:
        """Raise the first error."""
        if self._error is not None:
            raise self._error


def _ordinary(topology: Topology, layout: KvLayout, arrivals: Sequence[Arrival]) -> bool:
    """Whether KV goes one way within nodes and can leave them, in equal blocks; no relay keeps any; and each prompt
    fits."""
    if topology.relays and (len(_within(topology)) > 1 or not all(_reached(topology))):
        return False
    if any(one.keep_nbytes for one in topology.relays):
        # prefill has its blocks back later
        return False
    if len({one.block_size for one in topology.instances}) > 1:
        return False
    if topology.part_tokens:
        step = min(one.max_batch_tokens for one in topology.role("prefill"))
        if any(one.prompt_tokens > step for one in arrivals):
            # their KV goes in parts
            return False
    blocks = min(_blocks(one, layout) for one in topology.instances)
    room = min(topology.model.max_model_len, blocks * layout.block_size)
    return all(one.prompt_tokens + one.output_tokens <= room for one in arrivals)


def _within(topology: Topology) -> set[str]:
    """By which ways KV is handed over within nodes."""
    return {topology.transport(one.node, one.node) for one in topology.relays}


def _reached(topology: Topology) -> Iterator[bool]:
    """For each pair of nodes, whether KV can go from the one to the other."""
    for owner, reader in topology.handoffs():
        relay = topology.relay_of(owner.node)
        yield topology.transport(owner.node, reader.node) in LOCAL or relay.data_connect is not None


def _groups(topology: Topology) -> list[frozenset[str]]:
    """Instances between which KV goes, in the order in which the router looks at their queues."""
    reach = topology.reach
    if not reach:
        return [frozenset(one.name for one in topology.instances)]
    return [
        each | {name for name, reached in reach.items() if reached == each}
        for each in dict.fromkeys(reach.values())
    ]


def _blocks(instance: Instance, layout: KvLayout) -> int:
    return instance.kv_blocks or instance.kv_memory_nbytes // layout.block_nbytes


def _settings(
    topology: Topology, layout: KvLayout, transfers: FlatTransfer, requests: int, begun_s: float
) -> SettingsStruct:
    prefills, decodes = topology.role("prefill"), topology.role("decode")
    below = {"disaggregated": 0, "colocated": _ENDLESS, "conditional": topology.threshold_tokens}
    return SettingsStruct(
        prefills=len(prefills),
        decodes=len(decodes),
        groups=len(_groups(topology)),
        requests=requests,
        max_requests=topology.router.max_requests,
        prefill_queue=min((one.max_queue for one in prefills), default=1),
        decode_queue=min(one.max_queue for one in decodes),
        local_below=below[topology.mode],
        threshold_limits=topology.mode == "conditional",
        block_size=layout.block_size,
        block_nbytes=layout.block_nbytes,
        early=any(one.verify for one in topology.relays),
        direct=_within(topology) <= set(LOCAL),
        hashed_tokens=HASHED_TOKENS,
        begun_s=begun_s,
        client_s=transfers.message_s(False),
        relay_s=transfers.message_s(True),
        max_deadline_s=topology.router.max_deadline_s,
        lease_s=min((one.lease_s for one in topology.relays), default=math.inf),
        affinity=topology.router.node_affinity,
        network_bytes_per_s=transfers.network_bytes_per_s,
        misses=_ENDLESS,
    )


def _instances(
    topology: Topology,
    layout: KvLayout,
    instances: Sequence[Instance],
    transfers: FlatTransfer,
    times: Sequence[LinearTimes | SummedTimes],
) -> ctypes.Array[InstanceStruct]:
    ranks = {name: place for place, name in enumerate(sorted(one.name for one in instances))}
    nodes = sorted({one.node for one in instances})
    groups = _groups(topology)
    made = (InstanceStruct * len(instances))()
    for struct, one, its in zip(made, instances, times, strict=True):
        struct.blocks, struct.rank, struct.stages = _blocks(one, layout), ranks[one.name], one.pp
        struct.max_batch, struct.max_batch_tokens = one.max_batch, one.max_batch_tokens
        struct.prefill_priority, struct.node = one.prefill_priority, nodes.index(one.node)
        struct.keeps = one.prefix_cache
        struct.group = next(number for number, names in enumerate(groups) if one.name in names)
        struct.router_s = transfers.message_s(one.node == topology.router.node)
        struct.seal_bytes_per_s = transfers.seal_bytes_per_s
        struct.copy_bytes_per_s = transfers.copy_bytes_per_s
        if isinstance(its, LinearTimes):
            _linear_times(struct, its)
        else:
            struct.asks = True
    return made


def _wanted(arrivals: Sequence[Arrival]) -> tuple[ctypes.Array[ArrivalStruct], ctypes.Array[ctypes.c_int64]]:
    """The requests, and the tokens that the hashes of all of them stand for, one behind the other."""
    wanted = (ArrivalStruct * len(arrivals))()
    for number, one in enumerate(arrivals):
        wanted[number] = ArrivalStruct(one.at_s, one.prompt_tokens, one.output_tokens, own(number), len(one.hashes))
    tokens = [hashed(one) for each in arrivals for one in each.hashes]
    return wanted, (ctypes.c_int64 * len(tokens))(*tokens)


def _linear_times(struct: InstanceStruct, times: LinearTimes) -> None:
    large = times.decode_large
    struct.prefill, struct.decode = _linear(times.prefill), _linear(times.decode)
    struct.decode_large = _linear(large or times.decode)
    struct.large_batch = times.large_batch if large is not None else _ENDLESS


def _linear(one: Linear) -> LinearStruct:
    return LinearStruct(one.base_s, one.per_token_s, one.per_square_s, one.per_sequence_s)


def _records(
    arrivals: Sequence[Arrival], results: ctypes.Array[ResultStruct], begun_s: float
) -> tuple[Record, ...]:
    made: list[Record | None] = [None] * len(arrivals)
    for number, (asked, one) in enumerate(zip(arrivals, results, strict=True)):
        refused = one.first_s < 0
        if not one.total_s:
            # the run was over before
            continue
        made[one.order] = Record(
            number=number,
            at_s=one.at_s - begun_s,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=0 if refused else asked.output_tokens,
            first_s=None if refused else one.first_s,
            total_s=one.total_s,
            error="overloaded" if refused else "",
            ledger=None if refused else Ledger(**dict(zip(LEDGER, one.stages, strict=True))),
        )
    return tuple(one for one in made if one is not None)
