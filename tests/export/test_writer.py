"""The streaming writer against the safetensors library, and the memory an export takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ponder_scale.errors import CheckpointError
from ponder_scale.export import writer
from ponder_scale.export.writer import write_safetensors

SHAPES = {"a": torch.Size((7, 5)), "scalar": torch.Size(()), "b": torch.Size((11,)), "c": torch.Size((3, 2, 4))}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_is_written_in_any_order(dtype: torch.dtype, tmp_path: Path) -> None:
    given = tensors()
    write_safetensors(tmp_path, SHAPES, reversed(given.items()), dtype)
    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == given.keys()
    assert all(torch.equal(got[name], given[name].to(dtype)) for name in given)
    with safe_open(tmp_path / "model.safetensors", "pt") as content:
        assert content.metadata() == {"format": "pt"}


def test_shards_are_indexed_and_hold_no_more_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 150)
    given = tensors()
    write_safetensors(tmp_path, SHAPES, given.items(), torch.float32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    got: dict[str, Tensor] = {}
    for file in files:
        content = load_file(tmp_path / file)
        assert {index["weight_map"][name] for name in content} == {file}
        got |= content
    assert all(torch.equal(got[name], given[name]) for name in given)
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in given.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "d": torch.zeros(1)}, r"d has shape \(1,\), but the model to write has no such weight"),
        (lambda t: {**t, "a": torch.zeros(7, 6)}, r"a has shape \(7, 6\), but the model to write has shape \(7, 5\)"),
        (lambda t: {key: t[key] for key in ("a", "b")}, "no weight for c, scalar"),
    ],
)
def test_a_tensor_too_many_too_few_or_of_another_shape_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path, SHAPES, change(tensors()).items(), torch.float32)


# Exports a ZeRO-2 checkpoint of 2 ranks in a process of its own, and prints the growth of its anonymous memory.
MEASURE = """
import sys, threading, time
from pathlib import Path
from ponder_scale.export.huggingface import export
import torch
torch.set_num_threads(1)

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
export(Path(sys.argv[1]), Path(sys.argv[2] + "-first"), dtype="bfloat16")  # imports what it needs
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
export(Path(sys.argv[1]), Path(sys.argv[2]), dtype="bfloat16")
done = True
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="RssAnon is Linux's")
def test_an_export_holds_about_one_tensor(tiny_tokenizer: Path, tmp_path: Path) -> None:
    from tests.export.checkpoints import save_checkpoint
    from tests.ranks import run_ranks
    from tests.train.zero.gradients import small_buckets

    (tmp_path / "settings").mkdir()
    run_dir = tmp_path / "run"
    overrides = ["model.hidden_size=256", "model.intermediate_size=8192", "model.num_hidden_layers=9"]
    case = {"policy": "none", "tied": False, "overrides": overrides, "steps": 0, "tokenizer": str(tiny_tokenizer)}
    sharding = small_buckets(tmp_path / "settings", 3)
    [ranks] = run_ranks(save_checkpoint, [{**case, "deepspeed": sharding, "run_dir": str(run_dir)}])
    assert all("error" not in rank for rank in ranks), ranks
    # of a run, whose checkpoint is also read and hashed before
    command = [sys.executable, "-c", MEASURE, str(run_dir), str(tmp_path / "out")]
    # with a fixed threshold the C library gives freed tensors back, instead of keeping some by chance
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    growth, largest = int(done.stdout.splitlines()[-1]), 4 * 256 * 8192
    total = 2 * (tmp_path / "out/model.safetensors").stat().st_size  # in fp32
    print(f"grew by {growth:,} bytes; largest tensor {largest:,}, all {total:,}")
    assert total > 25 * largest and growth < 5 * largest
