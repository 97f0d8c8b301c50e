"""What a simulation needs to know of the model that a topology names."""

from __future__ import annotations

import os

from dskv.layout import KvLayout
from dstopology import modelfacts
from dstopology.resolved import Topology
from dswire.errors import ModelNotFound


def layout_of(topology: Topology) -> KvLayout:
    """Shape of the KV blocks. Raises :class:`ModelNotFound`."""
    facts = modelfacts.read(topology.model.path, os.environ)
    if facts is None:
        raise ModelNotFound(
            f"the size of KV is not known: model {topology.model.path} is not on this host",
            remedy="`dsctl model pull` it, or make a directory with its config.json and name that in the topology",
        )
    return facts.kv_layout(topology.instances[0].block_size, topology.model.dtype)
