"""Copies of KV that was handed over, kept while its reader decodes: another one can go on from there.

The copy is made when the reader has all and before the owner has its blocks back, on the owner's node: the death
of a decode instance, or of its whole node, leaves it. What is kept is a handle that the relay owns, in blocks of a
segment of its own; offered under the key of a new attempt it is pulled like any other, as often as it is needed.

Invariants: all blocks are free or belong to one copy; blocks that are written or offered are not given to another;
a copy is dropped when the router says so or has not asked for it for a lease. What is in nobody's use makes room
for what comes, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.memory import whole_model
from dsrelay.events import Action, CopyKept
from dsrelay.ledger import Ledger
from dswire.errors import ErrorInfo
from dswire.messages import kv
from dswire.timers import Timers


@dataclass(slots=True)
class Kept:
    """One copy."""

    #: its key is that of the attempt that the KV was made for
    handle: KvHandle
    kept_at: float
    #: end of its lease
    until: float
    #: blocks are being written
    copying: bool = True
    #: not needed any more, or not what it should be
    dropped: bool = False
    #: keys under which it is offered now
    offers: set[KvKey] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        """Whether nobody uses the blocks."""
        return not self.copying and not self.offers


class Keeper:
    """Every copy of one relay: the ledger's successor of readers, and an owner of handles."""

    def __init__(
        self, name: str, node: str, segment: str, nbytes: int, ledger: Ledger, lease_s: float, out: list[Action]
    ) -> None:
        """``name``: of the relay; ``nbytes``: for all copies together, 0 to keep none."""
        self.name = name
        #: by key, the longest unused first
        self.kept: OrderedDict[KvKey, Kept] = OrderedDict()
        #: key of an offer -> key of its copy
        self._offers: dict[KvKey, KvKey] = {}
        self._leases: Timers[KvKey] = Timers()
        #: of the first KV that came; instances of one role have the same
        self._layout: KvLayout | None = None
        self._blocks = 0
        self._free: list[int] = []
        self._node = node
        self._segment = segment
        self._nbytes = nbytes
        self._ledger = ledger
        self._lease_s = lease_s
        self._out = out

    # the ledger's successor

    def takes(self, now: float, handle: KvHandle) -> bool:
        """Make room for a copy; False where there can be none."""
        if not self._nbytes or handle.owner == self.name or handle.key in self.kept:
            return False
        if self._layout is None:
            self._layout, self._blocks = handle.layout, self._nbytes // handle.layout.block_nbytes
            self._free = list(range(self._blocks - 1, -1, -1))
        if handle.layout != self._layout or not self._make_room(len(handle.blocks)):
            return False
        blocks = tuple(self._free.pop() for _ in handle.blocks)
        mine = msgspec.structs.replace(
            handle,
            owner=self.name,
            blocks=blocks,
            shards=(whole_model(handle.layout, self._segment),),
            segment_blocks=self._blocks,
        )
        self.kept[handle.key] = made = Kept(mine, now, now)
        self._extend(now, made)
        return True

    def granted(self, now: float, peer: str, handle: KvHandle) -> None:
        """Copy."""
        self._out.append(CopyKept(handle, self.kept[handle.key].handle))

    def failed(self, now: float, peer: str, key: KvKey, error: ErrorInfo) -> None:
        """The owner's blocks may be written again while they are copied."""
        self._drop(key)

    def copied(self, now: float, key: KvKey, error: ErrorInfo | None) -> None:
        """The copy is there, or cannot be made."""
        one = self.kept[key]
        one.copying = False
        if error is not None:
            one.dropped = True
        self._ledger.ended(now, self.name, key, "pulled")
        self._settle(one)

    # the router

    def reoffer(self, now: float, kept: KvKey, key: KvKey) -> KvHandle | None:
        """Offer a copy under another key; None when there is no copy."""
        one = self.kept.get(kept)
        if one is None or one.copying or one.dropped or key in self._offers:
            return None
        self.kept.move_to_end(kept)
        self._extend(now, one)
        handle = msgspec.structs.replace(one.handle, key=key)
        one.offers.add(key)
        self._offers[key] = kept
        self._ledger.offer(now, self.name, handle)
        # an offer that is refused is released at once
        return handle if key in self._offers else None

    def wanted(self, now: float, keys: tuple[KvKey, ...]) -> None:
        """These may still be needed, and their offers while no reader has come."""
        for key in keys:
            one = self.kept.get(key)
            if one is not None and not one.dropped:
                self._extend(now, one)
                for offer in one.offers:
                    self._ledger.extend(now, offer)

    def aborted(self, now: float, key: KvKey) -> None:
        """An attempt, or what was kept for it, is of no use any more."""
        if key in self._offers:
            self._ledger.withdraw(now, self.name, key)
        self._drop(key)

    def forget_all(self, now: float) -> None:
        """The router is gone, and every request with it."""
        for key in list(self._offers):
            self._ledger.withdraw(now, self.name, key)
        for key in list(self.kept):
            self._drop(key)

    # an owner

    def told(self, message: msgspec.Struct) -> None:
        """What any owner of a handle is told."""
        if isinstance(message, kv.KvRelease) and message.key in self._offers:
            one = self.kept[self._offers.pop(message.key)]
            one.offers.discard(message.key)
            self._settle(one)

    # time

    def tick(self, now: float) -> None:
        """Drop what nobody asked for."""
        for key in self._leases.due(now):
            self._drop(key)

    def next_deadline(self) -> float | None:
        """The earliest end of a lease."""
        return self._leases.next()

    # what others are told

    @property
    def idle(self) -> int:
        """Copies that nobody uses."""
        return sum(one.idle for one in self.kept.values())

    def listing(self, now: float) -> list[kv.HandleInfo]:
        """Every copy that is not offered."""
        return [
            kv.HandleInfo(
                key=key,
                owner=self.name,
                reader="",
                state="kept",
                nbytes=one.handle.nbytes,
                tokens=one.handle.tokens,
                age_s=now - one.kept_at,
                lease_left_s=max(0.0, one.until - now),
            )
            for key, one in self.kept.items()
            if one.idle
        ]

    def validate(self) -> None:
        """Blocks, offers and leases agree."""
        used = [block for one in self.kept.values() for block in one.handle.blocks]
        assert sorted([*used, *self._free]) == list(range(self._blocks))
        offers = {key: kept for kept, one in self.kept.items() for key in one.offers}
        assert offers == self._offers
        for key, one in self.kept.items():
            assert key == one.handle.key
            assert (key in self._leases) == (not one.dropped)
            assert not (one.dropped and one.idle)
        for key in offers:
            assert self._ledger.handles[key].handle.owner == self.name

    def _make_room(self, count: int) -> bool:
        """Drop idle copies until so many blocks are free; none where they would be too few."""
        idle = [key for key, one in self.kept.items() if one.idle]
        if count > len(self._free) + sum(len(self.kept[key].handle.blocks) for key in idle):
            return False
        for key in idle:
            if count <= len(self._free):
                break
            self._drop(key)
        return True

    def _extend(self, now: float, one: Kept) -> None:
        one.until = now + self._lease_s
        self._leases.set(one.handle.key, one.until)

    def _drop(self, key: KvKey) -> None:
        one = self.kept.get(key)
        if one is not None:
            one.dropped = True
            self._settle(one)

    def _settle(self, one: Kept) -> None:
        """Give the blocks back as soon as the copy is dropped and in nobody's use."""
        key = one.handle.key
        if one.dropped:
            self._leases.cancel(key)
        if one.dropped and one.idle:
            self._free += reversed(one.handle.blocks)
            del self.kept[key]
