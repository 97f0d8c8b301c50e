"""docker-compose.yml starts what the topology says, and with a container engine the stack answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstopology.load import load
from dstopology.resolved import Topology

ROOT = Path(__file__).parents[2]
TOPOLOGY = ROOT / "deploy/topologies/compose.yaml"
IN_IMAGE = "/etc/distserve/topology.yaml"


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def topology(tmp_path: Path) -> Topology:
    return load(TOPOLOGY, {"DS_RUN_DIR": "/run/distserve", "DS_SHM_DIR": str(tmp_path)})


def processes(compose: dict[str, Any]) -> dict[str, Any]:
    """The services that run a process of the topology, by its name."""
    services = compose["services"].values()
    return {one["environment"]["DS_NAME"]: one for one in services if "DS_NAME" in one["environment"]}


def test_one_container_for_each_process(compose: dict[str, Any], topology: Topology) -> None:
    commands = {name: service["command"] for name, service in processes(compose).items()}
    assert commands == {
        name: ["python", "-m", f"ds{topology.role_of(name)}", "--topology", IN_IMAGE, "--name", name]
        for name in topology.process_names()
    }


def test_every_process_shares_sockets_and_memory(compose: dict[str, Any], topology: Topology) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    places = dict(re.findall(r"(DS_\w+)=(\S+)", dockerfile))
    for service in processes(compose).values():
        volumes = dict(volume.split(":")[:2] for volume in service["volumes"])
        assert volumes == {"model": places["DS_HOME"], "run": places["DS_RUN_DIR"], "kv": places["DS_SHM_DIR"]}
    assert places["DS_TOPOLOGY"] == IN_IMAGE
    assert topology.router.backend_bind.startswith(f"ipc://{places['DS_RUN_DIR']}/")


def test_volumes_belong_to_the_user_of_the_image(compose: dict[str, Any]) -> None:
    user = re.search(r"--uid (\d+)", (ROOT / "deploy/Dockerfile").read_text())
    assert user is not None
    for name in ("run", "kv"):
        assert f"uid={user[1]}," in compose["volumes"][name]["driver_opts"]["o"]


def test_only_the_frontend_is_published_and_on_loopback(compose: dict[str, Any], topology: Topology) -> None:
    published = {name: service.get("ports", []) for name, service in processes(compose).items()}
    port = topology.router.frontend_bind.rpartition(":")[2]
    assert published.pop("router-0") == [f"127.0.0.1:${{DS_PORT:-5555}}:{port}"]
    assert not any(published.values())


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    "DS_TEST_CONTAINERS" not in os.environ or shutil.which("docker") is None,
    reason="builds an image: set DS_TEST_CONTAINERS=1 where there is a container engine",
)
def test_the_stack_answers() -> None:
    script = ROOT / "deploy/try-containers.sh"
    done = subprocess.run([script], cwd=ROOT, capture_output=True, text=True, timeout=1100, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the container stack works" in done.stdout
