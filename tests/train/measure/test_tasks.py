"""Downstream tasks in training: the harness's scores of the exported step, on two ranks, recorded, and never fatal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.evaluate.tasks import evaluate_tasks
from ponder_scale.export.huggingface import export
from ponder_scale.runs.records import METRICS, read
from ponder_scale.runs.series import read_run
from ponder_scale.settings import load
from tests.ranks import run_ranks
from tests.tiny import TEXTS
from tests.train.runs import SHAPE, tokenized_shards, train_and_tell, train_on_a_rank, weights

pytestmark = pytest.mark.slow  # the harness

KINDS = {
    "choice": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\n'
    'doc_to_target: label\ntarget_delimiter: ""\nnum_fewshot: 1\nfewshot_split: test\n',
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n",
    "until": 'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\n'
    'generation_kwargs: {until: ["e"], max_gen_toks: 4, do_sample: false}\n'
    "metric_list:\n  - metric: exact_match\n",
}
QUESTIONS = [
    (f"{word} ", ["fox", "dog", "cat"], number % 3) for number, word in enumerate(["the", "a", "one", "two", "lazy"])
]


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": [{"question": q, "choices": choices, "label": label} for q, choices, label in QUESTIONS],
        "rolling": [{"text": text} for text in TEXTS],
        "until": [{"prompt": prompt, "answer": "x"} for prompt in ("The", "def sq", "over the", "a")],
    }
    for name, content in rows.items():
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in content))
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{KINDS[name]}")
    return folder


def settings(run_dir: Path, shards: Path, *more: str) -> list[str]:
    fixed = [f"run_dir={run_dir}", f"data.sources.tiny.path={shards}", "train.steps=2", "train.precision=fp32"]
    return [*fixed, *SHAPE, "data.seq_len=48", "checkpoint.keep=null", *more]


def test_two_ranks_of_stage_3_have_the_scores_of_the_exported_step(
    tiny_shards: Any, tiny_tokenizer: Path, task_files: Path, tmp_path: Path
) -> None:
    shards = tokenized_shards(tiny_shards, tiny_tokenizer, heldout=(100,))
    names = [f"local_{name}" for name in KINDS]
    asking = [f"evaluate.tasks=[{','.join(names)}]", f"evaluate.tasks_include={task_files}"]
    asked = [*asking, "evaluate.tasks_every_steps=1", "evaluate.tasks_batch=2", "train.deepspeed=zero3"]
    cases = [
        {"overrides": settings(tmp_path / "asked", shards, *asked, "log.tensorboard=false")},
        {"overrides": settings(tmp_path / "plain", shards, "train.deepspeed=zero3")},
    ]
    assert run_ranks(train_on_a_rank, cases, timeout=240) == [["done", "done"]] * 2
    lines = {line["step"]: line for line in read(tmp_path / "asked" / METRICS) if line["event"] == "tasks"}
    assert sorted(lines) == [1, 2] and all(line["failure"] is None and line["seconds"] > 0 for line in lines.values())
    out = export(tmp_path / "asked/checkpoints/step-00000001", tmp_path / "exported", dtype="float32")
    expected = evaluate_tasks(out, names, include=task_files)["trained"]
    assert lines[1]["tasks"].keys() == expected.keys() == set(names)
    for task, metrics in expected.items():
        assert lines[1]["tasks"][task] == pytest.approx(metrics, rel=1e-4)
    assert lines[1]["tasks"] != lines[2]["tasks"]
    # asking changes nothing of what is trained
    for name, weight in weights(tmp_path / "plain").items():
        assert torch.equal(weight, weights(tmp_path / "asked")[name]), name
    shown = read_run(tmp_path / "asked", "asked")["tasks"]
    assert [line["tasks"] for line in shown] == [lines[1]["tasks"], lines[2]["tasks"]]


def test_a_task_that_fails_is_recorded_and_training_goes_on(
    tiny_shards: Any, tiny_tokenizer: Path, task_files: Path, tmp_path: Path
) -> None:
    shards = tokenized_shards(tiny_shards, tiny_tokenizer, heldout=(100,))
    (tmp_path / "scoring.py").write_text("def fail(*arguments):\n    raise ValueError('no score\\nof this')\n")
    content = (task_files / "choice.yaml").read_text().replace("local_choice", "failing")
    (tmp_path / "failing.yaml").write_text(f"{content}process_results: !function scoring.fail\n")
    more = [f"evaluate.tasks_include={tmp_path}", "evaluate.tasks=[failing]", "evaluate.tasks_every_steps=1"]
    run_dir = tmp_path / "run"
    case = {"overrides": settings(run_dir, shards, *more), "run_dir": str(run_dir)}
    ((told,),) = run_ranks(train_and_tell, [case], world_size=1, timeout=120)
    failed = [line for line in told["log"] if "tasks, in" in line]
    assert len(failed) == 2 and "failed, and training continues: ValueError: no score" in failed[0]
    lines = [line for line in read(run_dir / METRICS) if line["event"] == "tasks"]
    assert [(line["step"], line["failure"]) for line in lines] == [(step, "ValueError: no score") for step in (1, 2)]
    assert [line["step"] for line in read(run_dir / METRICS) if line["event"] == "step"] == [1, 2]


@pytest.mark.parametrize(
    ("tasks", "content", "reason"),
    [
        ("nonsense", "", r"evaluate\.tasks: the harness does not know nonsense; expected tasks of .*local_choice"),
        ("bad", 'doc_to_text: "{{question"\n', r"evaluate\.tasks: bad cannot be built: \w+: "),
        (
            "bad",
            "DATA: nowhere.json",
            r"evaluate\.tasks: the data of bad cannot be read .*evaluate\.tasks_include=FOLDER",
        ),
    ],
)
def test_a_task_that_cannot_be_built_ends_the_run_before_it_begins(
    tasks: str, content: str, reason: str, tiny_shards: Any, tiny_tokenizer: Path, task_files: Path, tmp_path: Path
) -> None:
    import re

    shards = tokenized_shards(tiny_shards, tiny_tokenizer, heldout=(100,))
    include = task_files
    if content:
        include = tmp_path / "tasks"
        include.mkdir()
        text = (task_files / "choice.yaml").read_text().replace("local_choice", "bad")
        old = 'doc_to_text: "{{question}}"\n' if content.startswith("doc") else str(task_files / "choice.json")
        (include / "bad.yaml").write_text(text.replace(old, content.removeprefix("DATA: ")))
    more = [f"evaluate.tasks=[{tasks}]", f"evaluate.tasks_include={include}"]
    case = {"overrides": settings(tmp_path / "run", shards, *more), "run_dir": str(tmp_path)}
    ((answer,),) = run_ranks(train_on_a_rank, [case], world_size=1, timeout=120)
    assert re.search(reason, answer["error"]) and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("key", ["tasks_every_steps=5", "tasks_include=x", "tasks_limit=3"])
def test_settings_of_tasks_without_tasks_are_refused(key: str) -> None:
    fixed = ["run_dir=x", "data.sources.a.path=x", "train.steps=9", "train.global_batch=1"]
    with pytest.raises(ConfigError, match=r"evaluate\.tasks_\w+ is .* and evaluate\.tasks is empty"):
        load(RunConfig, None, [*fixed, f"evaluate.{key}"])
