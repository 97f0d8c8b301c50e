"""The machine of a rank host on a real socket, with real ranks."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from dsengine.configs import form_of
from dsengine.rank_orders import Report, encode
from dsengine.rank_process import RankProcess
from dsengine.store import resolve
from dsrankhost.config import HostConfig
from dsrankhost.events import EndRanks, Linked, RankSaid, StartRanks, TellRank, Unlinked
from dsrankhost.launch import Launch
from dsrankhost.state import INSTANCE, HostState
from dstopology.resolved import Topology
from dstopology.wiring import host_route, model_identity
from dswire.actor import WELCOME_S, Actor, Route

log = structlog.get_logger()


class HostActor(Actor):
    """Performs what the machine asks for."""

    machine: HostState

    def __init__(self, machine: HostState, route: Route, launch: Launch, phase: Callable[[str], None]) -> None:
        super().__init__(machine, [route])
        route.on_link = self._link
        self._launch = launch
        self._phase = phase
        self._ranks: dict[int, RankProcess] = {}
        # one that tells in order, so that the loop need not wait while a pipe is full
        self._teller = ThreadPoolExecutor(1, thread_name_prefix="tell")

    def started(self) -> None:
        """The connection makes the machine say hello; ranks that have loaded make us ready."""
        self._phase(f"waiting for {self._launch.instance.name}")
        self.wake()

    def closed(self) -> None:
        """End the ranks."""
        self._teller.shutdown(wait=False, cancel_futures=True)
        for rank in self._ranks.values():
            rank.end()
        self._launch.close()

    def still_waiting(self) -> None:
        """Loading takes its time; that nobody asks for it is worth a word."""
        if not self.machine.running:
            name = self._launch.instance.name
            remedy = f"see that {name} is up and reads the same topology, and that both have the same keys"
            log.warning("the instance does not answer", instance=name, waited_s=WELCOME_S, remedy=remedy)

    def abandon(self) -> None:
        """Ranks end with us; the files of their pools would not."""
        for rank in self._ranks.values():
            rank.kill()

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsrankhost.events``."""
        match action:
            case StartRanks():
                self._phase("loading model")
                self._start(action)
            case TellRank(rank, order):
                self._teller.submit(self._ranks[rank].tell, encode(order))
            case EndRanks():
                log.warning("the instance is gone, and so are its ranks here", instance=self._launch.instance.name)
                for process in self._ranks.values():
                    process.kill()
                self._ranks.clear()
            case _:
                super().perform(action)

    def _start(self, action: StartRanks) -> None:
        loop = asyncio.get_running_loop()

        def reporter(rank: int) -> Callable[[Report], None]:
            def on_report(report: Report) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: so is this
                    loop.call_soon_threadsafe(self._said, action.link, rank, report)

            return on_report

        for start in self._launch.starts(action.blocks, action.secret):
            self._ranks[start.rank] = RankProcess(start, reporter(start.rank))

    def _said(self, link: str, rank: int, report: Report) -> None:
        self._guard(lambda: self.feed(RankSaid(self.now(), link, rank, report)))

    def _link(self, there: bool) -> None:
        event = Linked(self.now()) if there else Unlinked(self.now())
        self._guard(lambda: self.feed(event))


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> HostActor:
    """Find the model, and wire the rank host ``name``."""
    host = topology.host(name)
    model_dir = await asyncio.to_thread(resolve, topology.model.path)
    launch = Launch(topology, host, model_dir)
    config = HostConfig(
        name=name,
        incarnation=uuid.uuid4().hex[:12],
        model=model_identity(topology, model_dir),
        form=form_of(topology, launch.instance),
        ranks=launch.ranks,
    )
    route = host_route(topology, host, config.incarnation, INSTANCE)
    return HostActor(HostState(config), route, launch, phase)
