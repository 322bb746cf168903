"""Train a run's model on two ranks of this machine, each a process, under the real engine."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ponder_scale.config import RunConfig
from ponder_scale.settings import load
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.setup.recompute import apply_recompute
from ponder_scale.train.launch import free_port

RANKS = 2


def configuration_of(config: RunConfig) -> Any:
    """The transformers configuration of the run's model, whose recipe gives the size of the vocabulary."""
    assert config.model.vocab_size is not None
    return model_configuration(config.model, vocab_size=config.model.vocab_size, seq_len=config.data.seq_len, eod_id=0)


def on_two_ranks(function: Callable[[Any, RunConfig], Any], overrides: Sequence[str]) -> Any:
    """What `function` of the engine and the run's configuration returns on rank 0. Both ranks are freshly forked.

    Raises:
        RuntimeError: a rank failed.
    """
    load(RunConfig, None, overrides)  # raises here for wrong overrides, in one line
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  slow to import: once here, not on each rank

    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    port = free_port()
    ranks = [
        fork.Process(target=_on_a_rank, args=(function, rank, port, list(overrides), sender)) for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"the ranks failed with exit codes {[rank.exitcode for rank in ranks]}") from error
    finally:
        for rank in ranks:
            rank.join(30)
            rank.kill()


def _on_a_rank(
    function: Callable[[Any, RunConfig], Any], rank: int, port: str, overrides: list[str], sender: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DS_ACCELERATOR="cpu")
    from ponder_scale.train.zero.engine import Engine, init_distributed

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    init_distributed()
    config = load(RunConfig, None, overrides)
    model = build_model(configuration_of(config), config.seed)
    apply_recompute(model, config.train.recompute)
    found = function(Engine(model, config), config)
    if rank == 0:
        sender.send(found)
    torch.distributed.barrier()
    os._exit(0)  # DeepSpeed's threads may abort an interpreter that exits normally
