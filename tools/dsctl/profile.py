"""``dsctl profile``: how long the steps of a model take on this machine, for the simulator and the planner."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsctl.options import NewFile
from dsctl.topology import FILE_HELP
from dsobserve.terminal import digits, figures, output

if TYPE_CHECKING:
    from rich.console import Console

    from dsplan.profile import Profile, Subject
    from dsplan.profiling import Effort

#: of activations and KV, as in a topology
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be measured."""

    model: str
    dtype: str
    threads: int
    max_model_len: int
    max_batch: int
    tps: tuple[int, ...]
    quantization: str | None = None


@click.command()
@click.option("-f", "--file", type=click.Path(path_type=Path), help=FILE_HELP)
@click.option("--model", help="As model.path in a topology, instead of one.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="With --model.")
@click.option("--quantization", type=click.Choice(["int8"]), help="Of the weights; with --model.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of a rank; with --model.")
@click.option(
    "--tp", type=click.IntRange(1), multiple=True, help="Ranks of an instance; default the topology's, or 1."
)
@click.option("--max-model-len", type=click.IntRange(16), default=2048, show_default=True, help="With --model.")
@click.option("-o", "--out", type=NewFile("profile"), help="The file; default profile-MODEL-DTYPE-THREADSt.json.")
@click.option("--again", is_flag=True, help="Measure everything anew instead of going on with the file.")
@click.option("--point-seconds", type=click.FloatRange(0.001), default=0.5, show_default=True, help="Of one point.")
@click.option(
    "--most-tokens",
    type=click.IntRange(64),
    default=32_768,
    show_default=True,
    help="In the KV of a point; fewer where memory is short.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the fit as JSON.")
def command(
    file: Path | None,
    model: str | None,
    dtype: str,
    quantization: str | None,
    threads: int,
    tp: tuple[int, ...],
    max_model_len: int,
    out: Path | None,
    again: bool,
    point_seconds: float,
    most_tokens: int,
    as_json: bool,
) -> None:
    """Run the engine over a grid of steps, fit their times, and write a profile.

    Takes a minute or two, on a machine that does nothing else. Interrupted, it goes on where it stood. The profile
    is for `dsctl simulate --profile FILE` and `dsctl plan --profile FILE`.

    \b
    dsctl profile -f topology.yaml
    dsctl profile --model smollm2-135m-instruct --dtype float32 --threads 2 -o two.json
    dsctl profile --model smollm2-135m-instruct --tp 1 --tp 2
    """
    from rich.console import Console

    from dsbench import host
    from dsplan.profiling import Effort

    wanted = _wanted(file, model, Wanted(model or "", dtype, threads, max_model_len, 128, tp, quantization))
    console = Console(stderr=True)
    host.warn(console)
    path, profile = profile_of(wanted, out, again, Effort(point_seconds), most_tokens, console)
    if as_json:
        click.echo(json.dumps({"file": str(path), "tp": profile.fits}, indent=2))
    else:
        _show(profile, path)


def _wanted(file: Path | None, model: str | None, given: Wanted) -> Wanted:
    from dstopology.load import find, load
    from dswire.errors import BadInput

    if model is not None and file is not None:
        raise BadInput("--file and --model exclude each other", remedy="give one of the two")
    if model is not None:
        return replace(given, tps=given.tps or (1,))
    wanted = wanted_by(load(find(file)))
    return replace(wanted, tps=given.tps or wanted.tps)


def wanted_by(topology: Any) -> Wanted:
    """What a topology's instances want measured. Raises :class:`BadInput` where they differ."""
    from dswire.errors import BadInput

    threads = {one.threads for one in topology.instances}
    if len(threads) > 1:
        raise BadInput(
            f"{topology.path}: prefill and decode have different numbers of threads, {sorted(threads)}",
            remedy="give both the same, or measure each with --model and --threads",
        )
    most = max(one.max_batch for one in topology.instances)
    tps = tuple(sorted({one.tp for one in topology.instances}))
    model = topology.model
    return Wanted(model.path, model.dtype, threads.pop(), model.max_model_len, most, tps, model.quantization)


def profile_of(
    wanted: Wanted, out: Path | None, again: bool, effort: Effort, most_tokens: int, console: Console
) -> tuple[Path, Profile]:
    """The complete profile and its file: measured, or what is missing of it. Raises :class:`DsError`."""
    from dsplan import profile as profiles
    from dsplan import profile_fit
    from dsplan.profiling import grid

    model_dir, subject = _subject(wanted)
    weights = "-".join(filter(None, (subject.dtype, subject.quantization)))
    path = out or Path(f"profile-{subject.model}-{weights}-{subject.threads}t.json")
    profile = profiles.Profile(subject)
    if path.exists() and not again:
        profile = profiles.load(path)
        profiles.check(path, profile.subject, asdict(subject))
    steps = grid(wanted.max_model_len, wanted.max_batch, min(most_tokens, _room(wanted)))
    for tp in wanted.tps:
        missing = [spans for spans in steps if profile.find(tp, spans) is None]
        if missing:
            _measure(profile, path, model_dir, wanted, tp, missing, effort, console)
        profile.fits[tp] = profile_fit.fit(profile.samples[tp])
        profile.fits[tp]["saturating_tokens"] = _saturating(profile, path, tp)
    profile.save(path)
    return path, profile


def _room(wanted: Wanted) -> int:
    """Tokens whose KV takes a quarter of the memory that is free here."""
    from dstopology import modelfacts

    facts = modelfacts.read(wanted.model, os.environ)
    if facts is None:
        # the engine knows better how to tell what is wrong with the model
        return sys.maxsize
    layout = facts.kv_layout(1, wanted.dtype)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return free // 4 // layout.block_nbytes


def _subject(wanted: Wanted) -> tuple[Path, Subject]:
    from dsbench import host
    from dsengine.snapshot import identity
    from dsengine.store import resolve
    from dsplan.profile import Subject
    from dstopology.modelfacts import model_name

    model_dir = resolve(wanted.model)
    # the kernel's version is no part of what was measured
    machine = host.name().rsplit(", ", 1)[0]
    fingerprint = identity(model_dir).fingerprint
    name = model_name(wanted.model)
    return model_dir, Subject(machine, name, fingerprint, wanted.dtype, wanted.threads, wanted.quantization)


def _measure(
    profile: Profile,
    path: Path,
    model_dir: Path,
    wanted: Wanted,
    tp: int,
    steps: list[tuple[tuple[int, int], ...]],
    effort: Effort,
    console: Console,
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dsplan.profiling import make_engine, measure

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    samples = profile.samples.setdefault(tp, [])
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=len(steps))
        engine = make_engine(model_dir, profile.subject, tp, wanted.max_model_len, steps)
        try:
            for sample in measure(engine, steps, effort):
                samples.append(sample)
                profile.save(path)
                tokens = sum(count for _, count in sample.spans)
                progress.update(
                    task, advance=1, description=f"tp {tp}: {len(sample.spans)} sequences, {tokens} tokens"
                )
        finally:
            engine.close()


def _saturating(profile: Profile, path: Path, tp: int) -> int:
    """Lm: the shortest prompt that doubling would hardly make cheaper a token."""
    from dsplan.latency import saturating_tokens
    from dsplan.profile import ProfileInstance
    from dssim.times import times_of

    return saturating_tokens(ProfileInstance(times_of(str(path), tp, profile.fits[tp])))


def _show(profile: Profile, path: Path) -> None:
    console = output()
    console.print(f"[bold]{profile.subject.model}[/], {profile.subject.dtype}, {profile.subject.threads} threads")
    for tp, fit in profile.fits.items():
        table = figures(f"ms, tp {tp}", "base", "a token", "a square", "a sequence", "error", "p90")
        for name in ("prefill", "decode", "decode_large"):
            row, errors = fit[name], fit["errors"].get(name)
            known = [digits(row[key], 4) if key in row else "" for key in _COLUMNS]
            told = [f"{errors['mean']:.1%}", f"{errors['p90']:.1%}"] if errors else ["", ""]
            table.add_row(name.replace("_large", f", {fit['large_batch']} and more"), *known, *told)
        if mixed := fit["errors"].get("mixed"):
            table.add_row("both in a step", *[""] * 4, f"{mixed['mean']:.1%}", f"{mixed['p90']:.1%}")
        console.print(table)
        console.print(f"Lm: prompts of {fit['saturating_tokens']} tokens saturate it")
    console.print(f"errors are of points that the fit had not seen; written to {path}", soft_wrap=True)


_COLUMNS = ("base_ms", "per_token_ms", "per_square_ms", "per_sequence_ms")
