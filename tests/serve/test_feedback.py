"""The feedback of a vocabulary in parts, on real ranks, against the equation in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from ponder_scale.model import backends
from ponder_scale.model.pondering_embedding import pondering_embedding
from ponder_scale.serve.feedback import Mixing, mix, mix_parts
from tests.model.inside import Inside

RANKS = 2
TOKENS, WIDTH = 12, 8


class _Group:
    def gather(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=-1)

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor


class Alone:
    """A rank that has all of the vocabulary."""

    def gather(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        return tensor

    sum = gather


def operands(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, WIDTH), (vocabulary, WIDTH), (vocabulary, WIDTH)
    hidden, head, table = (torch.randn(*shape, generator=generator) for shape in shapes)
    return hidden, head, table


def equation(vocabulary: int, mixing: Mixing) -> Tensor:
    hidden, head, table = (tensor.double() for tensor in operands(vocabulary))
    z = hidden @ head.t()
    if mixing.top_k is not None and mixing.top_k < vocabulary:
        least = z.topk(mixing.top_k, dim=-1).values[:, -1:]
        z = z.masked_fill(z < least, -torch.inf)
    return mixing.scale * torch.softmax(z / mixing.temperature, dim=-1) @ table


def feed_back(rank: int, settings: list[dict[str, Any]], out: Path) -> None:
    """What a rank computes, in a process of its own; the ranks of training's tests would need its packages."""
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=RANKS)
    found = []
    for case in settings:
        vocabulary, part = case["vocabulary"], case["part"]
        backends.CPU_CHUNK_ELEMENTS = case["block"]
        hidden, head, table = operands(vocabulary)
        own = slice(min(rank * part, vocabulary), min((rank + 1) * part, vocabulary))
        mixing = Mixing(case["temperature"], case["scale"], case["top_k"])
        given = hidden, head[own], table[own], mixing
        found.append(mix_parts(*given, ranks=_Group(), rank=rank, part=part, vocabulary=vocabulary).tolist())
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_parts_of_a_vocabulary_give_the_feedback_of_the_whole(tmp_path: Path) -> None:
    settings = [
        {"vocabulary": vocabulary, "part": 32, "block": block, "temperature": 0.7, "scale": 3.0, "top_k": top_k}
        # 174: five rows of a part, but six of the 29 that the second rank has of 61 tokens
        for vocabulary, block in ((61, 174), (61, 10**6), (32, 174), (20, 174))
        for top_k in (None, 1, 5, 29, 40, 61, 1000)
    ]
    torch.multiprocessing.spawn(feed_back, (settings, tmp_path), nprocs=RANKS)
    for rank in range(RANKS):
        found = json.loads(Path(tmp_path, f"{rank}.json").read_text())
        for case, mixed in zip(settings, found, strict=True):
            expected = equation(case["vocabulary"], Mixing(case["temperature"], case["scale"], case["top_k"]))
            torch.testing.assert_close(torch.tensor(mixed).double(), expected, rtol=1e-4, atol=1e-5, msg=str(case))


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_prefill_of_thousands_of_tokens_never_holds_its_scores(top_k: int | None) -> None:
    tokens, vocabulary = 8192, 4096

    hidden, head = torch.randn(tokens, WIDTH), torch.randn(vocabulary, WIDTH)

    mixing = Mixing(1.0, 1.0, top_k)
    with torch.inference_mode(), Inside() as inside:
        whole = mix(hidden, head, head, mixing)
        parts = mix_parts(hidden, head, head, mixing, ranks=Alone(), rank=0, part=vocabulary, vocabulary=vocabulary)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    assert vocabulary <= inside.largest <= backends.CPU_CHUNK_ELEMENTS < tokens * vocabulary


@pytest.mark.parametrize(("top_k", "sums"), [(None, 2), (5, 1)])
def test_a_pass_takes_one_gather_and_two_sums_or_one_with_top_k(top_k: int | None, sums: int) -> None:
    called: list[str] = []

    class Counting(Alone):
        def gather(self, tensor: Tensor) -> Tensor:
            """See `Ranks`."""
            called.append("gather")
            return tensor

        def sum(self, tensor: Tensor) -> Tensor:
            """See `Ranks`."""
            called.append("sum")
            return tensor

    hidden, head, table = operands(61)
    mix_parts(hidden, head, table, Mixing(1.0, 1.0, top_k), ranks=Counting(), rank=0, part=61, vocabulary=61)
    assert called == ["gather"] + ["sum"] * sums


# they ask the device for a value or for a size that depends on values, which a CUDA graph cannot hold
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "repeat_interleave"}


@pytest.mark.parametrize("top_k", [None, 5])
def test_no_operation_of_the_feedback_waits_for_the_device(top_k: int | None) -> None:
    hidden, head, table = operands(61)
    backend = "chunked" if top_k is None else "top_k"  # on a GPU, where the kernels do not start
    mixing = Mixing(0.7, 3.0, top_k)
    with torch.inference_mode(), Inside() as inside:
        pondering_embedding(hidden, head, table, temperature=0.7, scale=3.0, top_k=top_k, backend=backend)
        mix_parts(hidden, head, table, mixing, ranks=Alone(), rank=0, part=61, vocabulary=61)
    assert inside.called & {"mm", "linear"} and not inside.called & WAITING, inside.called


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [None, 5])
def test_a_cuda_graph_holds_the_feedback_and_gives_it_again_for_other_tokens(
    top_k: int | None, dtype: torch.dtype
) -> None:
    mixing, vocabulary = Mixing(0.7, 3.0, top_k), 5003
    hidden, head, table, others = (torch.randn(rows, 256, device="cuda", dtype=dtype) for rows in (48, 5003, 5003, 48))
    for function in (
        lambda: mix(hidden, head, table, mixing),
        lambda: mix_parts(hidden, head, table, mixing, ranks=Alone(), rank=0, part=vocabulary, vocabulary=vocabulary),
    ):
        with torch.inference_mode():
            function()  # compiles the kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                mixed = function()
            hidden.copy_(others)
            graph.replay()
            torch.testing.assert_close(mixed, function())
