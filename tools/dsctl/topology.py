"""``dsctl topology``: look at a topology, check it, and get its schema."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsctl.commandline import Commands

if TYPE_CHECKING:
    from dsctl.drawing import Live
    from dstopology.resolved import Topology
    from dswire.messages.kv import PathInfo

#: longest wait for the router's answer, in seconds
LIVE_TIMEOUT_S = 1.0

FILE_HELP = "The topology; default $DS_TOPOLOGY, ./topology.yaml or deploy/topologies/laptop.yaml."
file_option = click.option("-f", "--file", type=click.Path(path_type=Path), default=None, help=FILE_HELP)


@click.group(cls=Commands)
def command() -> None:
    """Show, check and describe topology files.

    \b
    dsctl topology show -f deploy/topologies/two-nodes.yaml
    dsctl topology validate my.yaml
    dsctl topology schema > topology.schema.json
    """


@command.command()
@file_option
@click.option(
    "--format", "form", type=click.Choice(["tree", "json", "yaml", "mermaid"]), default="tree", show_default=True
)
@click.option("--live/--no-live", default=True, show_default=True, help="Ask the router how it goes.")
def show(file: Path | None, form: str, live: bool) -> None:
    """Print the whole that a topology resolves to, with its live state when it runs."""
    from dsctl import drawing
    from dstopology.load import find, load

    topology = load(find(file))
    state = ask(topology) if live else drawing.Live(None)
    if form == "tree":
        _print_tree(topology, state)
    elif form == "mermaid":
        click.echo(drawing.mermaid(topology, state), nl=False)
    elif form == "json":
        click.echo(json.dumps(drawing.data(topology, state), indent=2))
    else:
        import yaml

        click.echo(yaml.safe_dump(drawing.data(topology, state), sort_keys=False), nl=False)


def _print_tree(topology: Topology, state: Live) -> None:
    from dsctl import drawing
    from dsobserve.terminal import output

    output().print(drawing.tree(topology, state))


def ask(topology: Topology) -> Live:
    """The router's report, or why there is none. Waits :data:`LIVE_TIMEOUT_S` at most."""
    from dsctl.drawing import Live
    from dstopology.endpoints import is_local

    router = topology.router
    here = is_local(topology.node_of(router.name).host)
    if here and not (topology.run_dir / f"{router.name}.ready").exists():
        return Live(None, "not running")
    from dsclient import Client
    from dswire.errors import DsError, RouterLost
    from dswire.keys import load_system

    try:
        keys = load_system(topology.security.keys_dir) if topology.security.encrypted else None
        with Client(router.frontend_connect, keys=keys, timeout_s=LIVE_TIMEOUT_S) as client:
            return Live(client.status(), paths=_paths(topology))
    except RouterLost:
        return Live(None, "not running")
    except DsError as error:
        return Live(None, f"its state is not known: {error}")


def _paths(topology: Topology) -> dict[tuple[str, str], PathInfo]:
    """Every path for KV that the relays know."""
    from dsctl import relays

    answers = relays.ask(topology, LIVE_TIMEOUT_S) if topology.relays else []
    known = [(one.node, path) for one in answers if one.listing is not None for path in one.listing.paths]
    return {(path.source, node): path for node, path in known}


def _unchecked(model: str) -> str:
    from dsengine.store import KNOWN
    from dstopology.problems import nearest

    meant = nearest(model, KNOWN)
    told = f"  model {model} is not on this host: what depends on it was not checked"
    return f"{told}; {meant}" if meant else told


@command.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@file_option
def validate(files: tuple[Path, ...], file: Path | None) -> None:
    """Check topology files; tell all that is wrong with file, line, key and remedy.

    The exit status is 0 when every file is valid, 2 otherwise.
    """
    from dstopology import modelfacts
    from dstopology.load import check_servable, find, load
    from dswire.errors import TopologyError

    wrong: list[TopologyError] = []
    for path in files or (find(file),):
        try:
            topology = load(path)
        except TopologyError as error:
            wrong.append(error)
            continue
        counts = f"{len(topology.role('prefill'))} prefill, {len(topology.role('decode'))} decode"
        click.echo(f"{path}: valid ({counts}, nodes {', '.join(node.name for node in topology.nodes)})")
        if modelfacts.read(topology.model.path, os.environ) is None:
            click.echo(_unchecked(topology.model.path), err=True)
        try:
            check_servable(topology)
        except TopologyError as error:
            click.echo(f"  but it cannot be served yet:\n{error}", err=True)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise TopologyError(
            "\n".join(f"{one}\n    {one.remedy}" for one in wrong), remedy=f"correct these {len(wrong)} files"
        )


@command.command()
def schema() -> None:
    """Print the JSON Schema of topology files, for editors.

    \b
    dsctl topology schema > topology.schema.json
    # yaml-language-server: $schema=topology.schema.json     (first line of the YAML)
    """
    from dstopology.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
