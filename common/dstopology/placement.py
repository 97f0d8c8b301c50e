"""Which instance runs on which devices.

Explicit places are taken first; the other instances get free devices, each role going round the nodes from the
first, so that prefill-N comes to stand beside decode-N where there is room. Invariants of the result: a device
has one rank at most, and the ranks of a stage share a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dstopology.endpoints import bindable, is_ip, is_loopback
from dstopology.problems import Key, Problems, did_you_mean
from dstopology.resolved import Node
from dstopology.schema import GroupSection, NodeSection

WorkerRole = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Placed:
    """An instance and its devices."""

    role: WorkerRole
    index: int
    #: of each rank
    nodes: tuple[str, ...]
    devices: tuple[str, ...]

    @property
    def name(self) -> str:
        """``prefill-0``"""
        return f"{self.role}-{self.index}"

    @property
    def node(self) -> str:
        """Of the last stage, which draws."""
        return self.nodes[-1]


def resolve_nodes(sections: Sequence[NodeSection] | None, ranks: int, problems: Problems) -> tuple[Node, ...]:
    """The nodes; without a section one node here with ``ranks`` CPU devices."""
    if sections is None:
        return (Node("n0", "127.0.0.1", "127.0.0.1", tuple(f"cpu:{index}" for index in range(ranks))),)
    nodes: dict[str, Node] = {}
    for index, section in enumerate(sections):
        at: Key = ("nodes", index)
        if section.name in nodes:
            problems.add((*at, "name"), f"there are two nodes named {section.name!r}", "rename one of them")
        for position, device in enumerate(section.devices):
            if device in section.devices[:position]:
                problems.add((*at, "devices", position), f"{device} is listed twice", "list each device once")
        nodes.setdefault(section.name, _node(section, at, problems))
    _check_reach(sections, problems)
    return tuple(nodes.values())


def _check_reach(sections: Sequence[NodeSection], problems: Problems) -> None:
    """Tell of loopback addresses among the addresses of several hosts."""
    if all(is_loopback(section.host) for section in sections):
        return
    for index, section in enumerate(sections):
        if is_loopback(section.host) and len(sections) > 1:
            reason = f"other hosts cannot reach {section.host}"
            problems.add(("nodes", index, "host"), reason, "give the address by which the other nodes know it")


def _node(section: NodeSection, at: Key, problems: Problems) -> Node:
    bind_host = section.bind_host or bindable(section.host, "0.0.0.0")
    if not is_ip(bind_host):
        reason = f"{bind_host!r} is not an IPv4 address, and sockets bind addresses only"
        problems.add((*at, "bind_host"), reason, "write 0.0.0.0 or an address of the host")
    return Node(section.name, section.host, bind_host, section.devices)


def place(
    groups: Mapping[WorkerRole, GroupSection], nodes: Sequence[Node], problems: Problems
) -> tuple[Placed, ...]:
    """Instances with their devices, prefill first."""
    placer = _Placer(nodes, problems)
    found = {role: placer.explicit(role, group) for role, group in groups.items() if group.place is not None}
    for role, group in groups.items():
        if group.place is None:
            found[role] = placer.automatic(role, group)
    return tuple(placed for role in groups for placed in found[role])


class _Placer:
    def __init__(self, nodes: Sequence[Node], problems: Problems) -> None:
        self._problems = problems
        self._free = {node.name: list(node.devices) for node in nodes}
        self._devices = {node.name: node.devices for node in nodes}
        #: who has a place already
        self._taken: dict[str, str] = {}

    def explicit(self, role: WorkerRole, group: GroupSection) -> list[Placed]:
        """Instances of a section that has ``place``."""
        assert group.place is not None
        at: Key = (role, "place")
        if len(group.place) != (group.replicas or len(group.place)):
            reason = f"place has {len(group.place)} entries, but replicas is {group.replicas}"
            self._problems.add(at, reason, "give one list of places for each replica, or leave replicas out")
        placed = [self._placed(role, index, item, group, (*at, index)) for index, item in enumerate(group.place)]
        return [one for one in placed if one is not None]

    def _placed(
        self, role: WorkerRole, index: int, item: str | tuple[str, ...], group: GroupSection, at: Key
    ) -> Placed | None:
        """One instance; None after a problem with all its places."""
        places = (item,) if isinstance(item, str) else item
        self._check_ranks(group, len(places), at)
        owner = f"{role}-{index}"
        keys = [at] if isinstance(item, str) else [(*at, rank) for rank in range(len(item))]
        pairs = [self._take(place, key, owner) for place, key in zip(places, keys, strict=True)]
        known = [pair for pair in pairs if pair is not None]
        nodes, devices = tuple(node for node, _ in known), tuple(device for _, device in known)
        if any(len(set(nodes[first : first + group.tp])) > 1 for first in range(0, len(nodes), group.tp)):
            reason = "the ranks of one stage are on several nodes"
            self._problems.add(at, reason, "place all tp ranks of a stage on one node")
            nodes = nodes[-1:] * len(nodes)
        return Placed(role, index, nodes, devices) if known else None

    def _check_ranks(self, group: GroupSection, count: int, at: Key) -> None:
        ranks = group.tp * group.pp
        if count != ranks:
            reason = f"the number of places is {count}, but tp * pp is {group.tp} * {group.pp} = {ranks}"
            self._problems.add(at, reason, "give one place for each rank, or change tp or pp")

    def _take(self, place: str, at: Key, owner: str) -> tuple[str, str] | None:
        """Node and device of ``place``, now taken by ``owner``; None after a problem."""
        node, _, device = place.partition("/")
        if node not in self._devices:
            self._problems.add(at, f"there is no node {node!r}", did_you_mean(node, self._devices))
        elif device not in self._devices[node]:
            remedy = f"add it to the devices of {node}, which are {', '.join(self._devices[node]) or 'none'}"
            self._problems.add(at, f"node {node} has no device {device!r}", remedy)
        elif place in self._taken:
            remedy = (
                f"add a device to {node}; CPU devices are only names (cpu:0, cpu:1, ...) for shares of its cores"
            )
            self._problems.add(at, f"{place} is taken by {self._taken[place]} already", remedy)
        else:
            self._taken[place] = owner
            self._free[node].remove(device)
            return node, device
        return None

    def automatic(self, role: WorkerRole, group: GroupSection) -> list[Placed]:
        """Instances of a section that leaves the places open."""
        ranks = group.tp * group.pp
        names = list(self._free)
        found: list[Placed] = []
        turn = 0
        for index in range(group.replicas or 1):
            # the next node in turn with room; after the last comes the first
            order = [names[(turn + step) % len(names)] for step in range(len(names))]
            node = next((name for name in order if len(self._free[name]) >= ranks), None)
            if node is None:
                self._no_room(role, index, ranks)
                break
            devices = tuple(self._free[node][:ranks])
            del self._free[node][:ranks]
            self._taken |= {f"{node}/{device}": f"{role}-{index}" for device in devices}
            found.append(Placed(role, index, (node,) * ranks, devices))
            turn = names.index(node) + 1
        return found

    def _no_room(self, role: WorkerRole, index: int, ranks: int) -> None:
        free = sum(len(devices) for devices in self._free.values())
        wants = f"{ranks} devices on one node" if ranks > 1 else "a device"
        reason = f"no room for {role}-{index}, which needs {wants}; {free} are free in all"
        self._problems.add((role,), reason, "add devices to a node, or have fewer replicas")
