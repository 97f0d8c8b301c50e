"""The hand-off as a whole system does it: from the end of prefill to the sequence's place in a decode batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import msgspec

from dsclient import Client
from dstopology.endpoints import free_ports
from dswire.errors import Failed
from dswire.messages.client import Ledger

#: the stages of the ledger between prefill and the first decode step. ``decode_wire_s`` is not all of the hand-off:
#: the second token's way back is part of it
_STAGES = ("placement_s", "transfer_wait_s", "transfer_s", "decode_queue_s", "decode_wire_s")
_TOPOLOGY = """
model: {{path: {model}, dtype: bfloat16, max_model_len: {max_len}}}
router: {{frontend: "tcp://127.0.0.1:{port}"}}
kv: {{memory: 256MiB}}
"""
_START_LIMIT_S = 300.0


class HandOff(msgspec.Struct, frozen=True):
    """Medians over requests that came one by one, in milliseconds."""

    prompt_tokens: int
    #: all stages from the first token to the first decode step
    hand_off_ms: float
    #: stage of the ledger -> milliseconds
    stages_ms: dict[str, float]


def hand_off(client: Client, tokens: int, rounds: int) -> HandOff:
    """Ask for two tokens behind prompts of ``tokens`` tokens, none of which begins like another."""
    ledgers = []
    for number in range(rounds + 1):
        prompt = [1000 + (number * 31 + place * 7) % 900 for place in range(tokens)]
        made = client.generate(prompt_ids=prompt, temperature=0.0, max_tokens=2, ignore_eos=True)
        ledgers.append(made.ledger)
    # the first round is the warm-up
    stages = {stage: median(_ms(ledger, stage) for ledger in ledgers[1:]) for stage in _STAGES}
    whole = median(sum(_ms(ledger, stage) for stage in _STAGES) for ledger in ledgers[1:])
    return HandOff(tokens, whole, stages)


def _ms(ledger: Ledger, stage: str) -> float:
    seconds: float = getattr(ledger, stage)
    return seconds * 1e3


@contextmanager
def system(model: str, tokens: int) -> Iterator[Client]:
    """A whole system on this host, and a client of it. Raises :class:`Failed` when it does not start."""
    # short: Unix sockets lie in it
    directory = Path(tempfile.mkdtemp(prefix="dsb-"))
    path = directory / "t.yaml"
    port = free_ports()
    path.write_text(_TOPOLOGY.format(model=model, port=port, max_len=tokens + 16))
    try:
        _dsctl("up", "-d", path)
        with Client(f"tcp://127.0.0.1:{port}") as client:
            yield client
    finally:
        _dsctl("down", path)
        shutil.rmtree(directory)


def _dsctl(*arguments: str | Path) -> None:
    *words, path = map(str, arguments)
    env = {**os.environ, "DS_RUN_DIR": str(Path(path).parent / "run")}
    command = [sys.executable, "-m", "dsctl", *words, "-f", path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_START_LIMIT_S, check=False)
    if done.returncode != 0:
        raise Failed(f"dsctl {words[0]}: {done.stderr.strip() or done.stdout.strip()}")
