"""DistServe's linear latency model, with the coefficients its repository publishes for OPT on A100-80G.

    prefill stage = (a + b sum(l) + c sum(l^2)) / pp + 1 ms * pp
    decode stage  = (a + b sum(context) + c batch) / pp,   "small" fit below ``large_batch`` sequences

This is what its simulator uses, and not the form of the paper's appendix (:mod:`dsplan.paper`). The file
``data/distserve-a100-80g.json`` names the source, and the factors that were set by hand. The simulator's extra
``2 ms + 1e-4 ms * tokens`` a step ("ray overhead") is not in it: it belongs to that program's Ray actors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from dsplan.errors import ProfileMismatch
from dsplan.latency import missing_degree
from dssim.times import Linear, LinearTimes

#: what a pipeline adds to each stage of prefill for each stage, hand-set in DistServe's simulator
STAGE_S = 1e-3


@dataclass(frozen=True, slots=True)
class LinearInstance:
    """One TP fit, cut into ``stages``. Coefficients in milliseconds."""

    prefill: tuple[float, float, float]
    decode_small: tuple[float, float, float]
    decode_large: tuple[float, float, float]
    #: sequences of a stage's batch from which the large fit holds
    large_batch: int
    stages: int = 1

    def prefill_stage_s(self, tokens: int, squares: int, count: int) -> float:
        """See the module. ``count`` has no part in this form."""
        a, b, c = self.prefill
        whole_ms = a + b * tokens + c * squares
        pipeline_s = STAGE_S * self.stages if self.stages > 1 else 0.0
        return whole_ms / 1e3 / self.stages + pipeline_s

    def decode_step_s(self, batch: int, tokens: int) -> float:
        """A token for each sequence: ``stages`` micro-batches of ``batch / stages`` go round."""
        micro = batch / self.stages
        a, b, c = self.decode_small if micro < self.large_batch else self.decode_large
        # each of the pp stages takes 1/pp of the time, and a sequence passes all of them
        return (a + b * tokens / self.stages + c * micro) / 1e3

    def mixed_stage_s(self, tokens: float, squares: float, count: int, batch: int, context: float) -> float:
        """The matrices are read once: the longer of what prefill takes for all rows and what decode takes for its
        own; then attention of both. Not in DistServe, whose engine mixes nothing."""
        base, per_token, per_square = self.prefill
        a, b, c = self.decode_small if batch < self.large_batch else self.decode_large
        whole_ms = max(base + per_token * (tokens + batch), a + c * batch) + per_square * squares + b * context
        pipeline_s = STAGE_S * self.stages if self.stages > 1 else 0.0
        return whole_ms / 1e3 / self.stages + pipeline_s

    def steps(self) -> LinearTimes:
        """The same for the simulator, which knows this form."""
        a, b, c = (one / 1e3 for one in self.prefill)
        pipeline_s = STAGE_S * self.stages**2 if self.stages > 1 else 0.0
        small, large = (
            Linear(base / 1e3, token / 1e3, 0.0, sequence / 1e3)
            for base, token, sequence in (self.decode_small, self.decode_large)
        )
        return LinearTimes(Linear(a + pipeline_s, b, c), small, large, self.large_batch)


@dataclass(frozen=True, slots=True)
class LinearLatency:
    """The fits of one model by one engine."""

    source: str
    fits: dict[int, dict[str, Any]]

    def degrees(self) -> tuple[int, ...] | None:
        """The TP degrees that were measured."""
        return tuple(self.fits)

    def instance(self, tp: int, pp: int) -> LinearInstance:
        """Raises :class:`ProfileMismatch` for a TP without a fit."""
        fit = self.fits.get(tp)
        if fit is None:
            raise missing_degree(self.source, tp, tuple(self.fits))
        parts = [tuple(fit[part]) for part in ("prefill", "decode_small", "decode_large")]
        return LinearInstance(parts[0], parts[1], parts[2], fit["large_batch"], pp)


@cache
def published() -> dict[str, Any]:
    """The shipped file as it is."""
    found: dict[str, Any] = json.loads(files("dsplan").joinpath("data/distserve-a100-80g.json").read_text())
    return found


def profiled(model: str, device: str, engine: str = "distserve") -> bool:
    """Whether there is a published profile of that model on that device."""
    return device == published()["device"] and model in published()["engines"][engine]


def distserve_latency(model: str, device: str, engine: str = "distserve") -> LinearLatency:
    """The published profile. Raises :class:`ProfileMismatch` for another model or device than those it is of."""
    document = published()
    models = document["engines"][engine]
    if device != document["device"]:
        raise ProfileMismatch(
            f"the profile of {engine} was taken on {document['device']}, not on {device}",
            remedy="use --latency roofline for this device, or plan for the profile's",
        )
    if model not in models:
        raise ProfileMismatch(
            f"the profile of {engine} is of {', '.join(models)}, not of {model}",
            remedy="use --latency roofline, which takes any model",
        )
    fits = {int(tp): fit for tp, fit in models[model].items()}
    return LinearLatency(f"{engine}'s published fit of {model} on {device}", fits)
