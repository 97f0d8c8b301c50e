"""``dsctl plan``: what it writes, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dsctl.plan import command
from dsplan.errors import ProfileMismatch
from dsplan.profile import Profile, Subject

ARGUMENTS = [
    "--model",
    "OPT-13B",
    "--devices-per-node",
    "2",
    "--algorithm",
    "low",
    "--workload",
    "fixed:200,20",
    "--no-check",
]


def test_the_command_writes_json_a_topology_and_a_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, page = tmp_path / "t.yaml", tmp_path / "r.html"
    arguments = [*ARGUMENTS, "--mode", "disaggregated", "--price", "2", "--json", "--write", str(path)]
    result = CliRunner().invoke(command, [*arguments, "--report", str(page)], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["prefill"]["replicas"], found["decode"]["replicas"], found["devices"]) == (1, 1, 2)
    assert found["cost_per_million_tokens"] > 0
    assert yaml.safe_load(path.read_text())["prefill"]["tp"] == found["prefill"]["tp"]
    html = page.read_text()
    # two devices hold one system, of which there is no front
    assert html.count("<svg") == html.count("</svg>") == 1
    assert "Only one system was found" in html
    assert "src=" not in html
    again = CliRunner().invoke(
        command, [*ARGUMENTS, "--mode", "disaggregated", "--compare", str(path)], catch_exceptions=False
    )
    assert "yours" in again.output


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--price", "cheap"], "is not understood"),
        (["--price", "h100=2"], "names h100, which is not planned for"),
        (["--network", "0.0001"], "0.0001 Gbit/s is absurd"),
        (["--compare", "/nowhere.yaml"], "cannot be read"),
        (["--stack", "nothing"], "there is no stack nothing"),
        (["--device", "h900"], "device h900 is not known"),
        (["--workload", "/nowhere.csv"], "/nowhere.csv"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(option: list[str], words: str) -> None:
    result = CliRunner().invoke(command, [*ARGUMENTS, *option])
    assert words in str(result.exception)


@pytest.mark.parametrize(
    ("model", "words"), [("smollm2", "is of smollm2, not of"), ("opt-13b", "is not complete yet")]
)
def test_a_profile_of_another_model_or_without_times_is_refused(tmp_path: Path, model: str, words: str) -> None:
    path = tmp_path / "p.json"
    Profile(Subject("machine", model, "fingerprint", "float32", 1)).save(path)
    result = CliRunner().invoke(command, [*ARGUMENTS, "--profile", str(path)])
    assert isinstance(result.exception, ProfileMismatch)
    assert words in str(result.exception)
