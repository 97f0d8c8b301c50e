"""Which queued prompts run together in one prefill step, and which sequences decode may take in.

Prefill aims at ``Lm`` tokens a batch, the shortest length that saturates the device, so that steps take an even
time and pipeline stages stay full (DistServe, section 4.3): FCFS, shorter prompts are merged up to ``Lm``, a
longer one runs alone. First come first served also means: nobody overtakes a head that waits for blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def prefill_batch(
    lengths: Iterable[int], *, target_tokens: int, max_sequences: int, free_blocks: int, block_size: int
) -> int:
    """How many prompts from the head of the queue form the next step.

    ``lengths``: tokens of each queued prompt, in order. ``target_tokens`` is ``Lm``. 0 when the queue is empty or
    its head does not fit the free blocks.
    """
    count = tokens = blocks = 0
    for length in lengths:
        blocks += -(-length // block_size)
        tokens += length
        if blocks > free_blocks or count == max_sequences or (count and tokens > target_tokens):
            break
        count += 1
    return count


def decode_may_admit(needed_blocks: int, free_blocks: int, running: int) -> bool:
    """Whether a waiting sequence of ``needed_blocks`` may take its blocks.

    Every running sequence keeps one block in reserve to grow into, or admission would cause the preemption of
    what it was admitted beside.
    """
    return needed_blocks + running <= free_blocks or (running == 0 and needed_blocks <= free_blocks)


def preemption_victims(needs: Sequence[tuple[int, int]], free_blocks: int) -> int:
    """How many running sequences, from the youngest on, must give way so that the others can take their step.

    ``needs``: for each sequence, oldest first, the blocks it must take for the step and those it holds; what a
    victim holds becomes free.
    """
    wanted = sum(new for new, _ in needs)
    victims = 0
    while wanted > free_blocks and victims < len(needs):
        victims += 1
        new, held = needs[-victims]
        wanted -= new
        free_blocks += held
    return victims
