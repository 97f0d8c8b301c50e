"""``dsbench serve``: load on a running system, open loop, and how many requests meet both objectives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dsbench import host
from dsbench.load import Load, run
from dsbench.load import Progress as Sent
from dsbench.objectives import objective_options, objectives
from dsbench.served import Served, data, serve_figures, show, write_log
from dsbench.started import started
from dsclient import AsyncClient
from dsctl.asking import Target, find_target, target_options
from dsctl.options import NewFile, arrival_options, workload_option
from dsobserve.terminal import output
from dssim.records import Record
from dssim.tracefile import rows_of
from dssim.wish import Wish, make
from dstopology.load import find, load
from dstopology.resolved import Slo
from dswire.errors import BadInput

#: exit status when not one request that counts was answered
UNANSWERED = 5


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run against one system."""

    target: Target
    load: Load
    slo: Slo
    warmup_s: float
    #: that the workload wants, after the warm-up
    offered_per_s: float


@click.command("serve")
@target_options
@click.option("--start", is_flag=True, help="Start the topology's processes for the measurement, and stop them.")
@workload_option("humaneval")
@arrival_options
@click.option("--rate", type=float, help="Requests a second; needed unless a file tells when they arrive.")
@click.option("--duration", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Seconds that count.")
@click.option("--warmup", type=click.FloatRange(0), default=5.0, show_default=True, help="Seconds before that.")
@click.option("--requests", type=click.IntRange(1), help="At most so many, warm-up included.")
@objective_options
@click.option("--seed", type=int, default=0, show_default=True, help="Of arrivals and lengths.")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSON lines with key prompt: texts to send.")
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds of one request.",
)
@click.option("--log", type=NewFile("log"), help="Write a JSON line for each request.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    file: Path | None,
    address: str | None,
    keys: Path | None,
    timeout_s: float,
    start: bool,
    workload: str,
    rate: float | None,
    arrival: str,
    cv: float,
    duration: float,
    warmup: float,
    requests: int | None,
    goodput: tuple[str, ...],
    attainment: float | None,
    seed: int,
    prompts: Path | None,
    request_timeout: float,
    log: Path | None,
    as_json: bool,
) -> int:
    """Send a workload at its own pace, and measure TTFT, TPOT and how many requests meet both objectives.

    Requests go out at their times whatever became of those before, and their times run from there. The log can be
    replayed: `dsctl simulate --workload LOG`. The exit status is 5 when no request that counts was answered.

    \b
    dsbench serve -f T.yaml --start --rate 2 --duration 60 --goodput "ttft:250 tpot:60"
    dsbench serve --address tcp://host:5555 --workload azure.csv.gz --goodput ttft:500 --goodput tpot:80
    dsbench serve --workload like:mine.jsonl --rate 1.5 --log run.jsonl --json
    """
    default = None if address is not None else load(find(file)).slo
    arrivals = make(Wish(workload, rate, requests, arrival, cv, seed, until_s=warmup + duration))
    counted = [one for one in arrivals if one.at_s >= warmup]
    if not counted:
        raise BadInput("no request comes after the warm-up", remedy="raise --duration or --rate")
    measurement = Measurement(
        find_target(file, address, keys),
        Load(arrivals, timeout_s=request_timeout, texts=() if prompts is None else read_prompts(prompts)),
        objectives(goodput, default, attainment),
        warmup,
        rate if rate is not None else len(counted) / duration,
    )
    console = Console(stderr=True)
    host.warn(console)
    with started(find(file), console) if start else nullcontext():
        served, sent = measure(measurement, console, timeout_s)
    if log is not None:
        write_log(log, arrivals, sent.records)
    if as_json:
        click.echo(json.dumps(data(served, measurement.slo), indent=2))
    else:
        show(output(), served, measurement.slo)
    return 0 if served.finished else UNANSWERED


def measure(measurement: Measurement, console: Console, timeout_s: float = 10.0) -> tuple[Served, Sent]:
    """Run the load to its last end. Raises :class:`DsError` when the system does not answer at all."""
    sent = Sent(len(measurement.load.arrivals))
    with _board(console, sent, measurement) as on_end, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(measurement, sent, on_end, timeout_s))
    slo, warmup_s = measurement.slo, measurement.warmup_s
    return serve_figures(sent.records, slo, warmup_s, measurement.offered_per_s, sent.latest_s), sent


async def _run(measurement: Measurement, sent: Sent, on_end: Callable[[Record], None], timeout_s: float) -> None:
    target = measurement.target
    async with AsyncClient(target.address, keys=target.keys, timeout_s=timeout_s) as client:
        await run(client, measurement.load, sent, on_end)


@contextmanager
def _board(console: Console, sent: Sent, measurement: Measurement) -> Iterator[Callable[[Record], None]]:
    """A line on a terminal that tells how it goes."""
    slo, hits = measurement.slo, 0
    columns = (TextColumn("sending"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sent.total)

        def on_end(record: Record) -> None:
            nonlocal hits
            hits += record.ttft_s <= slo.ttft_s and record.tpot_s <= slo.tpot_s
            failed = sum(bool(one.error) for one in sent.records) if console.is_terminal else 0
            text = f"{len(sent.records)} of {sent.total} ended, {sent.open} open, {failed} failed"
            progress.update(task, advance=1, description=f"{text}, attained {hits / len(sent.records):.1%}")

        yield on_end


def read_prompts(path: Path) -> list[str]:
    """Texts of a file of JSON lines (``.jsonl``, ``.jsonl.gz``). Raises :class:`BadInput`."""
    texts = []
    with rows_of(path, "prompts") as rows:
        for number, row in rows:
            if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise BadInput(f"{path}:{number}: key prompt: a text is wanted, {row.get('prompt')!r} came")
            texts.append(row["prompt"])
    if not texts:
        raise BadInput(f"{path} has no prompts")
    return texts
