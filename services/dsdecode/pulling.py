"""Sequences of a decode instance from phase to phase, the pulls of their KV, and their ends.

A pull that no thread works on waits for the relay's word a lease and ``GRACE_S`` at most; the leases of all handles
that are wanted are extended. What a thread or a step uses is given back when that is over. Blocks are given back in
one place, ``_drop``.
"""

from __future__ import annotations

from math import inf
from typing import Any

from dsdecode.config import DecodeConfig
from dsdecode.events import CopyDirect, CopyEnded, CopyStream, CutStream
from dsdecode.sequence import Phase, Sequence
from dskv.handle import KvHandle, KvKey
from dskv.lifecycle import GRACE_S
from dssched.instance import InstanceState
from dssched.steps import ForgetSequence, StartSequence
from dswire.errors import ErrorInfo, KvCorrupt, TransferFailed
from dswire.links import RELAY
from dswire.machine import Send
from dswire.messages import kv

#: what a copy may end with once, and is tried again from the source
_ONCE_MORE = (KvCorrupt.code, TransferFailed.code)


class PullingState(InstanceState):
    """The part of the decode machine that holds sequences and fetches their KV."""

    role = "decode"
    config: DecodeConfig

    def __init__(self, config: DecodeConfig) -> None:
        super().__init__(config, relayed=config.relayed)
        self.config = config
        #: every sequence that is not GONE, in order of arrival
        self.sequences: dict[KvKey, Sequence] = {}
        #: the same by phase, in the order in which they came to it
        self._phases: dict[Phase, dict[KvKey, Sequence]] = {phase: {} for phase in Phase}
        #: whose KV was copied and verified before the relay's word came
        self._unanswered: set[KvKey] = set()
        #: when the leases of wanted handles are extended next
        self._extend_at: float | None = None

    # pulls

    def _copy(self, one: Sequence, handle: KvHandle, ticket: kv.Ticket | None = None) -> None:
        one.copies += 1
        if ticket is None:
            self._out.append(CopyDirect(handle, one.blocks))
        else:
            self._out.append(CopyStream(handle, one.blocks, ticket))

    def _granted(self, now: float, grant: kv.KvGrant) -> None:
        key = grant.key
        if key in self._unanswered:
            self._unanswered.discard(key)
            self._out.append(Send(RELAY, kv.KvPulled(key)))
        one = self._pulling(key)
        if one is not None and one.handle is not None:
            one.granted, one.heard_at = True, now
            if not one.copies:
                self._copy(one, one.handle, grant.ticket)

    def _worked(self, event: Any) -> None:
        assert isinstance(event, CopyEnded)
        now, one = event.now, self.sequences[event.key]
        one.copies -= 1
        early, one.early = one.early, False
        if one.life.phase is Phase.DOOMED:
            self._release_doomed(one, now)
        elif event.error is not None and early:
            if one.granted and one.handle is not None:
                self._copy(one, one.handle)
        elif event.error is not None and event.error.code in _ONCE_MORE and not one.again:
            one.again, one.heard_at = True, now
            self._out.append(Send(RELAY, kv.KvAgain(one.key)))
        elif event.error is not None:
            self._out.append(Send(RELAY, kv.KvPulled(one.key, event.error)))
            self._fail(one, now, event.error, tell_relay=False)
        else:
            one.transfer_s = self._move(one, one.arrived(now), now, "KV verified")
            if early and not one.granted:
                self._unanswered.add(one.key)
            else:
                self._out.append(Send(RELAY, kv.KvPulled(one.key)))
            self._start(one)

    def _tick(self, now: float) -> None:
        for one in [one for one in self._phases[Phase.PULLING].values() if self._stuck_at(one) <= now]:
            error = TransferFailed(f"the relay of node {self.config.node} said nothing of {one.key} for a lease")
            self._fail(one, now, error.info(), tell_relay=True)
        if self._extend_at is None or now < self._extend_at:
            return
        early = (*self._phases[Phase.PULLING].values(), *self._phases[Phase.WAITING].values())
        wanted = tuple((one.key, one.handle.node) for one in early if one.handle is not None)
        self._extend_at = now + self._extend_s if self.sequences else None
        if wanted and self.links.relay.joined:
            self._out.append(Send(RELAY, kv.KvExtend(wanted)))

    def _deadline(self) -> float | None:
        if self._extend_at is None:
            return None
        return min(self._extend_at, *map(self._stuck_at, self._phases[Phase.PULLING].values()), inf)

    def _stuck_at(self, one: Sequence) -> float:
        """When the relay's last word on a pull is so old that its end must have been lost on the way."""
        return inf if one.copies else max(one.life.since, one.heard_at) + 3 * self._extend_s + GRACE_S

    @property
    def _extend_s(self) -> float:
        """A third of the relay's lease."""
        return self._lease_s / 3

    def _relay_lost(self, now: float) -> None:
        self._unanswered.clear()
        error = TransferFailed(f"the relay of node {self.config.node} was lost in mid-transfer").info()
        for one in list(self._phases[Phase.PULLING].values()):
            self._fail(one, now, error, tell_relay=False)

    def _pulling(self, key: KvKey) -> Sequence | None:
        one = self.sequences.get(key)
        return one if one is not None and one.life.phase is Phase.PULLING else None

    def _start(self, one: Sequence) -> None:
        """It will take part in steps."""
        self._out.append(StartSequence(one.key, one.prompt_ids, tuple(one.output_ids), one.sampling))

    # ends

    def _fail(self, one: Sequence, now: float, error: ErrorInfo, *, tell_relay: bool) -> None:
        self._fail_at_router(one.key, error)
        self._end(one, now, f"failed: {error.code}", tell_relay=tell_relay)

    def _end(self, one: Sequence, now: float, why: str, *, tell_relay: bool = True) -> None:
        """End a sequence, at once or as soon as no thread uses its blocks. Ending it twice is harmless."""
        if one.life.phase is Phase.DOOMED:
            return
        one.abort_pull = tell_relay and one.life.phase is Phase.PULLING
        if one.copies or one.in_step:
            self._move(one, Phase.DOOMED, now, why)
            if one.copies and not one.early:
                self._out.append(CutStream(one.key))
        else:
            self._tell_relay(one)
            self._drop(one, now, why)

    def _release_doomed(self, one: Sequence, now: float) -> None:
        if not one.copies and not one.in_step:
            self._tell_relay(one)
            self._drop(one, now, "no longer in use")

    def _tell_relay(self, one: Sequence) -> None:
        if one.abort_pull:
            self._out.append(Send(RELAY, kv.KvAbort(one.key)))

    def _drop(self, one: Sequence, now: float, why: str) -> None:
        del self._phases[one.life.phase][one.key]
        one.life.move(Phase.GONE, now, why)
        self.pool.give(one.blocks)
        self._out.append(ForgetSequence(one.key))
        del self.sequences[one.key]

    def _move(self, one: Sequence, to: Phase, now: float, why: str) -> float:
        """Step to a phase that is not the last; the seconds spent in the one left."""
        left = one.life.phase
        spent_s = one.life.move(to, now, why)
        del self._phases[left][one.key]
        self._phases[to][one.key] = one
        return spent_s
