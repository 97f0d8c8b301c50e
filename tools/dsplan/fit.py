"""Fits the efficiencies of :mod:`dsplan.kernels` on kernel measurements, and says how well they hold.

    python -m dsplan.fit DIRECTORY [--write efficiency.json]

``DIRECTORY`` holds aiconfigurator's tables as gzipped CSV (``aiconfigurator/{gpu}_{table}.csv.gz``, times in ms)
and Vidur's (:mod:`dsplan.vidur`), from which the kernels of 2023 are: another library of GEMMs, and NCCL alone.
One row in five is held out of the fit, by a seeded draw, and the errors told are of those. "other device" is the
error on all held-out rows of a GPU of the parameters fitted on the other GPUs: what to expect of a device that was
not measured. Those parameters are kept, so that whole steps can be held against measurements in the same way.
Needs numpy; nothing else of the package does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsplan import kernels, vidur
from dsplan.devices import WITHOUT, Device, find_device
from dsplan.errors import PlanInput
from dsplan.kernels import Parameters

Column = np.ndarray[Any, np.dtype[np.float64]]

FILES = {"a100-80g": "a100_sxm_vllm0.14.0", "h100": "h100_sxm_vllm0.24.0", "h200": "h200_sxm_vllm0.24.0"}
SOURCE = (
    "fitted by dsplan.fit on kernel measurements of ai-dynamo/aiconfigurator at "
    "095f58a51c4ca8e61b66ec108d86f223f8d559ce (Apache-2.0), bf16, vLLM 0.14 (A100) and 0.24 (H100, H200); "
    "gemm_2023 and allreduce_2023 on those of microsoft/vidur at 7d475133 (MIT), A100 and H100, pooled for H200"
)
#: rows that a fit looks at
MOST_ROWS = 6000
#: relative error beyond which a row counts linearly, not by its square
OUTLIER = 0.15
#: query heads for each KV head beyond which no model of today goes
MOST_GROUP = 16
#: head dimension beyond which libraries fall back to slow kernels, and no model of today goes
MOST_DIM = 256


@dataclass(frozen=True, slots=True)
class Table:
    """One kind of kernel: where its measurements are and what is fitted on them."""

    name: str
    file: str
    columns: tuple[str, ...]
    where: Mapping[str, str]
    formula: Callable[..., Any]
    start: Parameters
    #: rows taken, by their columns
    keep: Callable[..., Any]
    #: rows of a device of Vidur's tables, where it is not a file
    rows: Callable[[Path, str], Iterable[tuple[float, ...]]] | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Those that were measured."""
        return tuple(vidur.GPUS if self.rows else FILES)


def _all(*columns: Column) -> Any:
    return columns[0] > 0


def _grouped(batch: Column, tokens: Column, heads: Column, kv: Column, dim: Column) -> Any:
    return (heads <= MOST_GROUP * kv) & (dim <= MOST_DIM)


def _small_s(p: Parameters, device: Device, ranks: Any, elements: Any) -> Any:
    """The table tells sizes in elements."""
    return kernels.allreduce_s(p, device, ranks, 2 * elements)


def _large_s(p: Parameters, device: Device, ranks: Any, elements: Any) -> Any:
    return kernels.switched_allreduce_s(p, device, ranks, 2 * elements)


def _large(ranks: Column, elements: Column) -> Any:
    return 2 * elements >= kernels.LARGE_ALLREDUCE


def _small(ranks: Column, elements: Column) -> Any:
    return 2 * elements < kernels.LARGE_ALLREDUCE


_BF16 = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "window_size": "0"}
_HEADS = ("num_heads", "num_key_value_heads", "head_dim")
_GRAPH = {"backend": "vllm_graph"}
_REDUCE = ("num_gpus", "message_size")
TABLES = (
    Table(
        "gemm",
        "gemm",
        ("m", "n", "k"),
        {"gemm_dtype": "bfloat16"},
        kernels.gemm_s,
        (4e3, 0.85, 0.8, 64.0, 3.0, 3e3),
        _all,
    ),
    Table(
        "context",
        "context_attention",
        ("batch_size", "isl", *_HEADS),
        _BF16,
        kernels.context_s,
        (16e3, 0.6, 4.0, 2.0, 10.0, 0.5, 0.3),
        _grouped,
    ),
    Table(
        "generation",
        "generation_attention",
        ("batch_size", "step", *_HEADS),
        _BF16,
        kernels.generation_s,
        (12e3, 0.8, 0.2, 0.15, 2.0, 1.5, 8.0, 1.5),
        _grouped,
    ),
    Table("allreduce_small", "custom_allreduce", _REDUCE, _GRAPH, _small_s, (4e-6, 1e-7, 0.3), _small),
    Table("allreduce_large", "custom_allreduce", _REDUCE, _GRAPH, _large_s, (1e-5, 1e-6, 0.6), _large),
    Table("gemm_2023", "", (), {}, kernels.gemm_s, (4e3, 0.85, 0.8, 64.0, 3.0, 3e3), _all, vidur.gemms),
    Table("allreduce_2023", "", (), {}, kernels.nccl_s, (3e-5, 1e-7, 0.6), _all, vidur.allreduces),
)


@dataclass(frozen=True, slots=True)
class Split:
    """Measurements of one table on one device."""

    device: Device
    train: tuple[Column, Column]
    test: tuple[Column, Column]


