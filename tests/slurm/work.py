"""What the templates are for: runs, sweeps, and the chain from a corpus to an evaluated model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from typing import Any

import yaml

from tests.slurm.lab import REPOSITORY
from tests.slurm.runs import NO_GPUS, SHAPE, STEPS, Place, Run, count, hosts, train


def two_nodes_train_under_zero_3_and_the_result_is_exported(place: Place) -> None:
    run = place.reference()
    assert "ZeRO-3 on 2 ranks" in run.rank_log(0, 0) and [step for step, _ in run.losses()] == list(range(1, STEPS + 1))
    assert run.whole() == [8, 16, 24]
    out, log = place.folder / "out", place.folder / "export.log"
    job = place.lab.sbatch(f"--output={log}", "slurm/export.sbatch", run.folder, out)
    assert place.lab.wait(job) == "COMPLETED", log.read_text()
    assert (out / "model.safetensors").is_file() and "in a fresh process: logits within 0.0e+00" in log.read_text()


def two_runs_on_one_node_do_not_clash(place: Place) -> None:
    """Each trains from a copy of the shards on the node's own disk."""
    disk = str(place.lab.folder / "local" / "copies")
    same = {"sbatch": ("--nodelist=n19", "--time=10"), "nodes": 1, "STEP_SECONDS": "0.3", "COPY_TO": disk}
    runs = [train(place, name=f"run {number}", **same) for number in (1, 2)]
    assert [run.ended() for run in runs] == ["COMPLETED"] * 2, [run.log for run in runs]
    spans = [[record["time"] for record in run.steps()] for run in runs]
    assert max(span[0] for span in spans) < min(span[-1] for span in spans)  # they did run at the same time
    assert runs[0].losses() == runs[1].losses()
    assert f"path: {disk}" in (runs[0].folder / "config.yaml").read_text()


