"""The load generator against clients that answer as they are told, and its figures."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner
from rich.console import Console

from dsbench.__main__ import cli
from dsbench.bootstrap import interval, percentile
from dsbench.load import Load, Progress, prompt_ids, run
from dsbench.objectives import objectives
from dsbench.serve import read_prompts
from dsbench.served import data, serve_figures, show, write_log
from dsclient import Completion, Ledger, Sampling, Usage
from dssim.records import Record
from dssim.tracefile import read
from dssim.workload import Arrival
from dstopology.resolved import Slo
from dswire.errors import BadInput, DsError, WorkerLost

SLO = Slo(ttft_s=0.25, tpot_s=0.06, attainment=0.9)


class Answer:
    """Ends when its gate opens, as it was told to."""

    def __init__(
        self, asked: tuple[int, ...], sampling: Sampling, gate: asyncio.Event, error: DsError | None
    ) -> None:
        self.prompt_tokens: int | None = len(asked)
        self._sampling = sampling
        self._gate = gate
        self._error = error

    async def result(self) -> Completion:
        await self._gate.wait()
        if self._error is not None:
            raise self._error
        tokens = self._sampling.max_tokens
        return Completion("r", (), Usage(self.prompt_tokens or 0, tokens), Ledger(), 0.1, 0.1 + 0.05 * (tokens - 1))


class Client:
    """Keeps what was asked; answers all at once after the last request, and one of them with an error."""

    def __init__(self, requests: int, failing: int, sleep_s: float = 0.0) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.samplings: list[Sampling] = []
        self._gate = asyncio.Event()
        self._requests = requests
        self._failing = failing
        self._sleep_s = sleep_s

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        deadline_s: float | None = None,
    ) -> Answer:
        assert sampling is not None
        # as a machine would that has no time for us
        time.sleep(self._sleep_s)
        asked = tuple(prompt_ids) if prompt_ids is not None else tuple(map(ord, prompt or ""))
        self.asked.append(asked)
        self.samplings.append(sampling)
        if len(self.asked) == self._requests:
            self._gate.set()
        error = WorkerLost("gone") if len(self.asked) == self._failing else None
        return Answer(asked, sampling, self._gate, error)


async def served(arrivals: list[Arrival], client: Client, **options: Sequence[str]) -> Progress:
    progress = Progress(len(arrivals))
    ended: list[Record] = []
    await run(client, Load(arrivals, 7, 30.0, **options), progress, ended.append)
    assert ended == progress.records
    assert progress.open == 0
    return progress


async def test_nothing_waits_for_an_answer_before_it_is_sent() -> None:
    # a closed loop would hang: no answer comes before the last request
    arrivals = [Arrival(0.001 * number, 5 + number, 3) for number in range(20)]
    client = Client(20, failing=4)
    progress = await served(arrivals, client)
    assert [len(ids) for ids in client.asked] == [one.prompt_tokens for one in arrivals]
    assert all(one.ignore_eos and one.max_tokens == 3 for one in client.samplings)
    failed = [one for one in progress.records if one.error]
    assert [(one.number, one.error, one.ttft_s) for one in failed] == [(3, "worker_lost", math.inf)]
    assert len(progress.records) == 20


async def test_being_late_counts_as_waiting() -> None:
    arrivals = [Arrival(0.0, 4, 2), Arrival(0.0, 4, 2)]
    progress = await served(arrivals, Client(2, failing=0, sleep_s=0.05))
    first, second = sorted(progress.records, key=lambda one: one.number)
    assert first.ttft_s >= 0.1
    # the first request's sending kept the second from its time
    assert second.ttft_s >= 0.1 + 0.1
    assert second.tpot_s == pytest.approx(0.05)
    assert progress.latest_s >= 0.1


async def test_texts_are_sent_over_and_over() -> None:
    client = Client(3, failing=0)
    await served([Arrival(0.0, 9, 1)] * 3, client, texts=("ab", "c"))
    assert ["".join(map(chr, ids)) for ids in client.asked] == ["ab", "c", "ab"]


def test_prompts_are_the_same_for_the_same_seed_and_share_what_their_hashes_share() -> None:
    plain = Arrival(0.0, 700, 1)
    assert prompt_ids(plain, 1, 0) == prompt_ids(plain, 1, 0)
    assert len({prompt_ids(plain, number, seed) for number in (1, 2) for seed in (0, 1)}) == 4
    one, other = (prompt_ids(Arrival(0.0, 700, 1, (5, last)), 0, 0) for last in (6, 7))
    assert len(one) == len(other) == 700
    assert one[:512] == other[:512]
    assert one[512:] != other[512:]


def record(number: int, ttft_s: float = 0.1, tpot_s: float = 0.02, error: str = "") -> Record:
    at_s = float(number)
    if error:
        return Record(number, at_s, 10, 0, None, 1.0, error, None)
    return Record(number, at_s, 10, 11, ttft_s, ttft_s + 10 * tpot_s, "", Ledger())


def test_figures_leave_the_warm_up_out_and_judge_both_objectives_together() -> None:
    records = [record(0, 9.0), record(1), record(2, 0.3), record(3, tpot_s=0.07), record(4, error="overloaded")]
    figures = serve_figures(records, SLO, 1.0, 1.0, 0.0)
    assert (figures.requests, figures.finished, figures.errors) == (4, 3, {"overloaded": 1})
    assert figures.attainment.value == 0.25
    assert figures.ttft_attainment.value == figures.tpot_attainment.value == 0.5
    assert figures.ttft_s[50].value == pytest.approx(0.1)
    assert figures.tpot_s[99].value == pytest.approx(0.07)
    told = json.loads(json.dumps(data(figures, SLO)))
    assert told["ttft_ms"]["p50"]["value"] == pytest.approx(100)
    assert told["errors"] == {"overloaded": 1}
    console = Console(width=200, record=True)
    show(console, figures, SLO)
    text = console.export_text()
    assert "25.0%" in text
    assert "missed" in text
    assert "1 request failed: overloaded" in text
    with pytest.raises(BadInput, match="after the warm-up"):
        serve_figures(records, SLO, 100.0, 1.0, 0.0)


def test_a_share_of_all_is_not_certain() -> None:
    figures = serve_figures([record(number) for number in range(20)], SLO, 0.0, 1.0, 0.0)
    assert figures.attainment.value == figures.attainment.high == 1.0
    assert 0.8 < figures.attainment.low < 0.9


def test_the_interval_holds_the_truth_where_neighbours_are_alike() -> None:
    held = narrow = 0
    for seed in range(40):
        random, values, level = Random(seed), [], 0.0
        for _ in range(300):
            level = 0.7 * level + random.gauss(0, 1)
            values.append(level)
        found = interval(values, percentile(50), seed)
        held += found.low <= 0.0 <= found.high
        narrow += found.high - found.low < 1.5
    # 95 % of 40 are 38; taken for independent, about 26 would hold it
    assert held >= 32
    assert narrow == 40


def test_the_log_is_a_workload(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    arrivals = [Arrival(0.0, 10, 11), Arrival(1.0, 10, 11, (4,)), Arrival(2.0, 10, 12)]
    write_log(path, arrivals, [record(2, error="overloaded"), record(0), record(1)])
    assert read(path) == (arrivals, True)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["error"] for row in rows] == ["", "", "overloaded"]
    assert rows[1]["ttft_s"] == pytest.approx(0.1)
    with pytest.raises(BadInput, match="cannot be written"):
        write_log(tmp_path, arrivals, [])


@pytest.mark.parametrize("texts", [["ttft:250 tpot:60"], ["ttft:250", "tpot:60"], ["tpot:60,ttft:250"]])
def test_objectives_may_be_apart_or_together(texts: list[str]) -> None:
    assert objectives(texts, None, None) == SLO


def test_objectives_left_out_are_the_topologys() -> None:
    assert objectives(["ttft:500"], SLO, 0.99) == Slo(0.5, 0.06, 0.99)
    assert objectives([], SLO, None) == SLO


@pytest.mark.parametrize("texts", [["ttft=3"], ["ttft:0"], ["ttft:1 ttft:2"], ["ttft:1"], []])
def test_objectives_that_make_no_sense_are_refused(texts: list[str]) -> None:
    with pytest.raises(BadInput, match=r"--goodput|no objectives"):
        objectives(texts, None, None)


def test_prompts_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert read_prompts(path) == ["a", "b"]
    for text, word in (("", "no prompts"), ('{"text": 1}', ":1: key prompt")):
        path.write_text(text)
        with pytest.raises(BadInput, match=word):
            read_prompts(path)


def test_a_router_that_is_not_there_is_told() -> None:
    address = ["--address", "tcp://127.0.0.1:1", "--timeout", "0.2", "--goodput", "ttft:1 tpot:1"]
    done = CliRunner().invoke(cli, ["serve", *address, "--rate", "5", "--duration", "2"])
    assert isinstance(done.exception, DsError)
    assert done.exception.code == "router_lost"


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--rate", "1"], "no objectives"), (["--rate", "0"], "rate of 0"), ([], "does not tell when")],
)
def test_wrong_wishes_are_refused(options: list[str], word: str) -> None:
    done = CliRunner().invoke(cli, ["serve", "--address", "tcp://127.0.0.1:1", "--warmup", "0", *options])
    assert isinstance(done.exception, BadInput)
    assert word in str(done.exception)


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^prompts .*x\.jsonl cannot be read") as caught:
        read_prompts(tmp_path / "x.jsonl")
    assert caught.value.remedy


@pytest.mark.parametrize("option", ["--timeout", "--request-timeout"])
def test_waits_are_longer_than_nothing(option: str) -> None:
    done = CliRunner().invoke(cli, ["serve", "--rate", "1", option, "-1"])
    assert done.exit_code == 2
    assert "not in the range" in done.output
