"""What the relay machine must know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """Fixed for the life of the process."""

    name: str
    node: str
    incarnation: str
    lease_s: float
    transfer_timeout_s: float
    #: nodes whose relays can be fetched from; our own among them when KV goes by TCP even here
    sources: tuple[str, ...]
    #: whether readers of this node may copy straight from owners of this node
    direct: bool
    #: "gloo" or "nccl" where KV that is fetched goes by communicators between owner and reader, one hand-off of
    #: each at a time
    collective: str = ""
    #: try every path with a small transfer
    prove: bool = False
    #: workers are told to sum KV
    verify: bool = True
    #: file and size of the segment for copies of KV whose readers decode; 0 to keep none
    keep: str = ""
    keep_nbytes: int = 0
