"""The fit finds what was put in, and the shipped efficiencies hold for rows that they were not fitted on."""

from __future__ import annotations

import csv
import gzip
import json
import statistics
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from dsplan import fit
from dsplan.devices import find_device
from dsplan.roofline import STACKS, RooflineLatency, efficiencies
from dsplan.shapes import find_model

MEASURED = Path(__file__).parents[3] / "shared" / "data" / "gpu"
GEMM = fit.TABLES[0]

needs_measurements = pytest.mark.skipif(not MEASURED.exists(), reason="the measurements are not on this host")


def test_the_fit_finds_the_parameters_that_made_the_rows() -> None:
    device = find_device("h100")
    random = np.random.default_rng(1)
    inputs = np.exp2(random.integers(0, 14, size=(3, 400))).astype(np.float64)
    inputs[1:] = np.maximum(inputs[1:], 256)
    truth = (6e3, 0.7, 0.6, 50.0, 2.0, 4e3)
    rows = inputs, fit.predicted(GEMM, truth, device, inputs)
    split = fit.Split(device, rows, rows)
    assert fit.report(GEMM, fit.fit(GEMM, [split]), split)["mape"] < 0.5
    assert fit.report(GEMM, GEMM.start, split)["mape"] > 5


@needs_measurements
@pytest.mark.parametrize("table", fit.TABLES, ids=lambda table: table.name)
def test_shipped_efficiencies_have_the_errors_that_they_ship_with(table: fit.Table) -> None:
    shipped = json.loads(files("dsplan").joinpath("data/efficiency.json").read_text())
    split = fit.read(MEASURED, table, "a100-80g")
    errors = fit.report(table, tuple(shipped["devices"]["a100-80g"][table.name]), split)
    told = shipped["errors"]["a100-80g"][table.name]["held_out"]
    assert errors == pytest.approx(told, abs=0.3)


def splitwise() -> dict[tuple[int, int, int], tuple[float, float]]:
    """(tp, batch, prompt) -> median prompt and token time in ms, of Llama2-70B on A100."""
    cells: dict[tuple[int, int, int], list[tuple[float, float]]] = defaultdict(list)
    path = MEASURED / "splitwise_perf_model_a100_llama2_70b.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            key = int(row["tensor_parallel"]), int(row["batch_size"]), int(row["prompt_size"])
            # one cell of the table is known to be wrong
            if key[:2] != (2, 64):
                cells[key].append((float(row["prompt_time"]), float(row["token_time"])))
    return {
        key: (statistics.median(p for p, _ in v), statistics.median(t for _, t in v)) for key, v in cells.items()
    }


def test_launches_on_a_host_of_h100s_take_what_launch_bound_all_reduces_say() -> None:
    """Both hosts were measured with the same software, and launches are told in time of a host of A100s."""
    launch_s = [efficiencies(name)["allreduce_2023"][0] for name in ("a100-80g", "h100")]
    assert launch_s[0] == pytest.approx(launch_s[1], rel=0.05)
    assert find_device("a100-80g").host_factor > find_device("h100").host_factor == find_device("h200").host_factor


@needs_measurements
def test_roofline_meets_splitwises_rows_at_tp_4_which_nothing_was_set_on() -> None:
    latency = RooflineLatency(find_model("Llama-2-70B"), find_device("a100-80g"), STACKS["eager-2023"])
    instance = latency.instance(4, 1)
    prompts, tokens = [], []
    for (tp, batch, length), (prompt_ms, token_ms) in splitwise().items():
        if tp == 4:
            tokens.append(abs(instance.decode_step_s(batch, batch * (length + 64)) * 1e3 / token_ms - 1))
            if batch == 1 and length <= 2048:
                prompts.append(abs(instance.prefill_stage_s(length, length**2, 1) * 1e3 / prompt_ms - 1))
    assert statistics.mean(tokens) < 0.05
    assert statistics.mean(prompts) < 0.05


def test_a_directory_without_measurements_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fit", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        fit.main()
    assert ended.value.code == 2
    assert "cannot be read" in capsys.readouterr().err
