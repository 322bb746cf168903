"""What faster decoding saves and costs, against forwards over whole sequences; and `generate` with its settings."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.loader import heldout_batches, open_sources
from ponder_scale.errors import ConfigError, ShardError, TokenizerError
from ponder_scale.evaluate.decoding import measure
from ponder_scale.evaluate.generate import generate
from ponder_scale.evaluate.trace import trace_folder
from ponder_scale.export.folder import write_folder
from tests.model.architectures import make_confident

PROMPT, NEW = 10, 12


def whole_forward(model: Any, folder: Path, steps: int) -> tuple[float, torch.Tensor]:
    """Loss and most probable tokens of the positions after the prompts, without any cache."""
    config = DataConfig({"x": SourceConfig(str(folder))}, PROMPT + NEW - 1)
    losses, best = [], []
    for tokens, *_ in heldout_batches(config, open_sources(config), sequences=3, micro_batch=1):
        with torch.no_grad():
            said = model(tokens[:, :-1], pondering_steps=steps).logits[0, PROMPT - 1 :].log_softmax(-1)
        losses.append(-said.gather(1, tokens[0, PROMPT:].unsqueeze(1)))
        best.append(said.argmax(-1))
    return torch.cat(losses).mean().item(), torch.cat(best)


def test_every_way_to_decode_is_measured(
    model: Any, folder: Path, shards: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = {"sequences": 3, "prompt_tokens": PROMPT, "new_tokens": NEW}
    found = measure(folder, {"x": shards[0]}, **lengths, exit_kl=[0.0, 1e9], json_file=tmp_path / "ways.json")
    ways = {way.name: way for way in found}
    exact, best = whole_forward(model, shards[0], 2)
    assert ways["plain"].loss == pytest.approx(exact, rel=1e-4)
    assert (ways["plain"].changed, ways["plain"].passes, ways["plain"].speed) == (0.0, 3.0, 1.0)
    for steps in (0, 1):
        loss, other = whole_forward(model, shards[0], steps)
        way = ways[f"{steps} pondering steps"]
        assert way.loss == pytest.approx(loss, rel=1e-4) and way.passes == steps + 1
        assert way.changed == pytest.approx((other != best).float().mean().item()) and way.changed > 0
    never, always = ways["early exit at 0 nats"], ways["early exit at 1e+09 nats"]
    assert never.loss == ways["plain"].loss and never.passes == 3.0 and never.changed == 0
    assert always.passes == pytest.approx((3 + 2 * (NEW - 1)) / NEW) and always.loss != exact
    draft = ways["draft of 1 pondering steps"]
    assert draft.loss == ways["plain"].loss and draft.accepted is not None and 0 <= draft.accepted <= 1
    assert draft.draft_passes > 0 and draft.passes <= 3.0
    printed = capsys.readouterr().out
    assert "3 sequences, 12 tokens after 10 each, S = 2, cpu" in printed
    assert [row["name"] for row in json.loads((tmp_path / "ways.json").read_text())] == list(ways)


def test_latents_are_measured_without_exits_and_are_not_traced(
    shards: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"vocab_size": 300, "max_position_embeddings": 32, "eos_token_id": 0}
    model = make_confident("llama", pondering_steps=1, feedback="latent", scale_embeds=True, **fields)
    out = tmp_path / "latent"
    write_folder(out, model.config, model.named_parameters(), dtype="float32", card=str, tokenizer=tiny_tokenizer)
    found = {way.name: way for way in measure(out, {"x": shards[0]}, sequences=1, prompt_tokens=6, new_tokens=6)}
    assert list(found) == ["plain", "0 pondering steps", "draft of 0 pondering steps"]
    assert found["draft of 0 pondering steps"].loss == found["plain"].loss != found["0 pondering steps"].loss
    for flag in ({"exit_kl": 0.1}, {"compiled": True}):
        with pytest.raises(ConfigError, match="is not for a model with feedback latent; leave it out"):
            generate(out, "The quick", max_new_tokens=2, **flag)
    generate(out, "The quick", max_new_tokens=3)
    assert "early exit" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="its feedback is latent, which adds positions, but trace shows"):
        trace_folder(out, "The quick", steps=None, html_file=None)


def test_what_cannot_be_measured_is_answered(folder: Path, shards: tuple[Path, Path], tiny_shards: Any) -> None:
    with pytest.raises(ConfigError, match="together at most 32, the positions of the model"):
        measure(folder, {"x": shards[0]}, prompt_tokens=30, new_tokens=10)
    with pytest.raises(TokenizerError, match="evaluate on shards that were made with the model's own tokenizer"):
        measure(folder, {"x": tiny_shards().folder}, prompt_tokens=4, new_tokens=4)
    with pytest.raises(ConfigError, match="--data names 2 folders; decoding is measured on one"):
        measure(folder, {"x": shards[0], "y": shards[1]}, prompt_tokens=4, new_tokens=4)
    with pytest.raises(ShardError, match="no held-out sequence of 32 tokens"):
        measure(folder, {"x": shards[0]}, sequences=0, prompt_tokens=16, new_tokens=16)


def continued(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, without the speeds."""
    return re.sub(r"[\d.]+ s, [\d.]+ tokens/s", "", capsys.readouterr().out).splitlines()


