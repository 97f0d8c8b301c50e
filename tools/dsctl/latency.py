"""``dsctl latency``: what the planner believes steps take, and how far that is from measurements."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsplan.accuracy import Error
    from dsplan.roofline import Stack

PROMPTS = "128,512,2048,8192"
BATCHES = "1,8,32,64,128"


@click.command()
@click.option("--model", help="A known model (Llama-3-70B, Mixtral-8x7B, ...) or a Hugging Face config.json.")
@click.option("--device", default="a100-80g", show_default=True, help="a100-80g, h100, h200, l40s, ...")
@click.option("--tp", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--pp", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--prompts", default=PROMPTS, show_default=True, help="Tokens of the prompts to show.")
@click.option("--batches", default=BATCHES, show_default=True, help="Sequences of the decode steps to show.")
@click.option("--context", type=click.IntRange(1, 10_000_000), default=1024, show_default=True, help="Of each.")
@click.option(
    "--stack", default="graphs", show_default=True, help="Serving software: graphs, nccl-2023 or eager-2023."
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Hold against measurements: columns phase, batch, tokens, ms; model, device, tp and pp where the options "
    "do not say them.",
)
@click.option("--check", type=click.Path(path_type=Path), metavar="DIR", help="Hold against public tables in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None,
    device: str,
    tp: int,
    pp: int,
    prompts: str,
    batches: str,
    context: int,
    stack: str,
    measured: Path | None,
    check: Path | None,
    as_json: bool,
) -> None:
    """Show the modelled times of prefill and decode steps, or how far the model is from measurements.

    Prefill: one prompt, alone. Decode: one token for each sequence of a batch. Milliseconds, all of an instance.

    \b
    dsctl latency --model Llama-3-70B --device h100 --tp 8
    dsctl latency --model Llama-3-8B --device l40s --measured mine.csv
    dsctl latency --check ../gpu-measurements
    """
    from dsplan import accuracy
    from dswire.errors import BadInput

    if check is not None or measured is not None:
        rows = accuracy.published(check) if check is not None else []
        if measured is not None:
            otherwise = {"device": device, "tp": str(tp), "pp": str(pp), **({"model": model} if model else {})}
            rows += accuracy.measured(measured, _stack(stack), otherwise)
        _show_errors(accuracy.errors(rows), as_json)
        return
    if model is None:
        raise BadInput("no --model is given", remedy="name one, or a table with --measured or --check")
    _show_times(model, device, tp, pp, _numbers(prompts), _numbers(batches), context, _stack(stack), as_json)


def _stack(name: str) -> Stack:
    from dsplan.roofline import find_stack

    return find_stack(name)


def _numbers(text: str) -> list[int]:
    from dswire.errors import BadInput

    parts = text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) < 10_000_000 for part in parts):
        raise BadInput(f"{text!r} is not understood", remedy="give whole numbers above 0, as 1,8,64")
    return [int(part) for part in parts]


def _show_times(
    model: str,
    device: str,
    tp: int,
    pp: int,
    prompts: list[int],
    batches: list[int],
    context: int,
    stack: Stack,
    as_json: bool,
) -> None:
    from dsplan.accuracy import step_s
    from dsplan.devices import find_device
    from dsplan.roofline import RooflineLatency
    from dsplan.shapes import find_model

    latency = RooflineLatency(find_model(model), find_device(device), stack)
    instance = latency.instance(tp, pp)
    rows = [("prefill", 1, tokens, step_s(instance, "prefill", 1, tokens) * 1e3) for tokens in prompts]
    rows += [("decode", batch, context, step_s(instance, "decode", batch, context) * 1e3) for batch in batches]
    if as_json:
        keys = ("phase", "batch", "tokens", "ms")
        steps = [dict(zip(keys, row, strict=True)) for row in rows]
        about = {"model": latency.shape.name, "device": device, "tp": tp, "pp": pp, "source": latency.source}
        click.echo(json.dumps({**about, "steps": steps}, indent=2))
        return
    from dsobserve.terminal import digits, figures, output

    table = figures("step", "sequences", "tokens of each", "ms", title=f"TP {tp} PP {pp}")
    for phase, batch, tokens, ms in rows:
        table.add_row(phase, str(batch), str(tokens), digits(ms, 4))
    console = output()
    console.print(table)
    console.print(f"{latency.source}; software: {stack.about}")


def _show_errors(errors: list[Error], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(one) for one in errors], indent=2))
        return
    from dsobserve.terminal import figures, output

    columns = ("table", "rows", "mean error", "90% below", "median", "device unseen")
    table = figures(*columns, title="the model beside measurements")
    for one in errors:
        blind = "" if one.blind is None else f"{one.blind:.1%}"
        table.add_row(one.table, str(one.rows), f"{one.mape:.1%}", f"{one.p90:.1%}", f"{one.bias:+.1%}", blind)
    console = output()
    console.print(table)
    if any(one.blind is not None for one in errors):
        console.print("device unseen: the mean error with kernel efficiencies fitted on other devices only.")
