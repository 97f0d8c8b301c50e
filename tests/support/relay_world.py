"""Two relay machines and their workers on a simulated network: messages wait until they are delivered.

Staging slots hold the name of what was written last, so that a slot with two users is seen by whoever reads it.
n0 lets its workers read directly; on n1 even KV of the own node goes by TCP.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dskv.handle import KvHandle, KvKey
from dsrelay.events import RELAY, WORKER, Action, ChunkArrived, Complain, SendChunk, StoreChunk
from dsrelay.state import RelayState
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL, kv, worker
from support.handles import LAYOUT, make_handle
from support.relay_desk import make_config

NODES = ("n0", "n1")
SOURCES = {"n0": ("n1",), "n1": ("n0", "n1")}
#: what a slot holds
Content = tuple[KvKey, int, int] | None


@dataclass(slots=True)
class Prefill:
    """Offers, and stages when the test lets it."""

    name: str
    node: str
    incarnation: int = 0
    handles: dict[KvKey, KvHandle] = field(default_factory=dict)
    offers: Counter[KvKey] = field(default_factory=Counter)
    releases: Counter[KvKey] = field(default_factory=Counter)
    stages: list[kv.KvStage] = field(default_factory=list)


@dataclass(slots=True)
class Decode:
    """Pulls, and copies when the test lets it."""

    name: str
    node: str
    incarnation: int = 0
    pulls: dict[KvKey, KvHandle] = field(default_factory=dict)
    #: what can be copied: the whole handle, or a chunk
    copies: list[kv.KvGrant | kv.KvChunkReady] = field(default_factory=list)
    done: int = 0


class RelayWorld:
    """Everything, and the clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.relays: dict[str, RelayState] = {}
        self.slots: dict[str, dict[int, Content]] = {}
        #: (sender, its name for the receiver) -> messages under way
        self.links: dict[tuple[str, str], deque[Any]] = {}
        self.prefills = {f"prefill-{node}": Prefill(f"prefill-{node}", node) for node in NODES}
        self.decodes = {f"decode-{node}": Decode(f"decode-{node}", node) for node in NODES}
        self.complaints: list[Complain] = []
        self._serial = 0
        #: what the chunk that arrives carries
        self._in_flight: Content = None
        for node in NODES:
            self._boot(node)
        for name in (*self.prefills, *self.decodes):
            self.hello(name)

    # what a test may do

    def offer(self, name: str, blocks: int) -> None:
        owner = self.prefills[name]
        self._serial += 1
        handle = make_handle(f"r{self._serial}/0", owner=name, node=owner.node, blocks=range(blocks))
        owner.handles[handle.key] = handle
        self._offer(owner, handle)

    def pull(self, name: str, handle: KvHandle) -> None:
        reader = self.decodes[name]
        if handle.key not in reader.pulls:
            reader.pulls[handle.key] = handle
            self.to_relay(name, kv.KvPull(handle))

    def abort(self, name: str, key: KvKey) -> None:
        self._forget(self.decodes[name], key)
        self.to_relay(name, kv.KvAbort(key))

    def stage(self, name: str, at: int) -> None:
        """The owner has done one of its copies, and perhaps for a transfer that is over."""
        owner = self.prefills[name]
        stage = owner.stages.pop(at)
        self.slots[owner.node][stage.slot] = (stage.key, stage.chunk.first, stage.chunk.count)
        self.to_relay(name, kv.KvStaged(stage.key, stage.chunk))

    def copy(self, name: str, *, right: bool = True) -> None:
        """The reader does its next copy, and looks what it finds in the slot; the whole may not be ``right``."""
        reader = self.decodes[name]
        ready = reader.copies.pop(0)
        key = ready.key
        handle = reader.pulls[key]
        last = isinstance(ready, kv.KvGrant)
        if isinstance(ready, kv.KvChunkReady):
            found = self.slots[reader.node][ready.slot]
            expected = (key, ready.chunk.first, ready.chunk.count)
            assert found == expected or self._failing(reader, key), f"{ready} finds {found}"
            last = ready.chunk.first + ready.chunk.count == len(handle.blocks)
            if right or not last:
                self.to_relay(name, kv.KvTaken(key, ready.chunk))
        if last and not right:
            self.to_relay(name, kv.KvAgain(key))
        elif last:
            reader.done += 1
            self._forget(reader, key)
            self.to_relay(name, kv.KvPulled(key))

    def withdraw(self, name: str, key: KvKey) -> None:
        self.to_relay(name, kv.KvWithdraw(key))

    def extend(self, name: str) -> None:
        wanted = tuple((handle.key, handle.node) for handle in self.decodes[name].pulls.values())
        self.to_relay(name, kv.KvExtend(wanted))

    def greet(self, name: str) -> None:
        """A sign of life; a relay that does not know the worker asks for its hello."""
        self.to_relay(name, kv.KvPong())

    def work(self) -> None:
        """Every owner and reader does what it was asked for."""
        for owner in self.prefills.values():
            while owner.stages:
                self.stage(owner.name, 0)
        for reader in self.decodes.values():
            while reader.copies:
                self.copy(reader.name)

    def restart_worker(self, name: str) -> None:
        """It is killed, and comes up again."""
        one: Prefill | Decode = (self.prefills | self.decodes)[name]
        self._cut(one.node, WORKER + name, name)
        if isinstance(one, Prefill):
            fresh = Prefill(name, one.node, one.incarnation + 1, offers=one.offers, releases=one.releases)
            self.prefills[name] = fresh
        else:
            self.decodes[name] = Decode(name, one.node, one.incarnation + 1, done=one.done)
        self.hello(name)

    def restart_relay(self, node: str) -> None:
        """It is killed, and comes up again; its workers notice."""
        for link in [
            link for link in self.links if node in link or link[1] in (RELAY + node, f"fetcher:relay-{node}")
        ]:
            del self.links[link]
        self._boot(node)
        for name, one in (self.prefills | self.decodes).items():
            if one.node == node:
                self.links.pop((name, ""), None)
                self.hello(name)

    def lose(self, node: str, peer: str) -> None:
        """A message to ``peer`` could not be sent."""
        self.links.pop((node, peer), None)
        self._feed(node, PeerLost(self.now, peer))

    def hello(self, name: str) -> None:
        """Register (again): a reader has forgotten its pulls, an owner offers again."""
        one: Prefill | Decode = (self.prefills | self.decodes)[name]
        self.to_relay(name, kv.KvHello(PROTOCOL, name, str(one.incarnation)))
        if isinstance(one, Prefill):
            for handle in one.handles.values():
                self._offer(one, handle)
        else:
            one.pulls.clear()
            one.copies.clear()

    def to_relay(self, name: str, message: msgspec.Struct) -> None:
        self.links.setdefault((name, ""), deque()).append(message)

    def busy_links(self) -> list[tuple[str, str]]:
        return sorted(link for link, messages in self.links.items() if messages)

    def deliver(self, link: tuple[str, str]) -> None:
        """The oldest message of a link arrives."""
        sender, peer = link
        message = self.links[link].popleft()
        if sender not in NODES:
            node = (self.prefills | self.decodes)[sender].node
            self._feed(node, Received(self.now, WORKER + sender, message))
        elif peer.startswith(WORKER):
            self._to_worker(peer.removeprefix(WORKER), message)
        elif peer.startswith(RELAY):
            self._feed(peer.removeprefix(RELAY), Received(self.now, f"fetcher:relay-{sender}", message))
        else:
            self._to_fetcher(peer.removeprefix("fetcher:relay-"), RELAY + sender, message)

    def advance(self, seconds: float, *, deliver: bool) -> None:
        """Time passes, deadline by deadline; with ``deliver`` the network and the workers keep up."""
        end = self.now + seconds
        while self.now < end:
            if deliver:
                self.run_dry()
            deadlines = [relay.next_deadline() for relay in self.relays.values()]
            due = min((at for at in deadlines if at is not None and at > self.now), default=end)
            self.now = min(end, due)
            for node in NODES:
                self._feed(node, Tick(self.now))

    def run_dry(self) -> None:
        """Deliver until nothing is under way."""
        while links := self.busy_links():
            for link in links:
                while self.links.get(link):
                    self.deliver(link)

    # inside

    def _boot(self, node: str) -> None:
        self._serial += 1
        config = make_config(
            node,
            sources=SOURCES[node],
            direct=node == "n0",
            sending=2,
            receiving=3,
            incarnation=f"relay-{self._serial}",
        )
        self.relays[node] = RelayState(config)
        self.slots[node] = {}
        self._feed(node, Tick(self.now))

    def _cut(self, node: str, peer: str, name: str) -> None:
        self.links.pop((node, peer), None)
        self.links.pop((name, ""), None)

    def _offer(self, owner: Prefill, handle: KvHandle) -> None:
        owner.offers[handle.key] += 1
        self.to_relay(owner.name, kv.KvOffer(handle))

    @staticmethod
    def _forget(reader: Decode, key: KvKey) -> None:
        reader.pulls.pop(key, None)
        reader.copies = [copy for copy in reader.copies if copy.key != key]

    def _failing(self, reader: Decode, key: KvKey) -> bool:
        """The relay's word that the pull is over is under way already."""
        link = self.links.get((reader.node, WORKER + reader.name), ())
        return any(isinstance(message, kv.KvFailed) and message.key == key for message in link)

    def _feed(self, node: str, event: Any) -> None:
        content = self._in_flight if isinstance(event, ChunkArrived) else None
        actions = self.relays[node].handle(event)
        self.relays[node].validate()
        for action in actions:
            self._perform(node, action, content)

    def _perform(self, node: str, action: Action, content: Content) -> None:
        if isinstance(action, Send) and action.peer != "router":
            self.links.setdefault((node, action.peer), deque()).append(action.message)
        elif isinstance(action, SendChunk):
            carried = (action, self.slots[node].get(action.slot))
            self.links.setdefault((node, action.peer), deque()).append(carried)
        elif isinstance(action, StoreChunk):
            self.slots[node][action.slot] = content
        elif isinstance(action, Complain):
            self.complaints.append(action)

    def _to_fetcher(self, node: str, peer: str, message: Any) -> None:
        if isinstance(message, tuple):
            action, self._in_flight = message
            said = action.message
            nbytes = said.chunk.count * LAYOUT.block_nbytes
            event = ChunkArrived(self.now, peer, said.key, said.chunk, nbytes, said.number)
            self._feed(node, event)
        else:
            self._feed(node, Received(self.now, peer, message))

    def _to_worker(self, name: str, message: Any) -> None:
        if isinstance(message, kv.KvPing):
            self.to_relay(name, kv.KvPong())
        elif isinstance(message, worker.HelloWanted):
            self.hello(name)
        elif name in self.prefills:
            self._to_prefill(self.prefills[name], message)
        else:
            self._to_decode(self.decodes[name], message)

    def _to_prefill(self, owner: Prefill, message: Any) -> None:
        if isinstance(message, kv.KvRelease):
            owner.releases[message.key] += 1
            assert owner.releases[message.key] <= owner.offers[message.key], f"{message} is one too many"
            owner.handles.pop(message.key, None)
        elif isinstance(message, kv.KvStage) and message.key in owner.handles:
            owner.stages.append(message)

    def _to_decode(self, reader: Decode, message: Any) -> None:
        if isinstance(message, kv.KvFailed):
            self._forget(reader, message.key)
        elif isinstance(message, kv.KvGrant | kv.KvChunkReady) and message.key in reader.pulls:
            reader.copies.append(message)
