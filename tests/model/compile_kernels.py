"""Compile the kernels for a Hopper GPU, which need not be there, and print what the compiler made of them.

`python -m tests.model.compile_kernels bf16 fp32` prints one JSON object; test_kernels.py runs it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ponder_scale.model import kernels

HOPPER = GPUTarget("cuda", 90, 32)
INTEGERS = {"tokens", "vocabulary", "width", "inner", "out_stride", "left_stride", "stride", "ignored"}
FLOATS = {"factor", "unit_factor", "grad_factor"}
WIDE = {  # arguments that are fp32 (or 64-bit labels) whatever the operands are
    **dict.fromkeys(("exponents", "sums", "weighted", "unit_exponents", "unit_sums"), "*fp32"),
    **dict.fromkeys(("powers", "scales", "shares", "deltas"), "*fp32"),
    "labels": "*i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_for_hopper(kernel: Any, shape: kernels.Tiles, dtype: str, **constants: Any) -> dict[str, int]:
    """Shared memory in bytes, registers a thread, bytes spilled and tensor-core instructions of one kernel.

    Args:
        dtype: of the operands, "bf16", "fp16" or "fp32".
        constants: values of arguments fixed at compile time, `out` being the dtype of that argument if it differs.
    """
    out = constants.pop("out", dtype)
    types = {
        name: "i32" if name in INTEGERS else "fp32" if name in FLOATS else WIDE.get(name, f"*{dtype}")
        for name in kernel.arg_names
    }
    if "out" in types:
        types["out"] = f"*{out}"
    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types |= dict.fromkeys(fixed, "constexpr")
    # addresses and extents that are multiples of 16 are what the launcher finds at the sizes models have
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or types[name] == "i32"
    }
    values = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, types, values, aligned)
    built = triton.compile(source, target=HOPPER, options=kernels.launch_options(shape))
    report = _ptxas(built.asm["ptx"])
    return {
        "shared": built.metadata.shared,
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spills": sum(int(size) for size in re.findall(r"(\d+) bytes spill", report)),
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
    }


def _ptxas(ptx: str) -> str:
    # triton ships the newest assembler under this name, and uses it for Hopper where it is there
    newest = next(path for path in (TOOLS / "ptxas-blackwell", TOOLS / "ptxas") if path.exists())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx, encoding="utf-8")
        command = [str(newest), "-v", "--gpu-name=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


def tiled(shape: kernels.Tiles) -> dict[str, int]:
    return {"M": shape.m, "N": shape.n, "K": shape.k, "GROUP": kernels.SAME_ROWS}


def report(dtype: str) -> dict[str, dict[str, int]]:
    """Of every kernel as it is launched on operands of that dtype."""
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    fixed = {"EVEN": True, "PRECISION": "ieee" if size == 4 else "tf32"}
    exp, mix, gradient = kernels.EXP_TILES[size], kernels.MIX_TILES[size], kernels.GRADIENT_TILES[size]
    found = {}
    for statistics, unit in ((False, False), (True, False), (True, True)):
        found[f"exp_product statistics={statistics} unit={unit}"] = compile_for_hopper(
            kernels.exp_product, exp, dtype, STATISTICS=statistics, UNIT=unit, **tiled(exp), **fixed
        )
    for scaled, shape, out in ((True, mix, dtype), (False, kernels.ADD_TILES[size], "fp32")):
        found[f"scaled_product scaled={scaled}"] = compile_for_hopper(
            kernels.scaled_product, shape, dtype, TILE=exp.n, SCALED=scaled, out=out, **tiled(shape), **fixed
        )
    found["gradient_products"] = compile_for_hopper(
        kernels.gradient_products, gradient, dtype, **tiled(gradient), **fixed
    )
    rows = kernels.LOSS_TILES
    found["loss_gradient"] = compile_for_hopper(kernels.loss_gradient, rows, dtype, TILE=exp.n, M=rows.m)
    return found


if __name__ == "__main__":
    print(json.dumps({dtype: report(dtype) for dtype in sys.argv[1:]}))
