"""What the checks of exported folders share: documents, the model of a folder, its own numbers, a trainer.

The truth is the model itself: its own loss and gradients on the same tokens, one document at a time where documents are
packed, and the merged weights where there is an adapter.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDERS, PLACE = Path(sys.argv[1]), Path(sys.argv[2])
ARCHITECTURES = ("llama", "gpt_neox", "gpt2", "olmo2")
# of several lengths, so that a batch of them is padded
DOCUMENTS = [
    {"prompt": "The quick brown fox", "completion": " jumps over the lazy dog"},
    {"prompt": "def square(number):", "completion": "\n    return number * number\n"},
    {"prompt": "a", "completion": " does not mind"},
]
PREFERENCES = [{**one, "chosen": one["completion"], "rejected": " the the"} for one in DOCUMENTS]
for one in PREFERENCES:
    del one["completion"]


def load(architecture: str = "llama", **options: Any) -> Any:
    """The model of a folder, in fp32."""
    return AutoModelForCausalLM.from_pretrained(FOLDERS / architecture, trust_remote_code=True, **options)


TOKENIZER = AutoTokenizer.from_pretrained(FOLDERS / "llama", trust_remote_code=True)


def options(**more: Any) -> dict[str, Any]:
    """Of one step on all documents at once, in which nothing is clipped."""
    return {
        "output_dir": str(PLACE / "trainer"),
        "per_device_train_batch_size": len(DOCUMENTS),
        "learning_rate": 1e-3,
        "max_steps": 1,
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 48,
        **more,
    }


def encoded(documents: list[dict[str, str]], completions: bool = True) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each document."""
    found = []
    for one in documents:
        prompt = TOKENIZER(one["prompt"])["input_ids"]
        tokens = TOKENIZER(one["prompt"] + one["completion"] + TOKENIZER.eos_token)["input_ids"]
        assert tokens[: len(prompt)] == prompt
        found.append((tokens, [-100] * len(prompt) + tokens[len(prompt) :] if completions else tokens))
    return found


def own_numbers(model: Any, completions: bool = True, **call: Any) -> tuple[float, float]:
    """Loss and gradient norm as the model has them, by one document at a time."""
    model.train()
    documents = encoded(DOCUMENTS, completions)
    count = sum(label != -100 for _, labels in documents for label in labels[1:])
    total = torch.zeros(())
    for tokens, labels in documents:
        one = model(torch.tensor([tokens]), labels=torch.tensor([labels]), num_items_in_batch=count, **call).loss
        one.backward()
        total += one.detach()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return total.item(), torch.stack(norms).norm().item()


def sft(model: Any, *, documents: list[dict[str, str]] = DOCUMENTS, adapter: Any = None, **more: Any) -> Any:
    """An SFTTrainer that has trained."""
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options(**more)),
        train_dataset=datasets.Dataset.from_list(documents),
        processing_class=TOKENIZER,
        peft_config=adapter,
    )
    trainer.train()
    return trainer


def first(trainer: Any) -> tuple[float, float]:
    """Loss and gradient norm of a trainer's first step."""
    record = trainer.state.log_history[0]
    return record["loss"], record["grad_norm"]


def close(found: Any, expected: Any, relative: float = 2e-4) -> None:
    """Raise unless numbers, which trainers round in their logs, are equal."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=relative, atol=1e-5)


def padded() -> Any:
    """The tokenizer, with something to pad by."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS / "llama", trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapter(**more: Any) -> peft.LoraConfig:
    """LoRA on all linear layers, with an effect from the first step on."""
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **more})


def refused(call: Any, sentence: str) -> None:
    """Raise unless a call fails with a sentence."""
    try:
        call()
    except Exception as error:
        assert sentence in str(error), f"{type(error).__name__}: {error}"
        return
    raise AssertionError(f"not refused: {sentence}")


def log_probabilities(model: Any, prompt: str, completion: str) -> torch.Tensor:
    ((tokens, labels),) = encoded([{"prompt": prompt, "completion": completion}])
    found = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    targets = torch.tensor(labels[1:])
    return found.gather(-1, targets.clamp(min=0)[:, None])[:, 0][targets != -100]
