"""Compile the kernels for GPUs that need not be there, and print what the compiler made of them.

    python -m tests.model.compile_kernels bf16 8.6 9.0      one JSON object: capability -> kernel -> numbers
    python -m tests.model.compile_kernels bf16 all --table  a Markdown table of every capability

test_kernels.py runs the first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ponder_scale.model import kernels, products, sparse, tiles

INTEGERS = {"tokens", "vocabulary", "width", "inner", "out_stride", "left_stride", "stride", "ignored", "steps"}
INTEGERS |= {"top_k"}
FLOATS = {"factor", "unit_factor", "grad_factor"}
WIDE = {  # arguments that are fp32 (or 64-bit integers) whatever the operands are
    **dict.fromkeys(("exponents", "sums", "kept", "weighted", "unit_exponents", "unit_sums"), "*fp32"),
    **dict.fromkeys(("powers", "scales", "shares", "deltas", "leaks", "weights", "slopes"), "*fp32"),
    **dict.fromkeys(("label_slopes", "unit_logs"), "*fp32"),
    **dict.fromkeys(("labels", "index", "order", "bounds"), "*i64"),
}
# Widths of a model and strides of our buffers are multiples of 64, addresses of 16. Counts of tokens, and sizes of
# vocabularies such as 50257, are multiples of nothing.
ALIGNED = {"width", "out_stride", "left_stride", "stride"}
TENSOR_CORES = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel: Any, capability: tuple[int, int], shape: tiles.Tiles, dtype: str, **constants: Any) -> Any:
    """Shared memory in bytes, registers a thread, bytes spilled a thread and tensor-core instructions of one kernel.

    Args:
        dtype: of the operands, "bf16", "fp16" or "fp32".
        constants: values of arguments fixed at compile time, `out` being the dtype of that argument if it differs.
    """
    types = {
        name: "i32" if name in INTEGERS else "fp32" if name in FLOATS else WIDE.get(name, f"*{dtype}")
        for name in kernel.arg_names
    }
    if "out" in constants:
        types["out"] = f"*{constants.pop('out')}"
    if kernel is products.persistent_exp_product:
        types |= {
            name: f"tensordesc<{dtype}[{extent}, {shape.k}]>"
            for name, extent in (("hidden", shape.m), ("head", shape.n))
        }
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in ALIGNED
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, aligned)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    built = triton.compile(source, target=target, options=kernels.launch_options(shape))
    usage = _usage(built.asm["cubin"])
    return {
        "shared": built.metadata.shared,
        "registers": usage["REG"],
        "spills": usage["STACK"],  # nothing else is kept there
        "tensor cores": len(TENSOR_CORES.findall(built.asm["ptx"])),
    }


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(TOOLS / "cuobjdump"), "-res-usage", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", done.stdout)}


def launched(dtype: str, capability: tuple[int, int]) -> dict[str, tuple[Any, tiles.Tiles, dict[str, Any], float]]:
    """By name every product as it is launched: the kernel, its tiles, its constants and its FLOPs a byte loaded.

    Of variants that differ by a mask or a statistic the one that needs more registers.
    """
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    row = tiles.TABLE[capability, size]
    found = {}

    def add(name: str, kernel: Any, shape: tiles.Tiles, loads: float, **constants: Any) -> None:
        """`loads`: elements loaded in a step, in units of its depth, for each 2 m n FLOPs."""
        fixed = {"M": shape.m, "N": shape.n, "K": shape.k, "GROUP": kernels.SAME_ROWS}
        fixed |= {"PRECISION": "ieee" if size == 4 else "tf32", **constants}
        found[name] = kernel, shape, fixed, 2 * shape.m * shape.n / (loads * size)

    def plain(shape: tiles.Tiles) -> int:
        return shape.m + shape.n

    for name, shape, unit in (
        ("exp", row.exp, False),
        ("tempered", row.tempered, True),
        ("few_exp", row.few_exp, True),
    ):
        if name == "exp" and row.exp == row.tempered:
            continue
        statistics = {"STATISTICS": True, "UNIT": unit}
        add(name, products.exp_product, shape, plain(shape), EVEN=True, **statistics)
        if row.persistent and name != "few_exp":
            statistics["SPECIALIZED"] = row.specialized
            add(f"{name}, persistent", products.persistent_exp_product, shape, plain(shape), **statistics)
    for name, shape, even in (("mix", row.mix, True), ("mix, odd", row.mix, False), ("few_mix", row.few_mix, False)):
        of = row.few_exp if name == "few_mix" else row.exp
        scaled = {"TILE": of.n, "SCALED": True, "out": "fp32"}
        add(name, products.scaled_product, shape, plain(shape), EVEN=even, **scaled)
    add("add", products.scaled_product, row.add, plain(row.add), EVEN=False, TILE=row.add.k, SCALED=False, out="fp32")
    add("head", products.head_gradient, row.head, plain(row.head), TILE=row.exp.n, out="fp32")
    for name, shape, tied in (
        ("gradient", row.gradient, False),
        ("tied", row.tied, True),
        ("learned", row.learned, False),
        ("learned, tied", row.learned, True),
    ):
        loads = (2 * shape.m + shape.n) / 2 if tied else plain(shape)
        learn = name.startswith("learned")
        add(name, products.gradient_products, shape, loads, EVEN=True, TIED=tied, LEARN=learn, UNIT=learn)
    if size == 2:
        for name, kernel in (("picked_dots", sparse.picked_dots), ("picking_sums", sparse.picking_sums)):
            shape = sparse.DOT_TILES if kernel is sparse.picked_dots else sparse.SUM_TILES
            found[name] = kernel, shape, {"N": shape.n, "K": shape.k}, 2 / size
    return found


def report(dtype: str, capability: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Of every kernel as it is launched on operands of that dtype."""
    found = {}
    for name, (kernel, shape, fixed, intensity) in launched(dtype, capability).items():
        made = compiled(kernel, capability, shape, dtype, **fixed)
        found[name] = {"tiles": list(shape), **made, "flops a byte": round(intensity)}
    return found


def tried(dtype: str, capability: tuple[int, int]) -> dict[str, dict[str, Any]] | str:
    """The report of a capability, or what the compiler said, so that the others are reported all the same."""
    try:
        return report(dtype, capability)
    except Exception:
        return traceback.format_exc()


def named(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def main() -> None:
    dtype, *asked = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    capabilities = list(tiles.SHARED_MEMORY) if asked == ["all"] else [named(text) for text in asked]
    if "--table" not in sys.argv:
        print(json.dumps({".".join(map(str, found)): tried(dtype, found) for found in capabilities}))
        return
    print("| capability | kernel | tiles | shared memory | registers | spilled bytes | FLOP a byte |\n|" + "---|" * 7)
    for capability in capabilities:
        for name, made in report(dtype, capability).items():
            shape = " x ".join(map(str, made["tiles"][:3])) + f", {made['tiles'][3]} warps, {made['tiles'][4]} stages"
            numbers = f"{made['shared']:,} | {made['registers']} | {made['spills']} | {made['flops a byte']}"
            print(f"| {'.'.join(map(str, capability))} | {name} | {shape} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
