"""How far the roofline is from measurements: mean and 90th percentile of the relative error, by table.

Two sources. :func:`published` reads public measurements from a directory that the user names (Vidur's kernels,
Splitwise's whole steps, aiconfigurator's whole requests) and DistServe's profile of OPT, which is shipped. The
kernels of today were not fitted on any of it, those of 2023 on Vidur's, and five numbers of the stack
"eager-2023" were set on Splitwise's rows at TP 2 and 8. Each of these rows is also modelled as if nobody had
measured its device, with efficiencies fitted on the other devices: the error to expect of an unknown one.
:func:`measured` reads a CSV of one's own, with the columns :data:`COLUMNS`: a model (a known name or a config), a
device, ``tp``, ``pp``, ``phase`` (prefill or decode), ``batch``, ``tokens`` of each prompt or of each context,
and ``ms`` of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from types import MappingProxyType

from dsplan import kernels, served, vidur
from dsplan.devices import find_device, unseen
from dsplan.errors import PlanInput
from dsplan.latency import Instance
from dsplan.linear import distserve_latency
from dsplan.linear import published as distserve
from dsplan.roofline import STACKS, STEADY_TOKENS, RooflineInstance, RooflineLatency, Stack, efficiencies
from dsplan.shapes import find_model
from dswire.errors import DsError

COLUMNS = ("model", "device", "tp", "pp", "phase", "batch", "tokens", "ms")
#: Splitwise's table, and the mean number of output tokens before one of which it tells the time
_SPLITWISE = "splitwise_perf_model_a100_llama2_70b.csv.gz"
_SPLITWISE_STEPS = 64
#: model and TP whose fit DistServe's history calls that of vLLM
DOUBTFUL = "OPT-66B", 8
_GRID = (
    *(("prefill", 1, tokens) for tokens in (256, 512, 1024, 2048)),
    *(("decode", batch, 512) for batch in (1, 8, 32, 64, 128)),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement beside the model's word."""

    table: str
    measured_s: float
    modelled_s: float
    #: by efficiencies that were fitted on other devices only; None where the device's were not fitted on it
    blind_s: float | None = None

    @property
    def error(self) -> float:
        """Relative, without sign."""
        return abs(self.modelled_s / self.measured_s - 1)

    @property
    def blind_error(self) -> float | None:
        """The same for a device that nobody measured."""
        return None if self.blind_s is None else abs(self.blind_s / self.measured_s - 1)


@dataclass(frozen=True, slots=True)
class Error:
    """Errors of a table, as shares."""

    table: str
    rows: int
    mape: float
    p90: float
    #: of the median row, with its sign: above 0 the model is too slow
    bias: float
    #: mean error with the efficiencies of other devices only, where that can be told
    blind: float | None = None


def errors(rows: list[Row]) -> list[Error]:
    """One for each table, in order of appearance."""
    tables: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        tables[row.table].append(row)
    found = []
    for name, each in tables.items():
        sizes = sorted(row.error for row in each)
        bias = median(row.modelled_s / row.measured_s - 1 for row in each)
        ninth = sizes[min(int(len(sizes) * 0.9), len(sizes) - 1)]
        unseen_errors = [row.blind_error for row in each if row.blind_error is not None]
        blind = mean(unseen_errors) if unseen_errors else None
        found.append(Error(name, len(each), mean(sizes), ninth, bias, blind))
    return found


def step_s(instance: Instance, phase: str, batch: int, tokens: int) -> float:
    """A whole step over ``batch`` prompts or contexts of ``tokens`` each."""
    if phase == "prefill":
        return instance.stages * instance.prefill_stage_s(batch * tokens, batch * tokens * tokens, batch)
    return instance.decode_step_s(batch, batch * tokens)


# measurements of one's own


def measured(path: Path, stack: Stack, otherwise: Mapping[str, str] = MappingProxyType({})) -> list[Row]:
    """The rows of a CSV; columns that it has not are ``otherwise``.

    Raises :class:`PlanInput` naming the row and column that make no sense.
    """
    rows = []
    for number, told in enumerate(vidur.lines(path), 2):
        row = {**otherwise, **{name: value for name, value in told.items() if value}}
        try:
            instance = _instance(row, stack)
            phase = row["phase"]
            if phase not in ("prefill", "decode"):
                raise ValueError(f"phase is {phase!r}, not prefill or decode")
            batch, tokens, ms = _positive(row, "batch"), _positive(row, "tokens"), float(row["ms"])
            if not 0 < ms < 1e9:
                raise ValueError(f"ms is {ms:g}")
        except KeyError as error:
            raise PlanInput(
                f"{path}, line {number}: there is no {error.args[0]}",
                remedy=f"give the columns {', '.join(COLUMNS)}",
            ) from error
        except (ValueError, DsError) as error:
            remedy = getattr(error, "remedy", "") or f"give the columns {', '.join(COLUMNS)}"
            raise PlanInput(f"{path}, line {number}: {error}", remedy=remedy) from error
        rows.append(
            Row(f"{row['model']} {row['device']} {phase}", ms / 1e3, step_s(instance, phase, batch, tokens))
        )
    if not rows:
        raise PlanInput(f"{path} has no rows", remedy=f"give the columns {', '.join(COLUMNS)}")
    return rows


def _positive(row: Mapping[str, str], name: str) -> int:
    value = int(row[name])
    if value < 1:
        raise ValueError(f"{name} is {value}, below 1")
    return value


def _instance(row: Mapping[str, str], stack: Stack) -> RooflineInstance:
    latency = RooflineLatency(find_model(row["model"]), find_device(row["device"]), stack)
    return latency.instance(_positive(row, "tp"), _positive(row, "pp"))


