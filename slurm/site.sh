# Settings of this cluster for all templates. Each template sources this file on the first node of its job. Lines marked
# EDIT are for you. Settings of sbatch itself (partition, account, nodes, time) are at the top of each template.
# You can also set a value of the form ${NAME:-default} for one job: NAME=value sbatch slurm/train.sbatch ...

case ${BASH_VERSION:-} in
    "" | [0-3].* | 4.[0-3].*)  # these treat an empty array as an unbound variable
        echo "error: the shell is ${BASH_VERSION:+bash }${BASH_VERSION:-no bash}, expected bash 4.4 or newer;" \
            "name one in the first line of the template: #!/path/to/bash" >&2
        return 2 ;;
esac
export SLURM_EXPORT_ENV=ALL  # so that tasks get the variables set here, even after `sbatch --export=NONE`

# --- programs
# module load cuda/12.8                                             # EDIT, if you use modules
VENV=${VENV:-}  # EDIT: folder of a venv or conda environment. If empty, .venv in the folder of submission is used.
environment=${VENV:-${SLURM_SUBMIT_DIR:-.}/.venv}
if [ -n "$VENV" ] && [ ! -x "$VENV/bin/python" ]; then
    echo "error: VENV is $VENV: no bin/python in it; expected a venv or conda environment that every node sees" >&2
    return 2
elif [ -d "$environment/conda-meta" ]; then  # its activate would read the template's arguments as its own
    export CONDA_PREFIX=$environment PATH=$environment/bin:$PATH
    for hook in "$environment"/etc/conda/activate.d/*.sh; do if [ -f "$hook" ]; then source "$hook"; fi; done
elif [ -f "$environment/bin/activate" ]; then
    source "$environment/bin/activate"
elif [ -n "$VENV" ]; then
    export PATH=$VENV/bin:$PATH
fi

# Or use containers. pyxis needs options of srun. apptainer is a command in front of the command.
srun_options=()   # EDIT: (--container-image=/images/train.sqsh --container-mounts=/data --container-workdir="$PWD")
container=()      # EDIT: (apptainer exec --nv --bind /data,/scratch /images/train.sif)
ponder_scale=(python -m ponder_scale.cli)
ponder_data=(python -m data_pipeline.cli)
MPI=${MPI:-pmi2}  # EDIT for data.sbatch: pmi2 for MPICH (also PyPI's), pmix for Open MPI. See `srun --mpi=list`.

# --- failures and checks
SPARES=${SPARES:-0}                    # nodes of the job that only replace other nodes
MAX_FAILURES=${MAX_FAILURES:-10}       # limit per job, of crashes, hangs, sick nodes and attempts without progress
HANG_SECONDS=${HANG_SECONDS:-5400}     # silence that counts as a hang; the trainer's own watchdog acts earlier
LEAVE_DRAINED=${LEAVE_DRAINED:-1}      # 1: save and leave nodes that an administrator drains
POLL_SECONDS=${POLL_SECONDS:-30}       # time between checks for hangs and drained nodes
CHECK_NODE=${CHECK_NODE:-$home/slurm/check_node.sh}  # EDIT: a program that fails on a node that is not fit to train
CHECK_ALL_REDUCE=${CHECK_ALL_REDUCE:-0}  # 1: before training, let all GPUs exchange 256 MiB
CHECK_SECONDS=${CHECK_SECONDS:-180}    # a node that does not answer within this time is not fit
COPY_TO=${COPY_TO:-}                   # EDIT: a node-local folder, such as /local/$USER, for copies of the shards

# --- processors
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since Slurm 22.05 srun does not inherit it from sbatch
# By default each rank would start one thread for each core of the node.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SRUN_CPUS_PER_TASK < 8 ? SRUN_CPUS_PER_TASK : 8))}
export PYTHONUNBUFFERED=1              # otherwise the log may end before the lines that explain a crash
export TOKENIZERS_PARALLELISM=false
ulimit -l unlimited 2>/dev/null || true  # InfiniBand pins memory
ulimit -n "$(ulimit -H -n)" 2>/dev/null || true  # NCCL opens sockets to every peer

# --- caches on local disks, because compilers lock files and locks over NFS can hang a thousand ranks
cache=${TMPDIR:-/tmp}/ponder-scale-$(id -un)
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}

# --- GPUs and their network
# ZeRO-3 gathers buffers of many sizes, which fragments memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}  # collectives that each rank dumps on a timeout
# If a node's name belongs to a slow network, say under which name to reach its ranks. You can also set MASTER_ADDR.
# master_addr() { echo "$1-ib0"; }                                  # EDIT
# MASTER_PORT=29500                                                 # EDIT, if only some ports are open
# With Ethernet or several networks, name the interface. Otherwise NCCL may choose one that cannot reach other nodes.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0            # EDIT
# With InfiniBand, name the adapters for GPUs (see `ibdev2netdev`) if some are for storage.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3                     # EDIT
# export NCCL_IB_TIMEOUT=22                                         # EDIT: on large fabrics, to survive a short loss
# With RoCE, give the index that `show_gids` prints for RoCE v2 over IPv4.
# export NCCL_IB_GID_INDEX=3                                        # EDIT

export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}  # prefer the submitted code to an installed package
