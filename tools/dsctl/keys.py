"""``dsctl keys``: who we are, and who may connect."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click

from dsctl.commandline import Commands
from dsctl.topology import FILE_HELP
from dswire.errors import BadInput, InvalidRequest, TopologyError

_NO_KEY = "give the key itself, or the file that holds it"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")

directory_options = (
    click.option("-f", "--file", type=click.Path(path_type=Path), help=FILE_HELP),
    click.option(
        "--dir", "directory", type=click.Path(path_type=Path), help="The directory, instead of a topology's."
    ),
)


def _directory(file: Path | None, directory: Path | None) -> Path:
    """The system's key directory: as given, else the topology's, else the user's."""
    from dstopology.load import default_keys_dir, find, load

    if directory is not None:
        return directory
    try:
        path = find(file)
    except TopologyError:
        return default_keys_dir()
    return load(path).security.keys_dir


@click.group(cls=Commands)
def command() -> None:
    """CURVE keys of an encrypted system: make them, and say which clients may connect.

    \b
    dsctl keys make                          the system's own keys, once; copy them to every host
    dsctl keys make --client anna --out anna-keys
                                             keys for a client, allowed at once; send her the directory
    dsctl keys allow bob bob.pub             let in a key that somebody else made
    """


@command.command()
@directory_options[0]
@directory_options[1]
@click.option("--client", "client", metavar="NAME", help="Make a client's keys instead, and allow them here.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to put a client's keys; default ./NAME-keys.")
def make(file: Path | None, directory: Path | None, client: str | None, out: Path | None) -> None:
    """Make the system's keys, or a client's. Nothing is ever overwritten."""
    from dswire import keys

    home = _directory(file, directory)
    if client is None:
        public = keys.write_pair(home / keys.SYSTEM_SECRET, home / keys.SYSTEM_PUBLIC)
        click.echo(f"system key {public.decode()} in {home}")
        return
    _check_name(client)
    keys.load_system(home)
    if (home / keys.ALLOWED / f"{client}.pub").exists():
        raise BadInput(
            f"{client}: is allowed already", remedy=f"take another name, or `dsctl keys revoke {client}`"
        )
    target = out or Path(f"{client}-keys")
    public = keys.write_pair(target / keys.CLIENT_SECRET, target / keys.CLIENT_PUBLIC)
    shutil.copyfile(home / keys.SYSTEM_PUBLIC, target / keys.SYSTEM_PUBLIC)
    keys.allow(home, client, public)
    click.echo(f"client key {public.decode()} in {target}, allowed as {client}")
    click.echo(f"use it with: dsctl generate --keys {target} --address ADDRESS ...")


class _TakesKey(click.Command):
    """One key of 85 begins with a dash, and is no option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Anything as long as a key, and like an option, goes behind the options."""
        from dswire.keys import KEY_NCHARS

        keys = [one for one in args if one.startswith("-") and len(one) == KEY_NCHARS]
        if keys and "--" not in args:
            args = [*(one for one in args if one not in keys), "--", *keys]
        return super().parse_args(context, args)


@command.command(cls=_TakesKey)
@directory_options[0]
@directory_options[1]
@click.argument("name")
@click.argument("key")
def allow(name: str, key: str, file: Path | None, directory: Path | None) -> None:
    """Let a client in: NAME is what you call it, KEY its public key or the file that holds it.

    It counts from the client's next connection on; nothing needs a restart.
    """
    from dswire import keys

    _check_name(name)
    path = Path(key)
    public = keys.read_key(path) if path.is_file() else keys.check_key(key, repr(key), _NO_KEY)
    home = _directory(file, directory)
    keys.allow(home, name, public)
    click.echo(f"{name} may connect (in {home / keys.ALLOWED})")


@command.command()
@directory_options[0]
@directory_options[1]
@click.argument("name")
def revoke(name: str, file: Path | None, directory: Path | None) -> None:
    """Let a client in no longer. A connection that stands is not cut."""
    from dswire import keys

    _check_name(name)
    path = _directory(file, directory) / keys.ALLOWED / f"{name}.pub"
    if not path.exists():
        raise InvalidRequest(f"{name}: is not on the allow-list", remedy="see `dsctl keys list`")
    path.unlink()
    click.echo(f"{name} may not connect any more")


@command.command(name="list")
@directory_options[0]
@directory_options[1]
def list_keys(file: Path | None, directory: Path | None) -> None:
    """Print the system's public key and the keys that may connect."""
    from rich.console import Console
    from rich.table import Table

    from dswire import keys

    home = _directory(file, directory)
    table = Table(title=f"keys in {home}", title_justify="left", box=None)
    table.add_column("name")
    table.add_column("public key", no_wrap=True)
    table.add_column("")
    table.add_row("system", keys.load_system(home).public.decode(), "every process")
    for name, public in keys.allowed(home).items():
        table.add_row(name, public.decode(), "client")
    Console(highlight=False, soft_wrap=True).print(table, markup=False)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"client {name!r} cannot be called that",
            remedy="give 1 to 64 letters, digits, dots, dashes and underscores, with no dot at the beginning",
        )
