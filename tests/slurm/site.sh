# The site file of the lab: the shipped one, with what is particular to a machine of two cores without GPUs.
source "$home/slurm/site.sh"
POLL_SECONDS=1
repository=$(dirname "${BASH_SOURCE[0]}")/../..
export PYTHONPATH=$PYTHONPATH:$repository  # for the trainers below, which are not part of a submission
case ${TRAINER:-} in
    contract) ponder_scale=(python "$repository/tests/slurm/contract.py") ;;
    faulty) ponder_scale=(python -m tests.slurm.faulty) ;;
esac
