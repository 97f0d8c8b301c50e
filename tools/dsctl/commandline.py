"""What ``dsctl`` and ``dsbench`` have in common: how a command may end, and what is told of a mistyped name.

A command returns nothing (exit status 0), returns an int (that status), or raises a :class:`DsError` (printed with
its remedy; the status is the error's). Ctrl-C ends it with :data:`INTERRUPTED`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from dswire.errors import DsError, StartFailed

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


#: as many letters of a docstring as its first sentence may have
_SENTENCE = 1000


class Commands(click.Group):
    """A group that tells which command a mistyped name may mean, and in its help a whole sentence of each."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that ``args`` begin with. Raises :class:`click.UsageError` where there is none."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            from dstopology.problems import did_you_mean

            ctx.fail(f"there is no command {name!r}: {did_you_mean(name, known)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line, or as many as it takes, for each command."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(_SENTENCE)) for name, one in commands if one])


def run(group: click.Group, name: str, arguments: Sequence[str] | None = None) -> int:
    """The exit status of ``group``, called ``name``, with ``arguments``; errors are told on stderr."""
    try:
        returned = group.main(arguments, prog_name=name, standalone_mode=False)
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
