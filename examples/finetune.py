"""Tune an exported folder on instructions, and write another folder that loads without this project.

    python examples/finetune.py FOLDER DATA OUT [--lora 16] [--pondering-steps 3] ...

DATA is a file of JSON lines with `instruction`, `output` and perhaps `input`, as Alpaca's, or with `prompt` and
`completion`. Only completions count in the loss. TRL trains and PEFT provides the adapter. Install both with the extra
`finetune`. For several GPUs use `torchrun --nproc-per-node 8 examples/finetune.py ...`. See docs/finetuning.md for what
else is tested.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ponder_scale.errors import CheckpointError, ConfigError, TokenizerError, UnhealthyError, UserError

# Alpaca's prompts, so that you can compare data and results with others' (github.com/tatsu-lab/stanford_alpaca).
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
DTYPES = ("float32", "bfloat16", "float16")


class Example(NamedTuple):
    """A prompt and the completion that the model should learn."""

    prompt: str
    completion: str


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a file of JSON lines. Blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a line that is not an example.
    """
    examples = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    examples.append(_example(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; expected JSON lines in UTF-8") from error
    if not examples:
        raise ConfigError(f"{path}: holds no example; expected one JSON object a line")
    return examples


def _example(line: str, place: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        whole = "; a file that is one array becomes lines by jq -c '.[]'" if line.lstrip().startswith("[") else ""
        raise ConfigError(f"{place}: is not JSON ({error.msg}); expected one object a line{whole}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{place}: is a {type(record).__name__}; expected an object with the fields of an example")
    alpaca = "instruction" in record or "output" in record
    wanted = ("instruction", "output") if alpaca else ("prompt", "completion")
    record = {name: value for name, value in record.items() if value is not None}
    for name in wanted:
        if name not in record:
            raise ConfigError(
                f"{place}: has no {name}; expected instruction, output and perhaps input, or prompt and completion"
            )
    for name in (*wanted, *(["input"] if alpaca and "input" in record else [])):
        if not isinstance(record[name], str):
            raise ConfigError(f"{place}: {name} is a {type(record[name]).__name__}; expected a text")
    prompt, completion = (record[name] for name in wanted)
    if not completion.strip():
        raise ConfigError(f"{place}: {wanted[1]} is empty, so there is nothing to learn; remove the line")
    if alpaca:
        template = WITH_INPUT if record.get("input", "").strip() else WITHOUT_INPUT
        prompt = template.format_map({"input": "", **record})
    elif not prompt:
        raise ConfigError(f"{place}: prompt is empty; expected a text to go on from")
    return Example(prompt, completion)


def encode(examples: list[Example], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """The tokens and labels of each example, cut after `max_length` tokens. Labels in the prompt are -100.

    The prompt is encoded alone, as it is when you use the model. Examples whose completion is cut off are left out.

    Raises:
        ConfigError: no example is left.
    """
    records, cut = [], 0
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        tokens, labels = prompt + completion, [-100] * len(prompt) + completion
        cut += len(tokens) > max_length
        if len(prompt) < max_length:
            records.append({"input_ids": tokens[:max_length], "labels": labels[:max_length]})
    dropped = len(examples) - len(records)
    if not records:
        raise ConfigError(f"--max-length is {max_length}: every prompt is at least as long; raise it")
    if cut:
        say(
            f"{cut:,} of {len(examples):,} examples are longer than {max_length} tokens: {cut - dropped:,} are cut, "
            f"{dropped:,} have no completion left and are left out"
        )
    return records


def tune(options: argparse.Namespace) -> None:
    """Train, and write the folder."""
    model, tokenizer, records, max_length = prepare(options)
    configuration = model.config.to_dict()  # copied before trainers change it
    with tempfile.TemporaryDirectory() as temporary:
        trainer = make_trainer(options, model, tokenizer, records, max_length, Path(temporary))
        loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise UnhealthyError(
            f"the mean training loss is {loss}, so {options.out} was not written; lower --learning-rate"
        )
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    if trainer.is_world_process_zero():
        facts = {
            "examples": f"{len(records):,} of {options.data.name}, loss on completions alone",
            "pondering steps S": f"{model.config.pondering_steps}",
            "way": "all weights" if options.lora is None else f"LoRA of rank {options.lora}, merged",
            "epochs, batch, learning rate, seed": f"{options.epochs:g}, "
            f"{options.batch_size * options.accumulate * trainer.args.world_size}, {rate(options):g}, {options.seed}",
            "training loss": f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last, mean {loss:.4f}",
            "made with": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft")),
        }
        write(trainer, options, configuration, facts)
        say(f"{options.out}: tuned on {len(records):,} examples, loss {losses[0]:.4f} to {losses[-1]:.4f}")


def prepare(options: argparse.Namespace) -> tuple[Any, Any, list[dict[str, list[int]]], int]:
    """Load the model, its tokenizer and the encoded examples, and return them with the maximum length.

    Every error that can be found before training is raised here.
    """
    if options.out.exists():
        raise CheckpointError(f"{options.out}: exists already; remove it or give another folder")
    _make_parent(options.out)
    examples = read_examples(options.data)
    _check_installed()
    model, tokenizer = load(options.folder, options.pondering_steps)
    positions = model.config.max_position_embeddings
    max_length = min(1024, positions) if options.max_length is None else options.max_length
    if max_length > positions:
        raise ConfigError(f"--max-length is {max_length}, the model has {positions} positions; lower it")
    return model, tokenizer, encode(examples, tokenizer, max_length), max_length


def make_trainer(
    options: argparse.Namespace, model: Any, tokenizer: Any, records: list[Any], max_length: int, folder: Path
) -> Any:
    """Create TRL's trainer, which writes its files to `folder`.

    Raises:
        ConfigError: accelerate is configured to partition the weights.
    """
    # These imports take seconds, so every check that does not need them comes first.
    import datasets
    import torch
    import trl

    arguments = trl.SFTConfig(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        learning_rate=rate(options),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=options.gradient_checkpointing,
        packing=options.packing,
        max_length=max_length,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # share of all steps
        seed=options.seed,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=options.log_every,
        save_strategy="no",
        report_to="none",
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
        peft_config=None if options.lora is None else adapter(options.lora),
    )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError(
            "accelerate is configured to partition the weights (DeepSpeed or FSDP), and this example writes whole "
            "ones; start it by torchrun, and a model that needs partitioning by a trainer of your own"
        )
    return trainer


def rate(options: argparse.Namespace) -> float:
    """The requested learning rate, or the usual one."""
    return options.learning_rate or (2e-5 if options.lora is None else 2e-4)


def load(folder: Path, pondering_steps: int | None) -> tuple[Any, Any]:
    """Load the folder's model in fp32, with `pondering_steps` if given, and its tokenizer.

    Raises:
        CheckpointError: the folder does not hold a model of this project.
        TokenizerError: the folder has no tokenizer, or one without an end-of-text token.
    """
    from transformers import AutoTokenizer

    from ponder_scale.setup.build import model_class
    from ponder_scale.setup.warm_start import folder_configuration, warm_start

    configuration = folder_configuration(folder)
    if pondering_steps is not None:
        configuration.pondering_steps = pondering_steps
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=configuration)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: names no eos_token, so a tuned model would never stop; add it there"
        )
    model = model_class(configuration)(configuration)
    warm_start(model, folder)
    return model, tokenizer


def adapter(rank: int) -> Any:
    """A LoRA adapter on every linear layer except the head."""
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def write(trainer: Any, options: argparse.Namespace, configuration: dict[str, Any], facts: dict[str, str]) -> None:
    """Write the folder: merged weights, the model's code, configuration, tokenizer, card and checksums."""
    from ponder_scale.export.card import tuned_card
    from ponder_scale.export.folder import write_folder
    from ponder_scale.setup.build import configuration_from_dict
    from ponder_scale.setup.warm_start import read_configuration

    model = trainer.accelerator.unwrap_model(trainer.model)
    if options.lora is not None:
        model = model.merge_and_unload()
    before = read_configuration(options.folder)
    dtype = options.dtype or str(before.get("dtype") or before.get("torch_dtype") or "float32")
    card = options.folder / "README.md"
    write_folder(
        options.out,
        configuration_from_dict(configuration),
        ((name, parameter.detach().cpu()) for name, parameter in model.named_parameters()),
        dtype=dtype,
        card=lambda parameters: tuned_card(
            card.read_text(encoding="utf-8") if card.is_file() else None,
            (options.folder.resolve().name, options.out.name),
            configuration_from_dict(configuration),
            parameters,
            facts,
        ),
        tokenizer=options.folder,
    )


def _make_parent(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(f"{out.parent} is not writable")
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made: {error}; give another folder") from error


def _check_installed() -> None:
    from importlib.util import find_spec

    for name in ("trl", "peft"):
        if find_spec(name) is None:
            raise ConfigError(f"the package {name} is not installed; pip install 'ponder-scale[finetune]'")


def say(line: str) -> None:
    """Print a line, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _number(kind: Callable[[str], Any], least: float, *, above: bool = False) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        bound = f"{'more than' if above else 'at least'} {least:g}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}; expected {name} of {bound}")
        return value

    return number


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = _Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    positive, whole = _number(float, 0, above=True), _number(int, 1)
    add = parser.add_argument
    add("folder", type=Path, help="a folder that ponder-scale exported")
    add("data", type=Path, help="JSON lines: instruction, output, perhaps input; or prompt, completion")
    add("out", type=Path, help="the folder to be made")
    add("--lora", type=whole, metavar="RANK", help="train a LoRA adapter and merge it; default: all weights")
    add("--pondering-steps", type=_number(int, 0), help="S while tuning and in the folder; default: the folder's")
    add("--epochs", type=positive, default=3.0, help="times over the data; default: %(default)g")
    add("--learning-rate", type=positive, help="peak; default: 2e-5, with --lora 2e-4")
    add("--batch-size", type=whole, default=8, help="examples a device at once; default: %(default)s")
    add("--accumulate", type=whole, default=1, help="batches an optimizer step; default: %(default)s")
    add(
        "--max-length", type=whole, help="tokens after which an example is cut; default: 1024, or the model's positions"
    )
    add("--packing", action="store_true", help="several examples in a row; they do not see each other")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--dtype", choices=DTYPES, help="of the written weights; default: the folder's")
    add("--log-every", type=whole, default=10, help="optimizer steps between records; default: %(default)s")
    add("--seed", type=int, default=0, help="of the order of the data, and of the adapter; default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        tune(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
