"""Log lines: form, fields, levels, and the standard library's loggers."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator

import pytest
import structlog

from dsobserve.logging import configure
from dswire.errors import InvalidRequest


@pytest.fixture(autouse=True)
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DS_LOG_FORMAT", raising=False)
    monkeypatch.delenv("DS_LOG_LEVEL", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_off_a_terminal_and_its_four_fields_come_first() -> None:
    out = io.StringIO()
    configure("decode-0", stream=out)
    structlog.get_logger().info("step", tokens=3)
    (line,) = lines(out)
    assert list(line) == ["time", "level", "process", "event", "tokens"]
    assert (line["level"], line["process"], line["event"], line["tokens"]) == ("info", "decode-0", "step", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(line["time"]))


def test_a_terminal_gets_coloured_text() -> None:
    out = Terminal()
    configure("router-0", stream=out)
    structlog.get_logger().info("ready", port=5555)
    assert "\x1b[" in out.getvalue()
    assert "router-0" in out.getvalue()
    assert not out.getvalue().startswith("{")


def test_the_environment_overrides_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_LOG_FORMAT", "json")
    out = Terminal()
    configure("router-0", stream=out)
    structlog.get_logger().info("ready")
    assert lines(out)[0]["event"] == "ready"


def test_text_without_a_terminal_has_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_LOG_FORMAT", "console")
    out = io.StringIO()
    configure("router-0", stream=out)
    structlog.get_logger().info("ready")
    assert "\x1b" not in out.getvalue()
    assert "ready" in out.getvalue()


def test_a_logger_made_before_the_set_up_follows_it() -> None:
    log = structlog.get_logger()
    first, second = io.StringIO(), io.StringIO()
    configure("a", stream=first)
    log.info("one")
    configure("b", stream=second)
    log.info("two")
    assert [line["event"] for line in lines(first)] == ["one"]
    assert [(line["process"], line["event"]) for line in lines(second)] == [("b", "two")]


def test_level_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_LOG_LEVEL", "WARNING")
    out = io.StringIO()
    configure("a", stream=out)
    structlog.get_logger().info("hidden")
    structlog.get_logger().warning("shown")
    assert [line["event"] for line in lines(out)] == ["shown"]


def test_standard_library_lines_have_the_same_form() -> None:
    out = io.StringIO()
    configure("prefill-0", json=True, stream=out)
    logging.getLogger("some.library").warning("disk %s is full", "sda", extra={"free": 0})
    logging.getLogger("transformers").info("hidden chatter")
    (line,) = lines(out)
    assert line["event"] == "disk sda is full"
    assert (line["level"], line["process"], line["free"]) == ("warning", "prefill-0", 0)


def test_warnings_become_lines() -> None:
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        configure("a", json=True, stream=out)
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    (line,) = lines(out)
    assert line["level"] == "warning"
    assert "old thing" in str(line["event"])


@pytest.mark.parametrize("as_json", [True, False])
def test_an_exception_is_logged_whole(as_json: bool) -> None:
    out = io.StringIO()
    configure("a", json=as_json, stream=out)
    try:
        raise ValueError("no such block")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "Traceback" in out.getvalue()
    assert "no such block" in out.getvalue()
    assert len(out.getvalue().splitlines()) == 1 or not as_json


def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="loud"):
        configure("a", level="loud")
    monkeypatch.setenv("DS_LOG_FORMAT", "xml")
    with pytest.raises(InvalidRequest, match="xml"):
        configure("a")
