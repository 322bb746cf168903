"""Test whether the ranks of a job can exchange data, and print the name of each node that can, once.

train.sbatch runs it on all ranks when CHECK_ALL_REDUCE is 1. A node fails if one of its ranks does not reach the first
rank in time, or if the exchange within the node fails. If only the exchange among all nodes fails, nothing is printed,
because no single node is to blame. Measurements go to standard error.
"""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

ELEMENTS = 2**26  # fp32: 256 MiB, enough to see a network's bandwidth


def main() -> None:
    """Wait for all ranks, then exchange data within each node and among all nodes."""
    seconds = 0.7 * float(sys.argv[1])  # so that the result comes before the check is killed
    deadline = time.monotonic() + seconds
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    node, ranks_here = os.environ["SLURMD_NODENAME"], int(os.environ["LOCAL_WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=seconds)
    store = dist.TCPStore(address, port, size, rank == 0, patience, wait_for_workers=False)
    store.set(f"here/{rank}", node)
    absent = wait_for_ranks(store, size, deadline - seconds / 2, "here")
    if absent:
        nodes = {other // ranks_here for other in absent}
        if rank // ranks_here not in nodes and local == 0:
            print(node, flush=True)
        if rank == 0:
            print(f"ranks {sorted(absent)} did not come within {seconds:.0f} s", file=sys.stderr)
            time.sleep(5)  # the store is in this process, and the others still need it
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    elements = ELEMENTS if backend == "nccl" else 2**20
    group, _ = dist.new_subgroups(ranks_here)
    try:
        exchange(elements, device, group, ranks_here)
    except RuntimeError as error:
        print(f"node {node}, among its own ranks: {error}", file=sys.stderr)
    else:
        store.set(f"well/{rank}", node)
    unwell = {other // ranks_here for other in wait_for_ranks(store, size, deadline, "well")}
    if not unwell:
        gigabytes = exchange(elements, device, None, size)
        if rank == 0:
            print(f"all-reduce over {size} ranks ({backend}): {gigabytes:.1f} GB/s of bus bandwidth", file=sys.stderr)
    if local == 0 and rank // ranks_here not in unwell:
        print(node, flush=True)
    store.set(f"done/{rank}", node)
    if rank == 0:
        wait_for_ranks(store, size, time.monotonic() + 5, "done")  # the store is in this process
    os._exit(0)  # nothing is left to write, and tearing NCCL down can hang


def wait_for_ranks(store: dist.TCPStore, size: int, deadline: float, word: str) -> set[int]:
    """The ranks that have not said the word by the deadline."""
    absent = set(range(size))
    while absent and time.monotonic() < deadline:
        absent = {rank for rank in absent if not store.check([f"{word}/{rank}"])}
        time.sleep(0.1)
    return absent


def exchange(elements: int, device: torch.device, group: dist.ProcessGroup | None, size: int) -> float:
    """The bus bandwidth of an all-reduce in GB/s, as nccl-tests counts it. Raises RuntimeError for a wrong sum."""
    ones = torch.ones(elements, device=device)
    dist.all_reduce(ones, group=group)  # connects
    began = time.monotonic()
    dist.all_reduce(ones, group=group)
    wrong = int((ones != size * size).sum())  # waits for the device
    if wrong:
        raise RuntimeError(f"{wrong} of {elements} sums are wrong")
    return 2 * (size - 1) / size * 4 * elements / (time.monotonic() - began) / 1e9


if __name__ == "__main__":
    main()
