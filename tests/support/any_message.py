"""A hypothesis strategy for any message of the system, read off its type."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from dswire.codec import MAX_BIN_NBYTES

#: whole characters: half a surrogate pair cannot be written as UTF-8
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INTEGERS = st.integers(-(2**63), 2**64 - 1)
FLOATS = st.floats(allow_nan=False)


def any_message(struct: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Instances of ``struct``."""
    return _of(inspect.type_info(struct))


def _of(kind: inspect.Type) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: _of(field.type) for field in fields})
        case inspect.UnionType(types=types):
            return st.one_of(*map(_of, types))
        case inspect.VarTupleType(item_type=item):
            return st.lists(_of(item), max_size=3).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(_of, items))
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_of(key), _of(value), max_size=3)
    return _plain(kind)


def _plain(kind: inspect.Type) -> st.SearchStrategy[Any]:
    plain = {
        inspect.StrType: TEXT,
        inspect.BytesType: st.binary(max_size=MAX_BIN_NBYTES),
        inspect.IntType: INTEGERS,
        inspect.FloatType: FLOATS,
        inspect.BoolType: st.booleans(),
        inspect.NoneType: st.none(),
    }
    return plain[type(kind)]
