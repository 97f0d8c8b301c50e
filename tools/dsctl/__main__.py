"""``dsctl``: the commands that people run.

Each command is a file of this package with a click command named ``command``. The table below names them, so that
``dsctl --help`` and a mistyped name import none of them. :mod:`dsctl.commandline` tells how a command may end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import click

from dsctl import commandline
from dsctl.commandline import Commands

#: name -> (module:attribute, help in one line), in the order of ``--help``
COMMANDS = {
    "up": ("dsctl.up:command", "Start and supervise every process of a topology on this host."),
    "down": ("dsctl.down:command", "Stop what `up` started, in order."),
    "status": ("dsctl.status:command", "Show what runs, and how it does."),
    "logs": ("dsctl.logs:command", "Show or follow the processes' logs."),
    "kv": ("dsctl.kv:command", "List the KV that is being handed over."),
    "check": ("dsctl.kv:check", "Tell by which path KV moves, and how fast."),
    "health": ("dsctl.health:command", "Tell whether one process serves (for containers)."),
    "generate": ("dsctl.generate:command", "Continue a prompt, streamed."),
    "chat": ("dsctl.chat:command", "Talk to the model in the terminal."),
    "topology": ("dsctl.topology:command", "Draw, validate and describe topology files."),
    "model": ("dsctl.model:command", "Fetch models into this host's store, and list them."),
    "profile": ("dsctl.profile:command", "Measure how long a model's steps take on this machine."),
    "plan": ("dsctl.plan:command", "Find the placement with the most goodput per device."),
    "latency": ("dsctl.latency:command", "Show how long the planner takes steps to be, and check that."),
    "study": ("dsctl.study:command", "Rerun the DistServe paper's studies."),
    "simulate": ("dsctl.simulate:command", "Tell how a topology would do under a workload."),
    "keys": ("dsctl.keys:command", "Make the keys of encrypted sockets, and say who may connect."),
}

_EPILOG = """\b
Examples:
  dsctl model pull smollm2-135m-instruct
  dsctl up -f topology.yaml
  dsctl chat
  dsctl generate "The capital of France is" --max-tokens 16
  dsctl topology show -f topology.yaml
"""


class LazyGroup(Commands):
    """A group whose commands are imported when they are run or asked for help, from :data:`COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the table, in its order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None for a name that is not in the table."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table's help lines, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="distserve", prog_name="dsctl")
def dsctl() -> None:
    """Serve a language model with prefill and decode on separate workers."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dsctl`` with ``arguments`` (default: the process's), and exit with its status."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit status of ``dsctl`` with ``arguments``; errors are told on stderr."""
    return commandline.run(dsctl, "dsctl", arguments)


if __name__ == "__main__":
    main()
