"""The trace against plain forwards of fewer steps, and its page in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.errors import ConfigError
from ponder_scale.evaluate.trace import as_text, trace_folder, trace_tokens
from tests.model.architectures import make

TEXT = "The quick </script> dog é"


def test_beliefs_are_those_of_forwards_of_fewer_steps(
    model: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    trace = trace_folder(folder, TEXT, steps=None, html_file=None)
    assert "".join(trace.tokens[:3]) == tokenizer.decode(ids[0, :3]) and len(trace.beliefs) == ids.shape[1]
    with torch.no_grad():
        log_p = [model(ids, pondering_steps=steps).logits[0].log_softmax(-1) for steps in range(3)]
    for token, beliefs in enumerate(trace.beliefs):
        for index, belief in enumerate(beliefs):
            said = torch.distributions.Categorical(logits=log_p[index][token])
            last = torch.distributions.Categorical(logits=log_p[2][token])
            assert belief.entropy == pytest.approx(said.entropy().item(), abs=1e-4)
            assert belief.kl_to_last == pytest.approx(torch.distributions.kl_divergence(last, said).item(), abs=1e-4)
            best = log_p[index][token].topk(5)
            assert [p for _, p in belief.top] == pytest.approx(best.values.exp().tolist(), rel=1e-3)
            assert belief.top[0][0] == tokenizer.decode([best.indices[0].item()])
            if token + 1 < ids.shape[1]:
                assert belief.loss == pytest.approx(-log_p[index][token, ids[0, token + 1]].item(), abs=1e-4)
        assert beliefs[0].change == 0 and beliefs[1].change > 0 and beliefs[2].kl_to_last == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 + 3 * len(trace.tokens) and repr(trace.tokens[0]) in printed


def test_a_token_that_has_halted_is_marked_in_the_passes_after(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    model = make("llama", vocab_size=len(tokenizer), pondering_steps=2, halting="gate", halting_threshold=0.5).eval()
    with torch.no_grad():
        for gate in model.halting_gates:
            gate.up.weight.normal_(generator=torch.Generator().manual_seed(0))
            gate.down.weight.normal_(std=20.0, generator=torch.Generator().manual_seed(0))
            gate.down.bias.zero_()
        runs = model(ids, labels=torch.cat([ids[:, :1], ids], 1)[:, : ids.shape[1]], skip_logits=True).pass_shares
    trace = trace_tokens(model, tokenizer, ids)
    halted = torch.tensor([[belief.halted for belief in beliefs] for beliefs in trace.beliefs])
    assert not halted[:, 0].any() and 0 < halted[:, 1].sum() < len(halted)
    assert (halted[:, 2] >= halted[:, 1]).all()
    assert (~halted[:-1, 1]).float().mean().item() == pytest.approx(runs[1].item())
    assert as_text(trace).count("  halted") == halted.sum()


def test_a_text_that_does_not_fit_is_answered(folder: Path) -> None:
    for text in ("", "word " * 100):
        with pytest.raises(ConfigError, match=r"--text has \d+ tokens; expected 1 to 32"):
            trace_folder(folder, text, steps=None, html_file=None)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_is_drawn_by_a_browser(folder: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "trace.html", tmp_path / "trace.png"
    trace = trace_folder(folder, TEXT, steps=3, html_file=page)
    assert not re.search(r"(src|href)=", page.read_text())  # nothing is fetched
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size = ["--window-size=1000,800", f"--screenshot={picture}"]
    for more in (["--dump-dom"], size):
        done = subprocess.run([*browser, *more, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-1000:]
        if more == ["--dump-dom"]:
            dom = done.stdout
    assert 'data-drawn="kl_to_last"' in dom
    cells = re.findall(r'<td class="belief" title="[^"]+" style="background: ?([^"]+)"', dom)
    assert len(cells) == 4 * len(trace.tokens)
    assert len(set(cells)) > 3
    assert picture.stat().st_size > 5000
