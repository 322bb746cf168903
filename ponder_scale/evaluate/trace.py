"""Show what each pass predicts after each token of a text, in the terminal and as a page with a heat map."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ponder_scale.config import INTERLEAVED
from ponder_scale.errors import ConfigError
from ponder_scale.evaluate.generate import load_folder, within
from ponder_scale.runs.page import page

CONTENT = Path(__file__).with_name("trace.html")
TOP = 5


@dataclass(frozen=True)
class Belief:
    """What a pass predicts after a token.

    Args:
        top: the most probable next tokens, with their probabilities.
        entropy: entropy of the prediction, in nats.
        kl_to_last: KL(last pass || this pass), in nats.
        change: change of the embedding that the pass was given, |e_s - e_{s-1}| / |e_{s-1}|. It is 0 in the first pass.
        loss: -log p of the token that follows, in nats. None after the last token.
        halted: the token had halted before the pass, so this is what it predicted then.
    """

    top: list[tuple[str, float]]
    entropy: float
    kl_to_last: float
    change: float
    loss: float | None
    halted: bool = False


@dataclass(frozen=True)
class Trace:
    """The tokens of a text, and for each token the belief of each of the S + 1 passes."""

    tokens: list[str]
    beliefs: list[list[Belief]]


def trace_folder(
    folder: Path, text: str, *, steps: int | None, html_file: Path | None, trust_remote_code: bool = False
) -> Trace:
    """Print the trace of a text by an exported folder. If `html_file` is given, also write it as a page.

    Raises:
        ConfigError: the text has no tokens, or more tokens than the model has positions.
    """
    model, tokenizer = load_folder(folder, trust_remote_code=trust_remote_code)
    ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False).input_ids.to(model.device)
    most = model.config.max_position_embeddings
    if not 1 <= ids.shape[1] <= most:
        raise ConfigError(f"--text has {ids.shape[1]} tokens; expected 1 to {most}, the positions of the model")
    if model.config.feedback in INTERLEAVED:
        raise ConfigError(
            f"{folder}: its feedback is {model.config.feedback}, which adds positions, but trace shows what passes "
            "over the same positions change; use evaluate ppl for the losses of its positions"
        )
    if steps is not None and steps < 0:
        raise ConfigError(f"--pondering-steps is {steps}; expected at least 0")
    trace = trace_tokens(model, tokenizer, ids, steps)
    print(as_text(trace))
    if html_file is not None:
        content = CONTENT.read_text(encoding="utf-8")
        html_file.write_text(page(f"What {folder.name} ponders", content, asdict(trace)), encoding="utf-8")
        print(f"wrote {html_file}")
    return trace


@torch.no_grad()
def trace_tokens(model: Any, tokenizer: Any, ids: Tensor, steps: int | None = None) -> Trace:
    """The trace of token ids (1, T). `steps` replaces the configuration's S."""
    embeds, log_p = _passes(model, ids, steps)  # (S + 1, T, D), (S + 1, T, V)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)  # (S + 1, T)
    kl = (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1).clamp(min=0)
    change = torch.zeros_like(entropy)
    change[1:] = (embeds[1:] - embeds[:-1]).norm(dim=-1) / embeds[:-1].norm(dim=-1)
    losses = -log_p[:, :-1].gather(-1, ids[0, 1:].view(1, -1, 1).expand(len(log_p), -1, -1)).squeeze(-1)
    best = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1)
    halted = torch.zeros_like(entropy, dtype=torch.bool)
    if getattr(model.config, "halting", "none") != "none":
        halted[1:] = (log_p[1:] == log_p[:-1]).all(-1)

    def belief(index: int, token: int) -> Belief:
        names = [tokenizer.decode([number]) for number in best.indices[index, token].tolist()]
        top = list(zip(names, best.values[index, token].exp().tolist(), strict=True))
        loss = losses[index, token].item() if token + 1 < ids.shape[1] else None
        entropy_, kl_, change_ = (values[index, token].item() for values in (entropy, kl, change))
        return Belief(top, entropy_, kl_, change_, loss, bool(halted[index, token]))

    tokens = [tokenizer.decode([number]) for number in ids[0].tolist()]
    return Trace(tokens, [[belief(i, t) for i in range(len(log_p))] for t in range(len(tokens))])


def _passes(model: Any, ids: Tensor, steps: int | None) -> tuple[Tensor, Tensor]:
    """The input embeddings (S + 1, T, D) and the log-probabilities (S + 1, T, V) of each pass, fp32 on the CPU."""
    given: list[Tensor] = []
    said: list[Tensor] = []

    def watched(run_pass: Any, embeds: Tensor, *arguments: Any, **keywords: Any) -> Any:
        output = run_pass(embeds, *arguments, **keywords)
        logits = model.get_output_embeddings()(output.last_hidden_state[0])
        given.append(embeds[0].float().cpu())
        said.append(logits.float().log_softmax(-1).cpu())
        return output

    with within(model, watched):
        model(ids, pondering_steps=steps, logits_to_keep=1)
    return torch.stack(given), torch.stack(said)


def as_text(trace: Trace) -> str:
    """A line for each token and pass: the three most probable next tokens, entropy, KL to the last pass, change."""
    width = max(len(repr(token)) for token in trace.tokens)
    lines = [f"{'token':{width}}  pass  entropy  KL to last  change  loss    most probable next"]
    for token, beliefs in zip(trace.tokens, trace.beliefs, strict=True):
        for index, belief in enumerate(beliefs):
            top = "halted" if belief.halted else "  ".join(f"{name!r} {p:.2f}" for name, p in belief.top[:3])
            loss = "-" if belief.loss is None else f"{belief.loss:.3f}"
            name = repr(token) if index == 0 else ""
            numbers = f"{belief.entropy:7.3f}  {belief.kl_to_last:10.4f}  {belief.change:6.3f}  {loss:6}"
            lines.append(f"{name:{width}}  {index:4}  {numbers}  {top}")
    return "\n".join(lines)
