"""Write the model card of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ponder_scale.checkpoint.find import average_since
from ponder_scale.config import INTERLEAVED
from ponder_scale.figures import perplexity, shown
from ponder_scale.model.compat import NEWEST, OLDEST
from ponder_scale.setup.build import configuration_from_dict

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pondering]
{licence}---

# {name}

A pondering language model ([PonderLM: Pretraining Language Models to Ponder in Continuous
Space](https://arxiv.org/abs/2505.20674)): the transformer runs {passes} times for each token; {feedback}.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`generate(pondering_steps=k)` runs k pondering steps instead of {steps}. `generate(assistant_model=model.draft(0))`
gives the same text, drafted by the same weights without pondering. {exits} Continuous
batching (`generate_batch`) is refused: its cache has one slot a layer, and a pondering model needs one for each pass.
`SHA256SUMS` is for `sha256sum -c`.

## In other tools

Tested with {tested}.

Raises an error, because it would be silently wrong:

{refused}

No error can tell you of the following, so do not do it. If you load the folder with a stock class, such as
`LlamaForCausalLM`, or override `architectures` (as vLLM's `--hf-overrides` can), the same weights never ponder.
"""

# The versions that the tests run with. tests/export/test_finetuning.py compares them with those that really ran.
TESTED = {
    "transformers": f"{OLDEST} to {NEWEST}",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "lm_eval": "0.4.13",
}
_TESTED_FOR = {
    "trl": " (SFT with packing and padding-free, DPO, KTO, GRPO)",
    "peft": " (LoRA, DoRA, IA3, VeRA, OFT, trained tokens, prompt tuning)",
    "accelerate": " (offloading)",
}
REFUSED = (
    "`AutoModel`, and servers that build the bare backbone, because one key-value slot for each layer is too few",
    "a cache that was filled with another number of pondering steps, as in prefix tuning",
    "an argument that neither this model nor its backbone knows",
    "`use_reentrant=True` in gradient checkpointing: under ZeRO-3 it loses the gradients of all but one pass",
    "several documents in one row with a cache or an `attention_mask`, or without `position_ids` that start again",
)

_FEEDBACK = {
    "embedding": "after each of the first {steps} passes the probability-weighted sum of all token embeddings is fed\n"
    "back into its input",
    "both": "after each of the first {steps} passes the probability-weighted sum of all token embeddings and, through\n"
    "a learned gate, the hidden states are fed back into its input",
    "hidden": "after each of the first {steps} passes its hidden states are fed back into its input",
    "latent": "the input of each run but the first is the hidden state of the one before, at a position of its own\n"
    "([PonderLM-2](https://arxiv.org/abs/2509.23184))",
    "pause": "the input of each run but the first is a learned embedding, at a position of its own\n"
    "([pause tokens](https://arxiv.org/abs/2310.02226))",
}
_EXITS = "`generate(exit_kl=0.01)` stops pondering on a token\nwhen a pass changed its prediction by less."
_REFUSES_EXITS = "`exit_kl` is refused, because only the\nlast position of a token predicts."


def _halting(configuration: Any) -> dict[str, str]:
    if configuration.halting == "none" or configuration.pondering_steps == 0:
        return {}
    return {"halting": f"{configuration.halting}, below {configuration.halting_threshold:g}"}


def _heads(configuration: Any) -> dict[str, str]:
    if not configuration.extra_heads:
        return {}
    return {"extra heads, for the tokens further ahead": str(configuration.extra_heads)}


def model_card(
    name: str, configuration: Any, parameters: int, facts: Mapping[str, str], licence: str | None = None
) -> str:
    """The card as Markdown. `facts` are further rows of its table."""
    architecture, layers = configuration.model_type.removeprefix("ponder_"), configuration.num_hidden_layers
    rows = {
        "architecture": f"{architecture}, {layers} layers, width {configuration.hidden_size}, "
        f"vocabulary {configuration.vocab_size}",
        "parameters": f"{parameters:,}",
        "pondering steps S": str(configuration.pondering_steps),
        "feedback, residual, embedding scale": f"{configuration.feedback}, {configuration.residual}, "
        f"{'sqrt(D)' if configuration.scale_embeds else '1'} x {configuration.initial_scale:g} at the start",
        **_halting(configuration),
        **_heads(configuration),
        **facts,
        "licence": licence or "not stated",
    }
    return _CARD.format(
        name=name,
        passes=configuration.pondering_steps + 1,
        steps=configuration.pondering_steps,
        exits=_REFUSES_EXITS if configuration.feedback in INTERLEAVED else _EXITS,
        feedback=_FEEDBACK[configuration.feedback].format(steps=configuration.pondering_steps),
        licence=f"license: {licence}\n" if licence else "",
        rows=_table(rows),
        tested=", ".join(f"{name} {version}{_TESTED_FOR.get(name, '')}" for name, version in TESTED.items()),
        refused="\n".join(f"- {way}" for way in REFUSED),
    )


