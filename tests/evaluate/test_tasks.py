"""The harness on local task files of its three types, against plain forwards and generation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from ponder_scale.errors import ConfigError
from ponder_scale.evaluate.tasks import PAPER_TASKS, evaluate_tasks

pytestmark = pytest.mark.slow  # the harness reads all its task files
QUESTIONS = [
    ("The quick", [" brown fox", " lazy dog"], 0),
    ("def square", ["(number)", " dog"], 1),
    ("over the", [" lazy", " assert"], 0),
]
TEXTS = ["The quick brown fox", "return number * number"]
PROMPTS = ["The quick", "def sq"]
NEW = 6


@pytest.fixture(scope="module")
def task_files(model: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answers = []
    for prompt in PROMPTS:  # what the model says with 2 pondering steps
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=NEW, do_sample=False, pondering_steps=2)
        answers.append(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "choice": [{"question": q, "choices": c, "label": label} for q, c, label in QUESTIONS],
        "rolling": [{"text": text} for text in TEXTS],
        "until": [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)],
    }
    kinds = {
        "choice": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\n'
        'doc_to_target: label\ntarget_delimiter: ""\n',
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n",
        "until": 'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}\n"
        "metric_list:\n  - metric: exact_match\n",
    }
    for name, content in rows.items():
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in content))
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{kinds[name]}")
    return folder


def log_likelihood(model: Any, context: list[int], continuation: list[int], steps: int) -> float:
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        log_p = model(ids[:, :-1], pondering_steps=steps).logits[0].log_softmax(-1)
    return sum(log_p[len(context) - 1 + place, token].item() for place, token in enumerate(continuation))


def test_the_harness_gives_what_plain_forwards_give_for_each_number_of_steps(
    model: Any, folder: Path, task_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found = evaluate_tasks(folder, [], steps=(0, 2, None), include=task_files, json_file=tmp_path / "tasks.json")
    assert found["2"] == found["trained"]
    assert json.loads((tmp_path / "tasks.json").read_text())["steps"] == found
    for steps in (0, 2):
        right = 0
        for question, choices, label in QUESTIONS:
            context = tokenizer(question).input_ids
            scores = [
                log_likelihood(model, context, tokenizer(question + choice).input_ids[len(context) :], steps)
                for choice in choices
            ]
            right += scores.index(max(scores)) == label
        assert found[str(steps)]["local_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
        total = sum(log_likelihood(model, [0], tokenizer(text).input_ids, steps) for text in TEXTS)
        size = sum(len(text.encode()) for text in TEXTS)
        assert found[str(steps)]["local_rolling"]["byte_perplexity,none"] == pytest.approx(
            math.exp(-total / size), rel=1e-3
        )
    assert found["2"]["local_until"]["exact_match,none"] == 1.0
    assert found["0"]["local_until"]["exact_match,none"] < 1.0
    assert found["0"]["local_rolling"] != found["2"]["local_rolling"]
    assert "local_choice acc,none" in capsys.readouterr().out


def test_the_papers_nine_are_tasks_of_the_harness_also_beside_files_of_ones_own(task_files: Path) -> None:
    assert len(PAPER_TASKS) == 9
    assert set(PAPER_TASKS) <= set(TaskManager(include_path=str(task_files)).all_tasks)


def test_included_files_replace_the_harness_s_own_of_their_name_and_leave_the_others(
    folder: Path, task_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sciq.yaml").write_text((task_files / "choice.yaml").read_text().replace("local_choice", "sciq"))
    asked: dict[str, Any] = {}

    def evaluated(**options: Any) -> Any:
        asked.update(options)
        return {"results": {"any": {"acc,none": 1.0}}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluated)
    evaluate_tasks(folder, PAPER_TASKS, include=tmp_path)
    index = asked["task_manager"].task_index
    assert tuple(asked["tasks"]) == PAPER_TASKS
    assert [name for name in PAPER_TASKS if index[name].yaml_path.parent == tmp_path] == ["sciq"]


def test_an_unknown_task_is_answered(folder: Path, task_files: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not know nonsense; expected tasks of .*local_choice"):
        evaluate_tasks(folder, ["nonsense"], include=task_files)


def test_an_engine_that_is_not_installed_or_runs_no_code_of_folders_is_answered(
    folder: Path, task_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {"vllm": None}
    monkeypatch.setattr("ponder_scale.evaluate.tasks.importlib.util.find_spec", found.get)
    with pytest.raises(ConfigError, match=r"--engine vllm needs vLLM, which is not installed here.*docs/serving\.md"):
        evaluate_tasks(folder, [], include=task_files, engine="vllm")
    found["vllm"] = "a spec"
    with pytest.raises(ConfigError, match="--engine vllm, which runs the plugin and no code of a folder"):
        evaluate_tasks(folder, [], include=task_files, engine="vllm", trust_remote_code=True)
    with pytest.raises(ConfigError, match="--engine is 'sglang'; expected one of transformers, vllm"):
        evaluate_tasks(folder, [], include=task_files, engine="sglang")


@pytest.mark.parametrize(
    "place", ["EleutherAI/lambada_openai", "json\ndataset_kwargs: {data_files: {test: nowhere.json}}"]
)
def test_data_that_cannot_be_had_are_answered_with_include(
    place: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    content = 'output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    (tmp_path / "far.yaml").write_text(f"task: far\ndataset_path: {place}\n{content}")
    with pytest.raises(ConfigError, match=r"--tasks: the data of far cannot be read \(.*--include FOLDER") as refused:
        evaluate_tasks(folder, ["far"], include=tmp_path)
    assert "\n" not in str(refused.value)


def test_a_harness_without_the_packages_of_its_class_says_what_to_install(
    folder: Path, task_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lm_eval.models.huggingface", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"needs accelerate \(.*\); run: pip install 'ponder-scale\[eval\]'"):
        evaluate_tasks(folder, [], include=task_files)
