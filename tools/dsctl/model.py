"""``dsctl model``: the models of this host's store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, TextIO

import click

from dsctl.commandline import Commands

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from dsengine.store import Report

#: what people read for each step of a pull
_STEPS = {
    "download": "downloading",
    "unpack": "unpacking",
    "check": "checking",
    "read": "reading the GGUF file",
    "tokenizer": "converting the tokenizer",
    "weights": "converting the weights",
    "write": "writing safetensors",
}
#: steps that count bytes; the others count pieces
_BYTE_STEPS = frozenset({"download", "unpack", "check"})


@click.group(name="model", cls=Commands)
def command() -> None:
    """Fetch models into this host's store, and list them.

    The store is $DS_HOME (default: the user's cache directory / distserve); all processes of the host share it.

    \b
    Examples:
      dsctl model pull smollm2-135m-instruct
      dsctl model list
      dsctl model path smollm2-135m-instruct
    """


@command.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch, check and convert a model, once per host.

    NAME is a known model, a .gguf file, or a Hub id where there is a network. Prints the model's directory.

    \b
    Examples:
      dsctl model pull smollm2-135m-instruct
      dsctl model pull ./llama.Q4_K_M.gguf
    """
    from dsengine import store
    from dsengine.pull import pull as pull_known

    begun = monotonic()
    with _progress() as report:
        directory = pull_known(name, report) if name in store.KNOWN else store.resolve(name, report)
    click.echo(f"ready after {monotonic() - begun:.1f} s", err=True)
    click.echo(directory)


@command.command(name="list")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def list_models(style: str) -> None:
    """List known models and those in the store.

    \b
    Examples:
      dsctl model list
      dsctl model list --format json
    """
    from dsengine import store

    here = {name: str(store.installed(name)) for name in store.names()}
    rows = {name: here.get(name) for name in sorted({*store.KNOWN, *here})}
    if style == "json":
        click.echo(json.dumps([{"name": name, "path": path} for name, path in rows.items()], indent=2))
        return
    width = max(map(len, rows))
    for name, path in rows.items():
        click.echo(f"{name:<{width}}  {path or f'not here; fetch it with `dsctl model pull {name}`'}")


@command.command()
@click.argument("name")
def path(name: str) -> None:
    """Print the directory that NAME means as `model.path` of a topology.

    \b
    Examples:
      ls $(dsctl model path smollm2-135m-instruct)
    """
    from dsengine import store

    click.echo(store.resolve(name))


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar for each step on a terminal, a line for each elsewhere; on stderr."""
    # bound to this stream: what converts redirects stderr, to keep its libraries quiet
    stream = sys.stderr
    if not stream.isatty():
        yield _lines(stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<25}"), BarColumn(), TextColumn("{task.fields[shown]:>18}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=stream), redirect_stderr=False) as progress:
        yield _bars(progress)


def _bars(progress: Progress) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(step: str, done: int, total: int | None) -> None:
        if step not in tasks:
            tasks[step] = progress.add_task(_STEPS.get(step, step), total=total, shown="")
        shown = _amount(done, total) if step in _BYTE_STEPS else ""
        progress.update(tasks[step], completed=done, total=total, shown=shown)

    return report


def _lines(stream: TextIO) -> Report:
    begun: dict[str, float] = {}

    def report(step: str, done: int, total: int | None) -> None:
        start = begun.setdefault(step, monotonic())
        if done == total:
            click.echo(f"{_STEPS.get(step, step)}: {monotonic() - start:.1f} s", file=stream)

    return report


def _amount(done: int, total: int | None) -> str:
    return f"{done / 1e6:.1f} MB" if total is None else f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
