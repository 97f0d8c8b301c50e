"""The open requests of a client: their events in order, their repair, their end. Part of the pure machine.

- *Nothing heard yet*: while no event of a request has come, its ``Submit`` is simply sent again (the router takes
  an id it knows as an attach), so neither a lost message nor a restart of the router costs anything.
- *Gaps*: an event out of turn is dropped and ``Attach(have)`` asks for the missing ones. A request that was quiet
  for a third of a lease is probed the same way: a connection that broke and healed unnoticed may have taken its
  last event, and the router keeps an ended request for no more than a lease.
- *Left* requests are kept until the router confirms their end (``timeout_s`` at most), so that a ``Cancel`` which
  was lost with a connection is said again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from msgspec.structs import replace

from dsclient.events import Deliver, End
from dswire.errors import Cancelled, DeadlineExceeded, DsError, RouterLost, UnknownRequest, from_info
from dswire.messages import client
from dswire.timers import Timers

RequestEvent: TypeAlias = client.Accepted | client.Output | client.Finished | client.Failed


class Alarm(Enum):
    """What a deadline is for. The name beside it is a request's or an ask's, "" for the connection."""

    #: say hello again
    HELLO = 0
    PING = 1
    #: the router may be gone
    SILENCE = 2
    #: an ask has waited long enough
    ASK = 3
    #: a request has waited long enough for the router to come back
    GIVE_UP = 4
    #: a request was quiet for a third of a lease
    PROBE = 5
    #: a request's own deadline is over, and the router did not say so
    LATE = 6
    #: the end of a request that was left is not confirmed
    FORGET = 7


Alarms: TypeAlias = Timers[tuple[Alarm, str]]


@dataclass(slots=True)
class _Request:
    request_id: str
    #: None for a request that this client has attached to
    submit: client.Submit | None
    since: float
    heard_at: float
    #: events received; the number of the next one
    have: int = 0
    #: the router that was told of it; "" for none yet
    incarnation: str = ""
    #: ``Attach`` was sent because of a gap
    repairing: bool = False
    #: ``Cancel`` is wanted; said again after a reconnect
    cancelling: bool = False
    #: nobody reads it
    left: bool = False


class Requests:
    """Every request that has not ended. ``send`` takes messages, ``tell`` takes ``Deliver`` and ``End``."""

    def __init__(
        self,
        timers: Alarms,
        send: Callable[[Any], None],
        tell: Callable[[Deliver | End], None],
        timeout_s: float,
    ) -> None:
        self._timers = timers
        self._send = send
        self._tell = tell
        self._timeout_s = timeout_s
        self._open: dict[str, _Request] = {}
        #: the router's, while joined
        self._incarnation: str | None = None
        self._quiet_s = 0.0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def open(self, now: float, request_id: str, submit: client.Submit | None) -> None:
        """A new request; without ``submit`` it is one that the router knows already."""
        assert request_id not in self._open, f"{request_id} is open already"
        request = self._open[request_id] = _Request(request_id, submit, now, now)
        if submit is not None and submit.deadline_s is not None:
            self._timers.set((Alarm.LATE, request_id), now + submit.deadline_s + self._timeout_s)
        if self._incarnation is None:
            self._timers.set((Alarm.GIVE_UP, request_id), now + self._timeout_s)
        else:
            self._resume(now, request, self._incarnation)

    def joined(self, now: float, incarnation: str, lease_s: float) -> None:
        """The router is there: take every request up again."""
        self._incarnation, self._quiet_s = incarnation, lease_s / 3
        for request in list(self._open.values()):
            self._resume(now, request, incarnation)

    def parted(self, now: float) -> None:
        """The router is gone: each request waits ``timeout_s`` for it to come back."""
        self._incarnation = None
        for request in self._open.values():
            self._timers.cancel((Alarm.PROBE, request.request_id))
            if not request.left:
                self._timers.set((Alarm.GIVE_UP, request.request_id), now + self._timeout_s)

    def take(self, now: float, message: RequestEvent) -> None:
        """An event came in; those of requests that have ended, or that nobody was told of yet, are dropped."""
        request = self._open.get(message.request_id)
        if request is None or not request.incarnation:
            return
        request.heard_at = now
        if request.left:
            if isinstance(message, client.Finished | client.Failed):
                self._drop(request)
        elif isinstance(message, client.Failed) and message.error.code == UnknownRequest.code:
            self._end(request, from_info(message.error))  # no event of the request: its number means nothing
        elif message.number == request.have:
            self._deliver(request, message)
        elif message.number > request.have and not request.repairing:
            request.repairing = True
            self._send(client.Attach(request.request_id, request.have))

    def cancel(self, now: float, request_id: str) -> None:
        """Stop a request; its reader learns so by its end. The id may be one that this client does not know."""
        request = self._open.get(request_id)
        if request is not None and not request.incarnation:
            self._end(request, Cancelled(f"{request_id}: was cancelled before it was sent"))
            return
        if request is not None:
            request.cancelling = True
        if self._incarnation is not None:
            self._send(client.Cancel(request_id))

    def leave(self, now: float, request_id: str) -> None:
        """Stop a request that nobody reads, and tell nobody of it."""
        request = self._open.get(request_id)
        if request is None or request.left:
            return
        if not request.incarnation:
            self._drop(request)
            return
        request.left = True
        for alarm in (Alarm.GIVE_UP, Alarm.PROBE, Alarm.LATE):
            self._timers.cancel((alarm, request_id))
        self._timers.set((Alarm.FORGET, request_id), now + self._timeout_s)
        if self._incarnation is not None:
            self._send(client.Cancel(request_id))

    def fail(self, now: float, error: DsError, *, unheard_only: bool = False) -> None:
        """End every request, or those of which no event has come yet, with ``error``."""
        for request in list(self._open.values()):
            if not request.left and not (unheard_only and request.have):
                self._abandon(now, request, error)

    def alarm(self, now: float, alarm: Alarm, request_id: str) -> None:
        """A deadline of a request has come."""
        request = self._open[request_id]
        match alarm:
            case Alarm.FORGET:
                self._drop(request)
            case Alarm.PROBE:
                self._probe(now, request)
            case Alarm.LATE:
                self._abandon(now, request, DeadlineExceeded(f"{request_id}: its time was up"))
            case Alarm.GIVE_UP:
                text = f"{request_id}: the router did not answer within {self._timeout_s:g} s"
                self._abandon(now, request, RouterLost(text))

    def validate(self, *, readable: bool) -> None:
        """Check every invariant; ``readable``: whether there may be requests that somebody reads."""
        for request_id, request in self._open.items():
            joined = self._incarnation is not None
            alarm = Alarm.FORGET if request.left else Alarm.PROBE if joined else Alarm.GIVE_UP
            assert (alarm, request_id) in self._timers, f"{request_id} waits without a deadline"
            assert readable or request.left, f"{request_id} waits for a router that nobody calls"
            assert request.incarnation or not request.have, f"{request_id} was answered before it was sent"

    def _resume(self, now: float, request: _Request, incarnation: str) -> None:
        self._timers.cancel((Alarm.GIVE_UP, request.request_id))
        known = request.incarnation == incarnation
        if request.left and not known:
            self._drop(request)
        elif request.left:
            self._send(client.Cancel(request.request_id))
        elif request.have and not known:
            text = f"{request.request_id}: was lost when the router was restarted"
            self._end(request, RouterLost(text, remedy="send the request again"))
        else:
            request.incarnation = incarnation
            self._catch_up(now, request)
            self._timers.set((Alarm.PROBE, request.request_id), now + self._quiet_s)

    def _catch_up(self, now: float, request: _Request) -> None:
        if request.have or request.submit is None:
            self._send(client.Attach(request.request_id, request.have))
        else:
            self._send(_remaining(request.submit, now - request.since))
        if request.cancelling:
            self._send(client.Cancel(request.request_id))

    def _deliver(self, request: _Request, message: RequestEvent) -> None:
        request.have += 1
        request.repairing = False
        if isinstance(message, client.Failed):
            self._end(request, from_info(message.error))
            return
        if isinstance(message, client.Finished):
            self._drop(request)
        self._tell(Deliver(request.request_id, message))

    def _probe(self, now: float, request: _Request) -> None:
        due = request.heard_at + self._quiet_s
        if due <= now:
            self._catch_up(now, request)
            due = now + self._quiet_s
        self._timers.set((Alarm.PROBE, request.request_id), due)

    def _abandon(self, now: float, request: _Request, error: DsError) -> None:
        self._tell(End(request.request_id, error))
        self.leave(now, request.request_id)

    def _end(self, request: _Request, error: DsError) -> None:
        self._drop(request)
        self._tell(End(request.request_id, error))

    def _drop(self, request: _Request) -> None:
        del self._open[request.request_id]
        for alarm in (Alarm.GIVE_UP, Alarm.PROBE, Alarm.LATE, Alarm.FORGET):
            self._timers.cancel((alarm, request.request_id))


def _remaining(submit: client.Submit, passed_s: float) -> client.Submit:
    """The submit as of now: what has passed since it was opened counts against its deadline."""
    if submit.deadline_s is None or passed_s <= 0:
        return submit
    return replace(submit, deadline_s=max(0.001, submit.deadline_s - passed_s))
