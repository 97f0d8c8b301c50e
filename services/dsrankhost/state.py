"""The machine of a rank host: whose ranks run, and what goes to and fro between them and their instance. Pure.

Each connection to the instance is a link, with a name of its own. Invariants: ranks run for one link at a time,
and none for one that is gone; what comes in for another link is dropped, whoever says it.
"""

from __future__ import annotations

from typing import Any

from dsengine.rank_orders import RankCopy, RankMeet, RankPages, RankPull, RankStep, RankSum, StageOrder
from dsrankhost.config import HostConfig
from dsrankhost.events import EndRanks, Linked, RankSaid, StartRanks, TellRank, Unlinked
from dswire.links import End, Ready
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL
from dswire.messages.ranks import (
    HostCopy,
    HostHello,
    HostMeet,
    HostPages,
    HostPull,
    HostRefused,
    HostStart,
    HostStep,
    HostSum,
    RankReported,
)

#: the one peer
INSTANCE = "instance"


class HostState:
    """Events in, actions out."""

    def __init__(self, config: HostConfig) -> None:
        self.config = config
        #: of the connection that is there
        self.link: str | None = None
        #: whether there are ranks, all of that link
        self.running = False
        #: those of them that have loaded
        self.loaded: set[int] = set()
        self._links = 0

    def handle(self, event: Any) -> list[Any]:
        """Take one event; returns what is to be done, in order."""
        match event:
            case Linked():
                self._links += 1
                ended = self._unlinked()
                self.link = f"{self.config.incarnation}/{self._links}"
                return [*ended, Send(INSTANCE, self._hello(self.link))]
            case Unlinked() | PeerLost():
                return self._unlinked()
            case Received():
                return self._received(event.message)
            case RankSaid():
                return self._said(event)
            case Tick():
                return []
        raise TypeError(f"{event!r} is no event of a rank host")

    def next_deadline(self) -> float | None:
        """It waits for nothing but its instance."""
        return None

    def validate(self) -> None:
        """Check every invariant. Raises ``AssertionError``."""
        assert self.link is not None or not self.running, "ranks run for a link that is gone"
        assert self.running or not self.loaded, "what does not run has not loaded"
        assert self.loaded <= self.config.ranks

    def _hello(self, link: str) -> HostHello:
        config = self.config
        return HostHello(PROTOCOL, config.name, link, config.model, config.form)

    def _unlinked(self) -> list[Any]:
        self.link = None
        ended = [EndRanks()] if self.running else []
        self.running = False
        self.loaded.clear()
        return ended

    def _received(self, message: Any) -> list[Any]:
        match message:
            case HostRefused(error):
                return [End(error)]
            case HostStart() if message.link == self.link and not self.running:
                self.running = True
                return [StartRanks(message.link, message.blocks, message.secret)]
            case HostMeet() if self._mine(message.link) and message.rank in self.config.ranks:
                return [TellRank(message.rank, RankMeet(message.where))]
            case HostStep() if self._mine(message.link):
                step = RankStep(message.spans, message.picked)
                return [TellRank(rank, step) for rank in sorted(self.config.ranks)]
            case HostCopy() if self._mine(message.link):
                copy = RankCopy(message.blocks, message.way)
                return [TellRank(rank, copy) for rank in sorted(self.config.ranks)]
            case HostPages() | HostSum() | HostPull():
                if self._mine(message.link) and message.rank in self.config.ranks:
                    return [TellRank(message.rank, _order(message))]
        return []

    def _mine(self, link: str) -> bool:
        return self.running and link == self.link

    def _said(self, said: RankSaid) -> list[Any]:
        if not self._mine(said.link):
            return []
        report = said.report
        told = RankReported(said.link, said.rank, report.state, report.where, report.error, report.checksum)
        actions: list[Any] = [Send(INSTANCE, told)]
        if report.state == "ready":
            self.loaded.add(said.rank)
            if self.loaded == self.config.ranks:
                actions.append(Ready())
        return actions


def _order(message: HostPages | HostSum | HostPull) -> StageOrder:
    match message:
        case HostPages():
            return RankPages(message.key, message.blocks)
        case HostSum():
            return RankSum(message.blocks)
        case HostPull():
            return RankPull(message.handle, message.blocks, message.summed)
