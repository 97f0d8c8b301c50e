"""An encrypted system: clients on the allow-list are served, all others get a typed error in time."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsclient import AsyncClient, Client
from dstopology.endpoints import free_ports
from dswire.errors import BadInput, DsError, RouterLost, Unauthorized
from dswire.keys import CurveKeys, load_client, load_system, write_pair
from support.system import System, running_system

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(180)]

PROMPT = "The capital of France is"
TIMEOUT_S = 30.0
IDLE_LIMIT_S = 60.0
#: a process that cannot join has said so by then
REFUSED_LIMIT_S = 90.0


def _dsctl(*arguments: str) -> str:
    command = [sys.executable, "-m", "dsctl", "keys", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Keys of a system, of its client anna, and of a stranger."""
    root = Path(tempfile.mkdtemp(prefix="ds-"))
    _dsctl("make", "--dir", str(root / "keys"))
    _dsctl("make", "--dir", str(root / "keys"), "--client", "anna", "--out", str(root / "anna"))
    _dsctl("make", "--dir", str(root / "other"))
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def yaml(home: Path) -> str:
    return f"""
model: {{path: smollm2-135m-instruct, dtype: bfloat16, max_model_len: 512}}
router: {{frontend: "tcp://127.0.0.1:{{port}}", backend: "tcp://127.0.0.1:{{port}}"}}
relay: {{port: {{port}}}}
kv: {{blocks: 64}}
security: {{curve: on, keys: {home / "keys"}}}
force_transport: tcp
"""


@pytest.fixture(scope="module")
def system(yaml: str, home: Path) -> Iterator[System]:
    with running_system(yaml, keys=load_client(home / "anna/client.key", home / "anna/system.pub")) as running:
        yield running
        running.await_idle(IDLE_LIMIT_S)


def _keys(home: Path, whose: str) -> CurveKeys | None:
    """Keys that are not allowed."""
    match whose:
        case "a stranger's":
            path = home / "stranger.key"
            if not path.exists():
                write_pair(path, home / "stranger.pub")
            return load_client(path, home / "keys/system.pub")
        case "another system's":
            return load_system(home / "other")
    return None


def test_an_allowed_client_is_served(system: System) -> None:
    with system.client() as asking:
        assert " Paris" in asking.generate(PROMPT, temperature=0.0, max_tokens=8).text


def test_the_command_line_speaks_with_the_keys_that_were_made(system: System, home: Path) -> None:
    command = [sys.executable, "-m", "dsctl", "generate", PROMPT, "--temperature", "0", "--max-tokens", "8"]
    where = ["--address", system.address, "--keys", str(home / "anna")]
    done = subprocess.run([*command, *where], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert " Paris" in done.stdout


@pytest.mark.parametrize(
    ("whose", "error", "timeout_s"),
    [
        ("none", Unauthorized, TIMEOUT_S),
        ("a stranger's", Unauthorized, TIMEOUT_S),
        # its messages cannot be read at all, and so are not answered
        ("another system's", RouterLost, 3.0),
    ],
)
async def test_a_client_that_is_not_allowed_is_told_so_in_time(
    system: System, home: Path, whose: str, error: type[DsError], timeout_s: float
) -> None:
    asking = AsyncClient(system.address, keys=_keys(home, whose), timeout_s=timeout_s)
    try:
        with pytest.raises(error) as caught:
            await asking.generate(PROMPT, max_tokens=8)
        assert caught.value.remedy
    finally:
        await asking.close()


def test_a_key_is_let_in_and_shut_out_without_a_restart(system: System, home: Path) -> None:
    _dsctl("make", "--dir", str(home / "keys"), "--client", "bob", "--out", str(home / "bob"))
    keys = load_client(home / "bob/client.key", home / "bob/system.pub")
    with Client(system.address, keys=keys) as bob:
        assert bob.generate(PROMPT, temperature=0.0, max_tokens=2).choices
    _dsctl("revoke", "--dir", str(home / "keys"), "bob")
    again = Client(system.address, keys=keys, timeout_s=TIMEOUT_S)
    with pytest.raises(Unauthorized):
        again.connect()
    again.close()


@pytest.mark.parametrize(
    ("security", "told", "status"),
    [
        ("{curve: off}", "one side encrypts and the other does not", Unauthorized.exit_code),
        ("{curve: on, keys: OTHER}", "does not answer", None),
        ("{curve: on, keys: EMPTY}", "dsctl keys make", BadInput.exit_code),
    ],
    ids=["no keys", "another system's", "keys missing"],
)
def test_a_worker_without_the_right_key_cannot_join(
    system: System, home: Path, tmp_path: Path, security: str, told: str, status: int | None
) -> None:
    # a port of its own; but for the keys it would be welcome
    data = system.topology.relays[0].data_connect
    assert data is not None
    yaml = system.path.read_text().replace(f"{{port: {data.rsplit(':', 1)[1]}}}", f"{{port: {free_ports(2)}}}")
    yaml = yaml.replace(
        f"{{curve: on, keys: {home / 'keys'}}}",
        security.replace("OTHER", str(home / "other")).replace("EMPTY", str(home / "empty")),
    )
    path = tmp_path / "t.yaml"
    path.write_text(yaml)
    run_dir = tempfile.mkdtemp(prefix="ds-")
    env = {**os.environ, "DS_RUN_DIR": run_dir, "DS_SHM_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "dsrelay", "--topology", str(path), "--name", "relay-n0"],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = _read_until(process, told)
        assert '"ready"' not in said
        assert status is None or process.wait(REFUSED_LIMIT_S) == status
        assert not (Path(run_dir) / "relay-n0.ready").exists()
    finally:
        process.terminate()
        process.communicate(timeout=REFUSED_LIMIT_S)
        shutil.rmtree(run_dir)
    with system.client() as asking:
        assert all(one.state == "up" for one in asking.status().workers)


def _read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    said = ""
    while text not in said:
        readable, _, _ = select.select([process.stderr], [], [], REFUSED_LIMIT_S)
        line = process.stderr.readline() if readable else ""
        assert line, f"it ended, or fell silent, without {text!r}:\n{said}"
        said += line
    return said
