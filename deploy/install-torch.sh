#!/bin/sh
# Install torch, at the version in constraints.txt, before anything that depends on it.
#
#     deploy/install-torch.sh PYTHON
#
# On Linux a plain "pip install torch" brings the CUDA build and several gigabytes of libraries with it. So the CPU
# build is taken: from the sources that pip is configured with if they have it, else from PyTorch's own index.
# TORCH=registry takes the registry's default build instead (CUDA on Linux), which is what a GPU host wants.
set -eu

python=$1
version=$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints.txt")
cpu_index=https://download.pytorch.org/whl/cpu

installed=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
case $installed in
    "$version" | "$version"+*) exit 0 ;;
esac

install() {
    "$python" -m pip install --no-deps "$@"
}

if [ "${TORCH:-cpu}" = registry ] || [ "$(uname -s)" != Linux ]; then
    install "torch==$version"
elif ! install "torch==$version+cpu" 2>/dev/null; then
    echo "no CPU build of torch in pip's own sources, taking it from $cpu_index"
    install --index-url "$cpu_index" "torch==$version+cpu"
fi
