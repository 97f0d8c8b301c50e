"""``python -m dsdecode --topology T.yaml --name decode-0``."""

from __future__ import annotations

from dsdecode.actor import build
from dstopology.service import service_command

main = service_command("decode", build)

if __name__ == "__main__":
    main()
