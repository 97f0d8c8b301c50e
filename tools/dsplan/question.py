"""What is to be planned, and whether its numbers make sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsplan.devices import Device
from dsplan.errors import PlanInput
from dsplan.goodput import Slo, Workload
from dsplan.latency import Latency
from dsplan.shapes import ModelShape

if TYPE_CHECKING:
    from dsplan.placement import Spec

#: ways to share the two phases among instances
MODES = ("disaggregated", "colocated", "conditional")


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of device, and how fast the model is on it."""

    device: Device
    latency: Latency


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned."""

    shape: ModelShape
    device: Device
    latency: Latency
    #: of the cluster; with two kinds of devices, of each kind
    nodes: int
    devices_per_node: int
    workload: Workload
    slo: Slo
    #: high, low or auto
    algorithm: str = "auto"
    #: requests a second that are wanted; None fills the cluster
    rate: float | None = None
    #: the devices of decode, where those are others
    decode_hardware: Hardware | None = None
    #: of :data:`MODES`, those to consider
    modes: tuple[str, ...] = MODES
    #: device -> its price an hour
    prices: Mapping[str, float] = field(default_factory=dict)
    #: only systems that the servers can start (:mod:`dsplan.startable`)
    startable: bool = False

    @property
    def instance_nodes(self) -> int:
        """Node limit of an instance, unless it is of mode colocated."""
        return 1 if self.startable else self.nodes

    @property
    def kinds(self) -> tuple[Hardware, ...]:
        """The hardware of prefill, and of decode where that is other."""
        first = Hardware(self.device, self.latency)
        return (first,) if self.decode_hardware is None else (first, self.decode_hardware)

    @property
    def each(self) -> int:
        """Devices of each kind."""
        return self.nodes * self.devices_per_node

    @property
    def devices(self) -> int:
        """Of the cluster."""
        return self.each * len(self.kinds)

    def has_room(self, spec: Spec) -> bool:
        """Whether the cluster holds a system; one for a wanted rate may need more than there is."""
        prefill, decode = spec.prefill.devices, spec.decode.devices
        apart = len(self.kinds) > 1 and spec.mode != "colocated"
        return max(prefill, decode) <= self.each if apart else prefill + decode <= self.each

    def price(self, prefill_devices: int, decode_devices: int) -> float | None:
        """Of so many devices an hour; None where a price is not known."""
        names = self.kinds[0].device.name, self.kinds[-1].device.name
        if any(name not in self.prices for name in names):
            return None
        return prefill_devices * self.prices[names[0]] + decode_devices * self.prices[names[1]]


def check(question: Question) -> None:
    """Raise :class:`PlanInput` for numbers that make no sense."""
    slo = question.slo
    limits = [
        ("nodes", question.nodes, 1, 4096),
        ("devices per node", question.devices_per_node, 1, 64),
        ("the TTFT objective in seconds", slo.ttft_s, 1e-6, 86_400),
        ("the TPOT objective in seconds", slo.tpot_s, 1e-6, 86_400),
        ("attainment", slo.attainment, 0.01, 0.9999),
        ("rate", 1.0 if question.rate is None else question.rate, 1e-3, 1e6),
    ]
    limits += [(f"the price of {name}", price, 1e-6, 1e6) for name, price in question.prices.items()]
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise PlanInput(f"{name} {value:g} is absurd", remedy=f"give it between {low:g} and {high:g}")
    if question.algorithm == "low" and question.decode_hardware is not None:
        raise PlanInput(
            "algorithm low keeps both phases in one node, which has one kind of device",
            remedy="use --algorithm high, or the same device for both",
        )
