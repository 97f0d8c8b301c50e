"""Which way the KV of a handle comes: what the relay's word, a ticket or none, is good for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dskv.handle import KvHandle
from dskv.segment import SegmentCache
from dskv.stream import Stream
from dskv.transport import SharedMemory, Transport
from dstopology.resolved import Topology
from dswire.messages.kv import Ticket

if TYPE_CHECKING:
    from dsengine.collective import Collective


class Transports:
    """The transports of one reader."""

    def __init__(self, topology: Topology, mapped: SegmentCache, collective: Collective | None) -> None:
        """``collective``: the communicators of this process, where the topology has KV take them."""
        self._topology = topology
        self._mapped = mapped
        self._collective = collective

    def of(self, handle: KvHandle, ticket: Ticket | None) -> Transport:
        """For the KV of ``handle``, of which the relay has said ``ticket``."""
        if ticket is None:
            return SharedMemory(handle, self._mapped)
        if ticket.meeting:
            assert self._collective is not None, "the relay has owners send where the topology says so"
            return self._collective.incoming(handle.owner, ticket.meeting)
        relay = self._topology.relay_of(handle.node)
        assert relay.stream_connect is not None, "the relay gives tickets for what can be reached"
        return Stream(relay.stream_connect.pair, ticket, relay.transfer_timeout_s)
