"""A request's ledger as a small table."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from dsclient import Completion, Ledger

#: what the stages of :class:`Ledger` are called in the table; one not named here is called by its field
_LABELS = {
    "router_queue_s": "router: tokenise, queue",
    "prefill_queue_s": "prefill: queue",
    "prefill_s": "prefill: step",
    "prefill_wire_s": "prefill: messages",
    "placement_s": "placement",
    "transfer_wait_s": "transfer: wait for blocks",
    "transfer_s": "transfer: KV",
    "decode_queue_s": "decode: queue",
    "first_step_s": "decode: first step",
    "decode_wire_s": "decode: messages",
    "decode_s": "decode: all further steps",
    "retry_s": "lost attempts",
    "resume_s": "taken over by another decode",
}
#: stages up to the first token
_TTFT = ("router_queue_s", "prefill_queue_s", "prefill_s", "prefill_wire_s")
_NO_STAGES = ("ttft_s", "total_s", "transfer_hidden_s")
_BAR = 24


def stages(ledger: Ledger) -> dict[str, float]:
    """Every stage, in seconds, in the order in which they pass."""
    fields = [one.name for one in msgspec.structs.fields(ledger)]
    return {name: getattr(ledger, name) for name in fields if name.endswith("_s") and name not in _NO_STAGES}


def label(name: str) -> str:
    """What people call a stage, by the name of its field."""
    return _LABELS.get(name, name)


def table(completion: Completion) -> Table:
    """The ledger with its sums, and the same two times as this client measured them."""
    ledger = completion.ledger
    shown = Table(title="where the time went", title_style="bold", title_justify="left", box=None, pad_edge=False)
    shown.add_column("stage")
    shown.add_column("ms", justify="right")
    shown.add_column("share", justify="right", style="dim")
    shown.add_column("")
    total_s = ledger.total_s or 1.0
    for name, seconds in stages(ledger).items():
        if name in ("retry_s", "resume_s") and not seconds:
            continue
        share = seconds / total_s
        colour = "cyan" if name in _TTFT else "magenta"
        bar = f"[{colour}]{'█' * round(share * _BAR)}[/]"
        shown.add_row(label(name), f"{seconds * 1e3:.1f}", f"{share:.0%}", bar)
        if name == _TTFT[-1]:
            shown.add_row("[bold]first token (TTFT)[/]", f"[bold]{ledger.ttft_s * 1e3:.1f}[/]", "", "")
    shown.add_row("[bold]total[/]", f"[bold]{ledger.total_s * 1e3:.1f}[/]", "", "")
    seen = f"{completion.ttft_s * 1e3:.1f} / {completion.total_s * 1e3:.1f}"
    shown.add_row("[dim]seen by this client: first / total[/]", f"[dim]{seen}[/]", "", "")
    if hidden_s := ledger.transfer_hidden_s:
        share = hidden_s / (hidden_s + ledger.transfer_s)
        shown.add_row(
            "[dim]transfer while the prompt was read[/]", f"[dim]{hidden_s * 1e3:.1f}[/]", f"{share:.0%}", ""
        )
    if ledger.retries:
        shown.add_row("[yellow]retries[/]", f"[yellow]{ledger.retries}[/]", "", "")
    return shown


def print_ledger(completion: Completion) -> None:
    """Print the table on stderr, so that stdout is the answer alone."""
    usage = completion.usage
    console = Console(stderr=True, highlight=False)
    console.print()
    console.print(table(completion))
    console.print(f"[dim]{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} made[/]")
    if len(completion.choices) > 1:
        console.print("[dim]the stages are those of the answer that ended last[/]")
