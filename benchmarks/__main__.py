"""`python -m benchmarks WHAT` measures ratios to named baselines in one run. It works in a clone of the repository."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError, UserError
from ponder_scale.planning.cost import RECOMPUTED_FORWARDS
from ponder_scale.settings.commandline import Parser, flags, new_folder, number, outlive_readers, parse, path, whole

POLICIES = tuple(RECOMPUTED_FORWARDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark. Returns the exit code: 0, 1 if a part of it failed, 2 for an error that you can fix."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    outlive_readers()
    try:
        options = parse(_parser(), arguments, RunConfig, "overrides")
        return options.run(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks", description="Ratios against named baselines, measured in one run.")
    bench = parser.add_subparsers(required=True, metavar="WHAT")
    op = bench.add_parser("op", help="the pondering embedding by backend, against the published way")
    op.add_argument("--tokens", type=whole(1), default=2048)
    op.add_argument("--vocab", dest="vocabulary", metavar="VOCAB", type=whole(1), default=32000)
    op.add_argument("--runs", type=whole(1), default=5)
    op.set_defaults(run=_bench_op)
    step = bench.add_parser("step", help="time and memory of a training step by recomputation policy")
    step.add_argument("--runs", type=whole(1), default=3)
    step.add_argument(
        "--largest", action="store_true", help="on a GPU: measure each way with the largest batch that fits"
    )
    step.set_defaults(run=_bench_step)
    memory = bench.add_parser("memory", help="peak memory of a step by policy, as the pondering steps grow")
    memory.add_argument("--steps", type=whole(0), nargs="+", default=[0, 1, 3, 7], help="numbers of pondering steps")
    memory.set_defaults(run=_bench_memory)
    comm = bench.add_parser("comm", help="all-gathers of a micro-step under ZeRO-3, by regime and recomputation policy")
    comm.add_argument(
        "--regimes", nargs="+", help="files of deepspeed_configs/ (default: the two that run on any device)"
    )
    comm.add_argument("--pondering-steps", type=whole(0), default=3)
    comm.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the small model that runs")
    comm.set_defaults(run=_bench_comm)
    decode = bench.add_parser(
        "decode", help="time to decode a token from the key-value caches, against running the prefix again"
    )
    decode.add_argument(
        "--context",
        dest="contexts",
        metavar="CONTEXT",
        type=whole(1),
        nargs="+",
        default=[128, 512],
        help="tokens before the token that is decoded",
    )
    decode.add_argument("--runs", type=whole(1), default=5)
    decode.add_argument(
        "--compile",
        dest="compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure a compiled step; compiling takes a minute",
    )
    decode.set_defaults(run=_bench_decode)
    _share_flags(op, step, memory, comm, decode)
    _add_others(bench)
    _add_runs(bench)
    return parser


def _add_others(bench: Any) -> None:
    """Add the benchmarks whose flags do not include the shape of a model."""
    scale = bench.add_parser("scale", help="count what a start, a step and a save cost as ranks and shard files grow")
    scale.add_argument(
        "--ranks",
        dest="worlds",
        metavar="RANKS",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16, 32],
        help="numbers of ranks to fork on this machine",
    )
    scale.add_argument(
        "--shards",
        dest="files",
        metavar="SHARDS",
        type=int,
        nargs="+",
        default=[1, 10, 100],
        help="numbers of training shards to read with the fewest ranks",
    )
    scale.add_argument("--stage", type=int, choices=range(4), default=3, help="stage of ZeRO")
    scale.set_defaults(run=_bench_scale)
    serve = bench.add_parser("serve", help="generation by transformers against vLLM, if vLLM is installed")
    serve.add_argument("folder", nargs="?", type=path, help="an exported folder (default: a model of width 256)")
    serve.add_argument(
        "--batch",
        dest="batches",
        metavar="BATCH",
        type=whole(1),
        nargs="+",
        default=[16, 64],
        help="requests at a time",
    )
    serve.add_argument("--prompt-tokens", dest="prompt", metavar="PROMPT_TOKENS", type=whole(1), default=64)
    serve.add_argument("--new-tokens", dest="new", metavar="NEW_TOKENS", type=whole(1), default=64)
    serve.add_argument("--runs", type=whole(1), default=3)
    serve.add_argument("--threads", type=whole(1), default=1, help="threads of torch on a CPU")
    serve.add_argument(
        "--eager", action="store_true", help="run vLLM without compilation, which takes minutes on a CPU"
    )
    serve.set_defaults(run=_bench_serve)
    data = bench.add_parser("data", help="tokenization and loading, against what others do")
    data.add_argument("corpus", type=path, help="a .jsonl file; some 50 MB or more give steady numbers")
    data.add_argument("--tokenizer", type=path, required=True, help="a folder with tokenizer.json")
    data.add_argument("--rounds", type=whole(1), default=3)
    data.set_defaults(run=_bench_data)


def _add_runs(bench: Any) -> None:
    """Add the benchmarks that measure other processes only."""
    start = bench.add_parser("start", help="processor time to the first step and for each step, against transformers")
    start.add_argument("--runs", type=whole(1), default=3)
    start.add_argument("--steps", type=whole(3), default=6)
    start.add_argument("--stage", type=int, choices=range(4), default=3, help="stage of ZeRO")
    start.add_argument("--plain", action="store_true", help="also measure our run without the rehearsal before step 1")
    start.add_argument("--hidden", type=whole(8), default=256, help="width D")
    start.add_argument("--layers", type=whole(1), default=8)
    start.add_argument("--vocab", type=whole(2), default=32000)
    start.add_argument("--seq-len", type=whole(2), default=512)
    start.set_defaults(run=_bench_start)
    planner = bench.add_parser("planner", help="the planner's time of a step against the measured one, on two ranks")
    planner.add_argument("--rounds", type=whole(1), default=3, help="rounds, each with a calibration of its own")
    planner.add_argument("--steps", type=whole(1), default=4, help="steps that are timed in each run")
    planner.add_argument(
        "--within", type=number(above=0), default=0.15, help="exit with 1 if a ratio is further from 1 (default: 0.15)"
    )
    planner.add_argument("--cases", type=whole(1), nargs="+", help="numbers of some runs (default: all)")
    planner.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    planner.set_defaults(run=_bench_planner)
    gpu = bench.add_parser("gpu", help="measure a GPU in ten minutes: tests, ceilings and every benchmark")
    gpu.add_argument("--out", type=new_folder, default=Path("runs/gpu"), help="folder for gpu.json, gpu.md and gpu.log")
    gpu.add_argument("--toy", action="store_true", help="rehearse with tiny shapes, with or without a GPU")
    gpu.add_argument(
        "--minutes", type=number(above=0), default=10.0, help="minutes for everything except the training (default: 10)"
    )
    gpu.add_argument(
        "--train",
        dest="train_minutes",
        type=number(above=0),
        nargs="?",
        const=20.0,
        metavar="MINUTES",
        help="also train pondering and vanilla models for this many minutes (default: 20)",
    )
    gpu.set_defaults(run=_bench_gpu)


def _share_flags(op: Any, step: Any, memory: Any, comm: Any, decode: Any) -> None:
    """Add the flags that several benchmarks share."""
    for kind in (op, step, memory, decode):
        kind.add_argument("--hidden", type=whole(1), default=256, help="width D")
        kind.add_argument("--dtype", default="float32")
        kind.add_argument("--threads", type=whole(1), default=1, help="threads of torch on a CPU")
    for kind in (step, memory, decode):
        kind.add_argument(
            "--recipe", help="take model and sequence length from this recipe instead of the shape given here"
        )
        kind.add_argument("--vocab", type=whole(1), default=32000)
        kind.add_argument("--layers", type=whole(1), default=8)
        kind.add_argument("--pondering-steps", type=whole(0), default=3)
    for kind in (step, memory, comm):
        kind.add_argument("--policies", nargs="+", choices=POLICIES, help="policies of train.recompute (default: all)")
    for kind in (step, memory):
        kind.add_argument("--batch", type=whole(1), default=4, help="sequences in a micro-batch")
        kind.add_argument("--seq-len", type=whole(1), default=512)


def _bench_start(options: argparse.Namespace) -> None:
    from benchmarks.start import Shape, run

    shape = Shape(options.hidden, options.layers, options.vocab, options.seq_len)
    run(shape, runs=options.runs, steps=options.steps, stage=options.stage, plain=options.plain)


def _bench_planner(options: argparse.Namespace) -> int:
    from benchmarks.planner import run

    return run(**flags(options))


def _bench_gpu(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"this Python ({sys.executable}) has no torch; name one that has it: make gpu PYTHON=...")
    from benchmarks.gpu import run

    return run(**flags(options))


def _bench_op(options: argparse.Namespace) -> None:
    from benchmarks.op import run

    run(**flags(options))


def _bench_step(options: argparse.Namespace) -> None:
    from benchmarks.step import run

    run(**_with_workload(options))


def _bench_memory(options: argparse.Namespace) -> None:
    from benchmarks.step import memory

    memory(**_with_workload(options))


def _bench_comm(options: argparse.Namespace) -> None:
    from benchmarks.communication import run

    run(**flags(options))


def _bench_decode(options: argparse.Namespace) -> None:
    from benchmarks.decode import run

    run(**_with_workload(options))


def _bench_scale(options: argparse.Namespace) -> None:
    from benchmarks.scale import measure

    print(measure(**flags(options)))


def _bench_serve(options: argparse.Namespace) -> None:
    from benchmarks.serve import run

    run(**flags(options))


def _bench_data(options: argparse.Namespace) -> None:
    from benchmarks.data import bench

    print(bench(**flags(options)))


def _with_workload(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a benchmark, with those that describe the model and its micro-batch combined into one workload."""
    from benchmarks.workload import workload

    given = flags(options)
    shape = {name: given.pop(name) for name in signature(workload).parameters if name in given}
    return {"work": workload(**shape), **given}


if __name__ == "__main__":
    sys.exit(main())
