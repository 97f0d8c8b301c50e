"""``dsbench simdistserve``: DistServe's own simulator beside this one, on the same requests and step times.

It is theirs, run from a checkout that the user has, with a Python that has its simpy and pandas. Both get the same
arrivals and lengths, and DistServe's published fit of the model. What differs is the systems: theirs moves KV in no
time, adds an overhead of its own to each step, keeps no KV resident, and batches as many prompts as wait.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsplan.goodput import Slo, Workload
    from dsplan.placement import Spec

#: what runs in their Python: latencies of each request, in milliseconds, as JSON on the last line
DRIVER = """
import json, sys
from simdistserve.benchmarks.simulate_dist import main, parse_args
found = {}
main(parse_args(sys.argv[1:]), found)
table = found["per_request_latency_df"]
print(json.dumps([table["first_token_latency"].tolist(), table["tpot"].tolist()]))
"""
#: seconds after which theirs is given up
PATIENCE_S = 1800
#: their names of the models that they ship a fit of
MODELS = {"OPT-13B": "facebook/opt-13b", "OPT-66B": "facebook/opt-66b"}


@dataclass(frozen=True, slots=True)
class Told:
    """What a simulator says of a rate. Milliseconds, and the share of requests that met both objectives."""

    simulator: str
    rate: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    attainment: float


@click.command()
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option("--python", default=sys.executable, help="A Python with simpy and pandas; default this one.")
@click.option("--model", type=click.Choice(list(MODELS)), default="OPT-13B", show_default=True)
@click.option("--prefill-tp", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--decode-tp", type=click.IntRange(1, 8), default=1, show_default=True)
@click.option("--workload", default="sharegpt", show_default=True, help="As for `dsctl plan`.")
@click.option("--rates", default="1.5,3,4.5,6", show_default=True, help="Requests a second of the whole system.")
@click.option("--requests", type=click.IntRange(50, 12_000), default=300, show_default=True)
@click.option("--slo", default="ttft:250,tpot:100", show_default=True, metavar="ttft:MS,tpot:MS")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    checkout: Path,
    python: str,
    model: str,
    prefill_tp: int,
    decode_tp: int,
    workload: str,
    rates: str,
    requests: int,
    slo: str,
    seed: int,
    as_json: bool,
) -> None:
    """Hold DistServe's simulator and this one against each other on the same requests.

    CHECKOUT is a clone of github.com/LLMServe/DistServe.

    \b
    dsbench simdistserve ../DistServe --python ../venv/bin/python
    dsbench simdistserve ../DistServe --model OPT-66B --prefill-tp 4 --decode-tp 4 --slo ttft:2500,tpot:150
    """
    from dsctl.plan import _slo
    from dsplan.goodput import make_workload
    from dsplan.placement import Group, Spec
    from dsplan.search import Parallel

    _check(checkout)
    drawn, objectives = make_workload(workload, seed=seed), _slo(slo, 0.9)
    spec = Spec("high", Group(Parallel(prefill_tp, 1), 1), Group(Parallel(decode_tp, 1), 1))
    told = []
    for rate in _rates(rates):
        told.append(theirs(checkout, python, model, spec, drawn, rate, requests, objectives))
        told.append(ours(model, spec, drawn, rate, requests, objectives))
    if as_json:
        click.echo(json.dumps([asdict(one) for one in told], indent=2))
        return
    _show(told)


def _check(checkout: Path) -> None:
    from dswire.errors import BadInput

    if not (checkout / "simdistserve" / "benchmarks" / "simulate_dist.py").is_file():
        raise BadInput(
            f"{checkout} holds no simdistserve/benchmarks/simulate_dist.py",
            remedy="name a clone of github.com/LLMServe/DistServe",
        )


def _rates(text: str) -> list[float]:
    from dswire.errors import BadInput

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0.01 <= rate <= 1000 for rate in found):
        raise BadInput(f"--rates {text!r} is not understood", remedy="write 1.5,3,4.5; each between 0.01 and 1000")
    return found


def theirs(
    checkout: Path, python: str, model: str, spec: Spec, drawn: Workload, rate: float, requests: int, slo: Slo
) -> Told:
    """Their word. Raises :class:`StartFailed` where their program fails, with its last line."""
    from dswire.errors import StartFailed

    rows = [
        {"start_time": at / rate, "prompt_len": prompt, "output_len": output}
        for at, prompt, output in drawn.requests[:requests]
    ]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "requests.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        given = ["--arrival", "custom", "--workload", str(path), "--N", str(len(rows)), "--model", MODELS[model]]
        given += ["--tp-prefill", str(spec.prefill.parallel.tp), "--tp-decode", str(spec.decode.parallel.tp)]
        try:
            done = subprocess.run(
                [python, "-c", DRIVER, *given], cwd=checkout, capture_output=True, text=True, timeout=PATIENCE_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StartFailed(f"simdistserve did not run: {error}", remedy="name a Python with --python") from error
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().rpartition("\n")[2]
    if done.returncode:
        raise StartFailed(
            f"simdistserve failed: {last}", remedy="install simpy, pandas and numpy for the Python of --python"
        )
    ttfts, tpots = ([ms / 1e3 for ms in each] for each in json.loads(last))
    return _told("simdistserve", rate, ttfts, tpots, slo)


def ours(model: str, spec: Spec, drawn: Workload, rate: float, requests: int, slo: Slo) -> Told:
    """The word of this simulator, over the servers' own schedulers."""
    from dsplan.confirm import simulated
    from dsplan.devices import find_device
    from dsplan.linear import distserve_latency
    from dsplan.question import Question
    from dsplan.shapes import find_model

    device = find_device("a100-80g")
    latency = distserve_latency(model, device.name)
    question = Question(find_model(model), device, latency, 1, spec.devices, drawn, slo)
    _, run, _ = simulated(question, spec, rate, requests, requests)
    return _told("this one", rate, [one.ttft_s for one in run.records], [one.tpot_s for one in run.records], slo)


def _told(name: str, rate: float, ttfts: Sequence[float], tpots: Sequence[float], slo: Slo) -> Told:
    hits = sum(a <= slo.ttft_s and b <= slo.tpot_s for a, b in zip(ttfts, tpots, strict=True))
    return Told(
        name,
        rate,
        ttft_p50_ms=_percentile(ttfts, 50) * 1e3,
        ttft_p90_ms=_percentile(ttfts, 90) * 1e3,
        tpot_p50_ms=_percentile(tpots, 50) * 1e3,
        tpot_p90_ms=_percentile(tpots, 90) * 1e3,
        attainment=hits / len(ttfts),
    )


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) * percent // 100, len(values) - 1)]


def _show(told: Sequence[Told]) -> None:
    from dsobserve.terminal import figures, output

    head = ("requests/s", "simulator", "TTFT p50 ms", "p90", "TPOT p50 ms", "p90", "both objectives")
    table = figures(*head, words=2, title="two simulators, the same requests")
    for one in told:
        shown = (one.ttft_p50_ms, one.ttft_p90_ms, one.tpot_p50_ms, one.tpot_p90_ms)
        table.add_row(f"{one.rate:g}", one.simulator, *(f"{ms:.4g}" for ms in shown), f"{one.attainment:.1%}")
    console = output()
    console.print(table)
    console.print("TPOT: simdistserve divides by all output tokens, this one by those after the first.")
