#!/usr/bin/env bash
# Start the four processes of the laptop topology, stream an answer through them, show where the time went, stop them.
#
#     deploy/demo.sh [BIN]      BIN: the directory of dsctl, by default .venv/bin
set -euo pipefail
cd "$(dirname "$0")/.."

dsctl=${1:-.venv/bin}/dsctl
topology=deploy/topologies/laptop.yaml
prompt=${PROMPT:-"Give me three tips for a good night's sleep."}

# where nobody looks, the tables need not fit a terminal
[ -t 1 ] || export COLUMNS=100

say() { printf '\n==> %s\n' "$1"; }

say "starting four processes: dsctl up -f $topology --detach"
# set before the start, so that an interrupted start is cleaned up as well
trap 'say "stopping: dsctl down"; "$dsctl" down -f "$topology"' EXIT
"$dsctl" up -f "$topology" --detach

say "what runs: dsctl status"
"$dsctl" status -f "$topology"

say "an answer, streamed: dsctl generate --chat --ledger"
printf '%s\n\n' "$prompt"
"$dsctl" generate -f "$topology" --chat --ledger --temperature 0 --max-tokens 96 "$prompt"
