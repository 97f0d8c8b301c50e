"""``dsctl``: the commands that people run.

Each command is a file of this package with a click command named ``command``. The table below names them, so that
``dsctl --help`` and a mistyped name import none of them. How a command may end: return nothing (exit status 0),
return an int (that status), or raise a :class:`DsError` (printed with its remedy; the status is the error's).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from dswire.errors import DsError, StartFailed

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

#: exit status after Ctrl-C: what a shell gives a program that this signal ended
INTERRUPTED = 130
#: exit status when nobody reads the output any more, as click has it
BROKEN_PIPE = 1

#: packages that only the extra ``engine`` brings
_ENGINE_PACKAGES = frozenset(
    {
        "accelerate",
        "gguf",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    }
)

_EPILOG = """\b
Examples:
  dsctl model pull smollm2-135m-instruct
  dsctl up -f topology.yaml
  dsctl chat
  dsctl generate "The capital of France is" --max-tokens 16
  dsctl topology show -f topology.yaml
"""


class LazyGroup(click.Group):
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
    try:
        returned = dsctl.main(arguments, prog_name="dsctl", standalone_mode=False)
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except DsError as error:
        return _tell(error)
    except ModuleNotFoundError as error:
        return _tell(_missing(error))
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # click handles it inside a command, not in the last flush; Python would complain once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _tell(error: DsError) -> int:
    click.echo(click.style(f"error[{error.code}]: ", fg="red", bold=True) + error.message, err=True)
    if error.remedy:
        click.echo(click.style("remedy: ", bold=True) + error.remedy, err=True)
    return error.exit_code


def _missing(error: ModuleNotFoundError) -> DsError:
    """What to tell of a package that is not installed; anything else that is missing is a defect, and is raised."""
    package = (error.name or "").partition(".")[0]
    if package not in _ENGINE_PACKAGES:
        raise error
    return StartFailed(
        f"this command needs the package {package}, which is not installed",
        remedy="install the engine's packages with `pip install 'distserve[engine]'`",
    )


if __name__ == "__main__":
    main()
