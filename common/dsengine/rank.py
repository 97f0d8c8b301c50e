"""``python -m dsengine.rank``: one rank of an instance, the child of the instance's process.

It runs the steps that it is told, in order, and beside them copies between its pool and the mirror of that. It ends
when its standard input does: so it never outlives the instance's process, however that ends, nor leaves the file of
its pool behind. It ends by itself, with a report, when a step fails: the ranks have then lost each other.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import IO, TYPE_CHECKING, NoReturn

import msgspec

from dsengine.rank_orders import (
    BEAT_S,
    LOAD_S,
    RankCopy,
    RankMeet,
    RankPages,
    RankPull,
    RankStep,
    RankSum,
    Report,
    StageOrder,
    Start,
    encode,
    read,
    start_of,
)
from dskv.stage import StageKv
from dsobserve.logging import configure
from dswire.errors import DsError, EngineFailed
from dswire.process import EXIT_BUG

if TYPE_CHECKING:
    from dsengine.parallel import Part
    from dsengine.runner import Engine
    from dsengine.wire import Wires

_log = logging.getLogger(__name__)


class _Rank:
    """The rank of this process."""

    def __init__(self, start: Start, orders: IO[bytes], reports: IO[bytes]) -> None:
        self._start = start
        self._orders = orders
        self._reports = reports
        self._reporting = Lock()
        self._segment: Path | None = None
        #: never longer than the number of steps that an instance has under way
        self._steps: SimpleQueue[RankStep] = SimpleQueue()
        #: the one that is told, where it is
        self._meets: SimpleQueue[RankMeet] = SimpleQueue()
        #: one at a time is asked for
        self._copies: SimpleQueue[RankCopy | StageOrder] = SimpleQueue()

        #: once somebody asks for its KV as a whole
        self._stage: StageKv | None = None

    def run(self) -> NoReturn:
        """Load, then run steps until the instance's process is gone."""
        Thread(target=self._listen, name="orders", daemon=True).start()
        status = EXIT_BUG
        try:
            self._serve()
        except DsError as error:
            _log.error("%s; %s", error, error.remedy)
            self._report(Report("failed", error.info()))
            status = error.exit_code
        except Exception as error:  # noqa: BLE001 - process boundary: a bug is logged whole and ends the process
            _log.exception("unexpected error")
            self._report(Report("failed", EngineFailed(f"{self._start.name}: {error!r}").info()))
        self._leave(status)

    def _serve(self) -> None:
        import torch

        from dsengine.parallel import Part
        from dsengine.rank_group import GroupPeers
        from dsengine.runner import Engine, device_of
        from dsengine.wire import PeerGone

        start = self._start
        part = Part(start.tp, start.pp, start.rank)
        torch.set_num_threads(start.config.threads)
        device = device_of(start.config.device)
        try:
            peers = GroupPeers(part, device, Path(start.rendezvous), self._wires(part))
            engine = Engine(start.config, part, peers)
            self._segment = start.config.segment
            self._report(Report("ready"))
            Thread(target=self._beat, name="beat", daemon=True).start()
            Thread(target=self._copy, args=[engine], name="copy", daemon=True).start()
            while True:
                step = self._steps.get()
                engine.forward(step.batch(), step.picked)
        except PeerGone as error:
            raise EngineFailed(str(error)) from error

    def _wires(self, part: Part) -> Wires | None:
        """Tell that we are about to look for the others; where we met those of other nodes."""
        from dsengine.wire import PeerGone, Wires

        if self._start.wiring is None:
            self._report(Report("joining"))
            return None
        wires = Wires(part, self._start.wiring)
        self._report(Report("joining", where=wires.where))
        try:
            wires.meet(self._meets.get(timeout=LOAD_S).where)
        except Empty:
            raise PeerGone(f"the other ranks of {self._start.name} are not there after {LOAD_S:g} s") from None
        return wires

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(RankStep | RankCopy | RankMeet | StageOrder)
        while (frame := read(self._orders)) is not None:
            order = decoder.decode(frame)
            if isinstance(order, RankStep):
                self._steps.put(order)
            elif isinstance(order, RankMeet):
                self._meets.put(order)
            else:
                self._copies.put(order)
        self._leave(0)

    def _copy(self, engine: Engine) -> NoReturn:
        """What goes wrong fails one hand-off, and no step."""
        while True:
            order, error, checksum = self._copies.get(), None, 0
            try:
                checksum = self._copied(engine, order)
            except DsError as failed:
                error = failed.info()
            except Exception as failed:  # noqa: BLE001 - the boundary of this thread, whose other side waits
                _log.exception("unexpected error")
                error = EngineFailed(f"{self._start.name}: {failed!r}").info()
            self._report(Report("copied", error, checksum=checksum))

    def _copied(self, engine: Engine, order: RankCopy | StageOrder) -> int:
        """Do that; the checksum of what was summed."""
        if isinstance(order, RankCopy):
            engine.mirror(order.blocks, order.way)
            return 0
        if self._stage is None:
            start, pool = self._start, engine.pool
            mirrored = pool.mirror is not None
            self._stage = StageKv(
                engine.layout, start.tp, start.pp, start.stages, start.segments, pool.num_blocks, mirrored=mirrored
            )
        match order:
            case RankPages(key, blocks):
                self._stage.pages(key, blocks)
                return 0
            case RankSum(blocks):
                return self._stage.checksum(blocks)
            case RankPull(handle, blocks, summed):
                return self._stage.bring(handle, blocks, summed=summed)

    def _beat(self) -> NoReturn:
        """Give signs of life, within a long step too: what computes lets go of the interpreter's lock."""
        while True:
            time.sleep(BEAT_S)
            self._report(Report("alive"))

    def _report(self, report: Report) -> None:
        try:
            with self._reporting:
                self._reports.write(encode(report))
                self._reports.flush()
        except BrokenPipeError:
            # the instance's process is gone, and so are we in a moment
            return

    def _leave(self, status: int) -> NoReturn:
        """End now: the other thread may be within a step that nobody will ever complete."""
        if self._segment is not None:
            self._segment.unlink(missing_ok=True)
        logging.shutdown()
        os._exit(status)


def main() -> NoReturn:
    """Be the rank that the first frame on standard input tells."""
    # an interrupt at a terminal reaches every process there; the instance's tells us when it is time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not look like a report
    frame = read(sys.stdin.buffer)
    if frame is None:
        os._exit(0)
    start = start_of(frame)
    configure(f"{start.name}.{start.rank}")
    _Rank(start, sys.stdin.buffer, reports).run()


if __name__ == "__main__":
    main()
