"""The roofline beside measurements: of one's own, and public ones where they are on this host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsctl.latency import command
from dsplan import accuracy, kernels, served
from dsplan.accuracy import Row, errors, measured, published, step_s
from dsplan.devices import find_device, unseen
from dsplan.errors import PlanInput
from dsplan.roofline import STACKS, RooflineLatency, efficiencies
from dsplan.shapes import find_model

MEASURED = Path(__file__).parents[3] / "shared" / "data" / "gpu"
HEADER = "model,device,tp,pp,phase,batch,tokens,ms\n"


def test_errors_by_hand() -> None:
    rows = [Row("a", 1.0, 1.1), Row("a", 1.0, 0.7), Row("b", 2.0, 2.0)]
    first, second = errors(rows)
    assert (first.table, first.rows, first.mape, first.p90) == pytest.approx(("a", 2, 0.2, 0.3))
    assert (second.mape, second.bias) == (0.0, 0.0)


def test_the_error_of_an_unseen_device_is_told_where_it_can_be() -> None:
    first, second = errors([Row("a", 1.0, 1.1, 1.2), Row("a", 1.0, 0.9, 0.6), Row("b", 1.0, 1.0)])
    assert first.blind == pytest.approx(0.3)
    assert second.blind is None


def test_an_unseen_device_has_the_efficiencies_of_the_others() -> None:
    for name in ("a100-80g", "h100", "h200"):
        device = find_device(name)
        assert efficiencies(unseen(device).efficiency)["gemm"] != efficiencies(device.efficiency)["gemm"]
    assert unseen(find_device("l40s")) == find_device("l40s")


def test_only_hopper_and_later_split_the_context_of_heads_that_share_no_kv() -> None:
    times = []
    for name in ("l40s", "h20"):
        device = find_device(name)
        fitted = efficiencies(device.efficiency)["generation"]
        alone, shared = (kernels.generation_s(fitted, device, 1, 30_000, heads, 1, 128) for heads in (1, 4))
        times.append(alone / shared)
    assert times[0] > 5
    assert times[1] < 1.5


def test_own_measurements_are_read_and_compared(tmp_path: Path) -> None:
    model = RooflineLatency(find_model("OPT-13B"), find_device("h100")).instance(2, 1)
    ms = step_s(model, "decode", 8, 512) * 1e3
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + f"OPT-13B,h100,2,1,decode,8,512,{ms * 2}\n")
    (row,) = measured(path, STACKS["graphs"])
    assert row.error == pytest.approx(0.5)


def test_what_a_table_leaves_out_may_be_said_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("phase,batch,tokens,ms\ndecode,8,512,9\n")
    said = {"model": "OPT-13B", "device": "h100", "tp": "2", "pp": "1"}
    (row,) = measured(path, STACKS["graphs"], said)
    assert row.table == "OPT-13B h100 decode"
    with pytest.raises(PlanInput, match="line 2: there is no model"):
        measured(path, STACKS["graphs"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("OPT-13B,h100,2,1,reading,8,512,9", "line 2: phase is 'reading'"),
        ("OPT-13B,h100,2,1,decode,0,512,9", "line 2: batch is 0"),
        ("OPT-13B,h100,2,1,decode,8,512,fast", "line 2: could not convert"),
        ("OPT-13B,h900,2,1,decode,8,512,9", "line 2: device h900 is not known"),
        ("OPT-99B,h100,2,1,decode,8,512,9", "line 2: model OPT-99B"),
        ("OPT-13B,h100,7,1,decode,8,512,9", "line 2: OPT-13B with 40 heads"),
        ("OPT-13B,h100,2,1,decode,8,512", "line 2: there is no ms"),
        ("", "has no rows"),
    ],
)
def test_malformed_measurements_are_refused_by_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + line)
    with pytest.raises(PlanInput, match=words):
        measured(path, STACKS["graphs"])


def test_distserves_profile_is_met_although_nothing_was_fitted_on_it() -> None:
    found = {one.table: one for one in errors(accuracy.distserve_rows())}
    assert all(one.mape < 0.1 for name, one in found.items() if "doubtful" not in name)


SERVED = "model_path,system,mode,gemm_quant_mode,backend,backend_version,tp_size,pp_size,batch_size,isl,osl"
SERVED += ",silicon_ttft_ms,silicon_tpot_ms\n"


def test_whole_requests_are_modelled_by_their_steps_and_the_prompts_read_meanwhile(tmp_path: Path) -> None:
    model = RooflineLatency(find_model("Llama-3-8B"), find_device("h100")).instance(2, 1)
    step = model.decode_step_s(4, 4 * 1100)
    reading = model.mixed_stage_s(1000, 1000**2, 1, 4, 4 * 1100) - step
    name = "meta-llama/Llama-3.1-8B-Instruct,h100_sxm,agg"
    rows = [f"{name},,vllm,1,2,1,4,1000,200,{reading * 4e3},{step * 200 / 199 * 1e3}"]
    # another precision, and more than memory holds
    rows += [f"{name},fp8,vllm,1,2,1,4,1000,200,1,1", f"{name},,vllm,1,1,1,4000,1000,200,1,1"]
    (tmp_path / served.FILE).write_text(SERVED + "\n".join(rows))
    (row,) = (one for one in published(tmp_path) if one.table.startswith("requests"))
    assert row.table == "requests of vllm 1, Llama-3-8B, h100"
    assert row.modelled_s == pytest.approx(row.measured_s)
    assert row.blind_s is not None
    (tmp_path / served.FILE).write_text("model_path,system\nQwen/Qwen3-32B,h100_sxm\n")
    with pytest.raises(PlanInput, match="'mode'"):
        published(tmp_path)


@pytest.mark.skipif(not MEASURED.exists(), reason="the measurements are not on this host")
def test_public_measurements_are_met() -> None:
    told = errors(published(MEASURED))
    found = {one.table: one.mape for one in told}
    assert found["GEMMs of a layer, a100-80g"] < 0.08
    assert found["GEMMs of a layer, h100"] < 0.13
    assert found["decode attention, a100-80g"] < 0.16
    assert max(one.blind for one in told if one.blind) < 0.25
    assert found["Splitwise prefill beyond 2048 tokens, Llama-2-70B TP 4 (held out)"] < 0.15
    assert found["Splitwise decode, Llama-2-70B TP 4 (held out)"] < 0.05
    assert found["Splitwise prefill to 2048 tokens, Llama-2-70B TP 4 (held out)"] < 0.1
    assert max(found["all-reduce from 8 MiB, a100-80g"], found["all-reduce from 8 MiB, h100"]) < 0.15


def test_the_command_tells_times_and_errors(tmp_path: Path) -> None:
    shown = CliRunner().invoke(command, ["--model", "Qwen3-30B-A3B", "--device", "l40s", "--tp", "2", "--json"])
    assert shown.exit_code == 0
    assert {one["phase"] for one in json.loads(shown.output)["steps"]} == {"prefill", "decode"}
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + "OPT-13B,h100,2,1,decode,8,512,9\n")
    told = CliRunner().invoke(command, ["--measured", str(path), "--json"])
    assert json.loads(told.output)[0]["table"] == "OPT-13B h100 decode"
    table = CliRunner().invoke(command, ["--model", "OPT-13B"])
    assert "prefill" in table.output
