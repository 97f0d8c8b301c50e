"""The structures of ``model.h`` and its neighbours, field by field.

Invariant: sizes equal those of the compiled library (:mod:`dsengine.native.library` checks it at load).
"""

from __future__ import annotations

from ctypes import CFUNCTYPE, Structure, c_double, c_float, c_int32, c_int64, c_void_p

#: adds up all ranks' shares of ``count`` float32 at an address, in their place
Reduce = CFUNCTYPE(None, c_void_p, c_int64)


class CNorm(Structure):
    """``weight`` null: no norm; ``bias`` null: root mean square norm. Both float32."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class CLinear(Structure):
    """Packed weights; ``bias`` float32, padded to whole panels, or null; ``first_group`` 0: they are not int8."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("in_", c_int32),
        ("out", c_int32),
        ("first_group", c_int32),
        ("reserved", c_int32),
    )


class CShape(Structure):
    """Heads of the attention."""

    _fields_ = (
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    )


class CPool(Structure):
    """The KV pool."""

    _fields_ = (("base", c_void_p), ("block_nbytes", c_int64), ("block_size", c_int32))


class CExpert(Structure):
    """A gated MLP."""

    _fields_ = (("gate", CLinear), ("up", CLinear), ("down", CLinear))


class CExperts(Structure):
    """A mixture of them; ``shared_gate.panels`` null: no expert that all rows go to."""

    _fields_ = (
        ("router", CLinear),
        ("shared_gate", CLinear),
        ("shared", CExpert),
        ("each", c_void_p),
        ("count", c_int32),
        ("per_token", c_int32),
        ("renormalise", c_int32),
        ("reserved", c_int32),
    )


class CLayer(Structure):
    """One layer; ``gate.panels`` null: a plain MLP; ``cos`` null: no rotary embedding; ``experts`` null: an MLP;
    ``window`` 0: none."""

    _fields_ = (
        ("before_attention", CNorm),
        ("after_attention", CNorm),
        ("before_mlp", CNorm),
        ("after_mlp", CNorm),
        ("q_norm", CNorm),
        ("k_norm", CNorm),
        ("qkv", CLinear),
        ("attention_out", CLinear),
        ("gate", CLinear),
        ("up", CLinear),
        ("down", CLinear),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("experts", c_void_p),
        ("window", c_int32),
        ("reserved", c_int32),
    )


class CModel(Structure):
    """Everything but the pool."""

    _fields_ = (
        ("layers", c_int32),
        ("hidden", c_int32),
        ("mlp", c_int32),
        ("vocab", c_int32),
        ("rotary", c_int32),
        ("activation", c_int32),
        ("parallel", c_int32),
        ("eps", c_float),
        ("embedding_scale", c_float),
        ("logit_softcap", c_float),
        ("shape", CShape),
        ("reserved", c_int32),
        ("embedding", c_void_p),
        ("position_embedding", c_void_p),
        ("final_norm", CNorm),
        ("head", CLinear),
        ("layer", c_void_p),
        ("reduce", c_void_p),
    )


class CBatch(Structure):
    """One step."""

    _fields_ = (
        ("sequences", c_int32),
        ("rows", c_int32),
        ("logit_rows", c_int32),
        ("reserved", c_int32),
        ("tokens", c_void_p),
        ("starts", c_void_p),
        ("row_ends", c_void_p),
        ("tables", c_void_p),
        ("table_starts", c_void_p),
        ("picked", c_void_p),
        ("logits", c_void_p),
        ("hidden_in", c_void_p),
        ("hidden_out", c_void_p),
    )


#: of one row, the likeliest tokens that can be asked for
MOST_LIKELIEST = 20


class CDraw(Structure):
    """What the next token of a sequence depends on besides its logits, and the answer: see ``draw.h``."""

    _fields_ = (
        ("uniform", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("seen", c_void_p),
        ("counts", c_void_p),
        ("banned", c_void_p),
        ("seen_count", c_int32),
        ("banned_count", c_int32),
        ("repetition", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("scale", c_float),
        ("top_k", c_int32),
        ("likeliest", c_int32),
        ("total", c_int64),
        ("token", c_int32),
        ("listed", c_int32),
        ("highest", c_float),
        ("logit", c_float),
        ("tokens", c_int32 * MOST_LIKELIEST),
        ("logits", c_float * MOST_LIKELIEST),
    )


#: in the order of ``ds_sizes``
ALL: tuple[type[Structure], ...] = (CNorm, CLinear, CLayer, CModel, CBatch, CPool, CDraw, CExpert, CExperts)
