"""Files by which ranks meet."""

from __future__ import annotations

from pathlib import Path

from dsengine.rendezvous import Rendezvous


def test_what_a_killed_process_left_goes_when_the_next_of_its_name_starts(tmp_path: Path) -> None:
    one, other = Rendezvous(tmp_path, "decode-0"), Rendezvous(tmp_path, "decode-0-n1")
    left, kept = one.new(), other.new()
    # ranks that are stages on several nodes meet each by itself
    for path in (left, left.with_name(f"{left.name}.1"), kept):
        path.touch()
    again = Rendezvous(tmp_path, "decode-0")
    assert list(tmp_path.iterdir()) == [kept]
    assert again.new() not in (left, again.new())


def test_files_are_removed_once_all_have_met(tmp_path: Path) -> None:
    rendezvous = Rendezvous(tmp_path, "decode-0")
    rendezvous.new().touch()
    rendezvous.clear()
    assert list(tmp_path.iterdir()) == []
