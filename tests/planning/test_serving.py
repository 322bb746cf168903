"""What a server keeps, against transformers' own cache and by hand."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from ponder_scale.errors import ConfigError
from ponder_scale.planning.serving import plan_serving, report, token_bytes
from tests.model.architectures import TINY, make


@pytest.mark.parametrize("architecture", TINY)
def test_a_token_takes_what_the_caches_of_all_passes_hold(architecture: str) -> None:
    model = make(architecture, pondering_steps=3).eval()
    cache, tokens = DynamicCache(), 5
    with torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert len(cache.layers) == 4 * model.config.num_hidden_layers
    assert token_bytes(model.config, width=4) * tokens == held


def test_devices_divide_weights_and_heads() -> None:
    config = make("llama", pondering_steps=1).config  # 4 heads, 2 of keys and values, width 32, 2 layers
    one, two, four = (plan_serving(config, ranks) for ranks in (1, 2, 4))
    assert one.token_bytes == 2 * 2 * 2 * 2 * 8 * 2
    assert two.token_bytes == four.token_bytes == one.token_bytes // 2  # a head of keys is on two of four
    assert two.weights_bytes == -(-one.weights_bytes // 2)
    with pytest.raises(ConfigError, match="--serve is 3; expected a number of devices that divides the 4"):
        plan_serving(config, 3)


def test_what_the_plugin_refuses_is_not_planned_and_what_it_leaves_out_takes_nothing() -> None:
    for fields in ({"feedback": "latent"}, {"feedback": "pause"}, {"feedback": "both"}, {"halting": "exit"}):
        ((field, value),) = fields.items()
        with pytest.raises(ConfigError, match=f"model.{field} is {value}, which the vLLM plugin does not serve"):
            plan_serving(make("llama", pondering_steps=1, **fields).config, 1)
    plain, heads = (plan_serving(make("llama", pondering_steps=1, extra_heads=n).config, 1) for n in (0, 2))
    assert heads == plain


def test_what_fits_is_counted_in_tokens_and_requests() -> None:
    plan = plan_serving(make("llama", pondering_steps=1).config, 1)
    memory = (plan.weights_bytes + 160 * plan.token_bytes) / 0.92 + 1
    assert plan.tokens(memory) == 160
    assert "160 tokens on h100" in report(plan, 64, device="h100", memory_bytes=memory)[1]
    assert report(plan, 64, device="h100", memory_bytes=memory)[1].endswith("2 requests of 64 tokens at a time")
    assert report(plan, 64, device="h100", memory_bytes=1000)[-1].startswith("warning: not one request of 64 tokens")
