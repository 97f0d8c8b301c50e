"""One registration: hellos until one is answered, and again after silence."""

from __future__ import annotations

import msgspec

from dswire.machine import Send
from dswire.membership import HELLO_RETRY_S, Membership


class Hello(msgspec.Struct):
    """Stands for a hello."""


def make() -> Membership:
    return Membership("them", Hello)


def test_a_hello_that_is_not_answered_is_due_again() -> None:
    side = make()
    assert side.hello(10.0) == [Send("them", Hello())]
    assert not side.joined
    assert side.deadline() == 10.0 + HELLO_RETRY_S
    assert not side.silent(11.9)
    assert side.silent(12.0)


def test_once_welcomed_the_lease_counts_from_the_last_sign_of_life() -> None:
    side = make()
    side.hello(10.0)
    side.welcomed(10.5, lease_s=5.0)
    assert side.joined
    assert side.deadline() == 15.5
    side.heard(14.0)
    assert side.deadline() == 19.0


def test_a_new_hello_means_not_registered() -> None:
    side = make()
    side.welcomed(10.0, lease_s=5.0)
    side.hello(20.0)
    assert not side.joined
    side.welcomed(20.1, lease_s=5.0)
    side.forget(21.0)
    assert not side.joined
    assert side.deadline() == 21.0 + HELLO_RETRY_S
