"""The client's side of the public protocol, as a pure machine: hello, lease, loss, reconnect.

It says hello and keeps the lease, notices when the router is gone, and says hello until it is back. Whoever waits
meanwhile does so for ``timeout_s`` at most. The open requests are in :mod:`dsclient.requests`; each ends once.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from dsclient.events import (
    Action,
    Answer,
    Closed,
    ConnectAsked,
    Denied,
    Event,
    Garbled,
    RequestAttached,
    RequestCancelled,
    RequestLeft,
    RequestOpened,
    StatusAsked,
)
from dsclient.requests import Alarm, Alarms, RequestEvent, Requests
from dswire.errors import Cancelled, DsError, RouterLost, VersionMismatch, from_info
from dswire.machine import Received, Send, Tick
from dswire.messages import PROTOCOL, client
from dswire.timers import Timers

ROUTER = "router"
#: seconds to the second hello; doubles up to the maximum while none is answered
HELLO_RETRY_S = 1.0
HELLO_RETRY_MAX_S = 5.0
#: bounds of a lease, in seconds, whatever the router says: it sets the pace of our pings
LEASE_MIN_S = 0.05
LEASE_MAX_S = 3600.0


class Phase(Enum):
    """Where the connection stands."""

    #: nobody asked for one yet, or the router refused us
    IDLE = "idle"
    #: hello said, not answered
    GREETING = "greeting"
    JOINED = "joined"
    CLOSED = "closed"


class ClientState:
    """Events in, actions out. One for the life of a client."""

    def __init__(self, address: str, *, agent: str, timeout_s: float) -> None:
        """``address`` is for messages only; ``timeout_s`` bounds every wait for a router that does not answer."""
        self.phase = Phase.IDLE
        #: the router's, while joined
        self.welcome: client.ClientWelcome | None = None
        self._address = address
        self._hello = client.ClientHello(PROTOCOL, agent)
        self._timeout_s = timeout_s
        self._lease_s = 0.0
        self._heard_at = 0.0
        self._retry_s = HELLO_RETRY_S
        #: who waits: name -> whether a status report is wanted, else just the connection
        self._asks: dict[str, bool] = {}
        self._timers: Alarms = Timers()
        self._out: list[Action] = []
        self._requests = Requests(self._timers, self._send, lambda action: self._out.append(action), timeout_s)

    def handle(self, event: Event) -> list[Action]:
        """Take one event; returns what is to be done, in order. After ``Closed`` nothing is."""
        self._out = []
        if self.phase is not Phase.CLOSED:
            _EVENTS[type(event)](self, event)
        return self._out

    def next_deadline(self) -> float | None:
        """When to send a ``Tick``; None for never."""
        return self._timers.next()

    def is_open(self, request_id: str) -> bool:
        """Whether a request of that id has not ended yet."""
        return request_id in self._requests

    def validate(self) -> None:
        """Check every invariant. Raises ``AssertionError``."""
        joined = self.phase is Phase.JOINED
        assert joined == (self.welcome is not None)
        assert joined == ((Alarm.PING, "") in self._timers) == ((Alarm.SILENCE, "") in self._timers)
        assert (self.phase is Phase.GREETING) == ((Alarm.HELLO, "") in self._timers)
        connecting = self.phase in (Phase.GREETING, Phase.JOINED)
        assert connecting or not self._asks
        for ask in self._asks:
            assert (Alarm.ASK, ask) in self._timers, f"{ask} waits without a deadline"
        self._requests.validate(readable=connecting)

    # what the caller wants

    def _connect_asked(self, event: ConnectAsked) -> None:
        self._ask(event.now, event.ask, wants_status=False)
        if self.welcome is not None:
            self._answer(event.ask, self.welcome)

    def _status_asked(self, event: StatusAsked) -> None:
        self._ask(event.now, event.ask, wants_status=True)
        if self.welcome is not None:
            self._send(client.StatusQuery())

    def _ask(self, now: float, ask: str, *, wants_status: bool) -> None:
        self._asks[ask] = wants_status
        self._timers.set((Alarm.ASK, ask), now + self._timeout_s)
        self._begin(now)

    def _answer(self, ask: str, result: client.ClientWelcome | client.StatusReport | DsError) -> None:
        del self._asks[ask]
        self._timers.cancel((Alarm.ASK, ask))
        self._out.append(Answer(ask, result))

    def _opened(self, event: RequestOpened) -> None:
        self._requests.open(event.now, event.submit.request_id, event.submit)
        self._begin(event.now)

    def _attached(self, event: RequestAttached) -> None:
        self._requests.open(event.now, event.request_id, None)
        self._begin(event.now)

    def _cancelled(self, event: RequestCancelled) -> None:
        self._requests.cancel(event.now, event.request_id)

    def _left(self, event: RequestLeft) -> None:
        self._requests.leave(event.now, event.request_id)

    def _closed(self, event: Closed) -> None:
        if self.phase is Phase.JOINED:
            self._send(client.ClientBye())
        self._turn_away(event.now, Cancelled("the client was closed"))
        self.phase = Phase.CLOSED

    # what the transport tells

    def _received(self, event: Received) -> None:
        self._heard_at = event.now
        message = event.message
        match message:
            case client.Accepted() | client.Output() | client.Finished() | client.Failed():
                self._request_event(event.now, message)
            case client.ClientWelcome():
                self._welcomed(event.now, message)
            case client.ClientPong(incarnation=incarnation):
                self._pong(event.now, incarnation)
            case client.ClientHelloWanted():
                self._part(event.now)
            case client.ClientRefused(error=error):
                self._refused(event.now, from_info(error))
            case client.StatusReport():
                for ask in [ask for ask, wants_status in self._asks.items() if wants_status]:
                    self._answer(ask, message)

    def _request_event(self, now: float, message: RequestEvent) -> None:
        self._requests.take(now, message)

    def _denied(self, event: Denied) -> None:
        if self.phase is Phase.GREETING:
            self._turn_away(event.now, event.error)

    def _garbled(self, event: Garbled) -> None:
        self._fail(event.now, event.error)

    def _tick(self, event: Tick) -> None:
        for alarm, name in self._timers.due(event.now):
            match alarm:
                case Alarm.HELLO:
                    self._say_hello(event.now)
                case Alarm.PING:
                    self._ping(event.now)
                case Alarm.SILENCE:
                    self._listen(event.now)
                case Alarm.ASK:
                    self._answer(name, self._lost())
                case _:
                    self._requests.alarm(event.now, alarm, name)

    # the connection

    def _begin(self, now: float) -> None:
        if self.phase is Phase.IDLE:
            self._greet(now)

    def _greet(self, now: float) -> None:
        self.phase, self.welcome = Phase.GREETING, None
        self._retry_s = HELLO_RETRY_S
        self._say_hello(now)

    def _say_hello(self, now: float) -> None:
        self._send(self._hello)
        self._timers.set((Alarm.HELLO, ""), now + self._retry_s)
        self._retry_s = min(2 * self._retry_s, HELLO_RETRY_MAX_S)

    def _part(self, now: float) -> None:
        """The connection is lost; call until it is back."""
        if self.phase is not Phase.JOINED:
            return
        self._timers.cancel((Alarm.PING, ""))
        self._timers.cancel((Alarm.SILENCE, ""))
        self._requests.parted(now)
        self._greet(now)

    def _welcomed(self, now: float, message: client.ClientWelcome) -> None:
        if self.welcome is not None and message.incarnation == self.welcome.incarnation:
            return  # the answer to a hello that was said twice
        if message.protocol != PROTOCOL:
            text = f"{self._address}: the router speaks protocol {message.protocol}, this client {PROTOCOL}"
            self._turn_away(now, VersionMismatch(text))
            return
        self.phase, self.welcome = Phase.JOINED, message
        self._lease_s = min(max(LEASE_MIN_S, message.lease_s), LEASE_MAX_S)
        self._timers.cancel((Alarm.HELLO, ""))
        self._timers.set((Alarm.PING, ""), now + self._lease_s / 3)
        self._timers.set((Alarm.SILENCE, ""), now + self._lease_s)
        for ask, wants_status in list(self._asks.items()):
            if wants_status:
                self._send(client.StatusQuery())
            else:
                self._answer(ask, message)
        self._requests.joined(now, message.incarnation, self._lease_s)

    def _pong(self, now: float, incarnation: str) -> None:
        if self.welcome is not None and incarnation != self.welcome.incarnation:
            self._part(now)

    def _refused(self, now: float, error: DsError) -> None:
        if self.phase is not Phase.JOINED:
            self._turn_away(now, error)
            return
        # it does not say which message it could not read; those not answered yet are the ones in question
        for ask in list(self._asks):
            self._answer(ask, error)
        self._requests.fail(now, error, unheard_only=True)

    def _turn_away(self, now: float, error: DsError) -> None:
        """There is no connection, and no use in calling again unasked."""
        for alarm in (Alarm.HELLO, Alarm.PING, Alarm.SILENCE):
            self._timers.cancel((alarm, ""))
        self.phase, self.welcome = Phase.IDLE, None
        self._requests.parted(now)
        self._fail(now, error)

    def _fail(self, now: float, error: DsError) -> None:
        for ask in list(self._asks):
            self._answer(ask, error)
        self._requests.fail(now, error)

    def _ping(self, now: float) -> None:
        self._send(client.ClientPing())
        self._timers.set((Alarm.PING, ""), now + self._lease_s / 3)

    def _listen(self, now: float) -> None:
        silent_at = self._heard_at + self._lease_s
        if silent_at <= now:
            self._part(now)
        else:
            self._timers.set((Alarm.SILENCE, ""), silent_at)

    def _lost(self) -> RouterLost:
        return RouterLost(f"{self._address}: the router did not answer within {self._timeout_s:g} s")

    def _send(self, message: Any) -> None:
        self._out.append(Send(ROUTER, message))


_EVENTS: dict[type[Any], Callable[[ClientState, Any], None]] = {
    Received: ClientState._received,
    Tick: ClientState._tick,
    ConnectAsked: ClientState._connect_asked,
    StatusAsked: ClientState._status_asked,
    RequestOpened: ClientState._opened,
    RequestAttached: ClientState._attached,
    RequestCancelled: ClientState._cancelled,
    RequestLeft: ClientState._left,
    Denied: ClientState._denied,
    Garbled: ClientState._garbled,
    Closed: ClientState._closed,
}
