"""How much of a prompt goes into a step, and which sequences decode may take in.

Prefill aims at ``Lm`` tokens a step, the shortest length that saturates the device, so that steps take an even
time and pipeline stages stay full (DistServe, section 4.3): first come, first served, shorter prompts are merged
up to ``Lm``, a longer one is read in chunks of ``Lm``. Where steps are shared with sequences that decode, every
prompt is cut to fit the room that is left, so that nobody's next token waits for a long prompt (Sarathi-Serve,
section 4.2).
"""

from __future__ import annotations


def chunk(left: int, room: int, whole_up_to: int = 0) -> int:
    """How many of a prompt's ``left`` unread tokens go into a step with room for ``room`` more.

    Up to ``whole_up_to`` tokens are read in one piece, so 0 means: in a later step.
    """
    if left <= room:
        return left
    return 0 if left <= whole_up_to else room


def decode_may_admit(needed_blocks: int, free_blocks: int, running: int) -> bool:
    """Whether a waiting sequence of ``needed_blocks`` may take its blocks.

    Every running sequence keeps one block in reserve to grow into, or admission would cause the preemption of
    what it was admitted beside.
    """
    return needed_blocks + running <= free_blocks or (running == 0 and needed_blocks <= free_blocks)
