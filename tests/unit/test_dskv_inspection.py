"""Handles that cannot be are told before anything is computed with them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from dskv.inspection import inspect
from dskv.shards import KvShard, shards
from dswire.errors import ProtocolError
from support.handles import LAYOUT, make_handle


def test_a_good_handle_passes() -> None:
    inspect(make_handle())


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_a_handle_of_any_parallelism_passes(tp: int, pp: int) -> None:
    inspect(msgspec.structs.replace(make_handle(), shards=shards(LAYOUT, tp, pp, ["f"] * (tp * pp))))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layout": msgspec.structs.replace(LAYOUT, dtype="int4")}, "no dtype"),
        ({"layout": msgspec.structs.replace(LAYOUT, layers=0)}, "cannot be"),
        ({"layout": msgspec.structs.replace(LAYOUT, layers=1 << 60)}, "cannot be"),
        ({"tokens": 0}, "are not what 0 tokens take"),
        ({"tokens": 13}, "are not what 13 tokens take"),
        ({"blocks": ()}, "are not what"),
        ({"blocks": (0, 1, 16)}, "outside a pool of 16"),
        ({"blocks": (0, -1, 2)}, "outside a pool of 16"),
        ({"shards": ()}, "not all layers and heads"),
        ({"shards": shards(LAYOUT, 2, 2, "abcd")[1:]}, "not all layers and heads"),
        ({"shards": (KvShard("a", 0, 2, 0, 1), KvShard("b", 0, 2, 0, 2))}, "each once"),
        ({"shards": (KvShard("a", 0, 2, 0, 3),)}, "that are none"),
        ({"shards": shards(LAYOUT, 1, 1, "a") * 257}, "257 shards"),
    ],
)
def test_a_handle_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        inspect(msgspec.structs.replace(make_handle(), **changes))
