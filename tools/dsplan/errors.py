"""What can be wrong with a question to the planner; leaves of the house's one error tree."""

from __future__ import annotations

from dswire.errors import BadInput


class PlanInput(BadInput):
    """A number or a name given to the planner makes no sense."""

    code = "plan_input"


class ProfileMismatch(BadInput):
    """The latency profile was taken of another model, device or parallelism than the one asked for."""

    code = "profile_mismatch"


class DoesNotFit(BadInput):
    """No allowed parallelism holds the model and the KV of one sequence."""

    code = "does_not_fit"


class UnreachableSlo(BadInput):
    """No placement meets an objective, however low the rate."""

    code = "unreachable_slo"
