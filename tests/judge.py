"""A stand-in for vLLM's OpenAI API, and what the tests of labelling and its benchmark share."""

import csv
import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from labelling import endpoint, sheets
from labelling.endpoint import LARGEST_REPLY
from labelling.label import main
from labels import SHEET, read_header_and_rows

ROOT = Path(__file__).resolve().parents[1]
AXBENCH = ROOT / "tests" / "data" / "axbench_explanations.jsonl"
SOURCE, OTHER = "gemma-2-2b/20-gemmascope-res-16k", "gemma-2-9b-it/20-gemmascope-res-131k"
TINY = read_header_and_rows(ROOT / "tiny" / "labels" / "fires.jsonl")[1]


class Server(ThreadingHTTPServer):
    """Answers yes where `truth` of the prompt's category and explanation says so.

    fault(n): what to do with the n-th question, counted from 0; None, or a name in Handler.do_POST.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        truth=lambda category, text: "code" in text,
        fault=lambda n: None,
        vllm="0.12.1",
        tls=None,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.truth, self.fault, self.vllm, self.latency = truth, fault, vllm, 0.0
        self.models = 200  # status of the list of models
        self.asked, self.headers, self.answered, self.in_flight, self.most = [], [], 0, 0, 0
        self.lock = threading.Lock()
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server_port}/v1"
        threading.Thread(
            target=self.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True
        ).start()

    def handle_error(self, request, client_address):
        pass  # clients hang up here on purpose


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one piece

    def do_GET(self):
        vllm = self.server.vllm
        if self.path == "/v1/models" and self.server.models != 200:
            self.answer(self.server.models, {"error": {"message": "no models yet"}})
        elif self.path == "/v1/models":
            self.answer(
                200,
                {
                    "object": "list",
                    "data": [{"id": "judge", "owned_by": "vllm" if vllm else "system"}],
                },
            )
        elif self.path == "/version" and vllm:
            self.answer(200, {"version": vllm})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            fault = server.fault(len(server.asked))
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            server.in_flight += 1
            server.most = max(server.most, server.in_flight)
        try:
            time.sleep(server.latency)
            self.complete(body, fault)
        finally:
            with server.lock:
                server.in_flight -= 1

    def complete(self, body, fault):
        text = "\n\n".join(message["content"] for message in body["messages"])
        category = text.split("Category: ")[1].split("\n")[0]
        yes = self.server.truth(category, json.loads(text.split("Explanation: ")[1].split("\n")[0]))
        choice = "structured_outputs" in body and self.server.vllm and self.server.vllm >= "0.11"
        word = "yes" if yes else "no"
        content = word if choice else json.dumps({"label": word})
        message, finish = {"role": "assistant", "content": content}, "stop"
        match fault:
            case "429":
                return self.answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
            case "500":
                return self.answer(500, {"error": {"message": "oh dear"}})
            case "cut":
                self.close_connection = True
                return self.connection.shutdown(2)
            case "cut in the middle":
                self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"choices": [')
                self.close_connection = True
                return None
            case "slow":
                time.sleep(1.2)
            case "malformed":
                return self.raw(200, b'{"choices": [{"message": {"content": "yes"')
            case "nested":
                return self.raw(200, b"[" * 100_000)
            case "no completion":
                return self.answer(200, {"object": "list", "choices": []})
            case "huge":
                message["padding"] = "x" * LARGEST_REPLY
            case "refusal":
                message = {
                    "role": "assistant",
                    "content": None,
                    "refusal": "I cannot help with that.",
                }
            case "filter":
                return self.answer(
                    400, {"error": {"message": "filtered", "code": "content_filter"}}
                )
            case "off-enum":
                message["content"] = "maybe" if choice else '{"label": "maybe"}'
            case "prose":
                message["content"] = "I would say yes, it does."
            case "torn json":
                message["content"], finish = '{"label": "ye', "length"
            case "empty":
                message["content"] = None
            case "401":
                shown = self.headers["Authorization"][:-4] + "****"  # as some servers do
                return self.answer(401, {"error": {"message": f"Incorrect API key: {shown}"}})
            case "400":
                said = f"bad {self.headers.get('Authorization')} request"
                return self.answer(400, {"error": {"message": said}})
            case str() if fault.startswith("http"):
                return self.answer(307, {}, {"Location": fault})
        reply = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
        if body.get("logprobs"):  # as a model would that is 80 % sure
            other = "no" if yes else "yes"
            top = [
                {"token": word, "logprob": np.log(0.8 * 0.9)},
                {"token": other, "logprob": np.log(0.2 * 0.9)},
            ]
            reply["choices"][0]["logprobs"] = {"content": [{"token": word, "top_logprobs": top}]}
        reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 2}
        with self.server.lock:
            self.server.answered += 1
        self.answer(200, reply)

    def answer(self, status, reply, headers=None):
        self.raw(status, json.dumps(reply).encode(), headers)

    def raw(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Start servers; they are shut down after the test. Waits between attempts are short."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(*arguments, **options):
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def some(tmp_path) -> Path:
    """Forty real explanations of one SAE, as Neuronpedia's bulk file has them."""
    path = tmp_path / "batch-0.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(AXBENCH.read_text().splitlines(keepends=True)[:40])
    return path


@pytest.fixture
def one(tmp_path) -> Path:
    """A categories file of one category that is not among ours."""
    path = tmp_path / "one.json"
    path.write_text(
        json.dumps([dict(name="code", definition="about {code}", yes="loops", no="birds")])
    )
    return path


def run(*arguments, **options):
    flags = [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    main([*map(str, arguments), *flags])


def rows_of(path: Path) -> dict[tuple[int, str], dict]:
    return {(row["feature"], row["category"]): row for row in read_header_and_rows(path)[1]}


def truth_of(path: Path) -> dict[int, bool]:
    return {
        int(row["index"]): "code" in row["description"] for row in read_header_and_rows(path)[1]
    }


def realised(
    out: Path, truth: dict[int, str], judge: str, learned=()
) -> dict[str, sheets.Agreement]:
    """Agreement with the truth of labels by a judge whose name begins so, not of `learned` ones."""
    found = {}
    for name in ("alignment", "style"):
        rows = [r for (k, c), r in rows_of(out).items() if c == name and k not in learned]
        rows = [r for r in rows if r["judge"].startswith(judge)]
        pairs = np.array([(r["label"], truth[r["feature"]] == name) for r in rows])
        found[name] = sheets.compare(pairs[:, 0], pairs[:, 1])
    return found


def fill(sheet: Path, says) -> list[dict]:
    """A person fills in the sheet."""
    with open(sheet, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in SHEET]
    for row in rows:
        row.update({name: "Yes" if says(int(row["feature"]), name) else "no" for name in names})
    with open(sheet, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return rows
