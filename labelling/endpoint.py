"""Ask an OpenAI-compatible endpoint many yes-or-no questions: in parallel, with retries, each answer journaled at once.

An answer is a label only where it is exactly one of the two words that the server was told to choose between. A
refusal, another word, or text without a label is kept as what it is and never guessed.

The key comes from the environment, is sent to the endpoint's own host and nowhere else (redirects are not
followed), and is written nowhere: text of the server's that echoes it is cleaned before anybody sees it.
"""

import fcntl
import http.client
import json
import math
import random
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from runtime.sources import UserError

WORDS = {"yes": True, "no": False}
SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": [*WORDS]}},
    "required": ["label"],
    "additionalProperties": False,
}
DEFAULTS = {
    "temperature": 0,
    "max_tokens": 64,
}  # a server that ignores the schema may not run on at our expense
LARGEST_REPLY = 1 << 20  # bytes
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever Retry-After asks for
FIRST_WAIT = 0.5  # seconds before the second attempt; every further wait is twice as long
GIVE_UP = 10  # questions in a row that no attempt could get answered


class Question(NamedTuple):
    key: str  # digest of all that determines the answer; the journal's key
    feature: int
    category: str
    prompt: str


class Answer(NamedTuple):
    outcome: str  # "answered", or why there is no label: "refused", "off-enum", "unparsable"
    label: bool | None
    confidence: float | None  # of the label, where the server sent log-probabilities
    tokens_in: int
    tokens_out: int


