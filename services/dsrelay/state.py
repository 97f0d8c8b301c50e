"""The relay machine: takes each message to the part that it concerns.

The parts: ``registry`` (who is known), ``ledger`` (handles offered on this node), ``direct`` (readers of this
node that copy straight from the owner), ``outgoing`` and ``incoming`` (streams between nodes), ``keeper``
(copies of what was handed over, whose owner is the relay itself). All write their actions to one list, in order.
KV that stays on the node but must go by TCP leaves by ``outgoing`` and comes back by ``incoming``, the relay being
its own peer.
"""

from __future__ import annotations

import msgspec

from dskv.handle import KvKey
from dsrelay.config import RelayConfig
from dsrelay.direct import DirectReaders
from dsrelay.events import (
    FETCHER,
    RELAY,
    ROUTER,
    WORKER,
    Action,
    Complain,
    Event,
    KeptCopied,
    OpenProof,
    PoolProved,
    StreamProved,
)
from dsrelay.incoming import IncomingTransfers
from dsrelay.keeper import Keeper
from dsrelay.ledger import MAX_LISTED, Ask, CancelResult, Ledger
from dsrelay.meetings import Meetings
from dsrelay.outgoing import OutgoingTransfers
from dsrelay.paths import Paths
from dsrelay.registry import Fetchers, Workers
from dswire.errors import ProtocolError, TransferFailed
from dswire.links import End, Link, Links, Ready
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL, kv, worker


