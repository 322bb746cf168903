"""The stages of `python -m benchmarks gpu`. Each yields rows, and calls parts of the other benchmarks."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import DynamicCache

from benchmarks import ceilings, decode, op, step
from benchmarks.measure import MIB, medians
from benchmarks.rows import Place, Row, tried
from benchmarks.workload import PUBLISHED, Training, Workload, workload
from ponder_scale.config import TrainConfig
from ponder_scale.errors import ConfigError
from ponder_scale.model.pondering_embedding import cross_entropy
from ponder_scale.planning.cost import step_flops
from ponder_scale.planning.hardware import peak_flops
from ponder_scale.setup.speed import apply_speed

REPOSITORY = Path(__file__).parents[1]
RECIPE, STEPS, BATCH = "llama-1.4b", 3, 4  # the model and batch for steps and tokens
SHAPES = (  # tokens, D, V
    *((2048, 768, 50304), (8192, 768, 50304), (8192, 2048, 50304), (16384, 2048, 50304)),
    *((8192, 2048, 128256), (8192, 2560, 50304)),
)
SMALL = ((64, 32, 500),)
EXACT = ((1, 2048, 50304), (48, 2048, 50304), (1030, 256, 5003), (2050, 768, 50257), (300, 128, 151936))
ERROR, NATS = 1e-2, 1e-4  # largest errors allowed: for values and gradients in bf16, and for statistics
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "liger-kernel", "flash-attn", "numpy")
CONTEXTS = {True: (8,), False: (512, 1536)}  # by whether shapes are toys
TOP = 8  # number of kernels in a profile that get a row


def machine(place: Place) -> Iterator[Row]:
    """The machine and the versions of packages."""
    if place.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        capability = f"{found.major}.{found.minor}"
        values = {"name": found.name, "capability": capability, "processors": found.multi_processor_count}
        figure = f"{found.name}, capability {capability}, {found.multi_processor_count} processors"
        memory = f"{found.total_memory / 2**30:.0f} GiB; CUDA {torch.version.cuda}"
        yield Row("device", figure, memory, {**values, "memory_bytes": found.total_memory})
    else:
        yield Row("device", f"CPU, {torch.get_num_threads()} thread(s)", platform.machine())
    versions = {name: _version(name) for name in PACKAGES}
    there = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    missing = ", ".join(name for name, found in versions.items() if not found)
    yield Row("versions", there, f"without {missing}" if missing else "", versions)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def tests(place: Place) -> Iterator[Row]:
    """Run the tests that need a GPU. Without one, all of them are skipped."""
    if _version("pytest") is None:
        raise ConfigError("the tests need pytest, which is not installed here")
    paths = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    files = [path for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]
    for path in files:
        name = path.relative_to(REPOSITORY).as_posix()
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
        failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
        print(done.stdout, done.stderr)
        wrong = None if done.returncode == 0 else "; ".join(failed)[:2000] or f"exit code {done.returncode}"
        yield Row(name, re.sub(r" in [\d.]+s.*", "", said[-1]), (wrong or "")[:200], error=wrong)


def numbers(place: Place) -> Iterator[Row]:
    """Compare the kernels in the training dtype with the equation in float64, and check that results are repeatable."""
    names = ("triton+", "chunked+") if place.device == "cuda" else ("chunked+", "sdpa+")
    for tokens, hidden, vocabulary in SMALL if place.toy else EXACT:
        problem = op.Problem(tokens, hidden, vocabulary, place.dtype, place.device)
        for name in (*names, "top_k"):
            what = f"{name.rstrip('+')}: {tokens} tokens, D {hidden}, V {vocabulary}, {place.dtype}"
            yield tried(what, partial(_number, problem, name, what))


def _number(problem: op.Problem, name: str, what: str) -> Row:
    found = op.errors(problem, name, problem.tokens)
    allowed = {"T": ERROR, "gradients": ERROR, "loss": NATS, "entropy": NATS, "changed": 0.0}
    wrong = [f"{key} {value:.1e}" for key, value in found.items() if not value <= allowed[key]]
    figure = f"T {found['T']:.1e}, gradients {found['gradients']:.1e}"
    if "loss" in found:
        figure += f", loss {found['loss']:.1e} nats, entropy {found['entropy']:.1e}"
    beside = f"beyond what is allowed: {', '.join(wrong)}" if wrong else "the same bits again"
    return Row(what, figure, beside, {**asdict(problem), **found}, error=beside if wrong else None)


def mixtures(place: Place) -> Iterator[Row]:
    """Measure the pondering embedding by shape: time against torch's products and the published way, and memory."""
    for shape in SMALL if place.toy else SHAPES:
        problem = op.Problem(*shape, place.dtype, place.device)
        tokens, hidden, vocabulary = shape
        product = ceilings.product_seconds(place, tokens, hidden, vocabulary)
        published: dict[str, float] = {}
        for name in op.variants(problem):
            what = f"{name}: {tokens} tokens, D {hidden}, V {vocabulary}"
            yield tried(what, partial(_mixture, problem, name, what, product, published))


