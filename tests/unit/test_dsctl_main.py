"""The command table: cheap to list, and every end of a command has its status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest

from dsctl.__main__ import COMMANDS, run
from dsctl.commandline import BROKEN_PIPE
from dswire.errors import Cancelled, DsError, InvalidRequest, Overloaded

HEAVY = ("torch", "transformers", "numpy", "zmq", "rich", "yaml", "dsengine", "dsclient", "dstopology")


def dsctl(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsctl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Put a command ``end`` into the table that ends as the given function does."""

    def install(body: Callable[[], object]) -> None:
        monkeypatch.setitem(COMMANDS, "end", (f"{__name__}:command", "End."))
        monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
        monkeypatch.setattr(sys.modules[__name__], "command", click.command(name="end")(body), raising=False)

    return install


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str) -> None:
    done = dsctl(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: dsctl {name} ")


def test_help_lists_every_command() -> None:
    done = dsctl("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout and line in done.stdout for name, (_, line) in COMMANDS.items())
    assert "Examples:" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from dsctl.__main__ import run; run(['--help'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def test_the_help_of_a_group_has_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kv", "--help"]) == 0
    assert "size and what is left of its lease." in " ".join(capsys.readouterr().out.split())


def test_version() -> None:
    done = dsctl("--version")
    assert (done.returncode, done.stdout) == (0, "dsctl, version 0.1.0\n")


@pytest.mark.parametrize("arguments", [["nope"], ["--nope"], [], ["model"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Usage: dsctl" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "meant"), [("stauts", "'status'"), ("generat", "'generate'")])
def test_a_mistyped_name_is_answered_with_the_nearest(
    name: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("error", [InvalidRequest("bad", remedy="do this"), Overloaded("full"), Cancelled("gone")])
def test_errors_are_told_with_their_remedy(
    error: DsError, ending: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise error

    ending(body)
    assert run(["end"]) == type(error).exit_code
    told = capsys.readouterr()
    assert told.out == ""
    lines = [f"error[{error.code}]: {error.message}", *([f"remedy: {error.remedy}"] if error.remedy else [])]
    assert told.err.splitlines() == lines


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3), ("text", 0)])
def test_returned_status(returned: object, status: int, ending: Callable[[Callable[[], object]], None]) -> None:
    ending(lambda: returned)
    assert run(["end"]) == status


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt(), 130), (click.Abort(), 130), (click.ClickException("no"), 1)]
)
def test_raised_status(raised: BaseException, status: int, ending: Callable[[Callable[[], object]], None]) -> None:
    def body() -> None:
        raise raised

    ending(body)
    assert run(["end"]) == status


def test_missing_engine_package_has_a_remedy(
    ending: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")

    ending(body)
    assert run(["end"]) == 5
    assert "distserve[engine]" in capsys.readouterr().err


def test_missing_module_of_ours_is_a_defect(ending: Callable[[Callable[[], object]], None]) -> None:
    def body() -> None:
        raise ModuleNotFoundError("No module named 'dsnope'", name="dsnope")

    ending(body)
    with pytest.raises(ModuleNotFoundError, match="dsnope"):
        run(["end"])


@pytest.mark.parametrize("lines", [1, 10_000])
def test_reader_that_went_away(lines: int) -> None:
    program = (
        "import sys, click, dsctl.__main__ as m\n"
        "sys.modules['it'] = type(sys)('it')\n"
        f"sys.modules['it'].command = click.command()(lambda: [sys.stdin.read(), print('x\\n' * {lines})])\n"
        "m.COMMANDS['it'] = ('it:command', '')\n"
        "m.main(['it'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == BROKEN_PIPE
