"""One run: for each dtype and number of threads every point, the machine itself and the systems taking turns.

Turns, because a machine's speed drifts: what is compared was measured within seconds of each other. A point's
figure is the median over all its rounds. What the machine can do is measured before and behind each turn, and a
round's fraction of the limit is that of the two together; the median of the rounds counts there, too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median

from dsbench.machine import Machine
from dsbench.peer import Peer, PeerFailed
from dsbench.points import Measured, Point
from dsbench.roofline import Kernels, kernels
from dsengine.architecture import Architecture

#: that the machine reads, and that it multiplies, in one round
BARE_S = 0.1
#: tells people what happens now
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    model: Path
    arch: Architecture
    #: system -> the Python that has it
    systems: dict[str, str]
    rounds: int
    #: of one system in one round
    round_s: float
    #: a system's rounds of one point end early after this
    point_s: float


def run_block(plan: Plan, python: str, points: Sequence[Point], tell: Tell) -> Iterator[list[Measured]]:
    """All ``points``, which agree in dtype and threads; the results of one point at a time.

    ``python``: that measures the machine. Raises :class:`PeerFailed` where it cannot.
    """
    first = points[0]
    with contextlib.ExitStack() as stack:
        bare = Peer("machine", python, plan.model, first.dtype, first.threads, 0)
        stack.callback(bare.close)
        peers = []
        for system, python in plan.systems.items():
            tell(f"{system}: loading, {first.dtype}, {first.threads} threads")
            with _told(tell):
                peer = Peer(system, python, plan.model, first.dtype, first.threads, _room(points))
                stack.callback(peer.close)
                peers.append(peer)
                tell(f"{system}: loaded in {peer.loaded.load_seconds:.1f} s")
        for point in points:
            yield _measure(plan, _Bare(bare), point, peers, tell)


def _measure(plan: Plan, bare: _Bare, point: Point, peers: Sequence[Peer], tell: Tell) -> list[Measured]:
    taken = [_Taken(peer, point) for peer in peers]
    for one in taken:
        tell(f"{one.peer.system}: {point.phase}, batch {point.batch}, {point.context} tokens")
        with one.told(tell):
            one.peer.prepare_point(point)
    for _ in range(plan.rounds):
        before = bare.machine()
        for one in taken:
            if one.reason is None and sum(one.seconds) <= plan.point_s:
                with one.told(tell):
                    one.measure(plan.round_s)
                behind = bare.machine()
                one.machines.append(between(before, behind))
                before = behind
    needed = kernels(plan.arch, point)
    return [one.measured(needed) for one in taken]


class _Bare:
    """What the machine can do by itself."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def machine(self) -> Machine:
        """Now. Raises :class:`PeerFailed`."""
        return Machine(self._best("read"), self._best("product"))

    def _best(self, phase: str) -> float:
        self._peer.prepare(phase)
        return 1 / min(self._peer.measure(BARE_S))


def between(before: Machine, behind: Machine) -> Machine:
    """One that was half of the time like either."""
    return Machine(*(2 / (1 / a + 1 / b) for a, b in zip(astuple(before), astuple(behind), strict=True)))


class _Taken:
    """One system's steps at one point."""

    def __init__(self, peer: Peer, point: Point) -> None:
        self.peer = peer
        self.seconds: list[float] = []
        #: the median of each round, and what the machine could do then
        self._rounds: list[float] = []
        self.machines: list[Machine] = []
        #: why no more of them come
        self.reason: str | None = None
        self._point = point
        self._inside: float | None = None

    @contextlib.contextmanager
    def told(self, tell: Tell) -> Iterator[None]:
        """What goes wrong inside is the reason."""
        try:
            yield
        except PeerFailed as error:
            self.reason = str(error)
            tell(self.reason)

    def measure(self, for_s: float) -> None:
        """Steps of one round. Raises :class:`PeerFailed`."""
        seconds = self.peer.measure(for_s)
        self.seconds.extend(seconds)
        self._rounds.append(median(seconds))
        if self.peer.kernel_s is not None:
            self._inside = (self._inside or 0.0) + self.peer.kernel_s

    def measured(self, needed: Kernels) -> Measured:
        """The median of them beside the limits; no figure where there are none, or where it cannot be one."""
        peer, middle = self.peer, median(self.seconds or [math.nan])
        machine = None
        if self.machines:
            machine = Machine(*(median(each) for each in zip(*map(astuple, self.machines), strict=True)))
        if not self.seconds or not 0 < middle < math.inf:
            reason = self.reason or f"{peer.system} gave {middle:.3g} s for a step"
            return Measured(peer.system, self._point, None, machine, loaded=peer.loaded, reason=reason)
        return Measured(
            peer.system,
            self._point,
            middle,
            machine,
            self._fraction(needed.whole.seconds),
            None if self._inside is None else 1 - self._inside / sum(self.seconds),
            peer.loaded,
            in_turn_fraction=self._fraction(needed.seconds_in_turn),
        )

    def _fraction(self, least_s: Callable[[Machine], float]) -> float:
        # the last round has no steps where something went wrong in it
        rounds = zip(self.machines, self._rounds, strict=False)
        return median(least_s(machine) / seconds for machine, seconds in rounds)


def _room(points: Sequence[Point]) -> int:
    """Tokens that a cache must hold for the largest of ``points``, in whole blocks of any usual size."""
    return max(point.batch * (point.context + 32) for point in points)


@contextlib.contextmanager
def _told(tell: Tell) -> Iterator[None]:
    try:
        yield
    except PeerFailed as error:
        tell(str(error))
