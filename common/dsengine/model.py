"""A model inside an engine, and the choice of who computes it: compiled kernels, the lean decoder in torch, or
transformers' modules."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dsengine.architecture import Architecture
from dsengine.attention import Attention
from dsengine.config import EngineConfig
from dsengine.config_json import ConfigFile
from dsengine.decoder import Decoder
from dsengine.families import FAMILIES, load_architecture
from dsengine.foreign_shape import ForeignShape, load_foreign_shape
from dsengine.int8 import Int8Linear
from dsengine.linear import Linear
from dsengine.native.decoder import NativeDecoder, Share, obstacle
from dsengine.native.library import Library, library
from dsengine.native.linear import Int8Linears
from dsengine.native.packing import Packed, Packing, RawLinear, Shelf
from dsengine.native.shared import Wanted, packed
from dsengine.parallel import WHOLE, Alone, Part, Peers
from dsengine.parts import MakeLinear, Parts
from dsengine.pool import DTYPES
from dsengine.rope import RopeTable
from dsengine.rope_settings import Rope
from dsengine.weights import Checkpoint, weight_files
from dswire.errors import Failed, OutOfMemory, UnsupportedModel

_log = logging.getLogger(__name__)


class Model(Protocol):
    """What an engine asks of its model."""

    def run(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None) -> Tensor | None:
        """``tokens`` ``[n]`` at ``positions`` ``[n]`` -> logits ``[rows, vocab_size]`` float32; None: all rows.

        The result is None at the ranks of an instance that do not draw.
        """
        ...


#: both tell name, vocab_size, layers, kv_heads, head_dim, max_positions and eos_ids
Shape = Architecture | ForeignShape


def load_shape(model_dir: Path) -> Shape:
    """The architecture of ``model_dir`` for the lean decoder, else its shape for transformers' modules.

    Raises :class:`~dswire.errors.ModelNotFound`, or :class:`UnsupportedModel` where neither can run it.
    """
    if ConfigFile.load(model_dir).architecture not in FAMILIES:
        return load_foreign_shape(model_dir)
    try:
        return load_architecture(model_dir)
    except UnsupportedModel as lean:
        try:
            return load_foreign_shape(model_dir)
        except UnsupportedModel:
            raise lean from None


def load_model(
    shape: Shape, config: EngineConfig, device: torch.device, part: Part = WHOLE, peers: Peers | None = None
) -> Model | NativeDecoder:
    """Load the weights of ``part``; the log tells which path serves the model.

    Raises :class:`~dswire.errors.ModelNotFound`, :class:`UnsupportedModel` or :class:`OutOfMemory`.
    """
    try:
        if isinstance(shape, Architecture):
            peers = peers or Alone()
            if (native := _native(shape, config, device, part, peers)) is not None:
                return native
            _log.info("%s is served by the lean decoder%s", shape.name, "" if part.whole else f", {part}")
            return _lean(shape, config, device, part, peers)
        return _foreign(shape, config, device, part)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        files = sum(path.stat().st_size for path in config.model_dir.glob("*.safetensors"))
        raise OutOfMemory(
            f"no room on {device} for the weights of {config.model_dir}, {files} bytes of files, as {config.dtype}",
            remedy="use a smaller dtype or model, or a device with more memory",
        ) from error


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether ``error`` says so: on the CPU torch has no type for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in ("DefaultCPUAllocator", os.strerror(errno.ENOMEM)))


def _native(
    arch: Architecture, config: EngineConfig, device: torch.device, part: Part, peers: Peers
) -> NativeDecoder | None:
    """The model on the compiled kernels; None, and the reason in the log, where they cannot serve it."""
    if not config.kernels or device.type != "cpu":
        return None
    reason = obstacle(arch, part)
    if reason is not None:
        _log.info("%s goes without compiled kernels: they have no %s", arch.name, reason)
        return None
    try:
        kernels = library(config.dtype)
    except Failed as error:
        _log.warning(
            "%s goes without compiled kernels, several times slower: %s; %s", arch.name, error, error.remedy
        )
        return None
    _log.info("%s is served by compiled kernels%s", arch.name, "" if part.whole else f", {part}")
    share = Share(arch, DTYPES[config.dtype], part, peers)
    return NativeDecoder(share, _packed(share, config, kernels), kernels, config.max_model_len, config.threads)


def _packed(share: Share, config: EngineConfig, kernels: Library) -> Packed:
    def fill(shelf: Shelf) -> None:
        checkpoint = Checkpoint(config.model_dir, share.dtype, torch.device("cpu"))
        parts = Parts(share.arch, checkpoint, RawLinear, share.part, RawLinear)
        Packing(parts, kernels, shelf, int8=config.quantization == "int8").run()

    files = (config.model_dir / "config.json", *weight_files(config.model_dir))
    part = share.part
    form = f"{kernels.name}-{config.quantization or 'plain'}-{part.tp}x{part.pp}.{part.rank}"
    return packed(Wanted(config.model_dir, files, form), fill)


def _lean(arch: Architecture, config: EngineConfig, device: torch.device, part: Part, peers: Peers) -> Decoder:
    dtype = DTYPES[config.dtype]

    def table(rope: Rope) -> RopeTable:
        return RopeTable(rope, arch.head_dim, config.max_model_len, dtype, device)

    make_linear = _int8_linears(config) if config.quantization == "int8" else Linear
    return Decoder(Parts(arch, Checkpoint(config.model_dir, dtype, device), make_linear, part), table, peers)


def _int8_linears(config: EngineConfig) -> MakeLinear:
    """On the compiled kernels, where they can be had."""
    if config.kernels:
        with contextlib.suppress(Failed):
            return Int8Linears(library(config.dtype), config.threads)
    _log.warning("products of int8 weights go through torch, slower than those of unquantised ones")
    return Int8Linear


def _foreign(shape: ForeignShape, config: EngineConfig, device: torch.device, part: Part) -> Model:
    if not part.whole:
        raise UnsupportedModel(
            f"{config.model_dir}: {shape.name} runs on one rank only: transformers' modules run it",
            remedy=f"set tp and pp to 1, or use a model of {', '.join(FAMILIES)}",
        )
    if config.quantization is not None:
        raise UnsupportedModel(
            f"{config.model_dir}: {shape.name} has no {config.quantization} weights: transformers' modules run it",
            remedy=f"leave quantization out, or use a model of {', '.join(FAMILIES)}",
        )
    from dsengine.foreign import ForeignModel

    _log.warning("%s is served by transformers' modules, slower than the lean decoder", shape.name)
    return ForeignModel(config, shape, device)
