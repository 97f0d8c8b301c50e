"""``python -m dsrelay --topology T.yaml --name relay-n0``."""

from __future__ import annotations

from dsrelay.actor import build
from dstopology.service import service_command

main = service_command("relay", build)

if __name__ == "__main__":
    main()
