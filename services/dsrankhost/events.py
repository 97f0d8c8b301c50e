"""What goes in and out of the machine of a rank host, beside messages."""

from __future__ import annotations

from dataclasses import dataclass

from dsengine.rank_orders import RankCopy, RankMeet, RankStep, Report, StageOrder

# events


@dataclass(frozen=True, slots=True)
class Linked:
    """There is a connection to the instance, a new one."""

    now: float


@dataclass(frozen=True, slots=True)
class Unlinked:
    """The connection is gone."""

    now: float


@dataclass(frozen=True, slots=True)
class RankSaid:
    """A rank reports something."""

    now: float
    #: for which it was started
    link: str
    rank: int
    report: Report


# actions


@dataclass(frozen=True, slots=True)
class StartRanks:
    """Start all ranks, for a link."""

    link: str
    #: of the KV pool
    blocks: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class TellRank:
    """Give a rank an order."""

    rank: int
    order: RankMeet | RankStep | RankCopy | StageOrder


@dataclass(frozen=True, slots=True)
class EndRanks:
    """End all ranks, now."""
