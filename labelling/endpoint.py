"""Ask an OpenAI-compatible endpoint many yes-or-no questions, in parallel and with retries.

An answer is a label only if it is exactly one of the two words that the server was told to choose
between. A refusal, another word, or text without a label is kept as what it is and never guessed.

The key comes from the environment and is sent to the endpoint's own host only, because redirects
are not followed. Text of the server's that echoes the key is cleaned before it is shown.

This is http.client and not huggingface_hub's InferenceClient: without a key that client sends the
Hub token it finds on the machine to whatever endpoint is named, it follows redirects with the
question, it refuses local servers under HF_HUB_OFFLINE, and it is slower (benchmarks/RESULTS.md).
"""

import http.client
import json
import math
import random
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

from runtime.messages import brief
from runtime.sources import UserError

WORDS = {"yes": True, "no": False}
SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": [*WORDS]}},
    "required": ["label"],
    "additionalProperties": False,
}
# A server that ignores the schema must not go on writing at our expense.
DEFAULTS = {"temperature": 0, "max_tokens": 64}
LARGEST_REPLY = 1 << 20  # bytes
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever Retry-After asks for
FIRST_WAIT = 0.5  # seconds before the second attempt; every further wait is twice as long
GIVE_UP = 10  # questions in a row without an answer, after which the run ends
MALFORMED = (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)
AGAIN = (408, 409, 429)  # statuses that may pass, beside those of 500 and above
# What a server says to one question (its filter, its length), or to all of them (a wrong flag, no
# credit left): the answers to other questions tell which.
REJECTED = (400, 413, 422)
NO_LABEL = 50  # questions rejected in a row, or first answers without a label, that end the run


class Question(NamedTuple):
    key: str  # digest of all that determines the answer; the journal's key
    feature: int
    category: str
    messages: list[dict]


class Answer(NamedTuple):
    outcome: str  # "answered", or why there is no label: "refused", "off-enum", "unparsable"
    label: bool | None
    confidence: float | None  # of the label, where the server sent log-probabilities
    tokens_in: int
    tokens_out: int


class _Unanswered(Exception):
    """Every attempt failed for a reason that may pass."""


class _Unreachable(_Unanswered):
    """Every attempt failed, the last because there was no connection."""


class _Refused(Exception):
    """The server answered with a status that will not change."""

    def __init__(self, status: int, headers, data: bytes):
        self.status, self.headers, self.data = status, headers, data


class _Rejected(UserError):
    """The server did not accept a question, and may or may not accept others."""


REFUSED = Answer("refused", None, None, 0, 0)


