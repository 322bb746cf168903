"""The Triton backend: its numbers by the interpreter, what it compiles to for Hopper, and machines without triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.model.pondering_embedding import cross_entropy, pondering_embedding

ROOT = Path(__file__).parents[2]
SHARED_MEMORY_BYTES = 232_448  # of one Hopper block


def run(module: str, *arguments: str, **environment: str) -> Any:
    """What `python -m tests.model.<module>` prints as JSON."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", f"tests.model.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# fp16 keeps 11 bits: 5e-4 of a rounded value, and each gradient has rounded factors
@pytest.mark.parametrize(("dtype", "values", "statistics"), [("fp32", 1e-6, 1e-6), ("fp16", 1e-3, 1e-5)])
def test_interpreted_kernels_are_the_equation(dtype: str, values: float, statistics: float) -> None:
    for case, errors in run("interpret_kernels", dtype, TRITON_INTERPRET="1").items():
        assert errors.pop("changed by statistics", 0.0) == 0.0, case
        for name, error in errors.items():
            bound = statistics if name in ("loss", "entropy") else values
            assert error < bound, (case, name, error)


def test_kernels_compile_for_hopper_to_tensor_cores_without_spilling() -> None:
    for name, made in run("compile_kernels", "bf16")["bf16"].items():
        assert made["spills"] == 0, (name, made)
        assert made["shared"] <= SHARED_MEMORY_BYTES, (name, made)
        assert (made["wgmma"] > 0) == ("product" in name), (name, made)


def test_the_model_is_read_where_triton_is_not_installed() -> None:
    """Imports of triton fail, as on a machine without it: everything loads, and asking for it says what to do."""
    script = """
import sys
sys.modules["triton"] = None
from pathlib import Path
import torch
from transformers.dynamic_module_utils import check_imports
from ponder_scale.model import pondering_embedding as module
for path in Path(module.__file__).parent.glob("*.py"):
    check_imports(path)
tensors = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 4)]
module.pondering_embedding(*tensors)
try:
    module.pondering_embedding(*tensors, backend="triton")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs the package triton; use backend 'auto' or 'chunked'" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_on_a_gpu_are_the_equation(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1030, 256), (5003, 256), (5003, 256)]
    tensors = [torch.randn(shape, generator=generator).mul(0.2).to("cuda", dtype) for shape in shapes]
    labels = torch.randint(0, 5003, (1030,), generator=generator).cuda()
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    theirs = [tensor.double().requires_grad_() for tensor in tensors]
    upstream = torch.randn(1030, 256, generator=generator).to("cuda", dtype)
    again = []
    for _ in range(2):
        for tensor in ours:
            tensor.grad = None
        mixed, seen = pondering_embedding(*ours, labels=labels, scale=3.0, backend="triton")
        mixed.backward(upstream)
        again.append([mixed.detach(), *(tensor.grad for tensor in ours)])
    expected, wanted = pondering_embedding(*theirs, labels=labels, scale=3.0, backend="eager")
    expected.backward(upstream.double())
    assert all(torch.equal(*pair) for pair in zip(*again, strict=True))
    for got, reference in zip(again[0], [expected, *(tensor.grad for tensor in theirs)], strict=True):
        assert (got.double() - reference).norm() / reference.norm() < 1e-2
    assert (seen.loss - wanted.loss).abs().max() < 1e-4 and (seen.entropy - wanted.entropy).abs().max() < 1e-3
    total, _ = cross_entropy(ours[0], ours[1], labels, backend="triton")
    assert (total - wanted.loss.sum()).abs() / total < 1e-5
