"""What a rank host knows of its ranks before their instance tells more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsengine.configs import rank_configs, rank_segments
from dsengine.rank_orders import Start, Wiring
from dsengine.rendezvous import Rendezvous
from dstopology.resolved import Instance, RankHost, Topology


class Launch:
    """Makes the starts of all ranks of the host, which meet by files of the run directory."""

    def __init__(self, topology: Topology, host: RankHost, model_dir: Path) -> None:
        self._topology = topology
        self._node = topology.node(host.node)
        self._model_dir = model_dir
        self._rendezvous = Rendezvous(topology.run_dir, host.name)
        self.instance: Instance = topology.instance(host.instance)
        self.ranks = frozenset(self.instance.ranks_on(host.node))

    def starts(self, blocks: int, secret: bytes) -> Iterator[Start]:
        """Of ranks that have never met; ``blocks``: of the KV pool."""
        one, wiring = self.instance, Wiring(self._node.bind_host, self._node.host, secret)
        handed = bool(self._topology.relays)
        configs = rank_configs(self._topology, one, self._model_dir, blocks, mapped=handed)
        segments = tuple(map(str, rank_segments(one))) if handed else ()
        meeting = str(self._rendezvous.new())
        for rank in sorted(self.ranks):
            run = one.run_of(rank)
            stages = (run.first, run.end)
            yield Start(one.name, one.tp, one.pp, rank, meeting, configs[rank], segments, stages, wiring)

    def close(self) -> None:
        """Remove those files."""
        self._rendezvous.clear()
