"""A resolved topology as people read it: a tree, a Mermaid flow chart, plain data."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from dstopology.fit import shown
from dstopology.resolved import LOCAL, Instance, Node, Relay, Topology, Transport
from dswire.messages.client import StatusReport, WorkerStatus
from dswire.messages.kv import PathInfo

#: more pairs of instances are summed up
MAX_PAIRS = 16
#: style of a state, as the router or nobody tells it
STATES = {"up": "green", "lost": "red", "missing": "yellow"}


@dataclasses.dataclass(frozen=True, slots=True)
class Live:
    """What was learnt from the running system."""

    report: StatusReport | None
    #: why there is no report, for people
    reason: str = ""
    #: (where it leads from, node to which it leads) -> a path for KV, as the relays know it
    paths: Mapping[tuple[str, str], PathInfo] = dataclasses.field(default_factory=dict)

    def path(self, topology: Topology, one: Handoff) -> str:
        """How fast KV was found to go that way, or what is wrong with it; "" when nothing is known."""
        node = topology.instance(one.puller).node
        source = topology.instance(one.owner).node if one.transport == "tcp" else one.owner
        path = self.paths.get((source, node))
        if path is None:
            return ""
        return path.reason or (f"{path.bytes_per_s / 1e9:.2f} GB/s" if path.bytes_per_s else "no answer yet")

    def worker(self, name: str) -> WorkerStatus | None:
        """The worker ``name`` as the router sees it."""
        workers = self.report.workers if self.report is not None else ()
        return next((worker for worker in workers if worker.name == name), None)


@dataclasses.dataclass(frozen=True, slots=True)
class Handoff:
    """The way of KV from one prefill to one decode instance."""

    owner: str
    puller: str
    transport: Transport
    #: relays on the way; the first two are the same when TCP is forced within a node
    relays: tuple[str, str]
    crosses_nodes: bool
    #: node of each stage, which hands over its own KV, where they are several
    stage_nodes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """How far the KV goes."""
        if self.crosses_nodes:
            return "between nodes"
        nodes = dict.fromkeys(self.stage_nodes)
        return f"each stage within its node, {' and '.join(nodes)}" if nodes else "within the node"


def handoffs(topology: Topology) -> Iterator[Handoff]:
    """Every pair of a prefill and a decode instance between which KV goes."""
    for owner, puller in topology.handoffs():
        yield Handoff(
            owner.name,
            puller.name,
            topology.transport(owner.node, puller.node),
            (topology.relay_of(owner.node).name, topology.relay_of(puller.node).name),
            owner.node != puller.node,
            owner.stage_nodes if owner.hosts else (),
        )


def data(topology: Topology, live: Live) -> dict[str, Any]:
    """Plain data for JSON and YAML; sizes in bytes, times in seconds."""
    import msgspec

    resolved = _plain(dataclasses.asdict(topology))
    resolved["handoffs"] = [_plain(dataclasses.asdict(one)) for one in handoffs(topology)]
    resolved["live"] = msgspec.to_builtins(live.report) if live.report is not None else None
    resolved["paths"] = [{"node": node, **msgspec.to_builtins(path)} for (_, node), path in live.paths.items()]
    return dict(resolved)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# the tree


def _line(title: str, *facts: str, style: str = "bold") -> Text:
    """A name and what is to say about it."""
    text = Text(title, style=style)
    if said := ", ".join(fact for fact in facts if fact):
        text.append(f"  {said}", style="not bold default")
    return text


def tree(topology: Topology, live: Live) -> Tree:
    """Nodes, devices, instances, ranks, sockets and transports."""
    root = Tree(_line(topology.path.name, topology.mode, _running(live)), guide_style="dim")
    model, slo = topology.model, topology.slo
    root.add(_line("model", model.name, model.weights, f"{model.max_model_len} tokens"))
    goal = f"{slo.attainment:.0%} of requests"
    root.add(_line("SLO", f"TTFT {slo.ttft_s * 1000:g} ms", f"TPOT {slo.tpot_s * 1000:g} ms", goal))
    curve = f"on, keys in {topology.security.keys_dir}" if topology.security.encrypted else "off"
    root.add(_line("CURVE", curve))
    root.add(_line("files", str(topology.run_dir), f"{topology.shm_dir}/ds-{topology.digest}-*"))
    for node in topology.nodes:
        _add_node(root, topology, node, live)
    if topology.mode == "conditional":
        root.add(_line("short prompts", f"of fewer than {topology.threshold_tokens} tokens, are read by decode"))
    if pairs := list(handoffs(topology)):
        ways = root.add(_line("KV hand-off", _preference(topology, pairs)))
        for line in _handoff_lines(topology, pairs, live):
            ways.add(line)
    return root


def _preference(topology: Topology, pairs: list[Handoff]) -> str:
    """When KV leaves its node, where it need not."""
    affinity = topology.router.node_affinity
    if len({one.crosses_nodes for one in pairs}) < 2 or affinity == 0:
        return ""
    return f"within the node, unless other nodes hold fewer tokens by {affinity:g} times the sequence's"


def _handoff_lines(topology: Topology, pairs: list[Handoff], live: Live) -> Iterator[Text]:
    """One line for each pair; when they are many, one for each kind of pair."""
    kinds: dict[tuple[str, str], int] = {}
    for one in pairs:
        kinds[one.transport, one.where] = kinds.get((one.transport, one.where), 0) + 1
        by = f"through {' and '.join(dict.fromkeys(one.relays))}" if one.transport not in LOCAL else ""
        if len(pairs) <= MAX_PAIRS:
            known = live.path(topology, one)
            yield _line(f"{one.owner} → {one.puller}", one.transport, one.where, by, known, style="")
    if len(pairs) > MAX_PAIRS:
        for (transport, where), count in kinds.items():
            yield _line(f"{count} pairs", transport, where, style="")


def _running(live: Live) -> str:
    if live.report is None:
        return live.reason
    busy = sum(live.report.requests.values())
    return f"running for {_duration(live.report.uptime_s)}, {_count(busy, 'live request')}"


def _add_node(root: Tree, topology: Topology, node: Node, live: Live) -> None:
    branch = root.add(_line(f"node {node.name}", node.host))
    router = topology.router
    if router.node == node.name:
        up = "up" if live.report is not None else ""
        here = branch.add(_state_line(router.name, up, f"at most {router.max_requests} requests"))
        here.add(_line("frontend", router.frontend_bind, style=""))
        here.add(_line("backend", router.backend_bind, style=""))
    if topology.gateway is not None and topology.gateway.node == node.name:
        branch.add(_line(topology.gateway.name, f"http://{topology.gateway.bind}"))
    for relay in topology.relays:
        if relay.node == node.name:
            _add_relay(branch, relay, live)
    for host in topology.hosts:
        if host.node == node.name:
            branch.add(_line(host.name, f"runs ranks of {host.instance}"))
    for device in node.devices:
        _add_device(branch, topology, node, device, live)


def _add_relay(branch: Tree, relay: Relay, live: Live) -> None:
    status = live.worker(relay.name)
    facts = []
    if status is not None and status.state == "up":
        facts = [f"{count} handles {state}" for state, count in status.handles.items() if count] or ["no handles"]
    here = branch.add(_state_line(relay.name, status.state if status else "", *facts))
    here.add(_line("local", relay.local, style=""))
    here.add(_line("data", relay.data_bind or "none, all KV stays on the node", style=""))
    if relay.stream_bind is not None:
        here.add(_line("streams", f"{relay.stream_bind}, {relay.streams} at once", style=""))
    if relay.keep_nbytes:
        here.add(_line("keep", f"{shown(relay.keep_nbytes)} of handed-over KV", style=""))


def _add_device(branch: Tree, topology: Topology, node: Node, device: str, live: Live) -> None:
    here = branch.add(_line(device))
    for instance in topology.instances:
        places = list(zip(instance.nodes, instance.devices, strict=True))
        if (node.name, device) in places:
            _add_rank(here, instance, places.index((node.name, device)), live)
    if not here.children:
        here.add(Text("idle", style="dim"))


def _add_rank(branch: Tree, instance: Instance, rank: int, live: Live) -> None:
    status = live.worker(instance.name)
    stage, part = divmod(rank, instance.tp)
    place = f"rank {rank}, stage {stage + 1} of {instance.pp}, part {part + 1} of {instance.tp}"
    facts = [place if len(instance.devices) > 1 else "1 rank"]
    facts.append(_count(instance.threads, "thread"))
    if status is not None and status.state == "up":
        facts += [f"{status.waiting} waiting", f"{status.running} running"]
        facts.append(f"{status.blocks_held} of {status.blocks} blocks held")
    here = branch.add(_state_line(instance.name, status.state if status else "", *facts))
    if rank:
        return
    pool = f"{instance.kv_blocks} blocks" if instance.kv_blocks else shown(instance.kv_memory_nbytes)
    kept = "" if instance.prefix_cache else "nothing is kept"
    here.add(_line("KV", pool, f"{instance.block_size} tokens a block", kept, style=""))
    batch = f"batches of {instance.max_batch} sequences or {instance.max_batch_tokens} tokens"
    here.add(_line("limits", batch, f"{instance.max_queue} waiting", style=""))


def _state_line(title: str, state: str, *facts: str) -> Text:
    """A process: its name, its state in colour, and what is to say about it."""
    text = Text(title, style="bold")
    if state:
        text.append(f"  {state}", style=f"not bold {STATES.get(state, 'default')}")
    text.append_text(_line("", *facts))
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# Mermaid


def mermaid(topology: Topology, live: Live) -> str:
    """A flow chart for Markdown pages; processes that are not up are dashed when the system runs."""
    lines = [
        "flowchart LR",
        f'  clients(["clients"]) -->|"{topology.router.frontend_connect}"| {topology.router.name}',
    ]
    for node in topology.nodes:
        lines += [f'  subgraph {node.name}["node {node.name} · {node.host}"]']
        lines += [f"    {line}" for line in _boxes(topology, node)]
        lines += ["  end"]
    lines += [f"  {topology.router.name} --> {instance.name}" for instance in topology.instances]
    lines += [f"  {host.instance} <--> {host.name}" for host in topology.hosts]
    drawn: dict[str, None] = {}
    for one in handoffs(topology):
        drawn |= dict.fromkeys(_edges(topology, one))
    lines += [f"  {edge}" for edge in drawn]
    down = [worker.name for worker in live.report.workers if worker.state != "up"] if live.report else []
    lines += [f"  style {name} stroke-dasharray:5 5" for name in down]
    return "\n".join(lines) + "\n"


def _boxes(topology: Topology, node: Node) -> Iterator[str]:
    if topology.router.node == node.name:
        yield f'{topology.router.name}["{topology.router.name}"]'
    for relay in topology.relays:
        if relay.node == node.name:
            yield f'{relay.name}[["{relay.name}"]]'
    for instance in topology.instances:
        host = next((one.name for one in instance.hosts if one.node == node.name), None)
        name = instance.name if instance.node == node.name else host
        if name is not None:
            devices = " ".join(instance.devices[rank] for rank in instance.ranks_on(node.name))
            yield f'{name}["{name}<br/>{textwrap.shorten(devices, 40)}"]'


def _edges(topology: Topology, one: Handoff) -> Iterator[str]:
    """Within a host straight, on each node of the stages; TCP goes from relay to relay."""
    if one.transport in LOCAL:
        owners, pullers = (topology.instance(name).hosts for name in (one.owner, one.puller))
        pairs = [(mine.name, theirs.name) for mine, theirs in zip(owners, pullers, strict=True)]
        for owner, puller in [(one.owner, one.puller), *pairs]:
            yield f'{owner} ==>|"KV, {one.transport}"| {puller}'
        return
    first, last = one.relays
    yield f'{one.owner} ==>|"KV"| {first}'
    # forced within a node, the relay talks to itself
    yield f'{first} ==>|"KV, tcp"| {last}'
    yield f'{last} ==>|"KV"| {one.puller}'