def _mixture(problem: op.Problem, name: str, what: str, product: float, published: dict[str, float]) -> Row:
    took = op.times(problem, [name], 3)[name]
    values: dict[str, Any] = {**asdict(problem), **took, "product_s": product}
    if problem.device == "cuda":
        values["peak_mib"], values["kept_mib"] = op.memory_on_gpu(problem, name)
    if name == op.NAIVE:
        published |= values
    both, needed = took["both_s"], op.PRODUCTS.get(name, 7)
    beside = [f"{needed * product / both:.0%} of its {needed} products by torch"]
    if published and name != op.NAIVE:
        beside.append(f"{both / published['both_s']:.2f} of published")
        if "peak_mib" in values:
            beside[-1] += f", memory {values['peak_mib'] / published['peak_mib']:.2f}"
    forward = f"{1e3 * took['forward_s']:.3g} ms forward, {1e3 * both:.3g} ms with backward"
    return Row(what, forward, "; ".join(beside), values)


def launches(place: Place) -> Iterator[Row]:
    """Count and time each kernel of a pondering embedding, of a loss and of one decoded token."""
    shape = SMALL[0] if place.toy else (16384, 2048, 50304)
    problem = op.Problem(*shape, place.dtype, place.device)
    name = "triton" if place.device == "cuda" else "chunked"
    yield from _profiled(place, f"{name}, {shape[0]} tokens, forward and backward", _both(problem, name))
    yield from _profiled(place, f"{name}, the loss of {shape[0]} tokens", _loss(problem, name))
    work = _work(place, batch=1)
    yield from _profiled(place, f"a token after {work.seq_len // 2}, S = {STEPS}", _token(work))


def _both(problem: op.Problem, name: str) -> Callable[[], None]:
    *operands, upstream = problem.operands()
    return lambda: op.function(problem, name)(*operands)[0].backward(upstream)


def _loss(problem: op.Problem, name: str) -> Callable[[], None]:
    hidden, head, *_ = problem.operands()
    labels = problem.labels(problem.tokens)
    return lambda: cross_entropy(hidden, head, labels, backend=name)[0].backward()


def _token(work: Workload) -> Callable[[], None]:
    """A function that decodes one more token after half a sequence."""
    model, cache, text = work.build().eval(), DynamicCache(), work.sequences()
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1, "pondering_steps": STEPS}

    @torch.no_grad()
    def decode_one(tokens: torch.Tensor) -> None:
        model(input_ids=tokens, **options)

    decode_one(text[:, : work.seq_len // 2])
    return lambda: decode_one(text[:, -1:])


def _profiled(place: Place, what: str, function: Callable[[], Any]) -> Iterator[Row]:
    function()
    cuda = place.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        function()
        if cuda:
            torch.cuda.synchronize()
    took = "self_device_time_total" if cuda else "self_cpu_time_total"  # in microseconds
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, took))
    calls, whole = sum(event.count for event in events), sum(getattr(event, took) for event in events)
    yield Row(what, f"{calls} launches, {whole / 1e3:.3g} ms", "", {"launches": calls, "seconds": whole / 1e6})
    for event in events[:TOP]:
        time = getattr(event, took)
        values = {"kernel": event.key, "calls": event.count, "seconds": time / 1e6}
        name = event.key.replace("|", "/")[:60]
        figure, share = f"{event.count} x, {time / 1e3:.3g} ms", f"{time / max(whole, 1e-9):.0%}"
        yield Row(f"{what}: `{name}`", figure, share, values)


