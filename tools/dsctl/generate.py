"""``dsctl generate``: one prompt, one answer."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsctl.asking import Target, find_target, printable, sampling_fields, sampling_options, target_options
from dswire.errors import InvalidRequest

if TYPE_CHECKING:
    from dsclient import AsyncClient, Completion, Stream


@click.command()
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="The prompt is a user's message: apply the model's chat template.")
@click.option("--system", help="System message, with --chat.")
@click.option("--ids", help="The prompt as token ids, separated by commas, instead of text.")
@target_options
@sampling_options
@click.option("-n", "n", type=int, help="Answers to the same prompt.")
@click.option("--logprobs", type=int, help="With --json: log-probabilities, of this many likeliest tokens too.")
@click.option("--deadline", "deadline_s", type=float, help="Give up after this many seconds.")
@click.option("--stream/--no-stream", default=True, show_default=True, help="Print as it comes.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as one line of JSON.")
@click.option("--ledger", is_flag=True, help="Tell on stderr where the time went.")
def command(
    prompt: str | None,
    chat: bool,
    system: str | None,
    ids: str | None,
    file: Path | None,
    address: str | None,
    keys: Path | None,
    timeout_s: float,
    deadline_s: float | None,
    stream: bool,
    as_json: bool,
    ledger: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT and print the answer as it comes. "-" reads the prompt from stdin. Ctrl-C cancels.

    \b
    dsctl generate "The capital of France is" --max-tokens 16 --temperature 0
    dsctl generate --chat "Why is the sky blue?" --ledger
    dsctl generate - --json < prompt.txt
    """
    asked = _prompt(prompt, ids, chat=chat, system=system)
    target = find_target(file, address, keys)
    fields = {**asked, **sampling_fields(sampling), "deadline_s": deadline_s}
    live = stream and not as_json and sampling["n"] in (None, 1)
    completion = asyncio.run(_run(target, timeout_s, fields, live=live))
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(completion).decode())
    elif not live:
        _print_choices(completion)
    if ledger:
        from dsctl.ledger import print_ledger

        print_ledger(completion)


def _prompt(prompt: str | None, ids: str | None, *, chat: bool, system: str | None) -> dict[str, Any]:
    """The arguments that say what to answer."""
    if (prompt is None) == (ids is None):
        wrong = "there is neither PROMPT nor --ids" if ids is None else "PROMPT and --ids exclude each other"
        raise InvalidRequest(wrong, remedy="give one of the two; `dsctl generate --help` tells more")
    if system is not None and not chat:
        raise InvalidRequest("--system goes with --chat only", remedy="add --chat")
    if ids is not None:
        try:
            return {"prompt_ids": [int(token) for token in ids.split(",")]}
        except ValueError as error:
            raise InvalidRequest(f"--ids {ids!r}: not token ids separated by commas") from error
    text = _stdin() if prompt == "-" else prompt
    if not chat:
        return {"prompt": text}
    turns = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*turns, {"role": "user", "content": text}]}


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"standard input is no UTF-8 text: {error.reason} at byte {error.start}", remedy="convert it to UTF-8"
        ) from error


async def _run(target: Target, timeout_s: float, fields: dict[str, Any], *, live: bool) -> Completion:
    from dsclient import AsyncClient

    async with AsyncClient(target.address, keys=target.keys, timeout_s=timeout_s) as client:
        stream = _start(client, fields)
        if live:
            await _print_stream(stream)
        return await stream.result()


def _start(client: AsyncClient, fields: dict[str, Any]) -> Stream:
    return client.stream_chat(**fields) if "messages" in fields else client.stream(**fields)


async def _print_stream(stream: Stream) -> None:
    clean = printable if sys.stdout.isatty() else str
    last = ""
    try:
        async for event in stream:
            if event.text:
                last = event.text
                click.echo(clean(last), nl=False)
                sys.stdout.flush()
    finally:
        if last and not last.endswith("\n"):
            click.echo()


def _print_choices(completion: Completion) -> None:
    clean = printable if sys.stdout.isatty() else str
    for number, choice in enumerate(completion.choices):
        if len(completion.choices) > 1:
            click.secho(f"--- {number} ---", dim=True)
        click.echo(clean(choice.text), nl=not choice.text.endswith("\n"))
