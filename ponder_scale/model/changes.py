"""What each pass changes, measured on a sample of the tokens: the signs of a pondering that has collapsed.

With e_s the input of pass s and q_s = softmax(head(f(e_s))) its prediction, over n sampled tokens:

    embed_norms[s]     mean |e_s|                                   s = 0..S
    update_norms[s]    mean |e_{s+1} - e_s|                         s = 0..S-1; that of the pondering embedding
    embed_cosines[s]   mean cos(e_s, e_{s+1})                       s = 0..S-1
    pass_kls[s]        mean KL(q_{s+1} || q_s) in nats              s = 0..S-1; what `exit_kl` is compared with

The KL divergences take one more product of the n tokens with the vocabulary a pass, which is why n is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PassChanges(NamedTuple):
    """The four above, fp32 without gradient."""

    embed_norms: Tensor  # (S + 1,)
    update_norms: Tensor  # (S,)
    embed_cosines: Tensor  # (S,)
    pass_kls: Tensor  # (S,)


class ChangeTracker:
    """Keeps the sampled rows of each pass's input and output, spread evenly over the tokens.

    Args:
        sample: tokens of a batch that are looked at, n; all of them where the batch has fewer.
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
        """The means over what was kept. `logits` is the head: it takes (n, D), returns (n, V)."""
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
