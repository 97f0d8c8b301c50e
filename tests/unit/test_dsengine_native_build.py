"""Where kernels cannot be compiled the engine is told so in words, and goes on without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsengine.native.build import build
from dswire.errors import EngineFailed


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineFailed, match="no C\\+\\+ compiler"):
        build("float32")
    assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_hold_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file, not a directory")
    monkeypatch.setenv("DS_HOME", str(home))
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(EngineFailed, match="cannot hold compiled kernels"):
        build("float32")


def test_a_compiler_that_fails_leaves_nothing_to_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(EngineFailed, match="did not compile"):
        build("float32")
    assert not list(tmp_path.rglob("*.so"))
