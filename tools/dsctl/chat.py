"""``dsctl chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsctl.asking import find_target, printable, sampling_fields, sampling_options, target_options
from dswire.errors import DsError, PromptTooLong

if TYPE_CHECKING:
    from dsclient import BlockingStream, Client, Completion
    from dsclient.request import SamplingFields

_HELP = """/reset   forget the conversation so far
/system TEXT   set what the model is told first, and begin anew
/quit    leave (so does Ctrl-D)
Ctrl-C while the model answers cancels the answer."""


@click.command()
@target_options
@click.option("--system", help="What the model is told before the conversation.")
@sampling_options
def command(
    file: Path | None,
    address: str | None,
    keys: Path | None,
    timeout_s: float,
    system: str | None,
    **sampling: Any,
) -> None:
    """Talk to the model. The answer is printed as it comes; Ctrl-C cancels it, Ctrl-D leaves.

    \b
    dsctl chat --system "Answer briefly." --temperature 0.7
    """
    from dsclient import Client

    target = find_target(file, address, keys)
    with Client(target.address, keys=target.keys, timeout_s=timeout_s) as client:
        welcome = client.connect()
        if sys.stdin.isatty():
            click.secho(f"{welcome.model} at {target.address}; /help tells the commands", dim=True)
        Conversation(client, sampling_fields(sampling), system).run()


class Conversation:
    """The turns so far, and the loop that adds to them."""

    def __init__(self, client: Client, fields: SamplingFields, system: str | None) -> None:
        self._client = client
        self._fields = fields
        self._system = system
        #: user and assistant by turns; never ends with an unanswered user
        self._turns: list[dict[str, str]] = []

    def run(self) -> None:
        """Read and answer until the end of input."""
        while (line := _read()) is not None:
            word, _, rest = line.strip().partition(" ")
            if word in ("/quit", "/exit"):
                return
            if word == "/reset":
                self._turns.clear()
                click.secho("(a new conversation)", dim=True)
            elif word == "/system":
                self._system = rest or None
                self._turns.clear()
                click.secho("(a new conversation)", dim=True)
            elif word.startswith("/"):
                click.secho(_HELP, dim=True)
            elif word:
                self._answer(line)

    def _answer(self, line: str) -> None:
        user = {"role": "user", "content": line}
        told = [] if self._system is None else [{"role": "system", "content": self._system}]
        try:
            stream = self._client.stream_chat([*told, *self._turns, user], **self._fields)
            text, completion = _print_answer(stream)
        except DsError as error:
            _tell(error)
            return
        if text:
            self._turns += [user, {"role": "assistant", "content": text}]
        click.secho(_told(completion) if completion else "(cancelled)", dim=True)


def _print_answer(stream: BlockingStream) -> tuple[str, Completion | None]:
    """Print an answer as it comes; returns its text, and its completion unless it was cancelled by Ctrl-C."""
    parts: list[str] = []
    try:
        for event in stream:
            parts.append(event.text)
            click.echo(printable(event.text), nl=False)
            sys.stdout.flush()
        return "".join(parts), stream.result()
    except KeyboardInterrupt:
        stream.close()
        return "".join(parts), None
    finally:
        click.echo()


def _told(completion: Completion) -> str:
    made = completion.usage.completion_tokens
    seconds = completion.total_s - completion.ttft_s
    pace = f" · {(made - 1) / seconds:.1f} tok/s" if made > 1 and seconds > 0 else ""
    cut = " · cut at max_tokens" if completion.choices[0].finish_reason == "length" else ""
    return f"{made} tokens · ttft {completion.ttft_s * 1e3:.0f} ms{pace}{cut}"


def _tell(error: DsError) -> None:
    remedy = "begin anew with /reset" if isinstance(error, PromptTooLong) else error.remedy
    click.secho(f"error[{error.code}]: {error.message}", fg="red", err=True)
    if remedy:
        click.secho(f"remedy: {remedy}", err=True)


def _read() -> str | None:
    """The next line; None at the end of input. Ctrl-C drops the line that is being typed."""
    import readline  # noqa: F401 - its import gives input() a line editor with history

    while True:
        try:
            return input("\u203a " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                click.echo()
            return None
        except KeyboardInterrupt:
            click.echo("  (Ctrl-D leaves)")
