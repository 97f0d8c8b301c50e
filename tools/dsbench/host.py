"""What to know of this host before believing a figure."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from rich.console import Console

#: runnable processes a second, on average over a minute, above which figures are not to be trusted
BUSY = 0.5


def load() -> float:
    """The load average over one minute."""
    return os.getloadavg()[0]


def name() -> str:
    """Processor, cores, features that matter here, system."""
    lines = _cpuinfo()
    model = lines.get("model name") or platform.processor() or platform.machine()
    family = f" family {lines['cpu family']} model {lines['model']}" if "cpu family" in lines else ""
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16") if flag in flags]
    cores = len(os.sched_getaffinity(0))
    return f"{model}{family}, {cores} cores, {' '.join(wide)}, {platform.system()} {platform.release()}"


def warn(console: Console) -> None:
    """Say which machine this is, and whether its figures can be trusted."""
    console.print(f"[bold]{name()}[/]", highlight=False)
    busy = load()
    colour = "red" if busy > BUSY else "green"
    more = ": others are at work, do not trust the figures" if busy > BUSY else ""
    console.print(f"[{colour}]load average {busy:.2f}{more}[/]", highlight=False)


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
