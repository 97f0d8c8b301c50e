"""Many small requests, so many of them at once, some of which are left before their end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from random import Random

from dsbench.load import TOKENS
from dsclient import AsyncClient, Sampling
from dswire.errors import DsError

#: tokens of prompts and answers, at least and at most
PROMPT, ANSWER = (4, 64), (1, 24)
#: share of the prompts that begin with one of so many beginnings of so many tokens
ALIKE, BEGINNINGS, BEGINNING = 0.33, 8, 32
#: a request without an end after so long fails, in seconds
TIMEOUT_S = 120.0


class Hammer:
    """What was sent so far, and what became of it."""

    def __init__(self, requests: int, at_once: int, leave: float, max_len: int, seed: int) -> None:
        """``leave``: the share that is cancelled; ``max_len``: tokens of prompt and answer together, at most."""
        self.requests = requests
        self.sent = self.left = 0
        #: error code -> requests
        self.failed: Counter[str] = Counter()
        #: in which requests were under way
        self.seconds = 0.0
        self._at_once = at_once
        self._leave = leave
        self._max_len = max_len
        self._random = Random(seed)
        self._beginnings = [self._tokens(BEGINNING) for _ in range(BEGINNINGS)]

    async def run(self, client: AsyncClient, count: int, on_end: Callable[[], None]) -> None:
        """Send ``count`` more, and wait for the last end."""
        began = time.monotonic()
        numbers = iter(range(self.sent, self.sent + count))

        async def one_after_the_other() -> None:
            for number in numbers:
                await self._ask(client, number)
                on_end()

        async with asyncio.TaskGroup() as tasks:
            for _ in islice(range(count), self._at_once):
                tasks.create_task(one_after_the_other(), name="requests one after the other")
        self.sent += count
        self.seconds += time.monotonic() - began

    async def _ask(self, client: AsyncClient, number: int) -> None:
        random = self._random
        prompt = self._tokens(random.randint(*PROMPT))
        if random.random() < ALIKE:
            prompt = random.choice(self._beginnings) + prompt
        prompt = prompt[: self._max_len - ANSWER[1]]
        most = random.randint(*ANSWER)
        stays = random.random() >= self._leave
        tokens = most if stays else random.randrange(most)
        # half of the answers are drawn
        sampling = Sampling(max_tokens=most, ignore_eos=True, temperature=0.8 * (number % 2), seed=number)
        stream = client.stream(prompt_ids=prompt, sampling=sampling, deadline_s=TIMEOUT_S)
        try:
            if stays:
                await stream.result()
                return
            self.left += 1
            async with stream:
                seen = 0
                while seen < tokens:
                    seen += len((await anext(stream)).token_ids)
        except DsError as error:
            self.failed[error.code] += 1

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(TOKENS, k=count)
