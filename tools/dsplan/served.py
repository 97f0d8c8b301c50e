"""Whole requests of systems that always hold a number of them, as aiconfigurator's ``silicon_sample.csv`` tells.

Only 16-bit models of a known shape, prompts and decode on the same devices, and systems whose memory holds what
they were given: where requests wait for memory, their times tell of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsplan import vidur
from dsplan.devices import find_device
from dsplan.errors import PlanInput
from dsplan.latency import Instance
from dsplan.memory import memory
from dsplan.shapes import find_model

#: name of the table
FILE = "silicon_sample.csv"
#: its names of what is known here under another
DEVICES = {"a100_sxm": "a100-80g", "h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200", "l40s": "l40s"}
MODELS = {"Qwen/Qwen3-32B": "Qwen3-32B", "meta-llama/Llama-3.1-8B-Instruct": "Llama-3-8B"}


@dataclass(frozen=True, slots=True)
class Load:
    """``held`` requests at any time, each of ``prompt`` tokens and ``output`` more."""

    engine: str
    model: str
    device: str
    tp: int
    pp: int
    held: int
    prompt: int
    output: int
    #: from a request's arrival to its last token, the mean
    measured_s: float

    def modelled_s(self, instance: Instance) -> float:
        """While a request makes its tokens, as many prompts are read as there are requests, beside the others."""
        context = self.held * (self.prompt + self.output // 2)
        step_s = instance.decode_step_s(self.held, context)
        micro, of_it = -(-self.held // instance.stages), context // instance.stages
        mixed_s = instance.mixed_stage_s(self.prompt, self.prompt**2, 1, micro, of_it)
        reading_s = mixed_s - step_s / instance.stages
        return self.output * step_s + self.held * reading_s


def loads(path: Path) -> Iterator[Load]:
    """Raises :class:`PlanInput` for a table that has not its columns."""
    for row in vidur.lines(path):
        try:
            known = row["model_path"] in MODELS and row["system"] in DEVICES
            if known and row["mode"] == "agg" and not row["gemm_quant_mode"]:
                load = _load(row)
                shape, device = find_model(load.model), find_device(load.device)
                room = memory(shape, device, load.tp, load.pp).kv_tokens
                if load.held * (load.prompt + load.output) <= room:
                    yield load
        except (KeyError, ValueError) as error:
            raise PlanInput(f"{path}: {error!r} in a row", remedy=f"give aiconfigurator's {FILE}") from error


def _load(row: vidur.Row) -> Load:
    output = int(row["osl"])
    life_ms = float(row["silicon_ttft_ms"]) + (output - 1) * float(row["silicon_tpot_ms"])
    return Load(
        engine=f"{row['backend']} {row['backend_version']}",
        model=MODELS[row["model_path"]],
        device=DEVICES[row["system"]],
        tp=int(row["tp_size"]),
        pp=int(row["pp_size"]),
        held=int(row["batch_size"]),
        prompt=int(row["isl"]),
        output=output,
        measured_s=life_ms / 1e3,
    )
