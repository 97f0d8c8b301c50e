#!/usr/bin/env bash
# Start the four processes of the laptop topology, stream an answer through them, show where the time went, stop them.
#
#     deploy/demo.sh [BIN]      BIN: the directory of dsctl, by default .venv/bin
set -euo pipefail
cd "$(dirname "$0")/.."

dsctl=${1:-.venv/bin}/dsctl
topology=deploy/topologies/laptop.yaml
prompt=${PROMPT:-Why is the sky blue? Answer in two sentences.}

say() { printf '\n\033[1m==> %s\033[0m\n' "$1"; }

say "starting: dsctl up -f $topology --detach"
# set before the start, so that an interrupted start is cleaned up as well
trap 'say "stopping: dsctl down"; "$dsctl" down -f "$topology"' EXIT
"$dsctl" up -f "$topology" --detach

say "four processes: dsctl status"
"$dsctl" status -f "$topology"

say "an answer, streamed: dsctl generate --chat"
printf '\033[2m%s\033[0m\n' "$prompt"
"$dsctl" generate -f "$topology" --chat --ledger --temperature 0 --max-tokens 96 "$prompt"
