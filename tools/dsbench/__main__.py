"""``dsbench``: what people run to see how fast things are on their machine."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from dsctl import commandline
from dsctl.commandline import Commands

#: name -> module:attribute
COMMANDS = {
    "serve": "dsbench.serve:command",
    "calibrate": "dsbench.calibrate:command",
    "engine": "dsbench.engine:command",
    "kv": "dsbench.kv:command",
    "soak": "dsbench.soak:command",
    "simdistserve": "dsbench.simdistserve:command",
}


class _Commands(Commands):
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
    sys.exit(commandline.run(cli, "dsbench"))


if __name__ == "__main__":
    main()
