"""Real relays in processes of their own, an owner in another, and a reader in this one."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from dsbench.handoff.ends import Reader, filled_pool
from dskv.handle import KvHandle
from dstopology.endpoints import free_ports
from dstopology.load import load
from dstopology.resolved import Topology
from dstopology.wiring import system_keys
from dswire.codec import Decoder, encode
from dswire.errors import Failed
from dswire.keys import SYSTEM_PUBLIC, SYSTEM_SECRET, start_authenticator, write_pair
from dswire.messages import worker
from dswire.sockets import BoundSocket

_TOPOLOGY = """
model: {{path: bench, dtype: bfloat16}}
nodes:
  - {{name: n0, host: 127.0.0.1, devices: ["cpu:0", "cpu:1"]}}
  - {{name: n1, host: 127.0.0.2, devices: ["cpu:1"]}}
router: {{node: n0, frontend: "tcp://127.0.0.1:{port}", backend: "tcp://127.0.0.1:{backend}"}}
prefill: {{place: [[n0/cpu:0]]}}
decode: {{place: [[{reader}/cpu:1]]}}
relay: {{port: {relay}}}
security: {{curve: {curve}, keys: {keys}}}
force_transport: {force}
"""
_STOP_S = 20.0


class World:
    """What a measurement needs."""

    def __init__(self, topology: Topology, owner: subprocess.Popen[bytes], reader: Reader) -> None:
        self.topology = topology
        self.reader = reader
        self._owner = owner

    async def offer(self, count: int, blocks: int) -> list[KvHandle]:
        """Have ``count`` handles of ``blocks`` blocks each offered."""
        return await asyncio.to_thread(self._offer, count, blocks)

    def _offer(self, count: int, blocks: int) -> list[KvHandle]:
        assert self._owner.stdin is not None
        assert self._owner.stdout is not None
        self._owner.stdin.write(b"%d %d\n" % (count, blocks))
        self._owner.stdin.flush()
        lines = [self._owner.stdout.readline() for _ in range(count)]
        if not lines[-1]:
            raise Failed("the owner of the KV has ended", remedy="see its message above")
        return [msgspec.json.decode(line, type=KvHandle) for line in lines]


@asynccontextmanager
async def world(transport: str, blocks: int, *, curve: bool) -> AsyncIterator[World]:
    """Everything up and registered, with pools of ``blocks``; ``transport`` is ``shm``, ``host`` or ``gloo``."""
    with ExitStack() as stack:
        topology = _topology(stack.enter_context(directory()), transport, curve)
        keys = system_keys(topology)
        if keys is not None:
            stack.callback(start_authenticator(topology.security.keys_dir).stop)
        router = _Router(BoundSocket(topology.router.backend_bind, keys=keys))
        stack.callback(router.socket.close)
        for relay in topology.relays:
            stack.enter_context(process(topology, relay.name))
        relay = topology.relay_of(topology.instance("prefill-0").node)
        pools = [topology.instance(name).segment for name in ("prefill-0", "decode-0")]
        command = [sys.executable, "-m", "dsbench.handoff.ends", relay.local, relay.node]
        command += [str(pools[0]), str(blocks), transport, *([str(topology.security.keys_dir)] if keys else [])]
        owner = stack.enter_context(owning(command))
        reader = Reader(topology, filled_pool(pools[1], blocks), keys)
        stack.callback(reader.close)
        await reader.hello()
        running = World(topology, owner, reader)
        # the one proof that everybody knows everybody
        await reader.pull((await running.offer(1, 1))[0], [0])
        yield running


class _Router:
    """Welcomes whoever says hello, and pings often enough that nobody is missed."""

    def __init__(self, bound: BoundSocket) -> None:
        self.socket = bound
        self._decoder: Decoder[msgspec.Struct] = Decoder(worker.FromWorker)
        bound.start(self._on_frames)

    def _on_frames(self, identity: str, frames: list[bytes]) -> None:
        if isinstance(self._decoder.decode(frames[0]), worker.WorkerHello):
            self.socket.send(identity, [encode(worker.WorkerWelcome("router-0", "1", 24 * 3600.0))])


@contextmanager
def directory() -> Iterator[Path]:
    """A directory whose path is short: Unix sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="dsb-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _topology(root: Path, transport: str, curve: bool) -> Topology:
    if curve:
        write_pair(root / "keys" / SYSTEM_SECRET, root / "keys" / SYSTEM_PUBLIC)
    port = free_ports(6)
    path = root / "t.yaml"
    path.write_text(
        _TOPOLOGY.format(
            port=port,
            backend=port + 1,
            relay=port + 2,
            reader="n0" if transport == "shm" else "n1",
            force="gloo" if transport == "gloo" else "null",
            curve="on" if curve else "off",
            keys=root / "keys",
        )
    )
    (root / "run").mkdir()
    return load(path, {**os.environ, "DS_RUN_DIR": str(root / "run")})


@contextmanager
def process(topology: Topology, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """One process of a topology, which ends with us however we end; it logs into the run directory."""
    lifeline, held = os.pipe()
    env = {**os.environ, "DS_RUN_DIR": str(topology.run_dir), "DS_LIFELINE_FD": str(lifeline)}
    module = f"ds{topology.role_of(name)}"
    command = [sys.executable, "-m", module, "--topology", str(topology.path), "--name", name]
    log = topology.run_dir / f"{name}.log"
    with log.open("wb") as out:
        started = subprocess.Popen(command, env=env, stdout=out, stderr=out, pass_fds=(lifeline,))
    os.close(lifeline)
    try:
        yield started
    finally:
        os.close(held)
        started.terminate()
        started.wait(_STOP_S)


@contextmanager
def owning(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The owner's process, which ends when its input does."""
    # its input ends when we do; Ctrl-C is for us alone
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
    try:
        yield process
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
