"""The router machine: clients, requests, workers.

Every request that was accepted ends exactly once, with ``Finished`` or ``Failed``: in ``_end``, the one place.
Its events are kept until the client's lease is over, so a client that reconnects gets what it missed.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import TypeAlias

import msgspec

from dsrouter.checks import check_submit, check_tokens
from dsrouter.clients import Client, Clients
from dsrouter.config import RouterConfig
from dsrouter.events import Note, Stopping, Tokenize, Tokenized
from dsrouter.flow import Flow
from dsrouter.ledger import Account
from dsrouter.registrar import Registrar
from dsrouter.request import TRANSITIONS, Choice, MakeWriter, Phase, Request
from dsrouter.workers import Workers
from dswire.errors import (
    Cancelled,
    DeadlineExceeded,
    DsError,
    DuplicateRequest,
    Failed,
    Overloaded,
    RouterLost,
    UnknownRequest,
    VersionMismatch,
    from_info,
)
from dswire.lifecycle import Lifecycle
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL, client, worker
from dswire.timers import Timers

Action: TypeAlias = Send | Tokenize | Note
Event: TypeAlias = Received | Tick | PeerLost | Tokenized | Stopping

#: how often workers are pinged and leases looked at, in seconds
PING_S = 1.0
CLIENT = "client:"


class RouterState:
    """Events in, actions out."""

    def __init__(self, config: RouterConfig, make_writer: MakeWriter, random: Random, now: float) -> None:
        """``random`` makes the seeds of requests that bring none."""
        self.config = config
        self.clients = Clients(config.client_lease_s)
        self.workers = Workers(config.workers, config.model)
        self.flow = Flow(self.workers, self, config)
        #: every request whose end is not forgotten yet
        self.requests: dict[str, Request] = {}
        self.ended: Counter[str] = Counter()
        self._live = 0
        self._started = now
        self._make_writer = make_writer
        self._random = random
        #: ("ping", ""), ("keep", ""), ("claim", worker), ("deadline", request) and ("forget", request)
        self._timers: Timers[tuple[str, str]] = Timers()
        self._timers.set(("ping", ""), now)
        #: when the next ping is due
        self._ping_at = now
        if config.keep_extend_s:
            self._timers.set(("keep", ""), now + config.keep_extend_s)
        self._out: list[Action] = []
        self._registrar = Registrar(config, self.workers, self.flow, self._timers, self.send, self._note)

    # the machine's interface

    def handle(self, event: Event) -> list[Action]:
        """Take one event."""
        self._out = []
        now = event.now
        match event:
            case Received(_, peer, message) if peer.startswith(CLIENT):
                self._from_client(now, peer, message)
            case Received(_, peer, message):
                self._from_worker(now, peer, message)
            case Tokenized():
                self._tokenized(event)
            case PeerLost(_, peer) if peer.startswith(CLIENT):
                self.clients.unreachable(peer)
            case PeerLost(_, peer):
                self._registrar.unreachable(now, peer)
            case Stopping():
                for request in [one for one in self.requests.values() if one.live]:
                    self.fail(request, RouterLost("the router is shutting down"), now)
            case Tick():
                for kind, name in self._timers.due(now):
                    self._due(now, kind, name)
        self.flow.pump(now)
        return self._out

    def next_deadline(self) -> float | None:
        """The earliest of all timers."""
        return self._timers.next()

    def validate(self) -> None:
        """Requests, choices and counters agree."""
        self.flow.validate()
        live = [request for request in self.requests.values() if request.live]
        assert len(live) == self._live <= self.config.max_requests
        for request in self.requests.values():
            owner = self.clients.get(request.client)
            assert owner is not None
            assert request.id in owner.requests
            assert request.live == (("deadline", request.id) in self._timers)
            ends = [one for one in request.events if isinstance(one, client.Finished | client.Failed)]
            assert len(ends) == (not request.live)
            assert all(getattr(event, "number", None) == place for place, event in enumerate(request.events))
            standing = [one for one in request.choices if one.life.phase is not Phase.DONE]
            assert request.live or not standing

    # clients

    def _from_client(self, now: float, peer: str, message: msgspec.Struct) -> None:
        if isinstance(message, client.ClientHello):
            self._client_hello(now, peer, message)
            return
        known = self.clients.heard(now, peer)
        if known is None:
            self.send(peer, client.ClientHelloWanted())
            return
        match message:
            case client.Submit():
                self._submit(now, known, message)
            case client.Cancel(request_id=request_id):
                self._cancel(now, known, request_id)
            case client.Attach(request_id=request_id, have=have):
                self._attach(known, request_id, have)
            case client.ClientPing():
                self.send(peer, client.ClientPong(self.config.incarnation))
            case client.ClientBye():
                self._client_gone(now, known, "its client left")
            case client.StatusQuery():
                self.send(peer, self._status(now))

    def _client_hello(self, now: float, peer: str, hello: client.ClientHello) -> None:
        config = self.config
        if hello.protocol != PROTOCOL:
            error = VersionMismatch(f"the client speaks protocol {hello.protocol}, the router speaks {PROTOCOL}")
            self.send(peer, client.ClientRefused(error.info()))
            return
        self.clients.hello(now, peer)
        welcome = client.ClientWelcome(
            PROTOCOL,
            config.name,
            config.incarnation,
            config.model.name,
            config.max_model_len,
            config.client_lease_s,
        )
        self.send(peer, welcome)

    def _client_gone(self, now: float, gone: Client, why: str) -> None:
        for request_id in list(gone.requests):
            request = self.requests[request_id]
            if request.live:
                self.fail(request, Cancelled(f"request {request_id} was cancelled: {why}"), now)
            self._forget(request_id)
        self.clients.leave(gone.peer)

    def _attach(self, owner: Client, request_id: str, have: int) -> None:
        request = self.requests.get(request_id)
        if request is None or request.client != owner.peer:
            error = UnknownRequest(f"no request {request_id!r} of this client is known")
            self.send(owner.peer, client.Failed(request_id, 0, error.info()))
            return
        for event in request.events[max(0, have) :]:
            self.send(owner.peer, event)

    def _cancel(self, now: float, owner: Client, request_id: str) -> None:
        request = self.requests.get(request_id)
        # a cancel that crosses the end on the wire is no error, and one of an unknown request has nothing to stop
        if request is not None and request.client == owner.peer and request.live:
            self.fail(request, Cancelled(f"request {request_id} was cancelled by its client"), now)

    # requests

    def _submit(self, now: float, owner: Client, submit: client.Submit) -> None:
        known = self.requests.get(submit.request_id)
        if known is not None and known.client == owner.peer:
            self._attach(owner, submit.request_id, 0)
            return
        try:
            if known is not None:
                raise DuplicateRequest(f"request id {submit.request_id!r} is taken")
            check_submit(submit)
            if self._live >= self.config.max_requests:
                raise Overloaded(f"{self._live} requests are in the system, the router takes no more")
        except DsError as error:
            self.ended[error.code] += 1
            self.send(owner.peer, client.Failed(submit.request_id, 0, error.info()))
            return
        self._admit(now, owner, submit)

    def _admit(self, now: float, owner: Client, submit: client.Submit) -> None:
        request = Request(submit.request_id, owner.peer, submit, now)
        self.requests[request.id] = request
        owner.requests.add(request.id)
        self._live += 1
        limit_s = self.config.max_deadline_s
        deadline_s = min(submit.deadline_s, limit_s) if submit.deadline_s is not None else limit_s
        self._timers.set(("deadline", request.id), now + deadline_s)
        if submit.prompt_ids is not None:
            self._begin(now, request, submit.prompt_ids)
        else:
            self._out.append(Tokenize(submit))

    def _tokenized(self, event: Tokenized) -> None:
        request = self.requests.get(event.submit.request_id)
        if request is None or request.submit is not event.submit or not request.live:
            return
        if event.error is not None:
            self.fail(request, from_info(event.error), event.now)
        else:
            self._begin(event.now, request, event.prompt_ids)

    def _begin(self, now: float, request: Request, prompt_ids: tuple[int, ...]) -> None:
        sampling = request.submit.sampling
        room = min(self.config.max_model_len, self.workers.room() or self.config.max_model_len)
        try:
            check_tokens(prompt_ids, sampling, vocab_size=self.config.vocab_size, room=room)
        except DsError as error:
            self.fail(request, error, now)
            return
        request.prompt_ids = prompt_ids
        self.emit(request, client.Accepted(request.id, 0, len(prompt_ids)))
        seed = sampling.seed if sampling.seed is not None else self._random.getrandbits(63)
        max_tokens = min(sampling.max_tokens, room - len(prompt_ids))
        min_tokens = min(sampling.min_tokens, max_tokens)
        for number in range(sampling.n):
            own = msgspec.structs.replace(
                sampling, seed=(seed + number) % 2**63, max_tokens=max_tokens, min_tokens=min_tokens
            )
            key = self.flow.next_key(f"{request.id}/{number}")
            life = Lifecycle(f"choice {key}", TRANSITIONS, Phase.QUEUED, request.arrived)
            choice = Choice(number, own, self._make_writer(own, prompt_ids), life, Account(request.arrived), key)
            request.choices.append(choice)
            self.flow.add(request, choice)

    # what the flow tells us

    def send(self, peer: str, message: msgspec.Struct) -> None:
        """Send a message, counting what a worker is sent."""
        self._out.append(Send(peer, message))
        known = self.workers.at(peer)
        if known is not None and not isinstance(message, worker.RouterPing | worker.WorkerWelcome):
            known.sent += 1

    def emit(self, request: Request, event: msgspec.Struct) -> None:
        """Keep an event of a request, and send it if its client can be reached."""
        request.events.append(event)
        owner = self.clients.get(request.client)
        if owner is not None and owner.reachable:
            self._out.append(Send(owner.peer, event))

    def choice_done(self, request: Request, choice: Choice, now: float) -> None:
        """A choice is complete; with the last one the request is."""
        if all(one.finish_reason for one in request.choices):
            made = sum(len(one.output_ids) for one in request.choices)
            usage = client.Usage(len(request.prompt_ids), made)
            ledger = choice.account.close(now)
            self._end(request, "finished", client.Finished(request.id, len(request.events), usage, ledger), now)

    def fail(self, request: Request, error: DsError, now: float) -> None:
        """A request ends with an error; whatever of it is under way is dropped."""
        if isinstance(error, Failed) and not isinstance(error, RouterLost):
            self._note(
                Note("request failed", {"request": request.id, "code": error.code, "why": error.message}, True)
            )
        for choice in request.choices:
            if choice.life.phase is not Phase.DONE:
                self.flow.stop(choice, now, f"failed: {error.code}")
        self._end(request, error.code, client.Failed(request.id, len(request.events), error.info()), now)

    def _note(self, note: Note) -> None:
        self._out.append(note)

    def _end(self, request: Request, how: str, event: msgspec.Struct, now: float) -> None:
        assert request.live, f"request {request.id} ends twice: {request.ended}, {how}"
        self.emit(request, event)
        request.ended = how
        self.ended[how] += 1
        self._live -= 1
        self._timers.cancel(("deadline", request.id))
        self._timers.set(("forget", request.id), now + self.config.client_lease_s)

    def _forget(self, request_id: str) -> None:
        request = self.requests.pop(request_id)
        self._timers.cancel(("forget", request_id))
        owner = self.clients.get(request.client)
        if owner is not None:
            owner.requests.discard(request_id)

    # workers

    def _from_worker(self, now: float, peer: str, message: msgspec.Struct) -> None:
        if isinstance(message, worker.WorkerHello):
            self._registrar.hello(now, peer, message)
            return
        known = self._registrar.known(now, peer, message)
        if known is None:
            return
        match message:
            case worker.WorkerReport():
                self._registrar.report(now, known, message)
            case worker.WorkerBye():
                self._registrar.left(now, known)
            case worker.PrefillDone():
                self.flow.prefilled(now, message)
            case worker.KvSealed(handle=handle):
                self.flow.sealed(now, handle)
            case worker.StepDone(tokens=tokens):
                self.flow.stepped(now, tokens)
            case worker.Preempted(key=key):
                self.flow.preempted(now, key)
            case worker.SequenceFailed(key=key, error=error):
                self.flow.failed(now, key, error)

    # time

    def _due(self, now: float, kind: str, name: str) -> None:
        match kind:
            case "ping":
                self._ping(now)
            case "keep":
                self._timers.set(("keep", ""), now + self.config.keep_extend_s)
                self.flow.keeping.extend(choice for _, choice in self.flow.choices.values())
            case "claim":
                self._registrar.probed(now, name)
            case "deadline":
                request = self.requests[name]
                waited_s = now - request.arrived
                self.fail(request, DeadlineExceeded(f"request {name} was not done after {waited_s:.3g} s"), now)
            case "forget":
                self._forget(name)

    def _ping(self, now: float) -> None:
        slept_s = now - self._ping_at
        if slept_s > PING_S:
            # nobody is to blame for a silence in which we did not listen: what they said waits to be read
            self.clients.forgive(now, slept_s)
            self.workers.forgive(now, slept_s)
            self._note(Note("slept", {"seconds": f"{slept_s:.1f}"}, warning=True))
        self._ping_at = now + PING_S
        self._timers.set(("ping", ""), self._ping_at)
        self._registrar.ping(now)
        for gone in self.clients.silent(now):
            self._client_gone(now, gone, "its client fell silent")
        self.flow.starve(now, lambda role, among: self.workers.down_since(role, self._started, among))

    def _status(self, now: float) -> client.StatusReport:
        phases = Counter(one.life.phase.name.lower() for _, one in self.flow.choices.values())
        tokenizing = sum(request.live and not request.choices for request in self.requests.values())
        if tokenizing:
            phases["tokenizing"] = tokenizing
        return client.StatusReport(
            self.config.name,
            self.config.incarnation,
            self.config.model.name,
            now - self._started,
            self.workers.status(now),
            dict(phases),
            dict(self.ended),
        )
