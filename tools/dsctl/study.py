"""``dsctl study``: the DistServe paper's studies rerun, with data, plots and what holds of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsctl.commandline import Commands
from dsctl.options import PLOTS, NewFile, wrote
from dsobserve.files import writing

if TYPE_CHECKING:
    from dsplan.studies.base import Setting, Study

APPLICATIONS = ("chatbot-13b", "chatbot-66b", "chatbot-175b", "code-66b", "summarization-66b")


@click.group(cls=Commands)
def command() -> None:
    """Rerun the DistServe paper's studies on the planner's models.

    \b
    dsctl study interference --plot interference.png
    dsctl study parallelism --model Llama-3-70B --device h100 --csv parallelism.csv
    dsctl study applications --application chatbot-13b --json
    """


def _options(
    model: str, nodes: int, per_node: int, slo: str | None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What every study takes, with its defaults; one that judges no requests takes no objectives."""
    options = [
        click.option("--model", default=model, show_default=True, help="A known model or a config.json."),
        click.option("--device", default="a100-80g", show_default=True),
        click.option("--nodes", type=click.IntRange(1, 64), default=nodes, show_default=True),
        click.option("--devices-per-node", type=click.IntRange(1, 64), default=per_node, show_default=True),
        click.option("--workload", default="sharegpt", show_default=True),
        *_outputs(),
    ]
    if slo is not None:
        options.append(click.option("--slo", default=slo, show_default=True, metavar="ttft:MS,tpot:MS"))
    return _all(options)


def _outputs() -> list[Any]:
    return [
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--plot", type=NewFile("plot", *PLOTS), metavar="FILE", help="Draw it (.png, .svg, .pdf)."),
        click.option("--csv", "table", type=NewFile("table"), metavar="FILE", help="Write the data."),
        click.option("--json", "as_json", is_flag=True, help="Print the data as JSON."),
    ]


def _all(options: list[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@command.command("interference")
@_options("OPT-13B", 1, 4, "ttft:250,tpot:100")
def interference(**given: Any) -> None:
    """Prefill and decode together and apart, at equal resources: goodput for each device."""
    from dsplan.studies.interference import run

    _run(run, given)


@command.command("parallelism")
@_options("Llama-3-8B", 1, 8, None)
def parallelism(**given: Any) -> None:
    """TP against PP: prefill by arrival rate, with the crossing, and decode."""
    from dsplan.studies.parallelism import run

    _run(run, given)


@command.command("applications")
@click.option("--device", default="a100-80g", show_default=True)
@click.option(
    "--application",
    "names",
    multiple=True,
    type=click.Choice(APPLICATIONS),
    default=APPLICATIONS,
    help="Which; default all five of the paper.",
)
@_all(_outputs())
def applications(names: tuple[str, ...], **given: Any) -> None:
    """Goodput and SLO-scale curves of the paper's applications on its cluster, 4 nodes of 8 devices."""
    from dsplan.studies.applications import run

    _run(lambda setting: run(setting, names), given | {"model": "OPT-13B", "slo": "ttft:250,tpot:100"})


@command.command("affinity")
@_options("OPT-66B", 4, 8, "ttft:2500,tpot:150")
def affinity(**given: Any) -> None:
    """Algorithm 1 against 2 as the network between nodes gets faster."""
    from dsplan.studies.affinity import run

    _run(run, given)


@command.command("large")
@_options("OPT-175B", 8, 4, "ttft:4000,tpot:200")
def large(**given: Any) -> None:
    """A model that fits no node: stages side by side, so that KV never crosses nodes."""
    from dsplan.studies.large import run

    _run(run, given)


def _run(run: Callable[[Setting], Study], given: dict[str, Any]) -> None:
    from dsctl.plan import progress
    from dsctl.simulate import parse_slo
    from dsplan import drawing
    from dsplan.studies.base import Setting
    from dssim import plot
    from dstopology import resolved

    outputs = {name: given.pop(name) for name in ("plot", "table", "as_json")}
    if outputs["plot"] is not None:
        plot.check()
    slo = parse_slo(given.pop("slo", None), resolved.Slo(0.25, 0.1, 0.9))
    with progress(quiet=outputs["as_json"]) as tell:
        study = run(Setting(**given, ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, progress=tell))
    if outputs["plot"] is not None and study.panels:
        drawing.save(study.panels, outputs["plot"])
        wrote(outputs["plot"])
    if outputs["table"] is not None:
        _write(study.rows, outputs["table"])
    _show(study, as_json=outputs["as_json"])


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    with writing("table", path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    wrote(path)


def _show(study: Study, *, as_json: bool) -> None:
    if as_json:
        found = {"study": study.title, "sentences": study.sentences, "rows": study.rows}
        click.echo(json.dumps(found, indent=2))
        return
    from dsobserve.terminal import output

    console = output()
    console.print(study.title, style="bold")
    for sentence in study.sentences:
        console.print(sentence)
