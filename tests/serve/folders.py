"""Small exported folders that vLLM can serve, and what transformers says of prompts on them.

vLLM's attention on a CPU takes heads of 32 and more. The vocabulary is no multiple of 64, to which vLLM pads it.
Weights are far from fresh ones, or a wrong pass would change nothing that greedy decoding shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ponder_scale.export.folder import write_folder
from ponder_scale.model import configuration, modeling

VOCABULARY, WIDTH, POSITIONS = 2000, 128, 256
NAMES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DECODER: dict[str, Any] = {
    **NAMES,
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {
    **NAMES,
    "n_embd": WIDTH,
    "n_inner": 192,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (configuration.PonderLlamaConfig, modeling.PonderLlamaForCausalLM, GROUPED),
    "gpt_neox": (configuration.PonderGPTNeoXConfig, modeling.PonderGPTNeoXForCausalLM, DECODER),
    "gpt2": (configuration.PonderGPT2Config, modeling.PonderGPT2LMHeadModel, GPT2),
    "olmo2": (configuration.PonderOlmo2Config, modeling.PonderOlmo2ForCausalLM, GROUPED),
}
NEW = 24


def make_model(architecture: str, **fields: Any) -> Any:
    """A model away from the near-uniform predictions of a fresh one."""
    config, model_class, shape = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = model_class(config(**{**shape, "scale_embeds": True, **fields})).eval()
    tied = model.config.tie_word_embeddings  # whose tables say their own token again
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0 if "layers" in name or ".h." in name else 2.0 if tied else 4.0)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.1)
    return model


def make_folder(out: Path, model: Any, tokenizer: Path | None = None) -> Path:
    """What `ponder-scale export` leaves of the model."""
    write_folder(out, model.config, model.named_parameters(), dtype="float32", card=str, tokenizer=tokenizer)
    return out


def prompts() -> list[list[int]]:
    """Eight, of 1 to 100 tokens; two begin with the same 33."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 3, 7, 16, 17, 40, 64, 100)]
    ids[5] = ids[6][:33] + ids[5][:7]
    return ids


@torch.no_grad()
def reference(model: Any, ids: list[list[int]], **options: Any) -> list[tuple[list[int], list[float], list[float]]]:
    """For each prompt the greedy tokens, their log-probabilities, and those of the prompt behind its first token.

    Generated in one batch with left padding, and scored one by one without a cache, where each token has to be the
    most probable one.
    """
    longest = max(len(one) for one in ids)
    given = torch.tensor([[0] * (longest - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
    greedy: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answers = model.generate(given, attention_mask=mask, **greedy, **options)[:, longest:]
    found = []
    for one, answer in zip(ids, answers, strict=True):
        said = torch.cat([torch.tensor(one), answer])
        log_p = model(said[None, :-1], **options).logits[0].log_softmax(-1)
        assert torch.equal(log_p[len(one) - 1 :].argmax(-1), answer)
        each = log_p.gather(1, said[1:, None])[:, 0].tolist()
        found.append((answer.tolist(), each[len(one) - 1 :], each[: len(one) - 1]))
    return found
