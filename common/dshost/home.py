"""Where this user's processes keep what they make once: models, packed weights, compiled libraries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def home(env: Mapping[str, str] = os.environ) -> Path:
    """``DS_HOME``, or ``distserve`` in the user's cache directory. May not exist yet."""
    if chosen := env.get("DS_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = env.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "distserve"
