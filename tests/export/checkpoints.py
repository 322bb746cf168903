"""Checkpoints of tiny runs for tests, saved by real engines on two ranks: `save_checkpoints` runs them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

SEQ_LEN, VOCABULARY = 24, 96


def save_checkpoint(case: dict[str, Any]) -> dict[str, Any]:
    """On a rank: train `case["steps"]` steps of a model, save a whole checkpoint to `case["run_dir"]`.

    Weights start from the folder `case["init"]` where it is given. Rank 0 also writes the engine's own fp32 weights
    to run_dir/expected.pt and, where `case["universal"]` is set, a universal checkpoint to run_dir/universal.
    """
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param

    from ponder_scale.checkpoint import save as checkpoint
    from ponder_scale.checkpoint.parts import part_name, write_part
    from ponder_scale.settings import to_dict
    from ponder_scale.setup.build import build_model, model_configuration
    from ponder_scale.setup.warm_start import warm_start
    from ponder_scale.train.zero.engine import Engine, init_distributed, versions
    from tests.train.zero.gradients import run_config

    torch.set_num_threads(1)
    init_distributed()
    run_dir = Path(case["run_dir"])
    config = run_config(case, str(run_dir))
    configuration = model_configuration(config.model, vocab_size=VOCABULARY, seq_len=SEQ_LEN, eod_id=0)
    model = build_model(configuration, seed=3)
    if "init" in case:
        warm_start(model, Path(case["init"]))
    engine = Engine(model, config)
    engine.set_learning_rate(1e-2)
    generator = torch.Generator().manual_seed(engine.rank)
    for number in range(case["steps"] * engine.micro_steps):
        tokens = torch.randint(0, VOCABULARY, (1, SEQ_LEN + 1), generator=generator)
        engine.backward(engine.forward(tokens[:, :-1], tokens[:, 1:]).loss)
        engine.step()
        if (number + 1) % engine.micro_steps == 0:
            engine.average_weights((number + 1) // engine.micro_steps)
    expected = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        expected[name] = (parameter.detach() if full is None else full).float().cpu().clone()
    if engine.rank == 0:
        run_dir.mkdir(parents=True)
        torch.save(expected, run_dir / "expected.pt")
    dist.barrier()
    if case.get("universal"):
        _save_universal(engine, run_dir)
    state = {
        "step": case["steps"],
        "tokens": case["steps"] * 4 * SEQ_LEN,
        "loader": {"shards": "f" * 32},
        "model": json.loads(json.dumps(configuration.to_dict())),
        "parameters": engine.partition.shapes(),
        "config": to_dict(config),
        "versions": versions(),
    }

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * engine.world_size
        dist.all_gather_object(values, value)
        return values

    def write(folder: Path) -> checkpoint.Index:
        name, partition = part_name(engine.rank), engine.partition
        return {name: write_part(folder / name, partition.tensors(copy=False), {"begins": partition.begins()})}

    ranks = checkpoint.Ranks(engine.rank, engine.world_size, gather)
    checkpoint.save(run_dir, case["steps"], state, write, tokenizer=Path(case["tokenizer"]), ranks=ranks)
    return {}


def _save_universal(engine: Any, run_dir: Path) -> None:
    """What a training of ours never does: DeepSpeed's own checkpoint, made universal by its own script."""
    import torch.distributed as dist
    from deepspeed.checkpoint import ds_to_universal

    engine.deepspeed.save_checkpoint(str(run_dir / "deepspeed"), tag="global_step2")
    if engine.rank == 0:
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        folders = {"input_folder": str(run_dir / "deepspeed/global_step2"), "output_folder": str(run_dir / "universal")}
        ds_to_universal.main(argparse.Namespace(**options, **folders, inject_missing_state=True))
    dist.barrier()
