"""A run as a Chrome trace: for ``chrome://tracing`` and https://ui.perfetto.dev.

A row of steps for each instance, with counters of its queue and blocks; requests as nested asynchronous slices, the
stages of the ledger inside. Times are microseconds, as the format wants, from the workload's time 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from dssim.records import Record, Run

_PROCESS = 1
_REQUESTS = 2
#: fields of the ledger that are not stages
_SUMS = frozenset({"ttft_s", "total_s", "retries"})


def chrome(run: Run) -> dict[str, Any]:
    """The trace, ready for JSON; steps are in it when the run kept them."""
    return {"displayTimeUnit": "ms", "traceEvents": [*_names(run), *_steps(run), *_loads(run), *_requests(run)]}


def _rows(run: Run) -> dict[str, int]:
    names = {step.instance for step in run.seen.steps} | {name for _, name, _ in run.seen.loads}
    return {name: row for row, name in enumerate(sorted(names), 1)}


def _names(run: Run) -> Iterator[dict[str, Any]]:
    for process, name in ((_PROCESS, "instances"), (_REQUESTS, "requests")):
        yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    for name, row in _rows(run).items():
        yield {"ph": "M", "pid": _PROCESS, "tid": row, "name": "thread_name", "args": {"name": name}}


def _steps(run: Run) -> Iterator[dict[str, Any]]:
    rows = _rows(run)
    for step in run.seen.steps:
        yield {
            "ph": "X",
            "pid": _PROCESS,
            "tid": rows[step.instance],
            "name": f"{step.sequences} sequences",
            "ts": _us(step.began_s - run.begun_s),
            "dur": _us(step.seconds),
            "args": {"sequences": step.sequences, "tokens": step.tokens},
        }


def _loads(run: Run) -> Iterator[dict[str, Any]]:
    for now, name, load in run.seen.loads:
        figures = {"waiting": load.waiting, "running": load.running, "blocks held": load.blocks_held}
        yield {"ph": "C", "pid": _PROCESS, "name": name, "ts": _us(now - run.begun_s), "args": figures}


def _requests(run: Run) -> Iterator[dict[str, Any]]:
    for record in run.records:
        name = f"{record.prompt_tokens} + {record.output_tokens} tokens"
        yield from _slice(record, name if not record.error else record.error, record.at_s, record.total_s)
        if record.ledger is None:
            continue
        # the ledger is the router's: it begins when the request has come there
        at_s = record.at_s + (record.total_s - record.ledger.total_s) / 2
        for stage, seconds in msgspec.structs.asdict(record.ledger).items():
            if stage not in _SUMS and seconds > 0:
                yield from _slice(record, stage.removesuffix("_s"), at_s, seconds)
                at_s += seconds


def _slice(record: Record, name: str, at_s: float, seconds: float) -> Iterator[dict[str, Any]]:
    common = {"cat": "request", "id": record.number, "pid": _REQUESTS, "tid": 0, "name": name}
    yield {"ph": "b", "ts": _us(at_s), **common}
    yield {"ph": "e", "ts": _us(at_s + seconds), **common}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
