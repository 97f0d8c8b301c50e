"""From a GGUF file to a Hugging Face directory: safetensors in float32, tokenizer, chat template, configs.

transformers reads the file and undoes the quantisation. This module adds what it leaves open: a directory that
can be loaded without transformers, the pre-tokenizer of the models whose digits are tokens of their own, and a
refusal of what the conversion would lose without a word.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

from dsengine.store import Report, silent
from dswire.errors import DsError, Failed, UnsupportedModel

#: values of ``tokenizer.ggml.pre`` whose text is cut at every digit before the GPT-2 rule.
#: Source: llama.cpp, ``llama-vocab.cpp``, the regular expressions of these pre-tokenizer types
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})

#: safetensors files are split at this size
_SHARD_NBYTES = 4 << 30


def convert(source: Path, target: Path, report: Report = silent) -> None:
    """Write the model of the GGUF file ``source`` into the existing, empty directory ``target``.

    Raises :class:`UnsupportedModel` for what cannot be converted, :class:`Failed` when the file is damaged or a
    library that is needed is missing. What a failure leaves in ``target`` is worthless.
    """
    try:
        with _quiet(), _parsed_once():
            _convert(source, target, report)
    except ImportError as error:
        raise Failed(
            f"{source.name} cannot be converted: {error}",
            remedy="install the engine's packages with `pip install 'distserve[engine]'`",
        ) from error
    except (DsError, OSError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{source} cannot be converted: {error}",
            remedy="check that the file is whole, or use the model's safetensors directory instead",
        ) from error


def _convert(source: Path, target: Path, report: Report) -> None:
    report("read", 0, 1)
    pre_tokenizer = _check(source)
    report("read", 1, 1)
    report("tokenizer", 0, 1)
    _save_tokenizer(source, target, pre_tokenizer)
    report("tokenizer", 1, 1)
    model = _load(source, report)
    report("write", 0, 1)
    _save_model(model, target)
    report("write", 1, 1)


def _check(source: Path) -> str:
    """The name of the file's pre-tokenizer ("" when it has none), once it is known that nothing will be lost."""
    from gguf import GGUFReader

    reader = GGUFReader(str(source))
    if any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        raise UnsupportedModel(
            f"{source} keeps its RoPE scaling as a table of factors, which the conversion would drop",
            remedy="use the model's safetensors directory instead",
        )
    field = reader.get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""


def _save_tokenizer(source: Path, target: Path, pre_tokenizer: str) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    if pre_tokenizer in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(str(target))


def _load(source: Path, report: Report) -> Any:
    """The transformers model, every tensor a dense float32 one."""
    import torch
    from transformers import AutoModelForCausalLM

    with _counted(report):
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.float32, **_dense()
        )
    packed = [name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()]
    if packed:
        raise UnsupportedModel(f"{source} was read with {len(packed)} tensors still packed, {packed[0]} first")
    return model


def _dense() -> dict[str, Any]:
    """What keeps newer releases of transformers from leaving weights packed where they have a kernel for it."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _save_model(model: Any, target: Path) -> None:
    # model.save_pretrained() refuses whatever came out of a quantised file, dense or not
    from huggingface_hub import save_torch_state_dict

    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_torch_state_dict(state, str(target), max_shard_size=_SHARD_NBYTES)
    for weights in target.glob("*.safetensors"):
        weights.chmod(0o644)
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    _write_json(target / "config.json", config)
    generation = model.generation_config.to_diff_dict()
    generation.pop("_from_model_config", None)
    _write_json(target / "generation_config.json", generation)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice from transformers on stderr: the caller's report tells the progress."""
    # its loader draws a bar that no setting of its own turns off
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses the file three times and builds the table of names once a tensor: 15 s of 20."""
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", lru_cache(maxsize=1)(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", lru_cache(maxsize=1)(gguf.get_tensor_name_map)),
    ):
        yield


@contextmanager
def _counted(report: Report) -> Iterator[None]:
    """Report every tensor that is unpacked, under the step ``weights``."""
    import gguf

    unpack = gguf.dequantize
    done = 0

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        report("weights", done, None)
        return unpack(*args, **kwargs)

    report("weights", 0, None)
    with mock.patch.object(gguf, "dequantize", count):
        yield
    report("weights", done, done)
