"""A topology that is measured and foretold: what is found of it first, and the loads in rounds.

Two rules: a prediction knows nothing of the loads that it foretells but their arrivals; what else it knows is from
reference loads with other arrivals, before and after the round. And all rates are measured in alternating rounds,
since a machine that others share has bad minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median

import uvloop
from rich.console import Console

from dsbench import compared, noise
from dsbench.compared import Compared
from dsbench.contention import Factors, find
from dsbench.disturbance import Watch
from dsbench.load import Load
from dsbench.noise import Noise
from dsbench.predict import Known, Prediction
from dsbench.probe import Constants, Seen, constants, messages, probe
from dsbench.rounds import Load as Taken
from dsbench.rounds import Tried, Turn, in_a_row, pooled, turns, undisturbed
from dsbench.serve import Measurement, measure
from dsbench.started import started
from dsclient import AsyncClient
from dsctl.asking import Target, find_target
from dsctl.supervise.rundir import RunDir
from dsplan.profile import check_topology
from dssim.model import layout_of
from dssim.records import Record
from dssim.times import LinearTimes, linear_times
from dssim.wish import Wish, make
from dstopology.resolved import Slo, Topology

#: rates of the runs, in parts of the rate at which the objectives are just met
FACTORS = (0.5, 0.8, 1.0, 1.2, 1.5)
#: ... and the part of it at which the machine is looked at
BUSY = 0.9
#: a rate is measured for so many requests, all rounds together, however long that takes
LEAST_REQUESTS = 30
#: simulations of each load, which differ by chance alone
DRAWS = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """How it is measured."""

    rounds: int
    #: before each load
    warmup_s: float
    #: see :class:`dsbench.disturbance.Disturbance`; the loads that exceed it are repeated so many times
    bound: float
    repeats: int


#: the try that counts, how many were made, and whether even that one was disturbed beyond the bound
Tries = tuple[Tried, int, bool]


@dataclass(frozen=True, slots=True)
class Reference:
    """A load that tells of the machine."""

    wish: Wish
    records: Sequence[Record]


@dataclass(frozen=True, slots=True)
class Calibration:
    """One topology."""

    topology: Topology
    #: of the engine alone
    profile: Path
    slo: Slo
    #: ``until_s``: of each rate, all rounds together
    wish: Wish
    plan: Plan
    console: Console

    @property
    def mine(self) -> Path:
        """The profile with what was found beyond the engine."""
        return self.profile.with_suffix(f".{self.topology.path.stem}.json")

    @property
    def prediction(self) -> Prediction:
        """By what is known so far."""
        return Prediction(self.topology, self.mine, self.slo)

    def rows(self, rates: Sequence[float] | None) -> Iterator[Compared]:
        """Start, probe, all rates in rounds between reference loads; then foretell; a row for each rate."""
        check_topology(self.profile, self.topology)
        with started(self.topology.path, self.console):
            target = find_target(self.topology.path, None, None)
            known = Known(self.profile, self.mine, self.probe(target))
            known.write()
            busy, knee, first = self.begin(known, target, median(rates) if rates else None)
            rates = rates or [knee * factor for factor in FACTORS]
            references = [first]
            tried: list[tuple[Turn, Tries]] = []
            for number, turns_of in groupby(
                turns(rates, self.plan.rounds, self.wish.seed), lambda turn: turn.round
            ):
                tried += [(turn, self.take(target, turn)) for turn in turns_of]
                references.append(self.reference(target, busy, number + 1))
        taken: list[Taken] = []
        for number, around in enumerate(pairwise(references)):
            self.learn(known, around)
            taken += [self.foretold(turn, *tries) for turn, tries in tried if turn.round == number]
        self.learn(known, references)
        for rate in rates:
            yield self.row(rate, [one for one in taken if one.turn.rate == rate])

    def begin(self, known: Known, target: Target, knee: float | None) -> tuple[float, float, Reference]:
        """The rate of the reference loads, the knee by what the first of them told, and that one.

        What was foretold before anything was seen may be more than the system holds, and a load that it does not
        hold says little of one that it does: then there is another one, once.
        """
        found = knee or self.knee()
        for _ in range(2):
            busy = BUSY * found
            self.console.print(f"{busy:.2f} requests/s before and after each round, to see how fast the machine is")
            first = self.reference(target, busy, 0)
            self.learn(known, [first])
            found = knee or self.knee()
            if busy <= found:
                break
        return busy, found, first

    def probe(self, target: Target) -> Constants:
        """What is needed beyond the engine."""
        decoding = len(self.topology.role("decode"))
        seen = _ask(target, self.console, decoding)
        found = constants(seen, _times(self.topology, self.profile), layout_of(self.topology))
        self.console.print(f"beyond the engine: {json.dumps(_rounded(found))}", soft_wrap=True)
        return found

    def reference(self, target: Target, rate: float, number: int) -> Reference:
        """How the system does with arrivals that are foretold to nobody."""
        wish = replace(self._at(rate), seed=self.wish.seed - 1 - number)
        tried, tries, _ = self._undisturbed(target, wish)
        self.console.print(f"reference {number + 1}: {compared.machine(tried, tries)}", highlight=False)
        return Reference(wish, tried.records)

    def learn(self, known: Known, references: Sequence[Reference]) -> None:
        """How much instances slow each other down, what messages cost, and what is left to chance."""
        measured = in_a_row(one.records for one in references)
        times = _times(self.topology, self.profile)

        def beside(factors: Factors) -> list[Record]:
            known.beside = factors
            return self._simulated(known, references, 1)

        def chance(found: Noise) -> list[Record]:
            known.noise = found
            return self._simulated(known, references, DRAWS)

        known.noise = {}
        if _neighbours(self.topology):
            known.beside = find(measured, beside, times)
            told = ", ".join(f"{phase} {factor:.2f}" for phase, factor in known.beside.items())
            self.console.print(f"a step beside others takes so many times as long: {told}")
        known.constants = replace(known.constants, transfer=known.constants.transfer | messages(measured))
        apart = self.topology.mode == "disaggregated"
        known.noise = noise.find(measured, chance, times, apart=apart)
        known.write()
        self.console.print(
            f"a step takes so many times as long as foretold, p10/p50/p90/p99: {noise.told(known.noise)}"
        )

    def knee(self) -> float:
        """The rate at which the objectives are just met, as predicted."""
        rate = self.prediction.knee(replace(self.wish, until_s=float("inf")))
        self.console.print(f"the objectives are predicted to hold up to {rate:.2f} requests/s")
        return rate

    def take(self, target: Target, turn: Turn) -> Tries:
        """One rate of a round: measured, and again where it was disturbed."""
        tries = self._undisturbed(target, self._of(turn))
        machine = compared.machine(*tries[:2])
        self.console.print(f"round {turn.round + 1}, {turn.rate:.2f}/s: {machine}", highlight=False, soft_wrap=True)
        return tries

    def foretold(self, turn: Turn, tried: Tried, tries: int, disturbed: bool) -> Taken:
        """The same, as it is to be by what is known now."""
        arrivals = make(self._of(turn))
        predicted = [self.prediction.records(arrivals, draw) for draw in range(DRAWS)]
        taken = Taken(turn, tried, tries, disturbed, predicted)
        self.console.print(compared.told(taken, self.slo, self.plan.warmup_s), highlight=False, soft_wrap=True)
        return taken

    def row(self, rate: float, taken: Sequence[Taken]) -> Compared:
        """All rounds of a rate."""
        late_s, warmup_s = max(one.tried.late_s for one in taken), self.plan.warmup_s
        runs = [run for one in taken for run in one.predicted]
        predicted = pooled(runs, self.slo, warmup_s, rate, 0.0)
        measured = pooled([one.tried.records for one in taken], self.slo, warmup_s, rate, late_s)
        return Compared(self.topology.path.stem, rate, predicted, measured, tuple(taken))

    def _simulated(self, known: Known, references: Sequence[Reference], draws: int) -> list[Record]:
        """What becomes of the references by what is known, so many times."""
        known.write()
        loads = [(make(one.wish), draw) for one in references for draw in range(draws)]
        return in_a_row(self.prediction.records(arrivals, draw) for arrivals, draw in loads)

    def _undisturbed(self, target: Target, wish: Wish) -> Tries:
        return undisturbed(lambda: self._try(target, wish), self.plan.bound, self.plan.repeats)

    def _try(self, target: Target, wish: Wish) -> Tried:
        watch = Watch(self._roots())
        load = Load(make(wish))
        _, sent = measure(Measurement(target, load, self.slo, self.plan.warmup_s, wish.rate or 0.0), self.console)
        return Tried(sent.records, watch.end(), sent.latest_s)

    def _roots(self) -> list[int]:
        holder = RunDir(self.topology.run_dir).holder()
        return [os.getpid()] if holder is None else [os.getpid(), holder.pid]

    def _of(self, turn: Turn) -> Wish:
        return replace(self._at(turn.rate), seed=self.wish.seed + turn.round)

    def _at(self, rate: float) -> Wish:
        """Of each of the rounds that a rate's time is cut into."""
        counted_s = max(self.wish.until_s, LEAST_REQUESTS / rate) / self.plan.rounds
        return replace(self.wish, rate=rate, until_s=self.plan.warmup_s + counted_s)


def _ask(target: Target, console: Console, decoding: int) -> Seen:
    async def ask() -> Seen:
        async with AsyncClient(target.address, keys=target.keys) as client:
            return await probe(client, console.print, decoding=decoding)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(ask())


def _neighbours(topology: Topology) -> bool:
    """Whether any node has more than one instance."""
    nodes = [one.node for one in topology.instances]
    return len(nodes) > len(set(nodes))


def _times(topology: Topology, profile: Path) -> LinearTimes:
    """Times by a profile: of the instances that read prompts, and of those that decode."""
    decode = linear_times(str(profile), topology.role("decode")[0].tp)
    reading = topology.role("prefill") or topology.role("decode")
    return replace(decode, prefill=linear_times(str(profile), reading[0].tp).prefill)


def _rounded(found: Constants) -> dict[str, object]:
    return {
        "message_ms": round(found.transfer["local_message_s"] * 1e3, 3),
        "client_ms": round(found.transfer["network_message_s"] * 1e3, 3),
        "steps_ms": {
            phase: {name.removesuffix("_ms"): round(value, 3) for name, value in parts.items()}
            for phase, parts in found.overhead.items()
        },
    }
