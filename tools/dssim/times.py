"""How long work takes: the seam between the simulator and whatever models the hardware.

:class:`StepTimes` is of one instance (its model, device and parallelism), :class:`TransferTimes` of the machines
and the network between them. Both are pure: the same arguments give the same time. Seconds and bytes throughout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from dswire.errors import BadInput

#: profiles that come with the simulator, by name; see the file for their source
SHIPPED = ("opt-13b-a100",)


#: a part of a prompt: from a position to another
Chunk: TypeAlias = tuple[int, int]


class StepTimes(Protocol):
    """Time of the steps of one instance; with pipeline stages, of all of them."""

    def prefill_s(self, lengths: Sequence[int]) -> float:
        """One prefill step over prompts of these lengths, in tokens; never empty."""

    def decode_s(self, context_lengths: Sequence[int]) -> float:
        """One decode step over sequences with these many tokens, the one fed into the step included."""

    def mixed_s(self, chunks: Sequence[Chunk], context_lengths: Sequence[int]) -> float:
        """One step that reads chunks of prompts, and makes a token for each of these sequences; not both empty."""


class TransferTimes(Protocol):
    """Time of everything that is neither a step nor waiting."""

    def message_s(self, same_node: bool) -> float:
        """A message from one process to another, from its sending to its being looked at."""

    def seal_s(self, nbytes: int) -> float:
        """Checksum of KV in the pool of its owner; one at a time on each instance."""

    def copy_s(self, nbytes: int) -> float:
        """Copy of KV within a node, verification included; one at a time on each instance."""

    def network_s(self, nbytes: int) -> float:
        """KV on the way out of a node that has its link to itself.

        The kernel lets streams leave a node one after the other, where real ones share the link, a few at a time:
        the last of those that begin together ends when it would, the others earlier.
        """


class Sums(NamedTuple):
    """A step, as far as most models of time care."""

    #: parts of prompts, their tokens, and the sum of ``end^2 - start^2`` over them
    chunks: int
    tokens: int
    squares: int
    #: sequences that make a token, and the sum of their lengths
    sequences: int
    context: int


@runtime_checkable
class SummedTimes(StepTimes, Protocol):
    """Times that depend on sums only, and on nothing else: what :mod:`dssim.express` can use."""

    def summed_s(self, step: Sums) -> float:
        """What the others give for such a step; decode's sequences are those of one stage's batch."""


@dataclass(frozen=True, slots=True)
class Linear:
    """``base_s + per_token_s * sum(l) + per_square_s * sum(l * l) + per_sequence_s * count``."""

    base_s: float
    per_token_s: float = 0.0
    per_square_s: float = 0.0
    per_sequence_s: float = 0.0

    def seconds(self, lengths: Sequence[int]) -> float:
        """The time for these lengths."""
        total = self.base_s + self.per_token_s * sum(lengths) + self.per_sequence_s * len(lengths)
        return total + self.per_square_s * sum(n * n for n in lengths) if self.per_square_s else total


@dataclass(frozen=True, slots=True)
class LinearTimes:
    """The linear form that DistServe's own simulator uses, with two fits of decode for small and large batches."""

    prefill: Linear
    decode: Linear
    #: for ``large_batch`` sequences and more
    decode_large: Linear | None = None
    large_batch: int = 95

    def prefill_s(self, lengths: Sequence[int]) -> float:
        """One prefill step."""
        return self.prefill.seconds(lengths)

    def decode_s(self, context_lengths: Sequence[int]) -> float:
        """One decode step."""
        return self._decode(len(context_lengths)).seconds(context_lengths)

    def mixed_s(self, chunks: Sequence[Chunk], context_lengths: Sequence[int]) -> float:
        """The matrices are read once: the longer of what prefill takes for all rows and what decode takes for its
        own; then attention of both. Not in DistServe, whose engine mixes nothing."""
        if not chunks:
            return self.decode_s(context_lengths)
        read, made, batch = self.prefill, self._decode(len(context_lengths)), len(context_lengths)
        rows = sum(end - start for start, end in chunks) + batch
        matrices_s = read.base_s + read.per_token_s * rows + read.per_sequence_s * len(chunks)
        if batch:
            matrices_s = max(matrices_s, made.base_s + made.per_sequence_s * batch)
        squares = sum(end * end - start * start for start, end in chunks)
        return matrices_s + read.per_square_s * squares + made.per_token_s * sum(context_lengths)

    def _decode(self, batch: int) -> Linear:
        return self.decode_large if self.decode_large is not None and batch >= self.large_batch else self.decode


@dataclass(frozen=True, slots=True)
class FlatTransfer:
    """A latency for each message and a bandwidth for each kind of transfer; a bandwidth of 0 takes no time."""

    local_message_s: float = 100e-6
    network_message_s: float = 200e-6
    seal_bytes_per_s: float = 20e9
    copy_bytes_per_s: float = 10e9
    network_bytes_per_s: float = 25e9 / 8

    def message_s(self, same_node: bool) -> float:
        """A message."""
        return self.local_message_s if same_node else self.network_message_s

    def seal_s(self, nbytes: int) -> float:
        """A checksum."""
        return _over(nbytes, self.seal_bytes_per_s)

    def copy_s(self, nbytes: int) -> float:
        """A copy within a node."""
        return _over(nbytes, self.copy_bytes_per_s)

    def network_s(self, nbytes: int) -> float:
        """A stream between nodes."""
        return _over(nbytes, self.network_bytes_per_s)