class RelayState:
    """Events in, actions out."""

    def __init__(self, config: RelayConfig) -> None:
        self.config = config
        self._out: list[Action] = []
        self.links = Links(self._router_hello, self._relay_hello, self._load, relayed=False)
        # a transfer that stands still holds blocks: no longer than a lease
        timeout_s = min(config.transfer_timeout_s, config.lease_s)
        self.workers = Workers(config.lease_s, self._out)
        self.fetchers = Fetchers()
        self.ledger = Ledger(config.node, config.lease_s, self._out, self._tell)
        self.ledger.successor = self.keeper = Keeper(
            config.name, config.node, config.keep, config.keep_nbytes, self.ledger, config.lease_s, self._out
        )
        self.direct = DirectReaders(self._out)
        self.paths = Paths(self._out, config.collective)
        self.meetings = Meetings(self._out)
        collective = bool(config.collective)
        self.outgoing = OutgoingTransfers(
            self.ledger, self._out, self._tell, lambda owner: not collective or owner == config.name
        )
        self.incoming = IncomingTransfers(
            config.sources, timeout_s, config.lease_s, self._out, collective=collective
        )
        self._begun = False

    # the machine's interface

    def handle(self, event: Event) -> list[Action]:
        """Take one event."""
        self._begin(event.now)
        match event:
            case Received(now, peer, message):
                self._received(now, peer, message)
            case StreamProved(source=source, bytes_per_s=rate, error=error):
                self.paths.streamed(source, rate, error)
            case PoolProved(owner=owner, bytes_per_s=rate, error=error):
                self.paths.mapped(owner, rate, error)
            case KeptCopied(now, key, error):
                self.keeper.copied(now, key, error)
            case Tick(now):
                self._tick(now)
            case PeerLost(now, peer):
                self._peer_lost(now, peer)
        self.links.count(self._out)
        actions = self._out[:]
        self._out.clear()
        return actions

    def next_deadline(self) -> float | None:
        """The earliest deadline of any part."""
        parts = (self.workers, self.ledger, self.keeper, self.incoming)
        deadlines = [self.links.deadline(), *(part.next_deadline() for part in parts)]
        return min((at for at in deadlines if at is not None), default=None)

    def validate(self) -> None:
        """Every part, and that each reader of a handle is one that some part still knows."""
        self.ledger.validate()
        self.keeper.validate()
        self.outgoing.validate()
        self.incoming.validate()
        for key, one in self.ledger.handles.items():
            assert one.handle.owner == self.config.name or WORKER + one.handle.owner in self.workers.known
            if one.reader == self.config.name:
                assert self.keeper.kept[key].copying
            elif one.reader is not None and one.reader.startswith(FETCHER):
                assert key in self.outgoing.transfers
            elif one.reader is not None:
                assert one.reader in self.workers.known
        assert all(one.reader in self.workers.known for one in self.incoming.transfers.values())

    # messages

    def _received(self, now: float, peer: str, message: msgspec.Struct) -> None:
        if isinstance(message, kv.KvList):
            self._out.append(Send(peer, self._listing(now)))
        elif peer == ROUTER:
            self._from_router(now, message)
        elif peer.startswith(FETCHER):
            self._from_fetcher(now, peer, message)
        elif peer.startswith(RELAY):
            self._from_source(now, peer, message)
        elif isinstance(message, kv.KvHello):
            self._hello(now, peer, message)
        elif self.workers.heard(now, peer):
            self._from_worker(now, peer, message)
        else:
            self._out.append(Send(peer, worker.HelloWanted()))

    def _from_router(self, now: float, message: msgspec.Struct) -> None:
        linked = self.links.take(now, ROUTER, message)
        if linked is not None:
            self._linked(now, *linked)
            return
        match message:
            case worker.KvReoffer(kept=kept, key=key):
                handle = self.keeper.reoffer(now, kept, key)
                self._out.append(Send(ROUTER, worker.KvSealed(handle) if handle else worker.Preempted(key)))
            case worker.KvWanted(kept=keys):
                self.keeper.wanted(now, keys)
            case worker.Abort(key=key):
                self.keeper.aborted(now, key)
            case _:
                self._out.append(Complain(ROUTER, _unexpected(message)))

    def _linked(self, now: float, sends: list[Send], links: list[Link]) -> None:
        self._out += sends
        if self.links.refused is not None:
            self._out.append(End(self.links.refused))
        for link in links:
            if link is Link.ROUTER_JOINED:
                self._out.append(Ready())
            else:
                self.keeper.forget_all(now)

    def _from_worker(self, now: float, peer: str, message: msgspec.Struct) -> None:
        match message:
            case kv.KvPong():
                pass
            case kv.KvOffer(handle=handle, lease_s=lease_s):
                self.ledger.offer(now, peer.removeprefix(WORKER), handle, lease_s)
            case kv.KvWithdraw(key=key):
                result = self.ledger.withdraw(now, peer.removeprefix(WORKER), key)
                self._out.append(Send(peer, kv.KvCancelled(key, result)))
            case kv.KvSending():
                self.outgoing.sending(now, peer.removeprefix(WORKER), message)
            case kv.KvMeeting():
                self.meetings.answered(peer, message)
            case kv.KvHeld(key=key):
                self.ledger.held(peer.removeprefix(WORKER), key)
            case _:
                self._from_reader(now, peer, message)

    def _from_reader(self, now: float, peer: str, message: msgspec.Struct) -> None:
        match message:
            case kv.KvPull(handle=handle):
                self._extend(now, peer, ((handle.key, handle.node),))
                if handle.node == self.config.node and self.config.direct:
                    self.ledger.ask(now, Ask(peer, handle.key, self.direct, handle))
                else:
                    self.incoming.pull(now, peer, handle, self.workers.name_of(peer))
            case kv.KvPulled(key=key, error=error):
                if not self.incoming.ended(now, peer, key, error):
                    self.ledger.ended(now, peer, key, "pulled" if error is None else "lost")
            case kv.KvTried():
                self.paths.tried(peer, message)
            case kv.KvAgain(key=key):
                self._again(now, peer, key)
            case kv.KvAbort(key=key):
                if self.incoming.abort(now, peer, key):
                    result: CancelResult = "freed"
                else:
                    result = self.ledger.ended(now, peer, key, "aborted")
                self._out.append(Send(peer, kv.KvCancelled(key, result)))
            case kv.KvExtend(wanted=wanted):
                self._extend(now, peer, wanted)
            case _:
                self._out.append(Complain(peer, _unexpected(message)))

    def _again(self, now: float, peer: str, key: KvKey) -> None:
        if self.incoming.again(now, peer, key):
            return
        if self.ledger.again(peer, key):
            self._out.append(Send(peer, kv.KvGrant(key)))
        else:
            error = TransferFailed(f"the KV of {key} is not there to be read once more")
            self._out.append(Send(peer, kv.KvFailed(key, error.info())))

    def _from_fetcher(self, now: float, peer: str, message: msgspec.Struct) -> None:
        if isinstance(message, kv.RelayHello):
            if self.fetchers.join(peer, message):
                self._fetcher_lost(now, peer)
        elif peer not in self.fetchers.known:
            refusal = self.fetchers.refused.get(peer)
            if refusal is None:
                self._out.append(Send(peer, worker.HelloWanted()))
            elif isinstance(message, kv.KvFetch):
                self._out.append(Send(peer, kv.KvFetchFailed(message.key, refusal, message.number)))
        else:
            self._fetch_message(now, peer, message)

    def _fetch_message(self, now: float, peer: str, message: msgspec.Struct) -> None:
        match message:
            case kv.KvFetch():
                self.outgoing.fetch(now, peer, message)
            case kv.KvFetched():
                self.outgoing.ended(now, peer, message)
            case kv.KvProbe(reader=""):
                self._out.append(OpenProof(peer))
            case kv.KvProbe(reader=reader):
                self.meetings.want(peer, reader)
            case kv.KvExtend(wanted=wanted):
                for key, node in wanted:
                    if node == self.config.node:
                        self.ledger.extend(now, key)
            case _:
                self._out.append(Complain(peer, _unexpected(message)))

    def _from_source(self, now: float, peer: str, message: msgspec.Struct) -> None:
        match message:
            case worker.HelloWanted():
                self._greet(peer.removeprefix(RELAY))
                self.incoming.source_restarted(now, peer)
            case kv.KvFetchGranted():
                self.incoming.granted(now, peer, message)
            case kv.KvFetchFailed():
                self.incoming.source_failed(now, peer, message)
            case kv.KvProof():
                self.paths.answered(peer.removeprefix(RELAY), message)
            case kv.KvMet():
                self.paths.met(peer.removeprefix(RELAY), message)
            case _:
                self._out.append(Complain(peer, _unexpected(message)))

    def _extend(self, now: float, reader: str, wanted: tuple[tuple[KvKey, str], ...]) -> None:
        elsewhere: dict[str, list[tuple[KvKey, str]]] = {}
        for key, node in wanted:
            self.incoming.extend(now, reader, key)
            if node == self.config.node:
                self.ledger.extend(now, key)
            elif node in self.config.sources:
                elsewhere.setdefault(node, []).append((key, node))
        self._out += [Send(RELAY + node, kv.KvExtend(tuple(some))) for node, some in elsewhere.items()]

    # comings and goings

    def _begin(self, now: float) -> None:
        if not self._begun:
            self._begun = True
            self._out += self.links.begin(now)
            for node in self.config.sources:
                self._greet(node)

    def _greet(self, node: str) -> None:
        self._out.append(Send(RELAY + node, self._relay_hello()))
        if self.config.prove:
            self.paths.ask(node)

    def _hello(self, now: float, peer: str, hello: kv.KvHello) -> None:
        error = self.workers.refusal(peer, hello)
        if hello.name == self.config.name:
            error = ProtocolError(f"{hello.name} is this relay")
        if error is not None:
            self._out.append(Send(peer, kv.KvRefused(error.info())))
            return
        restarted = self.workers.join(now, peer, hello.incarnation)
        # whoever says hello has forgotten what it read; what it offered it offers again
        self._reader_lost(now, peer)
        if restarted:
            self.ledger.owner_lost(now, peer.removeprefix(WORKER))
        config = self.config
        welcome = kv.KvWelcome(config.name, config.incarnation, config.lease_s, config.verify, config.direct)
        self._out.append(Send(peer, welcome))
        if config.prove:
            self._prove(peer, hello.pool)

    def _prove(self, peer: str, pool: kv.PoolInfo | None) -> None:
        """Try the paths from this owner, or to this reader."""
        if pool is None:
            self.paths.welcome(peer)
        elif self.config.collective:
            self.meetings.welcome(peer)
        elif self.config.direct:
            self.paths.map(peer.removeprefix(WORKER), pool)

    def _worker_lost(self, now: float, peer: str) -> None:
        if self.workers.leave(peer):
            self._reader_lost(now, peer)
            self.ledger.owner_lost(now, peer.removeprefix(WORKER))
            self.paths.forget(peer)
            self.meetings.forget(peer)

    def _fetcher_lost(self, now: float, peer: str) -> None:
        self.outgoing.fetcher_lost(now, peer)
        self.meetings.forget(peer)

    def _reader_lost(self, now: float, peer: str) -> None:
        self.incoming.reader_lost(now, peer)
        self.ledger.reader_lost(now, peer)

    def _peer_lost(self, now: float, peer: str) -> None:
        if peer.startswith(WORKER):
            self._worker_lost(now, peer)
        elif peer.startswith(FETCHER):
            self.fetchers.leave(peer)
            self._fetcher_lost(now, peer)
        elif peer.startswith(RELAY):
            self.incoming.source_lost(now, peer)
            node = peer.removeprefix(RELAY)
            self.paths.lost(node, TransferFailed(f"the relay of node {node} cannot be reached").info())
        else:
            self._linked(now, *self.links.peer_lost(now, peer))

    def _tick(self, now: float) -> None:
        self._linked(now, *self.links.tick(now))
        self.keeper.tick(now)
        self.workers.tick(now, self._worker_lost)
        self.ledger.tick(now)
        self.incoming.tick(now)

    def _tell(self, owner: str, message: msgspec.Struct) -> None:
        """A message to the owner of a handle, which may be we."""
        if owner == self.config.name:
            self.keeper.told(message)
        else:
            self._out.append(Send(WORKER + owner, message))

    # what others are told of us

    def _router_hello(self) -> worker.WorkerHello:
        return worker.WorkerHello(PROTOCOL, self.config.name, "relay", self.config.node, self.config.incarnation)

    def _relay_hello(self) -> kv.RelayHello:
        return kv.RelayHello(PROTOCOL, self.config.name, self.config.incarnation)

    def _listing(self, now: float) -> kv.KvListing:
        config = self.config
        handles = (*self.ledger.listing(now), *self.keeper.listing(now))[:MAX_LISTED]
        return kv.KvListing(
            relay=config.name,
            node=config.node,
            handles=handles,
            left_off=len(self.ledger.handles) + self.keeper.idle - len(handles),
            streams=len(self.outgoing.transfers),
            paths=tuple(self.paths.known.values()),
        )

    def _load(self) -> worker.Load:
        waiting = sum(not one.granted for one in self.incoming.transfers.values())
        running = len(self.incoming.transfers) - waiting + len(self.outgoing.transfers)
        handles = self.ledger.counts()
        if self.keeper.idle:
            handles["kept"] = self.keeper.idle
        return worker.Load(waiting=waiting, running=running, handles=handles)


def _unexpected(message: msgspec.Struct) -> ProtocolError:
    return ProtocolError(f"{type(message).__name__} is not expected here")
