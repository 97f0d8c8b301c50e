"""The hand-off as a whole system does it: from the end of prefill to the sequence's place in a decode batch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import msgspec

from dsbench.handoff.world import directory, process
from dsclient import Client
from dsengine.store import resolve
from dstopology.endpoints import free_ports
from dstopology.load import load
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
#: by streams, as between hosts; prompts are read in steps of ``step`` tokens
_LONG = """
force_transport: tcp
prefill: {{max_batch_tokens: {step}}}
relay: {{port: {port}, overlap: {overlap}}}
"""
#: longest wait for all processes to serve, in seconds
_START_LIMIT_S = 300.0


class HandOff(msgspec.Struct, frozen=True):
    """Medians over requests that came one by one, in milliseconds."""

    prompt_tokens: int
    #: all stages from the first token to the first decode step
    hand_off_ms: float
    #: stage of the ledger -> milliseconds
    stages_ms: dict[str, float]


class Overlap(msgspec.Struct, frozen=True):
    """What handing long prompts over in parts hides: medians over requests that came one by one."""

    prompt_tokens: int
    step_tokens: int
    #: as in :class:`HandOff`, in parts and in one piece
    hand_off_ms: float
    hand_off_whole_ms: float
    #: of the time of the transfer
    hidden: float


def hand_off(client: Client, tokens: int, rounds: int) -> HandOff:
    """Ask for two tokens behind prompts of ``tokens`` tokens, none of which begins like another."""
    # the first round is the warm-up
    ledgers = [_ask(client, tokens, number) for number in range(rounds + 1)][1:]
    stages = {stage: median(_ms(ledger, stage) for ledger in ledgers) for stage in _STAGES}
    return HandOff(tokens, median(map(_whole_ms, ledgers)), stages)


def overlap(in_parts: Client, whole: Client, tokens: int, step: int, rounds: int) -> Overlap:
    """The same of two systems in turns; the one hands over in parts what a step of ``step`` tokens has read."""
    pairs = [(_ask(in_parts, tokens, number), _ask(whole, tokens, number)) for number in range(rounds + 1)][1:]
    ledgers = [one for one, _ in pairs]
    hidden = median(one.transfer_hidden_s / (one.transfer_hidden_s + one.transfer_s) for one in ledgers)
    whole_ms = median(_whole_ms(one) for _, one in pairs)
    return Overlap(tokens, step, median(map(_whole_ms, ledgers)), whole_ms, hidden)


def _ask(client: Client, tokens: int, number: int) -> Ledger:
    prompt = [1000 + (number * 31 + place * 7) % 900 for place in range(tokens)]
    return client.generate(prompt_ids=prompt, temperature=0.0, max_tokens=2, ignore_eos=True).ledger


def _whole_ms(ledger: Ledger) -> float:
    return sum(_ms(ledger, stage) for stage in _STAGES)


def _ms(ledger: Ledger, stage: str) -> float:
    seconds: float = getattr(ledger, stage)
    return seconds * 1e3


@contextmanager
def system(model: str, tokens: int, *, step: int | None = None, overlap: str = "off") -> Iterator[Client]:
    """A whole system on this host, and a client of it. Raises what the store raises, and :class:`Failed`.

    ``step``: KV takes a stream, and prompts are read in steps of so many tokens.
    """
    # a process that cannot start for want of it says so in its log only
    resolve(model)
    with ExitStack() as stack:
        root = stack.enter_context(directory())
        path, port = root / "t.yaml", free_ports(3)
        text = _TOPOLOGY.format(model=model, port=port, max_len=tokens + 16)
        if step is not None:
            text += _LONG.format(step=step, port=port + 1, overlap=f'"{overlap}"')
        path.write_text(text)
        (root / "run").mkdir()
        topology = load(path, {**os.environ, "DS_RUN_DIR": str(root / "run")})
        names = topology.process_names()
        running = {name: stack.enter_context(process(topology, name)) for name in names}
        client = stack.enter_context(Client(topology.router.frontend_connect, timeout_s=_START_LIMIT_S))
        deadline = time.monotonic() + _START_LIMIT_S
        while any(worker.state != "up" for worker in client.status().workers):
            ended = [name for name, one in running.items() if one.poll() is not None]
            if ended or time.monotonic() > deadline:
                told = "\n".join((topology.run_dir / f"{name}.log").read_text() for name in ended)
                raise Failed(f"the system does not start: {', '.join(ended) or 'it takes too long'}\n{told}")
            time.sleep(0.1)
        yield client