def a_run_is_submitted_saved_stopped_and_submitted_again(place: Place) -> None:
    """By the command line, in a folder with a name that no shell would like; on two nodes, then on one."""
    folder = place.folder / "run 1; $(touch pwned) 'q' 100%j"
    fixed = [f"run_dir={folder}", f"data.sources.texts.path={place.shards}", *SHAPE, "train.steps=2000"]
    (place.folder / "recipe.yaml").write_text("log: {wandb_project: none}\n")
    secret = "token-that-must-not-be-written"
    variables = {"TRAINER": "faulty", "CHECK_NODE": "true", "STEP_SECONDS": "0.2", "WANDB_API_KEY": secret}

    def command(*words: object, check: bool = True) -> str:
        call = [sys.executable, "-m", "ponder_scale.cli", *words]
        done = place.lab.run(*call, check=check, cwd=place.folder, **variables, PYTHONPATH=str(REPOSITORY))
        return done.stdout + done.stderr

    def submit(nodes: int, *more: str, check: bool = True) -> str:
        options = ["--nodes", nodes, "--gpus-per-node", 1, "--sbatch=--cpus-per-task=1"]
        return command("submit", "recipe.yaml", *fixed, *options, *more, check=check)

    def until_step(step: int) -> None:
        Run(place, folder, "").until_step(step)

    assert "to start at" in submit(2, "--test-only")
    assert "not available" in submit(99, "--test-only", "train.global_batch=198", check=False)
    assert not folder.exists()
    said = submit(2)
    first = re.findall(r"job (\d+) trains", said)[0]
    assert "ponder-scale status" in said
    until_step(3)
    assert f"is being trained by job {first} (RUNNING)" in (refused := submit(2, check=False))
    assert "memory / rank" in said and "memory / rank" not in refused  # which came at once
    command("save", folder)
    place.lab.until(lambda: Run(place, folder, "").whole(), "a checkpoint")
    until_step(Run(place, folder, "").whole()[0] + 2)
    assert "saves and goes back to the queue" in command("requeue", folder)
    place.lab.until(lambda: int(place.lab.show(first)["Restarts"]) == 1)
    place.lab.wait(first, "RUNNING")
    log = folder / "log"  # a link, to what the second attempt has not yet made
    place.lab.until(lambda: log.exists() and "continuing from" in log.read_text(), "the second attempt")
    assert "saves and ends" in command("stop", folder)
    assert place.lab.wait(first) == "COMPLETED"
    assert "is no longer in Slurm's queue" in command("stop", folder, check=False)
    saved = Run(place, folder, "").whole()[-1]
    assert Run(place, folder, "").steps()[-1]["step"] == saved
    second = re.findall(r"job (\d+) trains", submit(1))[0]
    until_step(saved + 2)
    assert "ends without saving" in command("stop", "--now", folder)
    assert place.lab.wait(second) == "COMPLETED"
    assert f"continuing from {folder}/checkpoints/step-{saved:08d}" in log.read_text()  # one node, after two
    steps = [step for step, _ in Run(place, folder, "").losses()]
    assert steps == list(range(1, len(steps) + 1)) and steps[-1] >= saved + 2

    kept = folder / "submissions" / "0001"
    assert (kept / "code" / "ponder_scale" / "train" / "loop.py").is_file() and (kept / "diff.patch").is_file()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?\n", (kept / "commit.txt").read_text())
    assert (folder / "submissions" / "0002" / "config.yaml").is_file()
    written = [path for path in place.folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert not [path for path in written if secret.encode() in path.read_bytes()]
    assert not list(place.folder.rglob("pwned"))


def an_array_takes_its_tasks_from_a_list(place: Place) -> None:
    spaced = place.folder / "run two"
    tasks = ["# what is compared", "", f'to=3 "run_dir={place.folder}/one"', f"'run_dir={spaced}' to=4  "]
    (place.folder / "list").write_text("\n".join([*tasks, "to=5", 'run_dir=x "to=5']) + "\n")
    options = ["--nodes=1", "--ntasks-per-node=1", *NO_GPUS, f"--output={place.folder}/%a.log", "--array=1-5%2"]
    array = place.lab.sbatch(*options, "slurm/sweep.sbatch", place.folder / "list", "-", TRAINER="contract")
    states = [place.lab.wait(f"{array}_{number}") for number in range(1, 6)]
    logs = [(place.folder / f"{number}.log").read_text() for number in range(1, 6)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "FAILED", "FAILED"], logs
    assert (spaced / "log").is_file() and (place.folder / "one" / "log").is_file()
    assert "task 3: it names no run_dir" in logs[2] and "quotes do not match" in logs[3]
    assert "there are tasks 1 to 4; submit with --array=1-4" in logs[4]


def a_task_of_an_array_is_requeued_alone(place: Place) -> None:
    """One of its tasks has the array's own number, by which Slurm would requeue them all."""
    tasks = [f"to=50 'run_dir={place.folder}/{name}'" for name in ("one", "two")]
    (place.folder / "list").write_text("\n".join(['unmatched="', *tasks]) + "\n")
    options = ["--nodes=1", "--ntasks-per-node=1", *NO_GPUS, f"--output={place.folder}/%a.log", "--array=2-3"]
    array = place.lab.sbatch(*options, "slurm/sweep.sbatch", place.folder / "list", "-", TRAINER="contract")
    logs = {number: place.folder / f"{number}.log" for number in (2, 3)}
    beats = [place.folder / name / "heartbeat" for name in ("one", "two")]
    place.lab.until(lambda: all(beat.exists() for beat in beats), "both tasks train")
    numbers = {number: place.lab.show(f"{array}_{number}")["JobId"] for number in logs}
    (first,) = (number for number in logs if numbers[number] == array)
    place.lab.run("scancel", "--batch", "--signal=USR2", f"{array}_{first}")
    place.lab.until(lambda: "back to the queue" in logs[first].read_text(), "the requeue")
    assert {place.lab.wait(f"{array}_{number}") for number in logs} == {"COMPLETED"}
    restarts = {number: place.lab.show(f"{array}_{number}")["Restarts"] for number in logs}
    assert restarts == {number: str(int(number == first)) for number in logs}, restarts


def a_chain_leads_from_a_corpus_to_an_evaluated_model(place: Place) -> None:
    """The commands of slurm/README.md; data are built by MPI ranks on two nodes, and two nodes train."""
    assert follow_chain(place, str(place.tokenizer)) == ["COMPLETED"] * 4
    log = next(place.folder.glob("ponder-evaluate-*.log")).read_text()
    assert re.search(r"pass 1: loss \d\.\d+", log), log


def a_chain_that_breaks_leaves_no_job_waiting(place: Place) -> None:
    assert follow_chain(place, "no-such-tokenizer") == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]


