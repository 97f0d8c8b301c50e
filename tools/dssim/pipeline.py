"""The stages of an instance: every step passes them one after the other, each of which has one step at a time.

All stages hold a step equally long, so where steps differ, a short one waits behind a long one: the bubbles of
pipeline parallelism. Sending what one stage made to the next is part of the time that the stage takes.
"""

from __future__ import annotations


class Pipeline:
    """Steps leave in the order in which they came."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        #: when the last step leaves each stage
        self._free_s = [0.0] * stages

    def step(self, now: float, whole_s: float) -> tuple[float, float]:
        """When a step that comes now enters the first stage and leaves the last; ``whole_s``: of all stages."""
        each_s = whole_s / self.stages
        enters = at_s = max(now, self._free_s[0])
        for stage, free_s in enumerate(self._free_s):
            at_s = self._free_s[stage] = max(at_s, free_s) + each_s
        return enters, at_s
