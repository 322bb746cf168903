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

    from ponder_scale.checkpoint.find import Ranks
    from ponder_scale.checkpoint.save import Part, Saver
    from ponder_scale.data.sequences import MicroBatch
    from ponder_scale.settings import to_dict
    from ponder_scale.setup.build import build_model, model_configuration
    from ponder_scale.setup.warm_start import warm_start
    from ponder_scale.train.versions import versions
    from ponder_scale.train.zero.engine import Engine, init_distributed
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
    for step in range(1, case["steps"] + 1):
        for _ in range(engine.micro_steps):
            tokens = torch.randint(0, VOCABULARY, (1, SEQ_LEN + 1), generator=generator)
            engine.micro_step(MicroBatch(tokens, tokens[:, 1:], None))
        engine.update()
        engine.average_weights(step)
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

    saver = Saver(run_dir, Path(case["tokenizer"]), ranks=Ranks(engine.rank, engine.world_size))
    part = Part(engine.partition.tensors(copy=False), {"begins": engine.partition.begins()})
    saver.save(case["steps"], state, part)
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
