"""KV between instances by torch.distributed: Gloo between CPUs, NCCL between GPUs.

An owner and a reader make a communicator of two when they first meet, and use it again as long as nothing goes
wrong; whoever sees something go wrong drops it, which ends the other side's wait, and the next hand-off makes a new
one. The relays see to it that an instance takes part in one hand-off at a time, so that no ring of instances can
wait for each other. One operation carries one canonical block (``dskv.memory``): between CPUs straight out of the
owner's memory, between GPUs by way of theirs.

Nothing of this is encrypted: a topology with CURVE on refuses it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo

from dsengine.meeting import Meeting
from dskv.memory import PROOF_NBYTES
from dskv.receive import Receiver
from dstopology.resolved import Instance, Topology
from dswire.errors import TransferFailed

#: that a reader has asked for, and at least two blocks: no block is sent before it was
_AHEAD_NBYTES = 8 << 20
#: a tag under which nothing is ever sent
_NEVER = 1
#: said by a reader that has tried a communicator
_READ = "read"
#: at once, of one owner
_TRIALS = 8
#: ranks in a communicator
_OWNER, _READER = 0, 1


@dataclass(slots=True, eq=False)
class _Pair:
    """A communicator of an owner and a reader. Raises ``RuntimeError`` and ``OSError``."""

    meeting: Meeting
    #: of the process group that is ours
    rank: int
    device: torch.device
    timeout: timedelta
    #: a process group of the device's backend, once both have met; torch's stubs know too little of them
    group: Any = None

    def meet(self, host: str) -> None:
        """Make the communicator; ``host`` is this side's address."""
        self.meeting.meet()
        if self.device.type == "cuda":
            from torch._C._distributed_c10d import ProcessGroupNCCL

            torch.cuda.set_device(self.device)
            nccl = ProcessGroupNCCL.Options()
            nccl._timeout = self.timeout
            self.group = ProcessGroupNCCL(self.meeting, self.rank, 2, nccl)
            return
        # torch's own stubs leave these out
        gloo: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._timeout = self.timeout
        gloo._devices = [ProcessGroupGloo.create_device(hostname=host)]
        self.group = ProcessGroupGloo(self.meeting, self.rank, 2, gloo)

    def send(self, data: memoryview) -> None:
        """The reader has it, or soon will.

        One who leaves while Gloo's own thread writes is noticed when the time is over: Gloo forgets that message.
        """
        self.group.send([_tensor(data).to(self.device)], _READER, 0).wait(self.timeout)

    def receive(self, count: int, nbytes: int) -> Iterator[Tensor]:
        """The next ``count`` that are sent, each of ``nbytes``; each is good until the next."""
        ahead = max(2, _AHEAD_NBYTES // nbytes)
        here = torch.empty(min(count, ahead), nbytes, dtype=torch.uint8, device=self.device)
        asked: deque[Any] = deque()
        for at in range(count):
            # the owner need not wait to be told that somebody wants it
            for place in range(at + len(asked), min(at + len(here), count)):
                asked.append(self.group.recv([here[place % len(here)]], _OWNER, 0))
            asked.popleft().wait(self.timeout)
            yield here[at % len(here)]

    def leave(self) -> None:
        """End both sides' waits, those of other threads included."""
        self.meeting.leave()
        if self.group is None:
            return
        if self.device.type == "cuda":
            self.group.abort()
            return
        # Gloo has no way to abort, but closes a connection on which a wait ran out of time
        with contextlib.suppress(RuntimeError):
            nothing = torch.empty(1, dtype=torch.uint8)
            self.group.recv([nothing], 1 - self.rank, _NEVER).wait(timedelta(milliseconds=1))


class Collective:
    """The communicators of one instance, by the name of the other side. One transfer at a time."""

    def __init__(self, device: torch.device, host: str, timeout_s: float) -> None:
        """``host``: the address at which others reach this process; ``timeout_s``: bound of each wait."""
        self._device = device
        self._host = host
        self._timeout_s = timeout_s
        self._pairs: dict[str, _Pair] = {}
        self._lock = threading.Lock()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="send")
        #: communicators that are tried now, and the threads that send by them
        self._tried: set[_Pair] = set()
        self._triers = ThreadPoolExecutor(_TRIALS, thread_name_prefix="trial")

    @classmethod
    def of(cls, topology: Topology, instance: Instance, device: torch.device) -> Collective | None:
        """Those of ``instance``, whose pool is on ``device``, where the topology has KV take them."""
        if not topology.collective:
            return None
        timeout_s = topology.relay_of(instance.node).transfer_timeout_s
        return cls(device, topology.node(instance.node).host, timeout_s)

    # the owner

    def send(self, reader: str, data: Iterable[memoryview]) -> tuple[str, Future[None]]:
        """Begin to send all of ``data`` in a thread: ``host:port/token`` where ``reader`` is met, and how it ends.

        Both this and what comes of it raise :class:`TransferFailed`.
        """
        with self._lock:
            pair = self._pairs.get(reader)
            if pair is None:
                pair = self._pairs[reader] = self._new(self._listen(), _OWNER)
        # whatever becomes of the reader meanwhile, these bytes go by no later communicator
        return pair.meeting.where, self._sender.submit(self._send, pair, reader, data)

    def _send(self, pair: _Pair, reader: str, data: Iterable[memoryview]) -> None:
        try:
            self._meet(pair)
            for block in data:
                pair.send(block)
        except (RuntimeError, OSError) as error:
            self.drop(reader, pair.meeting.where)
            raise TransferFailed(f"{reader} cannot be sent to: {_first_line(error)}") from error

    # the reader

    def incoming(self, owner: str, where: str) -> Incoming:
        """What ``owner`` sends to one who meets it at ``where``."""
        return Incoming(self, owner, where)

    def join(self, owner: str, where: str) -> _Pair:
        """Meet ``owner``, unless that was done. Raises :class:`TransferFailed`."""
        with self._lock:
            pair = self._pairs.get(owner)
            known = pair is not None and pair.meeting.where == where
        if not known:
            self.drop(owner)
            with self._lock:
                pair = self._pairs[owner] = self._new(Meeting(where, self._timeout_s), _READER)
        assert pair is not None
        try:
            self._meet(pair)
        except (RuntimeError, OSError) as error:
            self.drop(owner, where)
            raise TransferFailed(f"{owner} cannot be met: {_first_line(error)}") from error
        return pair

    # trials

    def meet(self) -> tuple[str, Future[None]]:
        """Be met at ``host:port/token`` by one who tries how fast this side sends, and how that ends.

        The communicator is one of its own, as are its threads: no hand-off waits for it, nor it for any. Both this
        and what comes of it raise :class:`TransferFailed`.
        """
        pair = self._new(self._listen(), _OWNER)
        return pair.meeting.where, self._triers.submit(self._show, pair)

    def _show(self, pair: _Pair) -> None:
        with self._trying(pair, "nobody could be met"):
            pair.send(memoryview(bytearray(PROOF_NBYTES)))
            # to leave takes away what is still on its way
            pair.meeting.get(_READ)

    def read_rate(self, owner: str, where: str) -> float:
        """Bytes per second from ``owner``, who waits to be tried. Blocks; raises :class:`TransferFailed`."""
        pair = self._new(Meeting(where, self._timeout_s), _READER)
        with self._trying(pair, f"{owner} cannot be met"):
            began = time.perf_counter()
            # what comes back to the host has been sent
            next(pair.receive(1, PROOF_NBYTES))[-1].item()
            seconds = time.perf_counter() - began
            pair.meeting.set(_READ, b"")
        return PROOF_NBYTES / max(seconds, 1e-9)

    @contextlib.contextmanager
    def _trying(self, pair: _Pair, wrong: str) -> Iterator[None]:
        self._tried.add(pair)
        try:
            pair.meet(self._host)
            yield
        except (RuntimeError, OSError) as error:
            raise TransferFailed(f"{wrong}: {_first_line(error)}") from error
        finally:
            self._tried.discard(pair)
            pair.leave()

    # both

    def drop(self, name: str, where: str | None = None) -> None:
        """Leave the communicator with ``name``, if it is that of ``where``: whoever waits there is told."""
        with self._lock:
            pair = self._pairs.get(name)
            if pair is None or where not in (None, pair.meeting.where):
                return
            del self._pairs[name]
        pair.leave()

    def close(self) -> None:
        """Leave all."""
        for name in list(self._pairs):
            self.drop(name)
        for pair in list(self._tried):
            pair.leave()
        self._sender.shutdown()
        self._triers.shutdown(cancel_futures=True)

    def _listen(self) -> Meeting:
        try:
            return Meeting.listen(self._host, self._timeout_s)
        except OSError as error:
            raise TransferFailed(f"cannot listen at {self._host}: {error}") from error

    def _new(self, meeting: Meeting, rank: int) -> _Pair:
        return _Pair(meeting, rank, self._device, timedelta(seconds=self._timeout_s))

    def _meet(self, pair: _Pair) -> None:
        if pair.group is None:
            pair.meet(self._host)
        if pair not in self._pairs.values():
            # it was left before there was anything to end
            pair.leave()
            raise RuntimeError("the hand-off is over")


class Incoming:
    """A transport: what an owner sends in one hand-off."""

    def __init__(self, collective: Collective, owner: str, where: str) -> None:
        self._collective = collective
        self._owner = owner
        self._where = where
        self._cut = False

    def bring(self, receiver: Receiver) -> None:
        """Meet the owner, and take all that it sends. Raises :class:`TransferFailed`."""
        if self._cut:
            raise TransferFailed(f"the hand-off from {self._owner} is over")
        pair = self._collective.join(self._owner, self._where)
        handle = receiver.handle
        blocks = pair.receive(len(handle.blocks), handle.layout.block_nbytes)

        def read(target: memoryview) -> None:
            _tensor(target).copy_(next(blocks))

        try:
            receiver.receive(read)
        except RuntimeError as error:
            self.cut()
            raise TransferFailed(f"nothing comes from {self._owner}: {_first_line(error)}") from error

    def cut(self) -> None:
        """Leave the communicator."""
        self._cut = True
        self._collective.drop(self._owner, self._where)


def _tensor(data: memoryview) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
