"""For all tests: hypothesis, signals, logs, and the kernels of GPUs."""

from __future__ import annotations

import os
import signal
import sys

import structlog
from hypothesis import settings

# no example is judged by the time it took, which a busy machine decides
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# a run in the background of a script starts with SIGINT ignored; tests that send it need Python's own handler
signal.signal(signal.SIGINT, signal.default_int_handler)

# services that run within a test would else log into what a command of that test prints
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))

# before anything imports Triton: without a GPU its interpreter runs the kernels, on the CPU
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
