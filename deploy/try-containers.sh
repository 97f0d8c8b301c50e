#!/usr/bin/env bash
# Show that the container stack answers: build the image, start docker-compose.yml, send prompts from this host through
# the SDK, kill the decode process and ask again, stop everything, and check that every process stopped in good order.
#
#     deploy/try-containers.sh
#
# Exit status: 0 it works, 1 it does not, 77 there is no container engine here.
# BASE_IMAGE=...   when the default base image cannot be pulled
# DS_OFFLINE=1     collect wheels with this host's pip and build from those, with no network in the build
# DS_PORT=...      the frontend's port on this host, 5555 by default
set -euo pipefail
cd "$(dirname "$0")/.."

export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-distserve-try} DS_PORT=${DS_PORT:-5555}
python=.venv/bin/python
processes="relay prefill decode router"
#: the whole stack must be healthy within this
ready_limit_s=180

docker info >/dev/null 2>&1 || { echo "no container engine: docker info fails"; exit 77; }
if docker compose version >/dev/null 2>&1; then compose="docker compose"
elif docker-compose version >/dev/null 2>&1; then compose="docker-compose"
else echo "no docker compose"; exit 77; fi

step() { printf '\n==> %s (%ss)\n' "$1" "$SECONDS"; }
id_of() { $compose ps --all --quiet "$1"; }
field() { docker inspect --format "$1" "$(id_of "$2")"; }

finish() {
    status=$?
    if [ "$status" -ne 0 ]; then
        $compose ps || true
        $compose logs --tail 40 || true
    fi
    step "down"
    $compose down --volumes --timeout 20 2>&1 | tail -3
    exit "$status"
}

wait_healthy() {
    for process in $processes; do
        until [ "$(field '{{.State.Health.Status}}' "$process")" = healthy ]; do
            [ "$SECONDS" -lt "$deadline" ] || { echo "$process is not healthy in time"; return 1; }
            sleep 1
        done
        echo "$process is healthy"
    done
}

if ! (ulimit -l unlimited) 2>/dev/null; then
    DS_MEMLOCK=$(($(ulimit -H -l) * 1024))
    export DS_MEMLOCK
    echo "this host may not raise the limit on pinned memory: $DS_MEMLOCK bytes"
fi
if [ "${DS_OFFLINE:-0}" = 1 ]; then
    step "collecting wheels"
    deploy/fill-wheelhouse.sh "$python" 2>/dev/null
    export PIP_NO_INDEX=1
fi
step "building the image"
$compose build --quiet model

trap finish EXIT
step "up"
$compose up --detach --no-build 2>&1 | tail -8
deadline=$((SECONDS + ready_limit_s))
wait_healthy
for process in $processes; do
    echo "$process runs as user $($compose exec -T "$process" id -u): $(field '{{join .Config.Cmd " "}}' "$process")"
done

step "asking from this host, through the SDK"
$python deploy/ask.py "tcp://127.0.0.1:$DS_PORT"

step "killing the decode process: its container restarts, and the stack answers again"
$compose exec -T decode sh -c 'kill -9 -1'
deadline=$((SECONDS + 60))
until [ "$(field '{{.RestartCount}}' decode)" -gt 0 ]; do
    [ "$SECONDS" -lt "$deadline" ] || { echo "decode was not restarted"; exit 1; }
    sleep 1
done
deadline=$((SECONDS + ready_limit_s))
wait_healthy
$python deploy/ask.py "tcp://127.0.0.1:$DS_PORT"

step "stopping in good order"
$compose stop --timeout 20 2>&1 | tail -1
for process in $processes; do
    code=$(field '{{.State.ExitCode}}' "$process")
    echo "$process: exit status $code"
    [ "$code" -eq 0 ]
done
echo "the container stack works"