def a_build_outlives_the_loss_of_a_node(place: Place) -> None:
    """The survivor waits for the lost unit's lease, longer than Slurm needs to see that the node is gone."""
    texts, out = place.folder / "texts.jsonl", place.folder / "shards"
    once = (place.corpus / "texts.jsonl").read_text()
    texts.write_text(once * (12_000_000 // len(once)))
    sources = {"texts": {"kind": "jsonl", "path": str(texts)}}
    recipe = {"sources": sources, "backend": "reference", "shard_bytes": 3_000_000, "lease_seconds": 22}
    (place.folder / "data.yaml").write_text(json.dumps(recipe))
    log = place.folder / "log"
    options = ["--nodes=2", "--ntasks-per-node=1", "--exclusive", *NO_GPUS, f"--output={log}"]
    words = [place.folder / "data.yaml", f"tokenizer={place.tokenizer}", f"out={out}"]
    job = place.lab.sbatch(*options, "slurm/data.sbatch", *words)
    place.lab.wait(job, "RUNNING")
    lost = place.lab.run("scontrol", "show", "hostnames", place.lab.show(job)["NodeList"]).stdout.split()[1]
    claims = out.with_name("shards.partial") / "work" / "claims" / "shards"
    place.lab.until(lambda: any(path.read_text().startswith(f"{lost}-") for path in claims.glob("*")), "a claim")
    place.lab.run("labnode", "down", lost)
    assert place.lab.wait(job) == "COMPLETED", log.read_text()
    said = log.read_text()
    assert f"Node failure on {lost}" in said and f"built {out}" in said, said
    assert place.lab.show(job)["Restarts"] == "0"
    assert place.lab.run("ponder-data", "verify", out).returncode == 0


def follow_chain(place: Place, tokenizer: str) -> list[str]:
    """Run the README's commands with small jobs in place of its large ones; the states in which they end."""
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "slurm" / "README.md").read_text(), flags=re.DOTALL)
    chain = next(block for block in blocks if "slurm/data.sbatch" in block)
    for word, meant in (("DATA_RECIPE", "data.yaml"), ("TOKENIZER", tokenizer), ("RECIPE", "recipe.yaml")):
        chain = chain.replace(word, meant)
    (place.folder / "slurm").symlink_to(REPOSITORY / "slurm")
    source = {"kind": "jsonl", "path": str(place.corpus / "texts.jsonl")}
    (place.folder / "data.yaml").write_text(json.dumps({"sources": {"texts": source}, "heldout_fraction": 0.1}))
    nested: dict[str, Any] = {}
    for key, value in (word.split("=", 1) for word in [*SHAPE, "train.steps=4"]):
        group, name = key.split(".")
        nested.setdefault(group, {})[name] = yaml.safe_load(value)
    (place.folder / "recipe.yaml").write_text(json.dumps(nested))
    small = place.folder / "bin" / "sbatch"
    small.parent.mkdir()
    small.write_text(
        f"""#!/bin/bash
size=(--gpus-per-node=0 --cpus-per-task=1)
case "$*" in *data.sbatch*|*train.sbatch*) size+=(--nodes=2 --ntasks-per-node=1) ;; esac
{shutil.which("sbatch")} "${{size[@]}}" "$@" | tee -a jobs
"""
    )
    small.chmod(0o755)
    run = place.lab.run("bash", "-c", f'PATH="{small.parent}:$PATH"\n{chain}', cwd=place.folder)
    jobs = (place.folder / "jobs").read_text().split()
    assert len(jobs) == 4, run
    states = [place.lab.wait(job) for job in jobs]
    print("".join(path.read_text() for path in sorted(place.folder.glob("*.log"))))
    return states


def the_check_sees_that_all_nodes_exchange_data(place: Place) -> None:
    run = count(place, "to=3", CHECK_ALL_REDUCE="1")
    assert run.ended() == "COMPLETED", run.log
    assert "all-reduce over 2 ranks (gloo)" in run.log and len(hosts(run)) == 1


SCENARIOS = [
    a_build_outlives_the_loss_of_a_node,
    two_nodes_train_under_zero_3_and_the_result_is_exported,
    a_chain_leads_from_a_corpus_to_an_evaluated_model,
    a_run_is_submitted_saved_stopped_and_submitted_again,
    two_runs_on_one_node_do_not_clash,
    the_check_sees_that_all_nodes_exchange_data,
    an_array_takes_its_tasks_from_a_list,
    a_task_of_an_array_is_requeued_alone,
    a_chain_that_breaks_leaves_no_job_waiting,
]
