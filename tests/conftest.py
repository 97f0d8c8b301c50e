"""For all tests: no example of hypothesis is judged by the time it took, which a busy machine decides."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
