"""Every process killed at every stage: each request ends once, with the right tokens or with a typed error."""

from __future__ import annotations

import pytest

from support.cluster import LEASE_S, ROUTER, Cluster
from support.stages import STAGES, Stage

#: codes that a client may see when a process died
TYPED = {"worker_lost", "transfer_failed", "unknown_request", "no_instance"}
#: how long the longest chain of time limits may take
ENDS_WITHIN_S = 45.0
#: nothing is held for longer after whatever happened
BOUND_S = LEASE_S + 1.0


def _victims(stage: Stage) -> list[str]:
    return [name for name in (*stage.shape.roles, ROUTER) if name != stage.missing]


CASES = [(stage, victim) for stage in STAGES for victim in _victims(stage)]
every_case = pytest.mark.parametrize(
    ("stage", "victim"), CASES, ids=[f"{stage}-{victim}" for stage, victim in CASES]
)
every_stage = pytest.mark.parametrize("stage", STAGES, ids=str)


def check_end(cluster: Cluster, stage: Stage) -> None:
    """All requests have ended well, or typed and for a reason; nothing is held."""
    if stage.missing and stage.missing not in cluster.processes:
        cluster.start(stage.missing)
    heard = [one for each in cluster.clients.values() for one in each.requests.values()]
    cluster.until(lambda: all(one.end for one in heard), ENDS_WITHIN_S)
    for one in heard:
        assert one.end == "finished" or one.end in TYPED
        tokens = one.tokens()
        assert tokens == cluster.script.output(f"{one.submit.request_id}/0", len(tokens))
        if one.end == "finished":
            assert len(tokens) == 12
    cluster.run(BOUND_S)
    assert cluster.held() == {}
    assert not cluster.corrupt()


@every_case
@pytest.mark.parametrize("away_s", [0.0, 3.0, 12.0])
def test_killed_and_started_again(stage: Stage, victim: str, away_s: float) -> None:
    cluster, heard = stage.bring()
    cluster.kill(victim)
    cluster.release()
    cluster.run(away_s)
    cluster.start(victim)
    check_end(cluster, stage)
    if victim != ROUTER:
        assert heard.end == "finished"


@every_case
def test_killed_and_started_again_while_the_others_work_on(stage: Stage, victim: str) -> None:
    cluster, heard = stage.bring()
    cluster.restart(victim)
    cluster.run(0.5)
    cluster.release()
    check_end(cluster, stage)
    if victim != ROUTER:
        assert heard.end == "finished"


@every_case
def test_killed_for_good(stage: Stage, victim: str) -> None:
    cluster, heard = stage.bring(deadline_s=40.0)
    cluster.release()
    cluster.kill(victim)
    if victim == ROUTER:
        # nobody is left to tell the client; what its own side does then is the client's business
        cluster.run(LEASE_S)
    else:
        cluster.until(lambda: bool(heard.end), 41.0)
        assert heard.end in ("finished", "no_instance", "deadline_exceeded", "transfer_failed")
    for name, other in cluster.clients.items():
        for request_id in other.requests:
            cluster.client(name).cancel(request_id)
    cluster.run(BOUND_S)
    assert cluster.held() == {}


@every_stage
def test_orderly_stop_of_a_worker(stage: Stage) -> None:
    cluster, _ = stage.bring()
    name = "prefill-0" if "prefill-0" in stage.shape.roles else "decode-0"
    cluster.stop(name)
    cluster.release()
    cluster.run(0.5)
    cluster.start(name)
    check_end(cluster, stage)
