"""Where things that are made once are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from dshost.home import home


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"DS_HOME": "/there", "XDG_CACHE_HOME": "/caches"}, "/there"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/distserve"),
    ],
)
def test_home(env: dict[str, str], expected: str) -> None:
    assert home(env) == Path(expected)


def test_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    assert home({}) == Path("/me/.cache/distserve")
