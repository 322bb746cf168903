"""Runs on shards with a mask: what two ranks learn is what one process learns from all sequences at once.

Ranks and micro-batches have unequal numbers of labels, some none at all; each label weighs the same in a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.data.sequences import IGNORE_INDEX
from ponder_scale.settings import load
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.shards.format import ShardSet, ShardWriter
from ponder_scale.shards.manifest import Manifest, seal
from ponder_scale.shards.packing import pack
from tests.ranks import run_ranks
from tests.train.resumes import check_resume
from tests.train.runs import STEPS, overrides, records, train_and_tell, train_on_a_rank, weights
from tests.train.zero.gradients import small_buckets, worst

SEQUENCES = 8


@pytest.fixture(scope="module")
def masked(tiny_shards: Callable[..., Any]) -> ShardSet:
    made: ShardSet = tiny_shards(train=(900, 700), heldout=(200,), vocab_size=50, masked=True)
    (made.folder / "tokenizer").mkdir()
    (made.folder / "tokenizer" / "tokenizer.json").write_text("{}")
    pack(made, 12)
    return made


def on_a_rank(case: dict[str, Any]) -> dict[str, Any]:
    """The gradients of a run's first step, as its own loop accumulates them, its loss, and labels by micro-batch."""
    from deepspeed.utils import safe_get_full_grad

    from ponder_scale.runs.attempts import Attempt
    from ponder_scale.train import loop
    from ponder_scale.train.schedules import step_depth
    from ponder_scale.train.survive.watchdog import Watch

    torch.set_num_threads(1)
    config = load(RunConfig, None, case["overrides"])
    counts: list[int] = []
    with Watch(Path(config.run_dir), config.health, rank=0) as watch:
        run = loop.start(config, watch, Attempt(Path(config.run_dir)))
        micro_step = run.engine.micro_step

        def counting(batch: Any, *more: Any, **options: Any) -> Any:
            counts.append(int((batch.labels != IGNORE_INDEX).sum()))
            return micro_step(batch, *more, **options)

        run.engine.micro_step = counting
        tally = loop._accumulate(run, 1, step_depth(1, config), logged=True)
        means = tally.means(run.engine.total(tally.sums()))
        gradients = {}
        for name, parameter in run.engine.module.named_parameters():
            gradients[name] = safe_get_full_grad(parameter).flatten().tolist()
        run.loader.close()
    return {"gradients": gradients, "losses": means.pass_losses, "counts": counts}


def in_plain_torch(config: RunConfig) -> dict[str, Any]:
    """The same of one process in float64: all sequences, stock cross-entropy of the labels that count."""
    sources = open_sources(config.data)
    loader = Loader(config.data, sources, seed=config.seed, global_batch=SEQUENCES, micro_batch=SEQUENCES)
    (batch,) = loader.next_batches()
    loader.close()
    configuration = model_configuration(config.model, vocab_size=50, seq_len=config.data.seq_len, eod_id=0)
    model = build_model(configuration, config.seed).double()
    logits = model(input_ids=batch.tokens[:, :-1]).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    gradients = {name: parameter.grad.flatten().tolist() for name, parameter in model.named_parameters()}
    return {"gradients": gradients, "loss": loss.item(), "labels": int((batch.labels != IGNORE_INDEX).sum())}


@pytest.mark.parametrize("stage", [1, 3])
def test_loss_and_gradients_of_two_ranks_are_those_of_one_process_with_all_labels(
    stage: int, masked: Any, tmp_path: Path
) -> None:
    (tmp_path / "json").mkdir()
    cases = []
    for packing in ("concat", "best-fit"):
        more = [f"train.deepspeed={small_buckets(tmp_path / 'json', stage)}", f"data.packing={packing}"]
        cases.append({"overrides": overrides(tmp_path / packing, masked, *more, "train.micro_batch=1")})
    for case, ranks in zip(cases, run_ranks(on_a_rank, cases), strict=True):
        assert all("error" not in rank for rank in ranks), ranks
        expected = in_plain_torch(load(RunConfig, None, case["overrides"]))
        counts = [count for rank in ranks for count in rank["counts"]]
        assert 0 in counts and len(set(counts)) > 2 and sum(counts) == expected["labels"] < SEQUENCES * 12
        for rank in ranks:
            assert rank["losses"][-1] == pytest.approx(expected["loss"], rel=1e-5)
            assert worst(rank["gradients"], expected["gradients"]) < 1e-5


