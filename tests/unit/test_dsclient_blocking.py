"""The blocking client, against a scripted router in the test's own loop."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsclient import BlockingStream, Client
from dsclient.errors import Cancelled, InvalidRequest, RouterLost
from dswire.messages.client import Attach, Cancel, ClientBye, StatusQuery, StatusReport, Submit
from support.scripted_router import ScriptedRouter, events, failed


@pytest.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    async with ScriptedRouter() as one:
        yield one


@pytest.fixture
async def client(router: ScriptedRouter) -> AsyncIterator[Client]:
    one = Client(router.address, timeout_s=30)
    yield one
    await asyncio.to_thread(one.close)


async def test_generate_and_chat(router: ScriptedRouter, client: Client) -> None:
    for call in (lambda: client.generate("hi"), lambda: client.chat([{"role": "user", "content": "hi"}])):
        task = asyncio.create_task(asyncio.to_thread(call))
        submit = await router.expect(Submit)
        router.answer(submit.request_id, "a", "b")
        assert (await task).text == "ab"


async def test_stream_and_its_result(router: ScriptedRouter, client: Client) -> None:
    def read() -> tuple[list[str], str]:
        stream = client.stream("hi")
        return [event.text for event in stream], stream.result().text

    task = asyncio.create_task(asyncio.to_thread(read))
    submit = await router.expect(Submit)
    router.answer(submit.request_id, "a", "b")
    assert await task == (["a", "b"], "ab")


def break_off(stream: BlockingStream) -> None:
    for _ in stream:
        break


def raise_inside(stream: BlockingStream) -> None:
    try:
        for _ in stream:
            raise ZeroDivisionError
    except ZeroDivisionError:
        return


def leave_the_context(stream: BlockingStream) -> None:
    with stream:
        next(stream)


@pytest.mark.parametrize("leave", [break_off, raise_inside, leave_the_context])
async def test_leaving_early_cancels(
    router: ScriptedRouter, client: Client, leave: Callable[[BlockingStream], None]
) -> None:
    def read() -> None:
        stream = client.stream_chat([{"role": "user", "content": "hi"}])
        leave(stream)
        with pytest.raises(Cancelled):
            stream.result()

    task = asyncio.create_task(asyncio.to_thread(read))
    submit = await router.expect(Submit)
    router.send(*events(submit.request_id, "a", "b")[:2])
    await task
    assert await router.expect(Cancel) == Cancel(submit.request_id)


async def test_cancel_from_another_thread(router: ScriptedRouter, client: Client) -> None:
    task = asyncio.create_task(asyncio.to_thread(client.generate, "hi", request_id="r"))
    await router.expect(Submit)
    await asyncio.to_thread(client.cancel, "r")
    await router.expect(Cancel)
    router.send(failed("r", 0, Cancelled("by its client")))
    with pytest.raises(Cancelled):
        await task


async def test_attach_and_status(router: ScriptedRouter, client: Client) -> None:
    task = asyncio.create_task(asyncio.to_thread(lambda: client.attach("r").result().text))
    assert await router.expect(Attach) == Attach("r", 0)
    router.answer("r", "a")
    assert await task == "a"
    report = StatusReport("router-0", "one", "toy", 1.0, (), {}, {})
    asked = asyncio.create_task(asyncio.to_thread(client.status))
    await router.expect(StatusQuery)
    router.send(report)
    assert await asked == report


async def test_close_ends_calls_of_other_threads_and_says_bye(router: ScriptedRouter) -> None:
    client = Client(router.address)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(client.generate, "hi") for _ in range(4)]
        for _ in calls:
            await router.expect(Submit)
        await asyncio.to_thread(client.close)
        for call in calls:
            with pytest.raises(Cancelled, match="closed"):
                call.result(timeout=30)
    await router.expect(ClientBye)
    client.close()
    with pytest.raises(InvalidRequest, match="closed"):
        client.status()
    assert not any(thread.name == "dsclient" for thread in threading.enumerate())


def test_a_failed_entry_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(RouterLost), Client(f"ipc://{tmp_path}/nobody", timeout_s=0.05):
        raise AssertionError("nobody answers there")
    assert not any(thread.name == "dsclient" for thread in threading.enumerate())


def test_an_interrupt_cancels_the_request() -> None:
    """SIGINT reaches the main thread while it waits; the router runs in another."""
    found: list[Cancel] = []

    async def serve(address: asyncio.Future[str], loop: asyncio.AbstractEventLoop) -> None:
        async with ScriptedRouter() as router:
            loop.call_soon_threadsafe(address.set_result, router.address)
            submit = await router.expect(Submit)
            router.send(*events(submit.request_id, "a")[:1])
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            found.append(await router.expect(Cancel))

    async def start() -> tuple[str, threading.Thread]:
        loop = asyncio.get_running_loop()
        address: asyncio.Future[str] = loop.create_future()
        thread = threading.Thread(target=lambda: asyncio.run(serve(address, loop)))
        thread.start()
        return await address, thread

    address, thread = asyncio.run(start())
    with Client(address) as client, pytest.raises(KeyboardInterrupt):
        client.generate("hi", request_id="r")
    thread.join(60)
    assert found == [Cancel("r")]
