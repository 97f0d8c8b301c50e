"""``dsctl generate`` and ``dsctl chat`` against a router that does what the test says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dsclient import DEFAULT_ADDRESS, Choice, Completion, Ledger, Usage
from dsctl.__main__ import run
from dsctl.asking import find_target, printable
from dsctl.ledger import print_ledger, stages, table
from dswire.errors import InvalidRequest, Overloaded, TopologyError
from dswire.messages.client import Cancel, ChatMessage, ClientBye, Submit
from support.scripted_router import ScriptedRouter, events, failed

TOPOLOGY = "model: toy\nrouter: {frontend: 'tcp://127.0.0.1:5999'}\n"


@pytest.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    async with ScriptedRouter() as one:
        yield one


@asynccontextmanager
async def dsctl(*arguments: str) -> AsyncIterator[Process]:
    """A real ``dsctl`` process with pipes; killed if the test leaves it running."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dsctl", *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def call(*arguments: str) -> int:
    """``dsctl`` in a thread of this process; its output goes to capsys."""
    return await asyncio.to_thread(run, arguments)


async def test_the_answer_alone_is_on_stdout(router: ScriptedRouter, capsys: pytest.CaptureFixture[str]) -> None:
    task = asyncio.create_task(
        call(
            "generate",
            "--address",
            router.address,
            "Hi",
            "--max-tokens",
            "3",
            "--stop",
            "a",
            "--stop",
            "b",
            "--ledger",
        )
    )
    submit = await router.expect(Submit)
    assert submit.prompt == "Hi"
    assert (submit.sampling.max_tokens, submit.sampling.stop, submit.sampling.temperature) == (3, ("a", "b"), 0.2)
    router.answer(submit.request_id, "one ", "two")
    assert await task == 0
    shown = capsys.readouterr()
    assert shown.out == "one two\n"
    assert "first token (TTFT)" in shown.err
    assert "3 prompt tokens, 2 made" in shown.err
    await router.expect(ClientBye)


