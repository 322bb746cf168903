"""The harness's model class for a model that several ranks hold. The ranks share the work on its requests.

The harness builds all requests of all tasks on every rank and scores all answers there. Prompts, drawn examples and
metrics therefore equal those of one process. Only the answering is split, request by request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from ponder_scale.harness.find import in_a_line, transformers_class


def shared_model(
    model: Any, tokenizer: Any, *, batch_size: int, group: Any, alive: Callable[[], None] = lambda: None
) -> Any:
    """Wrap the model for the harness. Call this on all ranks, and run every evaluation on all ranks.

    Args:
        group: the ranks that share the requests, a group for objects on the CPU. None if there is one rank.
        alive: called for each batch.
    """
    base: Any = transformers_class("evaluate.tasks")

    class Shared(base):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return _share(super().loglikelihood, requests, group)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return _share(super().loglikelihood_rolling, requests, group)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return _share(super().generate_until, requests, group)

        def _model_call(self, *arguments: Any, **options: Any) -> Any:
            alive()
            return super()._model_call(*arguments, **options)

        def _model_generate(self, *arguments: Any, **options: Any) -> Any:
            alive()
            return super()._model_generate(*arguments, **options)

    return Shared(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _share(answer: Callable[..., Sequence[Any]], requests: Sequence[Any], group: Any) -> list[Any]:
    """The answers to all requests, on every rank. If one rank fails, all of them raise."""
    if group is None:
        return list(answer(requests, disable_tqdm=True))
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    own, found, failure = requests[rank::ranks], [], None
    try:
        found = list(answer(own, disable_tqdm=True)) if own else []
    except Exception as error:
        failure = error
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, (found, failure and f"{type(failure).__name__}: {in_a_line(failure)}"), group)
    failed = [(number, said) for number, (_, said) in enumerate(parts) if said]
    if failed:
        raise failure or RuntimeError(f"rank {failed[0][0]}: {failed[0][1]}")
    answers: list[Any] = [None] * len(requests)
    for number, (part, _) in enumerate(parts):
        answers[number::ranks] = part
    return answers
