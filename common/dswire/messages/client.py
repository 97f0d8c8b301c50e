"""Client <-> router: the public protocol (``docs/protocol.md`` tells it for other languages)."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from dswire.errors import ErrorInfo


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen and when to stop."""

    #: 0 is greedy
    temperature: float = 1.0
    #: the k likeliest tokens only; 0 is off
    top_k: int = 0
    #: the smallest set of likeliest tokens with this much probability; 1 is off
    top_p: float = 1.0
    #: tokens at least this fraction as likely as the likeliest; 0 is off
    min_p: float = 0.0
    #: makes the answer reproducible; chosen by the router when absent
    seed: int | None = None
    #: over prompt and output; 1 is off
    repetition_penalty: float = 1.0
    #: over output, once for each token that occurs; 0 is off
    presence_penalty: float = 0.0
    #: over output, for each occurrence; 0 is off
    frequency_penalty: float = 0.0
    #: texts that end the answer and are not part of it
    stop: tuple[str, ...] = ()
    #: tokens that end the answer and are not part of it
    stop_token_ids: tuple[int, ...] = ()
    #: go on after the model's own end-of-text token
    ignore_eos: bool = False
    #: end-of-text and stop tokens cannot be drawn before this many tokens
    min_tokens: int = 0
    #: output tokens at most; fewer where prompt and output would not fit the model
    max_tokens: int = 256
    #: log-probabilities of the drawn token and of this many likeliest ones; None is off
    logprobs: int | None = None
    #: answers to the same prompt
    n: int = 1


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str


class TokenLogprob(msgspec.Struct, frozen=True, omit_defaults=True):
    """Log-probability of a drawn token, and of the likeliest ones in its place."""

    token_id: int
    text: str
    logprob: float
    #: (token id, text, log-probability), likeliest first
    top: tuple[tuple[int, str, float], ...] = ()


class Usage(msgspec.Struct, frozen=True):
    """What was read and written, in tokens."""

    prompt_tokens: int
    completion_tokens: int


