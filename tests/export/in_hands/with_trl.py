"""Exported folders in the hands of TRL: each function `check_...` proves what its docstring says."""

from __future__ import annotations

import math
from typing import Any

import datasets
import torch
import transformers
import trl
from hands import (
    ARCHITECTURES,
    DOCUMENTS,
    PREFERENCES,
    TOKENIZER,
    adapter,
    close,
    encoded,
    first,
    load,
    log_probabilities,
    options,
    own_numbers,
    padded,
    refused,
    sft,
)


def check_sft_sees_the_models_loss_and_gradient_norm() -> None:
    """On completions alone, and on whole texts."""
    for architecture in ARCHITECTURES:
        close(first(sft(load(architecture))), own_numbers(load(architecture)))
    close(first(sft(load(), completion_only_loss=False)), own_numbers(load(), completions=False))
    without = own_numbers(load(pondering_steps=0))
    assert abs(without[0] - own_numbers(load())[0]) > 0.05, "the folder ponders too little to show it"


def check_packed_and_padding_free_batches_equal_single_documents() -> None:
    """With each attention that takes no kernels of its own."""
    for architecture in ARCHITECTURES:
        expected = own_numbers(load(architecture))
        for attention in ("eager", "sdpa"):
            model = load(architecture, attn_implementation=attention)
            close(first(sft(model, padding_free=True, max_length=None)), expected)
    for strategy in ("bfd", "bfd_split"):
        close(first(sft(load(), packing=True, packing_strategy=strategy, max_length=48)), own_numbers(load()))


def check_loss_falls_and_label_masks_hold() -> None:
    """Ten steps on the same batch; what is not of a completion has no say."""
    trainer = sft(load(), max_steps=10, learning_rate=1e-2)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0], losses
    for found, (tokens, labels) in zip(trainer.train_dataset, encoded(DOCUMENTS), strict=True):
        assert (found["input_ids"], found["labels"]) == (tokens, labels)


def check_pondering_steps_are_chosen_at_load() -> None:
    """Every trainer sees the number that the configuration has."""
    for steps in (0, 1, 4):
        close(first(sft(load(pondering_steps=steps))), own_numbers(load(), pondering_steps=steps))


def check_gradient_checkpointing_changes_nothing() -> None:
    """By the Trainer of transformers and TRL's, of all weights and of adapters."""
    expected = own_numbers(load())
    close(first(sft(load(), gradient_checkpointing=True)), expected)
    close(first(sft(load(), gradient_checkpointing=True, padding_free=True, max_length=None)), expected)
    adapters = [first(sft(load(), gradient_checkpointing=on, adapter=adapter())) for on in (False, True)]
    close(*adapters)
    arguments = options(remove_unused_columns=False)
    del arguments["max_length"]
    for on in (False, True):
        arguments["gradient_checkpointing"] = on
        trainer = transformers.Trainer(
            model=load(),
            args=transformers.TrainingArguments(**arguments),
            train_dataset=[{"input_ids": tokens, "labels": labels} for tokens, labels in encoded(DOCUMENTS)],
            data_collator=transformers.DataCollatorForSeq2Seq(padded(), padding=True),
        )
        trainer.train()
        close(first(trainer), expected)
    refused(
        lambda: sft(load(), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        "use_reentrant=True silently loses the gradients",
    )


def dpo(model: Any, reference: Any = None, **more: Any) -> Any:
    """A DPOTrainer that has trained."""
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**options(**more)),
        processing_class=TOKENIZER,
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
    )
    trainer.train()
    return trainer


def check_dpo_sees_the_models_log_probabilities() -> None:
    """Loss, gradient norm and the logged means, against another model as the reference."""
    beta, reference = 0.5, load(pondering_steps=1)
    model = load()
    losses, chosen = [], []
    for one in PREFERENCES:
        ours = [log_probabilities(model, one["prompt"], one[key]).sum() for key in ("chosen", "rejected")]
        with torch.no_grad():
            theirs = [log_probabilities(reference, one["prompt"], one[key]).sum() for key in ("chosen", "rejected")]
        margin = ours[0] - theirs[0] - ours[1] + theirs[1]
        losses.append(-torch.nn.functional.logsigmoid(beta * margin))
        chosen.append(ours[0].item())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    trainer = dpo(load(), reference, beta=beta)
    close(first(trainer), (loss.item(), norm.item()))
    close(trainer.state.log_history[0]["logps/chosen"], sum(chosen) / len(chosen))
    # without one it is the folder itself, which is loaded only by who trusts its code
    refused(lambda: dpo(load()), "trust_remote_code=True")
    alone = dpo(load(), trust_remote_code=True)
    assert alone.ref_model.config.pondering_steps == alone.model.config.pondering_steps
    close(first(alone)[0], math.log(2))


def check_fused_heads_of_other_trainers() -> None:
    """What KTO, GRPO and RLOO compute their losses from: log-probabilities of each token."""
    from trl.trainer.utils import add_fused_lm_head

    for architecture in ARCHITECTURES:
        model = load(architecture).eval()
        tokens = torch.tensor([encoded(DOCUMENTS)[0][0]])
        expected = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        add_fused_lm_head(model)
        found = model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def check_kto_and_grpo_run() -> None:
    """KTO's logged log-probabilities are the model's; GRPO generates, scores and has a gradient."""
    rows = [{**one, "label": index != 1} for index, one in enumerate(DOCUMENTS)]
    kto = trl.KTOTrainer(
        model=load(),
        ref_model=load(),
        args=trl.KTOConfig(**options()),
        processing_class=TOKENIZER,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    kto.train()
    sums = [log_probabilities(load(), one["prompt"], one["completion"]).sum().item() for one in DOCUMENTS]
    close(kto.state.log_history[0]["logps/chosen"], (sums[0] + sums[2]) / 2)
    close(kto.state.log_history[0]["logps/rejected"], sums[1])
    arguments = options(num_generations=3, max_completion_length=4)
    del arguments["max_length"]
    grpo = trl.GRPOTrainer(
        model=load(),
        args=trl.GRPOConfig(**arguments),
        processing_class=TOKENIZER,
        reward_funcs=lambda completions, **_: [float(index) for index, _ in enumerate(completions)],
        train_dataset=datasets.Dataset.from_list([{"prompt": one["prompt"]} for one in DOCUMENTS]),
    )
    grpo.train()
    record = grpo.state.log_history[0]
    assert record["grad_norm"] > 0 and record["completions/max_length"] > 0, record
