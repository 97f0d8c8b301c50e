"""The one error tree of the house.

    DsError
    ├── BadInput             what the caller sent or wrote cannot be served as it is
    │   ├── InvalidRequest       a parameter has the wrong type or range
    │   ├── PromptTooLong        prompt plus max_tokens do not fit the model
    │   ├── UnknownRequest       no request of that id is known here
    │   ├── DuplicateRequest     that request id is taken by another client
    │   ├── TopologyError        the YAML is wrong; names file, line and key
    │   ├── ModelNotFound        there is no such model here
    │   └── UnsupportedModel     the model has a feature that the engine lacks
    ├── Refused              understood, and declined
    │   ├── Overloaded           a bounded queue is full
    │   ├── VersionMismatch      the peer speaks another protocol version
    │   ├── ModelMismatch        the worker serves another model
    │   ├── DuplicateName        a live worker already has that name
    │   ├── Unauthorized         the key is not on the allow-list
    │   └── PortInUse            another process listens there
    ├── Ended                the request was stopped on purpose
    │   ├── Cancelled            by its client, or with its client
    │   └── DeadlineExceeded     its time was up
    └── Failed               something broke; ``retryable`` says whether trying again may help
        ├── NoInstance           no worker of the needed role is up
        ├── WorkerLost           the worker that held the request died, and retries are spent
        ├── RouterLost           the router does not answer
        ├── TransferFailed       the KV hand-off did not come to its end in time
        ├── KvCorrupt            the KV that arrived is not the KV that was sent
        ├── EngineFailed         the model could not be run
        ├── OutOfMemory          the device has no room for weights, pool or batch
        ├── ProtocolError        a peer sent what the protocol does not allow
        └── StartFailed          a process did not come up

Every leaf has a stable ``code``; it crosses the wire as :class:`ErrorInfo` and comes out as the same class.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

#: characters of a message that travel: some quote what a stranger sent, and must not outgrow a frame
MAX_MESSAGE_CHARS = 2_000


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels."""

    code: str
    message: str
    remedy: str = ""


class DsError(Exception):
    """Root of the tree. ``str(error)`` is a plain sentence; ``remedy`` says what to do about it."""

    #: stable name, part of the public protocol
    code: ClassVar[str] = "internal"
    #: status at an HTTP gateway
    http_status: ClassVar[int] = 500
    #: exit status of a command that ends with this error
    exit_code: ClassVar[int] = 1
    #: whether the same request may succeed when sent again
    retryable: ClassVar[bool] = False
    #: what to do when the raiser has nothing better to say
    default_remedy: ClassVar[str] = ""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy or self.default_remedy

    def info(self) -> ErrorInfo:
        """This error as it travels, its message cut to ``MAX_MESSAGE_CHARS``."""
        message = self.message
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}... ({len(message)} characters)"
        return ErrorInfo(self.code, message, self.remedy)


class BadInput(DsError):
    """What the caller sent or wrote cannot be served as it is."""

    code = "bad_input"
    http_status = 400
    exit_code = 2


class InvalidRequest(BadInput):
    """A parameter has the wrong type or range."""

    code = "invalid_request"


class PromptTooLong(BadInput):
    """Prompt plus ``max_tokens`` do not fit the model."""

    code = "prompt_too_long"
    default_remedy = "shorten the prompt, lower max_tokens, or raise model.max_model_len in the topology"


class UnknownRequest(BadInput):
    """No request of that id is known here."""

    code = "unknown_request"
    http_status = 404
    default_remedy = "submit it again: the router was restarted, or the result was kept too short a time"


class DuplicateRequest(BadInput):
    """That request id is taken by another client."""

    code = "duplicate_request"
    http_status = 409
    default_remedy = "use a fresh id for each request"


class TopologyError(BadInput):
    """The topology is wrong. The message begins with ``file:line: key``."""

    code = "topology"


class ModelNotFound(BadInput):
    """There is no such model here."""

    code = "model_not_found"
    http_status = 404
    default_remedy = "`dsctl model list` shows what is here; model.path may be a directory, too"


