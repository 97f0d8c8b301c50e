"""What may stand in a topology file: its sections, keys, ranges and defaults.

The one declarative source: files are checked and built by these shapes, and :func:`json_schema` publishes them
for editors. A default of None is worked out by :mod:`dstopology.load`, as its description says.
"""
# key() makes dataclass fields, and the defaults are frozen: nothing is shared that could change
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstopology.shape import Choice, Either, Flag, Many, Mapping, Number, Text, key

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}

SIZE = Either(
    (
        Text("a size such as 512MiB", rf"[0-9]{{1,15}}(\.[0-9]{{1,9}})? ?({'|'.join(_UNITS)})"),
        Number(1, 1 << 50),
    )
)
COUNT = Number(1, 1_000_000)
PARALLEL = Number(1, 256)
REPLICAS = Number(1, 1_000)
SECONDS = Number(0.001, 86_400, whole=False)
MILLISECONDS = Number(0.001, 3_600_000, whole=False)
NAME = Text("a name of at most 32 small letters, digits and inner hyphens", r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
DEVICE = Text("a device such as cpu:0 or cuda:0", r"(cpu|cuda):(0|[1-9][0-9]{0,2})")
PLACE = Text("a place such as n0/cpu:0", r"[^/\s]+/[^/\s]+")
HOST = Text("an IPv4 address or a DNS name", r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
PORT = r"[0-9]{1,5}"
#: ``*`` and 0.0.0.0 stand for all addresses of the host
ENDPOINT = Text(
    "an address such as tcp://127.0.0.1:5555 or ipc:///path", rf"tcp://({HOST.pattern}|\*):{PORT}|ipc://.+"
)
HOST_PORT = Text("an address such as 127.0.0.1:8000", rf"({HOST.pattern}|\*):{PORT}")
TRANSPORT = Choice(("shm", "cuda_ipc", "tcp", "gloo", "nccl"))
OVERLAP = Choice(("auto", "on", "off"))
CURVE = Choice(("auto", "on", "off"))


@dataclass(frozen=True, slots=True)
class ModelSection:
    """The model. Short form: its path."""

    path: str = key(
        Text("a path or name"),
        "a known name (smollm2-135m-instruct), a Hugging Face directory or .gguf file "
        "(relative to this file when it begins with ./ or ../), or a Hub id",
    )
    dtype: str | None = key(
        Choice(("float32", "bfloat16", "float16")),
        "of weights and KV; default float32 on CPU devices, bfloat16 on CUDA devices",
        None,
    )
    quantization: str = key(
        Choice(("none", "int8")),
        "int8 keeps the weights of matrices in a byte each; CPU devices only, activations and KV stay in dtype",
        "none",
    )
    max_model_len: int | None = key(
        Number(1, 10_000_000),
        "prompt and output tokens together; default what model and KV pools can take, at most 8192",
        None,
    )


@dataclass(frozen=True, slots=True)
class SloSection:
    """Service level objectives."""

    ttft_ms: float = key(MILLISECONDS, "time to first token, in milliseconds", 250.0)
    tpot_ms: float = key(MILLISECONDS, "time per output token, in milliseconds", 60.0)
    attainment: float = key(Number(0.001, 1, whole=False), "share of requests that must meet both objectives", 0.9)


@dataclass(frozen=True, slots=True)
class NodeSection:
    """A host. One machine may be named as several nodes, to try what lies between hosts."""

    name: str = key(NAME, "name of the node")
    host: str = key(HOST, "IPv4 address or DNS name at which other nodes reach this one", "127.0.0.1")
    bind_host: str | None = key(
        HOST, "IPv4 address that its sockets bind; default host, or 0.0.0.0 where host is a DNS name", None
    )
    devices: tuple[str, ...] = key(
        Many(DEVICE, "a list of devices such as [cpu:0, cpu:1]", may_be_empty=True),
        "cpu:N or cuda:N; each serves one rank; a CPU device is a name for a share of the host's cores",
        (),
    )


@dataclass(frozen=True, slots=True)
class RouterSection:
    """The router. Short form: its frontend."""

    node: str | None = key(NAME, "default the first node", None)
    frontend: str = key(ENDPOINT, "where clients connect", "tcp://127.0.0.1:5555")
    backend: str | None = key(
        ENDPOINT,
        "where instances and relays connect; default a socket file when there is one node, else TCP on the port "
        "after the frontend's",
        None,
    )
    max_requests: int = key(COUNT, "requests in the system; more are refused", 1024)
    max_deadline_s: float = key(SECONDS, "longest deadline that a client may ask for", 600.0)
    client_lease_s: float = key(SECONDS, "a client silent for longer is taken for dead", 6.0)
    worker_lease_s: float = key(SECONDS, "a worker silent for longer is taken for dead", 5.0)
    retries: int = key(Number(0, 100), "attempts after the first", 2)
    node_affinity: float = key(
        Number(0, 1_000_000, whole=False),
        "KV leaves its node only for a decode instance that holds fewer tokens by this many times the sequence's; "
        "0: for any that holds fewer",
        4.0,
    )


@dataclass(frozen=True, slots=True)
class GatewaySection:
    """The OpenAI-compatible HTTP gateway. Short form: its address."""

    node: str | None = key(NAME, "default the router's node", None)
    bind: str = key(HOST_PORT, "where it listens", "127.0.0.1:8000")


@dataclass(frozen=True, slots=True)
class KvSection:
    """The KV pool of an instance: a size, or a number of blocks."""

    block_size: int | None = key(Number(1, 1024), "tokens in a block, the same everywhere; default 16", None)
    memory: str | int | None = key(SIZE, "size of each instance's pool; default 512MiB", None)
    blocks: int | None = key(COUNT, "blocks of each instance's pool, instead of memory", None)
    prefix_cache: bool | None = key(
        Flag(), "keep the KV of prompts for others that begin alike, while there is room; default true", None
    )


@dataclass(frozen=True, slots=True)
class GroupSection:
    """Instances of one role."""

    replicas: int | None = key(REPLICAS, "number of instances; default one for each entry of place, or 1", None)
    tp: int = key(PARALLEL, "tensor parallelism: ranks that share each layer", 1)
    pp: int = key(PARALLEL, "pipeline parallelism: stages of layers", 1)
    place: tuple[str | tuple[str, ...], ...] | None = key(
        Many(
            Either((PLACE, Many(PLACE, "a list of places"))),
            "a list with the places of each replica such as [[n0/cpu:0], [n0/cpu:1]]",
        ),
        "for each replica the devices of its tp * pp ranks, stage by stage; default free devices, node by node; in "
        "mode colocated the stages may be on any nodes, in the others on the same ones for all instances",
        None,
    )
    kv: KvSection | None = key(Mapping(KvSection), "overrides the kv section of the top level", None)
    threads: int | None = key(
        Number(1, 1024), "CPU threads of a rank; default the host's cores divided by its ranks", None
    )


@dataclass(frozen=True, slots=True)
class PrefillSection(GroupSection):
    """Prefill instances. Short form: their number."""

    max_queue: int = key(COUNT, "sequences at an instance, waiting or running; more wait at the router", 64)
    max_batch: int = key(COUNT, "sequences of a batch", 64)
    max_batch_tokens: int = key(
        COUNT,
        "tokens of a batch (the paper's Lm): as many as saturate the device; longer prompts are read in chunks",
        2048,
    )


@dataclass(frozen=True, slots=True)
class DecodeSection(GroupSection):
    """Decode instances. Short form: their number."""

    max_queue: int = key(COUNT, "sequences at an instance, waiting or running; more wait at the router", 4096)
    max_batch: int = key(COUNT, "sequences of a batch", 256)
    max_batch_tokens: int = key(
        COUNT, "tokens of a batch in which prompts are read too; what decoding leaves of it is theirs", 512
    )
    prefill_priority: bool = key(
        Flag(), "read waiting prompts before anybody's next token, instead of beside it", False
    )


@dataclass(frozen=True, slots=True)
class ConditionalSection:
    """Which prompts decode instances read in mode conditional."""

    threshold_tokens: int = key(
        COUNT, "prompts shorter than this, while a decode instance has fewer tokens than this to read", 256
    )


@dataclass(frozen=True, slots=True)
class RelaySection:
    """The KV relays, one on each node that has instances."""

    streams: int = key(COUNT, "hand-offs that leave a node at once; others take their turn", 4)
    lease_s: float = key(SECONDS, "how long an offered KV handle waits to be pulled", 30.0)
    transfer_timeout_s: float = key(SECONDS, "longest time in which nothing of a transfer moves", 10.0)
    transports: tuple[str, ...] = key(
        Many(TRANSPORT, "a list of shm, cuda_ipc, tcp, gloo and nccl"),
        "allowed ways for KV: shm, and between GPUs cuda_ipc, within a node; tcp; gloo and nccl where forced",
        ("shm", "cuda_ipc", "tcp", "gloo", "nccl"),
    )
    verify: bool = key(Flag(), "sum all KV where it is made and where it arrives, and compare", True)
    port: int = key(
        Number(1, 65_535),
        "TCP port of the first relay, its KV having the next one; other relays have the next two",
        7100,
    )
    overlap: str = key(
        OVERLAP,
        "hand KV over in parts while the rest of a long prompt is read; auto: where KV takes tcp",
        "auto",
    )
    keep: str | int | None = key(
        SIZE, "memory for KV of sequences that decode, from which another instance goes on when theirs dies", None
    )


@dataclass(frozen=True, slots=True)
class RanksSection:
    """Instances whose stages are on several nodes."""

    port: int = key(
        Number(1, 65_535),
        "TCP port at which the rank hosts of other nodes join the first such instance; others have the next ones",
        7300,
    )


@dataclass(frozen=True, slots=True)
class SecuritySection:
    """Encryption and keys. Short form: the value of curve."""

    curve: str = key(CURVE, "CURVE encryption; auto: when any address is neither ipc nor loopback", "auto")
    keys: str | None = key(
        Text("a directory"),
        "directory made by `dsctl keys`; default DS_KEYS_DIR or ~/.config/distserve/keys",
        None,
    )


@dataclass(frozen=True, slots=True)
class File:
    """A DistServe topology: who runs where. Only the model must be given."""

    model: str | ModelSection = key(
        Either((Text("a path or name"), Mapping(ModelSection))), "the model, or just its path"
    )
    slo: SloSection = key(Mapping(SloSection), "service level objectives", SloSection())
    mode: str = key(
        Choice(("disaggregated", "colocated", "conditional")),
        "who reads prompts: prefill instances; in mode colocated the decode instances, there being no others; in "
        "mode conditional decode instances read the short ones",
        "disaggregated",
    )
    conditional: ConditionalSection = key(
        Mapping(ConditionalSection), "which prompts are short, in mode conditional", ConditionalSection()
    )
    nodes: tuple[NodeSection, ...] | None = key(
        Many(Mapping(NodeSection), "a list of nodes"),
        "the hosts; default one node n0 on 127.0.0.1 with as many CPU devices as are needed",
        None,
    )
    router: str | RouterSection = key(
        Either((ENDPOINT, Mapping(RouterSection))), "the router, or just its frontend", RouterSection()
    )
    gateway: str | GatewaySection | None = key(
        Either((HOST_PORT, Mapping(GatewaySection))),
        "the HTTP gateway, or just its address; default none",
        None,
    )
    prefill: int | PrefillSection = key(
        Either((REPLICAS, Mapping(PrefillSection))), "prefill instances, or just their number", PrefillSection()
    )
    decode: int | DecodeSection = key(
        Either((REPLICAS, Mapping(DecodeSection))), "decode instances, or just their number", DecodeSection()
    )
    kv: KvSection = key(Mapping(KvSection), "KV pool of every instance", KvSection())
    relay: RelaySection = key(Mapping(RelaySection), "the KV relays", RelaySection())
    ranks: RanksSection = key(Mapping(RanksSection), "instances whose stages are on several nodes", RanksSection())
    security: str | SecuritySection = key(
        Either((CURVE, Mapping(SecuritySection))), "encryption, or just the value of curve", SecuritySection()
    )
    force_transport: str | None = key(
        TRANSPORT,
        "send all KV this way: tcp works on one machine too, cuda_ipc between GPUs of one, gloo between CPUs, "
        "nccl between GPUs",
        None,
    )


FILE = Mapping(File)


def nbytes(size: int | str) -> int:
    """Bytes of a size that :data:`SIZE` has checked."""
    if isinstance(size, int):
        return size
    number = size.rstrip("BKkMGTi ")
    return round(float(number) * _UNITS[size[len(number) :].strip()])


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a topology file."""
    definitions: dict[str, Any] = {}
    top = FILE.schema(definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "DistServe topology",
        **top,
        "$defs": definitions,
    }
