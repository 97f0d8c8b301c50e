"""``dsbench`` ends as ``dsctl`` does."""

from __future__ import annotations

import sys

import click
import pytest

from dsbench.__main__ import COMMANDS, main
from dsctl.commandline import INTERRUPTED
from dswire.errors import BadInput


@click.command()
@click.argument("how")
def command(how: str) -> None:
    raise {"interrupted": KeyboardInterrupt(), "wrong": BadInput("no such thing", remedy="do this")}[how]


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["end", "interrupted"], INTERRUPTED, "interrupted"),
        (["end", "wrong"], BadInput.exit_code, "error[bad_input]: no such thing\nremedy: do this"),
        (["serv"], 2, "did you mean 'serve'?"),
    ],
)
def test_ends(
    arguments: list[str],
    status: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(COMMANDS, "end", f"{__name__}:command")
    monkeypatch.setattr(sys, "argv", ["dsbench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert told in capsys.readouterr().err
