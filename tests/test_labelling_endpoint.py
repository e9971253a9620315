"""The endpoint judge over HTTP, against a loopback server that answers as vLLM and misbehaves."""

import os
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from judge import AXBENCH, SOURCE, rows_of, run, truth_of

from labelling import endpoint
from labelling.categories import OURS, question, read_categories
from labels import read_header_and_rows
from runtime.sources import UserError

pytest_plugins = ("judge",)
KEY = "sk-Secret0123456789"


@pytest.mark.parametrize("vllm", ["0.12.1", "0.10.0", None])
def test_every_feature_is_asked_once_in_the_structured_form_the_server_offers(
    serve, some, one, tmp_path, vllm, capsys
):
    server, out = serve(vllm=vllm), tmp_path / "labels.jsonl"
    run(
        explanations=some,
        categories=one,
        endpoint=server.url,
        judge_model="judge",
        out=out,
        concurrency=8,
    )
    truth = truth_of(some)
    assert {k: row["label"] for (k, _), row in rows_of(out).items()} == truth and 0 < sum(
        truth.values()
    ) < 40
    assert len(server.asked) == 40 and server.most <= 8
    for body in server.asked:
        assert ("structured_outputs" in body) == (vllm == "0.12.1") != ("response_format" in body)
        assert body["temperature"] == 0 and body["model"] == "judge"
    if vllm == "0.12.1":
        assert server.asked[0]["structured_outputs"] == {"choice": ["yes", "no"]}
    else:
        schema = server.asked[0]["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["properties"]["label"]["enum"] == ["yes", "no"]
    assert "4,000 prompt tokens, 80 answered" in capsys.readouterr().out
    header, _ = read_header_and_rows(out)
    assert header["sae"] == "google/gemma-scope-2b-pt-res" and header["judge"] == "judge"
    assert (
        header["sae_id"] == "layer_20/width_16k/average_l0_71"
        and len(header["prompt_sha256"]) == 64
    )
    assert header["date"] == time.strftime("%Y-%m-%d", time.gmtime())


TRANSIENT = (
    "429",
    "500",
    "cut",
    "cut in the middle",
    "slow",
    "malformed",
    "nested",
    "no completion",
    "huge",
)


def test_what_passes_is_asked_again(serve, some, one, tmp_path, capsys):
    faults = dict(zip(range(0, 40, 4), TRANSIENT, strict=False))
    server, out = serve(fault=faults.get), tmp_path / "labels.jsonl"
    flags = dict(
        explanations=some, categories=one, endpoint=server.url, judge_model="judge", out=out
    )
    run(**flags, concurrency=4, timeout=0.6)
    assert {k: row["label"] for (k, _), row in rows_of(out).items()} == truth_of(some)
    assert len(server.asked) == 40 + len(TRANSIENT)
    said = capsys.readouterr().out
    for reason in ("HTTP 429", "HTTP 500", "timeout", "malformed reply"):
        assert reason in said


FINAL = {
    "refusal": "refused",
    "filter": "refused",
    "off-enum": "off-enum",
    "prose": "unparsable",
    "torn json": "unparsable",
    "empty": "unparsable",
}


@pytest.mark.parametrize("vllm", ["0.12.1", None])
def test_an_answer_without_a_label_is_counted_and_never_guessed_nor_asked_again(
    serve, some, one, tmp_path, capsys, vllm
):
    faults = dict(enumerate(FINAL))
    server, out = serve(fault=faults.get, vllm=vllm), tmp_path / "labels.jsonl"
    for _ in range(2):
        run(
            explanations=some,
            categories=one,
            endpoint=server.url,
            judge_model="judge",
            out=out,
            concurrency=1,
        )
        assert "34 answered, 1 off-enum, 2 refused, 3 unparsable" in capsys.readouterr().out
    assert len(server.asked) == 40
    assert len(rows_of(out)) == 34 and read_header_and_rows(out)[0]["unlabelled"] == {"code": 6}
    without = [body["messages"][1]["content"] for body in server.asked[:6]]
    category = read_categories(one)[0]
    by_text = {
        question(category, row["description"].strip())[1]["content"]: int(row["index"])
        for row in read_header_and_rows(some)[1]
    }
    assert not {(by_text[text], "code") for text in without} & rows_of(out).keys()


def test_a_server_that_stops_answering_ends_the_run_and_keeps_what_was_answered(
    serve, some, one, tmp_path
):
    server, out = serve(fault=lambda n: "500" if n >= 15 else None), tmp_path / "labels.jsonl"
    flags = dict(
        explanations=some,
        categories=one,
        endpoint=server.url,
        judge_model="judge",
        out=out,
        concurrency=2,
    )
    with pytest.raises(UserError, match="10 questions in a row unanswered .HTTP 500"):
        run(**flags, attempts=2)
    assert not out.exists()
    before, server.fault = len(server.asked), lambda n: None
    run(**flags)
    assert len(server.asked) - before == 40 - 15
    assert {k: row["label"] for (k, _), row in rows_of(out).items()} == truth_of(some)


def test_a_run_without_any_label_writes_nothing(serve, some, one, tmp_path):
    server, out = serve(fault=lambda n: "prose"), tmp_path / "labels.jsonl"
    with pytest.raises(UserError, match="not one of 40 questions got a label .40 unparsable"):
        run(explanations=some, categories=one, endpoint=server.url, judge_model="judge", out=out)
    assert not out.exists()


def test_questions_that_a_server_rejects_are_refused_where_it_answers_others(
    serve, some, one, tmp_path, capsys
):
    server, out = serve(fault=lambda n: "400" if n in (0, 7, 39) else None), tmp_path / "l.jsonl"
    flags = dict(explanations=some, categories=one, judge_model="judge", out=out, concurrency=1)
    for _ in range(2):
        run(**flags, endpoint=server.url)
        assert "37 answered, 3 refused" in capsys.readouterr().out
    assert len(server.asked) == 40


def test_rejected_questions_are_not_recorded_where_no_answer_follows(
    serve, some, one, tmp_path, monkeypatch
):
    """A server that has no credit left says 400 to all: a later run asks them again."""
    monkeypatch.setattr(endpoint, "NO_LABEL", 5)
    server, out = serve(fault=lambda n: "400" if n >= 15 else None), tmp_path / "l.jsonl"
    flags = dict(explanations=some, categories=one, judge_model="judge", out=out, concurrency=1)
    with pytest.raises(UserError, match="HTTP 400"):
        run(**flags, endpoint=server.url)
    assert len(server.asked) == 20
    server.fault = lambda n: None
    run(**flags, endpoint=server.url)
    assert len(rows_of(out)) == 40 and len(server.asked) == 20 + 25


def test_a_judge_that_gives_no_label_is_not_paid_in_full(serve, tmp_path):
    server, out = serve(fault=lambda n: "prose"), tmp_path / "labels.jsonl"
    flags = dict(explanations=AXBENCH, source=SOURCE, endpoint=server.url, judge_model="judge")
    with pytest.raises(UserError, match="the first 50 answers hold no label .50 unparsable"):
        run(**flags, out=out, concurrency=4)
    assert len(server.asked) <= 50 + 4 and not out.exists()


def test_the_output_is_no_file_that_is_read(some, one, tmp_path):
    journal = tmp_path / "journal.jsonl"
    journal.write_text("")
    other = tmp_path / "x" / ".." / "journal.jsonl"
    (tmp_path / "x").mkdir()
    for flags in (dict(out=other, journal=journal), dict(out=one)):
        with pytest.raises(UserError, match="is read as well"):
            run(explanations=some, categories=one, endpoint="http://x", judge_model="j", **flags)


def test_a_question_that_stays_unanswered_is_asked_by_the_next_run(
    serve, some, one, tmp_path, capsys
):
    server, out = serve(fault=lambda n: "500" if n < 3 else None), tmp_path / "labels.jsonl"
    flags = dict(
        explanations=some,
        categories=one,
        endpoint=server.url,
        judge_model="judge",
        out=out,
        concurrency=1,
    )
    run(**flags, attempts=3)
    assert "39 answered, 1 unanswered" in capsys.readouterr().out and len(rows_of(out)) == 39
    run(**flags)
    assert len(rows_of(out)) == 40 and len(server.asked) == 3 + 40


def test_killed_at_any_moment_it_loses_the_requests_in_flight_at_most(serve, one, tmp_path):
    server, out = serve(), tmp_path / "labels.jsonl"
    server.latency = 0.05
    command = [
        "-m",
        "labelling",
        "--explanations",
        AXBENCH,
        "--source",
        SOURCE,
        "--categories",
        one,
    ]
    command += [
        "--endpoint",
        server.url,
        "--judge-model",
        "judge",
        "--out",
        out,
        "--concurrency",
        8,
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while server.answered < 100 and process.poll() is None:
        time.sleep(0.01)
    if sys.platform == "linux":
        assert KEY not in Path(f"/proc/{process.pid}/cmdline").read_text()
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    time.sleep(0.2)
    journal = out.with_suffix(".journal.jsonl")
    with open(journal, "a") as file:
        file.write('{"key": "torn')  # as a kill in the middle of a write leaves it
    assert not out.exists() and process.returncode == -signal.SIGKILL
    assert server.answered - journal.read_text().count("\n") <= 8
    before = len(server.asked)
    run(*command[2:])
    assert len(server.asked) - before <= 300 - before + 8
    found = rows_of(out)
    assert len(found) == 300 and all(
        row["label"] == ("code" in row["description"]) for row in found.values()
    )
    run(*command[2:])
    assert len(server.asked) <= 300 + 8  # nothing is asked twice, and the journal is whole again
    assert KEY not in said + journal.read_text() + out.read_text()
    assert (
        server.headers[0]["Authorization"] == f"Bearer {KEY}"
        and "Authorization" not in server.headers[-1]
    )


def test_the_key_is_shown_to_nobody(serve, some, one, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    elsewhere = serve()
    flags = dict(
        explanations=some,
        categories=one,
        judge_model="judge",
        out=tmp_path / "l.jsonl",
        key_env="JUDGE_KEY",
    )
    for fault, told in (
        ("401", "key"),
        ("400", r"bad Bearer \*\*\* request"),
        (elsewhere.url, "redirect"),
    ):
        with pytest.raises(UserError, match=told) as e:
            run(**flags, endpoint=serve(fault=lambda n, fault=fault: fault).url)
        assert KEY[:9] not in str(e.value)
    assert not elsewhere.asked  # a redirect is not followed, the key stays with its host
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n\tnot a key")
    with pytest.raises(UserError, match="JUDGE_KEY|--key-env") as e:
        run(**flags, endpoint=elsewhere.url)
    assert KEY not in str(e.value)
    with pytest.raises(UserError, match="--endpoint") as e:
        run(**flags, endpoint=f"https://me:{KEY}@localhost/v1")
    assert KEY not in str(e.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_https_needs_a_certificate_that_is_trusted(serve, some, one, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server, out = serve(tls=tls), tmp_path / "labels.jsonl"
    flags = dict(
        explanations=some, categories=one, endpoint=server.url, judge_model="judge", out=out
    )
    with pytest.raises(UserError, match="certificate is not valid"):
        run(**flags)
    assert not server.asked
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    run(**flags)
    assert len(rows_of(out)) == 40


def test_as_many_requests_as_asked_for_are_in_flight_and_connections_are_kept(serve, tmp_path):
    server = serve()
    server.latency = 0.02
    connections = []
    server.verify_request = lambda request, address: connections.append(address) or True
    flags = dict(
        explanations=AXBENCH,
        source=SOURCE,
        endpoint=server.url,
        judge_model="judge",
        concurrency=16,
    )
    run(**flags, out=tmp_path / "labels.jsonl")
    assert server.most == 16 and len(server.asked) == 600
    assert len(connections) <= 17  # the first contact's, and one a thread


def test_confidence_comes_from_log_probabilities_where_they_are_sent(serve, some, one, tmp_path):
    server, out = serve(), tmp_path / "labels.jsonl"
    flags = dict(
        explanations=some, categories=one, endpoint=server.url, judge_model="judge", out=out
    )
    run(**flags)
    assert {row["confidence"] for row in rows_of(out).values()} == {None}
    run(**flags, extra='{"logprobs": true, "top_logprobs": 5, "temperature": null}')
    assert {row["confidence"] for row in rows_of(out).values()} == {0.8}
    assert (
        len(server.asked) == 80 and "temperature" not in server.asked[-1]
    )  # another question, asked anew


def test_the_dry_run_counts_and_asks_nobody(serve, some, tmp_path, capsys):
    server, out = serve(), tmp_path / "labels.jsonl"
    flags = dict(explanations=some, out=out, price_in=2, price_out=8)
    run("--dry-run", **flags)  # needs neither an endpoint nor a model
    said = capsys.readouterr().out
    texts = [row["description"].strip() for row in read_header_and_rows(some)[1]]
    asked = [question(c, t) for c in read_categories(OURS) for t in texts]
    characters = sum(len(message["content"]) for messages in asked for message in messages)
    cost = (characters / 4 * 2 + 80 * 8 * 8) / 1e6
    assert "80 questions (40 features, 2 categories, 0 answered already)" in said
    assert f"about {characters / 4:,.0f} prompt tokens" in said
    assert f"cost {cost:.2f}" in said and list(tmp_path.glob("labels*")) == []
    flags["judge_model"] = "judge"
    run(**flags, endpoint=server.url)
    assert f"cost {(80 * 100 * 2 + 80 * 2 * 8) / 1e6:.2f}" in capsys.readouterr().out
    run("--dry-run", **flags)
    assert "to ask: 0 questions" in capsys.readouterr().out


@pytest.mark.parametrize("status", [500, 401, 404])
def test_the_list_of_models_is_a_hint_and_no_condition(serve, some, one, tmp_path, status):
    server, out = serve(), tmp_path / "labels.jsonl"
    server.models = status
    flags = dict(explanations=some, categories=one, judge_model="judge", out=out)
    run(**flags, endpoint=server.url)
    assert {k: row["label"] for (k, _), row in rows_of(out).items()} == truth_of(some)
    assert "response_format" in server.asked[0]  # what every server knows


def test_definitions_go_into_the_system_message_or_by_flag_into_the_users(
    serve, some, one, tmp_path
):
    server, out = serve(), tmp_path / "labels.jsonl"
    flags = dict(explanations=some, categories=one, judge_model="judge", endpoint=server.url)
    run(**flags, out=out)
    system, user = server.asked[-1]["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "about {code}" in system["content"] and "about {code}" not in user["content"]
    run(**flags, out=out, judge_role="user")
    assert len(server.asked) == 80  # another question, asked anew
    (alone,) = server.asked[-1]["messages"]
    assert alone["role"] == "user" and "about {code}" in alone["content"]


def test_a_journal_that_is_no_file_or_does_not_fit_is_a_sentence(serve, some, one, tmp_path):
    out = tmp_path / "labels.jsonl"
    flags = dict(explanations=some, categories=one, judge_model="judge", out=out)
    os.mkfifo(tmp_path / "pipe")
    for journal in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="not a regular file"):
            run(**flags, journal=journal, endpoint=serve().url)
    server, limit = serve(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limit[1]))  # as a disk that is full
    try:
        with pytest.raises(UserError, match=r"labels.journal.jsonl: cannot be written"):
            run(**flags, endpoint=server.url, concurrency=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not out.exists() and len(server.asked) < 40
    run(**flags, endpoint=server.url)
    assert len(rows_of(out)) == 40 and len(server.asked) < 40 + 4
