"""What model.path may be, and that the store holds whole models only."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from dsengine import store
from dsengine.text import Text
from dswire.errors import Failed, ModelNotFound, UnsupportedModel
from support.tiny_gguf import write_gguf
from support.tokenizers_here import byte_level, save


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def fill(target: Path) -> None:
    (target / "config.json").write_text("{}")


def make(name: str = "m") -> Path:
    return store.install(name, source="here", sha256="0" * 64, build=fill)


def whole_model(path: Path) -> Path:
    save(path, byte_level())
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_known_model_that_was_not_pulled() -> None:
    with pytest.raises(ModelNotFound) as caught:
        store.resolve("smollm2-135m-instruct")
    assert caught.value.remedy == "run `dsctl model pull smollm2-135m-instruct`"


def test_known_model_that_was_pulled() -> None:
    made = make("smollm2-135m-instruct")
    assert store.resolve("smollm2-135m-instruct") == made


def test_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole_model(tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    assert store.resolve("some/model") == store.resolve(str(model)) == model


def test_local_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        store.resolve(str(tmp_path))


@pytest.mark.parametrize("model_path", ["nothing", "./not/here", "/not/here", "", "a/b/c", "not.gguf"])
def test_paths_that_mean_nothing(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        store.resolve(model_path)
    assert caught.value.remedy


def test_gguf_is_converted_once_for_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    made = store.resolve(str(source))
    assert Text(made).decode(Text(made).encode("hello")) == "hello"
    monkeypatch.setattr("dsengine.gguf.convert", None)
    shutil.copy(source, tmp_path / "copy.gguf")
    monkeypatch.chdir(tmp_path)
    assert store.resolve("copy.gguf") == store.resolve(str(source)) == made
    assert store.names() == [made.name]


def test_gguf_that_changed_is_another_model(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    first = store.resolve(str(write_gguf(source)))
    assert store.resolve(str(write_gguf(source, tied=True))) != first


def test_gguf_that_cannot_be_converted_leaves_nothing(tmp_path: Path, home: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    with pytest.raises(UnsupportedModel):
        store.resolve(str(tmp_path / "bad.gguf"))
    assert list((home / "models").iterdir()) == []


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelNotFound, match="some/model could not be fetched") as caught:
        store.resolve("some/model")
    assert "local directory" in caught.value.remedy
    assert "\n" not in caught.value.message


def test_hub_id_that_was_fetched_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    model = whole_model(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert store.resolve("some/model") == model


def test_install_makes_a_model_once(home: Path) -> None:
    made = make()
    assert made == home / "models" / "m" == store.installed("m")
    assert store.install("m", source="", sha256="", build=shutil.rmtree) == made
    assert store.names() == ["m"]


def test_failed_build_leaves_nothing(home: Path) -> None:
    def fail(target: Path) -> None:
        fill(target)
        raise UnsupportedModel("no")

    with pytest.raises(UnsupportedModel):
        store.install("m", source="", sha256="", build=fail)
    assert list((home / "models").iterdir()) == []
    assert store.installed("m") is None


def test_leavings_of_a_killed_process_are_cleared(home: Path) -> None:
    left = home / "models" / ".m.123.tmp"
    left.mkdir(parents=True)
    fill(left)
    make()
    assert [entry.name for entry in (home / "models").iterdir()] == ["m"]


def test_damaged_model_is_made_anew() -> None:
    made = make()
    (made / "config.json").write_text("cut")
    assert store.installed("m") is None
    assert store.names() == []
    assert store.installed(make().name) == made


@pytest.mark.parametrize("manifest", ["", "{}", '{"source": "", "sha256": "", "converter": 0, "files": {}}'])
def test_model_of_another_making_is_made_anew(manifest: str) -> None:
    made = make()
    (made / "distserve.json").write_text(manifest)
    assert store.installed("m") is None
    assert store.installed(make().name) == made


def test_many_at_once_make_it_once() -> None:
    builds: list[str] = []
    found: list[Path] = []

    def build(target: Path) -> None:
        builds.append(target.name)
        for thread in others:
            thread.start()
        fill(target)

    def ask() -> None:
        found.append(make())

    others = [threading.Thread(target=ask) for _ in range(4)]
    made = store.install("m", source="here", sha256="0" * 64, build=build)
    for thread in others:
        thread.join(60)
    assert found == [made] * 4
    assert len(builds) == 1


def test_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DS_HOME", str(tmp_path / "file"))
    with pytest.raises(Failed, match="could not be stored") as caught:
        make()
    assert "DS_HOME" in caught.value.remedy
    with pytest.raises(Failed, match="could not be stored"):
        store.resolve(str(write_gguf(tmp_path / "tiny.gguf")))
