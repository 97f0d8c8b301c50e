"""Packed weights in a file that processes share: the same bits, made once, made anew when it has to be."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsengine import model
from dsengine.native import shared
from dsengine.native.packed_file import Mapped
from dsengine.native.packing import Packing
from dsengine.runner import Engine
from dsengine.span import Span
from dsengine.weights import Checkpoint
from dshost.library import compiler
from support.tiny_llama import engine_config, make_model, prompt_of

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
#: a process that maps a file, touches all of it, says so, and stays until its standard input ends
HOLDER = """
import sys
from pathlib import Path
from dsengine.native.packed_file import Mapped
mapped = Mapped.open(Path(sys.argv[1]))
print(int(mapped._content[::512].sum()), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model whose packed weights go into a file all the same; kernels come from where they always lie."""
    monkeypatch.setattr(shared, "LEAST_NBYTES", 0)
    monkeypatch.setattr(shared, "directory", lambda: tmp_path / "packed")
    return make_model(tmp_path / "model")


def logits(model_dir: Path, dtype: str = "bfloat16", quantization: str | None = None) -> Tensor:
    engine = Engine(engine_config(model_dir, dtype=dtype, quantization=quantization))
    tokens = prompt_of(40)
    made = engine.forward([Span(tokens, 0, range(8))], [20, 39])
    assert made is not None
    kept = made.clone()
    engine.close()
    return kept


def the_file() -> Path:
    (path,) = shared.files(shared.directory())
    return path


@pytest.mark.parametrize("form", [("float32", None), ("bfloat16", None), ("bfloat16", "int8")])
def test_mapped_weights_answer_bit_for_bit_like_own_ones(
    model_dir: Path, form: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_now = logits(model_dir, *form)
    monkeypatch.setattr(model, "Checkpoint", None)  # the second one reads nothing but the file
    mapped = logits(model_dir, *form)
    monkeypatch.setattr(model, "Checkpoint", Checkpoint)
    monkeypatch.setattr(shared, "LEAST_NBYTES", 1 << 60)
    own = logits(model_dir, *form)
    assert torch.equal(packed_now, own)
    assert torch.equal(mapped, own)


def test_the_pages_are_those_of_all_processes(model_dir: Path) -> None:
    logits(model_dir)
    path = the_file()
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        mapped = Mapped.open(path)
        assert mapped is not None
        assert int(mapped._content[::512].sum()) > 0
        maps = Path("/proc/self/smaps").read_text()
    sizes = {"Rss": 0, "Pss": 0}
    for region in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE):
        if str(path) in region:
            for name in sizes:
                sizes[name] += int(re.findall(rf"^{name}: +(\d+) kB", region, flags=re.MULTILINE)[0])
    assert 0 < sizes["Pss"] <= sizes["Rss"] / 2 + 4


def test_many_at_once_pack_once(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Packing] = []
    run = Packing.run

    def counted(self: Packing) -> None:
        runs.append(self)
        run(self)

    monkeypatch.setattr(Packing, "run", counted)
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(logits, [model_dir] * 3)
    assert all(torch.equal(first, other) for other in others)
    assert len(runs) == 1


@pytest.mark.parametrize("damage", ["short", "empty", "index"])
def test_a_damaged_file_is_made_anew(model_dir: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    before = logits(model_dir)
    path = the_file()
    whole = path.read_bytes()
    broken = {"short": whole[:-100], "empty": b"", "index": whole[:-60] + b"\xff" + whole[-59:]}[damage]
    path.write_bytes(broken)
    assert Mapped.open(path) is None
    assert torch.equal(logits(model_dir), before)
    assert "is damaged: packing the weights again" in caplog.text
    assert the_file().read_bytes() == whole


def test_other_weights_replace_the_file(model_dir: Path) -> None:
    before, old = logits(model_dir), the_file()
    make_model(model_dir, seed=1)
    after = logits(model_dir)
    assert not torch.equal(before, after)
    assert the_file() != old


def test_what_nobody_wants_any_more_goes_when_another_is_made(model_dir: Path, tmp_path: Path) -> None:
    for name in ("gone", "unused"):
        shutil.copytree(model_dir, tmp_path / name)
        logits(tmp_path / name)
    shutil.rmtree(tmp_path / "gone")
    (unused,) = (path for path in shared.files(shared.directory()) if path.name.startswith("unused"))
    long_ago = time.time() - shared.KEEP_S - 60
    os.utime(unused, (long_ago, long_ago))
    logits(model_dir)
    assert the_file().name.startswith("model-")


def test_where_there_is_no_room_each_process_has_its_own(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = logits(model_dir)
    monkeypatch.setattr(shared, "directory", lambda: model_dir / "config.json" / "packed")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(model_dir), wanted)
    assert "cannot hold packed weights, so each process has its own" in caplog.text
    monkeypatch.setattr(shared, "directory", lambda: model_dir.parent / "full")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7))
    assert torch.equal(logits(model_dir), wanted)
    assert "7 bytes are free, for a model of" in caplog.text
