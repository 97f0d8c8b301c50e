"""The trace of a run for Perfetto."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from dssim.processes import Step
from dssim.records import Observations, Record, Run
from dssim.trace import chrome
from dswire.messages.client import Ledger
from dswire.messages.worker import Load


def a_run() -> Run:
    seen = Observations(keep_steps=True)
    seen.step(Step("prefill-0", 10.5, 1.0, 2, 30))
    seen.step(Step("decode-0", 11.5, 0.5, 1, 16))
    seen.load(11.0, "decode-0", Load(waiting=1, running=2, blocks_held=3))
    ledger = Ledger(prefill_queue_s=0.25, prefill_s=1.0, decode_s=0.5, ttft_s=1.25, total_s=1.75)
    good = Record(0, 0.25, 15, 2, 1.3, 1.85, "", ledger)
    bad = Record(1, 0.5, 15, 0, None, 0.1, "overloaded", None)
    return Run((bad, good), 2.1, 10.0, 0.1, 0.1, 20, seen, {})


def events(kind: str) -> list[dict[str, Any]]:
    trace = json.loads(json.dumps(chrome(a_run())))
    return [event for event in trace["traceEvents"] if event["ph"] == kind]


def test_steps_lie_in_the_row_of_their_instance() -> None:
    rows = {event["tid"]: event["args"]["name"] for event in events("M") if event["name"] == "thread_name"}
    steps = {rows[event["tid"]]: (event["ts"], event["dur"], event["args"]) for event in events("X")}
    assert steps == {
        "prefill-0": (5e5, 1e6, {"sequences": 2, "tokens": 30}),
        "decode-0": (15e5, 5e5, {"sequences": 1, "tokens": 16}),
    }


def test_loads_are_counters() -> None:
    (counter,) = events("C")
    assert (counter["name"], counter["ts"]) == ("decode-0", 1e6)
    assert counter["args"] == {"waiting": 1, "running": 2, "blocks held": 3}


def test_stages_lie_one_after_the_other_within_their_request() -> None:
    begun = [(event["name"], event["ts"]) for event in events("b") if event["id"] == 0]
    ended = [event["ts"] for event in events("e") if event["id"] == 0]
    assert begun == [("15 + 2 tokens", 25e4), ("prefill_queue", 3e5), ("prefill", 55e4), ("decode", 155e4)]
    assert ended == [21e5, 55e4, 155e4, 205e4]
    assert max(ended[1:]) <= ended[0]


def test_a_failed_request_has_the_name_of_its_error_and_every_slice_ends() -> None:
    assert [event["name"] for event in events("b") if event["id"] == 1] == ["overloaded"]
    slices = Counter((event["id"], event["name"]) for event in events("b"))
    assert slices == Counter((event["id"], event["name"]) for event in events("e"))
