"""Log files as one stream, and the command that prints it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from dsctl.__main__ import dsctl
from dsctl.logfiles import LogFile, LogFiles
from dsctl.logs import Age
from dsctl.supervise.child import last_words
from dsctl.supervise.rundir import RunDir
from dswire.errors import BadInput


def line(second: int, event: str, **fields: object) -> str:
    time = f"2026-11-22T18:00:{second:02d}.250Z"
    return json.dumps({"time": time, "level": "info", "process": "x", "event": event, **fields}) + "\n"


@pytest.fixture
def logs(tmp_path: Path) -> Callable[..., Path]:
    def write(**files: str) -> Path:
        for name, text in files.items():
            (tmp_path / f"{name.replace('_', '-')}.log").write_text(text)
        return tmp_path

    return write


def test_files_are_merged_by_time(logs: Callable[..., Path]) -> None:
    directory = logs(decode_0=line(1, "a") + line(4, "d"), prefill_0=line(2, "b") + line(3, "c"))
    entries = LogFiles(directory).tail(10)
    assert [(entry.process, entry.text) for entry in entries] == [
        ("decode-0", "a"),
        ("prefill-0", "b"),
        ("prefill-0", "c"),
        ("decode-0", "d"),
    ]
    assert [entry.text for entry in LogFiles(directory).tail(2)] == ["c", "d"]
    assert LogFiles(directory).tail(0) == []
    assert [entry.text for entry in LogFiles(directory, ["prefill-0"]).tail(10)] == ["b", "c"]


def test_other_output_stays_where_it_came(logs: Callable[..., Path]) -> None:
    crash = "Fatal Python error: Segmentation fault\n  File x.py\n"
    directory = logs(decode_0="early\n" + line(2, "a") + crash + line(5, "b"), prefill_0=line(3, "between"))
    texts = [entry.text for entry in LogFiles(directory).tail(10)]
    assert texts == ["early", "a", "Fatal Python error: Segmentation fault", "  File x.py", "between", "b"]


def test_a_file_without_any_time_has_that_of_its_last_change(logs: Callable[..., Path]) -> None:
    directory = logs(decode_0="ImportError: x\n")
    (entry,) = LogFiles(directory).tail(10)
    assert entry.time == (directory / "decode-0.log").stat().st_mtime


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Traceback\nImportError: no x\n\n", "ImportError: no x"),
        ("Traceback\nImportError: no x\n" + line(1, "stopped"), ""),
        ("", ""),
        ("y" * 5000, "y" * 1000),
    ],
)
def test_last_words(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.log"
    assert last_words(path) == ""
    path.write_text(text)
    assert last_words(path) == words


def test_json_that_is_no_log_line_is_shown_as_it_is(logs: Callable[..., Path]) -> None:
    odd = ['{"time": "yesterday", "event": "x"}', '{"event": "no time"}', "{broken", "[1]", '{"time": 5}']
    directory = logs(decode_0="".join(text + "\n" for text in odd))
    assert [entry.text for entry in LogFiles(directory).tail(10)] == odd


def test_following_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "decode-0.log"
    path.write_text(line(1, "old") + line(2, "seen"))
    log = LogFile(path)
    assert [entry.text for entry in log.tail(1)] == ["seen"]
    assert log.more() == []
    with path.open("a") as file:
        file.write(line(3, "new") + line(4, "half")[:20])
        file.flush()
        assert [entry.text for entry in log.more()] == ["new"]
        file.write(line(4, "half")[20:])
    assert [entry.text for entry in log.more()] == ["half"]
    path.rename(tmp_path / "decode-0.log.1")
    assert log.more() == []
    path.write_text(line(5, "fresh"))
    assert [entry.text for entry in log.more()] == ["fresh"]
    path.write_text("")
    path.write_text(line(6, "short")[:-1])
    assert log.more() == []


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]))), st.integers(0, 5))
def test_tail_is_the_end_of_the_file(texts: list[str], lines: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.log"
        path.write_text("".join(f"x{text}\n" for text in texts))
        got = [entry.raw for entry in LogFile(path).tail(lines)]
    assert got == ([f"x{text}" for text in texts][-lines:] if lines else [])


def test_tail_of_a_long_file_reads_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("".join(f"{index} {'y' * 1000}\n" for index in range(500)))
    got = LogFile(path).tail(200)
    assert [entry.raw.split()[0] for entry in got] == [str(index) for index in range(300, 500)]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("1.5m", 90.0), ("2h", 7200.0)])
def test_age(text: str, seconds: float) -> None:
    assert Age().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "5", "m", "5 m", "-5s", "5d"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(click.BadParameter, match="no age"):
        Age().convert(text, None, None)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A topology that has run; its file."""
    file = tmp_path / "t.yaml"
    file.write_text("model: tiny\n")
    monkeypatch.setenv("DS_RUN_DIR", str(tmp_path / "run"))
    run = RunDir(tmp_path / "run")
    run.make()
    with run.locked(file):
        run.log_of("decode-0").write_text(
            line(1, "ready", pid=7) + line(2, "failed", exception="Traceback\n  boom")
        )
    return file


def test_logs_prints_fields_and_traces(ran: Path) -> None:
    done = CliRunner().invoke(dsctl, ["logs", "-f", str(ran)])
    assert done.exit_code == 0, done.output
    first, second, trace, boom = done.output.splitlines()
    assert first.endswith("decode-0  ready pid=7")
    assert first[8:13] == ".250 "
    assert second.endswith("decode-0  failed")
    assert (trace, boom) == ("Traceback", "  boom")


def test_logs_as_they_are(ran: Path) -> None:
    done = CliRunner().invoke(dsctl, ["logs", "decode-0", "-n", "1", "--json", "-f", str(ran)])
    assert json.loads(done.output)["event"] == "failed"


def test_logs_since(ran: Path) -> None:
    done = CliRunner().invoke(dsctl, ["logs", "--since", "0s", "-f", str(ran)])
    assert "ready" not in done.output


def test_logs_of_an_unknown_process(ran: Path) -> None:
    done = CliRunner().invoke(dsctl, ["logs", "decode-9", "-f", str(ran)])
    assert isinstance(done.exception, BadInput)
    assert "decode-0" in done.exception.remedy


def test_logs_of_what_never_ran(ran: Path) -> None:
    other = ran.with_name("other.yaml")
    done = CliRunner().invoke(dsctl, ["logs", "-f", str(other)])
    assert isinstance(done.exception, BadInput)
    assert "has never run here" in done.exception.message
