#!/bin/bash
# One rank of a step: rank.sh COMMAND... runs the command with what torch.distributed must know, from what srun tells.
# All GPUs of the node are visible to it and LOCAL_RANK names its own: --gpus-per-task would break peer-to-peer copies.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))
# Signals wait until Python's handlers are there. exec: a shell in between would die of them.
hold=(env --block-signal=USR1,USR2,TERM)
"${hold[@]}" true 2>/dev/null || hold=()  # coreutils before 8.31
exec "${hold[@]}" "$@"
