"""When KV goes from GPU to GPU, and why not where it is forced and cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.topologies import Desk

GPUS = "model: m\nnodes: [{name: g, devices: [cuda:0, cuda:1, cuda:2, cuda:3]}]\n"
MIXED = "model: m\nnodes: [{name: g, devices: [cuda:0, cpu:0]}]\n"
TWO_NODES = (
    "model: m\nrouter: {node: a}\n"
    "nodes: [{name: a, host: 10.0.0.1, devices: [cuda:0]}, {name: b, host: 10.0.0.2, devices: [cuda:0]}]\n"
)

#: what keeps it from doing so, and what the refusal says
OBSTACLES = [
    (MIXED, "on cpu:0"),
    (TWO_NODES, "another node"),
    (GPUS + "decode: {tp: 2}\n", "decode-0 has 2 ranks"),
    (GPUS + "decode: {kv: {block_size: 32}}\n", "blocks of different sizes"),
    (GPUS + "relay: {keep: 1GiB}\n", "lies in the host's memory"),
]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_gpus_of_one_host(desk: Desk) -> None:
    for forced in ("", "force_transport: cuda_ipc\n"):
        topology = desk.load(GPUS + forced)
        assert topology.between_gpus
        assert topology.transport("g", "g") == "cuda_ipc"
        assert topology.relays[0].data_bind is None
        assert not topology.sources_of("g")


@pytest.mark.parametrize(
    "other", ["force_transport: shm\n", "force_transport: tcp\n", "relay: {transports: [shm]}\n"]
)
def test_another_way_is_wanted(desk: Desk, other: str) -> None:
    topology = desk.load(GPUS + other)
    assert not topology.between_gpus
    assert topology.transport("g", "g") == ("tcp" if "tcp" in other else "shm")


def test_nothing_is_handed_over(desk: Desk) -> None:
    assert not desk.load(GPUS + "mode: colocated\n").between_gpus


@pytest.mark.parametrize(("text", "_"), OBSTACLES)
def test_whoever_cannot_goes_by_the_hosts_memory(desk: Desk, text: str, _: str) -> None:
    assert not desk.load(text).between_gpus


@pytest.mark.parametrize(("text", "reason"), OBSTACLES)
def test_what_is_forced_and_cannot_be_is_refused(desk: Desk, text: str, reason: str) -> None:
    (found,) = desk.problems(text + "force_transport: cuda_ipc\n")
    assert "force_transport: cuda_ipc goes between GPUs of one host" in found
    assert reason in found
