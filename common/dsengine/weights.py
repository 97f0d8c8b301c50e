"""The tensors of a checkpoint: safetensors files of a Hugging Face directory, memory-mapped.

Invariant: a model takes every tensor exactly by its name and shape, and :meth:`Checkpoint.finish` refuses a file
with tensors that nobody took; so a model that loads is the model that the files hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dswire.errors import ModelNotFound, UnsupportedModel

_DAMAGED = "the file is damaged or incomplete: fetch the model again"
_ANOTHER = (
    "config.json is that of another model than the weights, or the model has parts unknown here: fetch it again"
)
_ALL = slice(None)


class _Index(msgspec.Struct):
    """``model.safetensors.index.json``."""

    #: tensor -> file
    weight_map: dict[str, str]


class Checkpoint:
    """Tensors by name, converted to ``dtype`` on ``device``.

    A tensor taken alone that already has ``dtype`` on the CPU stays in the file's mapping, shared between the
    processes of a host.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Map the files. Raises :class:`ModelNotFound` when there are none, or one cannot be read."""
        self._dir = model_dir
        self.dtype = dtype
        self._device = device
        self._files: dict[str, Any] = {}
        for path in weight_files(model_dir):
            reader = _open(path)
            self._files.update(dict.fromkeys(reader.keys(), reader))
        self._left = set(self._files)

    def take(self, name: str, shape: Sequence[int], rows: slice = _ALL) -> Tensor:
        """``rows`` of the tensor ``name`` of ``shape``; see :meth:`view` for what it raises."""
        return self.view(name, shape)[rows].to(self._device, self.dtype)

    def stack(self, pieces: Sequence[Tensor]) -> Tensor:
        """A new tensor of ``pieces``, which :meth:`view` gave, one below the other."""
        rows = [len(piece) for piece in pieces]
        out = torch.empty((sum(rows), *pieces[0].shape[1:]), dtype=self.dtype, device=self._device)
        for part, piece in zip(out.split_with_sizes(rows), pieces, strict=True):
            part.copy_(piece)
        return out

    def view(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor ``name`` as it lies in its file: only what is looked at is read.

        Raises :class:`UnsupportedModel` where it is missing, has another shape, or is quantised.
        """
        reader = self._files.get(name)
        if reader is None:
            raise UnsupportedModel(f"{self._dir}: tensor {name} is missing", remedy=_DAMAGED)
        tensor: Tensor = reader.get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise UnsupportedModel(
                f"{self._dir}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}",
                remedy=_ANOTHER,
            )
        # Eight-bit floats mean something with their scales only.
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise UnsupportedModel(
                f"{self._dir}: tensor {name} has dtype {tensor.dtype}: it is quantised",
                remedy="use the model's unquantised checkpoint",
            )
        self._left.discard(name)
        return tensor

    def root_of(self, root: str, name: str) -> str:
        """``root``, or what is left of it without its first word where only so ``name`` is there.

        Checkpoints that were saved from the bare model lack that word.
        """
        bare = root.partition(".")[2]
        return bare if f"{bare}{name}.weight" in self._files else root

    def skip(self, name: str) -> None:
        """Let ``name`` be there without being taken."""
        self._left.discard(name)

    def skip_under(self, prefix: str) -> None:
        """Let all tensors whose names begin so be there without being taken."""
        self._left = {name for name in self._left if not name.startswith(prefix)}

    def finish(self) -> None:
        """Unmap. Raises :class:`UnsupportedModel` when tensors are left over: the model has parts unknown here."""
        self._files.clear()
        if self._left:
            some = ", ".join(sorted(self._left)[:3])
            raise UnsupportedModel(
                f"{self._dir}: {len(self._left)} tensors have no place in the architecture, such as {some}",
                remedy=_ANOTHER,
            )


def weight_files(model_dir: Path) -> list[Path]:
    """The files that hold the weights. Raises :class:`ModelNotFound`."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except msgspec.DecodeError as error:
            raise ModelNotFound(f"{index}: {error}", remedy=_DAMAGED) from error
        return [model_dir / name for name in sorted(set(shards.values()))]
    single = model_dir / "model.safetensors"
    if not single.is_file():
        raise ModelNotFound(
            f"{model_dir}: there is no model.safetensors, nor an index of shards",
            remedy="only safetensors are loaded: convert the model, or fetch one with `dsctl model pull`",
        )
    return [single]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelNotFound(f"{path}: cannot be read as safetensors: {error}", remedy=_DAMAGED) from error
