"""Self-speculative decoding with the extra heads (arXiv 2404.19737, section 3.2).

A forward predicts the next token and, by its heads, the n tokens after it. These are a draft. The next forward reads
them all at once, keeps those that it would have said itself, adds the token that follows them, and drafts again:

    read   x_t d_1 d_2 .. d_n        d_i of head i at the token before x_t
    say    y_0 y_1 y_2 .. y_n        y_i from x_t d_1 .. d_i
    keep   y_0 .. y_m                m = how many d_1 = y_0, d_2 = y_1, ... agree from the first on

So each forward gives m + 1 tokens. A token that is sampled is drawn from the model's own distribution, and a draft only
stands where it is what was drawn. So greedy text is that of plain decoding, and sampled text has its distribution.

`generate` takes this as `custom_generate`, in all versions of transformers that we support. Their generators of drafts
differ from version to version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .cache import check_growing
from .compat import CACHE_NAMES

# What `generate` passes on and this loop makes itself, after a check.
MADE_HERE = frozenset({*CACHE_NAMES, "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep"})


class HeadDrafts:
    """The argument `custom_generate` of `generate`, for one sequence at a time.

    Args:
        streamer: gets the prompt and each token. Versions of transformers from 4.57 on do not pass the `streamer` of
            `generate` on, so give it here.

    Attributes:
        proposed, accepted: number of drafted tokens that were read so far, and of those that were kept.
    """

    def __init__(self, streamer: Any = None) -> None:
        self.proposed = self.accepted = 0
        self._streamer = streamer

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        synced_gpus: bool = False,
        **options: Any,
    ) -> Tensor:
        """The prompt (1, T) and its continuation.

        Raises:
            ValueError: `generate` was asked for something that this loop does not do.
        """
        _check(input_ids, generation_config, synced_gpus, options)
        cache = next((options[name] for name in CACHE_NAMES if options.get(name) is not None), None)
        if cache is None and options.get("use_cache"):
            cache = DynamicCache()  # transformers 5.0 leaves the usual one to the model
        check_growing(cache, "custom_generate with drafts of the heads")
        assert cache is not None
        if self._streamer is not None:
            streamer = self._streamer
            streamer.put(input_ids.cpu())
        steps = options.get("pondering_steps")
        text, done = input_ids, False
        new, drafts = text[:, int(cache.get_seq_length()) :], text[:, :0]
        while not done:
            output = model(
                torch.cat([new, drafts], 1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=drafts.shape[1] + 1,
                extra_logits=True,
                pondering_steps=steps,
            )
            said = 0
            while not done:
                scores = logits_processor(text, output.logits[:, said].to(torch.float32, copy=True))
                token = _chosen(scores, sample=generation_config.do_sample)  # (1,)
                text = torch.cat([text, token.unsqueeze(1)], 1)
                if streamer is not None:
                    streamer.put(token.cpu())
                done = bool(stopping_criteria(text, None).all())
                if said == drafts.shape[1] or token.item() != drafts[0, said].item():
                    break
                said += 1
            self.proposed += drafts.shape[1]
            self.accepted += said
            # the last token has not been read, and neither have the drafts after it
            if (surplus := int(cache.get_seq_length()) - text.shape[1] + 1) > 0:
                cache.crop(-surplus)
            room = max(0, generation_config.max_length - text.shape[1] - 1)  # a forward adds a token of its own
            new, drafts = text[:, -1:], output.extra_logits[:room, 0, min(said, drafts.shape[1])].argmax(-1).view(1, -1)
        if streamer is not None:
            streamer.end()
        return text


def _chosen(scores: Tensor, *, sample: bool) -> Tensor:
    """The next token, (1,), by scores (1, V)."""
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sample else scores.argmax(-1)


def _check(input_ids: Tensor, config: Any, synced_gpus: bool, options: dict[str, Any]) -> None:
    """Raise ValueError for what this loop would silently do otherwise than `generate`."""
    mask, positions = options.get("attention_mask"), options.get("position_ids")
    rows, length = input_ids.shape
    unknown = [name for name, value in options.items() if value is not None and name not in MADE_HERE]
    refused = {
        "inputs_embeds": options.get("inputs_embeds") is not None,
        "exit_kl, because the heads read the last pass": options.get("exit_kl") is not None,
        f"num_beams={config.num_beams}": (config.num_beams or 1) > 1,
        f"a batch of {rows} sequences": rows != 1,
        "an empty prompt": length == 0,
        "padding": mask is not None and not bool(mask.all()),
        "position_ids of your own": positions is not None
        and positions.flatten().tolist() != list(range(length))[-positions.shape[-1] :],
        "return_dict_in_generate": bool(config.return_dict_in_generate),
        "synced_gpus": synced_gpus,
        **{name: name != "pondering_steps" for name in unknown},
    }
    for what, found in refused.items():
        if found:
            raise ValueError(
                f"drafts of the extra heads do not go with {what}; leave out custom_generate, or give one sequence"
            )
