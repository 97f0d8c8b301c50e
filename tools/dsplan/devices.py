"""Devices by name: peak rates, memory and links, from ``data/devices.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from dsplan.errors import PlanInput

#: before the name of a device in ``data/efficiency.json``: fitted on all measured devices but that one
WITHOUT = "without "
#: what the names begin with of those that devices take which nobody measured
POOLED = "pooled"


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator of a homogeneous cluster, and its links."""

    name: str
    #: peak dense 16-bit floating point operations a second
    flops: float
    #: peak memory bandwidth
    bytes_per_s: float
    memory_nbytes: float
    #: units that tiles of work are spread over
    multiprocessors: int
    #: their clock under load that power does not limit
    clock_hz: float
    #: to another device of the node, one direction
    node_bytes_per_s: float
    #: to a device of another node, one direction
    network_bytes_per_s: float
    #: key of ``data/efficiency.json``
    efficiency: str
    note: str
    #: whether the switch between the devices of a node adds up what they send (NVLink SHARP)
    switch_adds: bool = False
    #: ranks of a node that NVLink joins: more of them, or any where it is 1, talk over PCIe
    nvlinked: int = 1 << 10
    #: over PCIe to another device of the node, one direction, where ``node_bytes_per_s`` is of NVLink
    bus_bytes_per_s: float = 0.0
    #: how much longer the host takes for what it does than one of an A100
    host_factor: float = 1.0

    def link_bytes_per_s(self, ranks: int) -> float:
        """From one to another of as many devices of a node, one direction."""
        return self.node_bytes_per_s if ranks <= self.nvlinked else self.bus_bytes_per_s or self.node_bytes_per_s


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(files("dsplan").joinpath("data/devices.json").read_text())[
        "devices"
    ]
    return table


def known_devices() -> tuple[str, ...]:
    """Names of the devices of the table."""
    return tuple(_table())


def find_device(name: str) -> Device:
    """The device of that name. Raises :class:`PlanInput` where the table has none."""
    row = _table().get(name.lower())
    if row is None:
        raise PlanInput(f"device {name} is not known", remedy=f"choose one of {', '.join(known_devices())}")
    return checked(Device(name=name.lower(), **row))


def checked(device: Device) -> Device:
    """The device, unless a number of it is absurd (:class:`PlanInput`)."""
    limits = {"flops": (1e9, 1e17), "bytes_per_s": (1e8, 1e14), "memory_nbytes": (1e8, 1e13)}
    limits |= {
        "multiprocessors": (1, 1e5),
        "clock_hz": (1e8, 1e11),
        "node_bytes_per_s": (1e6, 1e13),
        "network_bytes_per_s": (1e6, 1e13),
    }
    for field in fields(device):
        value = getattr(device, field.name)
        if field.name in limits and not limits[field.name][0] <= value <= limits[field.name][1]:
            low, high = limits[field.name]
            raise PlanInput(
                f"device {device.name}: {field.name} {value:g} is absurd",
                remedy=f"give it between {low:g} and {high:g}; bytes and seconds, not gigabits",
            )
    return device


def unseen(device: Device) -> Device:
    """The device as if nobody had measured it: with the efficiencies of the other measured ones."""
    if device.efficiency.startswith(POOLED):
        return device
    return replace(device, efficiency=f"{WITHOUT}{device.efficiency}")
