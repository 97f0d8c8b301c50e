"""A measured profile: how long the steps of one model take on one machine, as ``dsctl profile`` found out.

A JSON file: whose it is (machine, model, dtype, threads), the measured points, and for each TP the coefficients of
the linear form that the simulator (:mod:`dssim.times`) and the planner read. It is written after each point, so
that a profile that was interrupted goes on where it stood. A profile of another model, dtype or number of threads
is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsengine.snapshot import identity
from dshost.home import home
from dsobserve.files import writing
from dsplan.errors import ProfileMismatch
from dsplan.latency import missing_degree
from dssim.times import LinearTimes, linear_times
from dstopology.resolved import Topology
from dswire.errors import BadInput, DsError

#: of the file; one that we do not know is refused
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """What a profile is of."""

    machine: str
    model: str
    #: identity of the model's files
    fingerprint: str
    dtype: str
    #: CPU threads of one rank
    threads: int
    #: ``int8``, or None where weights are as ``dtype``
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One step, measured."""

    #: (first position, tokens) of each sequence in the step
    spans: tuple[tuple[int, int], ...]
    #: median, and the least, of the repetitions
    seconds: float
    least_s: float

    @property
    def decode(self) -> bool:
        """Whether every sequence makes one token."""
        return all(tokens == 1 for _, tokens in self.spans)


@dataclass
class Profile:
    """The file's content."""

    subject: Subject
    #: by TP
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    #: by TP, as :func:`dssim.times.linear_times` reads it, with ``saturating_tokens`` and ``errors``
    fits: dict[int, dict[str, Any]] = field(default_factory=dict)
    #: measured fields of :class:`dssim.times.FlatTransfer`
    transfer: dict[str, float] = field(default_factory=dict)
    #: phase -> how many times as long a step takes while another instance of the node is in one
    beside: dict[str, float] = field(default_factory=dict)
    #: phase -> when a step was measured, and how many times as long as foretold it took, in order of time
    noise: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def find(self, tp: int, spans: tuple[tuple[int, int], ...]) -> Sample | None:
        """The sample of that step."""
        return next((one for one in self.samples.get(tp, ()) if one.spans == spans), None)

    def save(self, path: Path) -> None:
        """Replace the file at once. Raises :class:`BadInput`."""
        document = {
            "format": FORMAT,
            "source": f"dsctl profile: {self.subject.model} on {self.subject.machine}",
            "subject": asdict(self.subject),
            "transfer": self.transfer,
            "beside": self.beside,
            "noise": self.noise,
            "tp": {str(tp): fit for tp, fit in self.fits.items()},
            "samples": {str(tp): [asdict(one) for one in samples] for tp, samples in self.samples.items()},
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with writing("profile", path):
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)


