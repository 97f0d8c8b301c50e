"""What passes between Python and the compiled simulation; fields as in ``structs.h``, in that order."""

from __future__ import annotations

from ctypes import CFUNCTYPE, Structure, c_double, c_int64

#: fields of the ledger in the order of a result's stages
LEDGER = (
    "router_queue_s",
    "prefill_queue_s",
    "prefill_s",
    "prefill_wire_s",
    "placement_s",
    "transfer_wait_s",
    "transfer_s",
    "decode_queue_s",
    "first_step_s",
    "decode_wire_s",
    "decode_s",
    "retry_s",
    "ttft_s",
    "total_s",
)


class LinearStruct(Structure):
    """A linear form."""

    _fields_ = [(name, c_double) for name in ("base", "per_token", "per_square", "per_sequence")]


class InstanceStruct(Structure):
    """An instance."""

    _fields_ = [
        *((name, c_int64) for name in ("blocks", "max_batch", "max_batch_tokens", "stages")),
        *((name, c_int64) for name in ("prefill_priority", "keeps", "asks", "rank", "node", "group")),
        *((name, c_double) for name in ("router_s", "seal_bytes_per_s", "copy_bytes_per_s")),
        *((name, LinearStruct) for name in ("prefill", "decode", "decode_large")),
        ("large_batch", c_int64),
    ]


class SettingsStruct(Structure):
    """The system."""

    _fields_ = [
        *((name, c_int64) for name in ("prefills", "decodes", "groups", "requests", "max_requests")),
        *((name, c_int64) for name in ("prefill_queue", "decode_queue", "local_below", "threshold_limits")),
        *((name, c_int64) for name in ("block_size", "block_nbytes", "early", "direct", "hashed_tokens", "keeps")),
        *((name, c_double) for name in ("begun_s", "client_s", "relay_s", "max_deadline_s", "lease_s")),
        *((name, c_double) for name in ("affinity", "network_bytes_per_s", "ttft_s", "tpot_s")),
        *((name, c_int64) for name in ("first", "misses")),
    ]


#: seconds of a step of the instance with that number, by the fields of :class:`dssim.times.Sums`
Ask = CFUNCTYPE(c_double, c_int64, c_int64, c_int64, c_int64, c_int64, c_int64)


class ArrivalStruct(Structure):
    """A request that is to come."""

    _fields_ = [("at_s", c_double), *((name, c_int64) for name in ("prompt", "output", "own", "hashes"))]


class ResultStruct(Structure):
    """What became of it."""

    _fields_ = [
        *((name, c_double) for name in ("at_s", "first_s", "total_s")),
        ("stages", c_double * len(LEDGER)),
        ("order", c_int64),
    ]
