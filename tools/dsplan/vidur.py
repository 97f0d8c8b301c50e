"""Vidur's tables of kernels, as rows of sizes and seconds: software of 2023, one GPU after the other kept busy."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path

from dsplan.errors import PlanInput

Row = dict[str, str]

#: beginning of the file names, by device
GPUS = {"a100-80g": "a100", "h100": "h100"}


def lines(path: Path) -> Iterator[Row]:
    """Rows of a CSV, gzipped or not. Raises :class:`PlanInput` for one that cannot be read."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as text:
            yield from csv.DictReader(text)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise PlanInput(
            f"{path} cannot be read: {why}", remedy="docs/planning.md tells which tables are read"
        ) from error


def gemms(directory: Path, device: str) -> Iterator[tuple[float, float, float, float]]:
    """Rows, columns, inner size and median of every GEMM of a layer."""
    for path in sorted(directory.glob(f"{GPUS[device]}_*_mlp.csv.gz")):
        for row in lines(path):
            tp, tokens, hidden = (int(row[n]) for n in ("num_tensor_parallel_workers", "num_tokens", "n_embd"))
            heads, kv, inner = int(row["n_head"]), int(row["n_kv_head"]), int(row["n_expanded_embd"])
            wide = inner * (2 if row["use_gated_mlp"] == "True" else 1)
            shapes = {
                "attn_pre_proj": (hidden * (heads + 2 * kv) / heads / tp, hidden),
                "attn_post_proj": (hidden, hidden / tp),
                "mlp_up_proj": (wide / tp, hidden),
                "mlp_down_proj": (hidden, inner / tp),
            }
            for name, (n, k) in shapes.items():
                told = row[f"time_stats.{name}.median"]
                if told and float(told) > 0:
                    yield tokens, n, k, float(told) / 1e3


def allreduces(directory: Path, device: str) -> Iterator[tuple[float, float, float]]:
    """Ranks of one node, bytes and median of every all-reduce, as its first rank saw it. NCCL."""
    path = directory / f"network_{GPUS[device]}_dgx_all_reduce.csv.gz"
    for row in lines(path) if path.exists() else ():
        ranks = int(row["num_workers"])
        if ranks == int(row["devices_per_node"]) > 1 and row["rank"] == "0":
            yield ranks, int(row["size"]), float(row["time_stats.all_reduce.median"]) / 1e3