def _work(place: Place, batch: int) -> Workload:
    if place.toy:
        shape = {"hidden": 64, "layers": 1, "vocab": 300, "pondering_steps": STEPS}
        return workload(recipe=None, batch=batch, seq_len=32, dtype=place.dtype, device=place.device, **shape)
    # the recipe's own sizes are used instead
    sizes = {"seq_len": 1, "hidden": 1, "layers": 1, "pondering_steps": STEPS}
    return workload(recipe=RECIPE, batch=batch, vocab=50304, dtype=place.dtype, device=place.device, **sizes)


def steps(place: Place) -> Iterator[Row]:
    """Measure a training step with AdamW by recomputation policy, and the published way."""
    work = _work(place, 2 if place.toy else BATCH)
    training = Training(work)
    step.check_losses(training, STEPS)
    for name in ("pass", "selective", "layer", "pass+layer", "none", PUBLISHED):
        yield tried(f"{name}, {work.line()}", partial(_step, training, name, work.line()))


def _step(training: Training, name: str, line: str) -> Row:
    work, policy = training.work, "none" if name == PUBLISHED else name
    for parameter in training.model.parameters():
        parameter.grad = None
    cuda = work.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    took = medians({name: lambda: _discard(training.step(name, STEPS))}, 2, work.device)[name].seconds
    flops = step_flops(work.shape, policy, STEPS, work.tokens)
    values: dict[str, Any] = {"policy": name, "seconds": took, "tokens_per_second": work.tokens / took}
    values["model_flops"] = flops.model
    figure = f"{1e3 * took:.4g} ms, {work.tokens / took:,.0f} tokens/s"
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    beside = []
    if peak is not None:
        values |= {"mfu": flops.model / took / peak, "hfu": flops.hardware / took / peak}
        beside.append(f"MFU {values['mfu']:.1%}, HFU {values['hfu']:.1%}")
    if cuda:
        values["peak_mib"] = torch.cuda.max_memory_allocated() / MIB
        beside.append(f"{values['peak_mib'] / 1024:.1f} GiB")
    return Row(f"{name}, {line}", figure, "; ".join(beside), values)


def _discard(_: Any) -> None:
    """Drop a result, because `medians` would take it for marks."""


def compiled(place: Place) -> Iterator[Row]:
    """Compare a step with layers that torch has compiled to one without compilation."""
    return _with_speed(place, "compiled", {"compile": True})


def liger(place: Place) -> Iterator[Row]:
    """Compare a step with Liger's kernels to one with torch's."""
    return _with_speed(place, "liger", {"kernels": "liger"})


def _with_speed(place: Place, name: str, options: dict[str, Any]) -> Iterator[Row]:
    work = _work(place, 2 if place.toy else BATCH)
    policy, precision = "pass", "bf16" if place.device == "cuda" else "fp32"
    given: dict[str, Any] = {"recompute": policy, "precision": precision, **options}
    train = TrainConfig(steps=1, global_batch=1, **given)
    training = Training(work)
    plain = tried(f"plain, {policy}, {work.line()}", partial(_step, training, policy, f"plain, {work.line()}"))
    apply_speed(training.model, train)  # raises if it is not available, which leaves out the whole stage
    yield plain
    row = tried(f"{name}, {policy}, {work.line()}", partial(_step, training, policy, f"{name}, {work.line()}"))
    if "seconds" in row.values and "seconds" in plain.values:
        ratio = row.values["seconds"] / plain.values["seconds"]
        beside = "; ".join(part for part in (f"{ratio:.2f} of plain", row.beside) if part)
        row = Row(row.what, row.figure, beside, {**row.values, "ratio": ratio})
    yield row


