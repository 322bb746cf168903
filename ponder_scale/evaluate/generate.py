"""Continue prompts with an exported folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, TextStreamer

from ponder_scale.checkpoint.find import read_state
from ponder_scale.checkpoint.weights import read_weights
from ponder_scale.errors import CheckpointError, ConfigError
from ponder_scale.evaluate.trust import installed_configuration
from ponder_scale.setup.build import configuration_from_dict, model_class
from ponder_scale.setup.device import default_device
from ponder_scale.setup.speed import check_compiler


def load_folder(folder: Path | str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of an exported folder, on the GPU where there is one.

    Args:
        trust_remote_code: let the folder's own code load it. Otherwise the installed classes do, and no code of the
            folder runs.

    Raises:
        CheckpointError: it cannot be loaded; it holds code that is not this installation's and may not be run; or its
            model does not ponder.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; expected a folder made by `ponder-scale export`")
    configuration = None if trust_remote_code else installed_configuration(folder)
    try:
        if configuration is None:
            # the tokenizer too: looking for it reads the model's configuration, which is remote code
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        else:
            loader: Any = AutoTokenizer  # given the configuration, it does not look for one
            tokenizer = loader.from_pretrained(folder, config=configuration, trust_remote_code=False)
            options = {"config": configuration, "trust_remote_code": False, "use_safetensors": True}
            model = model_class(configuration).from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not hasattr(model, "run_pass"):
        raise CheckpointError(
            f"{folder}: its model ({type(model).__name__}) does not ponder; import-reference makes one"
        )
    return model.to(default_device()).eval(), tokenizer


def load_checkpoint(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint that was checked, on the GPU where there is one, and the checkpoint's state.json.

    Raises:
        CheckpointError: it is of another program or version.
    """
    state = read_state(folder, "step", "model", "config")
    configuration = configuration_from_dict(state["model"])
    model = model_class(configuration)(configuration).eval().to(default_device())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in read_weights(folder):
            parameters[name].copy_(weight)
    return model, state


@dataclass
class Counts:
    """Forwards of a model, and the passes in them."""

    forwards: int = 0
    passes: int = 0


@contextmanager
def counted(model: Any) -> Iterator[Counts]:
    """Counts what the model runs inside the block. A draft made of it before runs uncounted."""
    counts = Counts()

    def counting(run_pass: Any, embeds: Any, index: int, *arguments: Any, **keywords: Any) -> Any:
        counts.forwards += index == 0
        counts.passes += 1
        return run_pass(embeds, index, *arguments, **keywords)

    with within(model, counting):
        yield counts


