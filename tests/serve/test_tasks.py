"""`ponder-scale evaluate tasks FOLDER --engine vllm`: the scores of transformers on local tasks of three types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serve.engine import ENVIRONMENT, REPOSITORY
from tests.serve.folders import make_folder, make_model

WORDS = ["The quick brown fox", "jumps over", "the lazy dog", "and the dog", "does not mind", "fox over dog"]
KINDS = {
    "choice": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: choices\n'
    'doc_to_target: label\ntarget_delimiter: " "\n',
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n",
    "until": 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{text}}"\n'
    "generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}\n"
    "metric_list:\n  - metric: exact_match\n",
}


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    choices = [WORDS[place:] + WORDS[:place] for place in range(6)]
    rows = [{"text": text, "choices": some[:4], "label": 1} for text, some in zip(WORDS, choices, strict=True)]
    for name, kind in KINDS.items():
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{kind}")
    return folder


def scores(folder: Path, task_files: Path, out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ponder_scale.cli", "evaluate", "tasks", str(folder), "--include", str(task_files)]
    # the engine in a process of its own, as for users
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--json", str(out), *arguments],
        cwd=REPOSITORY,
        # traced but not compiled, which test_compiled does
        env={**environment, "HF_HOME": str(out.parent / "hf"), "VLLM_CPU_CI_ENV": "1"},
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())["steps"]


def test_tasks_score_in_vllm_as_in_transformers_for_each_number_of_steps(
    vllm: None, tokenizer: Path, task_files: Path, tmp_path: Path
) -> None:
    model = make_model("llama", pondering_steps=2, eos_token_id=0)
    folder = make_folder(tmp_path / "model", model, tokenizer)
    ours = scores(folder, task_files, tmp_path / "ours.json", "--steps", "0", "2")
    served = scores(folder, task_files, tmp_path / "served.json", "--steps", "0", "2", "--engine", "vllm")
    assert ours["0"]["local_rolling"] != ours["2"]["local_rolling"]
    for steps in ("0", "2"):
        for task, metrics in ours[steps].items():
            assert served[steps][task] == pytest.approx(metrics, rel=1e-4, nan_ok=True)
