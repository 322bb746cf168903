# What the templates must know of this cluster. Each sources this file on the first node of its job; a line marked EDIT
# is for you. What sbatch itself must know (partition, account, nodes, time) stands in the head of each template.
# A value in the form ${NAME:-default} can also be given for one job: NAME=value sbatch slurm/train.sbatch ...

case ${BASH_VERSION:-} in
    "" | [0-3].* | 4.[0-3].*)  # which call an empty array an unbound variable
        echo "error: the shell is ${BASH_VERSION:+bash }${BASH_VERSION:-no bash}, expected bash 4.4 or newer;" \
            "name one in the first line of the template: #!/path/to/bash" >&2
        return 2 ;;
esac
export SLURM_EXPORT_ENV=ALL  # after `sbatch --export=NONE` too: else srun keeps from the tasks what is set here

# --- how a task finds its programs
# module load cuda/12.8                                             # EDIT, where there are modules
VENV=${VENV:-}  # EDIT: folder of a venv or a conda environment; empty: .venv of the folder of submission, if it is there
environment=${VENV:-${SLURM_SUBMIT_DIR:-.}/.venv}
if [ -n "$VENV" ] && [ ! -x "$VENV/bin/python" ]; then
    echo "error: VENV is $VENV: no bin/python in it; expected a venv or conda environment that every node sees" >&2
    return 2
elif [ -d "$environment/conda-meta" ]; then  # its activate would take the arguments of the template for its own
    export CONDA_PREFIX=$environment PATH=$environment/bin:$PATH
    for hook in "$environment"/etc/conda/activate.d/*.sh; do if [ -f "$hook" ]; then source "$hook"; fi; done
elif [ -f "$environment/bin/activate" ]; then
    source "$environment/bin/activate"
elif [ -n "$VENV" ]; then
    export PATH=$VENV/bin:$PATH
fi

# Containers instead. pyxis takes options of srun, apptainer is a command before the command:
srun_options=()   # EDIT: (--container-image=/images/train.sqsh --container-mounts=/data --container-workdir="$PWD")
container=()      # EDIT: (apptainer exec --nv --bind /data,/scratch /images/train.sif)
ponder_scale=(python -m ponder_scale.cli)
ponder_data=(python -m data_pipeline.cli)
MPI=${MPI:-pmi2}  # EDIT: of data.sbatch; pmi2 for MPICH (also PyPI's), pmix for Open MPI. `srun --mpi=list` names them

# --- when to give up, and when to look
SPARES=${SPARES:-0}                    # nodes of the job that train only in place of others
MAX_FAILURES=${MAX_FAILURES:-10}       # of one job: starts after a crash, a hang, a sick node, or without progress
HANG_SECONDS=${HANG_SECONDS:-5400}     # without a sign of life; the trainer's own watchdog is sooner
LEAVE_DRAINED=${LEAVE_DRAINED:-1}      # 1: save, and move away from nodes that an administrator drains
POLL_SECONDS=${POLL_SECONDS:-30}       # between two looks for hangs and drained nodes
CHECK_NODE=${CHECK_NODE:-$home/slurm/check_node.sh}  # EDIT: any program that fails on a node not fit to train
CHECK_ALL_REDUCE=${CHECK_ALL_REDUCE:-0}  # 1: all GPUs also exchange 256 MiB before the training begins
CHECK_SECONDS=${CHECK_SECONDS:-180}    # a node that has not answered by then is not fit
COPY_TO=${COPY_TO:-}                   # EDIT: a node-local folder, such as /local/$USER, for copies of the shards

# --- processors
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since Slurm 22.05 srun does not take it from sbatch
# by default each rank would start a thread for every core of the node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SRUN_CPUS_PER_TASK < 8 ? SRUN_CPUS_PER_TASK : 8))}
export PYTHONUNBUFFERED=1              # a log that ends before the crash explains nothing
export TOKENIZERS_PARALLELISM=false
ulimit -l unlimited 2>/dev/null || true  # InfiniBand pins memory
ulimit -n "$(ulimit -H -n)" 2>/dev/null || true  # NCCL opens sockets to every peer

# --- caches: compilers lock files, and locks over NFS can hang a thousand ranks
cache=${TMPDIR:-/tmp}/ponder-scale-$(id -un)
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}

# --- GPUs and their network
# ZeRO-3 gathers in many sizes, which fragments memory
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}  # last collectives of each rank, dumped when one times out
# Where the name of a node is that of a slow network: by what name its ranks are reached. MASTER_ADDR set here holds, too.
# master_addr() { echo "$1-ib0"; }                                  # EDIT
# MASTER_PORT=29500                                                 # EDIT, where only some ports are open
# Ethernet or several networks: name the interface, or bootstrap may choose one that does not reach the other nodes.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0            # EDIT
# InfiniBand: name the adapters that are for GPUs (`ibdev2netdev`), if some are for storage.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3                     # EDIT
# export NCCL_IB_TIMEOUT=22                                         # EDIT: large fabrics; a lossy moment is not the end
# RoCE: the index that `show_gids` gives for RoCE v2 over IPv4.
# export NCCL_IB_GID_INDEX=3                                        # EDIT

export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}  # the code of the submission, before any installed one
