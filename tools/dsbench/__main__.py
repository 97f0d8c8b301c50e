"""``dsbench``: what people run to see how fast things are on their machine."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from dswire.errors import DsError

#: name -> module:attribute
COMMANDS = {
    "serve": "dsbench.serve:command",
    "calibrate": "dsbench.calibrate:command",
    "engine": "dsbench.engine:command",
    "kv": "dsbench.kv:command",
    "soak": "dsbench.soak:command",
    "simdistserve": "dsbench.simdistserve:command",
}


class _Commands(click.Group):
    """Imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure on this machine, peers included."""


def main() -> None:
    """Run, and end with the exit status of what went wrong."""
    try:
        cli()
    except DsError as error:
        click.echo(click.style(f"error[{error.code}]: ", fg="red", bold=True) + error.message, err=True)
        if error.remedy:
            click.echo(click.style("remedy: ", bold=True) + error.remedy, err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