class Endpoint:
    """One server, one model. Each thread keeps a connection of its own open between questions."""

    def __init__(self, url: str, model: str, key: str, extra: dict, timeout: float, attempts: int):
        """url: up to and including /v1. extra: merged into every request, null removes a field."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname, parts.port)
        except ValueError:  # brackets of no address, or a port that is no number
            host = (None, None)
        if not host[0] or parts.scheme not in ("http", "https"):
            raise UserError(
                f"--endpoint {brief(url)}: an address like http://localhost:8000/v1 was expected."
            )
        if parts.username or parts.password or parts.query:
            raise UserError("--endpoint: must not hold a key; --key-env names a variable for it.")
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError("--key-env: the variable's value is no key (it has blanks in it).")
        self.url, self.model, self.extra, self._key = url.rstrip("/"), model, extra, key
        self._path, self._attempts = parts.path.rstrip("/"), attempts
        kind, options = http.client.HTTPConnection, dict(timeout=timeout)
        if parts.scheme == "https":
            kind = http.client.HTTPSConnection
            options["context"] = ssl.create_default_context()
        self._open = partial(kind, *host, **options)
        self._own = threading.local()
        self._stop = threading.Event()
        self._choice = False  # vLLM's structured_outputs instead of a json schema
        self.counts: Counter[str] = Counter()  # retries by reason

    def connect(self) -> None:
        """Reach the server, and see whether it is a vLLM. Raises UserError if nothing answers.

        vLLM says so in its list of models. Its structured_outputs exist since 0.11; older versions
        ignore them, which would leave the answer free. A server without a usable list gets the json
        schema, which is for all servers.
        """

        def is_vllm(reply):
            return any(model.get("owned_by") == "vllm" for model in reply["data"])

        def is_recent(reply):
            return tuple(int(part) for part in reply["version"].split(".")[:2]) >= (0, 11)

        version = self._path.removesuffix("/v1") + "/version"
        try:
            if self._call("GET", self._path + "/models", None, is_vllm, attempts=2):
                self._choice = self._call("GET", version, None, is_recent, attempts=2)
        except _Unreachable as e:
            raise UserError(f"--endpoint {self.url}: no usable answer ({e}).") from None
        except (_Refused, _Unanswered):
            pass
        self.counts.clear()

    def ask(self, messages: list[dict]) -> Answer | None:
        """One question; None if every attempt failed. Raises UserError if all others would fail."""
        body = {"model": self.model, "messages": messages, **DEFAULTS}
        if self._choice:
            body["structured_outputs"] = {"choice": [*WORDS]}
        else:
            schema = {"name": "label", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        body = {name: value for name, value in (body | self.extra).items() if value is not None}
        data, path = json.dumps(body).encode(), self._path + "/chat/completions"
        try:
            return self._call("POST", path, data, read_answer, self._attempts)
        except _Unanswered:
            return None
        except _Refused as e:
            if e.status == 400 and b"content_filter" in e.data:
                return REFUSED
            kind = _Rejected if e.status in REJECTED else UserError
            raise kind(f"--endpoint {self.url}: HTTP {e.status} {self._said(e)}.") from None

    def ask_all(
        self,
        questions: Iterator[Question],
        record: Callable[[Question, Answer | None], None],
        threads: int,
        labelled: bool = False,
    ) -> None:
        """Ask every question by one of `threads` threads.

        record is called by one thread at a time, and before that thread asks again. A question is
        drawn when a thread is free, so that memory does not grow with their number. labelled:
        whether an earlier run of these questions got a label. Raises UserError if GIVE_UP questions
        in a row stay without an answer, if the server refuses, and by NO_LABEL.

        A rejected question is recorded as refused once the server has answered another, because
        what is recorded is never asked again.
        """
        lock = threading.Lock()
        errors: list[BaseException] = []
        in_a_row = 0
        rejected: list[tuple[Question, _Rejected]] = []  # since the last answer
        outcomes: Counter[str] = Counter()

        def record_rejected():
            for question, _ in rejected:
                record(question, REFUSED)
            rejected.clear()

        def work():
            nonlocal in_a_row
            try:
                while not self._stop.is_set():
                    with lock:
                        question = next(questions, None)
                    if question is None:
                        return
                    try:
                        answer = self.ask(question.messages)
                    except _Rejected as e:
                        with lock:
                            rejected.append((question, e))
                            if len(rejected) >= NO_LABEL:
                                raise
                        continue
                    with lock:
                        if self._stop.is_set() and answer is None:
                            return
                        if answer:
                            record_rejected()
                            outcomes[answer.outcome] += 1
                        record(question, answer)
                        in_a_row = 0 if answer else in_a_row + 1
                        without = not labelled and not outcomes["answered"]
                        if without and outcomes.total() >= NO_LABEL:
                            told = ", ".join(f"{n} {why}" for why, n in outcomes.items() if n)
                            why = f"the first {NO_LABEL} answers hold no label ({told})"
                            raise UserError(f"--judge-model {brief(self.model)}: {why}.")
                    if in_a_row >= GIVE_UP:
                        why = ", ".join(f"{why} {n}" for why, n in self.counts.most_common(3))
                        why = f"{GIVE_UP} questions in a row unanswered ({why})"
                        raise UserError(f"--endpoint {self.url}: {why}.")
            except BaseException as e:
                errors.append(e)
                self._stop.set()
            finally:
                self._hang_up()

        workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            self._stop.set()
        if errors:
            raise errors[0]
        if rejected and not labelled and not outcomes:
            raise rejected[0][1]
        record_rejected()

    def _call(self, method: str, path: str, body: bytes | None, read: Callable, attempts: int):
        """read(the reply's json); again after 429, 5xx, a lost connection or a malformed reply."""
        for attempt in range(attempts):
            wait, failure = 0.0, _Unanswered
            try:
                status, headers, data = self._once(method, path, body)
                if status == 200:
                    return read(json.loads(data))
                if status not in AGAIN and status < 500:
                    raise _Refused(status, headers, data)
                reason = f"HTTP {status}"
                asked_for = headers.get("Retry-After", "")
                wait = float(asked_for) if asked_for.isdecimal() else 0.0
            except ssl.SSLCertVerificationError as e:
                why = f"its certificate is not valid ({e.verify_message})"
                raise UserError(f"--endpoint {self.url}: {why}.") from None
            except TimeoutError:
                reason = "timeout"
            except (OSError, http.client.HTTPException) as e:
                reason, failure = f"connection lost ({type(e).__name__})", _Unreachable
            except MALFORMED:
                reason = "malformed reply"
            self._hang_up()
            self.counts[reason] += 1
            # Half of the wait is drawn at random, so that the threads do not come back together.
            backoff = FIRST_WAIT * 2**attempt * random.uniform(0.5, 1)
            wait = min(LONGEST_WAIT, max(wait, backoff))
            if attempt + 1 == attempts or self._stop.wait(wait):
                raise failure(reason)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, dict, bytes]:
        """One request over this thread's connection: status, headers, body."""
        connection = self._own.connection = getattr(self._own, "connection", None) or self._open()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read(LARGEST_REPLY + 1)
        if len(data) > LARGEST_REPLY:
            raise ValueError("reply too large")
        return response.status, response.headers, data

    def _hang_up(self) -> None:
        if connection := getattr(self._own, "connection", None):
            connection.close()
            self._own.connection = None

    def _said(self, refused: _Refused) -> str:
        """The server's explanation of an error, short and without the key."""
        if refused.status in (401, 403):  # its text may quote a part of the key
            return "(the key of --key-env was not accepted)"
        if "Location" in refused.headers:
            return "(a redirect, which is not followed: give the final address)"
        try:
            reply = json.loads(refused.data)
            text = str((reply.get("error") or reply)["message"])
        except MALFORMED:
            text = refused.data.decode(errors="replace")
        text = text.replace(self._key, "***") if self._key else text
        return f"({brief(' '.join(text.split()))})"