@pytest.mark.parametrize("losses", ["last", "linear"])
def test_a_masked_run_is_the_same_on_two_ranks_and_on_one_and_says_what_counts(
    losses: str, masked: Any, tmp_path: Path
) -> None:
    more = ["evaluate.every_steps=2", "optim.warmup_steps=0", "optim.z_loss=0.1", f"train.pass_losses={losses}"]
    two, one = (overrides(tmp_path / name, masked, *more) for name in ("two", "one"))
    (ranks,) = run_ranks(train_and_tell, [{"overrides": two, "run_dir": str(tmp_path / "two")}])
    assert run_ranks(train_on_a_rank, [{"overrides": [*one, "train.micro_batch=8"]}], world_size=1) == [["done"]]
    infos = masked.manifest.splits["train"]
    share = sum(info.tokens_that_count for info in infos) / sum(info.tokens for info in infos)
    assert f"loss mask: in source tiny, {share:.1%} of the training tokens count" in ranks[0]["log"]
    got, expected = records(tmp_path / "two"), records(tmp_path / "one")
    assert len(got) == len(expected) > STEPS
    for line, same in zip(got, expected, strict=True):
        for key in line.keys() & {"pass_losses", "trained_loss", "grad_norm", "losses", "z_loss"}:
            assert line[key] == pytest.approx(same[key], rel=1e-5), (key, line["step"])
        assert line.get("labels") == same.get("labels")
        assert line["event"] != "step" or (line["labels"] < SEQUENCES * 12 and line["tokens"] == line["step"] * 96)


def test_a_masked_run_is_resumed_bit_for_bit(masked: Any, tmp_path: Path) -> None:
    case = {"deepspeed": "zero1", "precision": "fp32", "recompute": "pass", "schedule": "uniform"}
    check_resume(masked, tmp_path, [{**case, "more": ["train.micro_batch=1"]}])


def test_steps_in_which_no_label_counts_give_no_loss_and_no_numbers_that_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    splits = {}
    for split, size in (("train", 600), ("heldout", 60)):
        writer = ShardWriter(folder, f"{split}-00000", 50, masked=True)
        counts = np.zeros(size, dtype=bool)
        counts[:3] = split == "train"  # in the first sequence of 49
        writer.add(np.arange(size) % 50, np.array([size]), counts)
        splits[split] = [writer.close()]
    seal(folder, Manifest("uint16", 50, 0, None, "a" * 64, splits))
    run_dir = tmp_path / "run"
    settings = [f"run_dir={run_dir}", f"data.sources.tiny.path={folder}", "health.spike_sigma=3"]
    settings = [*overrides(run_dir, ShardSet(folder, None, {}))[2:], *settings]  # type: ignore[arg-type]
    (ranks,) = run_ranks(train_and_tell, [{"overrides": settings, "run_dir": str(run_dir)}])
    assert any("no label counts in the held-out sequences of source tiny" in line for line in ranks[0]["log"])
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert not [line for line in steps if line["event"] in ("skip", "alarm", "evaluation")]
    steps = [line for line in steps if line["event"] == "step"]
    assert len(steps) == STEPS and [line["labels"] for line in steps].count(0) >= STEPS - 1
    for line in steps:
        if not line["labels"]:
            assert line["loss"] == line["grad_norm"] == 0 and set(line["pass_losses"]) == {0}
    assert all(weight.isfinite().all() for weight in weights(run_dir).values())