def load(path: Path) -> Profile:
    """Read a profile. Raises :class:`BadInput`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"profile {path} cannot be read: {error.strerror or error}", remedy="`dsctl profile` measures one"
        ) from error
    except ValueError as error:
        raise BadInput(f"profile {path} is not JSON: {error}", remedy="measure it again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadInput(f"{path} is no profile of this release", remedy="make one with `dsctl profile`")
    try:
        return Profile(
            Subject(**document["subject"]),
            {int(tp): [_sample(one) for one in samples] for tp, samples in document["samples"].items()},
            {int(tp): dict(fit) for tp, fit in document["tp"].items()},
            {name: float(value) for name, value in document["transfer"].items()},
            {name: float(value) for name, value in document["beside"].items()},
            {name: [(float(a), float(b)) for a, b in steps] for name, steps in document.get("noise", {}).items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"profile {path} is damaged: {type(error).__name__}: {error}", remedy="measure it again"
        ) from error


def _sample(one: Mapping[str, Any]) -> Sample:
    spans = tuple((int(start), int(tokens)) for start, tokens in one["spans"])
    return Sample(spans, float(one["seconds"]), float(one["least_s"]))


def check(path: Path, found: Subject, wanted: Mapping[str, Any]) -> None:
    """Raise :class:`ProfileMismatch` unless the profile at ``path``, of ``found``, has all ``wanted`` fields."""
    for name, ours in wanted.items():
        theirs = getattr(found, name)
        if theirs != ours:
            raise ProfileMismatch(
                f"profile {path} was taken with {name} {theirs}, not {ours}",
                remedy="measure one of this with `dsctl profile -o OTHER.json`",
            )


def check_topology(path: Path, topology: Topology) -> None:
    """Refuse a measured profile of something else than the topology's; its machine may be another than this one.

    A file without a subject (coefficients by hand, or those that come with the simulator) is of whatever it is used
    for. Raises :class:`ProfileMismatch` and :class:`BadInput`.
    """
    if not measured(path):
        return
    found = load(path).subject
    model = topology.model
    wanted = {"model": model.name, "dtype": model.dtype, "quantization": model.quantization}
    fingerprint = _fingerprint(model.path)
    if fingerprint is not None:
        wanted["fingerprint"] = fingerprint
    for instance in topology.instances:
        check(path, found, {**wanted, "threads": instance.threads})


def _fingerprint(model: str) -> str | None:
    """Of a model's files; None where they are not on this host."""
    directory = Path(model) if Path(model).is_absolute() else home() / "models" / model
    try:
        return identity(directory).fingerprint
    except (OSError, DsError):
        return None


def measured(path: Path) -> bool:
    """Whether a file tells what it was measured on; False for one that cannot be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "subject" in document


@dataclass(frozen=True, slots=True)
class ProfileInstance:
    """A measured TP, cut into ``stages``; a :class:`dsplan.latency.Instance`."""

    times: LinearTimes
    stages: int = 1

    def prefill_stage_s(self, tokens: int, squares: int, count: int) -> float:
        """The whole step, cut evenly."""
        form = self.times.prefill
        whole_s = form.base_s + form.per_token_s * tokens + form.per_square_s * squares
        return (whole_s + form.per_sequence_s * count) / self.stages

    def decode_step_s(self, batch: int, tokens: int) -> float:
        """``stages`` micro-batches of ``batch / stages`` go round, each through stages of an even part."""
        times, micro = self.times, batch / self.stages
        large = times.decode_large is not None and micro >= times.large_batch
        form = times.decode_large if large and times.decode_large is not None else times.decode
        return form.base_s + form.per_token_s * tokens / self.stages + form.per_sequence_s * micro

    def mixed_stage_s(self, tokens: float, squares: float, count: int, batch: int, context: float) -> float:
        """The weights are read once: the longer of what all rows take in prefill and what decode takes for its own;
        then attention of both."""
        form, times = self.times.prefill, self.times
        large = times.decode_large is not None and batch >= times.large_batch
        other = times.decode_large if large and times.decode_large is not None else times.decode
        rows_s = form.base_s + form.per_token_s * (tokens + batch) + form.per_sequence_s * count
        dense_s = max(rows_s, other.base_s + other.per_sequence_s * batch)
        return (dense_s + form.per_square_s * squares + other.per_token_s * context) / self.stages


@dataclass(frozen=True, slots=True)
class ProfileLatency:
    """The planner's view of a profile; a :class:`dsplan.latency.Latency`."""

    path: Path
    profile: Profile

    @property
    def source(self) -> str:
        """For people."""
        subject = self.profile.subject
        weights = f"{subject.dtype}, {subject.quantization} weights" if subject.quantization else subject.dtype
        return f"profile {self.path} of {subject.model} ({weights}) on {subject.machine}"

    def degrees(self) -> tuple[int, ...] | None:
        """The TP degrees that were measured."""
        return tuple(self.profile.fits)

    def instance(self, tp: int, pp: int) -> ProfileInstance:
        """Raises :class:`ProfileMismatch` for a TP that was not measured."""
        if tp not in self.profile.fits:
            raise missing_degree(self.source, tp, tuple(self.profile.fits))
        return ProfileInstance(linear_times(str(self.path), tp), pp)
