"""The command line that every service shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstopology import service
from dswire.errors import TopologyError


def test_a_process_of_another_service_is_refused_with_the_one_that_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_HOME", str(tmp_path))
    path = tmp_path / "t.yaml"
    path.write_text("model: tiny\n")
    assert service._load(path, "decode-0", "decode").role_of("decode-0") == "decode"
    with pytest.raises(TopologyError, match="'decode-0' is a decode process, not a prefill one") as refused:
        service._load(path, "decode-0", "prefill")
    assert "python -m dsdecode" in refused.value.remedy
