"""From YAML to the resolved topology, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstopology.load import check_servable, find, load
from dswire.errors import TopologyError
from support.topologies import Desk

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "deploy" / "topologies").glob("*.yaml"))
#: the example of the architecture document, word for word
EXAMPLE = """\
model:   {path: smollm2-135m-instruct, dtype: bfloat16, max_model_len: 8192}
slo:     {ttft_ms: 250, tpot_ms: 60, attainment: 0.9}
mode:    disaggregated
nodes:   [{name: n0, host: 127.0.0.1, devices: [cpu:0, cpu:1]}]
router:  {node: n0, frontend: "tcp://127.0.0.1:5555"}
gateway: {node: n0, bind: "127.0.0.1:8000"}
prefill: {replicas: 1, tp: 1, pp: 1, place: [[n0/cpu:0]]}
decode:  {replicas: 1, tp: 1, pp: 1, place: [[n0/cpu:1]]}
relay:   {streams: 8, lease_s: 30, transports: [shm, tcp]}
security: {curve: auto}
"""
TWO_NODES = """\
model: m
nodes:
- {name: a, host: 10.0.0.1, devices: [cpu:0]}
- {name: b, host: 10.0.0.2, devices: [cpu:0]}
"""


def wrong_files() -> list[tuple[str, list[str]]]:
    """Text and problems of each file in ``golden/wrong_topologies.txt``."""
    cases = (ROOT / "tests" / "golden" / "wrong_topologies.txt").read_text().split("---\n")[1:]
    parts = [case.removesuffix("\n").split("\n=> ") for case in cases]
    return [(f"{text}\n", problems) for text, *problems in parts]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_topologies_that_come_with_the_project_can_be_served(path: Path, desk: Desk) -> None:
    topology = load(path, desk.env)
    check_servable(topology)
    roles = {"decode", "router"} | (set() if topology.mode == "colocated" else {"prefill", "relay"})
    roles |= {"rankhost"} if topology.hosts else set()
    assert roles == {topology.role_of(one) for one in topology.process_names()}


def test_there_are_example_topologies() -> None:
    assert {path.name for path in EXAMPLES} >= {"laptop.yaml", "two-nodes.yaml", "compose.yaml"}


def test_the_example_of_the_architecture(desk: Desk) -> None:
    topology = desk.load(EXAMPLE)
    assert topology.process_names() == ("relay-n0", "prefill-0", "decode-0", "router-0", "gateway-0")
    assert topology.slo.ttft_s == 0.25
    assert topology.slo.tpot_s == 0.06
    assert topology.model.dtype == "bfloat16"
    assert topology.gateway is not None
    assert topology.gateway.bind == "127.0.0.1:8000"
    assert topology.relay("relay-n0").streams == 8
    assert topology.instance("decode-0").devices == ("cpu:1",)


def test_the_least_file_has_all_defaults(desk: Desk) -> None:
    topology = desk.load("model: smollm2-135m-instruct\n")
    assert topology.model.name == "smollm2-135m-instruct"
    assert (topology.model.dtype, topology.model.max_model_len) == ("float32", 8192)
    assert [(one.name, one.host, one.devices) for one in topology.nodes] == [
        ("n0", "127.0.0.1", ("cpu:0", "cpu:1"))
    ]
    router = topology.router
    assert router.frontend_bind == router.frontend_connect == "tcp://127.0.0.1:5555"
    assert router.backend_bind == f"ipc://{topology.run_dir}/router-backend.sock"
    prefill, decode = topology.instances
    assert (prefill.max_queue, prefill.max_batch, prefill.max_batch_tokens) == (64, 64, 2048)
    assert (decode.max_queue, decode.max_batch) == (4096, 256)
    assert (prefill.block_size, prefill.kv_memory_nbytes, prefill.kv_blocks) == (16, 512 << 20, None)
    relay = topology.relay("relay-n0")
    assert (relay.data_bind, relay.data_connect) == (None, None)
    assert not topology.security.encrypted
    assert topology.transport("n0", "n0") == "shm"


def test_short_forms_mean_the_same_as_the_long_ones(desk: Desk) -> None:
    short = desk.load(
        "model: m\nrouter: tcp://127.0.0.1:6000\ngateway: 127.0.0.1:8000\nprefill: 2\ndecode: 1\n"
        "security: on\nnodes: [{name: n0, devices: [cpu:0, cpu:1, cpu:2]}]\n"
    )
    long = desk.load(
        "model: {path: m}\nrouter: {frontend: tcp://127.0.0.1:6000}\ngateway: {bind: 127.0.0.1:8000}\n"
        "prefill: {place: [n0/cpu:0, [n0/cpu:1]]}\ndecode: {replicas: 1}\nsecurity: {curve: on}\n"
        "nodes: [{name: n0, devices: [cpu:0, cpu:1, cpu:2]}]\n"
    )
    assert short.model == long.model
    assert short.gateway == long.gateway
    assert short.security == long.security
    assert short.router.frontend_bind == long.router.frontend_bind == "tcp://127.0.0.1:6000"
    assert [(one.name, one.devices) for one in short.instances] == [
        (one.name, one.devices) for one in long.instances
    ]


def test_environment_and_digest(desk: Desk, tmp_path: Path) -> None:
    topology = desk.load("model: m", DS_RUN_DIR="/run/x", DS_SHM_DIR="/mnt/y", DS_KEYS_DIR="/etc/keys")
    assert topology.run_dir == Path("/run/x")
    assert topology.security.keys_dir == Path("/etc/keys")
    assert topology.instance("prefill-0").segment == Path(f"/mnt/y/ds-{topology.digest}-prefill-0.kv")
    assert topology.relay("relay-n0").keep == Path(f"/mnt/y/ds-{topology.digest}-relay-n0.keep")
    plain = desk.load("model: m")
    assert plain.digest == topology.digest
    assert plain.run_dir.name == plain.digest
    assert desk.load("model: m ").digest != plain.digest
    other = Desk(tmp_path / "other")
    other.directory.mkdir()
    assert other.load("model: m").digest != plain.digest


def test_two_nodes_meet_over_tcp(desk: Desk) -> None:
    topology = desk.load(TWO_NODES + "prefill: {place: [a/cpu:0]}\ndecode: {place: [b/cpu:0]}\n")
    assert topology.transport("a", "b") == "tcp"
    assert topology.router.backend_bind == topology.router.backend_connect == "tcp://10.0.0.1:5556"
    assert [(one.data_bind, one.data_connect) for one in topology.relays] == [
        ("tcp://10.0.0.1:7100", "tcp://10.0.0.1:7100"),
        ("tcp://10.0.0.2:7102", "tcp://10.0.0.2:7102"),
    ]
    streams = [(str(one.stream_bind), str(one.stream_connect)) for one in topology.relays]
    assert streams == [(f"tcp://10.0.0.{at}",) * 2 for at in ("1:7101", "2:7103")]
    assert topology.security.encrypted


def test_stages_on_several_nodes_have_rank_hosts_and_an_address_to_join(desk: Desk) -> None:
    text = (
        f"{TWO_NODES}- {{name: c, host: 10.0.0.3, devices: [cpu:0, cpu:1]}}\nmode: colocated\n"
        "decode: {tp: 1, pp: 2, place: [[a/cpu:0, c/cpu:0], [c/cpu:1, b/cpu:0]]}\n"
    )
    topology = desk.load(text)
    assert topology.process_names() == ("decode-0", "decode-1", "decode-0-a", "decode-1-c", "router-0")
    first, second = topology.instances
    assert [(one.node, one.nodes) for one in (first, second)] == [("c", ("a", "c")), ("b", ("c", "b"))]
    assert (first.join_bind, second.join_connect) == ("tcp://10.0.0.3:7300", "tcp://10.0.0.2:7301")
    host = topology.host("decode-1-c")
    assert (topology.node_of(host.name).name, topology.role_of(host.name)) == ("c", "rankhost")
    assert (host.instance, second.ranks_on(host.node)) == ("decode-1", (0,))
    assert topology.security.encrypted


def test_stages_hand_over_their_kv_within_their_nodes(desk: Desk) -> None:
    text = (
        f"{TWO_NODES.replace('[cpu:0]', '[cpu:0, cpu:1]')}prefill: {{pp: 2, place: [[a/cpu:0, b/cpu:0]]}}\n"
        "decode: {pp: 2, place: [[a/cpu:1, b/cpu:1]]}\n"
    )
    topology = desk.load(text)
    assert [one.name for one in topology.relays] == ["relay-b"]
    assert [one.name for one in topology.hosts] == ["prefill-0-a", "decode-0-a"]
    assert topology.transport("b", "b") == "shm"
    assert {one.stage_nodes for one in topology.instances} == {("a", "b")}


def test_a_node_without_instances_needs_no_relay(desk: Desk) -> None:
    text = "model: m\nnodes: [{name: front}, {name: back, host: 127.0.0.2, devices: [cpu:0, cpu:1]}]\n"
    topology = desk.load(text)
    assert [relay.name for relay in topology.relays] == ["relay-back"]
    assert topology.relays[0].data_bind is None
    assert topology.router.backend_bind == "tcp://127.0.0.1:5556"


def test_dns_names_bind_all_addresses_and_are_encrypted(desk: Desk) -> None:
    topology = desk.load(
        "model: m\nnodes: [{name: n0, host: serve-1, devices: [cpu:0, cpu:1]}]\nrouter: tcp://serve-1:5555\n"
        "force_transport: tcp\n"
    )
    assert topology.router.frontend_bind == "tcp://0.0.0.0:5555"
    assert topology.router.frontend_connect == "tcp://serve-1:5555"
    assert topology.relays[0].data_bind == "tcp://0.0.0.0:7100"
    assert topology.relays[0].data_connect == "tcp://serve-1:7100"
    assert topology.security.encrypted


@pytest.mark.parametrize("host", ["*", "0.0.0.0"])
def test_a_frontend_on_all_addresses_is_reached_at_its_node(desk: Desk, host: str) -> None:
    topology = desk.load(
        f"model: m\nnodes: [{{name: a, host: 10.1.1.1, devices: [cpu:0, cpu:1]}}]\nrouter: tcp://{host}:80\n"
    )
    assert topology.router.frontend_bind == "tcp://0.0.0.0:80"
    assert topology.router.frontend_connect == "tcp://10.1.1.1:80"


@pytest.mark.parametrize(("curve", "wanted"), [("auto", False), ("on", True), ("off", False)])
def test_encryption_on_one_machine_is_a_choice(desk: Desk, curve: str, wanted: bool) -> None:
    assert desk.load(f"model: m\nsecurity: {curve}\n").security.encrypted is wanted


def test_tcp_can_be_forced_within_a_node(desk: Desk) -> None:
    for text in ("force_transport: tcp\n", "relay: {transports: [tcp]}\n"):
        topology = desk.load("model: m\n" + text)
        assert topology.transport("n0", "n0") == "tcp"
        assert topology.relays[0].data_bind == "tcp://127.0.0.1:7100"


def test_kv_of_a_role_overrides_the_common_one(desk: Desk) -> None:
    topology = desk.load("model: m\nkv: {block_size: 32, blocks: 7}\ndecode: {kv: {memory: 1MiB}}\n")
    prefill, decode = topology.instances
    assert (prefill.block_size, prefill.kv_blocks) == (32, 7)
    assert (decode.block_size, decode.kv_blocks, decode.kv_memory_nbytes) == (32, None, 1 << 20)


def test_cuda_devices_make_bfloat16_the_default(desk: Desk) -> None:
    topology = desk.load("model: m\nnodes: [{name: g, devices: [cuda:0, cuda:1]}]\n")
    assert topology.model.dtype == "bfloat16"


def test_model_paths_are_relative_to_the_file(desk: Desk) -> None:
    (desk.directory / "plain").mkdir()
    here = str(desk.directory.resolve())
    assert desk.load("model: ./some/model.gguf\n").model.path == f"{here}/some/model.gguf"
    assert desk.load("model: ./some/model.gguf\n").model.name == "model"
    assert desk.load("model: ../m\n").model.path == str(desk.directory.resolve().parent / "m")
    assert desk.load("model: plain\n").model.path == f"{here}/plain"
    assert desk.load("model: org/name\n").model.path == "org/name"
    assert desk.load("model: org/name\n").model.name == "name"


def test_names_that_are_not_there(desk: Desk) -> None:
    topology = desk.load("model: m")
    for look in (topology.instance, topology.relay, topology.relay_of, topology.role_of, topology.node):
        with pytest.raises(TopologyError, match="'zzz'") as caught:
            look("zzz")
        assert caught.value.remedy


def test_roles_and_nodes_of_processes(desk: Desk) -> None:
    topology = desk.load("model: m\ndecode: 2\n")
    names = ("relay-n0", "prefill-0", "decode-0", "decode-1", "router-0")
    assert topology.process_names() == names
    assert [topology.role_of(name) for name in names] == ["relay", "prefill", "decode", "decode", "router"]
    assert {topology.node_of(name).name for name in names} == {"n0"}


@pytest.mark.parametrize(("text", "wanted"), wrong_files())
def test_each_problem_is_told_with_line_key_and_reason(desk: Desk, text: str, wanted: list[str]) -> None:
    assert desk.problems(text) == wanted


def test_all_problems_are_told_at_once(desk: Desk) -> None:
    text = "model: {pth: x}\nslo: {ttft_ms: fast}\ndecode: {replicas: 0, tp: '2'}\nrelay:\nnodes: []\n"
    keys = [problem.split(": ")[1] for problem in desk.problems(text)]
    assert keys == ["model.pth", "model.path", "slo.ttft_ms", "decode.replicas", "decode.tp", "relay", "nodes"]
    text = "model: m\nrouter: {node: b, frontend: 'tcp://h:0'}\ndecode: {place: [b/cpu:0]}\nforce_transport: tcp\n"
    text += "relay: {transports: [shm]}\n"
    keys = [problem.split(": ")[1] for problem in desk.problems(text)]
    assert keys == ["router.node", "router.frontend", "decode.place[0]", "force_transport"]


def test_a_key_that_is_missing_is_the_one_that_is_meant(desk: Desk) -> None:
    with pytest.raises(TopologyError) as caught:
        desk.load("modle: m\n")
    assert "modle: there is no such key\n    did you mean 'model'?" in str(caught.value)


def test_the_remedy_of_a_single_problem_is_its_own(desk: Desk) -> None:
    with pytest.raises(TopologyError) as caught:
        desk.load("modl: m\nmodel: m\n")
    assert caught.value.remedy == "did you mean 'model'?"
    assert caught.value.exit_code == 2


def test_socket_paths_must_fit_the_kernel(desk: Desk) -> None:
    found = desk.problems("model: m\n", DS_RUN_DIR="/tmp/" + "x" * 90)
    assert len(found) == 2
    assert all("more than 107" in problem for problem in found)
    assert desk.problems("model: m\n", DS_RUN_DIR="/tmp/" + "x" * 80) == []


def test_what_this_release_cannot_serve_is_valid_but_refused(desk: Desk) -> None:
    topology = desk.load("model: m\ngateway: 127.0.0.1:8000\n")
    with pytest.raises(TopologyError) as caught:
        check_servable(topology)
    assert caught.value.message.startswith(f"{topology.path}:2: gateway: this release has no HTTP gateway")
    assert caught.value.remedy


def test_colocated_instances_read_their_prompts_themselves(desk: Desk) -> None:
    topology = desk.load("model: m\nmode: colocated\ndecode: {replicas: 2, prefill_priority: true}\n")
    assert topology.process_names() == ("decode-0", "decode-1", "router-0")
    assert topology.relays == ()
    assert [(one.max_batch_tokens, one.prefill_priority) for one in topology.instances] == [(512, True)] * 2
    check_servable(topology)


def test_which_prompts_are_short(desk: Desk) -> None:
    topology = desk.load("model: m\nmode: conditional\nconditional: {threshold_tokens: 100}\n")
    assert topology.threshold_tokens == 100
    assert [one.name for one in topology.relays] == ["relay-n0"]


def test_prefix_caching_is_on_unless_it_is_switched_off(desk: Desk) -> None:
    assert all(one.prefix_cache for one in desk.load("model: m\n").instances)
    topology = desk.load("model: m\nkv: {prefix_cache: false}\ndecode: {kv: {prefix_cache: true}}\n")
    assert [one.prefix_cache for one in topology.instances] == [False, True]


def test_finding_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("given.yaml", {"DS_TOPOLOGY": "set.yaml"}) == Path("given.yaml")
    assert find(None, {"DS_TOPOLOGY": "set.yaml"}) == Path("set.yaml")
    with pytest.raises(TopologyError, match="no topology was named"):
        find(None, {})
    (tmp_path / "deploy/topologies").mkdir(parents=True)
    (tmp_path / "deploy/topologies/laptop.yaml").touch()
    assert find(None, {}) == Path("deploy/topologies/laptop.yaml")
    (tmp_path / "topology.yaml").touch()
    assert find(None, {}) == Path("topology.yaml")


def test_int8_weights_are_for_cpus(desk: Desk) -> None:
    model = "model: {path: m, quantization: int8}\n"
    assert desk.load(model).model.quantization == "int8"
    assert desk.load("model: {path: m, quantization: none}\n").model.quantization is None
    found = desk.problems(f"{model}nodes: [{{name: g, devices: [cuda:0, cuda:1]}}]\n")
    assert found == ["1: model.quantization: int8 weights are for CPU devices"]
