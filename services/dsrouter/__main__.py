"""``python -m dsrouter --topology T.yaml --name router-0``."""

from __future__ import annotations

from dsrouter.actor import build
from dstopology.service import service_command

main = service_command("router", build)

if __name__ == "__main__":
    main()
