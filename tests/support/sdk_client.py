"""The client SDK's own machine as a member of the modelled cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from dsclient.events import Answer, Closed, Deliver, End, Event, RequestCancelled, RequestLeft, RequestOpened
from dsclient.state import ClientState
from dswire.errors import DsError
from dswire.machine import Received, Send, Tick
from dswire.messages import client
from support.virtual_clock import VirtualClock
from support.wires import Wire, Wires

TIMEOUT_S = 15.0


@dataclass
class Told:
    """What the reader of one request was told."""

    submit: client.Submit
    events: list[client.Accepted | client.Output | client.Finished] = field(default_factory=list)
    error: DsError | None = None

    @property
    def end(self) -> str:
        """ "finished", an error's code, or "" while it lives."""
        if self.error is not None:
            return self.error.code
        return "finished" if self.events and isinstance(self.events[-1], client.Finished) else ""

    def tokens(self) -> list[int]:
        """Output tokens so far."""
        return [token for one in self.events if isinstance(one, client.Output) for token in one.token_ids]


class SdkClient:
    """One client process."""

    def __init__(self, name: str, clock: VirtualClock, wires: Wires, router: str) -> None:
        self.name = name
        self.alive = True
        self.peers: dict[str, Wire] = {}
        self.machine = ClientState("tcp://router", agent="test", timeout_s=TIMEOUT_S)
        self.requests: dict[str, Told] = {}
        self._clock = clock
        self._wires = wires
        self._wire = wires.connect(self, "router", router, f"client:{name}")
        self._tick_at: float | None = None

    def submit(self, request_id: str, prompt: int, **sampling: object) -> Told:
        """Open a request on a prompt of so many tokens."""
        how = msgspec.convert(sampling, client.Sampling)
        submit = client.Submit(request_id, prompt_ids=tuple(range(7, 7 + prompt)), sampling=how)
        told = self.requests[request_id] = Told(submit)
        self._feed(RequestOpened(self._clock.now, submit))
        return told

    def cancel(self, request_id: str) -> None:
        """Stop a request."""
        self._feed(RequestCancelled(self._clock.now, request_id))

    def leave(self, request_id: str) -> None:
        """Nobody reads a request any more."""
        self._feed(RequestLeft(self._clock.now, request_id))

    def close(self) -> None:
        """The client ends."""
        self._feed(Closed(self._clock.now))

    def take(self, peer: str, message: msgspec.Struct) -> None:
        """A message has come."""
        self._feed(Received(self._clock.now, "router", message))

    def _feed(self, event: Event) -> None:
        for action in self.machine.handle(event):
            match action:
                case Send():
                    self._wires.to_bound(self._wire, action.message)
                case Deliver(request_id, message):
                    told = self.requests[request_id]
                    assert not told.end, f"{message} follows the end {told.end}"
                    assert message.number == len(told.events)
                    told.events.append(message)
                case End(request_id, error):
                    told = self.requests[request_id]
                    assert not told.end, f"{error} follows the end {told.end}"
                    told.error = error
                case Answer():
                    pass
        self.machine.validate()
        self._arm()

    def _arm(self) -> None:
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline != self._tick_at:
            self._tick_at = deadline
            self._clock.at(deadline, lambda: self._tick(deadline))

    def _tick(self, deadline: float) -> None:
        if self.alive and self._tick_at == deadline:
            self._tick_at = None
            if self.machine.next_deadline() == deadline:
                self._feed(Tick(self._clock.now))
            else:
                self._arm()