class Ledger(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the time of a request went, in seconds, by the router's clock.

    All stages together add up to ``total_s``, and without retries those of the first group to ``ttft_s``. For
    ``n > 1`` it tells of the choice that ended last.
    """

    #: at the router: tokenising, and waiting for a prefill instance
    router_queue_s: float = 0.0
    #: waiting at the prefill instance
    prefill_queue_s: float = 0.0
    #: the prefill step itself
    prefill_s: float = 0.0
    #: messages between router and prefill instance
    prefill_wire_s: float = 0.0

    #: from the first token to the request being sent to a decode instance, the KV's checksum included
    placement_s: float = 0.0
    #: waiting at the decode instance for free blocks
    transfer_wait_s: float = 0.0
    #: the KV hand-off, verification included
    transfer_s: float = 0.0
    #: KV there, waiting for the next step to begin
    decode_queue_s: float = 0.0
    #: the first decode step
    first_step_s: float = 0.0
    #: messages between router and decode instance until the second token
    decode_wire_s: float = 0.0
    #: from the second token to the end
    decode_s: float = 0.0
    #: attempts that were lost, and prefilling again after them
    retry_s: float = 0.0
    #: pauses in which another decode instance took over, going on from KV that was kept
    resume_s: float = 0.0

    #: from the router receiving the request to its first token being sent
    ttft_s: float = 0.0
    #: from the router receiving the request to its end being sent
    total_s: float = 0.0
    #: of the KV hand-off, while the rest of the prompt was still read: no stage, and no part of any sum
    transfer_hidden_s: float = 0.0
    #: attempts beyond the first
    retries: int = 0


# client -> router


class ClientHello(msgspec.Struct, frozen=True, tag=True):
    """First message of a connection."""

    protocol: int
    #: name and version of the client's software, for the log
    agent: str = ""


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Asks for an answer. Exactly one of ``prompt``, ``chat`` and ``prompt_ids`` is given.

    Sending the same id again attaches to the running request instead of starting another.
    """

    #: chosen by the client, unique; 1 to 128 characters of ``[A-Za-z0-9_.:-]``
    request_id: str
    prompt: str | None = None
    chat: tuple[ChatMessage, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None
    sampling: Sampling = Sampling()
    #: seconds from now after which the request fails with ``deadline_exceeded``; None is the router's maximum
    deadline_s: float | None = None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stops a request; it ends with ``Failed(cancelled)`` unless it has ended already."""

    request_id: str


class Attach(msgspec.Struct, frozen=True, tag=True):
    """After a reconnect: asks for the events of a request from number ``have`` on."""

    request_id: str
    #: events already received
    have: int


class ClientPing(msgspec.Struct, frozen=True, tag=True):
    """Keeps the client's lease; at least every third of ``ClientWelcome.lease_s``."""


class ClientBye(msgspec.Struct, frozen=True, tag=True):
    """The client leaves; its running requests are cancelled at once."""


class StatusQuery(msgspec.Struct, frozen=True, tag=True):
    """Asks for a :class:`StatusReport`."""


# router -> client


class ClientWelcome(msgspec.Struct, frozen=True, tag=True):
    """The connection stands."""

    protocol: int
    router: str
    #: changes when the router was restarted, and with it every request was lost
    incarnation: str
    model: str
    max_model_len: int
    #: a client silent for longer is taken for dead, and its requests are cancelled
    lease_s: float


class ClientRefused(msgspec.Struct, frozen=True, tag=True):
    """The connection does not stand, or a message could not be read."""

    error: ErrorInfo


class ClientHelloWanted(msgspec.Struct, frozen=True, tag=True):
    """The router does not know this client (it was restarted, or the lease ran out): say hello again."""


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Event 0 of a request: it is admitted."""

    request_id: str
    number: int
    prompt_tokens: int


class Output(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """New tokens of one choice."""

    request_id: str
    #: events of a request are numbered from 0 without a gap
    number: int
    choice: int
    #: tokens that this event accounts for
    token_ids: tuple[int, ...]
    #: whole characters only; text that may be the beginning of a stop string is held back
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    #: "" while the choice goes on, else "stop" or "length"
    finish_reason: str = ""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """Last event of a request that went well: all its choices are complete."""

    request_id: str
    number: int
    usage: Usage
    ledger: Ledger


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Last event of a request that did not: rejected, cancelled or failed, as ``error.code`` says."""

    request_id: str
    number: int
    error: ErrorInfo


class ClientPong(msgspec.Struct, frozen=True, tag=True):
    """Answer to a ping."""

    incarnation: str


class WorkerStatus(msgspec.Struct, frozen=True):
    """A worker as the router sees it."""

    name: str
    role: str
    node: str
    #: "up", "lost", or "missing" while it has never been up
    state: str
    waiting: int
    running: int
    blocks: int
    blocks_held: int
    #: live handles by state (relays)
    handles: dict[str, int]
    uptime_s: float
    #: how old the worker's own figures are: it tells them once a second
    report_age_s: float = 0.0
    #: tokens of the prompts that were read there since its start, and how many of them lay in kept KV blocks
    prompt_tokens: int = 0
    cached_tokens: int = 0


class StatusReport(msgspec.Struct, frozen=True, tag=True):
    """The router's view of the system."""

    router: str
    incarnation: str
    model: str
    uptime_s: float
    workers: tuple[WorkerStatus, ...]
    #: live requests by phase
    requests: dict[str, int]
    #: requests since start by how they ended
    ended: dict[str, int]


FromClient: TypeAlias = ClientHello | Submit | Cancel | Attach | ClientPing | ClientBye | StatusQuery
ToClient: TypeAlias = (
    ClientWelcome
    | ClientRefused
    | ClientHelloWanted
    | Accepted
    | Output
    | Finished
    | Failed
    | ClientPong
    | StatusReport
)
