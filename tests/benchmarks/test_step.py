"""`bench step`, `memory` and `decode` on shapes of no consequence: the same numbers are computed, by the named ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import decode, published, step
from benchmarks.workload import POLICIES, PUBLISHED, Training, Workload, workload
from ponder_scale.errors import ConfigError


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benches set the threads of torch, for all of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small(vocab: int = 300, hidden: int = 64, batch: int = 2, seq_len: int = 32) -> Workload:
    shape = {"hidden": hidden, "layers": 2, "vocab": vocab, "pondering_steps": 2}
    return workload(recipe=None, batch=batch, seq_len=seq_len, dtype="float32", device="cpu", **shape)


@pytest.mark.parametrize("residual", ["accumulate", "restart"])
def test_every_variant_trains_to_the_same_loss(residual: str) -> None:
    work = small()
    work = replace(work, model=replace(work.model, residual=residual, initial_scale=2.0, pondering_temperature=0.7))
    losses = {}
    for name in (PUBLISHED, *POLICIES):
        training = Training(work)
        losses[name] = [training.step(name, 2) for _ in range(3)]
    for name, found in losses.items():
        assert found == pytest.approx(losses[PUBLISHED], rel=1e-5), name
    assert len(set(losses[PUBLISHED])) == 3  # it trains
    assert Training(work).step(PUBLISHED, 1) != pytest.approx(losses[PUBLISHED][0], rel=1e-5)  # and ponders


def test_masters_train_narrow_weights() -> None:
    work = replace(small(), dtype="bfloat16")
    for name in (PUBLISHED, "pass"):
        training = Training(work)
        losses = [training.step(name, 2) for _ in range(3)]
        assert losses[2] < losses[0]
        assert {weight.dtype for weight in training.model.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_step_is_timed_and_its_memory_measured(capsys: pytest.CaptureFixture[str]) -> None:
    work = small(vocab=8000, seq_len=256)  # softmaxes of 16 MB a pass
    rows = step.run(work, runs=1, policies=["pass"])
    table = capsys.readouterr().out.splitlines()
    assert "S = 2: llama D 64, L 2, V 8000, 2 x 256 tokens, float32" in table[0]
    assert [line.split()[0] for line in table[2:]] == [row["variant"] for row in rows] == [PUBLISHED, "pass"]
    assert table[2].split()[3] == table[2].split()[-1] == "1.00"
    assert rows[1]["peak_mib"] < 0.7 * rows[0]["peak_mib"]
    assert all(row["seconds"] > 0 for row in rows)


def test_the_largest_batch_is_found_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(small())
    original = training.step

    def limited(variant: str, steps: int, batch: int | None = None) -> float:
        if batch is not None and batch > 5:
            raise torch.OutOfMemoryError("no more")
        return original(variant, steps, batch)

    monkeypatch.setattr(training, "step", limited)
    assert step._largest(training, "pass", 1) == 4
    with pytest.raises(ConfigError, match="--largest needs a GPU"):
        step.run(small(), largest=True)


def test_memory_is_laid_out_by_pondering_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "peak", lambda work, name, steps, threads: (len(name) + 1) * (steps + 1.0))
    assert step.memory(small(), steps=[0, 3], policies=["pass"]) == {PUBLISHED: [10, 40], "pass": [5, 20]}
    table = capsys.readouterr().out.splitlines()
    assert table[2].split() == ["S", "=", "0", "S", "=", "3"]
    assert table[4].split() == ["pass", "5", "(0.50)", "20", "(0.50)"]


def test_cached_decoding_is_measured_where_it_equals_the_whole_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled step is measured by the command of docs/performance.md, which fails where its logits differ."""
    monkeypatch.setattr(decode, "STREAM_BYTES", 2**20)
    (row,) = decode.run(small(), contexts=[9], runs=1)
    assert row["context"] == 9 and row["cached difference"] < 1e-5
    assert all(row[name] > 0 for name in (PUBLISHED, "cached", "vanilla")) and "compiled" not in row
    original = published.next_logits
    monkeypatch.setattr(published, "next_logits", lambda model, tokens, steps: original(model, tokens, steps - 1))
    with pytest.raises(RuntimeError, match="cached and uncached logits differ"):
        decode.run(small(), contexts=[9], runs=1)


def test_a_token_reads_layers_in_each_pass_tables_in_each_step_and_the_caches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "STREAM_BYTES", 2**20)
    work = small()
    (row,) = decode.run(work, contexts=[9], runs=1)
    layer = 4 * 64 * 64 + 3 * 64 * work.model.intermediate_size + 2 * 64
    cached = 2 * 9 * 64  # keys and values of a layer
    numbers = 3 * 2 * (layer + cached) + 2 * 2 * 300 * 64 + 300 * 64
    assert row["bytes"] == 4 * numbers
    assert row["cached share"] == pytest.approx(4 * numbers / row["cached"] / row["bandwidth"])
    alone = 2 * (layer + cached) + 300 * 64
    assert row["vanilla share"] == pytest.approx(4 * alone / row["vanilla"] / row["bandwidth"])
    table = capsys.readouterr().out
    assert "of bandwidth" in table and "MB a token at least; memory bandwidth" in table


def test_a_bad_flag_is_named() -> None:
    with pytest.raises(ConfigError, match="--seq-len is 0; expected at least 1"):
        small(seq_len=0)
