"""``dsctl kv ls`` and ``dsctl check`` beside real relays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dsctl.__main__ import dsctl
from dsctl.relays import ask
from dswire.errors import BadInput
from dswire.messages import PROTOCOL, kv
from support.handles import LAYOUT, whole
from support.kv_workers import PATIENCE_S
from support.relays import World, running

OFFERED = (1, 2, 3)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("DS_SHM_DIR", str(tmp_path))
    monkeypatch.setenv("DS_HOME", str(tmp_path))


@pytest.fixture(params=["shm", "tcp-pair"])
async def world(request: pytest.FixtureRequest, environment: None, tmp_path: Path) -> AsyncIterator[World]:
    async with running(str(request.param), tmp_path) as made:
        yield made


async def run(world: World, *arguments: str) -> Result:
    """The command in a thread: the relays run in this loop."""
    return await asyncio.to_thread(CliRunner().invoke, dsctl, [*arguments, "-f", str(world.topology.path)])


async def test_live_handles_are_listed(world: World) -> None:
    handle = world.prefill.offer("r1/0", OFFERED)
    await world.prefill.hello()
    listed = json.loads((await run(world, "kv", "ls", "--json")).stdout)
    assert [relay["node"] for relay in listed] == [relay.node for relay in world.topology.relays]
    (told,) = listed[0]["handles"]
    assert (told["key"], told["owner"], told["state"]) == (str(handle.key), "prefill-0", "ready")
    assert told["nbytes"] == len(OFFERED) * LAYOUT.block_nbytes
    shown = await run(world, "kv", "ls")
    assert "r1/0#0" in shown.stdout
    assert "ready" in shown.stdout
    world.prefill.send(kv.KvWithdraw(handle.key))
    await world.prefill.released(handle.key)
    assert "no live handles" in (await run(world, "kv", "ls")).stdout


async def test_paths_are_told_with_their_rate(world: World) -> None:
    prefill = world.prefill
    for path, reason in ((prefill.pool.path, ""), (prefill.pool.path.with_name("gone"), "cannot be mapped")):
        pool = kv.PoolInfo(LAYOUT, whole(str(path)), prefill.pool.slots)
        prefill.send(kv.KvHello(PROTOCOL, prefill.name, prefill.incarnation, pool))
        known = await proved(world, bool(reason))
        if len(world.relays) == 2:
            assert [(one.source, one.transport, one.reason) for one in known] == [("n0", "tcp", "")]
        else:
            assert [(one.source, one.transport) for one in known] == [("prefill-0", "shm")]
            assert reason in known[0].reason
        shown = await run(world, "check")
        assert (known[0].reason or "GB/s") in shown.stdout


@pytest.mark.parametrize("kind", ["gloo-self", "gloo-pair"])
async def test_communicators_are_told_with_their_rate(environment: None, tmp_path: Path, kind: str) -> None:
    async with running(kind, tmp_path) as world:
        prefill = world.prefill
        pool = kv.PoolInfo(LAYOUT, whole(str(prefill.pool.path)), prefill.pool.slots)
        prefill.send(kv.KvHello(PROTOCOL, prefill.name, prefill.incarnation, pool))
        (known,) = await proved(world, wrong=False)
        assert (known.source, known.transport, known.reason) == ("prefill-0", "gloo", "")
        assert "GB/s" in (await run(world, "check")).stdout


async def proved(world: World, wrong: bool) -> list[kv.PathInfo]:
    """The paths, once all are known as well as they will be."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answers = await asyncio.to_thread(ask, world.topology)
            known = [path for one in answers if one.listing for path in one.listing.paths]
            told = known and all(one.bytes_per_s or one.reason for one in known)
            if told and (len(world.relays) == 2 or bool(known[0].reason) == wrong):
                return known


async def test_a_relay_that_does_not_answer_is_told(environment: None, tmp_path: Path) -> None:
    async with running("shm", tmp_path) as world:
        pass
    for command in (("kv", "ls"), ("check",)):
        result = await run(world, *command)
        assert result.stdout.startswith("relay-n0 at ")
        assert "does not answer; see `dsctl status`" in result.stdout.replace("\n", " ")
        # what nobody has told is not known: neither that there are no handles, nor that no path was tried
        assert "no live handles" not in result.stdout
        assert "no path" not in result.stdout


def test_where_no_kv_moves_nobody_is_asked(environment: None, tmp_path: Path) -> None:
    from dstopology.load import load

    path = tmp_path / "t.yaml"
    path.write_text("model: tiny\nmode: colocated\nnodes: [{name: n0, host: 127.0.0.1, devices: [cpu:0]}]\n")
    with pytest.raises(BadInput, match="no KV moves in mode colocated"):
        ask(load(path))
