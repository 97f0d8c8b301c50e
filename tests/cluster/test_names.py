"""Who may join: names that are taken, that are free again, versions and models that do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dskv.layout import KvLayout
from dswire.machine import Received, Send
from dswire.messages import PROTOCOL, worker
from support.cluster import MODEL, ROUTER, Cluster, Shape
from support.handles import LAYOUT

CAPACITY = worker.Capacity(8, LAYOUT)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_second_worker_of_a_live_name_is_refused_and_harms_nobody(name: str) -> None:
    cluster = Cluster(Shape(retries=0))
    heard = [cluster.client().submit(f"r{number}", 20, max_tokens=150) for number in range(3)]
    cluster.until(lambda: len(heard[0].tokens()) > 5)
    cluster.rival(name)
    more = [cluster.client().submit(f"s{number}", 20, max_tokens=20) for number in range(3)]
    cluster.until(lambda: bool(cluster.endings), 5)
    assert [(who, error.code) for who, error in cluster.endings] == [(name, "duplicate_name")]
    cluster.until(lambda: all(one.end for one in (*heard, *more)))
    assert {one.end for one in (*heard, *more)} == {"finished"}
    assert name in cluster.processes
    cluster.run(25)
    assert cluster.held() == {}


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "relay-n0"])
def test_a_name_is_free_as_soon_as_its_holder_is_dead(name: str) -> None:
    cluster = Cluster()
    cluster.kill(name)
    cluster.start(name)
    cluster.until(lambda: cluster.processes[name].ready, 3)
    assert not cluster.endings


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "relay-n0"])
def test_a_name_passes_on_when_its_holder_does_not_answer(name: str) -> None:
    cluster = Cluster()
    cluster.stall(name, 60)
    rival = cluster.rival(name)
    cluster.until(lambda: rival.ready, 3)
    assert not cluster.endings


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_holder_that_wakes_up_too_late_is_refused(name: str) -> None:
    cluster = Cluster()
    cluster.stall(name, 20)
    rival = cluster.rival(name)
    cluster.until(lambda: bool(cluster.endings), 30)
    assert [(who, error.code) for who, error in cluster.endings] == [(name, "duplicate_name")]
    assert rival.alive


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_of_another_model_is_refused(name: str) -> None:
    other = worker.ModelIdentity("tiny", "0" * 64, "float16")
    cluster = Cluster(replace(Shape(), models={name: other}), start=False)
    cluster.start(ROUTER)
    cluster.start(name)
    cluster.until(lambda: bool(cluster.endings), 1)
    assert [(who, error.code) for who, error in cluster.endings] == [(name, "model_mismatch")]
    assert "f" * 12 in cluster.endings[0][1].message


def hello(
    name: str = "prefill-0",
    role: str = "prefill",
    *,
    protocol: int = PROTOCOL,
    model: worker.ModelIdentity | None = MODEL,
    capacity: worker.Capacity | None = CAPACITY,
) -> worker.WorkerHello:
    return worker.WorkerHello(protocol, name, role, "n0", "x", model, capacity)


OTHER_LAYOUT = worker.Capacity(8, KvLayout(1, 1, 4, 32, "float16"))


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (hello(protocol=PROTOCOL + 1), "version_mismatch"),
        (hello("prefill-9"), "refused"),
        (hello("decode-0"), "refused"),
        (hello(model=None), "model_mismatch"),
        (hello(model=worker.ModelIdentity("tiny", "f" * 64, "float32")), "model_mismatch"),
        (hello(model=worker.ModelIdentity("tiny", "f" * 64, "float16", "int8")), "model_mismatch"),
        (hello(capacity=OTHER_LAYOUT), "refused"),
        (hello(capacity=None), "refused"),
        (hello(capacity=worker.Capacity(0, LAYOUT)), "refused"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(said: worker.WorkerHello, code: str) -> None:
    cluster = Cluster()
    cluster.kill("prefill-0")
    cluster.run(2)
    actions = cluster.router.handle(Received(cluster.now, "prefill-0/x", said))
    refusals = [one.message for one in actions if isinstance(one, Send) and one.peer == "prefill-0/x"]
    assert [one.error.code for one in refusals if isinstance(one, worker.WorkerRefused)] == [code]
    cluster.start("prefill-0")
    cluster.until(lambda: cluster.processes["prefill-0"].ready, 3)


def test_one_connection_has_one_name() -> None:
    cluster = Cluster(Shape(prefill=("n0", "n0")))
    cluster.kill("prefill-1")
    cluster.run(2)
    peer = f"prefill-0/{cluster.processes['prefill-0'].incarnation}"
    actions = cluster.router.handle(Received(cluster.now, peer, hello("prefill-1")))
    refusals = [one.message for one in actions if isinstance(one, Send)]
    assert [one.error.code for one in refusals if isinstance(one, worker.WorkerRefused)] == ["refused"]
    cluster.router.validate()
