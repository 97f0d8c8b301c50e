"""``dsctl topology``: what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from rich.console import Console

from dsctl import drawing
from dsctl.drawing import Live
from dsctl.topology import command
from dstopology.schema import json_schema
from dswire.errors import TopologyError
from dswire.messages.client import StatusReport, WorkerStatus
from dswire.messages.kv import PathInfo
from support.topologies import Desk

TWO_NODES = """\
model: m
nodes:
- {name: a, host: 127.0.0.1, devices: [cpu:0]}
- {name: b, host: 127.0.0.2, devices: [cpu:0, cpu:1]}
prefill: {place: [a/cpu:0]}
decode: {place: [b/cpu:0]}
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(tmp_path)
    for name, value in desk.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("DS_TOPOLOGY", raising=False)
    return desk


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def drawn(desk: Desk, text: str, live: Live) -> list[str]:
    """The tree, line by line, without its guides."""
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(drawing.tree(desk.load(text), live))
    return [re.sub(r"^[│├└─\s]+", "", line).rstrip() for line in capture.get().splitlines()]


def worker(name: str, role: str, state: str, handles: dict[str, int] | None = None) -> WorkerStatus:
    return WorkerStatus(
        name=name,
        role=role,
        node="a",
        state=state,
        waiting=1,
        running=2,
        blocks=100,
        blocks_held=30,
        handles=handles or {},
        uptime_s=5.0,
    )


def report(*workers: WorkerStatus) -> StatusReport:
    return StatusReport(
        router="router-0",
        incarnation="i",
        model="m",
        uptime_s=3723.0,
        workers=workers,
        requests={"decoding": 3},
        ended={},
    )


def test_show_draws_the_whole_when_nothing_runs(desk: Desk) -> None:
    result = call("show", "-f", desk.write(TWO_NODES))
    assert result.exit_code == 0
    for part in (
        "t.yaml  disaggregated, not running",
        "node b  127.0.0.2",
        "frontend  tcp://127.0.0.1:5555",
        "backend  tcp://127.0.0.1:5556",
        f"local  ipc://{desk.directory}/run/relay-a.sock",
        "data  tcp://127.0.0.2:7102",
        "streams  tcp://127.0.0.2:7103, 4 at once",
        "decode-0  1 rank",
        "idle",
        "prefill-0 → decode-0  tcp, between nodes, through relay-a and relay-b",
    ):
        assert part in result.stdout


def test_the_tree_tells_live_state(desk: Desk) -> None:
    live = Live(report(worker("prefill-0", "prefill", "up"), worker("relay-a", "relay", "up", {"ready": 2})))
    lines = drawn(desk, TWO_NODES.replace("prefill: {", "prefill: {threads: 1, "), live)
    assert "t.yaml  disaggregated, running for 1 h 2 min, 3 live requests" in lines
    assert "prefill-0  up  1 rank, 1 thread, 1 waiting, 2 running, 30 of 100 blocks held" in lines
    assert "relay-a  up  2 handles ready" in lines
    assert "router-0  up  at most 1024 requests" in lines


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (PathInfo("a", "tcp", 2.5e9), "2.50 GB/s"),
        (PathInfo("a", "tcp"), "no answer yet"),
        (PathInfo("a", "tcp", reason="nobody is there"), "nobody is there"),
    ],
)
def test_the_tree_tells_how_fast_kv_goes(desk: Desk, path: PathInfo, told: str) -> None:
    live = Live(report(worker("prefill-0", "prefill", "up")), paths={("a", "b"): path})
    way = "prefill-0 → decode-0  tcp, between nodes, through relay-a and relay-b"
    assert f"{way}, {told}" in drawn(desk, TWO_NODES, live)
    found = drawing.data(desk.load(TWO_NODES), live)
    assert found["paths"][0]["node"] == "b"


def test_the_tree_marks_what_is_lost(desk: Desk) -> None:
    lines = drawn(desk, TWO_NODES, Live(report(worker("decode-0", "decode", "lost"))))
    assert any(line.startswith("decode-0  lost") for line in lines)


def test_the_tree_names_every_rank(desk: Desk) -> None:
    text = "model: m\nprefill: {tp: 2, pp: 2, threads: 3}\ngateway: 127.0.0.1:8000\n"
    lines = drawn(desk, text, Live(None, "not running"))
    ranks = [line for line in lines if line.startswith("prefill-0  rank")]
    assert ranks[1:3] == [
        "prefill-0  rank 1, stage 1 of 2, part 2 of 2, 3 threads",
        "prefill-0  rank 2, stage 2 of 2, part 1 of 2, 3 threads",
    ]
    assert len(ranks) == 4
    assert "gateway-0  http://127.0.0.1:8000" in lines


def test_many_pairs_are_summed_up(desk: Desk) -> None:
    text = "model: m\nnodes:\n"
    devices = ", ".join(f"cpu:{index}" for index in range(5))
    text += f"- {{name: a, devices: [{devices}]}}\n- {{name: b, devices: [{devices}]}}\nprefill: 5\ndecode: 5\n"
    lines = drawn(desk, text, Live(None))
    assert lines[-3].endswith("unless other nodes hold fewer tokens by 4 times the sequence's")
    assert lines[-2:] == ["12 pairs  shm, within the node", "13 pairs  tcp, between nodes"]


def test_nothing_is_handed_over_where_decode_reads_the_prompts(desk: Desk) -> None:
    text = "model: m\nmode: colocated\nnodes: [{name: a, devices: [cpu:0]}]\ndecode: {place: [a/cpu:0]}\n"
    lines = drawn(desk, text, Live(None))
    assert lines[0].startswith("t.yaml  colocated")
    assert not any(line.startswith("KV hand-off") for line in lines)


