"""The rank hosts of an instance, which run its ranks on other nodes: who has joined, and what they and it are told.

They connect to the process of the instance and say hello. Once all have, the instance begins, and needs each of
them, over that very connection, until its end: the loss of one is a loss of its ranks. A host that says hello twice
has lost them. What is sent to one that is gone fails at the next ping at the latest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Condition

import msgspec
from zmq.auth.thread import ThreadAuthenticator

from dsengine.configs import form_of
from dsengine.rank_orders import (
    BEAT_S,
    LOAD_S,
    RankCopy,
    RankMeet,
    RankPages,
    RankPull,
    RankStep,
    RankSum,
    Report,
    StageOrder,
    Wiring,
)
from dskv.stream import SECRET_NBYTES
from dstopology.resolved import Instance, RankHost, Topology
from dstopology.wiring import system_keys
from dswire.codec import Decoder, encode
from dswire.errors import DsError, EngineFailed, ModelMismatch, ProtocolError, StartFailed, VersionMismatch
from dswire.keys import start_authenticator
from dswire.messages import PROTOCOL
from dswire.messages.ranks import (
    FromHost,
    HostCopy,
    HostHello,
    HostMeet,
    HostPages,
    HostPing,
    HostPull,
    HostRefused,
    HostStart,
    HostStep,
    HostSum,
    RankReported,
)
from dswire.messages.worker import ModelIdentity
from dswire.sockets import BoundSocket, PeerUnreachable

_log = logging.getLogger(__name__)

#: what takes the reports of a rank
Taker = Callable[[Report], None]


@dataclass(frozen=True, slots=True)
class _Joined:
    """A host that is there."""

    #: of its connection
    peer: str
    link: str


class RankHosts:
    """They live on the event loop in which this is made; its methods are for other threads."""

    def __init__(self, topology: Topology, instance: Instance, model: ModelIdentity, blocks: int) -> None:
        """Listen; ``blocks``: of the instance's KV pool. Raises :class:`PortInUse` or :class:`StartFailed`."""
        node = topology.node(instance.node)
        self._loop = asyncio.get_running_loop()
        self._name = instance.name
        self._model, self._form, self._blocks = model, form_of(topology, instance), blocks
        self._hosts = {host.name: host for host in instance.hosts}
        self._ranks = {host.name: instance.ranks_on(host.node) for host in instance.hosts}
        encrypted = topology.security.encrypted
        #: of all ranks of the instance, those of its own node included
        self.wiring = Wiring(node.bind_host, node.host, secrets.token_bytes(SECRET_NBYTES) if encrypted else b"")
        self._decoder: Decoder[msgspec.Struct] = Decoder(FromHost)
        self._joined: dict[str, _Joined] = {}
        self._changed = Condition()
        #: of all ranks on other nodes, once it has begun
        self._takers: Mapping[int, Taker] | None = None
        assert instance.join_bind is not None
        with contextlib.ExitStack() as stack:
            self._authenticator: ThreadAuthenticator | None = None
            if encrypted:
                self._authenticator = start_authenticator(topology.security.keys_dir, clients=False)
                stack.callback(self._authenticator.stop)
            self._socket = BoundSocket(instance.join_bind, keys=system_keys(topology))
            stack.pop_all()
        self._socket.start(self._received)
        self._pings = self._loop.call_later(BEAT_S, self._ping)

    @property
    def ranks(self) -> frozenset[int]:
        """Those on other nodes."""
        return frozenset(rank for ranks in self._ranks.values() for rank in ranks)

    def begin(self, takers: Mapping[int, Taker]) -> None:
        """Wait until all are there, and have them start their ranks, whose reports go to ``takers``.

        Raises :class:`StartFailed` when they do not all come.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._joined) == len(self._hosts), LOAD_S):
                missing = [host for name, host in self._hosts.items() if name not in self._joined]
                raise StartFailed(_missing(self._name, missing), remedy=_REMEDY)
            self._takers = takers
        for name in self._hosts:
            self._soon(name, lambda link: HostStart(link, self._blocks, self.wiring.secret))

    def meet(self, rank: int, meet: RankMeet) -> None:
        """Tell a rank where the one of the next stage is."""
        self._soon(self._host_of(rank), lambda link: HostMeet(link, rank, meet.where))

    def step(self, step: RankStep) -> None:
        """Tell all of a step."""
        for name in self._hosts:
            self._soon(name, lambda link: HostStep(link, step.spans, step.picked))

    def copy(self, copy: RankCopy) -> None:
        """Tell all of a copy."""
        for name in self._hosts:
            self._soon(name, lambda link: HostCopy(link, copy.blocks, copy.way))

    def beside(self, rank: int, order: StageOrder) -> None:
        """Have a rank do something with the KV of its stage."""
        self._soon(self._host_of(rank), lambda link: _for_host(link, rank, order))

    def close(self) -> None:
        """Leave them, which ends their ranks. Doing it twice is harmless."""
        if asyncio._get_running_loop() is self._loop:
            self._close()
        else:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._close)

    def _host_of(self, rank: int) -> str:
        return next(name for name, ranks in self._ranks.items() if rank in ranks)

    # the event loop

    def _close(self) -> None:
        self._pings.cancel()
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    def _soon(self, name: str, make: Callable[[str], msgspec.Struct]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is this
            self._loop.call_soon_threadsafe(self._send, name, make)

    def _send(self, name: str, make: Callable[[str], msgspec.Struct]) -> None:
        host = self._joined.get(name)
        if host is None:
            return
        try:
            self._socket.send(host.peer, [encode(make(host.link))])
        except PeerUnreachable:
            self._gone(name, "is not reached any more")

    def _received(self, peer: str, frames: list[bytes]) -> None:
        try:
            message = self._decoder.decode(b"".join(frames))
        except ProtocolError as error:
            _log.warning("unreadable message from a rank host: %s", ascii(error.message))
            return
        if isinstance(message, HostHello):
            self._hello(peer, message)
            return
        assert isinstance(message, RankReported)
        self._said(peer, message)

    def _said(self, peer: str, said: RankReported) -> None:
        link = next((host.link for host in self._joined.values() if host.peer == peer), None)
        if self._takers is not None and said.link == link and said.rank in self._takers:
            self._takers[said.rank](Report(said.state, said.error, said.where, said.checksum))

    def _hello(self, peer: str, hello: HostHello) -> None:
        error = self._refusal(hello)
        if error is not None:
            _log.warning("refused %s: %s", ascii(hello.name), error)
            with contextlib.suppress(PeerUnreachable):
                self._socket.send(peer, [encode(HostRefused(error.info()))])
            return
        if self._takers is not None:
            self._gone(hello.name, "was started again")
            return
        _log.info("%s has joined", hello.name)
        with self._changed:
            self._joined[hello.name] = _Joined(peer, hello.link)
            self._changed.notify_all()

    def _refusal(self, hello: HostHello) -> DsError | None:
        if hello.protocol != PROTOCOL:
            return VersionMismatch(f"{hello.name} speaks protocol {hello.protocol}, {self._name} {PROTOCOL}")
        if hello.name not in self._hosts or hello.form != self._form:
            told = f"{hello.name} and {self._name} do not read the same topology"
            return ModelMismatch(told, remedy="start all processes from the same file")
        if hello.model != self._model:
            return ModelMismatch(f"{hello.name} has {hello.model}, {self._name} has {self._model}")
        return None

    def _ping(self) -> None:
        for name in list(self._joined):
            self._send(name, lambda _: HostPing())
        self._pings = self._loop.call_later(BEAT_S, self._ping)

    def _gone(self, name: str, how: str) -> None:
        with self._changed:
            self._joined.pop(name, None)
        if self._takers is None:
            return
        told = f"{name}, which runs ranks of {self._name}, {how}"
        error = EngineFailed(told, remedy=f"`dsctl logs {name}` on its host tells more")
        for rank in self._ranks[name]:
            self._takers[rank](Report("failed", error.info()))


def _for_host(link: str, rank: int, order: StageOrder) -> msgspec.Struct:
    match order:
        case RankPages(key, blocks):
            return HostPages(link, rank, key, blocks)
        case RankSum(blocks):
            return HostSum(link, rank, blocks)
        case RankPull(handle, blocks, summed):
            return HostPull(link, rank, handle, blocks, summed)


_REMEDY = "start the nodes' processes with `dsctl up --node`, from the same topology and with the same keys"


def _missing(name: str, hosts: Sequence[RankHost]) -> str:
    told = ", ".join(f"{host.name} on {host.node}" for host in hosts)
    return f"the rank hosts of {name} did not all join within {LOAD_S:g} s: {told}"
