"""Bad input to a running system, and to processes that are to be started: a clear error, and nothing is lost.

One system serves the whole file; in the end it must answer as it did in the beginning, and hold nothing.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest

from dsclient import Client
from dsengine.store import resolve
from dswire.errors import DsError
from dswire.messages import client
from support.rude import RudePeer
from support.system import System, running_system
from support.wire_client import WireClient

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(180)]

MAX_LEN = 512
VOCAB = 49_152
TOPOLOGY = """
model: {path: smollm2-135m-instruct, dtype: bfloat16, max_model_len: 512}
router: {frontend: "tcp://127.0.0.1:{port}", backend: "tcp://127.0.0.1:{port}", worker_lease_s: 15}
kv: {blocks: 128}
"""
PROMPT = "The capital of France is"
#: a process that does not start has ended by then
START_LIMIT_S = 90.0
IDLE_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with running_system(TOPOLOGY) as running:
        before = _ask(running)
        pids = {name: running.pid(name) for name in running.topology.process_names()}
        yield running
        assert _ask(running) == before
        assert {name: running.pid(name) for name in pids} == pids
        running.await_idle(IDLE_LIMIT_S)


@pytest.fixture(scope="module")
def asking(system: System) -> Iterator[Client]:
    with system.client() as one:
        yield one


def _ask(system: System) -> str:
    with system.client() as one:
        return one.generate(PROMPT, temperature=0.0, max_tokens=8).text


# requests, by the SDK

BAD_REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "invalid_request", "exactly one of"),
    ({"prompt": "x", "prompt_ids": (5,)}, "invalid_request", "exactly one of"),
    ({"prompt": ""}, "invalid_request", "empty"),
    ({"prompt_ids": ()}, "invalid_request", "empty"),
    ({"prompt_ids": (VOCAB,)}, "invalid_request", str(VOCAB - 1)),
    ({"prompt_ids": (-1,)}, "invalid_request", "token -1"),
    ({"prompt_ids": (2**64 - 1,)}, "invalid_request", str(2**64 - 1)),
    ({"prompt_ids": (2**64,)}, "invalid_request", "wrong type"),
    ({"prompt_ids": (5, "six")}, "invalid_request", "prompt_ids"),
    ({"prompt_ids": (5,) * MAX_LEN}, "prompt_too_long", str(MAX_LEN)),
    ({"prompt_ids": (5,) * 2**20}, "prompt_too_long", str(MAX_LEN)),
    ({"prompt": "word " * MAX_LEN}, "prompt_too_long", str(MAX_LEN)),
    ({"prompt": "x" * (7 << 20)}, "prompt_too_long", "characters"),
    ({"prompt": "x" * (9 << 20)}, "prompt_too_long", "bytes"),
    ({"prompt": "\ud800"}, "invalid_request", "wrong type"),
    ({"prompt": 5}, "invalid_request", "wrong type"),
    *[
        ({"prompt": "x", name: value}, "invalid_request", name)
        for name, values in {
            "temperature": (-0.1, 100.5, math.nan, math.inf, "hot"),
            "top_k": (-1, 1.5),
            "top_p": (0.0, 1.1, -1.0, math.nan),
            "min_p": (-0.1, 1.1),
            "seed": ("lucky",),
            "repetition_penalty": (0.0, 101.0, math.nan),
            "presence_penalty": (-101.0, 101.0),
            "frequency_penalty": (-101.0, 101.0),
            "min_tokens": (-1,),
            "max_tokens": (0, -1, 2.5),
            "logprobs": (-1, 21),
            "n": (0, 65),
        }.items()
        for value in values
    ],
    ({"prompt": "x", "seed": -(2**63) - 1}, "invalid_request", "wrong type"),
    ({"prompt": "x", "seed": 2**64}, "invalid_request", "wrong type"),
    ({"prompt": "x", "min_tokens": 9, "max_tokens": 8}, "invalid_request", "min_tokens"),
    ({"prompt": "x", "stop": ("",)}, "invalid_request", "stop string"),
    ({"prompt": "x", "stop": ("y",) * 17}, "invalid_request", "stop strings"),
    ({"prompt": "x", "stop": (5,)}, "invalid_request", "stop"),
    ({"prompt": "x", "stop_token_ids": (VOCAB,)}, "invalid_request", "stop_token_ids"),
    ({"prompt": "x", "temprature": 1.0}, "invalid_request", "temprature"),
    ({"prompt": "x", "request_id": ""}, "invalid_request", "request_id"),
    ({"prompt": "x", "request_id": "a b"}, "invalid_request", "request_id"),
    ({"prompt": "x", "request_id": "a" * 129}, "invalid_request", "request_id"),
    ({"prompt": "x", "request_id": "a" * (2 << 20)}, "invalid_request", "request_id"),
    ({"prompt": "x", "deadline_s": -1.0}, "invalid_request", "deadline_s"),
    ({"prompt": "x", "deadline_s": 0.0}, "invalid_request", "deadline_s"),
    ({"prompt": "x", "deadline_s": math.nan}, "invalid_request", "deadline_s"),
]


@pytest.mark.parametrize(("request_", "code", "told"), BAD_REQUESTS, ids=[str(one[0])[:50] for one in BAD_REQUESTS])
def test_a_request_that_cannot_be_served(asking: Client, request_: dict[str, Any], code: str, told: str) -> None:
    with pytest.raises(DsError) as caught:
        asking.generate(**request_)
    assert caught.value.code == code
    assert told in caught.value.message


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "empty"),
        ([{"role": "wizard", "content": "x"}], "wizard"),
        ([{"role": "w" * (3 << 20), "content": "x"}], "role"),
        ([{"content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 5}], "content"),
        (["hello"], "role"),
    ],
    ids=["empty", "role", "long role", "no role", "no content", "number", "string"],
)
def test_a_chat_that_cannot_be_served(asking: Client, messages: list[Any], told: str) -> None:
    with pytest.raises(DsError) as caught:
        asking.chat(messages)
    assert caught.value.code == "invalid_request"
    assert told in caught.value.message


# what looks odd and is served


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": 1e-300, "top_k": 2**63},
        {"temperature": 100.0, "top_p": 1e-6, "min_p": 1.0, "seed": -(2**63)},
        {"seed": 2**64 - 1, "repetition_penalty": 0.01},
        {"repetition_penalty": 100.0, "presence_penalty": -100.0, "frequency_penalty": 100.0, "temperature": 0.0},
        {"logprobs": 20, "temperature": 0.0, "min_tokens": 3},
        {"stop_token_ids": tuple(range(64)), "ignore_eos": True},
    ],
    ids=lambda odd: " ".join(odd),
)
def test_the_ends_of_every_range_are_served(asking: Client, odd: dict[str, Any]) -> None:
    made = asking.generate(PROMPT, max_tokens=4, **odd)
    assert made.choices[0].finish_reason in ("stop", "length")


def test_max_tokens_is_cut_to_what_fits_the_model(asking: Client) -> None:
    made = asking.generate(prompt_ids=(5,) * (MAX_LEN - 4), temperature=0.0, max_tokens=2**62, ignore_eos=True)
    assert made.usage.prompt_tokens + made.usage.completion_tokens == MAX_LEN
    assert made.choices[0].finish_reason == "length"


def test_choices_of_a_seeded_request_differ_and_come_again(asking: Client) -> None:
    first, again = (asking.generate("Once", n=3, seed=5, max_tokens=8, ignore_eos=True) for _ in range(2))
    assert len({choice.token_ids for choice in first.choices}) == 3
    assert first.choices == again.choices


def test_stop_strings_and_logprobs(asking: Client) -> None:
    whole = asking.generate(PROMPT, temperature=0.0, max_tokens=8, logprobs=3).choices[0]
    assert [one.token_id for one in whole.logprobs] == list(whole.token_ids)
    assert all(one.token_id == one.top[0][0] and len(one.top) == 3 for one in whole.logprobs)
    assert " Paris" in whole.text
    cut = asking.generate(PROMPT, temperature=0.0, max_tokens=8, stop=["aris"]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index("aris")]


# requests, on the wire


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 5},
        {"prompt_ids": "abc"},
        {"prompt_ids": [1, 2.5]},
        {"chat": {"role": "user", "content": "x"}},
        {"chat": [{"role": "user"}]},
        {"prompt": "x", "sampling": []},
        {"prompt": "x", "sampling": {"temperature": "hot"}},
        {"prompt": "x", "sampling": {"n": 1.5}},
        {"prompt": "x", "sampling": {"stop": "y"}},
        {"prompt": "x", "sampling": {"unheard_of": 1}},
        {"prompt": "x", "deadline_s": "soon"},
        {"prompt": "x", "request_id": 7},
        {"prompt": "x", "request_id": None},
    ],
    ids=str,
)
async def test_wrong_types_on_the_wire_are_refused_and_the_connection_stands(
    system: System, fields: dict[str, Any]
) -> None:
    one = WireClient(system.address)
    try:
        await one.hello()
        one.send_bytes(msgpack.packb({"type": "Submit", "request_id": "wrong", **fields}))
        assert (await one.expect(client.ClientRefused)).error.code == "protocol_error"
        one.send(client.StatusQuery())
        assert (await one.expect(client.StatusReport)).requests == {}
    finally:
        one.drop()


@pytest.mark.parametrize("who", ["client", "worker", "instance"])
def test_another_protocol_version_is_refused(system: System, who: str) -> None:
    router, relay = system.topology.router, system.topology.relays[0]
    address, hello, answer = {
        "client": (router.frontend_connect, {"type": "ClientHello"}, "ClientRefused"),
        "worker": (
            router.backend_connect,
            {"type": "WorkerHello", "role": "decode", "node": "n0"},
            "WorkerRefused",
        ),
        "instance": (relay.local, {"type": "KvHello"}, "KvRefused"),
    }[who]
    peer = RudePeer(address, identity=b"decode-9")
    peer.send(msgpack.packb({**hello, "protocol": 99, "name": "decode-9", "incarnation": "1"}))
    told = peer.answers(until=answer)[-1]
    peer.close()
    assert told["error"]["code"] == "version_mismatch"
    assert "99" in told["error"]["message"]
    assert told["error"]["remedy"]


# processes that do not start


@dataclass
class Desk:
    """A directory with a topology file, from which processes are started that must not come up."""

    root: Path

    @property
    def env(self) -> dict[str, str]:
        # socket paths are short, and a test's directory need not be
        run_dir = f"/tmp/ds-{os.getpid()}-bad"
        return {"DS_RUN_DIR": run_dir, "DS_SHM_DIR": str(self.root / "shm"), "OMP_NUM_THREADS": "1"}

    def run(
        self, yaml: str, module: str, *arguments: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``python -m module`` to its end; the topology is at ``t.yaml``."""
        (self.root / "t.yaml").write_text(yaml)
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command,
            env={**os.environ, **self.env, **(env or {})},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=START_LIMIT_S,
            check=False,
        )


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    shm = tmp_path / "shm"
    shm.mkdir()
    yield Desk(tmp_path)
    assert list(shm.iterdir()) == []
    shutil.rmtree(f"/tmp/ds-{os.getpid()}-bad", ignore_errors=True)


