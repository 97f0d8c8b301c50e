"""The shell around a decode machine, which lets it sleep while nothing happens.

Where the machine says that steps will follow each other unchanged unless something comes, they are only counted,
each at its time. The machine is told of all of them at once when something comes, or when they are over; the router
when it is about to look at anything else, and only of those that it would have heard of by then. So nobody acts on
less than it would know from steps told one by one, and events keep their order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

import dsdecode.events as decode
from dsdecode.state import DecodeState
from dskv.handle import KvKey
from dssched.steps import Made, RunStep, Stepped
from dssim.processes import ENDS, TOKEN, RouterProcess, Worker
from dswire.links import ROUTER
from dswire.messages.worker import StepDone


@dataclass(slots=True)
class _Stretch:
    """Steps that are run as one."""

    #: the first of those that the machine was not told of
    step: RunStep
    #: of the step that runs
    contexts: list[int]
    #: steps behind the one that runs
    left: int
    seconds: float = 0.0
    #: of the steps that ended untold, those of which the router would have heard
    heard: int = 0
    #: when it would have heard of the last of them
    heard_at: float = 0.0
    #: the others: what the router is to be told of each, once the machine has said it
    on_way: deque[list[StepDone]] = field(default_factory=deque)


class DecodeProcess(Worker):
    """A decode instance."""

    _stretch: _Stretch | None = None
    #: where the machine's word on a stretch goes
    _word: list[StepDone] | None = None

    def feed(self, event: Any) -> None:
        """Give the machine an event, and before it what ended; then it says anew how long nothing will happen."""
        self.settle()
        super().feed(event)
        if self._stretch is not None:
            self._stretch.left = min(self._stretch.left, self._decode.repeat() - 1)

    def send(self, peer: str, message: msgspec.Struct) -> None:
        """Send a message; what tells of a stretch is on its way already."""
        if self._word is not None and type(message) is StepDone:
            self._word.append(message)
        else:
            super().send(peer, message)

    def perform(self, action: Any) -> None:
        """Copies, and stretches of steps."""
        match action:
            case decode.CopyDirect(handle, _):
                seconds = self.transfers.copy_s(handle.nbytes)
                self.copy(seconds, lambda now: decode.CopyEnded(now, handle.key))
            case decode.CopyStream(handle, _, ticket):
                (ends_s,) = ENDS.unpack(ticket.token)
                self.kernel.at(max(self.kernel.now, ends_s), self._streamed, handle.key)
            case decode.CutStream():
                # what it costs to read on is nobody's
                pass
            case RunStep() if self._stretch is not None:
                # it runs already
                self._stretch.step = action
            case RunStep(repeat=repeat) if repeat > 1:
                self._stretch = _Stretch(action, [run.start + 1 for run in action.runs], repeat - 1)
                self._run(self._stretch)
            case _:
                super().perform(action)

    def settle(self) -> None:
        """Tell the machine of every step that has ended, and the router of those that it would have heard of."""
        stretch = self._stretch
        if stretch is None:
            return
        self._tell_heard()
        while stretch.on_way:
            self._tell(stretch, 1, stretch.on_way.popleft())

    def _streamed(self, key: KvKey) -> None:
        self.feed(decode.CopyEnded(self.kernel.now, key))

    def _run(self, stretch: _Stretch) -> None:
        leaves = self.work((), stretch.contexts)
        stretch.seconds = leaves - self.kernel.now
        self.kernel.at(leaves, self._ended, stretch)

    def _ended(self, stretch: _Stretch) -> None:
        if not self.alive:
            return
        word: list[StepDone] = []
        stretch.on_way.append(word)
        self.kernel.after(self.peers[ROUTER].seconds, self._heard, stretch, word)
        if stretch.left:
            stretch.left -= 1
            stretch.contexts = [context + 1 for context in stretch.contexts]
            self._run(stretch)
            return
        last = stretch.on_way.pop()
        self.settle()
        self._stretch = None
        self._tell(stretch, 1, last)

    def _heard(self, stretch: _Stretch, word: list[StepDone]) -> None:
        """A step's message reaches the router."""
        if word:
            self._router.count(self.peers[ROUTER].us, word[0], self.kernel.now)
            return
        if not stretch.on_way or stretch.on_way[0] is not word:
            # told already, and the machine had nothing to say: all of the step's sequences had been ended meanwhile
            return
        stretch.on_way.popleft()
        stretch.heard, stretch.heard_at = stretch.heard + 1, self.kernel.now
        self._router.untold[self.name] = self._tell_heard

    def _tell_heard(self) -> None:
        stretch = self._stretch
        if stretch is not None and stretch.heard:
            word: list[StepDone] = []
            count, stretch.heard = stretch.heard, 0
            self._tell(stretch, count, word)
            self._router.count(self.peers[ROUTER].us, word[0], stretch.heard_at)

    @property
    def _decode(self) -> DecodeState:
        assert isinstance(self.machine, DecodeState)
        return self.machine

    @property
    def _router(self) -> RouterProcess:
        router = self.peers[ROUTER].other
        assert isinstance(router, RouterProcess)
        return router

    def _tell(self, stretch: _Stretch, count: int, word: list[StepDone]) -> None:
        """Tell the machine that its step has ended, and as many behind it as make ``count``."""
        more = (TOKEN,) * (count - 1)
        made = tuple([Made(run.key, TOKEN, None, more) for run in stretch.step.runs])
        self._word = word
        super().feed(Stepped(self.kernel.now, stretch.step.number, made, stretch.seconds))
        self._word = None
