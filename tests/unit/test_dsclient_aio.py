"""The asyncio client on a real socket, against a router that does what the test says."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from dsclient import AsyncClient, Output, Stream
from dsclient.errors import (
    Cancelled,
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    RouterLost,
    StartFailed,
    UnknownRequest,
    VersionMismatch,
)
from dswire.messages.client import Attach, Cancel, ClientBye, StatusQuery, StatusReport, Submit, TokenLogprob
from support.scripted_router import ScriptedRouter, events, failed

Leave = Callable[[Stream], Awaitable[None]]


@pytest.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    async with ScriptedRouter() as one:
        yield one


@pytest.fixture
async def client(router: ScriptedRouter) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.address, timeout_s=30) as one:
        yield one


async def test_hello_tells_who_calls_and_the_welcome_who_answers(router: ScriptedRouter) -> None:
    async with AsyncClient(router.address) as client:
        assert await client.connect() == router.welcome
    assert [hello.agent.partition("/")[0] for hello in router.hellos] == ["dsclient-python"]
    assert router.peer == client.identity
    assert len(bytes.fromhex(client.identity.removeprefix("c-"))) == 16
    await router.expect(ClientBye)


async def test_generate_collects_the_whole_answer(router: ScriptedRouter, client: AsyncClient) -> None:
    task = asyncio.create_task(client.generate("hi", max_tokens=2, temperature=0, stop="END", deadline_s=30))
    submit = await router.expect(Submit)
    assert (submit.prompt, submit.sampling.max_tokens, submit.sampling.stop) == ("hi", 2, ("END",))
    assert submit.deadline_s == 30
    router.answer(submit.request_id, "a", "b")
    completion = await task
    assert completion.text == "ab"
    assert completion.choices[0].token_ids == (1, 2)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens == 2
    assert completion.ledger.total_s == 0.2
    assert 0 < completion.ttft_s <= completion.total_s


async def test_choices_come_apart_with_their_logprobs(router: ScriptedRouter, client: AsyncClient) -> None:
    task = asyncio.create_task(client.chat([{"role": "user", "content": "hi"}], n=2, logprobs=0))
    submit = await router.expect(Submit)
    assert submit.chat is not None
    request_id = submit.request_id
    accepted, *_, finished = events(request_id, "x")
    told = TokenLogprob(7, "a", -0.5)
    outputs = [
        Output(request_id, 1, 1, (8,), "b"),
        Output(request_id, 2, 0, (7,), "a", (told,), "stop"),
        Output(request_id, 3, 1, (9,), "c", (), "length"),
    ]
    router.send(accepted, *outputs, replace(finished, number=4))
    first, second = (await task).choices
    assert (first.text, first.logprobs, first.finish_reason) == ("a", (told,), "stop")
    assert (second.text, second.token_ids, second.finish_reason) == ("bc", (8, 9), "length")


async def test_stream_yields_events_and_then_the_result(router: ScriptedRouter, client: AsyncClient) -> None:
    stream = client.stream(prompt_ids=[1, 2, 3])
    submit = await router.expect(Submit)
    assert submit.prompt_ids == (1, 2, 3)
    router.answer(submit.request_id, "a", "b", "c")
    assert [event.text async for event in stream] == ["a", "b", "c"]
    assert stream.prompt_tokens == 3
    assert (await stream.result()).text == "abc"
    assert [event async for event in stream] == []


async def test_requests_run_side_by_side(router: ScriptedRouter, client: AsyncClient) -> None:
    tasks = [asyncio.create_task(client.generate(f"prompt {number}")) for number in range(20)]
    submits = [await router.expect(Submit) for _ in tasks]
    for submit in reversed(submits):
        assert submit.prompt is not None
        router.answer(submit.request_id, submit.prompt)
    assert [(await task).text for task in tasks] == [f"prompt {number}" for number in range(20)]


async def break_off(stream: Stream) -> None:
    async for _ in stream:
        break


async def raise_inside(stream: Stream) -> None:
    try:
        async for _ in stream:
            raise ZeroDivisionError
    except ZeroDivisionError:
        return


async def close_early(stream: Stream) -> None:
    await anext(stream)
    await stream.aclose()


async def leave_the_context(stream: Stream) -> None:
    async with stream:
        await anext(stream)


async def cancel_the_reader(stream: Stream) -> None:
    seen = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            seen.set()

    task = asyncio.create_task(read())
    await seen.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [break_off, raise_inside, close_early, leave_the_context, cancel_the_reader])
async def test_leaving_early_cancels(router: ScriptedRouter, client: AsyncClient, leave: Leave) -> None:
    stream = client.stream("hi")
    submit = await router.expect(Submit)
    router.send(*events(submit.request_id, "a", "b", "c")[:2])
    await leave(stream)
    assert await router.expect(Cancel) == Cancel(submit.request_id)
    with pytest.raises(Cancelled):
        await stream.result()


async def test_cancelled_generate_cancels(router: ScriptedRouter, client: AsyncClient) -> None:
    task = asyncio.create_task(client.generate("hi"))
    submit = await router.expect(Submit)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await router.expect(Cancel) == Cancel(submit.request_id)


async def test_waiting_for_one_event_with_a_timeout_cancels_nothing(
    router: ScriptedRouter, client: AsyncClient
) -> None:
    stream = client.stream("hi")
    submit = await router.expect(Submit)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.01)
    router.answer(submit.request_id, "a")
    assert (await anext(stream)).text == "a"
    assert (await stream.result()).text == "a"


async def test_cancel_by_id_ends_the_stream_with_the_routers_word(
    router: ScriptedRouter, client: AsyncClient
) -> None:
    stream = client.stream("hi", request_id="mine")
    await router.expect(Submit)
    await client.cancel("mine")
    assert await router.expect(Cancel) == Cancel("mine")
    router.send(failed("mine", 0, Cancelled("request mine was cancelled by its client")))
    with pytest.raises(Cancelled, match="by its client"):
        await stream.result()
    with pytest.raises(Cancelled, match="by its client"):
        await anext(stream)


async def test_failures_are_typed_with_their_remedy(router: ScriptedRouter, client: AsyncClient) -> None:
    task = asyncio.create_task(client.generate("hi"))
    submit = await router.expect(Submit)
    router.send(failed(submit.request_id, 0, Overloaded("full", remedy="wait a little")))
    with pytest.raises(Overloaded, match="full") as caught:
        await task
    assert caught.value.remedy == "wait a little"
    assert caught.value.retryable


async def test_status(router: ScriptedRouter, client: AsyncClient) -> None:
    task = asyncio.create_task(client.status())
    await router.expect(StatusQuery)
    report = StatusReport("router-0", "one", "toy", 1.5, (), {"decoding": 1}, {"finished": 2})
    router.send(report)
    assert await task == report


async def test_a_gap_is_repaired(router: ScriptedRouter, client: AsyncClient) -> None:
    stream = client.stream("hi")
    submit = await router.expect(Submit)
    whole = events(submit.request_id, "a", "b", "c")
    router.send(whole[0], whole[1], whole[3])
    assert await router.expect(Attach) == Attach(submit.request_id, 2)
    router.send(*whole[2:])
    assert [event.text async for event in stream] == ["a", "b", "c"]


async def test_attach_reads_a_request_of_an_earlier_life(router: ScriptedRouter) -> None:
    async with AsyncClient(router.address, identity="c-me") as client:
        stream = client.attach("r")
        assert await router.expect(Attach) == Attach("r", 0)
        assert router.peer == "c-me"
        router.answer("r", "a", "b")
        assert (await stream.result()).text == "ab"
        lost = client.attach("gone")
        await router.expect(Attach)
        router.send(failed("gone", 0, UnknownRequest("no request 'gone'")))
        with pytest.raises(UnknownRequest):
            await lost.result()


async def test_nobody_there_is_router_lost(tmp_path: Path) -> None:
    client = AsyncClient(f"ipc://{tmp_path}/nobody", timeout_s=0.05)
    with pytest.raises(RouterLost):
        await client.generate("hi")
    with pytest.raises(RouterLost, match="nobody"):
        await client.status()
    await client.close()


async def test_a_failed_entry_closes_the_client(tmp_path: Path) -> None:
    client = AsyncClient(f"ipc://{tmp_path}/nobody", timeout_s=0.05)
    with pytest.raises(RouterLost):
        await client.__aenter__()
    with pytest.raises(InvalidRequest, match="closed"):
        await client.status()


async def test_a_finished_request_is_not_held_on_to(router: ScriptedRouter, client: AsyncClient) -> None:
    stream = client.stream("hi")
    submit = await router.expect(Submit)
    router.answer(submit.request_id, "a")
    await stream.result()
    seen = weakref.ref(stream)
    del stream
    gc.collect()
    assert seen() is None


async def test_another_protocol_is_refused() -> None:
    async with ScriptedRouter(protocol=99) as router:
        client = AsyncClient(router.address)
        with pytest.raises(VersionMismatch, match="99"):
            await client.connect()
        await client.close()


@pytest.mark.parametrize("frames", [(b"\xc1",), (b"",), (b"\x80",), (b"\x81\xa4type\xa3Odd",), (b"\x80", b"more")])
async def test_garbage_from_the_router_is_a_protocol_error(
    router: ScriptedRouter, client: AsyncClient, frames: tuple[bytes, ...]
) -> None:
    task = asyncio.create_task(client.generate("hi"))
    await router.expect(Submit)
    router.send_bytes(*frames)
    with pytest.raises(ProtocolError):
        await task
    assert isinstance(await router.expect(Cancel), Cancel)


async def test_close_ends_open_requests_and_refuses_new_ones(router: ScriptedRouter) -> None:
    client = AsyncClient(router.address)
    stream = client.stream("hi")
    await router.expect(Submit)
    await client.close()
    await client.close()
    with pytest.raises(Cancelled, match="closed"):
        await stream.result()
    with pytest.raises(InvalidRequest, match="closed"):
        client.stream("hi")


async def test_an_id_still_open_here_is_refused(router: ScriptedRouter, client: AsyncClient) -> None:
    client.stream("hi", request_id="r")
    with pytest.raises(DuplicateRequest):
        client.stream("hi", request_id="r")


async def test_an_address_that_is_none() -> None:
    with pytest.raises(StartFailed, match="nonsense"):
        await AsyncClient("nonsense").connect()


def test_a_client_keeps_to_its_loop(tmp_path: Path) -> None:
    client = AsyncClient(f"ipc://{tmp_path}/nobody", timeout_s=0.05)

    async def use() -> None:
        with pytest.raises(RouterLost):
            await client.status()

    async def close() -> None:
        with pytest.raises(InvalidRequest, match="another event loop"):
            await client.status()
        await client.close()

    asyncio.run(use())
    asyncio.run(close())
