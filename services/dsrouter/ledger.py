"""Keeps the account of one choice: every moment between its arrival and its end is booked to one stage."""

from __future__ import annotations

from dswire.messages.client import Ledger
from dswire.messages.worker import DecodeStages


class Account:
    """Books time; ``booked`` plus the time since the last booking is the time since arrival."""

    def __init__(self, now: float) -> None:
        self._arrived = now
        self._since = now
        self._stages: dict[str, float] = {}
        self._first_token_at: float | None = None
        #: when the last token was made
        self.token_at = now
        #: from a lost attempt whose KV may be kept to the next token
        self._resuming = False
        self.retries = 0

    def _book(self, stage: str, seconds: float) -> None:
        self._stages[stage] = self._stages.get(stage, 0.0) + seconds

    def _elapsed(self, now: float) -> float:
        elapsed, self._since = now - self._since, now
        return elapsed

    def spend(self, stage: str, now: float) -> None:
        """Book the time since the last booking to a stage; going back to prefill after a token is ``retry_s``."""
        if self._resuming:
            stage = "resume_s"
        resumed = self._first_token_at is not None and stage in ("router_queue_s", "prefill_wire_s")
        self._book("retry_s" if resumed else stage, self._elapsed(now))

    def resume(self, now: float) -> None:
        """An attempt was lost, and another is to go on from KV that was kept: a pause since the last token."""
        if not self._resuming and self.token_at > self._since:
            self._book("decode_s", self._elapsed(self.token_at))
        self._resuming = True
        self.spend("resume_s", now)

    def read_again(self, now: float) -> None:
        """An attempt was lost, and begins with its prompt."""
        self.spend("retry_s", now)
        self._resuming = False

    def prefilled(self, now: float, queue_s: float, prefill_s: float) -> None:
        """A prefill instance answered with a token."""
        if self._first_token_at is not None:
            self._book("retry_s", self._elapsed(now))
            return
        elapsed = self._elapsed(now)
        self._first_token_at = now
        self._book("prefill_queue_s", queue_s)
        self._book("prefill_s", prefill_s)
        self._book("prefill_wire_s", elapsed - queue_s - prefill_s)

    def decoding(self, now: float, stages: DecodeStages) -> None:
        """A decode instance made its first token."""
        if self._resuming:
            self.spend("resume_s", now)
            self._resuming = False
            return
        parts = {
            "transfer_wait_s": stages.transfer_wait_s,
            "transfer_s": stages.transfer_s,
            "decode_queue_s": stages.decode_queue_s,
            "first_step_s": stages.first_step_s,
        }
        wire_s = self._elapsed(now) - sum(parts.values())
        # no part of the sum: something else went on meanwhile
        self._book("transfer_hidden_s", stages.transfer_hidden_s)
        for stage, seconds in parts.items():
            self._book(stage, seconds)
        self._book("decode_wire_s", wire_s)

    def close(self, now: float) -> Ledger:
        """The ledger, all time up to ``now`` booked."""
        self._book("decode_s", self._elapsed(now))
        ttft_s = (now if self._first_token_at is None else self._first_token_at) - self._arrived
        return Ledger(**self._stages, ttft_s=ttft_s, total_s=now - self._arrived, retries=self.retries)
