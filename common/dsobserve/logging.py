"""Set up logging, once per process.

Job: every line goes to stderr with the fields ``time`` (UTC, milliseconds), ``level``, ``process`` and
``event``, as JSON or, on a terminal, coloured text. The standard library's loggers (transformers, asyncio,
warnings) end in the same place in the same form.

Invariants: :func:`configure` may be called again and then replaces what it did before; nothing is ever written
to stdout, which belongs to a command's answer. Prompts and outputs are never logged: callers log ids, counts and
times.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import structlog
from structlog.typing import Processor

from dswire.errors import InvalidRequest

LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("json", "console")

#: libraries whose INFO is of use to their own authors only
QUIET = ("asyncio", "filelock", "httpcore", "httpx", "huggingface_hub", "torch", "transformers", "urllib3")

Event = MutableMapping[str, Any]


def configure(
    process: str, *, json: bool | None = None, level: str | None = None, stream: TextIO | None = None
) -> None:
    """Log to ``stream`` (stderr) under the name ``process``.

    ``json`` left out: ``DS_LOG_FORMAT`` (``json`` or ``console``) decides, else text on a terminal and JSON
    elsewhere. ``level`` left out: ``DS_LOG_LEVEL``, else ``info``. Raises :class:`InvalidRequest` for a value that
    is neither.
    """
    out = sys.stderr if stream is None else stream
    number = _level(level)
    as_json = _is_json(out) if json is None else json
    shared = _shared(process)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=_rendering(as_json=as_json, colors=out.isatty()),
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    logging.captureWarnings(True)


def _shared(process: str) -> list[Processor]:
    """What is done to an event of structlog and of the standard library alike."""

    def add_process(_logger: object, _method: str, event: Event) -> Event:
        event.setdefault("process", process)
        return event

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        add_process,
        _add_time,
        structlog.processors.StackInfoRenderer(),
    ]


def _rendering(*, as_json: bool, colors: bool) -> list[Processor]:
    first: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if as_json:
        return [*first, structlog.processors.format_exc_info, _in_order, structlog.processors.JSONRenderer()]
    console = structlog.dev.ConsoleRenderer(
        colors=colors, timestamp_key="time", exception_formatter=structlog.dev.plain_traceback
    )
    return [*first, console]


def _add_time(_logger: object, _method: str, event: Event) -> Event:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    event["time"] = now.replace("+00:00", "Z")
    return event


def _in_order(_logger: object, _method: str, event: Event) -> Event:
    """The four fields every line has come first: a person reads these lines too."""
    first = {key: event[key] for key in ("time", "level", "process", "event") if key in event}
    return {**first, **{key: value for key, value in event.items() if key not in first}}


def _is_json(out: TextIO) -> bool:
    wanted = os.environ.get("DS_LOG_FORMAT", "").lower()
    if not wanted:
        return not out.isatty()
    if wanted not in FORMATS:
        raise InvalidRequest(f"DS_LOG_FORMAT is {wanted!r}", remedy=f"set it to {' or '.join(FORMATS)}")
    return wanted == "json"


def _level(level: str | None) -> int:
    wanted = (level or os.environ.get("DS_LOG_LEVEL") or "info").lower()
    if wanted not in LEVELS:
        raise InvalidRequest(
            f"the log level is {wanted!r}", remedy=f"set DS_LOG_LEVEL to one of {', '.join(LEVELS)}"
        )
    return logging.getLevelNamesMapping()[wanted.upper()]
