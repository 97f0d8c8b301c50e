"""The client of a simulated system: submits a workload, and notes when it hears what.

It measures what a user would: times run from the submission at the client to the arrival of the answer there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from dssim.kernel import Kernel
from dssim.processes import Receiver
from dssim.prompts import prompt
from dssim.records import Record
from dssim.workload import Arrival
from dswire.messages import PROTOCOL, client

#: the router's name for it
PEER = "client:simulation"


class Client:
    """Submits requests and keeps their records. It says that it lives every third of its lease."""

    def __init__(self, kernel: Kernel, router: Receiver, seconds: float, lease_s: float) -> None:
        """``seconds``: a message's way to the router."""
        self.records: list[Record] = []
        #: requests without an end
        self.open: dict[str, _Open] = {}
        self.on_end: Callable[[Record], None] = lambda record: None
        self._kernel = kernel
        self._router = router
        self._seconds = seconds
        self._lease_s = lease_s
        self._arrivals: Sequence[Arrival] = ()
        self._begun_s = 0.0
        self._say(client.ClientHello(PROTOCOL, "dssim"))
        kernel.after(lease_s / 3, self._ping)

    @property
    def done(self) -> bool:
        """Whether everything was submitted, and has ended."""
        return len(self.records) == len(self._arrivals)

    def submit_all(self, arrivals: Sequence[Arrival]) -> None:
        """Begin to submit a workload; its time 0 is now."""
        self._arrivals, self._begun_s = arrivals, self._kernel.now
        if arrivals:
            self._schedule(0)

    def heard(self, now: float, message: msgspec.Struct) -> None:
        """A message from the router."""
        match message:
            case client.Output(request_id=request_id):
                one = self.open[request_id]
                if one.first_s is None:
                    one.first_s = now
                one.tokens += len(message.token_ids)
            case client.Finished(request_id=request_id, ledger=ledger):
                self._end(now, request_id, "", ledger)
            case client.Failed(request_id=request_id, error=error):
                self._end(now, request_id, error.code, None)

    def _end(self, now: float, request_id: str, error: str, ledger: client.Ledger | None) -> None:
        one = self.open.pop(request_id)
        record = Record(
            number=int(request_id),
            at_s=one.at_s - self._begun_s,
            prompt_tokens=one.prompt_tokens,
            output_tokens=one.tokens,
            first_s=None if one.first_s is None else one.first_s - one.at_s,
            total_s=now - one.at_s,
            error=error,
            ledger=ledger,
        )
        self.records.append(record)
        self.on_end(record)

    def _schedule(self, number: int) -> None:
        self._kernel.at(self._begun_s + self._arrivals[number].at_s, self._submit, number)

    def _submit(self, number: int) -> None:
        arrival = self._arrivals[number]
        sampling = client.Sampling(max_tokens=arrival.output_tokens, ignore_eos=True, seed=0)
        request_id = str(number)
        self.open[request_id] = _Open(self._kernel.now, arrival.prompt_tokens)
        self._say(client.Submit(request_id, prompt_ids=prompt(number, arrival), sampling=sampling))
        if number + 1 < len(self._arrivals):
            self._schedule(number + 1)

    def _ping(self) -> None:
        self._say(client.ClientPing())
        self._kernel.after(self._lease_s / 3, self._ping)

    def _say(self, message: msgspec.Struct) -> None:
        self._kernel.after(self._seconds, self._router.arrive, PEER, message)


class _Open:
    __slots__ = ("at_s", "first_s", "prompt_tokens", "tokens")

    def __init__(self, at_s: float, prompt_tokens: int) -> None:
        self.at_s = at_s
        self.prompt_tokens = prompt_tokens
        self.first_s: float | None = None
        self.tokens = 0
