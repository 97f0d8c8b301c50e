"""Ports that nobody listens on."""

from __future__ import annotations

import random
import socket

import pytest

from dstopology.endpoints import free_ports


def test_free_ports_lie_below_those_of_connections_and_skip_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_ports(5)
    assert 10_240 <= first < first + 5 <= 32_768
    draws = iter([first, first + 1, first + 2])
    with socket.create_server(("127.0.0.1", first + 1)):
        monkeypatch.setattr(random, "randrange", lambda low, high: next(draws))
        assert free_ports(2) == first + 2