def test_json_and_yaml_hold_the_same(desk: Desk) -> None:
    path = desk.write(TWO_NODES)
    found = json.loads(call("show", "-f", path, "--format", "json").stdout)
    assert found == yaml.safe_load(call("show", "-f", path, "--format", "yaml").stdout)
    assert found["router"]["frontend_connect"] == "tcp://127.0.0.1:5555"
    assert found["handoffs"] == [
        {
            "owner": "prefill-0",
            "puller": "decode-0",
            "transport": "tcp",
            "relays": ["relay-a", "relay-b"],
            "crosses_nodes": True,
            "stage_nodes": [],
        }
    ]
    assert found["live"] is None


def test_data_holds_the_live_report(desk: Desk) -> None:
    live = Live(report(worker("decode-0", "decode", "lost")))
    found = drawing.data(desk.load(TWO_NODES), live)
    assert json.loads(json.dumps(found))["live"]["workers"][0]["state"] == "lost"


def test_mermaid_draws_processes_and_ways(desk: Desk) -> None:
    chart = call("show", "-f", desk.write(TWO_NODES), "--format", "mermaid").stdout
    assert chart.startswith("flowchart LR\n")
    assert chart.count("subgraph") == chart.count("  end\n") == 2
    for edge in ('prefill-0 ==>|"KV"| relay-a', 'relay-a ==>|"KV, tcp"| relay-b', 'relay-b ==>|"KV"| decode-0'):
        assert edge in chart
    near = drawing.mermaid(desk.load("model: m\n"), Live(report(worker("decode-0", "decode", "lost"))))
    assert 'prefill-0 ==>|"KV, shm"| decode-0' in near
    assert "style decode-0 stroke-dasharray" in near


def test_stages_on_several_nodes_are_drawn_where_they_are(desk: Desk) -> None:
    spread = TWO_NODES.replace("prefill: {place: [a/cpu:0]}", "mode: colocated").replace(
        "{place: [b/cpu:0]}", "{pp: 2, place: [[a/cpu:0, b/cpu:1]]}"
    )
    lines = drawn(desk, spread, Live(None))
    at = [
        next(n for n, line in enumerate(lines) if told in line)
        for told in ("decode-0-a  runs", "stage 1", "node b")
    ]
    assert at == sorted(at)
    assert lines[-1].startswith("decode-0  rank 1, stage 2 of 2")
    chart = drawing.mermaid(desk.load(spread), Live(None))
    assert "decode-0 <--> decode-0-a" in chart
    assert 'decode-0-a["decode-0-a<br/>cpu:0"]' in chart
    assert 'decode-0["decode-0<br/>cpu:1"]' in chart


def test_kv_of_stages_on_several_nodes_is_told_to_stay_there(desk: Desk) -> None:
    text = TWO_NODES.replace("[cpu:0]", "[cpu:0, cpu:1]").replace(
        "place: [a/cpu:0]", "pp: 2, place: [[a/cpu:0, b/cpu:0]]"
    )
    text = text.replace("place: [b/cpu:0]", "pp: 2, place: [[a/cpu:1, b/cpu:1]]")
    assert drawn(desk, text, Live(None))[-1] == "prefill-0 → decode-0  shm, each stage within its node, a and b"
    chart = drawing.mermaid(desk.load(text), Live(None))
    for one in ("", "-a"):
        assert f'prefill-0{one} ==>|"KV, shm"| decode-0{one}' in chart


def test_validate_tells_what_is_there(desk: Desk) -> None:
    result = call("validate", desk.write(TWO_NODES))
    assert result.exit_code == 0
    assert "valid (1 prefill, 1 decode, nodes a, b)" in result.stdout
    assert "model m is not on this host: what depends on it was not checked" in result.stderr
    assert "did you mean" not in result.stderr
    desk.model(name="m")
    assert call("validate", desk.write(TWO_NODES)).stderr == ""


def test_validate_knows_which_model_is_meant(desk: Desk) -> None:
    result = call("validate", desk.write("model: smollm2-135m-instrct\n"))
    assert result.exit_code == 0
    assert "did you mean 'smollm2-135m-instruct'?" in result.stderr


def test_validate_warns_of_what_cannot_be_served_yet(desk: Desk) -> None:
    result = call("validate", desk.write("model: m\ngateway: 127.0.0.1:8000\n"))
    assert result.exit_code == 0
    assert "gateway: this release has no HTTP gateway" in result.stderr


def test_validate_refuses_with_the_files_errors(desk: Desk) -> None:
    wrong = desk.write("model: m\nprefil: 2\n")
    result = call("validate", wrong)
    assert isinstance(result.exception, TopologyError)
    assert result.exception.message == f"{wrong}:2: prefil: there is no such key"
    result = call("validate", wrong, desk.directory / "none.yaml")
    assert isinstance(result.exception, TopologyError)
    assert "prefil" in result.exception.message
    assert "none.yaml: cannot be read" in result.exception.message


def test_schema_is_printed_whole() -> None:
    assert json.loads(call("schema").stdout) == json.loads(json.dumps(json_schema()))


def test_looking_at_the_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom dsctl.topology import command\n"
        "command(['show', '--help'], standalone_mode=False)\n"
        "print([one for one in ('yaml', 'rich', 'zmq', 'torch', 'numpy', 'dstopology') if one in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.splitlines()[-1] == "[]"
