#!/bin/bash
# Whether this node is fit to train: check_node.sh RUN_DIR fails with a sentence for each thing that is wrong.
# train.sbatch runs it on every node before each attempt, and leaves out the nodes where it fails. For checks of your
# own, point CHECK_NODE in site.sh to a program that calls this one first.
set -uo pipefail
run_dir=${1:?} bad=0
wrong() { echo "node $(hostname): $*"; bad=1; }

free_gib() { df --output=avail --block-size=1G "$1" | tail -n 1 | tr -d ' '; }

# index and value for each GPU. timeout: a driver that is stuck lets nvidia-smi wait for ever
ask() { timeout 60 nvidia-smi --query-gpu="index,$1" --format=csv,noheader,nounits; }

gpus() {
    local found uncorrected slow
    if ! command -v nvidia-smi >/dev/null; then
        wrong "Slurm gave $SLURM_GPUS_ON_NODE GPUs, but there is no nvidia-smi"
        return
    fi
    # a GPU that is split up counts as its MIG devices, which are listed below it
    found=$(timeout 60 nvidia-smi --list-gpus |
        awk '/^GPU/ { found++; whole = 1 } /^ +MIG/ { found += !whole; whole = 0 } END { print found + 0 }') || true
    [ "$found" -ge "$SLURM_GPUS_ON_NODE" ] || wrong "Slurm gave $SLURM_GPUS_ON_NODE GPUs, $found are visible"
    uncorrected=$(ask ecc.errors.uncorrected.volatile.total | awk -F', ' '$2 + 0 > 0')
    [ -z "$uncorrected" ] || wrong "uncorrected memory errors (GPU, count): $(echo "$uncorrected" | xargs)"
    # held back by the hardware: heat or power supply. (The power cap of software is normal.)
    slow=$(ask clocks_throttle_reasons.hw_slowdown | awk -F', ' '$2 == "Active"')
    [ -z "$slow" ] || wrong "clocks are held back by the hardware on GPU $(echo "$slow" | xargs)"
}

[ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || gpus
if ! touch "$run_dir/.node-$(hostname)" 2>/dev/null; then wrong "$run_dir cannot be written"; fi
rm -f "$run_dir/.node-$(hostname)"
for folder in /tmp /dev/shm; do
    [ "$(free_gib $folder)" -ge "${CHECK_FREE_GIB:-1}" ] || wrong "$folder has less than ${CHECK_FREE_GIB:-1} GiB free"
done
exit $bad
