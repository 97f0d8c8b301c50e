"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsctl.__main__ import run
from dsctl.options import NewFile
from dswire.errors import BadInput


def test_a_file_that_can_be_written_is_taken(tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.touch()
    for path in (there, tmp_path / "new.PNG"):
        assert NewFile("plot", ".png", ".svg").convert(str(path), None, None) == path
    assert NewFile("table").convert("/dev/null", None, None) == Path("/dev/null")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "it is a directory"),
        ("nowhere/p.png", "there is no directory"),
        ("p.txt", "it does not end in .png or .svg"),
        ("p", "it does not end in"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        NewFile("plot", ".png", ".svg").convert(str(tmp_path / name), None, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--model", "OPT-175B", "--nodes", "64", "--write"],
        ["plan", "--model", "OPT-175B", "--nodes", "64", "--report"],
        ["study", "applications", "--plot"],
        ["study", "applications", "--csv"],
        ["simulate", "--rate", "1", "--requests", "10000000", "--trace"],
        ["profile", "--model", "smollm2-135m-instruct", "--out"],
    ],
)
def test_a_long_command_refuses_its_output_before_it_works(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "/nowhere/file.png"]) == BadInput.exit_code
    assert "cannot be written to /nowhere/file.png: there is no directory /nowhere" in capsys.readouterr().err


def test_a_profile_of_an_unknown_dtype_is_a_slip_of_the_pen(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "--model", "smollm2-135m-instruct", "--dtype", "float8"]) == BadInput.exit_code
    assert "'float8' is not one of" in capsys.readouterr().err
