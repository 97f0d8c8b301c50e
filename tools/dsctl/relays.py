"""What the relays of a topology hold and which paths they have: asked of each relay itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from dstopology.endpoints import is_local
from dstopology.resolved import Relay, Topology
from dstopology.wiring import system_keys
from dswire.codec import Decoder, encode
from dswire.errors import BadInput, DsError, ErrorInfo, NoInstance, ProtocolError
from dswire.messages import kv
from dswire.sockets import ConnectedSocket

#: longest wait for a relay's answer, in seconds
PATIENCE_S = 3.0


class Answer(msgspec.Struct, frozen=True):
    """What one relay said, or why it said nothing."""

    relay: str
    node: str
    listing: kv.KvListing | None
    error: ErrorInfo | None = None


def ask(topology: Topology, patience_s: float = PATIENCE_S) -> list[Answer]:
    """Ask every relay, all at once. Raises :class:`BadInput` where the topology has none."""
    if not topology.relays:
        raise BadInput(f"{topology.path}: no KV moves in mode {topology.mode}, so there is no relay to ask")
    return asyncio.run(_ask_all(topology, topology.relays, patience_s))


async def _ask_all(topology: Topology, relays: Sequence[Relay], patience_s: float) -> list[Answer]:
    return list(await asyncio.gather(*(_ask(topology, relay, patience_s) for relay in relays)))


async def _ask(topology: Topology, relay: Relay, patience_s: float) -> Answer:
    endpoint = _endpoint(topology, relay)
    decoder: Decoder[msgspec.Struct] = Decoder(kv.ToKvWorker | kv.KvListing)
    came: asyncio.Future[kv.KvListing] = asyncio.get_running_loop().create_future()

    def on_frames(identity: str, frames: list[bytes]) -> None:
        try:
            message = decoder.decode(frames[0])
        except ProtocolError as error:
            if not came.done():
                came.set_exception(error)
            return
        if isinstance(message, kv.KvListing) and not came.done():
            came.set_result(message)

    keys = system_keys(topology)
    socket = ConnectedSocket(endpoint, f"dsctl/{id(came):x}", keys=keys, on_denied=came.set_exception)
    try:
        socket.start(on_frames)
        socket.send("", [encode(kv.KvList())])
        async with asyncio.timeout(patience_s):
            return Answer(relay.name, relay.node, await came)
    except TimeoutError:
        error = NoInstance(f"{relay.name} at {endpoint} does not answer", remedy="see `dsctl status`")
        return Answer(relay.name, relay.node, None, error.info())
    except DsError as error:
        return Answer(relay.name, relay.node, None, error.info())
    finally:
        socket.close()


def _endpoint(topology: Topology, relay: Relay) -> str:
    if relay.data_connect is None or is_local(topology.node(relay.node).host):
        return relay.local
    return relay.data_connect