@contextmanager
def within(model: Any, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Each pass of the model runs inside `wrapper`, which takes the pass and its arguments."""
    if not hasattr(model, "wrappers"):  # the code of a folder that an older version has exported, run on trust
        model.run_pass = partial(wrapper, model.run_pass)
        try:
            yield
        finally:
            del model.run_pass
        return
    before = model.wrappers
    model.wrappers = (*before, wrapper)
    try:
        yield
    finally:
        model.wrappers = before


def generate(
    folder: Path,
    prompt: str | None,
    *,
    max_new_tokens: int,
    pondering_steps: int | None = None,
    temperature: float = 0.0,
    seed: int = 1,
    exit_kl: float | None = None,
    draft_steps: int | None = None,
    compiled: bool = False,
    interactive: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Stream the continuation of each prompt to standard output, then its speed and the passes it took.

    Args:
        prompt: None reads one from standard input, all of it.
        exit_kl: stop pondering on a token when a pass moved the prediction by less, in nats.
        draft_steps: pondering steps of the same weights drafting; the text is the model's own.
        compiled: decode by one compiled graph a token, with caches of a fixed size.
        interactive: read prompts from standard input, a line each, and continue each on its own until input ends.
        trust_remote_code: as `load_folder` has it.

    Raises:
        ConfigError: settings that exclude each other or are out of range; an empty prompt.
    """
    _check(exit_kl=exit_kl, draft_steps=draft_steps, pondering_steps=pondering_steps, compiled=compiled)
    texts = _prompts(prompt, interactive=interactive)
    model, tokenizer = load_folder(folder, trust_remote_code=trust_remote_code)
    if pondering_steps is not None:
        model.config.pondering_steps = pondering_steps
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    options |= {"temperature": temperature} if temperature > 0 else {}
    options |= {"exit_kl": exit_kl} if exit_kl is not None else {}
    options |= compiled_step(model) if compiled else {}
    torch.manual_seed(seed)
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
        if not inputs.input_ids.shape[1]:
            raise ConfigError("the prompt is empty; give at least one token")
        print(_continued(model, tokenizer, inputs, options, draft_steps, compiled=compiled))


def _check(*, exit_kl: float | None, draft_steps: int | None, pondering_steps: int | None, compiled: bool) -> None:
    if exit_kl is not None and draft_steps is not None:
        raise ConfigError("--exit-kl and --draft-steps exclude each other: a draft is checked by whole forwards")
    if compiled and (exit_kl is not None or draft_steps is not None):
        raise ConfigError(
            "--compile makes one graph of all passes of a token, which --exit-kl would cut short and --draft-steps "
            "feed several tokens; give one of the three"
        )
    for name, value in (("--exit-kl", exit_kl), ("--draft-steps", draft_steps), ("--pondering-steps", pondering_steps)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} is {value}; expected at least 0")


def _prompts(prompt: str | None, *, interactive: bool) -> Iterable[str]:
    if interactive:
        if prompt is not None:
            raise ConfigError(
                "--prompt and --interactive exclude each other; type the prompt when you are asked for it"
            )
        return _typed()
    if prompt is not None:
        return [prompt]
    if sys.stdin.isatty():
        raise ConfigError("there is no prompt; give --prompt TEXT, pipe a text in, or use --interactive")
    return [sys.stdin.read().removesuffix("\n")]


def _typed() -> Iterator[str]:
    """The lines of standard input that are not empty; on a terminal it asks for each."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if text := line.rstrip("\n"):
            yield text


def _continued(
    model: Any, tokenizer: Any, inputs: Any, options: dict[str, Any], draft_steps: int | None, *, compiled: bool
) -> str:
    """Stream one continuation; returns the lines on what it took."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    prompt_tokens, begin = inputs.input_ids.shape[1], time.monotonic()
    if compiled:  # without counters, which would be compiled too
        new = model.generate(**inputs, **options, streamer=streamer).shape[1] - prompt_tokens
        passes = new * (model.config.pondering_steps + 1)
        return f"{_speed(new, time.monotonic() - begin)}, compilation included; {passes} passes in {new} forwards"
    draft = None if draft_steps is None else model.draft(draft_steps)
    if draft is not None:
        options = {**options, "assistant_model": draft}
    with counted(model) as counts, counted(draft or model.draft(0)) as drafted:
        new = model.generate(**inputs, **options, streamer=streamer).shape[1] - prompt_tokens
    said = f"{_speed(new, time.monotonic() - begin)}; {passes_line(model, counts)}"
    if draft is None:
        return said
    return f"{said}\ndraft of {draft_steps} pondering steps: {acceptance_line(new, counts, drafted)}"


def compiled_step(model: Any) -> dict[str, Any]:
    """Arguments by which `generate` compiles a decoding step; on a GPU it is replayed as one CUDA graph.

    Raises:
        ConfigError: there is no compiler.
    """
    check_compiler("--compile")
    compilation = CompileConfig(fullgraph=True)  # of transformers, whose mode is the one with CUDA graphs
    if model.device.type == "cpu":
        compilation.mode = "default"
        compilation._compile_all_devices = True  # on CPUs only if it is told to
    return {"cache_implementation": "static", "compile_config": compilation}


def _speed(new: int, seconds: float) -> str:
    return f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} tokens/s"


def passes_line(model: Any, counts: Counts) -> str:
    """How many of the passes ran."""
    whole = counts.forwards * (model.config.pondering_steps + 1)
    saved = f", {1 - counts.passes / whole:.0%} saved by early exit" if counts.passes < whole else ""
    return f"{counts.passes} passes in {counts.forwards} forwards{saved}"


def acceptance_line(new: int, counts: Counts, drafted: Counts) -> str:
    """How much of a draft was taken: each forward of the model gives a token of its own and those it accepts."""
    accepted = new - counts.forwards
    return f"{accepted} of {drafted.forwards} proposed tokens accepted, {drafted.passes} passes"
