"""Connections as ZeroMQ keeps them, under a virtual clock: a DEALER that connects, a ROUTER that is bound.

- In order in each direction, after a small seeded delay.
- What is on its way to a process that dies is lost. A dealer queues while its peer is away; a bound socket cannot
  send to a peer that is away.
- Two dealers of one identity take the connection from each other, each coming back after ``RECONNECT_S``.
- A cut shorter than ``BREAK_S`` delays messages, as TCP does; a longer one breaks the connection and loses them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Protocol

import msgspec

from support.virtual_clock import VirtualClock

RECONNECT_S = 0.1
BREAK_S = 6.0


class Endpoint(Protocol):
    """A process, or a client."""

    name: str
    alive: bool
    #: as a bound side: who is connected, by this side's name for it
    peers: dict[str, Wire]

    def take(self, peer: str, message: msgspec.Struct) -> None:
        """A message has come."""


@dataclass(eq=False)
class Wire:
    """One dealer's connection."""

    dealer: Endpoint
    #: the dealer's name for the other side
    outward: str
    #: name of the bound process, whichever incarnation
    bound: str
    #: the bound side's name for the dealer
    inward: str
    connected_to: Endpoint | None = None
    #: changes whenever the connection breaks: what was on its way then is lost
    session: int = 0
    #: queued at the dealer while there is no connection
    pending: deque[msgspec.Struct] = field(default_factory=deque)
    #: held back by a cut: (to the bound side?, message)
    held: list[tuple[bool, msgspec.Struct]] | None = None
    #: when the last message of each direction arrives
    last_in: float = 0.0
    last_out: float = 0.0


class Wires:
    """All connections."""

    def __init__(self, clock: VirtualClock, random: Random, find: Callable[[str], Endpoint | None]) -> None:
        """``find``: the live process of a name."""
        self._clock = clock
        self._random = random
        self._find = find
        self._all: list[Wire] = []

    def connect(self, dealer: Endpoint, outward: str, bound: str, inward: str) -> Wire:
        """Open a dealer's connection; it stands as soon as the other side is there."""
        wire = Wire(dealer, outward, bound, inward)
        self._all.append(wire)
        self._join(wire)
        return wire

    def to_bound(self, wire: Wire, message: msgspec.Struct) -> None:
        """Send or queue."""
        if wire.connected_to is None:
            wire.pending.append(message)
        elif wire.held is not None:
            wire.held.append((True, message))
        else:
            self._schedule(wire, True, message)

    def to_dealer(self, sender: Endpoint, peer: str, message: msgspec.Struct) -> bool:
        """Send; False when the peer is away."""
        wire = sender.peers.get(peer)
        if wire is None:
            return False
        if wire.held is not None:
            wire.held.append((False, message))
        else:
            self._schedule(wire, False, message)
        return True

    def died(self, endpoint: Endpoint) -> None:
        """The process is gone: its own connections for ever, those to it until it is back."""
        for wire in [wire for wire in self._all if wire.dealer is endpoint]:
            self._break(wire)
            self._all.remove(wire)
        for wire in [wire for wire in self._all if wire.connected_to is endpoint]:
            self._break(wire)

    def started(self, name: str) -> None:
        """A bound process is back: dealers find it one after the other."""
        for wire in self._all:
            if wire.bound == name:
                self._clock.after(self._random.uniform(0.5, 1.5) * RECONNECT_S, partial(self._join, wire))

    def cut(self, one: str, other: str, seconds: float) -> None:
        """Nothing gets through between two processes for a while."""
        for wire in self._all:
            if {wire.dealer.name, wire.bound} == {one, other} and wire.held is None:
                wire.held = []
                self._clock.after(BREAK_S, partial(self._give_up, wire, wire.held))
                self._clock.after(seconds, partial(self._heal, wire))

    def reset(self, one: str, other: str) -> None:
        """The connections between two processes break and heal at once: what was on its way is lost, unnoticed."""
        for wire in self._all:
            if {wire.dealer.name, wire.bound} == {one, other} and wire.connected_to is not None:
                self._break(wire)
                self._join(wire)

    def _give_up(self, wire: Wire, cut: list[tuple[bool, msgspec.Struct]]) -> None:
        if wire.held is cut:
            wire.held = []
            self._break(wire)

    def _heal(self, wire: Wire) -> None:
        held, wire.held = wire.held or [], None
        if wire.connected_to is None:
            self._join(wire)
        for inbound, message in held:
            self._schedule(wire, inbound, message)

    def _join(self, wire: Wire) -> None:
        bound = self._find(wire.bound)
        if wire not in self._all or wire.connected_to is not None or wire.held is not None or bound is None:
            return
        rival = bound.peers.get(wire.inward)
        if rival is not None:
            self._break(rival)
            self._clock.after(RECONNECT_S, partial(self._join, rival))
        wire.connected_to = bound
        bound.peers[wire.inward] = wire
        while wire.pending:
            self._schedule(wire, True, wire.pending.popleft())

    def _break(self, wire: Wire) -> None:
        wire.session += 1
        if wire.held is not None:
            wire.held.clear()
        if wire.connected_to is not None and wire.connected_to.peers.get(wire.inward) is wire:
            del wire.connected_to.peers[wire.inward]
        wire.connected_to = None

    def _schedule(self, wire: Wire, inbound: bool, message: msgspec.Struct) -> None:
        when = self._clock.now + self._random.uniform(0.0002, 0.002)
        if inbound:
            when = wire.last_in = max(when, wire.last_in)
        else:
            when = wire.last_out = max(when, wire.last_out)
        session, bound = wire.session, wire.connected_to
        assert bound is not None
        taker, peer = (bound, wire.inward) if inbound else (wire.dealer, wire.outward)

        def deliver() -> None:
            if wire.session == session and taker.alive:
                taker.take(peer, message)

        self._clock.at(when, deliver)
