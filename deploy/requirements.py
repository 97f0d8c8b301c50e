"""Print what ``pyproject.toml`` requires, one a line, so that dependencies can be installed before the code.

``python requirements.py PYPROJECT [build | EXTRA]...``: the dependencies, then those of each extra; ``build``
stands for the build system's. Standard library only.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The requirements of ``pyproject``; raises KeyError for an extra that it does not have."""
    table = tomllib.loads(pyproject.read_text())
    found = list(table["project"]["dependencies"])
    for extra in extras:
        if extra == "build":
            found += table["build-system"]["requires"]
        else:
            found += table["project"]["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])))
