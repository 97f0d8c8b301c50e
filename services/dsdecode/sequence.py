"""A sequence on a decode instance, and its life::

    WAITING ──> PULLING ──────> RUNNING ──> GONE
      │ │          │ │           ^ │
      │ │          │ v           │ │
      │ └──────> PREFILLING ─────┘ │
      │            │ │             │
      │            └─┴─> DOOMED <──┘        ended while a thread uses its blocks
      └────────> GONE

Its KV is pulled from the instance that read the prompt, or it is read here. Where the KV was kept for an earlier
attempt, what that one made is read here after the pull. KV that comes in parts is pulled one after the other, while
prefill reads the rest of the prompt; the token that prefill makes comes with the last. WAITING holds no blocks: KV
that is to be pulled stays with prefill, whose memory is the buffer for bursts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from dskv.handle import KvHandle, KvKey
from dssched.prefix import PrefixPool
from dssched.reading import Reading
from dswire.lifecycle import Lifecycle
from dswire.messages.client import Sampling
from dswire.messages.worker import DecodeStages, DecodeWork, PrefillWork


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = 0
    PULLING = 1
    PREFILLING = 2
    RUNNING = 3
    DOOMED = 4
    GONE = 5


_ENDS = frozenset({Phase.DOOMED, Phase.GONE})

TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.PULLING, Phase.PREFILLING, Phase.GONE}),
    Phase.PULLING: _ENDS | {Phase.PREFILLING, Phase.RUNNING},
    Phase.PREFILLING: _ENDS | {Phase.RUNNING},
    Phase.RUNNING: _ENDS,
    Phase.DOOMED: frozenset({Phase.GONE}),
    Phase.GONE: frozenset(),
}


@dataclass(slots=True)
class Sequence:
    """One sequence; ``blocks`` is empty exactly while WAITING."""

    key: KvKey
    life: Lifecycle[Phase]
    prompt_ids: tuple[int, ...]
    #: output so far; once it is RUNNING, the last token is the one whose KV is not there yet
    output_ids: list[int]
    sampling: Sampling
    #: place of the last token; while it is RUNNING also the number of tokens whose KV is there
    position: int
    #: place of the token that will be its last, unless it ends before
    ends: int
    #: whether anything but that depends on the tokens that it draws
    watched: bool
    #: of KV that is pulled, as far as they are known
    handles: list[KvHandle]
    #: how many of them are here
    pulled: int = 0
    #: since when the last of them is known; None before
    whole_at: float | None = None
    #: of a prompt, or of what an earlier attempt has made, that is read here
    reading: Reading | None = None
    blocks: tuple[int, ...] = ()
    #: tokens for which they suffice
    room: int = 0
    #: copies running in threads
    copies: int = 0
    #: the copy under way has not waited for the relay's word, which has come meanwhile or has not
    early: bool = False
    granted: bool = False
    #: part of a step that is under way
    in_step: bool = False
    #: when the relay last moved its hand-off on
    heard_at: float = 0.0
    #: the KV was wrong once, or its stream broke, and is fetched once more
    again: bool = False
    #: the relay must be told when the last copy of a doomed pull has ended
    abort_pull: bool = False
    transfer_wait_s: float = 0.0
    transfer_s: float = 0.0
    #: time of pulls before the last part was known
    hidden_s: float = 0.0
    #: when the pull under way began
    pull_at: float = 0.0
    decode_queue_s: float = 0.0
    #: the first decode step here is still to come, or runs
    fresh: bool = True

    @classmethod
    def of(cls, work: DecodeWork | PrefillWork, life: Lifecycle[Phase], now: float) -> Sequence:
        """A sequence that has just come."""
        handles = [work.handle] if isinstance(work, DecodeWork) else []
        reading = Reading.of(work, now) if isinstance(work, PrefillWork) else None
        outputs = list(work.output_ids)
        prompt, asked = work.prompt_ids, work.sampling
        last, ends = len(prompt) + len(outputs) - 1, len(prompt) + asked.max_tokens - 1
        watched = bool(asked.stop or asked.stop_token_ids) or asked.logprobs is not None or not asked.ignore_eos
        made = cls(key_of(work), life, prompt, outputs, asked, last, ends, watched, handles, reading=reading)
        made.whole_at = now if not handles or not handles[0].key.part else None
        return made

    def more(self, handle: KvHandle, tokens: tuple[int, ...], now: float) -> None:
        """The next part is known; with the last one come ``tokens``."""
        self.handles.append(handle)
        self.add(*tokens)
        if not handle.key.part:
            self.whole_at = now

    @property
    def handle(self) -> KvHandle:
        """What is pulled now or next, or else was pulled last. Not where the prompt is read here."""
        return self.handles[min(self.pulled, len(self.handles) - 1)]

    @property
    def idle(self) -> bool:
        """Whether all that is known of its KV is here."""
        return self.pulled == len(self.handles)

    def since_whole(self, now: float) -> float:
        """Seconds in its phase, those not counted in which its KV was not known as a whole."""
        return 0.0 if self.whole_at is None else now - max(self.life.since, self.whole_at)

    def wants(self, block_size: int) -> int:
        """Blocks that let it in: for its tokens and one more, so that its first step finds room."""
        more = self.reading is not None or self.whole_at is None or self.unread
        return -(-(self.position + (2 if more else 1)) // block_size)

    def known_blocks(self, pool: PrefixPool) -> list[int]:
        """Blocks of ``pool`` with which it could begin."""
        return [] if self.reading is None else self.reading.known(pool)

    def missing(self, tokens: int, block_size: int) -> int:
        """Blocks that it lacks for the KV of so many tokens more."""
        return -(-(self.position + tokens) // block_size) - len(self.blocks)

    def hold(self, blocks: Iterable[int], block_size: int) -> None:
        """It gets more blocks."""
        self.blocks = (*self.blocks, *blocks)
        self.room = len(self.blocks) * block_size

    def add(self, *tokens: int) -> None:
        """Tokens were made."""
        self.output_ids += tokens
        self.position += len(tokens)

    @property
    def unread(self) -> bool:
        """Whether its KV lacks more than the last token."""
        return bool(self.handles) and self.handles[-1].end < self.position

    def arrived(self, now: float) -> Phase:
        """Its KV is here: where it stands next."""
        if not self.unread:
            return Phase.RUNNING
        work = PrefillWork(self.key, self.prompt_ids, tuple(self.output_ids), self.sampling)
        self.reading = Reading.of(work, now)
        self.reading.done = self.handles[-1].end
        return Phase.PREFILLING

    def came(self, now: float) -> None:
        """What was pulled is here and verified."""
        self.pulled += 1
        known_at = now if self.whole_at is None else min(now, self.whole_at)
        self.hidden_s += max(0.0, known_at - self.pull_at)

    @property
    def known_tokens(self) -> tuple[int, ...]:
        """The tokens whose KV is there, while it is RUNNING."""
        return (*self.prompt_ids, *self.output_ids[:-1])

    @property
    def chain(self) -> list[bytes]:
        """The digests of the first blocks, as far as they are known."""
        return (self.reading.chain if self.reading is not None else None) or []

    def validate(self, block_size: int) -> None:
        """What it holds is what its phase allows."""
        phase = self.life.phase
        assert phase is not Phase.GONE
        assert self.position == len(self.prompt_ids) + len(self.output_ids) - 1
        assert self.room == len(self.blocks) * block_size
        assert phase is not Phase.RUNNING or self.position <= self.room
        assert (phase is Phase.WAITING) == (not self.blocks)
        assert self.copies == 0 or phase in (Phase.PULLING, Phase.DOOMED)
        assert self.copies or not self.early
        assert not self.in_step or phase in (Phase.PREFILLING, Phase.RUNNING, Phase.DOOMED)
        assert phase is not Phase.DOOMED or self.copies or self.in_step
        assert phase is not Phase.PULLING or not self.idle or self.whole_at is None
        assert phase is not Phase.RUNNING or self.idle
        assert phase is not Phase.PREFILLING or self.reading is not None

    def stages(self, first_step_s: float) -> DecodeStages:
        """Where the time up to the first step went."""
        waits = self.transfer_wait_s, self.transfer_s, self.decode_queue_s
        return DecodeStages(*waits, first_step_s, self.hidden_s)


def steps_alike(running: Collection[Sequence], pool: PrefixPool) -> int:
    """For how many steps at least these go on together, before one ends or blocks run short."""
    most = min([one.ends - one.position for one in running]) - 1
    if most < 2 or any(one.fresh or one.watched for one in running):
        return 1
    # the first guess is too high, but quickly made
    while most > 1 and len(running) * -(-most // pool.block_size) > pool.free:
        if sum([one.missing(most, pool.block_size) for one in running]) <= pool.free:
            break
        most //= 2
    return most


def key_of(work: DecodeWork | PrefillWork) -> KvKey:
    """The key of a sequence that the router sent."""
    return work.handle.key.attempt if isinstance(work, DecodeWork) else work.key
