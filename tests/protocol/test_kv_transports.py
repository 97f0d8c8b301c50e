"""One conformance suite for every way that KV can take: real relays, real sockets, real memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dskv.handle import KvHandle
from dswire.codec import encode
from dswire.errors import KvCorrupt, TransferFailed
from dswire.messages import PROTOCOL, kv
from dswire.sockets import ConnectedSocket
from support.handles import LAYOUT, offered_by_ranks, ranks
from support.kv_workers import Endpoint, Prefill
from support.relays import LEASE_S, TRANSPORTS, World, running

BLOCKS = (7, 3, 60, 12, 1, 0, 33, 34, 35, 36, 2)
OWN = tuple(range(40, 40 + len(BLOCKS)))


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def world(transport: str, tmp_path: Path) -> AsyncIterator[World]:
    async with running(transport, tmp_path) as made:
        yield made


async def hand_off(world: World, sequence: str = "r1/0") -> None:
    """One whole hand-off, checked."""
    handle = world.prefill.offer(sequence, BLOCKS)
    await world.decode.pull(handle, OWN)
    world.assert_arrived(BLOCKS, OWN)
    assert await world.prefill.released(handle.key) == "pulled"
    world.assert_idle()


async def begin(world: World) -> KvHandle:
    """A hand-off of which the grant has reached the decode instance."""
    handle = world.prefill.offer("r1/0", BLOCKS)
    world.decode.send(kv.KvPull(handle))
    await world.decode.expect(kv.KvGrant, key=handle.key)
    return handle


async def settle(world: World) -> None:
    """Whatever the workers have sent so far has reached their relays."""
    await world.prefill.hello()
    await world.decode.hello()


async def test_the_bytes_arrive_and_the_blocks_come_back(world: World) -> None:
    await hand_off(world)
    await hand_off(world, "r2/0")


@pytest.mark.parametrize("transport", [one for one in TRANSPORTS if one != "cuda_ipc"], indirect=True)
@pytest.mark.parametrize(
    ("theirs", "ours"), [((2, 1, 4), (1, 2, 2)), ((1, 2, 2), (2, 1, 4)), ((1, 1, 4), (2, 2, 4))]
)
async def test_two_sides_may_differ(
    world: World, tmp_path: Path, theirs: tuple[int, int, int], ours: tuple[int, int, int]
) -> None:
    tokens = 17
    with (
        ranks(tmp_path / "theirs", *theirs, tokens=tokens) as source,
        ranks(tmp_path / "wanted", *ours, tokens=tokens) as wanted,
        ranks(tmp_path / "ours", *ours) as target,
    ):
        handle = offered_by_ranks(source, "r1/0", tokens, owner="prefill-0", node="n0")
        world.prefill.offer_from(source, handle)
        world.decode.pools = target
        own = range(target.placement.layout.blocks_for(tokens))
        await world.decode.pull(handle, own)
        assert await world.prefill.released(handle.key) == "pulled"
        for rank in range(len(target.placement.shards)):
            for block in own:
                assert bytes(target.block(rank, block)) == bytes(wanted.block(rank, block))


async def test_many_at_once(world: World) -> None:
    draw = random.Random(5)
    sizes = [draw.randint(1, 16) for _ in range(16)]
    places = [tuple(range(sum(sizes[:at]), sum(sizes[: at + 1]))) for at in range(16)]
    sources = [tuple(draw.sample(range(64), size)) for size in sizes]

    async def one(at: int) -> None:
        handle = world.prefill.offer(f"r{at}/0", sources[at])
        await world.decode.pull(handle, places[at])
        assert await world.prefill.released(handle.key) == "pulled"

    async with asyncio.TaskGroup() as tasks:
        for at in range(16):
            tasks.create_task(one(at))
    for blocks, own in zip(sources, places, strict=True):
        world.assert_arrived(blocks, own)
    world.assert_idle()


async def test_a_pull_may_overtake_its_offer(world: World) -> None:
    handle = world.prefill.offer("warm-up/0", BLOCKS)
    world.prefill.send(kv.KvWithdraw(handle.key))
    await world.prefill.released(handle.key)
    pull = asyncio.create_task(world.decode.pull(handle, OWN))
    await asyncio.sleep(0)
    world.prefill.send(kv.KvOffer(handle))
    await pull
    world.assert_arrived(BLOCKS, OWN)


async def test_changed_bytes_are_found(world: World) -> None:
    handle = world.prefill.offer("r1/0", BLOCKS)
    world.prefill.pool.slot(BLOCKS[5])[17] ^= 1
    with pytest.raises(KvCorrupt):
        await world.decode.pull(handle, OWN)
    assert await world.prefill.released(handle.key) == "lost"
    await settle(world)
    world.assert_idle()
    await hand_off(world, "r2/0")


@pytest.mark.parametrize("layer", range(LAYOUT.layers))
async def test_a_layer_that_is_missing_is_found(world: World, layer: int) -> None:
    handle = world.prefill.offer("r1/0", BLOCKS)
    nbytes = LAYOUT.block_nbytes // LAYOUT.layers
    for block in BLOCKS:
        world.prefill.pool.slot(block)[layer * nbytes : (layer + 1) * nbytes] = bytes(nbytes)
    with pytest.raises(KvCorrupt):
        await world.decode.pull(handle, OWN)
    assert await world.prefill.released(handle.key) == "lost"
    await settle(world)
    world.assert_idle()


async def test_bytes_that_were_wrong_once_come_again(world: World) -> None:
    handle = world.prefill.offer("r1/0", BLOCKS)
    spoilt = world.prefill.pool.slot(BLOCKS[5])
    spoilt[17] ^= 1

    def mend() -> None:
        spoilt[17] ^= 1

    await world.decode.pull(handle, OWN, doubt=mend)
    world.assert_arrived(BLOCKS, OWN)
    assert await world.prefill.released(handle.key) == "pulled"
    await settle(world)
    world.assert_idle()


async def test_an_abort_in_mid_transfer_frees_everything(world: World) -> None:
    handle = await begin(world)
    world.decode.send(kv.KvAbort(handle.key))
    assert await world.prefill.released(handle.key) == "aborted"
    await settle(world)
    world.assert_idle()
    await hand_off(world, "r2/0")


async def test_a_withdrawal_waits_for_the_reader(world: World) -> None:
    handle = await begin(world)
    world.prefill.send(kv.KvWithdraw(handle.key))
    await world.prefill.hello()
    assert world.owners_relay.state.ledger.counts() == {"quarantined": 1}
    assert (await world.prefill.expect(kv.KvCancelled, key=handle.key)).result == "in_flight_quarantined"
    world.decode.send(kv.KvAbort(handle.key))
    assert await world.prefill.released(handle.key) == "withdrawn"
    assert (await world.decode.expect(kv.KvCancelled, key=handle.key)).result == "freed"


async def test_anybody_may_ask_what_is_held(world: World) -> None:
    handle = await begin(world)
    relay = world.owners_relay
    asker = Endpoint(relay.local, "somebody")
    asker.send(kv.KvList())
    listing = await asker.expect(kv.KvListing)
    asker.close()
    (info,) = listing.handles
    assert (info.key, info.owner, info.state) == (handle.key, "prefill-0", "pulling")
    assert (info.nbytes, info.tokens) == (handle.nbytes, handle.tokens)
    assert 0.0 < info.lease_left_s <= LEASE_S
    assert listing.streams == (relay.data is not None)
    world.decode.send(kv.KvAbort(handle.key))


async def test_a_lease_ends(transport: str, tmp_path: Path) -> None:
    async with running(transport, tmp_path, lease_s=0.1) as world:
        handle = world.prefill.offer("r1/0", BLOCKS)
        assert await world.prefill.released(handle.key) == "expired"
        world.assert_idle()


async def test_an_owner_that_vanishes_fails_the_pull(world: World, tmp_path: Path) -> None:
    handle = await begin(world)
    world.prefill.close()
    failed = await world.decode.expect(kv.KvFailed, key=handle.key)
    assert failed.error.code == "transfer_failed"
    address, gpus = world.owners_relay.local, world.prefill.gpus
    again = Prefill(address, "prefill-0", "n0", tmp_path, incarnation="2", gpus=gpus)
    world.prefill = again
    await again.hello()
    await world.decode.hello()
    await hand_off(world, "r2/0")


async def test_a_reader_that_vanishes_gives_the_blocks_back(world: World) -> None:
    handle = await begin(world)
    world.decode.close()
    assert await world.prefill.released(handle.key) == "lost"


async def test_a_restarted_relay_of_the_owner_serves_again(world: World) -> None:
    await hand_off(world)
    name = world.topology.relay_of("n0").name
    await world.end_relay(name)
    await world.start_relay(name)
    await world.prefill.hello()
    if len(world.relays) == 1:
        await world.decode.hello()
    await hand_off(world, "r2/0")


async def test_a_relay_that_goes_after_its_word_leaves_all_or_nothing(world: World) -> None:
    """Whoever was granted the KV gets it whole or is told that it does not come, and the relay serves on."""
    handle = world.prefill.offer("r1/0", BLOCKS)
    world.decode.send(kv.KvPull(handle))
    grant = await world.decode.expect(kv.KvGrant, key=handle.key)
    name = world.topology.relay_of("n0").name
    await world.end_relay(name)
    try:
        await world.decode.fetch(handle, grant, OWN)
    except TransferFailed:
        assert grant.ticket is not None
        assert not grant.ticket.meeting, "what instances send each other needs no relay any more"
    else:
        world.assert_arrived(BLOCKS, OWN)
    await world.start_relay(name)
    await settle(world)
    await hand_off(world, "r2/0")


async def test_another_version_is_refused(world: World) -> None:
    stranger = Endpoint(world.owners_relay.local, "stranger")
    stranger.send(kv.KvHello(PROTOCOL + 1, "stranger", "1"))
    refused = await stranger.expect(kv.KvRefused)
    stranger.close()
    assert refused.error.code == "version_mismatch"


async def test_the_router_hears_what_is_held(world: World) -> None:
    handle = world.prefill.offer("r1/0", BLOCKS)
    await world.prefill.hello()
    name = world.topology.relay_of("n0").name
    assert (await world.router.load(name)).handles == {"ready": 1}
    world.prefill.send(kv.KvWithdraw(handle.key))
    await world.prefill.released(handle.key)
    assert (await world.router.load(name)).handles == {}


async def test_garbage_on_every_socket_harms_nobody(world: World) -> None:
    handle = await begin(world)
    endpoints = [world.owners_relay.local]
    if world.owners_relay.data is not None:
        endpoints.append(world.owners_relay.data)
    draw = random.Random(7)
    sockets = [ConnectedSocket(endpoint, f"prefill-0\x7f{at}") for at, endpoint in enumerate(endpoints)]
    for socket in sockets:
        socket.start(lambda identity, frames: None)
        for frames in (
            [b""],
            [draw.randbytes(40)],
            [b"\xc1" * 9, b"x", b"y"],
            [encode(kv.KvPong()), b"a frame too many"],
            [encode(kv.KvGrant(handle.key))],
            [encode(kv.KvFetchGranted(handle.key, kv.Ticket(b"t" * 16))), draw.randbytes(256)],
            [b"\xdf\xff\xff\xff\xff"],
        ):
            socket.send("", frames)
    await world.owners_relay.refuses(7 * len(sockets))
    for socket in sockets:
        socket.close()
    world.decode.send(kv.KvAbort(handle.key))
    assert await world.prefill.released(handle.key) == "aborted"
    await settle(world)
    await hand_off(world, "r2/0")
