"""transformers' own tensor parallelism: head and table are sharded there, and asked as modules they say the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.model.architectures import TINY, make_confident
from tests.ranks import run_ranks

TOKENS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def on_a_rank(case: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = TINY["llama"].model.from_pretrained(case["folder"], tp_plan="auto").eval()
    with torch.no_grad():
        output = model(TOKENS, labels=TOKENS)
        hidden = model.base_model(input_ids=TOKENS).last_hidden_state
        through_head = model.get_output_embeddings()(hidden)
        greedy = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return {
        "sharded": type(model.get_output_embeddings().weight).__name__,
        "logits": output.logits.tolist(),
        "losses": output.pass_losses.tolist(),
        "through_head": through_head.tolist(),
        "greedy": greedy.tolist(),
    }


def test_a_model_over_two_ranks_says_what_it_says_on_one(tmp_path: Path) -> None:
    model = make_confident("llama", pondering_steps=2, scale_embeds=True, vocab_size=60)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        output = model(TOKENS, labels=TOKENS)
        greedy = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    (ranks,) = run_ranks(on_a_rank, [{"folder": str(tmp_path)}])
    for rank in ranks:
        assert "error" not in rank, rank
        assert rank["sharded"] == "DTensor" and rank["greedy"] == greedy.tolist()
        for name, expected in (("logits", output.logits), ("through_head", output.logits)):
            torch.testing.assert_close(torch.tensor(rank[name]), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(torch.tensor(rank["losses"]), output.pass_losses, atol=1e-3, rtol=1e-3)
