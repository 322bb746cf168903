"""Heads that are not the model's own, and kernels: each function `check_...` proves what its docstring says."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hands import (
    ARCHITECTURES,
    DOCUMENTS,
    FOLDERS,
    close,
    encoded,
    first,
    load,
    own_numbers,
    refused,
    sft,
)


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
