"""What is compiled for a host: why it cannot be is told in words, and nothing is left behind then."""

from __future__ import annotations

from pathlib import Path

import pytest

from dshost.library import build, compiler, load
from dswire.errors import Failed


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "one.cpp"
    path.parent.mkdir()
    path.write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    path.with_suffix(".h").write_text("#define ONE 1\n")
    return path


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path) -> None:
    monkeypatch.setenv("DS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Failed, match="no C\\+\\+ compiler"):
        build("one", source, [])
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_hold_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file, not a directory")
    monkeypatch.setenv("DS_HOME", str(home))
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(Failed, match="cannot hold compiled libraries"):
        build("one", source, [])


def test_a_compiler_that_fails_leaves_nothing_to_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path
) -> None:
    monkeypatch.setenv("DS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(Failed, match="did not compile"):
        build("one", source, [])
    assert not list(tmp_path.rglob("*.so"))


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"")
    with pytest.raises(Failed, match=r"broken\.so cannot be loaded") as caught:
        load(broken)
    assert caught.value.remedy == f"remove {broken}"


def test_compiled_once_and_again_when_a_header_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path
) -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("DS_HOME", str(tmp_path / "home"))
    first = build("one", source, [])
    made = first.stat().st_mtime_ns
    assert build("one", source, []) == first
    assert first.stat().st_mtime_ns == made
    assert load(first).one() == 1
    source.with_suffix(".h").write_text("#define ONE 2\n")
    assert load(build("one", source, [])).one() == 2
