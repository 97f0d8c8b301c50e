"""``dsctl plan``: the placement with the most goodput per device for a model, hardware, workload and objectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsplan.confirm import Confirmation
    from dsplan.devices import Device
    from dsplan.goodput import Slo
    from dsplan.latency import Latency
    from dsplan.planner import Plan

#: objectives when none are given: the paper's chatbot on OPT-13B
DEFAULT_SLO = "ttft:250,tpot:100"
#: requests of the simulation that checks the choice
CHECKED_REQUESTS = 400


@click.command()
@click.option("--model", required=True, help="A known model (OPT-13B, Llama-3-70B, ...) or a config.json.")
@click.option("--device", default="a100-80g", show_default=True, help="a100-80g, h100, h200, l40s, cpu.")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes of the cluster, and of one instance.")
@click.option("--devices-per-node", type=int, default=8, show_default=True)
@click.option(
    "--workload", default="sharegpt", show_default=True, help="sharegpt, humaneval, longbench or fixed:IN,OUT."
)
@click.option("--slo", default=DEFAULT_SLO, show_default=True, metavar="ttft:MS,tpot:MS")
@click.option("--attainment", type=float, default=0.9, show_default=True, help="Share that must meet both.")
@click.option("--rate", type=float, help="Wanted requests a second; default fill the cluster.")
@click.option("--algorithm", type=click.Choice(["high", "low", "auto"]), default="auto", show_default=True)
@click.option(
    "--latency",
    type=click.Choice(["auto", "distserve", "vllm", "roofline"]),
    default="auto",
    show_default=True,
    help="Times of steps: a published A100 profile of OPT, or a roofline of any model. auto: the profile if it is "
    "of this model and device.",
)
@click.option("--stack", default="graphs", show_default=True, help="Serving software of the roofline.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--check/--no-check", default=True, show_default=True, help="Simulate the choice, where possible.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the topology YAML.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    device: str,
    nodes: int,
    devices_per_node: int,
    workload: str,
    slo: str,
    attainment: float,
    rate: float | None,
    algorithm: str,
    latency: str,
    stack: str,
    seed: int,
    check: bool,
    write: Path | None,
    as_json: bool,
) -> None:
    """Find the placement with the most goodput per device.

    Goodput is the highest request rate at which the wanted share of requests meets TTFT and TPOT both. high is the
    paper's Algorithm 1 (prefill and decode anywhere), low its Algorithm 2 (KV stays inside nodes).

    \b
    dsctl plan --model OPT-13B --nodes 4 --slo ttft:250,tpot:100 --write topology.yaml
    dsctl plan --model Llama-3-70B --device h100 --slo ttft:500,tpot:50 --rate 10 --json
    """
    from dsplan import report
    from dsplan.goodput import make_workload
    from dsplan.planner import Planner, Question
    from dsplan.shapes import find_model

    shape = find_model(model)
    times = _latency(model, device, latency, stack, devices_per_node)
    question = Question(
        shape=shape,
        device=_device(device),
        latency=times,
        nodes=nodes,
        devices_per_node=devices_per_node,
        workload=make_workload(workload, seed=seed),
        slo=_slo(slo, attainment),
        algorithm=algorithm,
        rate=rate,
    )
    plan = Planner(question).run()
    if write is not None:
        _write(plan, write)
    confirmation = _confirm(plan) if check else None
    if as_json:
        click.echo(json.dumps(report.data(plan, confirmation), indent=2))
    else:
        report.show(plan, confirmation)


def _device(name: str) -> Device:
    from dsplan.devices import find_device

    return find_device(name)


def _latency(model: str, device: str, kind: str, stack: str, node_devices: int) -> Latency:
    from dsplan.linear import distserve_latency, profiled
    from dsplan.roofline import RooflineLatency, find_stack
    from dsplan.shapes import find_model

    shape, hardware = find_model(model), _device(device)
    if kind in ("distserve", "vllm"):
        return distserve_latency(shape.name, hardware.name, kind)
    if kind == "auto" and profiled(shape.name, hardware.name):
        return distserve_latency(shape.name, hardware.name)
    return RooflineLatency(shape, hardware, find_stack(stack), node_devices)


def _slo(text: str, attainment: float) -> Slo:
    from dsctl.simulate import parse_slo
    from dsplan.goodput import Slo
    from dstopology import resolved

    found = parse_slo(text, parse_slo(DEFAULT_SLO, resolved.Slo(1.0, 1.0, attainment)))
    return Slo(found.ttft_s, found.tpot_s, attainment)


def _confirm(plan: Plan) -> Confirmation | None:
    from dsplan.confirm import agreed, confirmations, simulable

    if not simulable(plan):
        plan.notes.append("not checked in the simulator, which does not know pipeline stages yet")
        return None
    runs = confirmations(plan, CHECKED_REQUESTS)
    found = agreed(plan, runs)
    if found.rate < plan.chosen.goodput.rate:
        plan.notes.append(
            f"the simulator is less hopeful: {runs[0].attainment:.1%} at {runs[0].rate:.3g} requests/s, and its "
            f"own goodput is about {found.rate:.3g} ({found.rate / plan.chosen.devices:.3g} a device)"
        )
    return found


def _write(plan: Plan, path: Path) -> None:
    from dsplan.errors import PlanInput
    from dsplan.topology_file import text

    try:
        path.write_text(text(plan), encoding="utf-8")
    except OSError as error:
        raise PlanInput(f"the topology cannot be written to {path}: {error.strerror}") from error
