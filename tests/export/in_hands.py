"""Checks of exported folders in the hands of TRL and PEFT: `python in_hands.py FOLDERS PLACE`.

Run by `test_finetuning.py` with the packages on the path and this project nowhere near: what ponders is the code in the
folders. Each function `check_...` proves what its docstring says. Printed is one JSON object, of what each found wrong.

The truth is the model itself: its own loss and gradients on the same tokens, one document at a time where documents are
packed, and the merged weights where there is an adapter.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
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
        "use_reentrant=True loses the gradients",
    )


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


def head_and_table(model: Any) -> tuple[str, str]:
    """Names of the modules."""
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(names[id(module)] for module in (model.get_output_embeddings(), model.get_input_embeddings()))


def check_an_adapter_equals_its_merged_weights() -> None:
    """Logits, loss, decoding; and every adapter gets a gradient."""
    for architecture in ARCHITECTURES:
        head, table = (name.rpartition(".")[2] for name in head_and_table(load(architecture)))
        chosen = adapters(head, table)
        for one in chosen if architecture == "llama" else chosen[:4]:
            compare_with_merged(architecture, one)


def adapters(head: str, table: str) -> list[Any]:
    """Of PEFT, on all layers, on the head, on the table."""
    linear = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    return [
        adapter(),
        adapter(target_modules=[head]),
        adapter(target_modules=[table]),
        adapter(target_modules=[head, table]),
        adapter(target_modules=[head], use_dora=True),
        adapter(use_dora=True, modules_to_save=[head, table]),
        adapter(trainable_token_indices={table: [3, 4, 5]}),
        linear,
        peft.IA3Config(target_modules=[head], feedforward_modules=[], init_ia3_weights=False),
        peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], init_weights=False),
        peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False),
        peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"], init_weights=False),
        peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"], init_weights=False),
        peft.TrainableTokensConfig(target_modules=[table], token_indices=[3, 4, 5]),
    ]


def compare_with_merged(architecture: str, chosen: Any) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(load(architecture), chosen).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.mul_(1.5)
    tokens = torch.tensor([encoded(DOCUMENTS)[0][0]])
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, (chosen.peft_type, name)
    with torch.no_grad():
        plain = model.get_base_model().base_model(input_ids=tokens).last_hidden_state
        assert torch.allclose(model.get_output_embeddings()(plain), output.logits, atol=1e-5), chosen
        mask = torch.ones_like(tokens)
        decoding = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        decoded = model.generate(input_ids=tokens, **decoding)
        uncached = model.generate(input_ids=tokens, use_cache=False, **decoding)
        merged = model.merge_and_unload()
        again = merged(input_ids=tokens, labels=tokens)
        base = load(architecture)(input_ids=tokens).logits
        assert torch.equal(decoded, uncached) and torch.equal(decoded, merged.generate(tokens, **decoding)), chosen
    torch.testing.assert_close(output.logits, again.logits, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(output.loss, again.loss, atol=1e-4, rtol=1e-4)
    assert (base - again.logits).abs().max() > 1e-2, (chosen.peft_type, "changes nothing")


def check_sft_of_adapters_sees_the_models_loss() -> None:
    """Loss and gradient norm as by the adapted model itself."""
    _, table = (name.rpartition(".")[2] for name in head_and_table(load()))
    for chosen in (adapter(), adapter(target_modules=[table]), adapter(modules_to_save=["lm_head"])):
        torch.manual_seed(7)
        expected = own_numbers(peft.get_peft_model(load(), chosen))
        torch.manual_seed(7)
        model = peft.get_peft_model(load(), chosen)
        close(first(sft(model)), expected)
    refused(lambda: sft(load(), adapter=adapter(target_modules=["lm_head"])), "adapter to `lm_head` is not supported")


def check_prompts_are_tokens_and_prefixes_are_refused() -> None:
    """Prompt tuning ponders on its virtual tokens; prefix tuning has keys and values for one pass only."""
    tokens = torch.tensor([encoded(DOCUMENTS)[0][0]])
    for chosen in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    ):
        model = peft.get_peft_model(load(), chosen).eval()
        with torch.no_grad():
            prompt = model.get_prompt(1)
            embeds = torch.cat([prompt, model.get_input_embeddings()(tokens)], 1)
            expected = load()(inputs_embeds=embeds).logits
            torch.testing.assert_close(model(input_ids=tokens).logits, expected)
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
    prefix = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, num_attention_heads=2, token_dim=16
    )
    refused(
        lambda: peft.get_peft_model(load(), prefix)(input_ids=tokens),
        "prefix tuning, which fills a cache for one pass, needs pondering_steps=0",
    )
    peft.get_peft_model(load(pondering_steps=0), prefix)(input_ids=tokens)


def check_preparing_for_quantized_training() -> None:
    """What PEFT does to a model before adapters on quantized weights, as far as no GPU is needed."""
    model = peft.prepare_model_for_kbit_training(load())
    model.is_loaded_in_8bit = True
    model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(7)
    model = peft.get_peft_model(model, adapter())
    numbers = own_numbers(model)
    torch.manual_seed(7)
    close(numbers, own_numbers(peft.get_peft_model(load(), adapter())))


def log_probabilities(model: Any, prompt: str, completion: str) -> torch.Tensor:
    ((tokens, labels),) = encoded([{"prompt": prompt, "completion": completion}])
    found = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    targets = torch.tensor(labels[1:])
    return found.gather(-1, targets.clamp(min=0)[:, None])[:, 0][targets != -100]


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


def check_value_and_reward_heads() -> None:
    """A head of one's own reads the last pass; a stock classifier over the backbone is refused."""
    for architecture in ARCHITECTURES:
        model = load(architecture).eval()
        tokens = torch.tensor([encoded(DOCUMENTS)[0][0]])
        hidden = model(tokens, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(hidden, model.base_model(tokens).last_hidden_state)
    refused(
        lambda: transformers.AutoModelForSequenceClassification.from_pretrained(
            FOLDERS / "llama", trust_remote_code=True
        ),
        "Unrecognized configuration class",
    )


def check_quantized_heads_act_in_every_pass() -> None:
    """Those of torchao and bitsandbytes give the logits of the equations in which the module itself is called."""
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def with_bitsandbytes(model: Any, layer: Any, parameter: Any, **how: Any) -> None:
        weight = model.get_output_embeddings().weight.data.clone()
        rows, columns = weight.shape
        head = layer(columns, rows, bias=False, **how)
        head.weight = parameter(weight, requires_grad=False, **how)
        model.lm_head = head.to("cpu")

    ways = {
        "torchao int8": lambda m: quantize_(m, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "lm_head"),
        "bitsandbytes int8": lambda m: with_bitsandbytes(
            m, bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Int8Params, has_fp16_weights=False
        ),
        "bitsandbytes 4 bit": lambda m: with_bitsandbytes(m, bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Params4bit),
    }
    tokens = torch.tensor([encoded(DOCUMENTS)[1][0]])
    for way, put in ways.items():
        model = load().eval()
        before = model(tokens).logits
        put(model)
        head, table, scale = model.get_output_embeddings(), model.get_input_embeddings(), model.config.hidden_size**0.5
        with torch.no_grad():
            e = scale * model.config.initial_scale * table(tokens)
            for _ in range(model.config.pondering_steps):
                e = e + scale * head(model.base_model.one_pass(e).last_hidden_state).softmax(-1) @ table.weight
            expected = head(model.base_model.one_pass(e).last_hidden_state)
            got = model(tokens).logits
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3, msg=lambda said, way=way: f"{way}: {said}")
        assert (got - before).abs().max() > 1e-4, way


def check_liger_leaves_it_alone() -> None:
    """Its kernels are chosen by the type of the model, which is not a stock one."""
    import liger_kernel  # noqa: F401

    close(first(sft(load(), use_liger_kernel=True)), own_numbers(load()))


def main() -> None:
    """Run the checks named, or all, and print what was found."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    report: dict[str, Any] = {package.__name__: package.__version__ for package in (transformers, trl, peft)}
    for name in sys.argv[3:]:
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                globals()[f"check_{name}"]()
            report[name] = "right"
        except Exception:
            report[name] = traceback.format_exc()
        print(f"{name}: {time.process_time() - began:.1f} s", file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
