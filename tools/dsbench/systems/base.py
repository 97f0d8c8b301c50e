"""What a system under measurement is to the process that runs it. Standard library only."""

from __future__ import annotations

from typing import Protocol


class System(Protocol):
    """A loaded model, or whatever else answers with seconds.

    One that knows how long it has been inside its kernels tells so by ``kernel_s()``, seconds of all steps so far.
    """

    def prepare(self, phase: str, batch: int, context: int, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """Bring everything into the state before the step; not timed. Temperature 0 takes the likeliest token."""
        ...

    def step(self) -> float:
        """One step of what was prepared last -> seconds. As often as one likes."""
        ...
