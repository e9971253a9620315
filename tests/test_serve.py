"""Servers that are not ours: transformers serve answers with an exported policy, and as a judge.

The judge is FSRL_JUDGE_MODEL, an instruct model's folder or Hub id, without which its test skips:

    FSRL_JUDGE_MODEL=google/gemma-3-270m-it python -m pytest tests/test_serve.py
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, script
from forked import free_port
from judge import AXBENCH

from labels import read_header_and_rows

NEEDS = ("transformers", "fastapi", "uvicorn", "openai")  # of pip install transformers[serving]
missing = [name for name in NEEDS if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"transformers serve needs {missing}")


class Served:
    """transformers serve with one model, on a port of its own."""

    def __init__(self, model: str, log: Path):
        self.model, self.log, self.port = model, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        flags = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        command = [str(Path(sys.executable).with_name("transformers")), "serve", self.model]
        command += ["--trust-remote-code", *flags]
        home = dict(HF_HOME=str(self.log.parent), HF_HUB_CACHE=str(self.log.parent / "none"))
        home = {} if "FSRL_JUDGE_MODEL" in os.environ else home
        with open(self.log, "a") as log:
            env = os.environ | home
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        for _ in range(2400):
            if self.process.poll() is not None:
                break
            try:
                return urllib.request.urlopen(self.url.removesuffix("v1") + "health").close()
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-2000:])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def ask(self, content: str, most: int) -> str:
        asked = dict(model=self.model, temperature=0, max_tokens=most)
        asked |= dict(messages=[dict(role="user", content=content)])
        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(model: str) -> Served:
        servers.append(Served(model, tmp_path / "serve.log"))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def test_an_exported_policy_answers_over_http(serve, tiny_run, tmp_path):
    result = script("-m", "generation.export", "--run", tiny_run, "--to", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    question, server = "What is a kettle used for?", serve(str(tmp_path / "hf"))
    flags = ("--run", tiny_run, "--prompt", question, "--max-new-tokens", 40)
    steered, base = (
        script("-m", "generation", *flags, "--scale", scale).stdout.strip() for scale in (1, 0)
    )
    assert server.ask(question, 40).strip() == steered != base


JUDGE = os.environ.get("FSRL_JUDGE_MODEL")


@pytest.mark.skipif(not JUDGE, reason="FSRL_JUDGE_MODEL names no model")
def test_a_model_judges_and_a_killed_server_costs_no_answer(serve, tmp_path):
    """What the server does not force into the schema is counted, and never guessed."""
    server, out = serve(JUDGE), tmp_path / "labels.jsonl"
    (tmp_path / "some.jsonl").write_text("\n".join(AXBENCH.read_text().splitlines()[:8]) + "\n")
    flags = ["-m", "labelling", "--explanations", tmp_path / "some.jsonl", "--out", out]
    flags += ["--endpoint", server.url, "--judge-model", JUDGE, "--judge-role", "user"]
    flags += ["--concurrency", 1, "--timeout", 300, "--attempts", 2]
    journal = tmp_path / "labels.journal.jsonl"

    first = subprocess.Popen(
        [sys.executable, *map(str, flags)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while first.poll() is None and (not journal.exists() or not journal.read_text()):
        time.sleep(0.05)
    server.kill()
    _, said = first.communicate(timeout=120)
    assert first.returncode == 2 and "questions in a row unanswered" in said, said
    kept = journal.read_text().count("\n")
    assert 1 <= kept < 16 and not out.exists()

    server.start()
    result = script(*flags, timeout=1200)
    asked = re.search(r"to ask: (\d+) questions .* (\d+) answered already", result.stdout)
    assert int(asked[1]) + int(asked[2]) == 16 and int(asked[2]) == kept
    told = result.stdout + result.stderr
    counted = re.search(r"(?:answers: |got a label \()([^).\n]+)", told)[1]
    outcomes = {name: int(n) for n, name in re.findall(r"(\d+) ([\w-]+)", counted)}
    assert sum(outcomes.values()) == 16 and "unanswered" not in outcomes, told
    if "answered" not in outcomes:  # not one label: a sentence, and no file of nothing
        assert result.returncode == 2 and not out.exists()
        return
    assert result.returncode == 0, told
    header, rows = read_header_and_rows(out)
    assert len(rows) == outcomes["answered"]
    assert sum(header["unlabelled"].values()) == 16 - outcomes["answered"]
