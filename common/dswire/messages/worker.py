"""Prefill, decode, relay <-> router."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dswire.errors import ErrorInfo
from dswire.messages.client import Sampling


class ModelIdentity(msgspec.Struct, frozen=True):
    """Which weights a process serves; router and workers must agree in all of it."""

    name: str
    #: digest over config, tokenizer and weight headers
    fingerprint: str
    dtype: str
    #: ``int8``, or None where weights are as ``dtype``
    quantization: str | None = None


class Capacity(msgspec.Struct, frozen=True):
    """KV pool of an instance."""

    blocks: int
    layout: KvLayout
    #: whether blocks are kept for prompts that begin alike
    keeps: bool = False


class Load(msgspec.Struct, frozen=True):
    """What a worker holds right now."""

    waiting: int = 0
    running: int = 0
    blocks_held: int = 0
    #: live handles by state (relays)
    handles: dict[str, int] = {}
    #: tokens of the prompts that were read here since the start, and how many of them lay in kept KV blocks
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a drawn token and of the likeliest ones: (id, log-probability), likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


# worker -> router


class WorkerHello(msgspec.Struct, frozen=True, tag=True):
    """Asks to be registered."""

    protocol: int
    name: str
    #: "prefill", "decode" or "relay"
    role: str
    node: str
    #: unique for each start of the process
    incarnation: str
    #: None for relays
    model: ModelIdentity | None = None
    #: None for relays
    capacity: Capacity | None = None


class WorkerReport(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Answer to a :class:`RouterPing`."""

    load: Load
    #: messages sent since the hello, reports not counted; None where nobody counts. The router forgets a worker
    #: of which it has received another number: a connection that broke and healed took some with it
    sent: int | None = None


class WorkerBye(msgspec.Struct, frozen=True, tag=True):
    """Orderly leave: what the worker still holds is to be taken for lost."""


class PrefillDone(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Prefill -> router: the next token. Unless it is the last one, :class:`KvSealed` follows.

    From a decode instance that has read the prompt, tokens follow with :class:`StepDone`.
    """

    key: KvKey
    token: int
    queue_s: float
    prefill_s: float
    logprobs: Logprobs | None = None
    #: "" while the sequence goes on, else "stop" or "length"
    finish_reason: str = ""


class KvSealed(msgspec.Struct, frozen=True, tag=True):
    """The KV is complete, checksummed and offered; or a part of it is, while more of the prompt is still read.

    Prefill -> router, of KV that it has made; relay -> router, of a copy, as answer to :class:`KvReoffer`.
    """

    handle: KvHandle


class DecodeStages(msgspec.Struct, frozen=True):
    """Times of a sequence on a decode instance up to its first step there, in seconds."""

    transfer_wait_s: float
    transfer_s: float
    decode_queue_s: float
    first_step_s: float
    #: of the transfer, while the prompt was still read
    transfer_hidden_s: float = 0.0


class TokenMade(msgspec.Struct, frozen=True, array_like=True):
    """One token of one sequence in a step."""

    key: KvKey
    #: index in the output, 0 is the token that was made with the prompt
    position: int
    token: int
    logprobs: Logprobs | None = None
    finish_reason: str = ""
    #: with the first token only
    stages: DecodeStages | None = None
    #: the tokens of the steps behind, where several were run as one
    more: tuple[int, ...] = ()


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """Decode -> router: all tokens of one step."""

    tokens: tuple[TokenMade, ...]


class Preempted(msgspec.Struct, frozen=True, tag=True):
    """The prompt must be read again, with its output.

    Decode -> router: it is out of blocks and has dropped the sequence; relay -> router: the copy is gone.
    """

    key: KvKey


class SequenceFailed(msgspec.Struct, frozen=True, tag=True):
    """Worker -> router: the worker has dropped the sequence."""

    key: KvKey
    error: ErrorInfo


# router -> worker


class WorkerWelcome(msgspec.Struct, frozen=True, tag=True):
    """Registered."""

    router: str
    incarnation: str
    #: a router silent for longer is taken for dead: the worker drops what it holds and says hello again
    lease_s: float


class WorkerRefused(msgspec.Struct, frozen=True, tag=True):
    """Not registered; the worker ends with this error."""

    error: ErrorInfo


class HelloWanted(msgspec.Struct, frozen=True, tag=True):
    """The receiver is not known here (a restart): drop what this connection holds, say hello again."""


class RouterPing(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Every second to each worker."""

    #: messages sent since the welcome, pings not counted; an instance that has received another number says hello
    #: again
    sent: int = 0


class PrefillWork(msgspec.Struct, frozen=True, tag=True):
    """Router -> prefill: read prompt and output so far, make the next token; to decode: and go on from there."""

    key: KvKey
    prompt_ids: tuple[int, ...]
    #: tokens of an earlier attempt; the next one continues them
    output_ids: tuple[int, ...]
    sampling: Sampling


class DecodeWork(msgspec.Struct, frozen=True, tag=True):
    """Router -> decode: fetch the KV and go on. ``output_ids`` ends with the token that prefill made.

    With a handle that is not the last part, that token is still to come: :class:`DecodeMore` follows.
    """

    handle: KvHandle
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    sampling: Sampling


class DecodeMore(msgspec.Struct, frozen=True, tag=True):
    """Router -> decode: the next part of the KV; with the last one also the token that prefill made."""

    handle: KvHandle
    output_ids: tuple[int, ...] = ()


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Router -> prefill, decode: drop the sequence; to relay: drop the copy. Not knowing it is no error."""

    key: KvKey


class KvReoffer(msgspec.Struct, frozen=True, tag=True):
    """Router -> relay: the reader of that KV is gone; offer the copy under the key of a new attempt.

    Answer: :class:`KvSealed`, or :class:`Preempted` when there is none.
    """

    kept: KvKey
    key: KvKey


class KvWanted(msgspec.Struct, frozen=True, tag=True):
    """Router -> relay: these copies may still be needed; their leases begin anew."""

    kept: tuple[KvKey, ...]


FromWorker: TypeAlias = (
    WorkerHello | WorkerReport | WorkerBye | PrefillDone | KvSealed | StepDone | Preempted | SequenceFailed
)
ToWorker: TypeAlias = (
    WorkerWelcome
    | WorkerRefused
    | HelloWanted
    | RouterPing
    | PrefillWork
    | DecodeWork
    | DecodeMore
    | Abort
    | KvReoffer
    | KvWanted
)
