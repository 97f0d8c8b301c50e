"""The command line that every service shares: ``python -m ds<role> --topology T.yaml --name NAME``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import click

from dsobserve.logging import configure
from dstopology.load import check_servable, load
from dstopology.resolved import Topology
from dswire.actor import Actor
from dswire.errors import DsError, TopologyError
from dswire.process import leave, refuse, run

#: builds the actor of a process: (topology, name, phase)
Build = Callable[[Topology, str, Callable[[str], None]], Awaitable[Actor]]


def service_command(role: str, build: Build) -> click.Command:
    """The command of a service."""

    @click.command(help=f"Run one {role} process of a topology until SIGTERM.")
    @click.option("--topology", "path", type=click.Path(path_type=Path), required=True, help="YAML of the system.")
    @click.option("--name", required=True, help=f"Which process to be, such as {role}-0.")
    def command(path: Path, name: str) -> None:
        configure(name)
        try:
            topology = _load(path, name, role)
        except DsError as error:
            leave(refuse(error))
        leave(run(name, topology.run_dir, lambda phase: build(topology, name, phase)))

    return command


def _load(path: Path, name: str, role: str) -> Topology:
    topology = load(path)
    check_servable(topology)
    if (found := topology.role_of(name)) != role:
        raise TopologyError(
            f"{path}: {name!r} is a {found} process, not a {role} one", remedy=f"`python -m ds{found}` runs it"
        )
    return topology