async def test_chat_flag_applies_the_template(router: ScriptedRouter, capsys: pytest.CaptureFixture[str]) -> None:
    task = asyncio.create_task(
        call("generate", "--address", router.address, "--chat", "Hi", "--system", "Be brief.")
    )
    submit = await router.expect(Submit)
    assert submit.chat == (ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"))
    router.answer(submit.request_id, "Hello.\n")
    assert await task == 0
    assert capsys.readouterr().out == "Hello.\n"


async def test_json_is_one_line_with_everything(router: ScriptedRouter, capsys: pytest.CaptureFixture[str]) -> None:
    task = asyncio.create_task(call("generate", "--address", router.address, "--ids", "1,2", "--json"))
    submit = await router.expect(Submit)
    assert submit.prompt_ids == (1, 2)
    router.answer(submit.request_id, "one ", "two")
    assert await task == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["choices"][0]["text"] == "one two"
    assert told["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}


async def test_a_refused_request_tells_remedy_and_exit_status(
    router: ScriptedRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    task = asyncio.create_task(call("generate", "--address", router.address, "Hi"))
    submit = await router.expect(Submit)
    router.send(failed(submit.request_id, 0, Overloaded("the router is full")))
    assert await task == Overloaded.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error[overloaded]: the router is full" in shown.err
    assert "try again later" in shown.err


async def test_a_prompt_from_stdin_and_ctrl_c(router: ScriptedRouter) -> None:
    async with dsctl("generate", "--address", router.address, "-") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"from a pipe")
        process.stdin.close()
        submit = await router.expect(Submit)
        assert submit.prompt == "from a pipe"
        router.send(*events(submit.request_id, "begun", "never")[:2])
        assert await process.stdout.readexactly(5) == b"begun"
        process.send_signal(signal.SIGINT)
        assert await router.expect(Cancel) == Cancel(submit.request_id)
        assert await process.wait() == 130


async def answer(router: ScriptedRouter, *texts: str) -> tuple[ChatMessage, ...]:
    """Answer the next request; returns the conversation it came with."""
    submit = await router.expect(Submit)
    router.answer(submit.request_id, *texts)
    assert submit.chat is not None
    return submit.chat


async def test_chat_keeps_the_conversation_until_reset(router: ScriptedRouter) -> None:
    async with dsctl("chat", "--address", router.address, "--system", "Be kind.") as process:
        assert process.stdin is not None
        told = ChatMessage("system", "Be kind.")
        process.stdin.write(b"one\n")
        assert await answer(router, "first") == (told, ChatMessage("user", "one"))
        process.stdin.write(b"\n/help\ntwo\n")
        turns = (ChatMessage("user", "one"), ChatMessage("assistant", "first"), ChatMessage("user", "two"))
        assert await answer(router, "sec", "ond") == (told, *turns)
        process.stdin.write(b"/reset\nthree\n")
        assert await answer(router, "third") == (told, ChatMessage("user", "three"))
        process.stdin.write(b"/system Be rude.\nfour\n")
        assert await answer(router, "fourth") == (ChatMessage("system", "Be rude."), ChatMessage("user", "four"))
        out, err = await process.communicate(b"/quit\n")
        assert process.returncode == 0
        assert err == b""
        assert b"second\n2 tokens" in out


async def test_chat_survives_ctrl_c_and_errors(router: ScriptedRouter) -> None:
    async with dsctl("chat", "--address", router.address) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        submit = await router.expect(Submit)
        router.send(*events(submit.request_id, "begun", "never")[:2])
        assert await process.stdout.readexactly(5) == b"begun"
        process.send_signal(signal.SIGINT)
        await router.expect(Cancel)
        process.stdin.write(b"two\n")
        submit = await router.expect(Submit)
        assert submit.chat is not None
        assert [turn.content for turn in submit.chat] == ["one", "begun", "two"]
        router.send(failed(submit.request_id, 0, Overloaded("the router is full")))
        process.stdin.write(b"three\n")
        turns = await answer(router, "well")
        assert [turn.content for turn in turns] == ["one", "begun", "three"]
        out, err = await process.communicate(b"/quit\n")
        assert process.returncode == 0
        assert b"(cancelled)" in out
        assert b"error[overloaded]: the router is full" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "there is neither PROMPT nor --ids"),
        (["Hi", "--ids", "1"], "PROMPT and --ids exclude each other"),
        (["Hi", "--address", "127.0.0.1:5555"], "write tcp://HOST:PORT"),
        (["--ids", "1,two"], "not token ids"),
        (["Hi", "--system", "x"], "--system goes with --chat"),
        (["Hi", "--address", "tcp://a:1", "-f", "t.yaml"], "exclude each other"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", *arguments]) == InvalidRequest.exit_code
    assert told in capsys.readouterr().err


async def test_a_prompt_that_is_no_text_is_told_by_its_place() -> None:
    async with dsctl("generate", "-", "--address", "tcp://127.0.0.1:1") as process:
        out, err = await process.communicate(b"caf\xe9 au lait")
        assert (process.returncode, out) == (InvalidRequest.exit_code, b"")
        assert b"standard input is no UTF-8 text: invalid continuation byte at byte 3" in err


def test_nobody_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"ipc://{tmp_path}/nobody"
    assert run(["generate", "Hi", "--address", address, "--timeout", "0.05"]) == 5
    assert "did not answer within 0.05 s" in capsys.readouterr().err


def test_the_router_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DS_TOPOLOGY", raising=False)
    assert find_target(None, None, None).address == DEFAULT_ADDRESS
    assert find_target(None, "tcp://elsewhere:1", None).address == "tcp://elsewhere:1"
    (tmp_path / "topology.yaml").write_text(TOPOLOGY)
    assert find_target(None, None, None).address == "tcp://127.0.0.1:5999"
    named = tmp_path / "named.yaml"
    named.write_text(TOPOLOGY.replace("5999", "5998"))
    assert find_target(named, None, None).address == "tcp://127.0.0.1:5998"
    monkeypatch.setenv("DS_TOPOLOGY", str(named))
    assert find_target(None, None, None).address == "tcp://127.0.0.1:5998"
    named.write_text("model: 5\n")
    with pytest.raises(TopologyError):
        find_target(None, None, None)


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("plain, ünïcode 🦊\n\tand layout") == "plain, ünïcode 🦊\n\tand layout"
    assert printable("\x1b[2Jgone\r\x07") == "\ufffd[2Jgone\ufffd\ufffd"


def test_the_ledger_has_a_row_for_every_stage() -> None:
    ledger = Ledger(prefill_s=0.25, decode_s=0.25, ttft_s=0.25, total_s=0.5)
    completion = Completion("r", (Choice("a", (1,), (), "stop"),), Usage(1, 1), ledger, 0.26, 0.51)
    assert sum(stages(ledger).values()) == ledger.total_s
    # TTFT, total and the client's own times are rows too; what lost attempts cost is told only when there were some
    assert table(completion).row_count == len(stages(ledger)) - 2 + 3


def test_the_ledger_of_several_answers_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    one = Choice("a", (1,), (), "stop")
    for choices in ((one,), (one, one)):
        print_ledger(Completion("r", choices, Usage(1, 1), Ledger(total_s=0.5), 0.26, 0.51))
        assert ("of the answer that ended last" in capsys.readouterr().err) == (len(choices) > 1)


def test_commands_import_nothing_heavy() -> None:
    code = "import sys, dsctl.generate, dsctl.chat, dsctl.keys; sys.exit(bool({'zmq', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