def read_answer(reply: dict) -> Answer:
    """A chat completion -> Answer. Raises KeyError and the like for what is not one."""
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    message = choice["message"]
    outcome, label, content = "unparsable", None, message.get("content")
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        outcome = "refused"
    elif isinstance(content, str):
        word = content.strip()
        if word.startswith("{"):
            try:
                word = json.loads(word).get("label")
            except ValueError:
                word = None
        elif len(word.split()) != 1:  # prose
            word = None
        if isinstance(word, str):
            label = WORDS.get(word.lower())
            outcome = "off-enum" if label is None else "answered"
    confidence = None if label is None else _confidence(choice, label)
    tokens = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(outcome, label, confidence, *tokens)


def _confidence(choice: dict, label: bool) -> float | None:
    """P(label) / (P(yes) + P(no)) at the token that holds the label; None without such a token."""

    def says(token: dict) -> bool | None:
        return WORDS.get(token["token"].strip(' "\n{}:').lower())

    for token in (choice.get("logprobs") or {}).get("content") or []:
        if says(token) is label:
            p = {True: 0.0, False: 0.0}
            for other in token.get("top_logprobs") or []:
                if says(other) is not None:
                    p[says(other)] += math.exp(min(0.0, other["logprob"]))
            if p[label] > 0:
                return p[label] / sum(p.values())
    return None
