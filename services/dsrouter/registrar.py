"""Comings and goings of workers: who is welcomed or refused, who is pinged, who is lost. Pure.

A worker is lost when it says so, when nothing can be sent to it, when it was silent for its lease, when another
takes its name over, and when messages to or from it got lost: both sides count what they send and receive.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from dsrouter.config import RouterConfig
from dsrouter.events import Note
from dsrouter.flow import Flow
from dsrouter.workers import PROBE_S, Worker, Workers
from dswire.messages import worker
from dswire.timers import Timers


class Registrar:
    """Keeps the registry, and tells the flow who was lost."""

    def __init__(
        self,
        config: RouterConfig,
        workers: Workers,
        flow: Flow,
        timers: Timers[tuple[str, str]],
        send: Callable[[str, msgspec.Struct], None],
        note: Callable[[Note], None],
    ) -> None:
        """``timers``: ("claim", name) is set here, and :meth:`probed` is to be called when it is due."""
        self._config = config
        self._workers = workers
        self._flow = flow
        self._timers = timers
        self._send = send
        self._note = note

    def known(self, now: float, peer: str, message: msgspec.Struct) -> Worker | None:
        """The live worker that a message came from; one that is not known is asked for its hello."""
        known = self._workers.at(peer)
        if known is None:
            self._send(peer, worker.HelloWanted())
            return None
        known.heard_at = now
        known.received += not isinstance(message, worker.WorkerReport)
        return known

    def hello(self, now: float, peer: str, hello: worker.WorkerHello) -> None:
        """Welcome a worker, refuse it, or look first whether the holder of its name lives."""
        refusal = self._workers.refusal(peer, hello)
        holder = self._workers.get(hello.name)
        if refusal is not None:
            self._send(peer, worker.WorkerRefused(refusal.info()))
        elif holder is None:
            self._welcome(now, peer, hello)
        elif holder.peer == peer:
            # said again: it holds nothing of ours, or must drop it. After an outage of ours hellos come in
            # bunches, one for every try, so this is nobody's fault
            self._flow.worker_lost(now, holder, alive=True)
            self._workers.leave(now, holder)
            self._welcome(now, peer, hello)
        else:
            holder.claim, holder.claim_until = (peer, hello), now + PROBE_S
            self._timers.set(("claim", hello.name), holder.claim_until)
            self._send(holder.peer, worker.RouterPing(holder.sent))

    def report(self, now: float, known: Worker, report: worker.WorkerReport) -> None:
        """A worker answers a ping."""
        if report.sent is not None and report.sent != known.received:
            # a connection that broke and healed took messages with it, and nobody can tell which
            self.lose(now, known, "messages on the way got lost")
            self._send(known.peer, worker.HelloWanted())
            return
        known.load, known.load_at = report.load, now
        if known.claim is not None:
            peer, hello = known.claim
            known.claim = None
            self._timers.cancel(("claim", hello.name))
            self._send(peer, worker.WorkerRefused(self._workers.duplicate(hello).info()))

    def left(self, now: float, gone: Worker) -> None:
        """A worker has said goodbye."""
        self._gone(now, gone, Note("worker left", {"worker": gone.hello.name}))

    def lose(self, now: float, lost: Worker, why: str) -> None:
        """A worker is dead, as far as can be told."""
        self._gone(now, lost, Note("worker lost", {"worker": lost.hello.name, "why": why}, warning=True))

    def _gone(self, now: float, lost: Worker, note: Note) -> None:
        self._note(note)
        self._workers.leave(now, lost)
        self._timers.cancel(("claim", lost.hello.name))
        self._flow.worker_lost(now, lost)
        if lost.claim is not None:
            self._welcome(now, *lost.claim)

    def unreachable(self, now: float, peer: str) -> None:
        """Nothing can be sent to a connection."""
        lost = self._workers.at(peer)
        if lost is not None:
            self.lose(now, lost, "nothing can be sent to it")

    def probed(self, now: float, name: str) -> None:
        """The holder of a name did not answer in time: it is dead, and the claimant takes over."""
        holder = self._workers.get(name)
        if holder is not None:
            self.lose(now, holder, "it did not answer when another process came with its name")

    def ping(self, now: float) -> None:
        """Ping every worker; those that were silent for too long are lost."""
        for one in self._workers:
            if now - one.heard_at > self._config.worker_lease_s:
                self.lose(now, one, f"silent for {now - one.heard_at:.1f} s")
            else:
                self._send(one.peer, worker.RouterPing(one.sent))

    def _welcome(self, now: float, peer: str, hello: worker.WorkerHello) -> None:
        self._workers.join(now, peer, hello)
        self._note(Note("worker joined", {"worker": hello.name, "node": hello.node}))
        config = self._config
        self._send(peer, worker.WorkerWelcome(config.name, config.incarnation, config.worker_lease_s))
