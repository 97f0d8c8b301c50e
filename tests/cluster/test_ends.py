"""Cancel, disconnect and deadline at every stage: one end of the right kind, and nothing is held after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.cluster import LEASE_S, Cluster
from support.stages import BLOCKER, STAGES, TARGET, Stage

#: from the end of the work at hand until nothing is held, in seconds
BOUND_S = LEASE_S + 1.0


def _cancel(cluster: Cluster) -> None:
    cluster.client().cancel(TARGET)


def _leave(cluster: Cluster) -> None:
    cluster.client().leave()


def _fall_silent(cluster: Cluster) -> None:
    cluster.client().talking = False


def _vanish(cluster: Cluster) -> None:
    cluster.client().die()


@pytest.fixture(params=STAGES, ids=str)
def stage(request: pytest.FixtureRequest) -> Stage:
    assert isinstance(request.param, Stage)
    return request.param


def check_ended(cluster: Cluster, stage: Stage, code: str) -> None:
    """The target ended as ``code``, the blocker ends well, and nothing is held once the work at hand is done."""
    ended = dict(cluster.router.ended)
    assert ended == {code: 1}
    if stage.missing:
        cluster.start(stage.missing)
    cluster.release()
    cluster.run(BOUND_S)
    assert cluster.held() == {}
    assert not cluster.corrupt()
    if stage.blocked:
        blocker = cluster.client("other").requests[BLOCKER]
        assert blocker.finished.usage.completion_tokens == 12
        assert blocker.tokens() == cluster.script.output(f"{BLOCKER}/0", 12)
        assert blocker.finished.ledger.retries == 0


def ended(cluster: Cluster, *codes: str) -> Callable[[], bool]:
    return lambda: any(cluster.router.ended[code] for code in codes)


def test_cancel(stage: Stage) -> None:
    cluster, heard = stage.bring()
    _cancel(cluster)
    cluster.until(lambda: bool(heard.end), 1.0)
    assert heard.end == "cancelled"
    check_ended(cluster, stage, "cancelled")


@pytest.mark.parametrize("how", [_leave, _fall_silent, _vanish])
def test_disconnect(stage: Stage, how: Callable[[Cluster], None]) -> None:
    cluster, heard = stage.bring()
    how(cluster)
    cluster.until(ended(cluster, "cancelled"), cluster.shape.client_lease_s + 1.0)
    check_ended(cluster, stage, "cancelled")
    assert heard.end in ("", "cancelled")
    assert TARGET not in cluster.router.requests


def test_deadline(stage: Stage) -> None:
    cluster, heard = stage.bring(deadline_s=3.0)
    cluster.until(lambda: bool(heard.end), 4.0)
    assert heard.end == "deadline_exceeded"
    check_ended(cluster, stage, "deadline_exceeded")


def test_deadline_and_lease_in_one_tick(stage: Stage) -> None:
    """The router was stopped for so long that everything is due at once."""
    cluster, _ = stage.bring(deadline_s=3.0)
    _fall_silent(cluster)
    cluster.stall("router-0", cluster.shape.client_lease_s + 2.0)
    cluster.until(ended(cluster, "cancelled", "deadline_exceeded"), cluster.shape.client_lease_s + 3.0)
    assert cluster.router.ended.keys() <= {"cancelled", "deadline_exceeded"}
    cluster.release()
    cluster.run(3 * BOUND_S)
    assert set(cluster.held()) == set()


def test_left_alone_the_request_finishes(stage: Stage) -> None:
    cluster, heard = stage.bring()
    if stage.missing:
        cluster.start(stage.missing)
    cluster.release()
    cluster.until(lambda: bool(heard.end))
    assert heard.tokens() == cluster.script.output(f"{TARGET}/0", 12)
    assert heard.finish_reason() == "length"
    cluster.run(1)
    assert cluster.held() == {}
