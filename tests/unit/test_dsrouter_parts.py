"""KV in parts at the router machine: the decode instance is chosen while the prompt is still read."""

from __future__ import annotations

import pytest

from dskv.handle import KvHandle, KvKey
from dskv.shards import shards
from dswire.errors import EngineFailed
from dswire.machine import PeerLost
from dswire.messages import client, worker
from support.handles import LAYOUT
from support.router_desk import CLIENT, Desk

PROMPT = tuple(range(10))


@pytest.fixture
def desk() -> Desk:
    return Desk().join("prefill-0", "decode-0")


def begun(desk: Desk) -> KvKey:
    """A prompt of ten tokens is being read."""
    desk.submit(tokens=10)
    (work,) = desk.told("prefill-0", worker.PrefillWork)
    return work.key


def sealed(desk: Desk, key: KvKey, part: int, start: int, end: int) -> KvHandle:
    blocks = tuple(range(start // LAYOUT.block_size, LAYOUT.blocks_for(end)))
    name, pool = KvKey(key.sequence, key.epoch, part), shards(LAYOUT, 1, 1, ["/pool"])
    handle = KvHandle(name, "prefill-0", "n0", LAYOUT, end - start, blocks, pool, 16, 99, start)
    desk.say("prefill-0", worker.KvSealed(handle))
    return handle


def placed(desk: Desk) -> list[tuple[KvHandle, tuple[int, ...], tuple[int, ...]]]:
    """What decode-0 was given."""
    return [(one.handle, one.prompt_ids, one.output_ids) for one in desk.told("decode-0", worker.DecodeWork)]


def test_parts_go_to_one_instance_and_the_token_goes_with_the_last(desk: Desk) -> None:
    desk.join("decode-1")
    key = begun(desk)
    first = sealed(desk, key, 1, 0, 4)
    assert placed(desk) == [(first, PROMPT, ())]
    second = sealed(desk, key, 2, 4, 8)
    assert desk.told("decode-0", worker.DecodeMore) == [worker.DecodeMore(second)]
    desk.say("prefill-0", worker.PrefillDone(key, 7, 0.0, 0.0))
    last = sealed(desk, key, 0, 8, 10)
    assert desk.told("decode-0", worker.DecodeMore) == [worker.DecodeMore(last, (7,))]
    stages = worker.DecodeStages(0.0, 0.0, 0.0, 0.0, 0.5)
    desk.say("decode-0", worker.StepDone((worker.TokenMade(key, 1, 8, None, "", stages),)))
    desk.say("decode-0", worker.StepDone((worker.TokenMade(key, 2, 8, None, "stop"),)))
    (end,) = desk.told(CLIENT, client.Finished)
    assert end.ledger.transfer_hidden_s == 0.5


def test_while_nobody_can_take_them_parts_wait_for_all(desk: Desk) -> None:
    desk.feed(PeerLost(desk.now, "decode-0"))
    key = begun(desk)
    parts = [sealed(desk, key, 1, 0, 4), sealed(desk, key, 2, 4, 8)]
    desk.say("prefill-0", worker.PrefillDone(key, 7, 0.0, 0.0))
    last = sealed(desk, key, 0, 8, 10)
    desk.join("decode-0")
    assert placed(desk) == [(parts[0], PROMPT, ())]
    more = [worker.DecodeMore(parts[1]), worker.DecodeMore(last, (7,))]
    assert desk.told("decode-0", worker.DecodeMore) == more


def test_an_instance_that_dies_with_a_part_costs_a_new_attempt(desk: Desk) -> None:
    key = begun(desk)
    sealed(desk, key, 1, 0, 4)
    desk.feed(PeerLost(desk.now, "decode-0"))
    assert desk.told("prefill-0", worker.Abort) == [worker.Abort(key)]
    (again,) = desk.told("prefill-0", worker.PrefillWork)
    assert again.key.epoch > key.epoch
    # what is late is of an attempt that is over
    sealed(desk, key, 2, 4, 8)
    assert desk.state.flow.choices[key.sequence][1].parts == []


@pytest.mark.parametrize("last", ["failed", "finished"])
def test_who_has_parts_hears_that_no_more_come(desk: Desk, last: str) -> None:
    key = begun(desk)
    sealed(desk, key, 1, 0, 4)
    if last == "failed":
        desk.say("prefill-0", worker.SequenceFailed(key, EngineFailed("NaN").info()))
    else:
        desk.say("prefill-0", worker.PrefillDone(key, 7, 0.0, 0.0, None, "stop"))
    assert desk.told("decode-0", worker.Abort) == [worker.Abort(key)]


def test_those_that_are_read_already_are_placed_first(desk: Desk) -> None:
    desk.feed(PeerLost(desk.now, "decode-0"))
    waits = begun(desk)
    desk.prefilled(waits)
    desk.submit("s", tokens=10)
    (work,) = desk.told("prefill-0", worker.PrefillWork)
    part = sealed(desk, work.key, 1, 0, 4)
    desk.join("decode-0")
    assert [handle.key for handle, _, _ in placed(desk)] == [waits]
    more = sealed(desk, work.key, 2, 4, 8)
    assert placed(desk) == [(part, PROMPT, ())]
    assert desk.told("decode-0", worker.DecodeMore) == [worker.DecodeMore(more)]