# published ones


def published(directory: Path) -> list[Row]:
    """Every table of ``directory`` that is there, and DistServe's profile. Raises :class:`PlanInput` for none."""
    rows: list[Row] = []
    if (directory / "vidur").is_dir():
        rows += _vidur_kernels(directory / "vidur")
        rows += _vidur_attention(directory / "vidur")
    if (directory / _SPLITWISE).exists():
        rows += _splitwise(directory / _SPLITWISE)
    if (directory / served.FILE).exists():
        rows += _served(directory / served.FILE)
    if not rows:
        raise PlanInput(
            f"{directory} holds no measurements that are known here",
            remedy="name a directory with vidur/*_mlp.csv.gz or Splitwise's table; docs/planning.md tells of both",
        )
    return rows + distserve_rows()


def _vidur_kernels(directory: Path) -> Iterator[Row]:
    """The four GEMMs of a layer, one row each, and the all-reduces that no engine does by a kernel of its own."""
    for device in map(find_device, vidur.GPUS):
        fitted = [efficiencies(each.efficiency) for each in (device, unseen(device))]
        for m, n, k, seconds in vidur.gemms(directory, device.name):
            times = [float(kernels.gemm_s(each["gemm"], device, m, n, k)) for each in fitted]
            yield Row(f"GEMMs of a layer, {device.name}", seconds, *times)
        for ranks, nbytes, seconds in vidur.allreduces(directory, device.name):
            if nbytes >= kernels.LARGE_ALLREDUCE:
                times = [float(kernels.allreduce_s(e["allreduce_large"], device, ranks, nbytes)) for e in fitted]
                yield Row(f"all-reduce from 8 MiB, {device.name}", seconds, *times)


def _vidur_attention(directory: Path) -> Iterator[Row]:
    device = find_device("a100-80g")
    fitted = [efficiencies(each.efficiency)["generation"] for each in (device, unseen(device))]
    for path in sorted(directory.glob("a100_attention*.csv.gz")):
        for row in vidur.lines(path):
            if row["is_prefill"] == "True" or int(row["kv_cache_size"]) == 0:
                continue
            tp, dim = int(row["num_tensor_parallel_workers"]), int(row["n_embd"]) // int(row["n_q_head"])
            heads, kv = int(row["n_q_head"]) // tp, int(row["n_kv_head"]) // tp
            batch, held = int(row["batch_size"]), int(row["kv_cache_size"])
            times = [kernels.generation_s(each, device, batch, held, heads, kv, dim) for each in fitted]
            yield Row("decode attention, a100-80g", float(row["time_stats.attn_decode.median"]) / 1e3, *times)


def _splitwise(path: Path) -> list[Row]:
    """Medians of the repeats; one cell (TP 2, batch 64) is known to be wrong and left out."""
    cells: dict[tuple[int, int, int], list[tuple[float, float]]] = defaultdict(list)
    for row in vidur.lines(path):
        key = int(row["tensor_parallel"]), int(row["batch_size"]), int(row["prompt_size"])
        if key[:2] != (2, 64):
            cells[key].append((float(row["prompt_time"]), float(row["token_time"])))
    latencies = _both("Llama-2-70B", "a100-80g", STACKS["eager-2023"])
    rows = []
    for (tp, batch, tokens), times in cells.items():
        instances = [latency.instance(tp, 1) for latency in latencies]
        told = "held out" if tp == 4 else "set on"
        for phase, column, length in (("prefill", 0, tokens), ("decode", 1, tokens + _SPLITWISE_STEPS)):
            seconds = median(one[column] for one in times) / 1e3
            extent = "to" if batch * tokens <= STEADY_TOKENS else "beyond"
            what = "decode" if column else f"prefill {extent} {STEADY_TOKENS} tokens"
            name = f"Splitwise {what}, Llama-2-70B TP {tp} ({told})"
            rows.append(Row(name, seconds, *(step_s(each, phase, batch, length) for each in instances)))
    return rows


def _served(path: Path) -> Iterator[Row]:
    """Requests of engines of today."""
    for load in served.loads(path):
        instances = [one.instance(load.tp, load.pp) for one in _both(load.model, load.device, STACKS["graphs"])]
        name = f"requests of {load.engine}, {load.model}, {load.device}"
        yield Row(name, load.measured_s, *map(load.modelled_s, instances))


def _both(model: str, device: str, stack: Stack) -> tuple[RooflineLatency, RooflineLatency]:
    """As it is, and as it would be had the device never been measured."""
    shape, known = find_model(model), find_device(device)
    return RooflineLatency(shape, known, stack), RooflineLatency(shape, unseen(known), stack)


def distserve_rows() -> list[Row]:
    """OPT-13B and 66B on a grid of DistServe's own fits, without the factors that were set by hand."""
    rows = []
    device, by_hand = find_device(distserve()["device"]), distserve()["hand_set"]["distserve"]
    for model, fits in distserve()["engines"]["distserve"].items():
        theirs, ours = distserve_latency(model, device.name), _both(model, device.name, STACKS["nccl-2023"])
        for tp in (tp for tp in map(int, fits) if find_model(model).heads % tp == 0):
            one, others = theirs.instance(tp, 1), [each.instance(tp, 1) for each in ours]
            where = f"{model} TP 8 (doubtful)" if (model, tp) == DOUBTFUL else model
            for phase, batch, tokens in _GRID:
                told = step_s(one, phase, batch, tokens) / by_hand[phase]
                times = [step_s(each, phase, batch, tokens) for each in others]
                rows.append(Row(f"DistServe {phase}, {where}", told, *times))
    return rows
