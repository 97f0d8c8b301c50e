"""Two relay machines and their workers on a simulated network: messages wait until they are delivered.

A ticket names the relay that gave it, so that one that is void is seen by whoever brings it. n0 lets its workers
read directly; on n1 even KV of the own node goes by TCP.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dskv.handle import KvHandle, KvKey
from dsrelay.events import RELAY, WORKER, Action, CloseStream, Complain, OpenStream
from dsrelay.state import RelayState
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL, kv, worker
from support.handles import make_handle
from support.relay_desk import make_config

NODES = ("n0", "n1")
SOURCES = {"n0": ("n1",), "n1": ("n0", "n1")}


@dataclass(slots=True)
class Prefill:
    """Offers."""

    name: str
    node: str
    incarnation: int = 0
    handles: dict[KvKey, KvHandle] = field(default_factory=dict)
    offers: Counter[KvKey] = field(default_factory=Counter)
    releases: Counter[KvKey] = field(default_factory=Counter)


@dataclass(slots=True)
class Decode:
    """Pulls, and copies when the test lets it."""

    name: str
    node: str
    incarnation: int = 0
    pulls: dict[KvKey, KvHandle] = field(default_factory=dict)
    #: what can be copied
    copies: list[kv.KvGrant] = field(default_factory=list)
    done: int = 0


class RelayWorld:
    """Everything, and the clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.relays: dict[str, RelayState] = {}
        #: of each relay: what can be read there, by the tokens that are good
        self.streams: dict[str, dict[bytes, KvHandle]] = {}
        #: (sender, its name for the receiver) -> messages under way
        self.links: dict[tuple[str, str], deque[Any]] = {}
        self.prefills = {f"prefill-{node}": Prefill(f"prefill-{node}", node) for node in NODES}
        self.decodes = {f"decode-{node}": Decode(f"decode-{node}", node) for node in NODES}
        self.complaints: list[Complain] = []
        self._serial = 0
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

    def copy(self, name: str, *, right: bool = True) -> None:
        """The reader does its next copy; what it gets may not be ``right``, and is not from a stream that ended."""
        reader = self.decodes[name]
        grant = reader.copies.pop(0)
        key = grant.key
        handle = reader.pulls[key]
        if grant.ticket is not None:
            right = right and self.streams[handle.node].pop(grant.ticket.token, None) == handle
        if not right:
            self.to_relay(name, kv.KvAgain(key))
            return
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
        """Every reader does what it was asked for."""
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
            self._feed(peer.removeprefix("fetcher:relay-"), Received(self.now, RELAY + sender, message))

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
            incarnation=f"relay-{self._serial}",
        )
        self.relays[node] = RelayState(config)
        self.streams[node] = {}
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

    def _feed(self, node: str, event: Any) -> None:
        actions = self.relays[node].handle(event)
        self.relays[node].validate()
        for action in actions:
            self._perform(node, action)

    def _perform(self, node: str, action: Action) -> None:
        if isinstance(action, Send) and action.peer != "router":
            self._send(node, action.peer, action.message)
        elif isinstance(action, OpenStream):
            self._serial += 1
            token = f"{node}/{self._serial}".encode()
            self.streams[node][token] = action.handle
            self._send(node, action.peer, kv.KvFetchGranted(action.handle.key, kv.Ticket(token), action.number))
        elif isinstance(action, CloseStream):
            open_ones = self.streams[node].items()
            self.streams[node] = {token: handle for token, handle in open_ones if handle.key != action.key}
        elif isinstance(action, Complain):
            self.complaints.append(action)

    def _send(self, node: str, peer: str, message: msgspec.Struct) -> None:
        self.links.setdefault((node, peer), deque()).append(message)

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

    def _to_decode(self, reader: Decode, message: Any) -> None:
        if isinstance(message, kv.KvFailed):
            self._forget(reader, message.key)
        elif isinstance(message, kv.KvGrant) and message.key in reader.pulls:
            reader.copies.append(message)
