"""``python -m dsprefill --topology T.yaml --name prefill-0``."""

from __future__ import annotations

from dsprefill.actor import build
from dstopology.service import service_command

main = service_command("prefill", build)

if __name__ == "__main__":
    main()
