"""What a machine holds: nothing, once all that was asked of it is over."""

from __future__ import annotations

from dsdecode.state import DecodeState
from dsprefill.state import PrefillState
from dsrelay.state import RelayState
from dsrouter.state import RouterState


def held_by(machine: object) -> dict[str, int]:
    """By what it is, how many; nothing for a machine that is not known."""
    match machine:
        case RouterState():
            live = sum(request.live for request in machine.requests.values())
            registered = sum(len(one.sequences) for one in machine.workers)
            return {"requests": live, "choices": len(machine.flow.choices), "registered": registered}
        case PrefillState() | DecodeState():
            return {"blocks": machine.pool.held, "sequences": len(machine.sequences)}
        case RelayState():
            outgoing, incoming, ledger = machine.outgoing, machine.incoming, machine.ledger
            return {
                "handles": len(ledger.handles),
                "early": len(ledger.early),
                "outgoing": len(outgoing.transfers) + len(outgoing.asked),
                "incoming": len(incoming.transfers),
                "kept": len(machine.keeper.kept),
            }
    return {}
