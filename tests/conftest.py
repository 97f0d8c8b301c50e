"""For all tests: no example of hypothesis is judged by the time it took, which a busy machine decides."""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# a run in the background of a script starts with SIGINT ignored; tests that send it need Python's own handler
signal.signal(signal.SIGINT, signal.default_int_handler)
