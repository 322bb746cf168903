#!/bin/bash
# Run one rank of a step. rank.sh COMMAND... sets the variables that torch.distributed needs from those of srun.
# Each rank sees all GPUs of the node, and LOCAL_RANK selects its own. --gpus-per-task would break peer-to-peer copies.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))
# Block signals until Python has installed its handlers. exec, because the signals would kill a shell in between.
hold=(env --block-signal=USR1,USR2,TERM)
"${hold[@]}" true 2>/dev/null || hold=()  # coreutils before 8.31 lack it
exec "${hold[@]}" "$@"
