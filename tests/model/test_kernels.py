"""The Triton backend: its numbers by the interpreter, what it compiles to for each GPU, and where it does not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.model import tiles
from ponder_scale.model.pondering_embedding import cross_entropy, pondering_embedding

ROOT = Path(__file__).parents[2]
# shared memory that one block may ask for, as NVIDIA's CUDA programming guide has it (99, 163 and 227 KiB)
SHARED_MEMORY_BYTES = {"8.0": 166_912, "8.6": 101_376, "8.9": 101_376, "9.0": 232_448, "10.0": 232_448, "12.0": 101_376}
DTYPES = ("fp32", "fp16", "bf16")
COMPILED = {"bf16": [*SHARED_MEMORY_BYTES], "fp16": [*SHARED_MEMORY_BYTES], "fp32": ["9.0"]}
PRODUCTS = ("exp_product", "scaled_product", "gradient_products", "head_gradient")
PERSISTENT = "persistent_exp_product"
FALLING = ("none:capability", *(f"{kernel}:launch" for kernel in (*PRODUCTS, PERSISTENT)), "scaled_product:memory")


@cache
def run(module: str, *arguments: str, **environment: str) -> Any:
    """What `python -m tests.model.<module>` prints as JSON; one process for all cases, as most of one is imports."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", f"tests.model.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# fp16 keeps 11 bits: 5e-4 of a rounded value, and each gradient has rounded factors; bf16 keeps 8
@pytest.mark.parametrize(
    ("dtype", "values", "statistics"), [("fp32", 1e-6, 1e-6), ("fp16", 1e-3, 1e-5), ("bf16", 1e-2, 1e-5)]
)
def test_interpreted_kernels_are_the_equation(dtype: str, values: float, statistics: float) -> None:
    for case, errors in run("interpret_kernels", *DTYPES, TRITON_INTERPRET="1")[dtype].items():
        assert errors.pop("changed by statistics", 0.0) == 0.0, case
        for name, error in errors.items():
            bound = statistics if name in ("loss", "entropy") else values
            assert error < bound, (case, name, error)


def check_compiled(dtype: str, capability: str) -> None:
    kernels = run("compile_kernels", dtype, *COMPILED[dtype])[capability]
    assert isinstance(kernels, dict), kernels  # or what the compiler said
    for name, made in kernels.items():
        assert made["spills"] == 0, (name, made)
        assert made["shared"] <= SHARED_MEMORY_BYTES[capability], (name, made)
        assert (made["tensor cores"] > 0) == (dtype != "fp32" and not name.startswith("pick")), (name, made)


@pytest.mark.parametrize("capability", SHARED_MEMORY_BYTES)
def test_kernels_compile_for_each_gpu_to_tensor_cores_within_its_memory_and_without_spilling(capability: str) -> None:
    check_compiled("bf16", capability)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "capability"), [(d, each) for d in ("fp16", "fp32") for each in COMPILED[d]])
def test_kernels_compile_in_the_other_dtypes_too(dtype: str, capability: str) -> None:
    check_compiled(dtype, capability)


def test_every_row_of_the_table_is_compiled_by_these_tests() -> None:
    rows = {(f"{major}.{minor}", size) for (major, minor), size in tiles.TABLE}
    assert rows == {*((capability, 2) for capability in SHARED_MEMORY_BYTES), ("9.0", 4)}


def test_a_gpu_without_tiles_takes_chunked_and_says_so_once() -> None:
    found = run("fall_back", *FALLING, TRITON_INTERPRET="1")["none:capability"]
    assert found["error"] < 1e-5
    assert len(found["lines"]) == 1
    assert "compute capability 7.5 (known: 8.0, 8.6" in found["lines"][0] and "'chunked'" in found["lines"][0]


def test_a_hidden_size_that_is_no_whole_step_takes_chunked_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    assert [tiles.is_whole(width) for width in (768, 2048, 100, 100)] == [True, True, False, False]
    assert [record.args for record in caplog.records] == [(100, 64)]
    for row in tiles.TABLE.values():
        assert all(64 % shape.k == 0 for shape in row if isinstance(shape, tiles.Tiles))


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_a_launch_that_fails_falls_back_once_and_says_so(kernel: str) -> None:
    """Forward or backward, the step at hand is finished with right numbers, and no launch is tried again."""
    found = run("fall_back", *FALLING, TRITON_INTERPRET="1")[f"{kernel}:launch"]
    assert found["error"] < 1e-5
    assert found["asked"] == 1
    assert len(found["lines"]) == 1
    assert kernel in found["lines"][0] and "OutOfResources" in found["lines"][0] and "'chunked'" in found["lines"][0]


def test_a_persistent_kernel_that_fails_is_replaced_by_the_other_one_and_the_rest_go_on() -> None:
    found = run("fall_back", *FALLING, TRITON_INTERPRET="1")[f"{PERSISTENT}:launch"]
    assert found["error"] < 1e-5
    assert found["asked"] == 1 and found["others"] > 1
    assert len(found["lines"]) == 1
    assert PERSISTENT in found["lines"][0] and "OutOfResources" in found["lines"][0]
    assert "a kernel that is not persistent" in found["lines"][0] and "chunked" not in found["lines"][0]


def test_memory_that_is_short_is_not_taken_for_a_kernel_that_fails() -> None:
    found = run("fall_back", *FALLING, TRITON_INTERPRET="1")["scaled_product:memory"]
    assert found == {"raised": "no memory", "lines": [], "asked": 1, "others": 0}


@pytest.mark.parametrize("processors", [72, 84, 108, 132, 148, 170])  # A10, A40, A100, H100, B200, RTX 5090
@pytest.mark.parametrize("width", [512, 768, 2048, 4096])
@pytest.mark.parametrize("tokens", [1, 8, 64, 2048])
def test_the_mixture_of_few_tokens_uses_the_whole_device(tokens: int, width: int, processors: int) -> None:
    """Of one token 8 programs would run at D 2,048, and of 2,048 tokens 48 at D 768, on an H100's 132 processors."""
    for row in tiles.TABLE.values():
        few = tokens <= tiles.FEW_TOKENS
        shape = row.few_mix if few else row.mix
        steps = -(-50_257 // shape.k)
        programs = -(-tokens // shape.m) * -(-width // shape.n)
        parts = tiles.splits(programs, steps, processors)
        assert parts == -(-steps // -(-steps // parts))  # none of which is empty
        waves = -(-programs * parts // processors)
        assert programs * parts / (waves * processors) >= tiles.BUSY_ENOUGH
        assert steps // parts >= tiles.LEAST_STEPS
        exp = row.few_exp if few else row.exp
        assert -(-tokens // exp.m) * -(-50_257 // exp.n) >= processors


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
