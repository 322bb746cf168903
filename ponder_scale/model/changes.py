"""Measure what each pass changes on a sample of the tokens. This shows whether pondering has collapsed.

With e_s the input of pass s and q_s = softmax(head(f(e_s))) its prediction, over n sampled tokens:

    embed_norms[s]     mean |e_s|                                   s = 0..S
    update_norms[s]    mean |e_{s+1} - e_s|                         s = 0..S-1; the norm of the pondering embedding
    embed_cosines[s]   mean cos(e_s, e_{s+1})                       s = 0..S-1
    pass_kls[s]        mean KL(q_{s+1} || q_s) in nats              s = 0..S-1; `exit_kl` is compared with it

The KL divergences take one more product of the n tokens with the vocabulary in each pass, so n is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PassChanges(NamedTuple):
    """The four measurements above, in fp32 and without gradient."""

    embed_norms: Tensor  # (S + 1,)
    update_norms: Tensor  # (S,)
    embed_cosines: Tensor  # (S,)
    pass_kls: Tensor  # (S,)


class ChangeTracker:
    """Keeps rows of each pass's input and output, sampled evenly over the tokens.

    Args:
        sample: number n of tokens of a batch to sample. If the batch has fewer, all of them are used.
    """

    def __init__(self, sample: int) -> None:
        self._sample = sample
        self._embeds: list[Tensor] = []
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def saw(self, embeds: Tensor, hidden: Tensor) -> None:
        """Keep the sampled rows of a pass: input and output (B, T, D)."""
        tokens = embeds.shape[0] * embeds.shape[1]
        count = min(self._sample, tokens)
        rows = torch.arange(count, device=embeds.device) * tokens // count
        self._embeds.append(embeds.flatten(0, 1)[rows].float())  # (n, D)
        self._hidden.append(hidden.flatten(0, 1)[rows])

    @torch.no_grad()
    def changes(self, logits: Callable[[Tensor], Tensor]) -> PassChanges:
        """The means over the sampled rows. `logits` is the head, which takes (n, D) and returns (n, V)."""
        norms = torch.stack([e.norm(dim=-1).mean() for e in self._embeds])
        updates, cosines, kls = [], [], []
        before = logits(self._hidden[0]).float().log_softmax(-1)  # (n, V)
        for index in range(1, len(self._embeds)):
            last, e = self._embeds[index - 1], self._embeds[index]
            updates.append((e - last).norm(dim=-1).mean())
            cosines.append(torch.cosine_similarity(e, last, dim=-1).mean())
            after = logits(self._hidden[index]).float().log_softmax(-1)
            kls.append((after.exp() * (after - before)).sum(-1).mean())
            before = after
        empty = norms.new_empty(0)
        return PassChanges(norms, *(torch.stack(some) if some else empty for some in (updates, cosines, kls)))