def read(directory: Path, table: Table, device: str) -> Split:
    """The rows of a table, split by a seeded draw: one in five for the test."""
    data = np.array(list(_rows(directory, table, device))).T
    data = data[:, np.asarray(table.keep(*data[:-1]), dtype=bool)]
    order = np.random.default_rng(0).permutation(data.shape[1])
    held = order[: data.shape[1] // 5]
    used = order[data.shape[1] // 5 :][:MOST_ROWS]
    seconds = data[-1]
    return Split(find_device(device), (data[:-1][:, used], seconds[used]), (data[:-1][:, held], seconds[held]))


def _rows(directory: Path, table: Table, device: str) -> Iterable[tuple[float, ...]]:
    """Sizes, and seconds last."""
    if table.rows is not None:
        yield from table.rows(directory / "vidur", device)
        return
    for row in vidur.lines(directory / "aiconfigurator" / f"{FILES[device]}_{table.file}.csv.gz"):
        if all(row.get(name, value) == value for name, value in table.where.items()):
            yield *(float(row[name]) for name in table.columns), float(row["latency_ms"]) / 1e3


def predicted(table: Table, parameters: Parameters, device: Device, inputs: Column) -> Column:
    """The formula over columns."""
    return np.asarray(table.formula(parameters, device, *inputs), dtype=np.float64)


def fit(table: Table, splits: list[Split]) -> Parameters:
    """Parameters with the least error in log time, outliers weighed down; one set for all ``splits``."""

    def errors(logs: Column) -> Column:
        with np.errstate(all="ignore"):
            values = tuple(np.exp(logs))
            parts = [np.log(predicted(table, values, s.device, s.train[0]) / s.train[1]) for s in splits]
        return np.concatenate(parts)

    return tuple(float(x) for x in np.exp(_minimum(errors, np.log(np.array(table.start)))))


def _cost(errors: Column) -> float:
    return float((np.sqrt(1 + (errors / OUTLIER) ** 2) - 1).sum())


def _minimum(errors: Callable[[Column], Column], at: Column, rounds: int = 60) -> Column:
    """Levenberg-Marquardt with a numeric Jacobian and the pseudo-Huber loss."""
    now, damping = errors(at), 1e-2
    for _ in range(rounds):
        jacobian = np.stack([(errors(at + 1e-4 * unit) - now) / 1e-4 for unit in np.eye(len(at))], axis=1)
        weights = 1 / np.sqrt(1 + (now / OUTLIER) ** 2)
        normal = jacobian.T @ (jacobian * weights[:, None])
        gradient = jacobian.T @ (now * weights)
        before = _cost(now)
        for _ in range(8):
            scale = np.diag(np.diag(normal) + 1e-9)
            step = np.clip(-np.linalg.solve(normal + damping * scale, gradient), -1, 1)
            then = errors(at + step)
            if np.isfinite(_cost(then)) and _cost(then) < before:
                break
            damping *= 4
        else:
            break
        at, now, damping = at + step, then, damping / 4
        if (before - _cost(now)) / before < 1e-5:
            break
    return at


def report(table: Table, parameters: Parameters, split: Split) -> dict[str, float]:
    """Errors on the held-out rows, in per cent: mean, median and 90th percentile of each row's, and of the sum."""
    inputs, seconds = split.test
    model = predicted(table, parameters, split.device, inputs)
    error = np.abs(model / seconds - 1) * 100
    return {
        "rows": len(seconds),
        "mape": round(float(error.mean()), 1),
        "median": round(float(np.median(error)), 1),
        "p90": round(float(np.quantile(error, 0.9)), 1),
        "weighted": round(float(np.abs(model - seconds).sum() / seconds.sum()) * 100, 1),
    }


def run(directory: Path) -> dict[str, Any]:
    """Fit every table on every device and on all together; the content of ``data/efficiency.json``."""
    out: dict[str, Any] = {"source": SOURCE, "devices": {}, "errors": {}}
    for table in TABLES:
        splits = {device: read(directory, table, device) for device in table.devices}
        pooled = fit(table, list(splits.values()))
        unmeasured = [each for name in FILES if name not in splits for each in (name, f"{WITHOUT}{name}")]
        for name in ("pooled", *unmeasured):
            out["devices"].setdefault(name, {})[table.name] = _rounded(pooled)
        for device, split in splits.items():
            own = fit(table, [split])
            others = fit(table, [other for name, other in splits.items() if name != device])
            out["devices"].setdefault(device, {})[table.name] = _rounded(own)
            out["devices"].setdefault(f"{WITHOUT}{device}", {})[table.name] = _rounded(others)
            out["errors"].setdefault(device, {})[table.name] = {
                "held_out": report(table, own, split),
                "other_device": report(table, others, split),
            }
    out["devices"]["pooled, before Hopper"] = _unsplit(out["devices"])
    return out


def _unsplit(devices: Mapping[str, Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """The pooled parameters, but decode attention of heads that share no KV as on the A100.

    Of the measured devices it is the only one whose kernel for it does not split a context.
    """
    pooled, place = devices["pooled"], kernels.GENERATION_NAMES.index("ungrouped_serial_cycles")
    generation = list(pooled["generation"])
    generation[place] = devices["a100-80g"]["generation"][place]
    return {**pooled, "generation": generation}


def _rounded(parameters: Parameters) -> list[float]:
    return [float(f"{value:.5g}") for value in parameters]


def main() -> None:
    """Fit, print the errors, and write the file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the measurements; their names are above")
    parser.add_argument("--write", type=Path, metavar="FILE.json", help="keep what was fitted")
    given = parser.parse_args()
    try:
        found = run(given.directory)
    except PlanInput as error:
        parser.exit(error.exit_code, f"error[{error.code}]: {error}\nremedy: {error.remedy}\n")
    for device, tables in found["errors"].items():
        for name, kinds in tables.items():
            for kind, errors in kinds.items():
                print(f"{device:9} {name:16} {kind:13}", " ".join(f"{k} {v:g}" for k, v in errors.items()))
    if given.write:
        given.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
