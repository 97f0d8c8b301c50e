"""What the router machine must know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from dstopology.resolved import Topology
from dswire.messages.worker import ModelIdentity


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Fixed for the life of the process."""

    name: str
    incarnation: str
    model: ModelIdentity
    vocab_size: int
    max_model_len: int
    #: role of each worker of the topology, by name
    workers: Mapping[str, str]
    max_requests: int
    #: sequences that one prefill instance, and one decode instance, is given; more wait here
    max_prefill_queue: int
    max_decode_queue: int
    max_deadline_s: float
    client_lease_s: float
    worker_lease_s: float
    retries: int
    #: how far KV is kept in its node, and who reads prompts: see :mod:`dssched.dispatch`
    node_affinity: float = 0.0
    mode: str = "disaggregated"
    threshold_tokens: int = 0
    #: of each prefill instance the decode instances that can be handed its KV; empty where all of them can
    reach: Mapping[str, frozenset[str]] = field(default_factory=dict)
    #: how often the leases of kept KV are renewed, in seconds; 0 where relays keep none
    keep_extend_s: float = 0.0

    @classmethod
    def of(cls, topology: Topology, incarnation: str, model: ModelIdentity, vocab_size: int) -> Self:
        """That of a topology's router, real or simulated."""
        router, relays = topology.router, topology.relays
        return cls(
            name=router.name,
            incarnation=incarnation,
            model=model,
            vocab_size=vocab_size,
            max_model_len=topology.model.max_model_len,
            workers={one.name: one.role for one in topology.instances} | {one.name: "relay" for one in relays},
            max_requests=router.max_requests,
            max_prefill_queue=min((one.max_queue for one in topology.role("prefill")), default=1),
            max_decode_queue=min((one.max_queue for one in topology.role("decode")), default=1),
            max_deadline_s=router.max_deadline_s,
            client_lease_s=router.client_lease_s,
            worker_lease_s=router.worker_lease_s,
            retries=router.retries,
            node_affinity=router.node_affinity,
            mode=topology.mode,
            threshold_tokens=topology.threshold_tokens,
            reach=topology.reach,
            keep_extend_s=min((one.lease_s / 3 for one in relays if one.keep_nbytes), default=0.0),
        )
