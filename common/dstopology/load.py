"""From a topology file to the resolved :class:`~dstopology.resolved.Topology`, or to all that is wrong with it.

Three passes, each telling all its problems before the next begins: YAML (:mod:`dstopology.source`), shape
(:mod:`dstopology.schema`), and meaning (here). Reading the environment:

``DS_RUN_DIR``   sockets, logs and ready files; default ``/tmp/distserve-UID/DIGEST``
``DS_SHM_DIR``   memory that processes share; default ``/dev/shm``
``DS_HOME``      where models are
``DS_KEYS_DIR``  CURVE keys; default ``~/.config/distserve/keys``
``DS_TOPOLOGY``  the file that :func:`find` finds
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from dstopology import modelfacts, source
from dstopology.problems import Problems
from dstopology.resolve import Resolver
from dstopology.resolved import Topology
from dstopology.schema import FILE, File
from dstopology.shape import examine
from dswire.errors import TopologyError

DEFAULT_SHM_DIR = "/dev/shm"
#: where :func:`find` looks, in this order
USUAL_PLACES = (Path("topology.yaml"), Path("deploy/topologies/laptop.yaml"))


def load(path: Path | str, env: Mapping[str, str] = os.environ) -> Topology:
    """Read, check and resolve a topology file.

    Raises :class:`TopologyError`; its message has one ``file:line: key: reason`` for each problem.
    """
    read = source.read(path)
    read.problems.raise_any()
    file = cast("File", examine(FILE, read.document, (), read.problems))
    read.problems.raise_any()
    digest = hashlib.sha256(read.content + b"\0" + str(read.path).encode()).hexdigest()[:12]
    return Resolver(
        file=file,
        path=read.path,
        digest=digest,
        run_dir=Path(env.get("DS_RUN_DIR") or f"/tmp/distserve-{os.getuid()}/{digest}").absolute(),
        shm_dir=Path(env.get("DS_SHM_DIR") or DEFAULT_SHM_DIR).absolute(),
        keys_dir=default_keys_dir(env),
        facts=lambda model: modelfacts.read(model, env),
        problems=read.problems,
    ).topology()


def default_keys_dir(env: Mapping[str, str] = os.environ) -> Path:
    """Where CURVE keys are when the topology does not say."""
    if chosen := env.get("DS_KEYS_DIR"):
        return Path(chosen).expanduser().absolute()
    config = env.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "distserve" / "keys"


def find(given: Path | str | None = None, env: Mapping[str, str] = os.environ) -> Path:
    """The topology file that a command means: ``given``, else ``$DS_TOPOLOGY``, else a usual place.

    Raises :class:`TopologyError` when there is none.
    """
    if chosen := given or env.get("DS_TOPOLOGY"):
        return Path(chosen)
    for path in USUAL_PLACES:
        if path.is_file():
            return path
    places = " or ".join(map(str, USUAL_PLACES))
    raise TopologyError(
        f"no topology was named, and there is no {places} here",
        remedy="name one with -f, or set DS_TOPOLOGY; `model: smollm2-135m-instruct` alone makes a topology",
    )


def check_servable(topology: Topology) -> None:
    """Raise :class:`TopologyError` for what a topology may say, but this release cannot serve yet."""
    lines = source.read(topology.path).problems.lines
    problems = Problems(str(topology.path))
    problems.lines = lines
    if topology.gateway is not None:
        reason = "this release has no HTTP gateway"
        problems.add(("gateway",), reason, "remove the key; clients use the SDK (dsclient) or dsctl")
    problems.raise_any()
