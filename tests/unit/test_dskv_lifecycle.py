"""Every way through the life of an offered handle."""

from __future__ import annotations

import pytest

from dskv.lifecycle import GRACE_S, TRANSITIONS, HandlePhase, OfferedHandle
from dswire.lifecycle import IllegalTransition
from support.handles import make_handle

LEASE_S = 30.0


@pytest.fixture
def held() -> OfferedHandle:
    return OfferedHandle(make_handle(), 100.0, LEASE_S)


def test_pulled(held: OfferedHandle) -> None:
    held.pull(110.0, "decode-0")
    assert (held.phase, held.reader, held.deadline) == (HandlePhase.PULLING, "decode-0", 130.0)
    held.read_ended(111.0, "pulled")
    assert (held.phase, held.reason, held.reader) == (HandlePhase.RELEASED, "pulled", None)
    assert held.ended


def test_withdrawn_while_nobody_reads(held: OfferedHandle) -> None:
    held.withdraw(101.0)
    assert (held.phase, held.reason) == (HandlePhase.RELEASED, "withdrawn")


def test_withdrawn_while_read_waits_for_the_reader(held: OfferedHandle) -> None:
    held.pull(101.0, "decode-0")
    held.withdraw(102.0)
    held.withdraw(103.0)
    assert (held.phase, held.reader, held.deadline) == (HandlePhase.QUARANTINED, "decode-0", 132.0)
    assert not held.ended
    held.read_ended(104.0, "pulled")
    assert (held.phase, held.reason) == (HandlePhase.RELEASED, "withdrawn")


def test_a_quarantine_cannot_be_extended(held: OfferedHandle) -> None:
    held.pull(101.0, "decode-0")
    held.withdraw(102.0)
    held.extend(120.0)
    held.lease_over(132.0)
    assert (held.phase, held.reason) == (HandlePhase.RELEASED, "withdrawn")


def test_expired(held: OfferedHandle) -> None:
    held.extend(120.0)
    assert held.deadline == 150.0
    held.lease_over(150.0)
    assert (held.phase, held.reason) == (HandlePhase.EXPIRED, "expired")


def test_expired_while_read_has_a_hard_bound(held: OfferedHandle) -> None:
    held.pull(101.0, "decode-0")
    held.lease_over(130.0)
    assert (held.phase, held.deadline) == (HandlePhase.QUARANTINED, 130.0 + GRACE_S)
    held.lease_over(130.5)
    assert (held.phase, held.reason) == (HandlePhase.RELEASED, "expired")


def test_an_illegal_step_tells_the_story(held: OfferedHandle) -> None:
    held.pull(101.0, "decode-0")
    with pytest.raises(IllegalTransition, match=r"PULLING -> PULLING.*READY \(new\).*pulled by decode-0"):
        held.pull(102.0, "decode-1")


def test_the_table_is_whole() -> None:
    assert set(TRANSITIONS) == set(HandlePhase)
    reachable = {HandlePhase.READY}.union(*TRANSITIONS.values())
    assert reachable == set(HandlePhase)