UP = ("dsctl", "up", "-f", "t.yaml")
ROUTER = ("dsrouter", "--topology", "t.yaml", "--name", "router-0")
PREFILL = ("dsprefill", "--topology", "t.yaml", "--name", "prefill-0")


@pytest.mark.parametrize("command", [UP, ROUTER], ids=["dsctl up", "dsrouter"])
@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("model: smollm2-135m-instruct\nruoter: {}\n", ("t.yaml:2: ruoter", "router")),
        ("model: {dtype: float32}\n", ("t.yaml:1: model", "path")),
        ("model: smollm2-135m-instruct\nkv:\n  memory: lots\n", ("t.yaml:3: kv.memory", "512MiB")),
        ("model: smollm2-135m-instruct\nkv: {memory: 1KiB}\n", ("t.yaml:2: ", "kv.memory")),
        ("model: [\n", ("t.yaml:",)),
        ("", ("t.yaml",)),
    ],
    ids=["unknown key", "missing key", "wrong value", "no room for a block", "no yaml", "empty"],
)
def test_a_wrong_topology_is_told_with_its_place_and_a_remedy(
    desk: Desk, command: tuple[str, ...], yaml: str, told: tuple[str, ...]
) -> None:
    done = desk.run(yaml, *command)
    assert done.returncode == 2, done.stderr
    assert "remedy" in done.stderr
    assert all(text in done.stderr for text in told), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [UP, ROUTER, PREFILL], ids=["dsctl up", "dsrouter", "dsprefill"])
