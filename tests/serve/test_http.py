"""`vllm serve FOLDER` as a user starts it, asked as a user asks it, with the package as installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ponder_scale.train.launch import free_port
from tests.serve.agreement import BOUND, Case
from tests.serve.engine import ENVIRONMENT
from tests.serve.folders import NEW, reference

START_SECONDS = 450  # on a busy machine


@pytest.fixture(scope="module")
def case(vllm: None, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("http") / "model", tokenizer, pondering_steps=2)


@pytest.fixture(scope="module")
def address(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("log") / "server.log"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(case.folder), "--port", str(port)]
    command += ["--served-model-name", "ponder", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    variables = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    variables.pop("PYTHONPATH", None)  # as installed, not as in the clone
    with log.open("w") as stream:
        server = subprocess.Popen(
            command, cwd=log.parent, env=variables, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def test_curl_gets_the_text_of_transformers(case: Case, address: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case.folder, trust_remote_code=True)
    prompt = "The quick brown"
    (said, log_p, _), *_ = reference(case.model, [tokenizer(prompt).input_ids])
    asked = {
        "model": "ponder",
        "prompt": prompt,
        "max_tokens": NEW,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
    }
    command = ["curl", "-s", f"{address}/completions", "-H", "Content-Type: application/json", "-d", json.dumps(asked)]
    choice = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["choices"][0]
    assert choice["text"] == tokenizer.decode(said)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(log_p, abs=BOUND)


def test_the_openai_client_gets_tokens_as_transformers_makes_them(case: Case, address: str) -> None:
    from openai import OpenAI  # in the environment of vLLM only

    client = OpenAI(base_url=address, api_key="none")
    ids = case.job["prompts"][6]
    body = {"ignore_eos": True, "return_token_ids": True}
    given = client.completions.create(model="ponder", prompt=ids, max_tokens=NEW, temperature=0, extra_body=body)
    assert given.choices[0].model_dump()["token_ids"] == case.expected[6][0]
