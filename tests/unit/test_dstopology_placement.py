"""Who gets which device."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dstopology.placement import Placed, WorkerRole, place
from dstopology.problems import Problems
from dstopology.resolved import Node
from dstopology.schema import DecodeSection, GroupSection, PrefillSection


def nodes(*devices: int) -> list[Node]:
    return [
        Node(f"n{index}", "127.0.0.1", "127.0.0.1", tuple(f"cpu:{number}" for number in range(count)))
        for index, count in enumerate(devices)
    ]


def placed(prefill: dict[str, Any], decode: dict[str, Any], hosts: list[Node]) -> tuple[tuple[Placed, ...], int]:
    problems = Problems("t.yaml")
    groups: dict[WorkerRole, GroupSection] = {
        "prefill": PrefillSection(**prefill),
        "decode": DecodeSection(**decode),
    }
    return place(groups, hosts, problems), len(problems)


def test_each_role_goes_round_the_nodes_from_the_first() -> None:
    found, problems = placed({"replicas": 2}, {"replicas": 2}, nodes(2, 2))
    assert problems == 0
    assert [(one.name, one.node, one.devices) for one in found] == [
        ("prefill-0", "n0", ("cpu:0",)),
        ("prefill-1", "n1", ("cpu:0",)),
        ("decode-0", "n0", ("cpu:1",)),
        ("decode-1", "n1", ("cpu:1",)),
    ]


def test_explicit_places_are_kept_free_for_their_owners() -> None:
    found, problems = placed({"replicas": 1}, {"place": ("n0/cpu:0",)}, nodes(2))
    assert problems == 0
    assert [(one.name, one.devices) for one in found] == [("prefill-0", ("cpu:1",)), ("decode-0", ("cpu:0",))]


def test_ranks_share_a_node() -> None:
    found, problems = placed({"tp": 2}, {"tp": 2}, nodes(3, 2))
    assert problems == 0
    assert [(one.node, len(one.devices)) for one in found] == [("n0", 2), ("n1", 2)]
    assert placed({"tp": 2}, {"tp": 2}, nodes(3, 1))[1] == 1


@given(
    replicas=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    devices=st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
def test_automatic_places_never_share_a_device(
    replicas: tuple[int, int], ranks: tuple[int, int], devices: list[int]
) -> None:
    sections: list[dict[str, Any]] = [
        {"replicas": count, "tp": tp} for count, tp in zip(replicas, ranks, strict=True)
    ]
    hosts = nodes(*devices)
    found, problems = placed(dict(sections[0]), dict(sections[1]), hosts)
    used = [(one.node, device) for one in found for device in one.devices]
    assert len(used) == len(set(used))
    assert set(used) <= {(node.name, device) for node in hosts for device in node.devices}
    assert (problems == 0) == (len(found) == sum(replicas))
    if ranks == (1, 1):
        assert (problems == 0) == (sum(devices) >= sum(replicas))