@pytest.mark.parametrize(
    ("model", "remedy"),
    [("./nowhere", "model"), ("smollm2-135m-instruct", "dsctl model pull smollm2-135m-instruct")],
)
def test_a_missing_model(desk: Desk, command: tuple[str, ...], model: str, remedy: str) -> None:
    yaml = f"model: {{path: {model}, max_model_len: 64}}\nkv: {{blocks: 8}}\n"
    done = desk.run(yaml, *command, env={"DS_HOME": str(desk.root)})
    assert done.returncode == 2, done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("harm", ["empty", "no safetensors", "cut short", "no header"])
def test_a_broken_model(desk: Desk, harm: str) -> None:
    whole = resolve("smollm2-135m-instruct")
    broken = desk.root / "model"
    broken.mkdir()
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, broken)
    with (whole / "model.safetensors").open("rb") as file:
        head = file.read(1 << 20)
    content = {
        "empty": b"",
        "no safetensors": b"x" * 1000,
        "cut short": head,
        "no header": (10).to_bytes(8, "little") + b'{"a": 5}  ' + b"x" * 100,
    }[harm]
    (broken / "model.safetensors").write_bytes(content)
    done = desk.run("model: {path: ./model, max_model_len: 64}\nkv: {blocks: 8}\n", *PREFILL)
    assert done.returncode == 2, done.stderr
    assert "model" in done.stderr
    assert '"remedy"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use(system: System, desk: Desk) -> None:
    yaml = f'model: smollm2-135m-instruct\nrouter: {{frontend: "{system.address}"}}\n'
    done = desk.run(yaml, *ROUTER)
    assert done.returncode == 3, done.stderr
    assert "port_in_use" in done.stderr
    assert system.address in done.stderr


