"""``dsctl kv`` and ``dsctl check``: the KV that is handed over, and the paths that it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsctl.commandline import Commands
from dsctl.topology import file_option
from dsobserve.terminal import output

if TYPE_CHECKING:
    from rich.table import Table

    from dsctl.relays import Answer

#: exit status when a relay does not answer, or a path cannot be used
DOWN = 5
STYLES = {"ready": "green", "pulling": "cyan", "quarantined": "yellow", "kept": "blue"}
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(name="kv", cls=Commands)
def command() -> None:
    """Look at the KV that prefill instances have handed out.

    \b
    Examples:
      dsctl kv ls
      dsctl kv ls -f topology.yaml --json
    """


@command.command()
@file_option
@json_option
def ls(file: Path | None, as_json: bool) -> int:
    """List every live handle: owner, reader, state, age, size and what is left of its lease.

    A handle lives from the end of its prefill until the decode instance has its KV; with relay.keep a copy is kept
    until the end of the request. The exit status is 0 when every relay answers, else 5.
    """
    answers = _answers(file)
    if as_json:
        click.echo(json.dumps([_data(one) for one in answers], indent=2))
    else:
        _print_handles(answers)
    return _status(answers)


@click.command(name="check")
@file_option
@json_option
def check(file: Path | None, as_json: bool) -> int:
    """Tell by which path KV moves, and how fast, in a system that runs.

    Each relay tries its paths when they begin, with a small transfer. The exit status is 0 when all can be used and
    none stands in for a better one, else 5.

    \b
    Examples:
      dsctl check
      dsctl check -f topology.yaml --json
    """
    answers = _answers(file)
    if as_json:
        click.echo(json.dumps([_data(one) for one in answers], indent=2))
    else:
        _print_paths(answers)
    reasons = [path.reason for one in answers if one.listing is not None for path in one.listing.paths]
    return DOWN if any(reasons) else _status(answers)


def _answers(file: Path | None) -> list[Answer]:
    from dsctl.relays import ask
    from dstopology.load import find, load

    return ask(load(find(file)))


def _status(answers: list[Answer]) -> int:
    return 0 if all(one.listing is not None for one in answers) else DOWN


def _data(answer: Answer) -> dict[str, Any]:
    """One relay, as ``--json`` prints it."""
    import msgspec

    data: dict[str, Any] = {"relay": answer.relay, "node": answer.node, "error": None}
    if answer.error is not None:
        data["error"] = answer.error.message
    if answer.listing is not None:
        data |= msgspec.to_builtins(answer.listing)
        data.pop("type", None)
        for handle, told in zip(answer.listing.handles, data["handles"], strict=True):
            told["key"] = str(handle.key)
    return data


def _print_handles(answers: list[Answer]) -> None:
    rows = [
        (
            str(one.key),
            one.owner,
            one.reader or "-",
            f"[{STYLES.get(one.state, '')}]{one.state}[/]" if one.state in STYLES else one.state,
            f"{one.age_s:.1f} s",
            str(one.tokens),
            _size(one.nbytes),
            f"{one.lease_left_s:.1f} s",
        )
        for answer in answers
        if answer.listing is not None
        for one in answer.listing.handles
    ]
    headings = ("handle", "owner", "reader", "state", "age", "tokens", "size", "lease left")
    if rows:
        _print(_table(headings, rows, right=("age", "tokens", "size", "lease left")))
    elif _status(answers) == 0:
        _print("no live handles")
    for answer in answers:
        if answer.listing is None:
            _complain(answer)
        else:
            more = f", {answer.listing.left_off} handles not listed" if answer.listing.left_off else ""
            _print(f"{answer.relay}: {answer.listing.streams} streams leave the node{more}")


def _print_paths(answers: list[Answer]) -> None:
    from rich.markup import escape

    rows = [
        (path.source, answer.node, path.transport, _rate(path.bytes_per_s), f"[yellow]{escape(path.reason)}[/]")
        for answer in answers
        if answer.listing is not None
        for path in answer.listing.paths
    ]
    if rows:
        _print(_table(("from", "to node", "path", "rate", ""), rows, right=("rate",)))
    elif _status(answers) == 0:
        _print("no path has been tried yet")
    for answer in answers:
        if answer.listing is None:
            _complain(answer)


def _complain(answer: Answer) -> None:
    from rich.text import Text

    assert answer.error is not None
    told = Text(answer.error.message, "red")
    _print(told.append(f"; {answer.error.remedy}", "default") if answer.error.remedy else told)


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, right: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=heading != "")
    for row in rows:
        table.add_row(*row)
    return table


def _print(what: object) -> None:

    # what goes to a file or a pipe is not cut
    output().print(what)


def _rate(bytes_per_s: float | None) -> str:
    return "no answer yet" if bytes_per_s is None else f"{bytes_per_s / 1e9:.2f} GB/s"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
