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
from ponder_scale.config import INTERLEAVED
from ponder_scale.errors import CheckpointError, ConfigError
from ponder_scale.evaluate.trust import installed_configuration
from ponder_scale.setup.build import configuration_from_dict, model_class
from ponder_scale.setup.device import default_device
from ponder_scale.setup.speed import check_compiler


def load_folder(folder: Path | str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model and the tokenizer of an exported folder, on the GPU if there is one.

    Args:
        trust_remote_code: let the folder's own code load it. Otherwise the installed classes load it, and no code of
            the folder runs.

    Raises:
        CheckpointError: the folder cannot be loaded, or its model does not ponder, or its code is not that of this
            installation and may not be run.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; expected a folder made by `ponder-scale export`")
    configuration = None if trust_remote_code else installed_configuration(folder)
    try:
        if configuration is None:
            # The tokenizer needs it, too, because its loader reads the model's configuration, which is remote code.
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        else:
            loader: Any = AutoTokenizer  # with a configuration given, it does not look for one in the folder
            tokenizer = loader.from_pretrained(folder, config=configuration, trust_remote_code=False)
            options = {"config": configuration, "trust_remote_code": False, "use_safetensors": True}
            model = model_class(configuration).from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not hasattr(model, "run_pass"):
        raise CheckpointError(
            f"{folder}: its model ({type(model).__name__}) does not ponder; convert one that does by import-reference"
        )
    return model.to(default_device()).eval(), tokenizer


def load_checkpoint(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a verified checkpoint, on the GPU if there is one, and the contents of its state.json.

    Raises:
        CheckpointError: it was made by another program or version.
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
    """The number of forwards of a model, and of the passes in them."""

    forwards: int = 0
    passes: int = 0


@contextmanager
def counted(model: Any) -> Iterator[Counts]:
    """Count what the model runs inside of the block. A draft that was made of the model before is not counted."""
    counts = Counts()

    def counting(run_pass: Any, embeds: Any, index: int, *arguments: Any, **keywords: Any) -> Any:
        counts.forwards += index == 0
        counts.passes += 1
        return run_pass(embeds, index, *arguments, **keywords)

    with within(model, counting):
        yield counts


@contextmanager
def within(model: Any, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Run each pass of the model inside of `wrapper`, which takes the pass and its arguments."""
    if not hasattr(model, "wrappers"):  # trusted code of a folder that an older version exported
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
    draft_heads: bool = False,
    compiled: bool = False,
    interactive: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Stream the continuation of each prompt to standard output, then its speed and the passes that it took.

    Args:
        prompt: the text to continue. None reads all of standard input.
        exit_kl: stop pondering on a token when a pass has changed the prediction by less than this, in nats.
        draft_steps: let the same weights draft with this number of pondering steps. This does not change the text.
        draft_heads: let the extra heads of the model draft. This does not change the text, either.
        compiled: decode with one compiled graph for each token, with caches of a fixed size.
        interactive: read prompts from standard input, one in each line, and continue each by itself.
        trust_remote_code: passed on to `load_folder`.

    Raises:
        ConfigError: settings exclude each other or are out of range, or a prompt is empty.
    """
    _check(exit_kl=exit_kl, draft_steps=draft_steps, pondering_steps=pondering_steps)
    _check_ways(exit_kl=exit_kl is not None, drafts=draft_steps is not None, heads=draft_heads, compiled=compiled)
    texts = _prompts(prompt, interactive=interactive)
    model, tokenizer = load_folder(folder, trust_remote_code=trust_remote_code)
    if draft_heads and not getattr(model.config, "extra_heads", 0):
        raise ConfigError(f"--draft-heads: the model in {folder} has no extra heads; use --draft-steps 0")
    _check_model(model.config, exit_kl=exit_kl, compiled=compiled)
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
        print(_continued(model, tokenizer, inputs, options, draft_steps, heads=draft_heads, compiled=compiled))


def _check_ways(*, exit_kl: bool, drafts: bool, heads: bool, compiled: bool) -> None:
    draft = "--draft-steps" if drafts else "--draft-heads"
    if drafts and heads:
        raise ConfigError("--draft-steps and --draft-heads exclude each other, because each makes a draft; give one")
    if exit_kl and (drafts or heads):
        raise ConfigError(f"--exit-kl and {draft} exclude each other, because all passes check a draft; give one")
    if compiled and (exit_kl or drafts or heads):
        raise ConfigError(
            f"--compile makes one graph of all passes of one token, but --exit-kl leaves passes out and {draft} "
            "feeds several tokens; give one of the three"
        )


def _check(*, exit_kl: float | None, draft_steps: int | None, pondering_steps: int | None) -> None:
    for name, value in (("--exit-kl", exit_kl), ("--draft-steps", draft_steps), ("--pondering-steps", pondering_steps)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} is {value}; expected at least 0")


def _check_model(config: Any, *, exit_kl: float | None, compiled: bool) -> None:
    for field, special in (("feedback", config.feedback in INTERLEAVED), ("halting", config.halting != "none")):
        for flag, given in (("--exit-kl", exit_kl is not None), ("--compile", compiled)):
            if special and given:
                raise ConfigError(f"{flag} is not for a model with {field} {getattr(config, field)}; leave it out")


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
    """The lines of standard input that are not empty. On a terminal, asks for each."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if text := line.rstrip("\n"):
            yield text


def _continued(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    options: dict[str, Any],
    draft_steps: int | None,
    *,
    heads: bool,
    compiled: bool,
) -> str:
    """Stream one continuation. Returns the lines about its speed and its passes."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    prompt_tokens, begin = inputs.input_ids.shape[1], time.monotonic()
    if compiled:  # no counters here, because they would be compiled, too
        new = model.generate(**inputs, **options, streamer=streamer).shape[1] - prompt_tokens
        passes = new * (model.config.pondering_steps + 1)
        return f"{_speed(new, time.monotonic() - begin)}, compilation included; {passes} passes in {new} forwards"
    if heads:
        drafts = model.draft_heads(streamer)
        with counted(model) as counts:
            new = model.generate(**inputs, **options, custom_generate=drafts).shape[1] - prompt_tokens
        said = f"{_speed(new, time.monotonic() - begin)}; {passes_line(model, counts)}"
        proposed = f"{drafts.accepted} of {drafts.proposed} proposed tokens accepted"
        return f"{said}\ndraft of {model.config.extra_heads} extra heads: {proposed}"
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
    """Arguments that make `generate` compile the decoding step. On a GPU the step is replayed as one CUDA graph.

    Raises:
        ConfigError: there is no compiler.
    """
    check_compiler("--compile")
    compilation = CompileConfig(fullgraph=True)  # the default mode of transformers is the one with CUDA graphs
    if model.device.type == "cpu":
        compilation.mode = "default"
        compilation._compile_all_devices = True  # without this, transformers does not compile on CPUs
    return {"cache_implementation": "static", "compile_config": compilation}


def _speed(new: int, seconds: float) -> str:
    return f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} tokens/s"


def passes_line(model: Any, counts: Counts) -> str:
    """The line about how many of the passes ran."""
    whole = counts.forwards * (model.config.pondering_steps + 1)
    exits = counts.passes < whole and model.config.feedback not in INTERLEAVED  # a pause takes one pass over all
    saved = f", {1 - counts.passes / whole:.0%} saved by early exit" if exits else ""
    return f"{counts.passes} passes in {counts.forwards} forwards{saved}"


def acceptance_line(new: int, counts: Counts, drafted: Counts) -> str:
    """The line about how much of a draft was accepted.

    Each forward of the model gives one token of its own and the draft's tokens that it accepts.
    """
    accepted = new - counts.forwards
    return f"{accepted} of {drafted.forwards} proposed tokens accepted, {drafted.passes} passes"