class UnsupportedModel(BadInput):
    """The model has a feature that the engine lacks."""

    code = "unsupported_model"
    default_remedy = "use a model of a family in docs/models.md"


class Refused(DsError):
    """Understood, and declined."""

    code = "refused"
    http_status = 403
    exit_code = 3


class Overloaded(Refused):
    """A bounded queue is full."""

    code = "overloaded"
    http_status = 429
    retryable = True
    default_remedy = "try again later, or add instances"


class VersionMismatch(Refused):
    """The peer speaks another protocol version."""

    code = "version_mismatch"
    http_status = 400
    default_remedy = "run the same release on every host and in every client"


class ModelMismatch(Refused):
    """The worker serves another model than the router."""

    code = "model_mismatch"
    default_remedy = "start every process from the same topology, with the same files under model.path"


class DuplicateName(Refused):
    """A live worker already has that name."""

    code = "duplicate_name"
    default_remedy = "stop the other worker, or start this one under a name of its own"


class Unauthorized(Refused):
    """The key is not on the allow-list."""

    code = "unauthorized"
    http_status = 401
    default_remedy = "add the peer's public key with `dsctl keys allow`"


class PortInUse(Refused):
    """Another process listens on that address."""

    code = "port_in_use"
    default_remedy = "stop the other process, or choose another address in the topology"


class Ended(DsError):
    """The request was stopped on purpose."""

    code = "ended"
    http_status = 499
    exit_code = 4


class Cancelled(Ended):
    """Stopped by its client, or because its client is gone."""

    code = "cancelled"


class DeadlineExceeded(Ended):
    """The request's time was up."""

    code = "deadline_exceeded"
    http_status = 504
    default_remedy = "allow more time, or lower the load"


class Failed(DsError):
    """Something broke."""

    code = "failed"
    http_status = 500
    exit_code = 5


class NoInstance(Failed):
    """No worker of the needed role is up."""

    code = "no_instance"
    http_status = 503
    retryable = True
    default_remedy = "see `dsctl status` and `dsctl logs` for the instance that is down"


class WorkerLost(Failed):
    """The worker that held the request died, and retries are spent."""

    code = "worker_lost"
    http_status = 503
    retryable = True
    default_remedy = "send the request again; `dsctl logs` tells why the worker died"


class RouterLost(Failed):
    """The router does not answer."""

    code = "router_lost"
    http_status = 503
    retryable = True
    default_remedy = "check that the system is up (`dsctl status`) and that the address is right"


class TransferFailed(Failed):
    """The KV hand-off did not come to its end in time."""

    code = "transfer_failed"
    http_status = 503
    retryable = True
    default_remedy = "send the request again; `dsctl logs` of the relays tells which link failed"


class KvCorrupt(Failed):
    """The KV that arrived is not the KV that was sent."""

    code = "kv_corrupt"
    retryable = True
    default_remedy = "send the request again; if it repeats, suspect the memory or the link of the instances named"


class EngineFailed(Failed):
    """The model could not be run."""

    code = "engine_failed"


class OutOfMemory(Failed):
    """The device has no room for weights, pool or batch."""

    code = "out_of_memory"
    http_status = 503


class ProtocolError(Failed):
    """A peer sent what the protocol does not allow."""

    code = "protocol_error"
    http_status = 400


class StartFailed(Failed):
    """A process did not come up."""

    code = "start_failed"


def _leaves(cls: type[DsError]) -> dict[str, type[DsError]]:
    found = {cls.code: cls}
    for child in cls.__subclasses__():
        found.update(_leaves(child))
    return found


def from_info(info: ErrorInfo) -> DsError:
    """The exception that ``info`` tells of; an unknown code becomes :class:`Failed`, the code in its message."""
    cls = _leaves(DsError).get(info.code)
    if cls is None:
        return Failed(f"{info.code}: {info.message}", remedy=info.remedy)
    return cls(info.message, remedy=info.remedy)
