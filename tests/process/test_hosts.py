"""Prefill on one host, decode on another, and a bad wire between them.

The hosts are network namespaces with memory of their own for KV; ``dsctl up`` with the same file starts on each
what belongs there. Nothing joins them but TCP, with delay, jitter and loss, through this test.

A token that decode made from KV that came over the wire is checked against the prefill instance alone: asked for
one token behind the same prompt and answer, it hands nothing over. (That one host alone answers as transformers
does is shown elsewhere.)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsbench.handoff.whole import hand_off
from dsclient import Client
from dswire.errors import DsError
from dswire.keys import SYSTEM_PUBLIC, SYSTEM_SECRET, load_system, write_pair
from support.longwire import LongWire
from support.namespaces import A, B, possible, two_hosts

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not possible(), reason="may not make network namespaces (root and iproute2 are needed)"),
]

TOPOLOGY = """
model: {{path: smollm2-135m-instruct, dtype: float32, max_model_len: 512}}
nodes:
  - {{name: n0, host: {a}, devices: ["cpu:0"]}}
  - {{name: n1, host: {b}, devices: ["cpu:0"]}}
router: {{node: n0, frontend: "ipc://{root}/front.sock", backend: "tcp://{a}:5556"}}
prefill: {{place: [[n0/cpu:0]]}}
decode: {{place: [[n1/cpu:0]]}}
relay: {{lease_s: 4, transfer_timeout_s: 1.5, port: 7100}}
kv: {{blocks: 96}}
security: {{keys: {root}/keys}}
"""
#: the relay of n0 listens there for the one of n1, and behind it for who reads KV
RELAY_PORT = 7100
KV_PORT = RELAY_PORT + 1
PROMPTS = tuple(
    tuple(1000 + (7 * first + at) % 900 for at in range(length)) for first, length in ((0, 24), (1, 100))
)
TOKENS = 6
START_LIMIT_S = 120.0
#: from the healing of the wire, or its breaking, to the end of a request
END_LIMIT_S = 60.0
IDLE_LIMIT_S = 60.0
#: what a client may be told of a cut
TOLD = {"worker_lost", "no_instance", "transfer_failed"}


@dataclass(frozen=True, slots=True)
class World:
    """A system on two hosts."""

    client: Client
    wire: LongWire
    logs: Path

    def ask(self, prompt: Sequence[int], tokens: int = TOKENS) -> tuple[int, ...]:
        """A greedy answer."""
        made = self.client.generate(prompt_ids=prompt, temperature=0.0, max_tokens=tokens, ignore_eos=True)
        return made.choices[0].token_ids

    def alone(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """Each token of ``answer`` as prefill would have chosen it, what comes before being given."""
        befores = [(*prompt, *answer[:at]) for at in range(len(answer))]
        with ThreadPoolExecutor(len(befores)) as threads:
            return [tokens[0] for tokens in threads.map(lambda before: self.ask(before, 1), befores)]

    def await_idle(self) -> None:
        """Wait until nothing is held on either host."""
        began = time.monotonic()
        while True:
            report = self.client.status()
            held = [one for one in report.workers if one.blocks_held or any(one.handles.values())]
            # what was told before we began to wait says nothing
            since = time.monotonic() - began
            if not held and all(one.state == "up" and one.report_age_s < since for one in report.workers):
                return
            assert since < IDLE_LIMIT_S, f"still held: {held}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        root = stack.enter_context(_root())
        hosts = stack.enter_context(two_hosts())
        wire = stack.enter_context(LongWire(seed=5))
        for port in (5556, RELAY_PORT, KV_PORT):
            wire.join(hosts.far_b, A, port, hosts.a)
        for port in (RELAY_PORT + 2, KV_PORT + 2):
            wire.join(hosts.far_a, B, port, hosts.b)
        write_pair(root / "keys" / SYSTEM_SECRET, root / "keys" / SYSTEM_PUBLIC)
        (root / "t.yaml").write_text(TOPOLOGY.format(a=A, b=B, root=root))
        for name in (hosts.a, hosts.b):
            stack.enter_context(_up(root, name))
        with Client(f"ipc://{root}/front.sock", keys=load_system(root / "keys"), timeout_s=START_LIMIT_S) as client:
            _await_workers(client, root)
            yield World(client, wire, root)


@contextmanager
def _root() -> Iterator[Path]:
    # short: Unix sockets lie in it
    root = Path(tempfile.mkdtemp(prefix="ds-"))
    try:
        yield root
    finally:
        shutil.rmtree(root)


@contextmanager
def _up(root: Path, host: str) -> Iterator[None]:
    """``dsctl up`` on a host whose directories are its own."""
    own = root / host[-1]
    shm = Path(tempfile.mkdtemp(prefix="ds-", dir="/dev/shm"))
    env = {**os.environ, "DS_RUN_DIR": str(own), "DS_SHM_DIR": str(shm), "OMP_NUM_THREADS": "1"}
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "dsctl", "up", "-f", str(root / "t.yaml")]
    with (root / f"{host[-1]}.out").open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(START_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        left = [path.name for path in shm.iterdir()]
        shutil.rmtree(shm)
    assert status == 0, _logs(root)
    assert not left, f"shared memory left behind on {host}: {left}"


def _await_workers(client: Client, root: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while any(one.state != "up" for one in client.status().workers):
        assert time.monotonic() < deadline, _logs(root)
        time.sleep(0.05)


def _logs(root: Path) -> str:
    paths = [*root.glob("*.out"), *root.glob("*/logs/*.log")]
    return "\n".join(f"--- {path.relative_to(root)}\n{path.read_text()}" for path in sorted(paths))


def test_each_host_runs_its_own_processes(world: World) -> None:
    found = {host: {path.stem for path in (world.logs / host / "logs").glob("*.log")} for host in ("a", "b")}
    assert found == {
        "a": {"supervisor", "relay-n0", "prefill-0", "router-0"},
        "b": {"supervisor", "relay-n1", "decode-0"},
    }


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_the_answer_is_that_of_one_host(world: World, prompt: tuple[int, ...]) -> None:
    answer = world.ask(prompt)
    assert list(answer) == world.alone(prompt, answer)
    world.await_idle()


@pytest.mark.parametrize("breaks", ["held", "reset"])
def test_a_wire_cut_in_mid_transfer(world: World, breaks: str) -> None:
    prompt = PROMPTS[1]
    wanted = world.ask(prompt)
    with ThreadPoolExecutor(1) as threads:
        # of about five megabytes
        cut = world.wire.cut_after(KV_PORT, 2_000_000)
        asked = threads.submit(world.ask, prompt)
        assert cut.wait(END_LIMIT_S), "no KV went over the wire"
        if breaks == "held":
            # longer than a transfer may stand still, shorter than it takes to be given up for lost
            time.sleep(2.0)
            world.wire.heal()
        else:
            world.wire.reset()
        error = asked.exception(END_LIMIT_S)
        assert isinstance(error, DsError) and error.code in TOLD if error else asked.result() == wanted
    world.await_idle()
    assert world.ask(prompt) == wanted
    world.await_idle()


def test_the_hand_off_can_be_measured(world: World) -> None:
    found = hand_off(world.client, 40, 2)
    assert found.prompt_tokens == 40
    assert found.hand_off_ms >= found.stages_ms["transfer_s"] > 0
