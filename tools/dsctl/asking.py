"""What the commands that ask the model share: whom to ask, how to sample, how to print."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from dsctl.topology import FILE_HELP
from dswire.errors import InvalidRequest, TopologyError

if TYPE_CHECKING:
    from dsclient.request import SamplingFields
    from dswire.keys import CurveKeys

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Target:
    """A router, and the keys that it wants."""

    address: str
    keys: CurveKeys | None


def target_options(function: CommandT) -> CommandT:
    """``--file``, ``--address``, ``--keys`` and ``--timeout``; see :func:`find_target`."""
    for option in (
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(min=0, min_open=True),
            default=10.0,
            show_default=True,
            help="Seconds to wait for a router that does not answer.",
        ),
        click.option(
            "--keys", type=click.Path(path_type=Path), help="Directory with the keys of an encrypted system."
        ),
        click.option("--address", help="The router's address, instead of a topology's."),
        click.option("-f", "--file", type=click.Path(path_type=Path), help=FILE_HELP),
    ):
        function = option(function)
    return function


def find_target(file: Path | None, address: str | None, keys: Path | None) -> Target:
    """The router that the options mean.

    An address counts first, then a topology that was named or found; without either it is the default address.
    Raises :class:`TopologyError` for a topology that cannot be read.
    """
    from dsclient import DEFAULT_ADDRESS
    from dstopology.load import find, load
    from dswire.keys import load_any

    if file is not None and address is not None:
        raise InvalidRequest("--file and --address exclude each other", remedy="give one of the two")
    given = load_any(keys) if keys is not None else None
    if address is not None:
        if not address.startswith(("tcp://", "ipc://")):
            raise InvalidRequest(f"--address {address!r} is none", remedy="write tcp://HOST:PORT or ipc:///PATH")
        return Target(address, given)
    try:
        path = find(file)
    except TopologyError:
        return Target(DEFAULT_ADDRESS, given)
    topology = load(path)
    if given is None and topology.security.encrypted:
        given = load_any(topology.security.keys_dir)
    return Target(topology.router.frontend_connect, given)


#: what a terminal gets unless it asks for more: at the protocol's 1.0 small models wander off
TERMINAL_TEMPERATURE = 0.2

#: (flag, type, help): the name of the sampling parameter is the flag's
_SAMPLING = (
    ("--max-tokens", int, "Longest answer, in tokens."),
    ("--temperature", float, f"0 is greedy; {TERMINAL_TEMPERATURE} unless given."),
    ("--top-k", int, "Draw from the k likeliest tokens; 0 is off."),
    ("--top-p", float, "Draw from the likeliest tokens with this much probability; 1 is off."),
    ("--min-p", float, "Draw from tokens at least this fraction as likely as the likeliest; 0 is off."),
    ("--seed", int, "Makes the answer reproducible."),
    ("--repetition-penalty", float, "Over prompt and output; 1 is off."),
    ("--presence-penalty", float, "For tokens that occur in the output; 0 is off."),
    ("--frequency-penalty", float, "For each occurrence in the output; 0 is off."),
    ("--min-tokens", int, "Do not end before this many tokens."),
)


def sampling_options(function: CommandT) -> CommandT:
    """One option for each sampling parameter that makes sense in a terminal."""
    function = click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the model's own end.")(
        function
    )
    stop_ids = click.option(
        "--stop-token-id", "stop_token_ids", type=int, multiple=True, help="Token that ends the answer."
    )
    stop = click.option("--stop", multiple=True, help="Text that ends the answer; may be given more than once.")
    function = stop(stop_ids(function))
    for flag, kind, told in reversed(_SAMPLING):
        function = click.option(flag, type=kind, help=told)(function)
    return function


def sampling_fields(given: dict[str, Any]) -> SamplingFields:
    """The parameters that were given; those left out are the router's defaults, but for the temperature."""
    fields: dict[str, Any] = {"temperature": TERMINAL_TEMPERATURE}
    fields |= {name: value for name, value in given.items() if value is not None and value != ()}
    return cast("SamplingFields", fields)


def printable(text: str) -> str:
    """Text that cannot steer the terminal: control characters other than newline and tab are replaced."""
    if text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text)