@pytest.mark.parametrize("name", ["router-0", "prefill-0", "decode-0", "relay-n0"])
def test_a_second_process_of_a_name_on_this_host(system: System, desk: Desk, name: str) -> None:
    role = system.topology.role_of(name)
    arguments = ("--topology", str(system.path), "--name", name)
    done = desk.run("", f"ds{role}", *arguments, env={"DS_RUN_DIR": str(system.topology.run_dir)})
    assert done.returncode == 3, done.stderr
    assert "duplicate_name" in done.stderr
    assert _ask(system)


def test_a_second_worker_of_a_name_from_elsewhere(system: System, desk: Desk) -> None:
    done = desk.run(system.path.read_text(), *PREFILL)
    assert done.returncode == 3, done.stderr
    assert "duplicate_name" in done.stderr


def test_a_worker_of_another_model(system: System, desk: Desk) -> None:
    done = desk.run(system.path.read_text().replace("bfloat16", "float32"), *PREFILL)
    assert done.returncode == 3, done.stderr
    assert "model_mismatch" in done.stderr


def test_a_worker_that_the_topology_does_not_name(system: System, desk: Desk) -> None:
    yaml = system.path.read_text() + "prefill: {replicas: 2}\n"
    done = desk.run(yaml, "dsprefill", "--topology", "t.yaml", "--name", "prefill-1")
    assert done.returncode == 3, done.stderr
    assert "prefill-1" in done.stderr
    assert "same topology" in done.stderr
