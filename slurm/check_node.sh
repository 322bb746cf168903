#!/bin/bash
# Check whether this node is fit to train. check_node.sh RUN_DIR fails and prints a sentence for each problem.
# train.sbatch runs it on every node before each attempt, and leaves out the nodes where it fails. To add your own
# checks, set CHECK_NODE in site.sh to a program that calls this one first.
set -uo pipefail
run_dir=${1:?} bad=0
wrong() { echo "node $(hostname): $*"; bad=1; }

free_gib() { df --output=avail --block-size=1G "$1" | tail -n 1 | tr -d ' '; }

# Prints index and value for each GPU. The timeout is there because a stuck driver makes nvidia-smi wait forever.
ask() { timeout 60 nvidia-smi --query-gpu="index,$1" --format=csv,noheader,nounits; }

gpus() {
    local found uncorrected slow
    if ! command -v nvidia-smi >/dev/null; then
        wrong "Slurm gave $SLURM_GPUS_ON_NODE GPUs, but there is no nvidia-smi"
        return
    fi
    # Count the MIG devices of a GPU that is split up, not the GPU itself. They are listed below it.
    found=$(timeout 60 nvidia-smi --list-gpus |
        awk '/^GPU/ { found++; whole = 1 } /^ +MIG/ { found += !whole; whole = 0 } END { print found + 0 }') || true
    [ "$found" -ge "$SLURM_GPUS_ON_NODE" ] || wrong "Slurm gave $SLURM_GPUS_ON_NODE GPUs, $found are visible"
    uncorrected=$(ask ecc.errors.uncorrected.volatile.total | awk -F', ' '$2 + 0 > 0')
    [ -z "$uncorrected" ] || wrong "uncorrected memory errors (GPU, count): $(echo "$uncorrected" | xargs)"
    # The hardware slows down because of heat or power supply. (A software power cap is normal.)
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