class Endpoint:
    """One server, one model. Every thread has a connection of its own, kept open between its questions."""

    def __init__(self, url: str, model: str, key: str, extra: dict, timeout: float, attempts: int):
        """url: up to and including /v1. extra: merged into every request, null removes a field.

        Raises UserError for an address that is none, or that holds a password.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"--endpoint {url}: an address such as http://localhost:8000/v1 was expected."
            )
        if parts.username or parts.password or parts.query:
            raise UserError(
                "--endpoint: must not hold a key or password; put the key into the variable of --key-env."
            )
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(
                "--key-env: the variable's value is no key (blanks or control characters in it)."
            )
        self.url, self.model, self.extra, self._key = url.rstrip("/"), model, extra, key
        self._parts, self._timeout, self._attempts = parts, timeout, attempts
        self._tls = (
            ssl.create_default_context() if parts.scheme == "https" else None
        )  # certificates are checked
        self._own = threading.local()
        self._stop = threading.Event()
        self.choice = False  # vLLM's structured_outputs instead of a json schema
        self.counts: Counter[str] = Counter()  # retries by reason

    def connect(self) -> None:
        """First contact: is anybody there, and is it a vLLM? Raises UserError when nobody answers.

        vLLM says so in its list of models. Its structured_outputs exist since 0.11; older ones ignore what they do not
        know, which would leave the answer free, so that the version is asked for too.
        """

        def served_by_vllm(reply):
            return any(model.get("owned_by") == "vllm" for model in reply["data"])

        def version(reply):
            return tuple(int(part) for part in reply["version"].split(".")[:2])

        root = self._parts.path.rstrip("/").removesuffix("/v1")
        try:
            if self._call("GET", self._parts.path.rstrip("/") + "/models", None, served_by_vllm, 3):
                self.choice = self._call("GET", root + "/version", None, version, 3) >= (0, 11)
        except _NotOffered:
            pass  # an endpoint without a list of models or a version: the json schema is for everybody
        except _Unanswered as e:
            raise UserError(f"--endpoint {self.url}: no usable answer ({e}).") from None

    def ask(self, prompt: str) -> Answer | None:
        """One question; None when every attempt failed. Raises UserError when asking anything else is vain too."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]} | DEFAULTS
        if self.choice:
            body["structured_outputs"] = {"choice": [*WORDS]}
        else:
            schema = {"name": "label", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        body = {name: value for name, value in (body | self.extra).items() if value is not None}
        path = self._parts.path.rstrip("/") + "/chat/completions"
        try:
            return self._call("POST", path, json.dumps(body).encode(), read_answer, self._attempts)
        except _Unanswered:
            return None
        except _NotOffered as e:
            raise UserError(f"--endpoint {self.url}: {e}.") from None

    def ask_all(
        self,
        questions: Iterator[Question],
        record: Callable[[Question, Answer | None], None],
        threads: int,
        bar: tqdm,
    ) -> None:
        """Every question by one of `threads` threads; record is called by one thread at a time, before it goes on.

        No question is drawn before a thread is free, so that memory does not grow with their number. Raises UserError
        when GIVE_UP questions in a row went unanswered, or when the endpoint refuses the requests altogether.
        """
        lock, errors, in_a_row = threading.Lock(), [], 0

        def work():
            nonlocal in_a_row
            try:
                while not self._stop.is_set():
                    with lock:
                        question = next(questions, None)
                    if question is None:
                        return
                    answer = self.ask(question.prompt)
                    with lock:
                        if self._stop.is_set() and answer is None:
                            return
                        record(question, answer)
                        bar.update()
                        in_a_row = 0 if answer else in_a_row + 1
                    if in_a_row >= GIVE_UP:
                        reasons = ", ".join(
                            f"{reason} {n}" for reason, n in self.counts.most_common(3)
                        )
                        raise UserError(
                            f"--endpoint {self.url}: {GIVE_UP} questions in a row unanswered ({reasons})."
                        )
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

    def _call(self, method: str, path: str, body: bytes | None, read: Callable, attempts: int):
        """read(the reply's json), tried again with back-off for 429, 5xx, lost connections and malformed replies."""
        for attempt in range(attempts):
            wait = 0.0
            try:
                status, headers, data = self._once(method, path, body)
                if status == 200:
                    return read(json.loads(data))
                reason = f"HTTP {status}"
                if status in (401, 403):  # the server's text may quote the key: not shown
                    raise UserError(
                        f"--endpoint {self.url}: HTTP {status}, the key (--key-env) was not accepted."
                    )
                if status == 400 and b"content_filter" in data:
                    return Answer("refused", None, None, 0, 0)
                if status not in (408, 409, 429) and status < 500:
                    raise _NotOffered(f"HTTP {status} {self._said(headers, data)}")
                asked_for = headers.get("Retry-After", "")
                wait = float(asked_for) if asked_for.isdigit() else 0.0
            except ssl.SSLCertVerificationError as e:
                raise UserError(
                    f"--endpoint {self.url}: its certificate is not valid ({e.verify_message})."
                ) from None
            except (OSError, http.client.HTTPException) as e:
                reason = (
                    "timeout"
                    if isinstance(e, TimeoutError)
                    else f"connection lost ({type(e).__name__})"
                )
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
                reason = "malformed reply"
            self._hang_up()
            self.counts[reason] += 1
            # Half of the wait is drawn at random, lest all threads come back at once.
            wait = min(LONGEST_WAIT, max(wait, FIRST_WAIT * 2**attempt * random.uniform(0.5, 1)))
            if attempt + 1 == attempts or self._stop.wait(wait):
                raise _Unanswered(reason)

    def _once(self, method: str, path: str, body: bytes | None):
        """One request over this thread's connection: status, headers, at most LARGEST_REPLY bytes."""
        connection = getattr(self._own, "connection", None)
        if connection is None:
            at, options = (self._parts.hostname, self._parts.port), dict(timeout=self._timeout)
            if self._tls:
                connection = http.client.HTTPSConnection(*at, context=self._tls, **options)
            else:
                connection = http.client.HTTPConnection(*at, **options)
            self._own.connection = connection
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read(LARGEST_REPLY + 1)
        if len(data) > LARGEST_REPLY:
            self._hang_up()
            raise ValueError("reply too large")
        return response.status, response.headers, data

    def _hang_up(self) -> None:
        if connection := getattr(self._own, "connection", None):
            connection.close()
            self._own.connection = None

    def _said(self, headers, data: bytes) -> str:
        """The server's explanation of an error, short and without the key."""
        if "Location" in headers:
            return "(a redirect, which is not followed: give the final address)"
        try:
            reply = json.loads(data)
            text = str((reply.get("error") or reply)["message"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = data.decode(errors="replace")
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return f"({text[:200]})" if text else ""


class _Unanswered(Exception):
    """Every attempt failed for a reason that may pass."""


class _NotOffered(Exception):
    """The server does not take such requests."""


def read_answer(reply: dict) -> Answer:
    """A chat completion -> Answer. Raises KeyError and the like for what is not one, which is then asked again."""
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
    """P(label) / (P(yes) + P(no)) at the token that holds the label; None where the reply has no such token."""
    for token in (choice.get("logprobs") or {}).get("content") or []:
        if WORDS.get(_bare(token["token"])) is label:
            p = dict.fromkeys(WORDS.values(), 0.0)
            for other in token.get("top_logprobs") or []:
                if _bare(other["token"]) in WORDS:
                    p[WORDS[_bare(other["token"])]] += math.exp(min(0.0, other["logprob"]))
            if p[label] > 0:
                return p[label] / sum(p.values())
    return None


def _bare(token: str) -> str:
    return token.strip(' "\n{}:').lower()


class Journal:
    """Answers on disk, a json object a line, appended and flushed one by one: what is paid for is not asked again."""

    def __init__(self, path: Path):
        """Open and read it; a last line that a kill cut off is dropped.

        Raises UserError for any other line that cannot be read, and when another process has the journal open.
        """
        self.answers: dict[str, Answer] = {}
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing to this journal.") from None
        except OSError as e:
            raise UserError(f"{path}: the journal cannot be written ({e.strerror}).") from e
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                row = json.loads(line)
                self.answers[row["key"]] = Answer(*(row[name] for name in Answer._fields))
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"{path}: line {number} is not an answer of this journal's.") from e
        self._file.truncate(whole)

    def close(self) -> None:
        """Without an answer nothing is left behind."""
        if not self.answers:
            self._path.unlink()
        self._file.close()

    def write(self, question: Question, judge: str, answer: Answer) -> None:
        head = dict(
            key=question.key, feature=question.feature, category=question.category, judge=judge
        )
        self._file.write(json.dumps(head | answer._asdict()).encode() + b"\n")
        self._file.flush()
        self.answers[question.key] = answer
