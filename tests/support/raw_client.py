"""A client that speaks the public protocol by itself, and keeps what it hears of each request.

It pings, says hello again when asked to, and attaches to what it misses. It checks that the events of a request
come without a gap and that nothing follows its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec

from dswire.errors import UnknownRequest
from dswire.messages import PROTOCOL, client
from support.virtual_clock import VirtualClock
from support.wires import Wire, Wires

RequestEvent: TypeAlias = client.Accepted | client.Output | client.Finished | client.Failed
PING_S = 1.0


@dataclass
class Heard:
    """What a client knows of one of its requests."""

    submit: client.Submit
    events: list[RequestEvent] = field(default_factory=list)
    #: events that came since the last ping
    fresh: bool = True
    ended_at: float | None = None

    @property
    def end(self) -> str:
        """ "finished", an error's code, or "" while it lives."""
        last = self.events[-1] if self.events else None
        if isinstance(last, client.Finished):
            return "finished"
        return last.error.code if isinstance(last, client.Failed) else ""

    def tokens(self, choice: int = 0) -> list[int]:
        """Output tokens of one choice so far."""
        outputs = [event for event in self.events if isinstance(event, client.Output) and event.choice == choice]
        return [token for output in outputs for token in output.token_ids]

    def finish_reason(self, choice: int = 0) -> str:
        """Why the choice is complete."""
        outputs = [event for event in self.events if isinstance(event, client.Output) and event.choice == choice]
        return outputs[-1].finish_reason

    @property
    def finished(self) -> client.Finished:
        """The last event of a request that went well."""
        last = self.events[-1]
        assert isinstance(last, client.Finished), f"it ended with {last}"
        return last


class RawClient:
    """One client."""

    def __init__(self, name: str, clock: VirtualClock, wires: Wires, router: str) -> None:
        self.name = name
        self.alive = True
        self.peers: dict[str, Wire] = {}
        #: whether it pings and answers; a client that does not is as good as gone
        self.talking = True
        self.requests: dict[str, Heard] = {}
        #: everything else that came
        self.other: list[msgspec.Struct] = []
        self._clock = clock
        self._wires = wires
        self._wire = wires.connect(self, "router", router, f"client:{name}")
        self.say(client.ClientHello(PROTOCOL, "test"))
        clock.after(PING_S, self._ping)

    def say(self, message: msgspec.Struct) -> None:
        """Send a message."""
        self._wires.to_bound(self._wire, message)

    def submit(
        self, request_id: str, prompt: int | str = 10, *, deadline_s: float | None = None, **sampling: Any
    ) -> Heard:
        """Ask for an answer to a text, or to that many tokens."""
        how = msgspec.convert(sampling, client.Sampling)
        text = prompt if isinstance(prompt, str) else None
        ids = tuple(range(7, 7 + prompt)) if isinstance(prompt, int) else None
        submit = client.Submit(request_id, text, None, ids, how, deadline_s)
        heard = self.requests[request_id] = Heard(submit)
        self.say(submit)
        return heard

    def cancel(self, request_id: str) -> None:
        """Stop a request."""
        self.say(client.Cancel(request_id))

    def status(self) -> client.StatusReport:
        """The last status report."""
        return next(one for one in reversed(self.other) if isinstance(one, client.StatusReport))

    def leave(self) -> None:
        """Say good-bye and nothing more."""
        self.say(client.ClientBye())
        self.talking = False

    def die(self) -> None:
        """Vanish with the connection."""
        self.alive = False
        self._wires.died(self)

    def take(self, peer: str, message: msgspec.Struct) -> None:
        """A message has come."""
        match message:
            case client.Accepted() | client.Output() | client.Finished() | client.Failed():
                self._event(message)
            case client.ClientHelloWanted() if self.talking:
                self.say(client.ClientHello(PROTOCOL, "test"))
                for heard in self._open():
                    self._catch_up(heard)
            case _:
                self.other.append(message)

    def _event(self, event: RequestEvent) -> None:
        heard = self.requests[event.request_id]
        heard.fresh = True
        unknown = isinstance(event, client.Failed) and event.error.code == UnknownRequest.code
        if heard.end:
            assert unknown or event.number < len(heard.events), f"{event} follows the end {heard.events[-1]}"
        elif unknown or event.number == len(heard.events):
            heard.events.append(event)
            if isinstance(event, client.Finished | client.Failed):
                heard.ended_at = self._clock.now
        elif event.number < len(heard.events):
            assert heard.events[event.number] == event, "a replayed event differs"
        else:
            self._catch_up(heard)

    def _ping(self) -> None:
        if not self.alive:
            return
        if self.talking:
            self.say(client.ClientPing())
            for heard in self._open():
                if not heard.fresh:
                    self._catch_up(heard)
                heard.fresh = False
        self._clock.after(PING_S, self._ping)

    def _open(self) -> list[Heard]:
        return [heard for heard in self.requests.values() if not heard.end]

    def _catch_up(self, heard: Heard) -> None:
        if heard.events:
            self.say(client.Attach(heard.submit.request_id, len(heard.events)))
        else:
            self.say(heard.submit)
