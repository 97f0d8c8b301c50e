"""One run: for each dtype and number of threads the machine, then every point, the systems taking turns.

Turns, because a machine's speed drifts: what is compared was measured within seconds of each other. A point's
figure is the median over all its rounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dsbench.peer import Peer, PeerFailed
from dsbench.points import Measured, Point
from dsbench.roofline import Machine, work
from dsengine.architecture import Architecture

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


def measure_machine(plan: Plan, python: str, dtype: str, threads: int) -> Machine:
    """Bandwidth and peak, each the best of some seconds. Raises :class:`PeerFailed`."""
    peer = Peer("machine", python, plan.model, dtype, threads, 0)
    try:
        best = []
        for phase in ("read", "product"):
            peer.prepare(phase)
            best.append(min(peer.measure(1.0)))
        return Machine(1 / best[0], 1 / best[1])
    finally:
        peer.close()


def run_block(plan: Plan, machine: Machine, points: Sequence[Point], tell: Tell) -> Iterator[list[Measured]]:
    """All ``points``, which agree in dtype and threads; the results of one point at a time."""
    first = points[0]
    with contextlib.ExitStack() as stack:
        peers = []
        for system, python in plan.systems.items():
            tell(f"{system}: loading, {first.dtype}, {first.threads} threads")
            with _told(tell):
                peer = Peer(system, python, plan.model, first.dtype, first.threads, _room(points))
                stack.callback(peer.close)
                peers.append(peer)
                tell(f"{system}: loaded in {peer.loaded.load_seconds:.1f} s")
        for point in points:
            yield _measure(plan, machine, point, peers, tell)


def _measure(plan: Plan, machine: Machine, point: Point, peers: Sequence[Peer], tell: Tell) -> list[Measured]:
    ready: list[Peer] = []
    for peer in peers:
        tell(f"{peer.system}: {point.phase}, batch {point.batch}, {point.context} tokens")
        with _told(tell):
            peer.prepare_point(point)
            ready.append(peer)
    taken: dict[str, list[float]] = {peer.system: [] for peer in ready}
    inside: dict[str, float] = {}
    for _ in range(plan.rounds):
        for peer in list(ready):
            if sum(taken[peer.system]) > plan.point_s:
                continue
            try:
                taken[peer.system].extend(peer.measure(plan.round_s))
                if peer.kernel_s is not None:
                    inside[peer.system] = inside.get(peer.system, 0.0) + peer.kernel_s
            except PeerFailed as error:
                tell(str(error))
                ready.remove(peer)
    least = work(plan.arch, point).seconds(machine)
    made = []
    for peer in peers:
        if seconds := taken.get(peer.system):
            outside = _outside(seconds, inside.get(peer.system))
            middle = median(seconds)
            made.append(Measured(peer.system, point, middle, least / middle, outside, peer.loaded))
    return made


def _outside(seconds: Sequence[float], inside_s: float | None) -> float | None:
    return None if inside_s is None else 1 - inside_s / sum(seconds)


def _room(points: Sequence[Point]) -> int:
    """Tokens that a cache must hold for the largest of ``points``, in whole blocks of any usual size."""
    return max(point.batch * (point.context + 32) for point in points)


@contextlib.contextmanager
def _told(tell: Tell) -> Iterator[None]:
    try:
        yield
    except PeerFailed as error:
        tell(str(error))