#: messages and transfers that take no time at all, for comparison with closed forms
INSTANT = FlatTransfer(0.0, 0.0, 0.0, 0.0, 0.0)


def _over(nbytes: int, bytes_per_s: float) -> float:
    return nbytes / bytes_per_s if bytes_per_s else 0.0


def linear_times(profile: str, tp: int) -> LinearTimes:
    """Times of a profile: a name of :data:`SHIPPED`, or the path of a JSON file of the same form.

    Raises :class:`BadInput` for a file that cannot be read or understood, and for a ``tp`` that it has no times of.
    """
    document = _read(profile)
    fits = document.get("tp")
    if not isinstance(fits, dict) or not fits:
        if document.get("samples"):
            again = f"run `dsctl profile -o {profile}` again: it goes on where it stood"
            raise BadInput(f"profile {profile} is not complete yet", remedy=again)
        raise BadInput(f"{profile} is no profile: it has no times", remedy="make one with `dsctl profile`")
    if str(tp) not in fits:
        known = ", ".join(fits)
        raise BadInput(
            f"profile {profile} has no times for tp {tp}, only for tp {known}",
            remedy="change tp in the topology, or add the coefficients to a profile of your own",
        )
    return times_of(profile, tp, fits[str(tp)])


def about(profile: str, model: str) -> str:
    """Whose times a profile has, for people who simulate ``model``."""
    if profile in SHIPPED:
        return f"{profile}, published by DistServe; for those of {model} on this machine: dsctl profile"
    return profile


def transfer_times(profile: str) -> FlatTransfer:
    """Times of transfers as the profile tells them under ``transfer``; the defaults for what it does not tell.

    Raises :class:`BadInput`.
    """
    told = _read(profile).get("transfer", {})
    try:
        values = {name: float(value) for name, value in told.items()}
        if not all(0 <= value < math.inf for value in values.values()):
            raise ValueError("that is below 0 or endless")
        return FlatTransfer(**values)
    except (AttributeError, TypeError, ValueError) as error:
        known = ", ".join(one.name for one in fields(FlatTransfer))
        raise BadInput(f"profile {profile}: transfer: {error}", remedy=f"give numbers for {known}") from error


def beside(profile: str) -> dict[str, float]:
    """How many times as long a step of a phase takes while another instance of the node is in one, where told.

    Raises :class:`BadInput`.
    """
    told = _read(profile).get("beside", {})
    try:
        factors = {str(phase): float(factor) for phase, factor in told.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"profile {profile}: beside: {error}", remedy="give factors of prefill and decode"
        ) from error
    if not all(0.5 <= factor <= 10 for factor in factors.values()):
        raise BadInput(f"profile {profile}: beside: {factors} are no factors", remedy="measure it again")
    return factors


def noise(profile: str) -> dict[str, list[tuple[float, float]]]:
    """When a step of a phase was measured, and how many times as long as foretold it took, where told.

    Raises :class:`BadInput`.
    """
    told = _read(profile).get("noise", {})
    try:
        return {str(phase): _course(steps) for phase, steps in told.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"profile {profile}: noise: {error}",
            remedy="give lists of seconds and a factor for prefill and decode, or measure it again",
        ) from error


def _course(steps: Any) -> list[tuple[float, float]]:
    found = [(float(at_s), float(factor)) for at_s, factor in steps]
    if not found or not all(0 <= at_s < math.inf and 0 < factor < math.inf for at_s, factor in found):
        raise ValueError("no steps, or times or factors below 0 or without end")
    if found != sorted(found, key=lambda step: step[0]):
        raise ValueError("steps that are not in order of time")
    return found


def _read(profile: str) -> dict[str, Any]:
    shipped = profile in SHIPPED
    try:
        text = (
            files("dssim").joinpath(f"{profile}.json").read_text() if shipped else Path(profile).read_text("utf-8")
        )
        document = json.loads(text)
    except OSError as error:
        raise BadInput(
            f"profile {profile} cannot be read: {error.strerror or error}",
            remedy=f"name a JSON file, or one of {', '.join(SHIPPED)}",
        ) from error
    except ValueError as error:
        raise BadInput(f"profile {profile} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"profile {profile} must be a JSON object, not {type(document).__name__}")
    return document


def times_of(profile: str, tp: int, fit: Any) -> LinearTimes:
    """Times by coefficients as they stand in a profile, which has that name. Raises :class:`BadInput`.

    ``overhead`` is what a whole system was measured to need beyond the engine's own time, for each step of a phase
    and for each sequence in it: handing the step over, telling the router, and its share of the cores.
    """
    try:
        large, more = fit.get("decode_large"), fit.get("overhead", {})
        decode = more.get("decode", {})
        return LinearTimes(
            Linear(**_numbers(fit["prefill"], more.get("prefill", {}))),
            Linear(**_numbers(fit["decode"], decode)),
            None if large is None else Linear(**_numbers(large, decode)),
            int(fit.get("large_batch", 95)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"profile {profile}, tp {tp}: wrong or missing coefficient {error}",
            remedy="give prefill and decode, and perhaps decode_large and large_batch; in prefill and decode "
            "base_ms, per_token_ms, per_square_ms and per_sequence_ms",
        ) from error


def _numbers(coefficients: dict[str, Any], more: dict[str, Any]) -> dict[str, float]:
    """Coefficients in seconds, those of ``more`` added."""
    names = {**coefficients, **more}
    return {
        f"{name.removesuffix('_ms')}_s": (float(coefficients.get(name, 0)) + float(more.get(name, 0))) / 1e3
        for name in names
    }
