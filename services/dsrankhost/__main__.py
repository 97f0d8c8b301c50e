"""``python -m dsrankhost --topology T.yaml --name decode-0-n1``."""

from __future__ import annotations

from dsrankhost.actor import build
from dstopology.service import service_command

main = service_command("rankhost", build)

if __name__ == "__main__":
    main()
