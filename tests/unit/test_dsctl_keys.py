"""``dsctl keys``."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsctl.__main__ import run
from dswire import keys
from dswire.errors import BadInput


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A key directory with the system's keys, found through the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DS_TOPOLOGY", raising=False)
    monkeypatch.setenv("DS_KEYS_DIR", str(tmp_path / "home"))
    assert run(["keys", "make"]) == 0
    capsys.readouterr()
    return tmp_path / "home"


def test_make_never_overwrites(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = keys.load_system(home)
    assert run(["keys", "make"]) == BadInput.exit_code
    assert "exists already" in capsys.readouterr().err
    assert keys.load_system(home) == before


def test_a_clients_directory_is_all_it_needs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "make", "--client", "anna"]) == 0
    assert "--keys anna-keys" in capsys.readouterr().out
    own = keys.load_any(Path("anna-keys"))
    assert own.server == keys.load_system(home).public
    assert keys.allowed(home) == {"anna": own.public}
    assert run(["keys", "make", "--client", "anna", "--out", "again"]) == BadInput.exit_code
    assert not Path("again").exists()


def test_allow_takes_a_key_or_its_file_and_revoke_takes_it_back(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = keys.write_pair(tmp_path / "bob.key", tmp_path / "bob.pub")
    assert run(["keys", "allow", "bob", str(tmp_path / "bob.pub")]) == 0
    assert run(["keys", "allow", "bobs-laptop", public.decode()]) == 0
    assert keys.allowed(home) == {"bob": public, "bobs-laptop": public}
    capsys.readouterr()
    assert run(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert keys.load_system(home).public.decode() in listed
    assert listed.count(public.decode()) == 2
    assert run(["keys", "revoke", "bob"]) == 0
    assert run(["keys", "revoke", "bob"]) == BadInput.exit_code
    assert keys.allowed(home) == {"bobs-laptop": public}


def test_a_key_that_begins_with_a_dash_is_no_option(home: Path) -> None:
    key = "->O(Sg[<6kqbT5+x#WzD3zM<pW-w@]{46v<Sld<+"
    assert run(["keys", "allow", "bob", key, "--dir", str(home)]) == 0
    assert keys.allowed(home) == {"bob": key.encode()}


@pytest.mark.parametrize("name", ["", "../system", ".hidden", "a/b", "x" * 65, "ä"])
def test_names_are_names_not_paths(home: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "allow", name, "x" * 40]) == BadInput.exit_code
    told = capsys.readouterr().err
    assert "cannot be called that" in told
    assert "remedy: give 1 to 64" in told


def test_what_is_no_key_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "allow", "bob", "nonsense"]) == BadInput.exit_code
    told = capsys.readouterr().err
    assert "'nonsense': is no Z85 key" in told
    assert "the file that holds it" in told
    assert keys.allowed(home) == {}


def test_a_topology_may_have_keys_of_its_own(home: Path, tmp_path: Path) -> None:
    topology = tmp_path / "own.yaml"
    topology.write_text("model: toy\nsecurity: {curve: on, keys: own-keys}\n")
    assert run(["keys", "make", "-f", str(topology)]) == 0
    assert keys.load_system(tmp_path / "own-keys") != keys.load_system(home)


def test_without_the_systems_keys_nothing_can_be_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "list", "--dir", str(tmp_path / "empty")]) == BadInput.exit_code
    assert "dsctl keys make" in capsys.readouterr().err
