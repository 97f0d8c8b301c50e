"""KV that relays keep while it decodes: an answer goes on at another instance where its first one died."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from dsrouter.request import Phase
from dswire.messages import client
from support.cluster import LEASE_S, Cluster, Shape
from support.raw_client import Heard

PROMPT = 21
TOKENS = 30
#: before the death
MADE = 9
KEEPS = Shape(decode=("n0", "n0"), keep_blocks=32)
SHAPES = {
    "one node": KEEPS,
    "one node, over TCP": replace(KEEPS, direct=False),
    "two nodes": replace(KEEPS, decode=("n1", "n1")),
    "another node": replace(KEEPS, decode=("n0", "n1")),
    "small steps": replace(KEEPS, decode_tokens=3, stages=2),
}


def decoding(shape: Shape, *, made: int = MADE) -> tuple[Cluster, Heard, str]:
    """A request that has made so many tokens, and the instance that decodes it."""
    cluster = Cluster(shape)
    heard = cluster.client().submit("t", PROMPT, max_tokens=TOKENS, ignore_eos=True)
    cluster.until(lambda: len(heard.tokens()) >= made)
    _, choice = cluster.router.flow.choices["t/0"]
    assert choice.decode is not None
    return cluster, heard, choice.decode


def read(cluster: Cluster) -> int:
    """Prompts that the prefill instance was given."""
    return sum("PrefillWork" in line for line in cluster.trace if "prefill-0/" in line)


def ends_well(cluster: Cluster, heard: Heard) -> client.Ledger:
    """Every token once, and nothing is held when a lease has passed; returns the ledger."""
    cluster.until(lambda: bool(heard.end))
    assert heard.end == "finished"
    assert heard.tokens() == cluster.script.output("t/0", TOKENS)
    assert not cluster.corrupt()
    cluster.run(LEASE_S + 1)
    assert cluster.held() == {}
    (end,) = [event for event in heard.events if isinstance(event, client.Finished)]
    return end.ledger


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_another_instance_goes_on_from_kept_kv(shape: Shape) -> None:
    cluster, heard, victim = decoding(shape)
    died_at = cluster.now
    cluster.kill(victim)
    cluster.until(lambda: len(heard.tokens()) > MADE + 1)
    resumed_after_s = cluster.now - died_at
    ledger = ends_well(cluster, heard)
    assert read(cluster) == 1
    assert ledger.retries == 1
    assert ledger.retry_s == 0
    assert 0 < ledger.resume_s < resumed_after_s + cluster.pace.step_s


def test_without_a_copy_the_prompt_is_read_again() -> None:
    cluster, heard, victim = decoding(replace(KEEPS, keep_blocks=0))
    cluster.kill(victim)
    ledger = ends_well(cluster, heard)
    assert read(cluster) == 2
    assert (ledger.retries, ledger.resume_s) == (1, 0)
    assert ledger.retry_s > 0


def test_a_copy_that_made_room_for_another_is_read_again() -> None:
    # room for the KV of one prompt
    cluster, heard, victim = decoding(replace(KEEPS, keep_blocks=7))
    other = cluster.client("other").submit("o", PROMPT, max_tokens=TOKENS, ignore_eos=True)
    cluster.until(lambda: list(cluster.relay().keeper.kept)[-1].sequence == "o/0" and len(other.tokens()) > 1)
    cluster.kill(victim)
    ledger = ends_well(cluster, heard)
    assert other.end == "finished"
    assert ledger.retry_s > 0
    assert read(cluster) == 3


def test_two_deaths_are_two_pauses() -> None:
    cluster, heard, victim = decoding(KEEPS)
    cluster.kill(victim)
    cluster.until(lambda: len(heard.tokens()) > MADE + 5)
    cluster.start(victim)
    second = cluster.router.flow.choices["t/0"][1].decode
    assert second not in (None, victim)
    cluster.kill(str(second))
    ledger = ends_well(cluster, heard)
    assert (read(cluster), ledger.retries) == (1, 2)


def test_it_waits_for_longer_than_a_lease_for_an_instance() -> None:
    cluster, heard, victim = decoding(replace(KEEPS, decode=("n0",)))
    cluster.kill(victim)
    cluster.run(2 * LEASE_S)
    cluster.start(victim)
    ledger = ends_well(cluster, heard)
    assert (read(cluster), ledger.retries) == (1, 1)
    assert ledger.resume_s > 2 * LEASE_S - 1


def test_the_second_instance_dies_while_it_pulls() -> None:
    cluster, heard, victim = decoding(replace(KEEPS, decode=("n0", "n0", "n0")))
    cluster.hold("copy")
    cluster.kill(victim)
    cluster.until(lambda: any(one.offers for one in cluster.relay().keeper.kept.values()))
    cluster.until(lambda: cluster.router.flow.choices["t/0"][1].life.phase is Phase.DECODING)
    second = cluster.router.flow.choices["t/0"][1].decode
    cluster.kill(str(second))
    cluster.release()
    ends_well(cluster, heard)
    assert read(cluster) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_relay_dies_too(when: str) -> None:
    cluster, heard, victim = decoding(KEEPS)
    if when == "before":
        cluster.restart("relay-n0")
        cluster.kill(victim)
    else:
        cluster.hold("copy")
        cluster.kill(victim)
        cluster.until(lambda: any(one.offers for one in cluster.relay().keeper.kept.values()))
        cluster.restart("relay-n0")
        cluster.release()
    ends_well(cluster, heard)


def test_the_word_to_the_relay_is_lost() -> None:
    cluster, heard, victim = decoding(KEEPS)
    cluster.kill(victim)
    cluster.until(lambda: cluster.router.flow.choices["t/0"][1].life.phase is Phase.PLACING)
    cluster.wires.reset("relay-n0", "router-0")
    ends_well(cluster, heard)


STANDS: dict[str, Callable[[Cluster], bool]] = {
    "asked": lambda cluster: cluster.router.flow.choices["t/0"][1].life.phase is Phase.PLACING,
    "offered": lambda cluster: any(one.offers for one in cluster.relay().keeper.kept.values()),
    "read on": lambda cluster: any(
        one.reading is not None
        for one in (*cluster.decode(0).sequences.values(), *cluster.decode(1).sequences.values())
    ),
}


@pytest.mark.parametrize("stands", STANDS.values(), ids=STANDS)
@pytest.mark.parametrize("shape", [KEEPS, SHAPES["two nodes"]], ids=["one node", "two nodes"])
def test_cancelled_while_it_resumes(shape: Shape, stands: Callable[[Cluster], bool]) -> None:
    cluster, heard, victim = decoding(shape)
    cluster.restart(victim)
    cluster.until(lambda: stands(cluster))
    cluster.client().cancel("t")
    cluster.until(lambda: bool(heard.end))
    assert heard.end == "cancelled"
    cluster.run(LEASE_S + 1)
    assert cluster.held() == {}


def test_a_copy_goes_with_its_request() -> None:
    cluster, heard, _ = decoding(KEEPS)
    relay = cluster.relay()
    assert [one.state for one in relay.keeper.listing(cluster.now)] == ["kept"]
    cluster.until(lambda: bool(heard.end))
    cluster.run(0.1)
    assert not relay.keeper.kept


def test_a_copy_lives_as_long_as_its_request() -> None:
    cluster = Cluster(KEEPS)
    cluster.hold("step")
    heard = cluster.client().submit("t", PROMPT, max_tokens=TOKENS, ignore_eos=True)
    cluster.until(lambda: cluster.relay().keeper.idle == 1)
    cluster.run(3 * LEASE_S)
    assert cluster.relay().keeper.idle == 1
    cluster.release()
    ends_well(cluster, heard)


def test_a_copy_whose_end_nobody_tells_goes_after_a_lease() -> None:
    cluster, _, _ = decoding(KEEPS)
    cluster.wires.cut("relay-n0", "router-0", 2 * LEASE_S)
    cluster.run(LEASE_S + 1)
    assert not cluster.relay().keeper.kept


def test_a_copy_does_not_outlive_the_router() -> None:
    cluster, _, _ = decoding(KEEPS)
    cluster.client().talking = False
    cluster.restart("router-0")
    cluster.run(LEASE_S + 1)
    assert cluster.held() == {}


def test_preempted_ones_go_on_from_kept_kv_too() -> None:
    cluster = Cluster(replace(KEEPS, decode=("n0",), decode_blocks=20))
    names = ("t", "u")
    heard = [cluster.client().submit(name, PROMPT, max_tokens=TOKENS, ignore_eos=True) for name in names]
    cluster.until(lambda: all(one.end for one in heard))
    assert any("Preempted" in line for line in cluster.trace)
    assert read(cluster) == 2
    for name, one in zip(names, heard, strict=True):
        assert one.tokens() == cluster.script.output(f"{name}/0", TOKENS)
    cluster.run(LEASE_S + 1)
    assert cluster.held() == {}


def test_wrong_kv_is_not_asked_for_twice() -> None:
    cluster, heard, victim = decoding(KEEPS)
    (kept,) = cluster.relay().keeper.kept.values()
    cluster.memory.write(kept.handle.shards[0].segment, kept.handle.blocks[1], (1, 2, 3))
    cluster.kill(victim)
    cluster.until(lambda: bool(heard.end))
    assert heard.end == "finished"
    assert heard.tokens() == cluster.script.output("t/0", TOKENS)
    assert read(cluster) == 2
    cluster.run(LEASE_S + 1)
    assert cluster.held() == {}