def _trained_on(state: Mapping[str, Any]) -> str:
    """The amount that the weights have learned from, as the run recorded it."""
    length = f"sequences of {state['config']['data']['seq_len']:,}"
    done = state.get("done")
    if done is None:  # saved by an old version, which did not record what a run has done
        return f"{state['tokens']:,} tokens in {state['step']:,} steps, {length}"
    tokens, steps = done["tokens"] - done["skipped_tokens"], done["steps"] - done["skipped_steps"]
    text = f"{tokens:,} tokens in {steps:,} steps, {length}; {done['flops']:.3g} FLOPs"
    if len(done["steps_by_pondering_steps"]) > 1:
        counts = (f"{count:,} of S = {ponder}" for ponder, count in done["steps_by_pondering_steps"].items())
        text += f"; steps: {', '.join(counts)}"
    return text + (f"; updates skipped: {done['skipped_steps']:,}" if done["skipped_steps"] else "")


def tuned_card(
    before: str | None, names: tuple[str, str], configuration: Any, parameters: int, facts: Mapping[str, str]
) -> str:
    """The card of a tuned folder: the card of the folder that it was tuned from, and how it was tuned.

    Args:
        before: README of the folder that it was tuned from. Only the name is changed. None if it has no README.
        names: names of that folder and of this one.
    """
    source, name = names
    if before is None:
        before = model_card(name, configuration, parameters, {})
    text = before.replace(f"# {source}\n", f"# {name}\n").replace(
        f'from_pretrained("{source}"', f'from_pretrained("{name}"'
    )
    said = "The data, losses and pondering steps above describe the model that this one was tuned from."
    return f"{text.rstrip()}\n\n## Tuned from {source}\n\n{said}\n\n| | |\n|---|---|\n{_table(facts)}\n"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def trained_card(
    name: str,
    state: Mapping[str, Any],
    held_out: Mapping[str, Any] | None,
    parameters: int,
    licence: str | None,
    *,
    average: bool = False,
) -> str:
    """The card of a checkpoint.

    Args:
        state: contents of its state.json.
        held_out: the run's evaluation of it from metrics.jsonl, or None if there was none.
        average: the folder has the running average of the weights, which training did not evaluate.
    """
    config = state["config"]
    weights = [source["weight"] for source in config["data"]["sources"].values()]
    shares = [
        f"{source} {weight / sum(weights):.1%}"
        for source, weight in zip(config["data"]["sources"], weights, strict=True)
    ]
    losses = "not evaluated"
    if held_out is not None:
        pairs = enumerate(held_out["losses"])
        losses = ", ".join(
            f"pass {index}: not finite" if loss is None else f"pass {index}: {loss:.4f} ({shown(perplexity(loss))})"
            for index, loss in pairs
        )
        bits = held_out.get("bits_per_byte")
        if bits and bits[-1] is not None:
            losses += f"; the last is {bits[-1]:.4f} bits per byte"
        losses += f", at step {held_out['step']:,}"
        if average:
            losses += ", with the weights of that step and not their average"
    kind = "of the last step"
    if average:
        first = average_since(state)
        over = "training" if first == 1 else f"steps {first:,} to {state['step']:,}"
        kind = f"running average over {over}, decay {config['optim']['ema']:g}"
    facts = {
        "weights": kind,
        "trained on": _trained_on(state),
        "data": ", ".join(shares),
        "hash of its manifests": state["loader"]["shards"],
        "held-out loss (perplexity)": losses,
        "commit": state.get("commit") or "not recorded",
        "made with": ", ".join(f"{package} {version}" for package, version in state["versions"].items()),
    }
    return model_card(name, configuration_from_dict(state["model"]), parameters, facts, licence)