def test_prompts_come_from_standard_input_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []
    for text in ("The quick brown", "A lazy\ndog"):
        generate(folder, text, max_new_tokens=4)
        wanted.append(continued(capsys))
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\n"))
        generate(folder, None, max_new_tokens=4)
        assert continued(capsys) == wanted[-1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The quick brown\n\nThe quick brown"))
    generate(folder, None, max_new_tokens=4, interactive=True)
    assert continued(capsys) == wanted[0] * 2


def test_a_terminal_is_asked_for_prompts_only_with_interactive(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, terminal = pty.openpty()
    with os.fdopen(ours, "wb", buffering=0) as keyboard, os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(ConfigError, match="there is no prompt; give --prompt TEXT, pipe a text in"):
            generate(folder, None, max_new_tokens=4)
        with pytest.raises(ConfigError, match="--prompt and --interactive exclude each other"):
            generate(folder, "x", max_new_tokens=4, interactive=True)
        keyboard.write(b"The quick brown\n\x04")  # Control-D ends what is typed
        generate(folder, None, max_new_tokens=4, interactive=True)
    lines = continued(capsys)
    assert lines[0].startswith("> The quick brown") and lines[-1] == "> "


def test_generate_says_what_early_exit_and_a_draft_saved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(**options: Any) -> tuple[str, str]:
        generate(folder, "The quick brown", max_new_tokens=8, **options)
        text, _, rest = capsys.readouterr().out.rpartition(" tokens in ")
        return text.rpartition("\n")[0], rest

    plain, passes = said()
    tokens = int(re.search(r"(\d+) passes in (\d+) forwards$", passes.strip())[1]) // 3  # type: ignore[index]
    assert f"{3 * tokens} passes in {tokens} forwards" in passes and "saved" not in passes
    _, passes = said(exit_kl=1e9)
    assert f"{2 * tokens + 1} passes" in passes and "saved by early exit" in passes
    drafted, passes = said(draft_steps=0)
    assert drafted == plain and re.search(r"draft of 0 pondering steps: \d+ of \d+ proposed tokens accepted", passes)
    _, passes = said(pondering_steps=0)
    assert f"{tokens} passes in {tokens} forwards" in passes
    for options, message in (
        ({"exit_kl": 0.1, "draft_steps": 0}, "--exit-kl and --draft-steps exclude each other"),
        ({"exit_kl": -1.0}, r"--exit-kl is -1\.0; expected at least 0"),
        ({"draft_steps": -1}, "--draft-steps is -1; expected at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            said(**options)


@pytest.fixture(scope="module")
def headed(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"vocab_size": 300, "max_position_embeddings": 32, "eos_token_id": 0, "extra_heads": 2}
    model = make_confident("llama", pondering_steps=2, scale_embeds=True, **fields)
    out = tmp_path_factory.mktemp("headed") / "model"
    write_folder(out, model.config, model.named_parameters(), dtype="float32", card=str, tokenizer=tiny_tokenizer)
    return out


def test_heads_draft_the_same_text_and_say_how_much_of_it_was_accepted(
    headed: Path, folder: Path, shards: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(**options: Any) -> tuple[str, str]:
        generate(headed, "The quick brown", max_new_tokens=8, **options)
        text, _, rest = capsys.readouterr().out.rpartition(" tokens in ")
        return text.rpartition("\n")[0], rest

    plain, (drafted, passes) = said()[0], said(draft_heads=True)
    assert drafted == plain and re.search(r"\ndraft of 2 extra heads: \d+ of \d+ proposed tokens accepted", passes)
    found = measure(headed, {"x": shards[0]}, sequences=3, prompt_tokens=PROMPT, new_tokens=NEW, exit_kl=[])
    way = next(way for way in found if way.name == "draft of 2 extra heads")
    assert (way.loss, way.changed, way.draft_passes) == (found[0].loss, 0.0, 0.0)
    assert way.accepted is not None and 0 <= way.accepted <= 1 and 0 < way.passes <= 3.0
    for options, message in (
        ({"draft_heads": True, "draft_steps": 0}, "--draft-steps and --draft-heads exclude each other"),
        ({"draft_heads": True, "exit_kl": 0.1}, "--exit-kl and --draft-heads exclude each other"),
        ({"draft_heads": True, "compiled": True}, "--exit-kl leaves passes out and --draft-heads feeds several"),
    ):
        with pytest.raises(ConfigError, match=message):
            said(**options)
    with pytest.raises(ConfigError, match=r"--draft-heads: the model in .* has no extra heads; use --draft-steps 0"):
        generate(folder, "The", max_new_tokens=2, draft_heads=True)
