"""The other ranks of an instance by torch.distributed: Gloo between CPUs, NCCL between GPUs.

These ranks are on one host and talk over its loopback interface or, GPUs, directly. Where the stages of an instance
are on several, only those of a stage are such; between the stages there are wires (:mod:`dsengine.wire`).
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dsengine.parallel import Part
from dsengine.rank_orders import PATIENCE_S
from dsengine.wire import PeerGone, Wires


class GroupPeers:
    """A rank's connections to the others."""

    def __init__(self, part: Part, device: torch.device, rendezvous: Path, wires: Wires | None = None) -> None:
        """Join the others at ``rendezvous``, a file that none of them needs to make.

        With ``wires`` to the other stages, the others are those of the same stage. Raises :class:`PeerGone` when
        they do not all come.
        """
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        ranks, rank = (part.tp * part.pp, part.rank) if wires is None else (part.tp, part.place)
        # stages on several nodes meet each by itself
        meeting = rendezvous if wires is None else rendezvous.with_name(f"{rendezvous.name}.{part.stage}")
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        with _meeting():
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=torch._C._distributed_c10d.FileStore(str(meeting), ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=PATIENCE_S),
            )
            # every rank must make every group, in the same order
            groups = ranks // part.tp
            stages = [dist.new_group(range(part.tp * stage, part.tp * (stage + 1))) for stage in range(groups)]
        self._stage = stages[rank // part.tp]
        #: the first of them in the group
        self._first = rank - part.place
        self._part = part
        self._wires = wires
        self._device = device
        #: what the next stage has not yet taken, with its buffer; as many as there are steps under way
        self._sent: deque[tuple[dist.Work | None, Tensor]] = deque()

    def add(self, x: Tensor) -> Tensor:
        """The sum of all places' ``x``; between CPUs made in float32.

        There in the order of the places, so that no row's sum depends on what else comes with it.
        """
        if self._part.tp == 1:
            return x
        if self._device.type != "cpu":
            total = x.contiguous()
            with _meeting():
                dist.all_reduce(total, group=self._stage)
            return total
        mine = x.float().contiguous()
        shares = [torch.empty_like(mine) for _ in range(self._part.tp)]
        with _meeting():
            dist.all_gather(shares, mine, group=self._stage)
        total = shares[0]
        for share in shares[1:]:
            total += share
        return total.to(x.dtype)

    def gather(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """All places' ``x`` ``[n, widths[place]]`` side by side, at place 0; None elsewhere."""
        if self._part.tp == 1:
            return x
        widest, place = max(widths), self._part.place
        padded = functional.pad(x, (0, widest - x.shape[1])).contiguous()
        parts = None if place else [torch.empty_like(padded) for _ in widths]
        if len(x):
            with _meeting():
                dist.gather(padded, parts, dst=self._first, group=self._stage)
        if parts is None:
            return None
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def send(self, x: Tensor) -> None:
        """Give ``x`` to the same place of the next stage."""
        if self._wires is not None:
            self._wires.send(x)
            return
        x = x.contiguous()
        with _meeting():
            while len(self._sent) >= self._part.pp:
                work, _ = self._sent.popleft()
                if work is not None:
                    work.wait()
            self._sent.append((dist.isend(x, self._part.rank + self._part.tp), x))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the same place of the stage before gives."""
        if self._wires is not None:
            return self._wires.receive(shape, dtype).to(self._device)
        x = torch.empty(shape, dtype=dtype, device=self._device)
        with _meeting():
            dist.recv(x, self._part.rank - self._part.tp)
        return x

    def close(self) -> None:
        """Part with the others; only between steps."""
        if self._wires is not None:
            self._wires.close()
        dist.destroy_process_group()


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """torch.distributed says ``RuntimeError`` for whatever goes wrong between the ranks."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        told = str(error).partition(". This is typically")[0]
        raise PeerGone(f"a rank of the instance does not answer: {told}") from error