def decoding(place: Place) -> Iterator[Row]:
    """Decode a token in each way. The share compares its time with reading its weights at the bandwidth of a copy."""
    for context in CONTEXTS[place.toy]:
        yield from _decoded(place, context, compiled=False)


def compiled_decoding(place: Place) -> Iterator[Row]:
    """The same with a compiled step. S + 1 passes make a long graph, which takes long to compile."""
    yield from _decoded(place, CONTEXTS[place.toy][0], compiled=True)


def _decoded(place: Place, context: int, *, compiled: bool) -> Iterator[Row]:
    work = _work(place, batch=1)
    shape, bandwidth = work.shape, ceilings.copy_bandwidth(place)
    table = shape.vocabulary * shape.hidden
    size = torch.empty(0, dtype=getattr(torch, work.dtype)).element_size()
    (found,) = decode.run(work, contexts=[context], runs=3, threads=torch.get_num_threads(), compiled=compiled)
    for way, name in ((way, name) for way, name in decode.WAYS.items() if way in found):
        passes = 1 if way == "vanilla" else STEPS + 1
        # Every pass reads the head. Every pass but the last also reads the table.
        floor = size * (passes * shape.block_parameters + (2 * passes - 1) * table) / bandwidth
        took = found[way]
        values = {"way": way, "context": context, "seconds": took, "floor_s": floor}
        share = f"{found[PUBLISHED] / took:.1f} x published; {floor / took:.0%} of the bandwidth"
        yield Row(f"{name}, after {context} tokens", f"{1e3 * took:.3g} ms a token", share, values)


def engine(place: Place) -> Iterator[Row]:
    """Run `ponder-scale train` under DeepSpeed, with steps, an evaluation and a checkpoint."""
    if _version("deepspeed") is None:
        raise ConfigError("a run needs DeepSpeed, which is not installed here; run: pip install deepspeed")
    from benchmarks.start import tiny_run
    from ponder_scale.runs.records import METRICS, read
    from ponder_scale.train.loop import train

    if place.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        for stage in (1,) if place.toy else (1, 3):
            config = tiny_run(Path(folder, f"zero{stage}"), stage, toy=place.toy, bf16=place.device == "cuda")
            code = train(config)
            last = [line for line in read(Path(config.run_dir) / METRICS) if line["event"] == "step"][-1]
            figure = f"loss {last['loss']:.3f}, {last['tokens_per_second']:,.0f} tokens/s"
            what = f"ponder-scale train, ZeRO-{stage}, {config.train.steps} steps"
            yield Row(what, figure, f"exit code {code}", last, error=f"exit code {code}" if code else None)


def training(place: Place) -> Iterator[Row]:
    """Train pondering and vanilla models alike on real text. Runs only on request."""
    from benchmarks.paired import paired

    return paired(place)


ALL: Sequence[tuple[str, str, float, Callable[[Place], Iterator[Row]]]] = (
    ("machine", "The machine", 30, machine),
    ("tests", "GPU tests", 100, tests),
    ("numbers", "The kernels against float64", 60, numbers),
    ("ceilings", "Ceilings", 30, ceilings.ceilings),
    ("op", "The pondering embedding by shape", 100, mixtures),
    ("launches", "Launches", 60, launches),
    ("step", "A step of 1.4B by policy", 120, steps),
    ("decode", "Decoding with 1.4B", 60, decoding),
    ("calibration", "Constants for the planner", 40, ceilings.calibration),
    ("compiled", "A step, compiled", 90, compiled),
    ("liger", "A step, Liger", 60, liger),
    ("engine", "A run under DeepSpeed", 90, engine),
    ("decode-compiled", "Decoding with 1.4B, compiled", 180, compiled_decoding),
)
