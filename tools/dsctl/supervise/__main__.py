"""``python -m dsctl.supervise``: the supervisor that ``dsctl up --detach`` leaves running."""

from __future__ import annotations

import sys

from dsctl.supervise.launch import main

if __name__ == "__main__":
    sys.exit(main())
