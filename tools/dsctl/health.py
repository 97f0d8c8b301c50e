"""``dsctl health``: whether one process serves, for the health checks of containers."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dsctl.topology import file_option


@click.command()
@click.argument("name")
@file_option
def command(name: str, file: Path | None) -> None:
    """Exit with status 0 when the process NAME serves, with 5 when it does not.

    To be run where the process runs, in the same container: pids of another cannot be seen.
    """
    from dstopology.load import find, load
    from dswire.errors import NoInstance

    topology = load(find(file))
    topology.role_of(name)
    path = topology.run_dir / f"{name}.ready"
    try:
        pid = int(path.read_text())
        os.kill(pid, 0)
    except FileNotFoundError as error:
        raise NoInstance(f"{name} does not serve: there is no {path}") from error
    except (ProcessLookupError, ValueError) as error:
        raise NoInstance(f"{name} does not serve: {path} is left from a process that is gone") from error
    except PermissionError:
        # another user's, so it lives
        pass
    click.echo(f"{name}: serves (pid {pid})")
