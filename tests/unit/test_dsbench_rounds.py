"""Rounds: each rate in each, the least disturbed try counts, and what a rate has of all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsbench.disturbance import TICK_S, Disturbance, Watch
from dsbench.rounds import Tried, in_a_row, pooled, turns, undisturbed
from dssim.records import Record
from dstopology.resolved import Slo

SLO = Slo(ttft_s=0.25, tpot_s=0.06, attainment=0.9)


def test_every_round_has_every_rate_in_an_order_of_its_own() -> None:
    rates = [1.0, 2.0, 3.0, 4.0, 5.0]
    taken = turns(rates, 4, seed=0)
    rounds = [[one.rate for one in taken if one.round == number] for number in range(4)]
    assert [sorted(one) for one in rounds] == [rates] * 4
    assert len({tuple(one) for one in rounds}) > 1
    assert [one.round for one in taken] == sorted(one.round for one in taken)
    assert taken == turns(rates, 4, seed=0)


def tried(steal: float, others: float = 0.0) -> Tried:
    return Tried((), Disturbance(steal, others, None), 0.0)


@pytest.mark.parametrize(
    ("shares", "repeats", "counts", "tries", "disturbed"),
    [
        ([0.01], 2, 0.01, 1, False),
        ([0.3, 0.05], 2, 0.05, 2, False),
        ([0.3, 0.1, 0.2], 2, 0.1, 3, True),
        ([0.3], 0, 0.3, 1, True),
    ],
)
def test_the_least_disturbed_try_counts(
    shares: list[float], repeats: int, counts: float, tries: int, disturbed: bool
) -> None:
    coming = iter(shares)
    one, made, beyond = undisturbed(lambda: tried(0.0, next(coming)), 0.05, repeats)
    assert (one.disturbance.share, made, beyond) == (counts, tries, disturbed)
    assert next(coming, None) is None


def record(at_s: float, ttft_s: float) -> Record:
    return Record(0, at_s, 10, 11, ttft_s, ttft_s + 0.1, "", None)


def test_loads_of_a_rate_count_as_one_without_their_warm_ups() -> None:
    loads = [[record(0.5, 9.0), record(1.0, 0.1), record(2.0, 0.1)], [record(0.0, 9.0), record(1.5, 0.3)]]
    figures = pooled(loads, SLO, 1.0, 2.0, 0.04)
    assert figures.requests == 3
    assert figures.attainment.value == pytest.approx(2 / 3)
    assert figures.ttft_s[50].value == 0.1
    assert figures.late_s == 0.04
    # 1.2 s until the first load's last end, and 0.9 s of the second
    assert figures.requests_per_s == pytest.approx(3 / 2.1)


def test_loads_follow_each_other() -> None:
    first, second = [record(0.0, 0.2), record(1.0, 0.5)], [record(0.5, 0.1)]
    row = in_a_row([first, second])
    assert [one.at_s for one in row] == [0.0, 1.0, pytest.approx(2.1)]
    assert row[-1].number == 2
    assert in_a_row([]) == []


def machine(
    proc: Path, work_s: dict[int, tuple[int, float]], *, nobody_s: float, steal_s: float, waited_s: float
) -> None:
    """A ``/proc`` of two cores. ``work_s``: pid -> its parent and its work."""
    ticks = round((sum(work for _, work in work_s.values()) + nobody_s) / TICK_S)
    (proc / "pressure").mkdir(exist_ok=True)
    (proc / "pressure/cpu").write_text(
        f"some avg10=0.00 avg60=0.00 avg300=0.00 total={round(waited_s * 1e6)}\nfull\n"
    )
    whole = f"cpu {ticks} 0 0 5 5 99 99 {round(steal_s / TICK_S)} 0 0"
    (proc / "stat").write_text(f"{whole}\ncpu0 1\ncpu1 1\nintr 5\n")
    for pid, (parent, work) in work_s.items():
        (proc / str(pid)).mkdir(exist_ok=True)
        (proc / f"{pid}/stat").write_text(f"{pid} (a ) b) S {parent}{' 0' * 9} {round(work / TICK_S)} 0 0 0\n")


def test_what_others_do_and_what_is_stolen_is_told_apart_from_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("dsbench.disturbance.time.monotonic", lambda: next(clock))
    machine(tmp_path, {1: (0, 5), 20: (1, 1), 21: (20, 2), 30: (1, 3)}, nobody_s=4, steal_s=1, waited_s=50)
    watch = Watch([20, 99], tmp_path)
    # 20 and its child did 8 s, another one 2 s, one that has ended meanwhile 1 s, and 3 s were stolen
    machine(tmp_path, {1: (0, 5), 20: (1, 2), 21: (20, 9), 30: (1, 5)}, nobody_s=5, steal_s=4, waited_s=55)
    seen = watch.end()
    assert seen.steal == pytest.approx(3 / 20)
    assert seen.others == pytest.approx(3 / 20)
    assert seen.waiting == pytest.approx(0.5)
    assert seen.share == pytest.approx(6 / 20)


def test_on_this_machine_too() -> None:
    ours, nobodys = Watch([os.getpid()]), Watch([])
    # this process has worked for long enough to be seen
    assert 0 < ours._began.ours_s <= ours._began.work_s
    assert nobodys._began.ours_s == 0
    assert ours.end().share >= ours.end().steal
