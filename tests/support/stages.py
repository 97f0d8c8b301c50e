"""Every place where a request can be, and how to bring one there and keep it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import dsdecode.sequence
import dsprefill.state
import dsrouter.request
from support.cluster import GLOO, PARTS, TCP, TWO_NODES, Cluster, Shape
from support.raw_client import Heard

TARGET = "t"
BLOCKER = "b"
#: long enough for a stage to be held back while a client's lease runs out
PATIENT_S = 30.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One place."""

    name: str
    #: kind of work to hold back, "" for none
    hold: str
    reached: Callable[[Cluster], bool]
    shape: Shape = field(default_factory=Shape)
    #: another request goes first, and is in the way
    blocked: bool = False
    #: this process is not there
    missing: str = ""

    def bring(self, *, seed: int = 0, deadline_s: float | None = None) -> tuple[Cluster, Heard]:
        """A cluster whose request ``t`` is there and stays until ``Cluster.release``."""
        cluster = Cluster(self.shape, seed=seed)
        if self.missing:
            cluster.kill(self.missing)
            cluster.run(1)
        if self.blocked:
            blocker = cluster.client("other").submit(BLOCKER, 9, max_tokens=12, ignore_eos=True)
            if self.hold == "step":
                cluster.until(lambda: len(blocker.tokens()) > 0)
        if self.hold:
            cluster.hold(self.hold)
        if self.blocked:
            cluster.run(0.05)
        heard = cluster.client().submit(
            TARGET,
            "a prompt of 28 characters..." if self.hold == "tokenize" else 28,
            max_tokens=12,
            ignore_eos=True,
            deadline_s=deadline_s,
        )
        cluster.until(lambda: self.reached(cluster))
        return cluster, heard

    def __str__(self) -> str:
        return self.name


def at_router(cluster: Cluster) -> dsrouter.request.Phase | None:
    """Phase of the target at the router."""
    found = cluster.router.flow.choices.get(f"{TARGET}/0")
    return found[1].life.phase if found else None


def at_prefill(cluster: Cluster) -> dsprefill.state.Phase | None:
    """Phase of the target at the prefill instance."""
    return next(
        (one.life.phase for key, one in cluster.prefill().sequences.items() if key.sequence == f"{TARGET}/0"), None
    )


def at_decode(cluster: Cluster) -> dsdecode.sequence.Sequence | None:
    """The target at the decode instance."""
    return next((one for key, one in cluster.decode().sequences.items() if key.sequence == f"{TARGET}/0"), None)


def _router_in(phase: dsrouter.request.Phase) -> Callable[[Cluster], bool]:
    return lambda cluster: at_router(cluster) is phase


def _prefill_in(phase: dsprefill.state.Phase) -> Callable[[Cluster], bool]:
    return lambda cluster: at_prefill(cluster) is phase


def _decode_in(
    phase: dsdecode.sequence.Phase, *, copying: bool = False, stepping: bool = False
) -> Callable[[Cluster], bool]:
    def reached(cluster: Cluster) -> bool:
        one = at_decode(cluster)
        if one is None or one.life.phase is not phase:
            return False
        return bool(one.copies) >= copying and one.in_step >= stepping

    return reached


def _part_sealing(cluster: Cluster) -> bool:
    """Part of what is read is being summed, and more is to be read."""
    everyone = cluster.prefill().sequences.values() if "prefill-0" in cluster.processes else ()
    return any(one.sealing is not None and one.reading.left for one in everyone)


def _part_waits(cluster: Cluster) -> bool:
    """A part of the KV is at the decode instance, and the prompt is still read."""
    one = at_decode(cluster)
    if one is None or not one.pulled or not one.idle or one.whole_at is not None:
        return False
    cluster.hold("prefill")
    return True


def _unplaced(cluster: Cluster) -> bool:
    found = cluster.router.flow.choices.get(f"{TARGET}/0")
    return (
        found is not None and found[1].handle is not None and at_router(cluster) is dsrouter.request.Phase.PLACING
    )


_PULLING = dsdecode.sequence.Phase.PULLING
_TCP = replace(TCP, transfer_timeout_s=PATIENT_S)
_NODES = replace(TWO_NODES, transfer_timeout_s=PATIENT_S)
_GLOO = replace(GLOO, transfer_timeout_s=PATIENT_S)

_PARTS = replace(PARTS, transfer_timeout_s=PATIENT_S)

_COLOCATED = Shape(mode="colocated", prefill=(), decode_tokens=8)

STAGES = (
    Stage("tokenizing", "tokenize", lambda cluster: TARGET in cluster.router.requests),
    Stage(
        "queued-at-router",
        "prefill",
        _router_in(dsrouter.request.Phase.QUEUED),
        Shape(prefill_queue=1),
        blocked=True,
    ),
    Stage("queued-at-prefill", "prefill", _prefill_in(dsprefill.state.Phase.QUEUED), blocked=True),
    Stage("prefilling", "prefill", _prefill_in(dsprefill.state.Phase.RUNNING)),
    Stage("sealing", "seal", _prefill_in(dsprefill.state.Phase.SEALING)),
    Stage("placing", "", _unplaced, missing="decode-0"),
    Stage(
        "waiting-for-decode",
        "step",
        _decode_in(dsdecode.sequence.Phase.WAITING),
        Shape(decode_batch=1),
        blocked=True,
    ),
    Stage("pull-asked", "copy", _decode_in(_PULLING)),
    Stage("transferring-shm", "copy", _decode_in(_PULLING, copying=True)),
    Stage("transferring-tcp-loop", "copy", _decode_in(_PULLING, copying=True), _TCP),
    Stage("transferring-tcp", "copy", _decode_in(_PULLING, copying=True), _NODES),
    Stage("meeting", "meet", _decode_in(_PULLING), _GLOO),
    Stage("transferring-gloo", "copy", _decode_in(_PULLING, copying=True), _GLOO),
    Stage("sealing-a-part", "seal", _part_sealing, PARTS),
    Stage("sealing-a-part-at-the-end", "seal", _prefill_in(dsprefill.state.Phase.SEALING), PARTS),
    Stage("part-unplaced", "", _prefill_in(dsprefill.state.Phase.SEALING), PARTS, missing="decode-0"),
    Stage("part-transferring-shm", "copy", _decode_in(_PULLING, copying=True), _PARTS),
    Stage("part-transferring-tcp", "copy", _decode_in(_PULLING, copying=True), replace(_PARTS, direct=False)),
    Stage("part-waits-for-more", "", _part_waits, PARTS),
    Stage("decoding", "step", _decode_in(dsdecode.sequence.Phase.RUNNING, stepping=True)),
    Stage(
        "waiting-to-be-read",
        "step",
        _decode_in(dsdecode.sequence.Phase.WAITING),
        replace(_COLOCATED, decode_batch=1),
        blocked=True,
    ),
    Stage("read-in-chunks", "prefill", _decode_in(dsdecode.sequence.Phase.PREFILLING, stepping=True), _COLOCATED),
    Stage(
        "read-while-others-decode",
        "step",
        _decode_in(dsdecode.sequence.Phase.PREFILLING),
        replace(_COLOCATED, prefill=("n0",), mode="conditional", threshold_tokens=40),
        blocked=True,
    ),
    Stage(
        "decoding-where-it-was-read", "step", _decode_in(dsdecode.sequence.Phase.RUNNING, stepping=True), _COLOCATED
    ),
)
