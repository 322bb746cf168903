#!/bin/bash
# A Slurm cluster of one machine, for as long as a command runs.
#
#   tests/slurm/lab.sh [-n NODES] [-c CPUS] [-g GPUS] [-d FOLDER] COMMAND [ARGUMENT...]
#
# COMMAND runs on the login host. The daemons are the real ones; each node is a host of its own, with its address, name,
# processes, /dev/shm and local disk. Nodes claim any number of CPUs, and GPUs that are /dev/null. In the lab:
#
#   labnode down n2 | labnode up n2          switch a node off (at once, like a power cut) and on
#   ip link set v2 down | up                 pull the node's network cable, and plug it in
#
# Partitions: main (default); low, which high preempts by requeue. Everything lives in namespaces of one process, so the
# kernel removes all of it when COMMAND ends or this script is killed, whatever state it is in.
# Needs slurmctld, slurmd, munge and iproute2 (Debian: apt-get install slurm-wlm munge iproute2), and root or
# unprivileged user namespaces.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

if [ "${1:-}" != --inside ]; then
    user=()
    [ "$(id -u)" = 0 ] || user=(--user --map-current-user --keep-caps)
    exec unshare "${user[@]}" --mount --uts --net --ipc --pid --fork --kill-child=KILL --mount-proc -- "$0" --inside "$@"
fi

shift
nodes=2 cpus=4 gpus=0 folder=
while getopts n:c:g:d: option; do
    case $option in
        n) nodes=$OPTARG ;;
        c) cpus=$OPTARG ;;
        g) gpus=$OPTARG ;;
        d) folder=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { echo "lab: expected a command" >&2; exit 2; }
made=
[ -n "$folder" ] || made=1 folder=$(mktemp -d "${TMPDIR:-/tmp}/slurm-lab.XXXXXX")
export LAB=$folder SLURM_CONF=$folder/slurm.conf PATH=$PATH:$folder/bin
mkdir -p "$folder"/{bin,state,log,munge,dev,local}
chmod 755 "$folder" "$folder/munge"

network() {  # one switch, and a cable to every node
    hostname login
    {
        printf '127.0.0.1 localhost\n10.77.0.254 login\n'
        # torch asks for the name of the IPv4-mapped address, and waits long where there is none
        for i in $(seq "$nodes"); do printf '10.77.0.%d n%d\n::ffff:10.77.0.%d n%d\n' "$i" "$i" "$i" "$i"; done
    } >"$folder/hosts"
    mount --bind "$folder/hosts" /etc/hosts
    mount -t tmpfs none /run
    mkdir /run/netns
    ip link set lo up
    ip link add switch type bridge
    ip addr add 10.77.0.254/24 dev switch
    ip link set switch up
    for i in $(seq "$nodes"); do
        ip netns add "n$i"
        ip link add "v$i" type veth peer name eth0 netns "n$i"
        ip link set "v$i" master switch up
        ip -n "n$i" addr add "10.77.0.$i/24" dev eth0
        ip -n "n$i" link set eth0 up
        ip -n "n$i" link set lo up
    done
}

authentication() {  # munge, with a key that is thrown away
    head -c 128 /dev/urandom >"$folder/munge/key"
    chmod 400 "$folder/munge/key"
    munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --num-threads=2 --force 2>/dev/null
}

configuration() {
    local gres=
    if [ "$gpus" -gt 0 ]; then
        for i in $(seq 0 $((gpus - 1))); do
            touch "$folder/dev/gpu$i"
            mount --bind /dev/null "$folder/dev/gpu$i"  # Slurm accepts device files only
        done
        echo "NodeName=n[1-$nodes] Name=gpu File=$folder/dev/gpu[0-$((gpus - 1))]" >"$folder/gres.conf"
        gres=Gres=gpu:$gpus
    fi
    echo CgroupPlugin=cgroup/v1 >"$folder/cgroup.conf"  # named, so that slurmd looks for no cgroups; none are used
    cat >"$folder/slurm.conf" <<CONFIGURATION
ClusterName=lab
SlurmctldHost=login
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# cred_expire: a requeued job waits for it to pass
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
TmpFS=$folder/local
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobs.txt
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_min_age_reserve=0
ReturnToService=1
SlurmdTimeout=10
SlurmctldTimeout=10
# a busy machine may answer late, and a job whose launch was given up can stay COMPLETING for ever
MessageTimeout=60
KillWait=10
MinJobAge=3600
JobRequeue=1
# config_overrides: two real cores may be any node
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-$nodes] CPUs=$cpus RealMemory=1000000 $gres State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 DefMemPerCPU=100 PreemptMode=off
PartitionName=low Nodes=ALL PriorityTier=1 DefMemPerCPU=100 PreemptMode=requeue GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=100 DefMemPerCPU=100 PreemptMode=off
CONFIGURATION
}

power_switch() {
    cat >"$folder/bin/labnode" <<'SWITCH'
#!/bin/bash
case $1 in
    up)
        mkdir -p "$LAB/spool.$2"
        nsenter --net="/run/netns/$2" unshare --uts --ipc --mount --pid --fork --kill-child=KILL --mount-proc sh -c \
            "hostname $2; mount -t tmpfs none $LAB/local; mount -t tmpfs none /dev/shm; exec slurmd -D -N $2" \
            </dev/null >>"$LAB/log/$2.out" 2>&1 &
        echo $! >"$LAB/$2.pid" ;;
    down) kill -KILL "$(cat "$LAB/$2.pid")" ;;
esac
SWITCH
    chmod +x "$folder/bin/labnode"
}

start() {
    slurmctld
    for i in $(seq "$nodes"); do labnode up "n$i"; done
    for _ in $(seq 600); do
        [ "$(timeout 2 sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = "$nodes" ] && return
        sleep 0.05
    done
    echo "lab: the cluster did not come up" >&2
    for log in "$folder"/log/*; do echo "== $log"; tail -n 20 "$log"; done >&2
    exit 1
}

network
authentication
configuration
power_switch
start
code=0
"$@" || code=$?
if [ -n "$made" ]; then
    umount "$folder"/dev/* 2>/dev/null || true
    rm -rf "$folder"
fi
exit $code
