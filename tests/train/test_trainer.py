"""transformers' own Trainer, on two real ranks under ZeRO: the gradients of plain single-process torch."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from tests.ranks import run_ranks

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pondering_steps": 2,
    "scale_embeds": True,
    "attn_implementation": "eager",
}
BATCH = torch.randint(0, 67, (4, 16), generator=torch.Generator().manual_seed(0))


def build(tied: bool, feedback: str = "embedding") -> Any:
    from ponder_scale.model.configuration import PonderLlamaConfig
    from ponder_scale.model.modeling import PonderLlamaForCausalLM

    torch.manual_seed(0)
    return PonderLlamaForCausalLM(PonderLlamaConfig(**SHAPE, tie_word_embeddings=tied, feedback=feedback))


def train(case: dict[str, Any]) -> Any:
    """One optimizer step of SGD with rate 1 by the Trainer: what the weights lose is the mean gradient."""
    from transformers import Trainer, TrainingArguments

    torch.set_num_threads(1)
    zero: dict[str, Any] = {"stage": case["stage"], "reduce_bucket_size": 500, "stage3_param_persistence_threshold": 0}
    settings = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1e6,  # accelerate puts its own 1.0 where none is said
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            deepspeed=settings,
            per_device_train_batch_size=2,
            max_steps=1,
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo",
            gradient_checkpointing=case["checkpointing"],
            gradient_checkpointing_kwargs={"use_reentrant": True} if case["reentrant"] else None,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            max_grad_norm=1e6,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
        )
        model = build(case["tied"], case["feedback"])
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        rows = [{"input_ids": row, "labels": row} for row in BATCH]
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        import deepspeed

        parameters = dict(model.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=case["stage"] == 3):
            return {name: (before[name] - parameter.detach().cpu()).tolist() for name, parameter in parameters.items()}


CASES = [
    {"stage": stage, "tied": tied, "checkpointing": checkpointing, "reentrant": False, "feedback": feedback}
    for stage, tied, checkpointing, feedback in (
        (3, False, False, "embedding"),
        (3, False, True, "embedding"),
        (3, True, True, "both"),
        (2, False, True, "embedding"),
    )
]


def test_the_trainers_gradients_are_those_of_plain_torch() -> None:
    results = run_ranks(train, [*CASES, {**CASES[1], "reentrant": True}], timeout=200)
    for case, ranks in zip(CASES, results, strict=False):
        model = build(case["tied"], case["feedback"])
        sum(model(row[None], labels=row[None]).loss for row in BATCH).div(len(BATCH)).backward()
        for rank in ranks:
            assert "error" not in rank, (case, rank["error"])
            for name, parameter in model.named_parameters():
                got = torch.tensor(rank[name])
                error = (got - parameter.grad).norm() / parameter.grad.norm()
                assert error < 1e-3, (case, name, error)
    for rank in results[-1]:
        assert "use_reentrant=True silently loses the gradients of all but one pass under ZeRO-3" in rank["error"], rank
