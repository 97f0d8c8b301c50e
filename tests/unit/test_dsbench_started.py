"""A system for the time of a measurement."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from dsbench.started import started
from dsctl import down
from dsctl.supervise import launch
from dsctl.supervise.rundir import RunDir


def test_what_was_started_is_stopped_when_the_measurement_is_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[Path] = []

    def stop(run: RunDir, timeout_s: float) -> None:
        stopped.append(run.path)

    plan = SimpleNamespace(topology=SimpleNamespace(run_dir=tmp_path))
    monkeypatch.setattr(launch, "prepare", lambda path, node: plan)
    monkeypatch.setattr(launch, "background", lambda *_: None)
    monkeypatch.setattr(down, "stop", stop)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), started(tmp_path / "t.yaml", Console()):
        signal.raise_signal(signal.SIGTERM)
    assert stopped == [tmp_path]
    assert signal.getsignal(signal.SIGTERM) == before
