"""One holder at a time, and nobody waits for ever."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dshost.lock import exclusive
from dswire.errors import Failed


def test_second_holder_comes_after_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with exclusive(tmp_path / "sub" / "lock", wait_s=60):
            order.append("second")

    with exclusive(tmp_path / "sub" / "lock", wait_s=60):
        thread = threading.Thread(target=second)
        thread.start()
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_wait_has_an_end(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "lock", wait_s=60),
        pytest.raises(Failed, match="another process has held"),
        exclusive(tmp_path / "lock", wait_s=0.01),
    ):
        pass
    # the thread that was left waiting got the lock when it came free, and gave it back
    with exclusive(tmp_path / "lock", wait_s=60):
        pass


def test_a_killed_holder_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dshost.lock import exclusive\n"
        "with exclusive(Path(sys.argv[1]), wait_s=60):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Failed), exclusive(tmp_path / "lock", wait_s=0.01):
            pass
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        with exclusive(tmp_path / "lock", wait_s=60):
            pass
