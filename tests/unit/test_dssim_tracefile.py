"""Workloads out of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dssim.tracefile import read
from dssim.workload import Arrival
from dswire.errors import BadInput


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_csv_with_arrivals_is_replayed(tmp_path: Path) -> None:
    path = write(tmp_path, "w.csv", "at_s,prompt_tokens,output_tokens,who\n0.5,10,2,a\n0.5,11,3,b\n2,12,4,c\n")
    assert read(path) == ([Arrival(0.5, 10, 2), Arrival(0.5, 11, 3), Arrival(2.0, 12, 4)], True)


def test_json_lines_may_be_without_arrivals(tmp_path: Path) -> None:
    path = write(
        tmp_path, "w.jsonl", '{"prompt_tokens": 10, "output_tokens": 2}\n\n{"output_tokens":1,"prompt_tokens":3}'
    )
    assert read(path) == ([Arrival(0.0, 10, 2), Arrival(0.0, 3, 1)], False)


def test_columns_of_public_traces_are_known(tmp_path: Path) -> None:
    path = write(tmp_path, "w.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n1,2,3\n")
    assert read(path) == ([Arrival(1.0, 2, 3)], True)


def test_dates_count_from_the_first(tmp_path: Path) -> None:
    rows = "2023-11-16 18:17:03.9799600,8,1\n2023-11-16 18:18:04.4799600,9,2\n"
    arrivals, timed = read(write(tmp_path, "w.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    assert timed
    assert [one.at_s for one in arrivals] == pytest.approx([0.0, 60.5], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("w.csv", "", "has no requests"),
        ("w.csv", "prompt_tokens,output_tokens\n", "has no requests"),
        ("w.csv", "prompt_tokens\n3\n", ":2: column output_tokens is missing"),
        ("w.csv", "prompt_tokens,output_tokens\n1,1\n1,x\n", ":3: column output_tokens: 'x' is not a number"),
        ("w.csv", "prompt_tokens,output_tokens\n1,1\n1\n", ":3: column output_tokens: None is not a number"),
        (
            "w.csv",
            "prompt_tokens,output_tokens\n0,1\n",
            ":2: column prompt_tokens: '0' is not a number of at least 1",
        ),
        ("w.csv", "prompt_tokens,output_tokens\n1.5,1\n", ":2: column prompt_tokens: 1.5 is not a whole number"),
        ("w.csv", "at_s,prompt_tokens,output_tokens\n2,1,1\n1,1,1\n", ":3: column at_s: 1 comes before"),
        ("w.csv", "at_s,prompt_tokens,output_tokens\nnan,1,1\n", ":2: column at_s: 'nan'"),
        ("w.csv", "at_s,prompt_tokens,output_tokens\ninf,1,1\n", ":2: column at_s: 'inf'"),
        ("w.csv", "TIMESTAMP,prompt_tokens,output_tokens\nlate,1,1\n", ":2: column TIMESTAMP: 'late' is no date"),
        ("w.jsonl", '{"prompt_tokens": 1, "output_tokens": true}', ":1: column output_tokens: True"),
        ("w.jsonl", '{"prompt_tokens": 1, "output_tokens": 1}\n{', ":2: not JSON"),
        ("w.jsonl", "3", ":1: a JSON object is wanted, not int"),
        ("w.jsonl", '{"input_length": 1}', ":1: column output_tokens is missing"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, name: str, text: str, word: str) -> None:
    with pytest.raises(BadInput) as refused:
        read(write(tmp_path, name, text))
    assert word in refused.value.message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        read(tmp_path / "none.csv")
    (tmp_path / "w.csv").write_bytes(b"prompt_tokens,output_tokens\n\xff\xfe,1\n")
    with pytest.raises(BadInput, match="not UTF-8"):
        read(tmp_path / "w.csv")
