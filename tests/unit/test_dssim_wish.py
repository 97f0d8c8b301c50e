"""A workload by its name: files of every kind, mixes of clients, lengths like those of a log."""

from __future__ import annotations

import gzip
import statistics
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from dssim.resample import fit
from dssim.tracefile import read
from dssim.wish import Wish, make
from dssim.workload import Arrival
from dswire.errors import BadInput

MOONCAKE = '{"timestamp": %d, "input_length": 600, "output_length": 5, "hash_ids": [0, %d]}\n'


def rates(directory: Path) -> str:
    """ServeGen's two tables: a steady client and a bursty one."""
    rates, lengths = directory / "rates.csv.gz", directory / "lengths.csv"
    rows = "".join(f"0,{at},2,1,Gamma,1,1\n1,{at},1,4,Weibull,1,1\n" for at in (600, 1200, 1800))
    rates.write_bytes(gzip.compress(b"client,t_s,rate_per_s,cv,dist,arg1,arg2\n" + rows.encode()))
    lengths.write_text("field,tokens,weight\ninput_tokens,10,3\ninput_tokens,20,1\noutput_tokens,0,1\n")
    return f"servegen:{rates},{lengths}"


def test_times_on_a_grid_are_spread_and_hashes_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl.gz"
    lines = "".join(MOONCAKE % (3000 * (number // 50), number) for number in range(500))
    path.write_bytes(gzip.compress(lines.encode()))
    arrivals, timed = read(path)
    assert timed
    assert len({one.at_s for one in arrivals}) == 500
    assert [one.at_s for one in arrivals] == sorted(one.at_s for one in arrivals)
    # each stays within its tick
    assert all(3 * (one.hashes[1] // 50) <= one.at_s <= 3 * (one.hashes[1] // 50) + 3 for one in arrivals)


def test_rows_of_a_published_trace_may_be_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    row = '{"timestamp": "%d", "input_length": 7, "output_length": 0, "hash_ids": {"history": [1, 2]}}\n'
    path.write_text(row % 93 + "\n" + row % 82)
    assert read(path) == ([Arrival(0.0, 7, 1), Arrival(11.0, 7, 1)], True)


@pytest.mark.parametrize(
    ("hashes", "word"), [("[0]", "2 whole numbers are wanted"), ('[0, "x"]', "2 whole numbers are wanted")]
)
def test_hashes_that_do_not_fit_the_prompt_are_refused(tmp_path: Path, hashes: str, word: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": {hashes}}}')
    with pytest.raises(BadInput, match=word):
        read(path)


def test_a_broken_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"prompt_tokens,output_tokens\n" + b"1,1\n" * 1000)
    for content in (b"plain text", whole[: len(whole) // 2]):
        path = tmp_path / "w.csv.gz"
        path.write_bytes(content)
        with pytest.raises(BadInput, match="not a whole gzip file"):
            read(path)


def test_a_mix_has_the_rate_asked_for_and_its_clients_lengths(tmp_path: Path) -> None:
    made = make(Wish(rates(tmp_path), 6.0, 5000))
    assert len(made) / made[-1].at_s == pytest.approx(6.0, rel=0.1)
    assert {one.output_tokens for one in made} == {1}
    assert statistics.fmean(one.prompt_tokens for one in made) == pytest.approx(12.5, rel=0.05)
    assert [one.at_s for one in made] == sorted(one.at_s for one in made)
    gaps = [after.at_s - before.at_s for before, after in pairwise(made)]
    # one client of three requests in four would be Poisson; the other's bursts show
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) > 1.2
    assert make(Wish(rates(tmp_path), None, None, until_s=10.0))[-1].at_s < 10.0


def test_a_mix_without_rates_or_lengths_is_refused(tmp_path: Path) -> None:
    mix = rates(tmp_path)
    with pytest.raises(BadInput, match="is not understood"):
        make(Wish("servegen:one.csv", None))
    with pytest.raises(BadInput, match="rate of 0"):
        make(Wish(mix, 0.0))
    (tmp_path / "lengths.csv").write_text("field,tokens,weight\ninput_tokens,10,3\n")
    with pytest.raises(BadInput, match="no output_tokens"):
        make(Wish(mix, None))
    (tmp_path / "rates.csv.gz").write_bytes(gzip.compress(b"t_s,rate_per_s,cv\n0,0,1\n"))
    with pytest.raises(BadInput, match="no rate above 0"):
        make(Wish(mix, None))


def test_resampled_lengths_keep_means_and_what_goes_with_what() -> None:
    random = Random(3)
    seen = [(size, 10_000 // size) for size in (random.randint(100, 1000) for _ in range(500))]
    draw = fit(seen).draw(Random(1))
    drawn = [next(draw) for _ in range(5000)]
    for ours, theirs in zip(zip(*drawn, strict=True), zip(*seen, strict=True), strict=True):
        assert statistics.fmean(ours) == pytest.approx(statistics.fmean(theirs), rel=0.1)
        assert min(theirs) <= min(ours) <= max(ours) <= max(theirs)
    # long prompts have short answers in the log, and in what is drawn from it
    assert statistics.correlation(*zip(*drawn, strict=True)) < -0.7
    assert len(set(drawn)) > len(set(seen))


def test_a_log_can_be_resampled_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"at_s": 0, "prompt_tokens": 30, "output_tokens": 2}\n' * 3)
    made = make(Wish(f"like:{path}", 2.0, 7))
    assert [(one.prompt_tokens, one.output_tokens) for one in made] == [(30, 2)] * 7


def test_a_time_ends_what_has_no_end() -> None:
    made = make(Wish("sharegpt", 50.0, until_s=20.0))
    assert made[-1].at_s < 20.0
    assert len(made) == pytest.approx(1000, rel=0.2)
