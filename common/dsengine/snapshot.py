"""A Hugging Face directory as the engine wants it: what must be in it, and how two of them are told apart."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dswire.errors import ModelNotFound, UnsupportedModel

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: places of each weights file, and bytes at each, that go into the fingerprint
_SAMPLES = 16
_SAMPLE_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model a process serves: two processes work together only when their fingerprints are equal."""

    #: name of the directory, for people
    name: str
    #: 64 hex digits
    fingerprint: str


def check(directory: Path) -> Path:
    """``directory`` itself, made absolute, once everything that loading needs is in it.

    Raises :class:`ModelNotFound` naming the file that is missing, :class:`UnsupportedModel` when the weights are
    there in another format than safetensors.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ModelNotFound(
                f"{directory} has no {name}", remedy="give the path of a whole Hugging Face directory"
            )
    for weights in weight_files(directory):
        if not weights.is_file():
            raise ModelNotFound(f"{weights} is missing", remedy="fetch the model again")
    return directory.absolute()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model in the order of their names; those of an index may be missing.

    Raises as :func:`check` does.
    """
    index = directory / _INDEX
    if index.is_file():
        return [directory / name for name in _indexed(index)]
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if any(directory.glob("pytorch_model*.bin")):
        raise UnsupportedModel(
            f"the weights in {directory} are pickled, and pickles are never loaded",
            remedy="convert the model to safetensors",
        )
    raise ModelNotFound(f"{directory} has no {_SINGLE}", remedy="give the path of a whole Hugging Face directory")


def _indexed(index: Path) -> list[str]:
    try:
        names = set(msgspec.json.decode(index.read_bytes())["weight_map"].values())
        # an index must not lead out of its directory
        return sorted(Path(name).name for name in names)
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFound(f"{index} is damaged: {error}", remedy="fetch the model again") from error


def identity(directory: Path) -> ModelIdentity:
    """The fingerprint of a model that passed :func:`check`: cheap, and the same on every host.

    sha256 over ``config.json``, ``tokenizer.json`` and, of each weights file, its size, its header and samples of
    its data: fine-tunes of one base differ in nothing but their data.
    """
    state = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        content = (directory / name).read_bytes()
        state.update(struct.pack("<Q", len(content)) + content)
    for weights in weight_files(directory):
        _add_weights(state, weights)
    return ModelIdentity(name=directory.name, fingerprint=state.hexdigest())


def _add_weights(state: hashlib._Hash, path: Path) -> None:
    total = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_nbytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
        if header_nbytes > total - 8:
            raise ModelNotFound(f"{path} is no safetensors file, or cut short", remedy="fetch the model again")
        state.update(struct.pack("<Q", total) + file.read(header_nbytes))
        first = 8 + header_nbytes
        for sample in range(_SAMPLES):
            file.seek(first + (total - first) * sample // _SAMPLES)
            state.update(file.read(_SAMPLE_NBYTES))
