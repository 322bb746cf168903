"""Exported folders in the hands of PEFT: each function `check_...` proves what its docstring says."""

from __future__ import annotations

from typing import Any

import peft
import torch
from hands import (
    ARCHITECTURES,
    DOCUMENTS,
    adapter,
    close,
    encoded,
    first,
    load,
    own_numbers,
    refused,
    sft,
)


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
