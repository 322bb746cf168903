"""The pondering embedding T = c * softmax(h W^T / tau) E, and the language-model loss, without an (N, V) matrix.

N tokens, D hidden size, V vocabulary; h (N, D) hidden states, W (V, D) head, E (V, D) embedding table (W may be E).
Several backends compute the same numbers:

    eager     the equation, which keeps (N, V) tensors for backward; the tests compare the others with it
    chunked   torch's own products, in blocks of tokens forward and of the vocabulary backward; any device
    sdpa      attention with query h, keys W and values E, by torch's CPU flash kernel
    triton    a kernel for each product, with the softmax inside it; CUDA
    top_k     only the K most probable tokens; needs `top_k`
    auto      the fastest of them for the device, the dtype and the arguments, see `choose_backend`
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators
from .backends import IGNORE_INDEX, Statistics, is_fake, label_loss, wide, width
from .operators import check_labels
from .tiles import is_whole, kernels_start

__all__ = ["BACKENDS", "IGNORE_INDEX", "Statistics", "choose_backend", "cross_entropy", "pondering_embedding"]

BACKENDS = ("auto", "eager", "chunked", "sdpa", "triton", "top_k")
FEW = 3  # tokens: for up to so many, a CPU reads head and table row by row


def pondering_embedding(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    top_k: int | None = None,
    labels: Tensor | None = None,
    learn: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Statistics | None]:
    """scale * softmax(hidden @ head^T / temperature) @ table, differentiable in all three tensors.

    Args:
        hidden: (..., D).
        head: (V, D), the rows of the output head.
        table: (V, D), the embedding table; may be the same tensor as `head`.
        top_k: use only the K largest probabilities, renormalised. None, or at least V, uses all.
        labels: (...,) next tokens, -100 where there is none. If given, the statistics are returned. They never change
            the result.
        learn: make the loss of each token differentiable in `hidden` and `head`. Needs labels. It takes no further
            product with the vocabulary, except for three in backward with `top_k`.
        backend: one of `BACKENDS`.

    Returns:
        The pondering embedding, (..., D), and the statistics of its N tokens. These are None without labels.

    Raises:
        ValueError: the backend is unknown or cannot do what is asked, the operands do not fit together, are on
            different devices or have no data, or a label is neither -100 nor a token.
        ImportError: triton is not installed, but its backend was asked for.
    """
    _check_operands(hidden=hidden, head=head, table=table)
    _check_softmax(temperature, top_k)
    if top_k is not None and top_k >= head.shape[0]:
        top_k, backend = None, "auto" if backend == "top_k" else backend
    hidden, head, table = _laid_out(hidden, head, table)
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), None if labels is None else labels.reshape(-1)  # (N, D)
    wanted = labels is not None
    decodes = not wanted and backend == "auto" and is_decoded(flat)
    if backend == "auto":
        backend = choose_backend(hidden, head, table, temperature=temperature, top_k=top_k, statistics=wanted)
    _check_backend(backend, top_k, hidden, statistics=wanted)
    _check_learning(learn, labels, backend, temperature)
    more = {"learn": True} if learn else {}  # without it, the operators are called without the arguments for learning
    if backend == "eager" or decodes:
        check_labels(labels, head.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            logits = row_logits(flat, head) if decodes else F.linear(wide(flat), wide(head))
            mixed, loss, entropy = mixture(
                logits, table, flat_labels, temperature=temperature, scale=scale, top_k=top_k, learn=learn
            )
    elif top_k is not None:
        mixed, loss, entropy, *_ = operators.top_k(flat, head, table, flat_labels, temperature, scale, top_k, **more)
    else:
        keep = _differentiated(flat, head, table)
        mixed, loss, entropy, *_ = operators.mixture(
            flat, head, table, flat_labels, temperature, scale, backend, table is head, keep, **more
        )
    return mixed.view(hidden.shape), Statistics(loss, entropy) if wanted else None


def cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, *, z_loss: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Statistics]:
    """The summed cross-entropy of softmax(hidden @ head^T), and its statistics per token.

    Args:
        hidden: (..., D).
        head: (V, D).
        labels: (...,) next tokens, -100 where there is none.
        z_loss: factor of the squared log-sum-exp of each labelled token, which is added to the sum. It keeps the logits
            from drifting (arXiv 2204.02311, section 5). The statistics do not include it.
        backend: "chunked", "triton", or "auto", which is triton where `choose_backend` takes it.

    Returns:
        The sum over labelled tokens, a scalar of at least fp32, differentiable in `hidden` and `head`. The statistics.

    Raises:
        ValueError: as for `pondering_embedding`.
    """
    _check_operands(hidden=hidden, head=head)
    hidden, head = (tensor.contiguous() for tensor in _autocast(hidden, head))
    if backend == "auto":
        backend = "triton" if _triton_is_fastest(hidden) else "chunked"
    if backend not in ("chunked", "triton"):
        raise ValueError(f"backend of the loss is {backend!r}; expected 'auto', 'chunked' or 'triton'")
    flat = hidden.reshape(-1, hidden.shape[-1])
    needed = _differentiated(flat), _differentiated(head)
    total, loss, entropy, *_ = operators.loss(flat, head, labels.reshape(-1), z_loss, backend, *needed)
    return total, Statistics(loss, entropy)


def choose_backend(
    hidden: Tensor, head: Tensor, table: Tensor, *, temperature: float, top_k: int | None, statistics: bool
) -> str:
    """The backend that "auto" means for these operands on this machine. It is the same at every step of a run.

    On the CPU, attention is fastest if it needs no statistics or gets them for free: without labels, or with W = E at
    temperature 1. Otherwise they would cost one more product with the vocabulary. In bf16 its kernel is slower.
    """
    if top_k is not None:
        return "top_k"
    if _triton_is_fastest(hidden):
        return "triton"
    free = not statistics or (head is table and temperature == 1.0)
    if free and hidden.dtype in (torch.float32, torch.float64) and _attention_refusal(hidden) is None:
        return "sdpa"
    return "chunked"


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _triton_is_fastest(hidden: Tensor) -> bool:
    return hidden.is_cuda and _kernels_take(hidden.device, hidden.dtype, hidden.shape[-1])


@torch.compiler.assume_constant_result  # the compiler need not look into it
def _kernels_take(device: torch.device, dtype: torch.dtype, columns: int) -> bool:
    return kernels_start(device, dtype) and is_whole(columns)


def _attention_refusal(hidden: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"tensors on {hidden.device.type}, where the head width of flash attention is bounded"
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "a torch without a flash kernel for the CPU"
    if hidden.numel() == 0:
        return "no tokens, by which its kernel divides"
    return None


def _check_operands(**operands: Tensor) -> None:
    """Raise ValueError unless all have data, are on one device and have the shapes (..., D) and, after it, (V, D)."""
    hidden, *matrices = operands.values()
    for name, tensor in operands.items():
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device, so it has no data; load the weights, or call the module that holds "
                "them instead of reading its weight"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, but hidden on {hidden.device}; move them to one device")
        if tensor is not hidden and tensor.shape != (*matrices[0].shape[:1], hidden.shape[-1]):
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}; expected one row of width {hidden.shape[-1]} for each "
                "token of the vocabulary; if ZeRO-3 keeps it partitioned, gather it first"
            )


def _check_softmax(temperature: float, top_k: int | None) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; expected more than 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; expected at least 1, or None")


def _check_backend(backend: str, top_k: int | None, hidden: Tensor, *, statistics: bool) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "top_k" and top_k is None:
        raise ValueError("backend 'top_k' needs top_k, the number of probabilities kept")
    if backend in ("sdpa", "triton") and top_k is not None:
        raise ValueError(f"backend {backend!r} mixes the whole vocabulary; with top_k={top_k} use 'auto' or 'top_k'")
    refusal = _attention_refusal(hidden) if backend == "sdpa" else None
    if backend == "sdpa" and statistics and hidden.dtype not in (torch.float32, torch.float64):
        # torch's kernel gives the mean and the log-sum-exp in the inputs' dtype
        refusal = f"labels with {hidden.dtype}, in which the entropies would be wrong by up to a hundred nats"
    if refusal is not None:
        raise ValueError(f"backend 'sdpa' cannot take {refusal}; use 'auto'")


def _check_learning(learn: bool, labels: Tensor | None, backend: str, temperature: float) -> None:
    if learn and labels is None:
        raise ValueError("learn needs labels, because the loss to learn from is theirs")
    if learn and backend == "sdpa" and temperature != 1.0:
        raise ValueError(
            f"backend 'sdpa' cannot learn from a loss at a temperature of {temperature}, because its backward has only "
            "one softmax; use 'auto'"
        )


def _laid_out(hidden: Tensor, head: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands in autocast's dtype and contiguous, as all kernels need them. If W is E, it stays one tensor."""
    tied = head is table
    hidden, head, *untied = (part.contiguous() for part in _autocast(hidden, head, *(() if tied else (table,))))
    return hidden, head, head if tied else untied[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands in autocast's dtype, if it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def is_decoded(hidden: Tensor) -> bool:
    """Whether these are few tokens, (n, D), without gradients on a CPU, so that `row_logits` and `_mean_rows` are fast.

    The products of a CPU's library are slow for a few rows: they read a table at a third of the speed of memory.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():
        return hidden.shape[0] == 1 and hidden.device.type == "cpu" and hidden.dtype == torch.float32
    return _are_few(hidden)


def _are_few(rows: Tensor) -> bool:
    few = 0 < rows.shape[0] <= FEW and rows.device.type == "cpu" and rows.dtype == width(rows)
    return few and not is_fake(rows)


def row_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """The logits (n, V) of decoded tokens (n, D) and a head of one dtype. Nothing is differentiated."""
    if torch.compiler.is_compiling():
        return (head * hidden).sum(-1).unsqueeze(0)  # from this the compiler makes loops
    # The derivative of `_mean_rows` with respect to its weights is these dot products, and torch has a kernel for it.
    tokens, vocabulary = hidden.shape[0], head.shape[0]
    rows = torch.arange(vocabulary).repeat(tokens)
    sums = torch.arange(tokens).repeat_interleave(vocabulary)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(hidden, head, rows, rows, sums, 0)
    return dots.view(tokens, vocabulary)


def _mean_rows(p: Tensor, table: Tensor, tokens: Tensor | None) -> Tensor:
    """p E[tokens], (n, D), of p and tokens (n, K) and E (V, D) in one dtype. Without tokens K is V, in order.

    Nothing is differentiated.
    """
    if tokens is None and not _are_few(p):
        return torch.mm(p, table)
    if tokens is None:
        tokens = torch.arange(table.shape[0], device=table.device).expand(p.shape)
    return F.embedding_bag(tokens, table, mode="sum", per_sample_weights=p)


def mixture(
    logits: Tensor,
    table: Tensor,
    labels: Tensor | None,
    *,
    temperature: float,
    scale: float,
    top_k: int | None,
    learn: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equation itself, with logits (N, V): the pondering embedding (N, D), and the loss and entropy of each token.

    The entropies have no gradient. The losses have one only with `learn`.
    """
    logits = wide(logits)
    scaled, index = logits / temperature, None
    if top_k is not None and top_k < logits.shape[-1]:
        scaled, index = scaled.topk(top_k, dim=-1)
    probabilities = torch.softmax(scaled, dim=-1)  # (N, V), or (N, K)
    p = probabilities.to(table.dtype)
    if torch.is_grad_enabled():
        every = p if index is None else p.new_zeros(logits.shape).scatter(1, index, p)
        mixed = (every @ table) * scale
    else:
        mixed = _mean_rows(p, table, index).mul_(scale)
    if labels is None:
        return mixed, logits.new_empty(0), logits.new_empty(0)
    loss = label_loss(logits, labels, logits.logsumexp(-1)) if learn else None
    with torch.no_grad():
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1)
        loss = label_loss(logits, labels, logits.logsumexp(-1)) if loss is None else loss
    return mixed, loss, entropy
