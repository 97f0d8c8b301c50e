"""The paper's studies: what they find where the answer is known, and that their data are written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsctl.study import APPLICATIONS as NAMES
from dsctl.study import command
from dsplan.errors import DoesNotFit, PlanInput, UnreachableSlo
from dsplan.studies import affinity, applications, interference, large, parallelism
from dsplan.studies.base import Setting, crossing
from dswire.errors import BadInput

SMALL = "fixed:400,30"


def test_where_two_curves_cross() -> None:
    assert crossing({1: 0.0, 2: 2.0}, {1: 1.0, 2: 1.0}) == pytest.approx(1.5)
    assert crossing({1: 0.0, 2: 0.5}, {1: 1.0, 2: 1.0}) is None


def test_low_rates_favour_tp_and_high_rates_pp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallelism, "REQUESTS", 1000)
    found = parallelism.run(Setting("Llama-3-8B", "h100"))
    assert "TP 2 is better below" in found.sentences[0]
    assert "as in the paper" in found.sentences[0]
    assert all("does not hold" not in one for one in found.sentences[1:])
    with pytest.raises(PlanInput, match="cannot be cut"):
        parallelism.run(Setting("OPT-66B"))


def test_systems_of_the_interference_study_have_equal_devices() -> None:
    found = interference.run(Setting("OPT-13B", workload=SMALL, devices_per_node=2))
    assert {row["devices"] for row in found.rows} == {2}
    assert len({row["system"] for row in found.rows}) == 3
    shares = [row["attainment"] for row in found.rows if row["system"] == "disaggregated"]
    assert shares[0] > shares[-1]
    assert len(found.sentences) == 6
    with pytest.raises(DoesNotFit, match="two instances"):
        interference.run(Setting("OPT-13B", devices_per_node=1))


@pytest.mark.parametrize("study", [interference, affinity, large])
def test_objectives_out_of_reach_are_an_error_and_no_finding(study: Any) -> None:
    with pytest.raises(UnreachableSlo, match="a TTFT of 1 ms cannot be had"):
        study.run(Setting("OPT-13B", workload=SMALL, ttft_s=0.001, devices_per_node=2))


def test_a_fast_network_serves_phases_that_lie_anywhere_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "LINKS", (1, 800))
    found = affinity.run(Setting("OPT-13B", workload=SMALL, nodes=2, devices_per_node=2))
    high = {row["gbit_per_s"]: row["goodput_per_device"] for row in found.rows if row["algorithm"] == "high"}
    assert high.get(1, 0.0) < high[800]
    low = [row["goodput_per_device"] for row in found.rows if row["algorithm"] == "low"]
    assert max(low) == min(low)


def test_stages_side_by_side_send_no_kv_between_nodes() -> None:
    found = large.run(Setting("Llama-2-13B", "l4", SMALL, ttft_s=2.5, tpot_s=0.15, nodes=3, devices_per_node=2))
    assert "Side by side" in found.sentences[1]
    rows = {row["algorithm"]: row for row in found.rows}
    assert rows["low"]["kv_gbit_per_s_between_nodes"] == 0
    assert rows["high"]["kv_gbit_per_s_between_nodes"] > 0


def test_an_application_has_both_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(NAMES) == set(applications.APPLICATIONS)
    monkeypatch.setattr(applications, "NODES", 1)
    monkeypatch.setattr(applications, "DEVICES_PER_NODE", 2)
    found = applications.run(Setting("OPT-13B"), ("chatbot-13b", "chatbot-175b"))
    assert {row["curve"] for row in found.rows} == {"rate_per_device", "slo_scale"}
    assert found.sentences[1] == "chatbot-175b: no mode meets the objectives on a100-80g."
    scaled = [row["attainment"] for row in found.rows if row["curve"] == "slo_scale"]
    assert scaled[0] < scaled[len(applications.SCALES) - 1]


def test_the_command_draws_and_writes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, table = tmp_path / "p.svg", tmp_path / "p.csv"
    arguments = ["parallelism", "--plot", str(plot), "--csv", str(table), "--json"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    told = json.loads(result.stdout)
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(told["rows"])
    assert "<svg" in plot.read_text()
    wrong = CliRunner().invoke(command, ["parallelism", "--plot", str(tmp_path / "p.doc")])
    assert isinstance(wrong.exception, BadInput)
