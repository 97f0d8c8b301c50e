"""``dsctl plan``: the placement with the most goodput per device for a model, hardware, workload and objectives."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsctl.options import NewFile, arrival_options, workload_option, wrote
from dsobserve.files import writing

if TYPE_CHECKING:
    from dsplan.confirm import Confirmation
    from dsplan.devices import Device
    from dsplan.goodput import Slo
    from dsplan.latency import Latency
    from dsplan.placement import Placement, Plan, Spec
    from dsplan.planner import Planner, Progress
    from dsplan.question import Hardware, Question

#: objectives when none are given: the paper's chatbot on OPT-13B
DEFAULT_SLO = "ttft:250,tpot:100"
#: requests of each simulation that checks the choice
CHECKED_REQUESTS = 400


@click.command()
@click.option("--model", required=True, help="A known model (OPT-13B, ...), one of this host, or a config.json.")
@click.option("--device", default="a100-80g", show_default=True, help="a100-80g, h100, h200, l40s, cpu, ...")
@click.option("--prefill-device", help="Where prefill runs on devices of its own kind; --nodes of each kind.")
@click.option("--decode-device", help="Where decode runs on devices of its own kind.")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes of the cluster, and of one instance.")
@click.option("--devices-per-node", type=int, default=8, show_default=True)
@workload_option("sharegpt")
@arrival_options
@click.option("--slo", default=DEFAULT_SLO, show_default=True, metavar="ttft:MS,tpot:MS")
@click.option("--attainment", type=float, default=0.9, show_default=True, help="Share that must meet both.")
@click.option("--rate", type=float, help="Wanted requests a second; default fill the cluster.")
@click.option("--algorithm", type=click.Choice(["high", "low", "auto"]), default="auto", show_default=True)
@click.option(
    "--mode",
    type=click.Choice(["auto", "disaggregated", "colocated", "conditional"]),
    default="auto",
    show_default=True,
    help="Consider one mode only; auto compares all.",
)
@click.option(
    "--latency",
    type=click.Choice(["auto", "distserve", "vllm", "roofline"]),
    default="auto",
    show_default=True,
    help="Times of steps: a published A100 profile of OPT, or a roofline of any model. auto: the profile if it is "
    "of this model and device.",
)
@click.option("--profile", type=click.Path(path_type=Path), help="Times of steps that `dsctl profile` measured.")
@click.option("--stack", default="graphs", show_default=True, help="Serving software of the roofline.")
@click.option("--network", type=float, metavar="GBPS", help="Gbit/s between nodes; default the device table's.")
@click.option(
    "--price",
    multiple=True,
    metavar="[DEVICE=]PRICE",
    help="Of a device-hour; with it placements are compared by goodput for the money.",
)
@click.option(
    "--startable",
    is_flag=True,
    help="Only what `dsctl up` can start: instances over several nodes colocated, or with all stages side by side.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--check/--no-check", default=True, show_default=True, help="Simulate the choice and the runner-up.")
@click.option("--compare", type=click.Path(path_type=Path), metavar="T.yaml", help="Hold a topology against it.")
@click.option("--write", type=NewFile("topology"), metavar="T.yaml", help="Write the topology.")
@click.option("--report", type=NewFile("report"), metavar="R.html", help="Write a report with plots.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    seed: int,
    workload: str,
    arrival: str,
    cv: float,
    slo: str,
    attainment: float,
    check: bool,
    compare: Path | None,
    write: Path | None,
    report: Path | None,
    as_json: bool,
    **wanted: object,
) -> None:
    """Find the placement with the most goodput per device, and say whether to disaggregate at all.

    Goodput is the highest request rate at which the wanted share of requests meets TTFT and TPOT both. high is the
    paper's Algorithm 1 (prefill and decode anywhere), low its Algorithm 2 (KV stays inside nodes); colocated
    (chunked prefill) and conditional systems are compared with them.

    \b
    dsctl plan --model OPT-13B --nodes 4 --slo ttft:250,tpot:100 --write topology.yaml
    dsctl plan --model Llama-3-70B --device h100 --slo ttft:500,tpot:50 --rate 10 --json
    dsctl plan --model Qwen2.5-32B --prefill-device h100 --decode-device a100-80g --price h100=4 --price a100-80g=2
    dsctl plan --model OPT-13B --compare mine.yaml --report plan.html
    """
    from dsplan import report as told
    from dsplan import startable
    from dsplan.branches import cores
    from dsplan.confirm import checked, settled
    from dsplan.goodput import make_workload
    from dsplan.planner import Planner
    from dssim import plot

    if report is not None:
        plot.check()
    requests = make_workload(workload, seed=seed, arrival=arrival, cv=cv)
    question = _question(wanted, requests, _slo(slo, attainment))
    with progress(quiet=as_json) as tell:
        planner = Planner(question, tell)
        spec = _given(planner, compare)
        plan = planner.run(processes=cores())
        given = planner.measured(spec) if spec is not None else None
        startable.tell(plan, tell, cores())
        runs = checked(planner, plan, CHECKED_REQUESTS) if check else []
        if check and given is not None:
            given = settled(plan, given, CHECKED_REQUESTS)
        if report is not None:
            _report(planner, plan, runs, given, report)
    if as_json:
        click.echo(json.dumps(told.data(plan, runs, given), indent=2))
    else:
        told.show(plan, runs, given)
    # last: what no topology can say is worth reading all the same
    if write is not None:
        _write(plan, write)


def _question(wanted: dict[str, object], workload: object, slo: Slo) -> Question:
    """From the options, by their names."""
    from dsplan.goodput import Workload
    from dsplan.question import MODES, Question
    from dsplan.shapes import find_model

    assert isinstance(workload, Workload)
    names = [wanted["prefill_device"] or wanted["device"], wanted["decode_device"] or wanted["device"]]
    kinds = [_hardware(str(name), wanted) for name in dict.fromkeys(names)]
    mode, rate = str(wanted["mode"]), wanted["rate"]
    nodes, per_node = wanted["nodes"], wanted["devices_per_node"]
    assert isinstance(nodes, int)
    assert isinstance(per_node, int)
    return Question(
        shape=find_model(str(wanted["model"])),
        device=kinds[0].device,
        latency=kinds[0].latency,
        nodes=nodes,
        devices_per_node=per_node,
        workload=workload,
        slo=slo,
        algorithm=str(wanted["algorithm"]),
        rate=rate if isinstance(rate, float) else None,
        decode_hardware=kinds[1] if len(kinds) > 1 else None,
        modes=MODES if mode == "auto" else (mode,),
        prices=_prices(wanted["price"], [kind.device.name for kind in kinds]),
        startable=bool(wanted["startable"]),
    )


def _hardware(name: str, wanted: dict[str, object]) -> Hardware:
    from dataclasses import replace

    from dsplan.devices import find_device
    from dsplan.errors import PlanInput
    from dsplan.question import Hardware

    device = find_device(name)
    if isinstance(wanted["network"], float):
        if not 0.01 <= wanted["network"] <= 80_000:
            raise PlanInput(
                f"--network {wanted['network']:g} Gbit/s is absurd", remedy="give it between 0.01 and 80000 Gbit/s"
            )
        device = replace(device, network_bytes_per_s=wanted["network"] * 1e9 / 8)
    return Hardware(device, _latency(wanted, device))


def _latency(wanted: dict[str, object], device: Device) -> Latency:
    from dsplan.linear import distserve_latency, profiled
    from dsplan.roofline import RooflineLatency, find_stack
    from dsplan.shapes import find_model

    shape, kind, per_node = find_model(str(wanted["model"])), str(wanted["latency"]), wanted["devices_per_node"]
    stack = find_stack(str(wanted["stack"]))
    if isinstance(wanted["profile"], Path):
        return _profile(wanted["profile"], shape.name)
    if kind in ("distserve", "vllm"):
        return distserve_latency(shape.name, device.name, kind)
    if kind == "auto" and profiled(shape.name, device.name):
        return distserve_latency(shape.name, device.name)
    assert isinstance(per_node, int)
    return RooflineLatency(shape, device, stack, per_node)


def _profile(path: Path, model: str) -> Latency:
    """A measured profile. Raises :class:`ProfileMismatch` where it is of another model or not complete."""
    from dsplan.errors import ProfileMismatch
    from dsplan.profile import ProfileLatency, load

    profile = load(path)
    if Path(profile.subject.model).name.lower() != model.lower():
        raise ProfileMismatch(
            f"profile {path} is of {profile.subject.model}, not of {model}",
            remedy="plan for the profile's model, or measure one of this with `dsctl profile`",
        )
    if not profile.fits:
        raise ProfileMismatch(
            f"profile {path} is not complete yet",
            remedy=f"run `dsctl profile -o {path}` again: it goes on where it stood",
        )
    return ProfileLatency(path, profile)


def _prices(given: object, devices: list[str]) -> dict[str, float]:
    from dsplan.errors import PlanInput

    prices: dict[str, float] = {}
    for text in given if isinstance(given, tuple) else ():
        name, _, number = text.rpartition("=")
        try:
            prices |= {one: float(number) for one in ([name] if name else devices)}
        except ValueError as error:
            raise PlanInput(f"--price {text!r} is not understood", remedy="write 2.5 or a100-80g=2.5") from error
    unknown = next((name for name in prices if name not in devices), None)
    if unknown is not None:
        raise PlanInput(f"--price names {unknown}, which is not planned for", remedy=f"name {' or '.join(devices)}")
    return prices


def _slo(text: str, attainment: float) -> Slo:
    from dsctl.simulate import parse_slo
    from dsplan.goodput import Slo
    from dstopology import resolved

    found = parse_slo(text, parse_slo(DEFAULT_SLO, resolved.Slo(1.0, 1.0, attainment)))
    return Slo(found.ttft_s, found.tpot_s, attainment)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal's standard error."""
    from dsplan.planner import silent

    if quiet or not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("planning", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _given(planner: Planner, path: Path | None) -> Spec | None:
    if path is None:
        return None
    from dsplan.given import read

    return read(path, planner)


def _report(planner: Planner, plan: Plan, runs: list[Confirmation], given: Placement | None, path: Path) -> None:
    from dsplan.html import page

    _save(page(planner, plan, runs, given), path, "report")


def _write(plan: Plan, path: Path) -> None:
    from dsplan.topology_file import text

    _save(text(plan), path, "topology")


def _save(content: str, path: Path, what: str) -> None:
    with writing(what, path):
        path.write_text(content, encoding="utf-8")
    wrote(path)
