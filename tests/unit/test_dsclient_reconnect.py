"""Lost routers, restarted routers, cut paths: what a client makes of them, on real sockets."""

from __future__ import annotations

import asyncio

import pytest

from dsclient import AsyncClient
from dsclient.errors import RouterLost
from dswire.messages.client import Attach, Submit
from support.cuttable import CuttablePath
from support.rebind import rebind
from support.scripted_router import ScriptedRouter, events

#: a lease, in seconds, that a test can wait for
SHORT_S = 0.3
#: one that a busy machine keeps, with pings often enough to notice a router that was exchanged
BRISK_S = 1.5


async def test_the_lease_is_kept_from_its_first_moment() -> None:
    async with ScriptedRouter(lease_s=3.0) as router, AsyncClient(router.address, timeout_s=30):
        await router.until(lambda: router.pings > 1)
        assert len(router.hellos) == 1


async def test_connection_that_breaks_is_taken_up_under_the_same_identity() -> None:
    async with ScriptedRouter(lease_s=BRISK_S) as router, AsyncClient(router.address, timeout_s=30) as client:
        stream = client.stream("hi", request_id="r")
        await router.expect(Submit)
        router.send(*events("r", "a", "b")[:2])
        assert (await anext(stream)).text == "a"
        router.close()
        async with await rebind(lambda: ScriptedRouter(router.address, forgetful=True)) as back:
            attach = await back.expect(Attach)
            assert (attach, back.peer) == (Attach("r", 2), client.identity)
            back.answer("r", "a", "b", start=2)
            assert [event.text async for event in stream] == ["b"]
            assert (await stream.result()).text == "ab"


async def test_a_path_that_breaks_and_heals_unnoticed_costs_no_event() -> None:
    """The last events are lost with the connection, and neither side is told."""
    async with (
        ScriptedRouter(lease_s=BRISK_S) as router,
        CuttablePath(int(router.address.rpartition(":")[2])) as path,
        AsyncClient(path.address, timeout_s=30) as client,
    ):
        stream = client.stream("hi", request_id="r")
        await router.expect(Submit)
        router.send(*events("r", "a", "b")[:2])
        assert (await anext(stream)).text == "a"
        path.swallow = True
        router.keep(*events("r", "a", "b"))
        router.answer("r", "a", "b", start=2)
        path.cut()
        path.swallow = False
        assert [event.text async for event in stream] == ["b"]
        assert (await stream.result()).text == "ab"
        assert len(router.hellos) == 1


async def test_silence_is_bridged_by_attaching() -> None:
    async with ScriptedRouter(lease_s=SHORT_S) as silent, AsyncClient(silent.address, timeout_s=30) as client:
        stream = client.stream("hi", request_id="r")
        await silent.expect(Submit)
        silent.send(*events("r", "a", "b")[:2])
        await anext(stream)
        silent.mute = True
        await silent.until(lambda: silent.ignored_hellos > 0)
        silent.mute = False
        await silent.until(lambda: len(silent.hellos) > 1)
        assert await silent.expect(Attach) == Attach("r", 2)
        silent.answer("r", "a", "b", start=2)
        assert (await stream.result()).text == "ab"


async def test_a_router_that_never_speaks_again_is_lost() -> None:
    async with ScriptedRouter(lease_s=SHORT_S) as dying, AsyncClient(dying.address, timeout_s=SHORT_S) as client:
        stream = client.stream("hi", request_id="r")
        await dying.expect(Submit)
        dying.send(*events("r", "a")[:2])
        assert (await anext(stream)).text == "a"
        dying.close()
        with pytest.raises(RouterLost, match="did not answer"):
            await anext(stream)


async def test_a_restarted_router_has_lost_the_request() -> None:
    async with ScriptedRouter(lease_s=BRISK_S) as router, AsyncClient(router.address, timeout_s=30) as client:
        stream = client.stream("hi", request_id="r")
        await router.expect(Submit)
        router.send(*events("r", "a")[:2])
        assert (await anext(stream)).text == "a"
        router.close()
        async with await rebind(lambda: ScriptedRouter(router.address, incarnation="two", forgetful=True)):
            with pytest.raises(RouterLost, match="restarted"):
                await anext(stream)


async def test_a_request_the_restarted_router_never_heard_of_is_sent_to_it() -> None:
    async with ScriptedRouter(lease_s=BRISK_S) as router, AsyncClient(router.address, timeout_s=30) as client:
        task = asyncio.create_task(client.generate("hi", request_id="r"))
        await router.expect(Submit)
        router.close()
        async with await rebind(lambda: ScriptedRouter(router.address, incarnation="two", forgetful=True)) as back:
            await back.expect(Submit)
            back.answer("r", "a")
            assert (await task).text == "a"
