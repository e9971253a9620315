"""Label SAE features by category, from their explanations. README.md beside this file has examples.

    python -m labelling --explanations DIR --endpoint http://localhost:8000/v1 --judge-model NAME
    python -m labelling --explanations DIR --judge retrieval --endpoint URL --judge-model NAME
    python -m labelling --explanations DIR --judge local --train sheet.csv
    python -m labelling --explanations DIR --sample 300 --out sheet.csv  # for a person to fill in
    python -m labelling --human sheet.csv --labels runs/labels.jsonl     # agreement with them

As in the paper, an answer is one of two words for each category. One that is neither, where a
server cannot enforce that, stays without a label and is counted, never guessed. The definitions
(categories.json) cover the points of the paper's prompts in our own words.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from labelling.categories import OURS, digest, question, read_categories
from labelling.endpoint import Answer, Endpoint, Question
from labelling.explanations import Explanations, read_explanations
from labelling.journal import Journal
from labelling.sheets import Agreement, Given, compare, read_given, report, write_sheet
from labels import sae_name, write_labels
from runtime import cli
from runtime.cli import at_least, flag
from runtime.messages import brief
from runtime.output import writable_file
from runtime.progress import progress_bar
from runtime.sources import UserError

OUTPUT_TOKENS = 8  # of one answer, for the estimate: {"label": "no"} and the end


@dataclass(frozen=True)
class Settings:
    explanations: str | None = flag(None, "tiny, a file, a folder, a web address, s3://, a Hub id")
    source: str | None = flag(None, "MODEL/LAYER of Neuronpedia, where the file holds several")
    sae: str | None = flag(
        None, "SAE of the features (default: the one that the explanations state)"
    )
    sae_id: str | None = flag(None, "folder of the SAE in --sae")
    categories: str = flag(str(OURS), "definitions: a json list of name, definition, yes, no")
    judge: str = flag(
        "endpoint", "what gives the labels", choices=("endpoint", "retrieval", "local")
    )
    endpoint: str | None = flag(None, "OpenAI-compatible address, up to and including /v1")
    judge_model: str | None = flag(None, "model to ask at --endpoint")
    judge_role: str = flag(
        "system",
        "message that holds the definition; user: for servers without system messages",
        choices=("system", "user"),
    )
    key_env: str = flag("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    extra: str = flag("{}", 'JSON merged into every request, null removes: {"logprobs": true}')
    concurrency: int = flag(64, "requests in flight")
    timeout: float = flag(60.0, "seconds without a byte, after which a request counts as lost")
    attempts: int = flag(6, "tries of one question, with growing waits between them")
    price_in: float = flag(0.0, "price of a million prompt tokens")
    price_out: float = flag(0.0, "price of a million answered tokens")
    dry_run: bool = flag(False, "print how much asking would take, and end; needs no endpoint")
    journal: str | None = flag(
        None, "file of the answers so far (default: --out with .journal.jsonl)"
    )
    ask: int = flag(400, "number of features that --judge retrieval asks about")
    embedder: str = flag("tfidf", "tfidf, or a model of sentence-transformers (path or name)")
    train: str | None = flag(
        None, "labels that --judge local learns from: a sheet, or labels with explanations"
    )
    human: str | None = flag(None, "a person's labels to compare with: a sheet or a label file")
    labels: str | None = flag(None, "with --human: compare this label file, and label nothing")
    sample: int | None = flag(None, "write a blind sheet of so many features to --out, and end")
    seed: int = flag(0, "seed of --sample, of retrieval's choice and of cross-validation")
    out: str = flag("runs/labels.jsonl", "file to write")

    def __post_init__(self):
        at_least(self, 1, "concurrency", "attempts", "ask", "sample")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"--timeout {self.timeout}: more than 0 was expected.")
        at_least(self, 0, "price_in", "price_out", "seed")
        if self.labels:
            if not self.human:
                raise UserError(
                    f"--labels {self.labels}: is compared with --human, which is unset."
                )
            return
        if self.explanations is None:
            raise UserError("--explanations: what to label was expected, for instance tiny.")
        asks = self.sample is None and self.judge != "local"
        if asks and not self.dry_run and not (self.judge_model and self.endpoint):
            raise UserError(f"--judge {self.judge}: needs --endpoint URL and --judge-model NAME.")
        if self.dry_run and not asks:
            raise UserError("--dry-run: tells what asking an endpoint takes; here none is asked.")
        if self.sample is None and self.judge == "local" and not self.train:
            raise UserError("--judge local: needs --train, a file of labelled features.")
        writable_file(self.out)
        read = (self.explanations, self.categories, self.train, self.human)
        taken = {os.path.realpath(name) for name in (*read, self.journal) if name}
        if os.path.realpath(self.out) in taken:
            raise UserError(f"--out {self.out}: is read as well; another name was expected.")
        self.request_fields()

    def request_fields(self) -> dict:
        """The object in --extra."""
        try:
            fields = json.loads(self.extra)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise UserError(f"--extra {brief(self.extra)}: a JSON object was expected.")
        return fields


class Verdict(NamedTuple):
    """One category's labels for all N features."""

    label: np.ndarray  # int8 [N]: 1 yes, 0 no, -1 unlabelled
    confidence: np.ndarray  # float32 [N]: probability that the label is right; nan where unknown
    asked: np.ndarray  # bool [N]: labelled by the endpoint
    expected: Agreement | None = None  # with the labels learned from, for features not among them


def ask(
    s: Settings, e: Explanations, categories: list[dict], chosen: np.ndarray
) -> dict[str, Verdict] | None:
    """Ask the endpoint about the chosen features (indices into e): verdicts by category.

    Every answer is in the journal before its thread asks the next question, so that a run that is
    killed and started again asks only what was not answered. None after a dry run.
    """
    extra, N = s.request_fields(), len(e.texts)

    def questions() -> Iterator[tuple[int, str, Question]]:
        for i in chosen.tolist():
            for category in categories:
                k, name = int(e.features[i]), category["name"]
                messages = question(category, e.texts[i], s.judge_role)
                key = digest(s.judge_model, k, name, messages, extra)
                yield i, name, Question(key, k, name, messages)

    def cost(tokens_in: float, tokens_out: float) -> str:
        price = (tokens_in * s.price_in + tokens_out * s.price_out) / 1e6
        priced = f", cost {price:.2f}" if price else ""
        return f"{tokens_in:,.0f} prompt tokens, {tokens_out:,.0f} answered{priced}"

    path = Path(s.journal) if s.journal else Path(s.out).with_suffix(".journal.jsonl")
    with Journal(path) as journal:
        before = journal.tokens()
        characters = [
            sum(len(message["content"]) for message in q.messages)
            for _, _, q in questions()
            if q.key not in journal.answers
        ]
        total, n = len(chosen) * len(categories), len(characters)
        print(
            f"to ask: {n:,} questions ({len(chosen):,} features, {len(categories)} categories, "
            f"{total - n:,} answered already), about {cost(sum(characters) / 4, n * OUTPUT_TOKENS)}"
            "; a token taken as 4 characters"
        )
        if s.dry_run:
            return None
        if n:
            waiting = (q for _, _, q in questions() if q.key not in journal.answers)
            key = os.environ.get(s.key_env, "").strip()
            server = Endpoint(s.endpoint, s.judge_model, key, extra, s.timeout, s.attempts)
            server.connect()
            with progress_bar(total=n, desc=s.judge_model, unit="answer") as bar:

                def record(question: Question, answer: Answer | None) -> None:
                    if answer is not None:
                        journal.write(question, s.judge_model, answer)
                    bar.update()

                known = (journal.answers.get(q.key) for _, _, q in questions())
                labelled = any(answer and answer.label is not None for answer in known)
                server.ask_all(waiting, record, min(s.concurrency, n), labelled)
            spent = (now - then for now, then in zip(journal.tokens(), before, strict=True))
            again = (f", {n:,} tried again after {why}" for why, n in server.counts.most_common())
            print(f"asked: {cost(*spent)}{''.join(again)}")

        verdicts = {
            category["name"]: Verdict(
                np.full(N, -1, np.int8), np.full(N, np.nan, np.float32), np.zeros(N, bool)
            )
            for category in categories
        }
        outcomes: Counter[str] = Counter()
        for i, name, q in questions():
            answer = journal.answers.get(q.key)
            outcomes[answer.outcome if answer else "unanswered"] += 1
            if answer and answer.label is not None:
                v = verdicts[name]
                v.label[i], v.asked[i] = answer.label, True
                v.confidence[i] = math.nan if answer.confidence is None else answer.confidence
    told = ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(outcomes.items()))
    if not outcomes["answered"]:
        raise UserError(
            f"--endpoint {s.endpoint}: not one of {total:,} questions got a label ({told})."
        )
    print(f"answers: {told}")
    return verdicts


def retrieve(s: Settings, e: Explanations, categories: list[dict]) -> dict[str, Verdict] | None:
    """Ask about --ask features, half chosen to cover the space and half drawn at random, and label
    the rest by their neighbours.

    A feature that the endpoint gave no label stays without. Both halves serve as neighbours.
    Calibration and the agreement to expect come from the random half alone, each of its features
    judged without itself: it is a uniform sample, so that the estimate is unbiased.
    """
    N = len(e.texts)
    if s.ask >= N:
        raise UserError(f"--ask {s.ask}: there are {N} features; --judge endpoint asks about all.")
    judges = _judges()
    x = judges.embed(e.texts, s.embedder, s.seed)
    covering = judges.cover(x, s.ask // 2, s.seed)
    others = np.setdiff1d(np.arange(N), covering)
    at_random = np.random.default_rng(s.seed).choice(others, s.ask - len(covering), replace=False)
    asked = ask(s, e, categories, np.sort(np.concatenate([covering, at_random])))
    if asked is None:
        return None

    rest = np.setdiff1d(others, at_random)
    verdicts = {}
    for name, v in asked.items():
        known = np.flatnonzero(v.asked)
        held = np.flatnonzero(np.isin(known, at_random))
        y = v.label[known] == 1
        p, expected = _predict(name, judges.NEIGHBOURS, (x[known], y), held, x[rest], s.seed)
        v.label[rest], v.confidence[rest] = p >= 0.5, np.maximum(p, 1 - p)
        verdicts[name] = v._replace(expected=expected)
    return verdicts


def learn(s: Settings, e: Explanations, train: Given) -> dict[str, Verdict]:
    """Train a linear model on the labels of --train, and label all by each of its categories."""
    features = [k for k in train.texts if any(k in of for of in train.labels.values())]
    if not features:
        raise UserError(f"--train {s.train}: holds counts, labels of features were expected.")
    if missing := [k for k in features if not train.texts[k]]:
        raise UserError(f"--train {s.train}: feature {missing[0]} has no explanation.")
    judges = _judges()
    both = judges.embed([*e.texts, *(train.texts[k] for k in features)], s.embedder, s.seed)
    new, x = both[: len(e.texts)], both[len(e.texts) :]
    verdicts = {}
    for name, of in train.labels.items():
        known = np.array([i for i, k in enumerate(features) if k in of], dtype=np.int64)
        y = np.array([of[features[i]] for i in known], dtype=bool)
        all_known = np.arange(len(known))
        p, expected = _predict(name, judges.LINEAR, (x[known], y), all_known, new, s.seed)
        label, nobody = (p >= 0.5).astype(np.int8), np.zeros(len(new), dtype=bool)
        verdicts[name] = Verdict(label, np.maximum(p, 1 - p), nobody, expected)
    return verdicts


def _predict(
    name: str, kinds: list, known: tuple, held: np.ndarray, new: np.ndarray, seed: int
) -> tuple[np.ndarray, Agreement]:
    """P(yes) of the new rows, and the agreement to expect of it elsewhere.

    known: labelled rows x [n, D] and their labels y [n]. held: as in judges.fit.
    """
    judges = _judges()
    if len(held) < (needed := 4 * judges.FOLDS):
        raise UserError(
            f"{brief(name)}: {len(held)} labelled features to check against, {needed} are needed."
        )
    judge = judges.fit(kinds, *known, held, seed)
    expected = compare(judge.held_out >= 0.5, known[1][held])
    print(f"{brief(name)}: {judge.chosen}; to expect of it elsewhere: {expected}")
    return judge.probability(new), expected


def _judges() -> ModuleType:
    try:
        # Not at the top, because it needs scikit-learn, which the endpoint judge does without.
        from labelling import judges
    except ImportError as e:
        raise UserError(
            "--judge retrieval and local: need `pip install -r requirements-label.txt`."
        ) from e
    return judges


def write(
    s: Settings,
    e: Explanations,
    verdicts: dict[str, Verdict],
    prompt_sha256: str | None,
    learned: Iterable[int],
) -> None:
    """Write the label file: its header says which SAE, judge, prompt and date, and what is missing.

    learned: features whose labels by a person the judge learned from.
    """
    judge = {
        "endpoint": s.judge_model,
        "retrieval": f"nearest neighbours ({s.embedder}) of {s.judge_model}'s answers",
        "local": f"linear model ({s.embedder}) of {Path(s.train or '').name}",
    }[s.judge]
    missing = {name: int((v.label < 0).sum()) for name, v in verdicts.items()}
    header = {
        "kind": e.kind,
        **e.sae,
        "judge": judge,
        "prompt_sha256": prompt_sha256,
        "date": datetime.now(UTC).date().isoformat(),
        "explanations": e.name,
        "features": len(e.texts),
        "unlabelled": missing,
        "expected": {name: v.expected and v.expected._asdict() for name, v in verdicts.items()},
        "learned": sorted(learned),
    }

    def rows() -> Iterator[dict]:
        for i, text in enumerate(e.texts):
            for name, v in verdicts.items():
                if v.label[i] >= 0:
                    known = not np.isnan(v.confidence[i])
                    yield dict(
                        feature=int(e.features[i]),
                        category=name,
                        label=bool(v.label[i]),
                        confidence=round(float(v.confidence[i]), 4) if known else None,
                        judge=s.judge_model if v.asked[i] else judge,
                        description=text,
                    )

    write_labels(s.out, header, rows())
    for name, v in verdicts.items():
        yes, no = int((v.label == 1).sum()), int((v.label == 0).sum())
        share = yes / max(1, yes + no)
        print(f"{brief(name)}: {yes:,} yes ({share:.1%}), {no:,} no, {missing[name]:,} unlabelled")
    print(f"written to {s.out}, labels of {brief(sae_name(e.sae))}")


def main(argv: Iterable[str] | None = None) -> None:
    s = cli.parse(Settings, argv, doc=__doc__)
    person = read_given(s.human) if s.human else None
    if s.labels:
        return report(Path(s.labels), person)
    local = s.judge == "local" and s.sample is None
    categories = [] if local else read_categories(s.categories)
    e = read_explanations(s.explanations, s.source, s.sae, s.sae_id)
    c = e.counts
    print(
        f"{len(e.texts):,} features with an explanation, of {brief(sae_name(e.sae))} "
        f"({c['rows']:,} rows; {c['several']:,} features with several, rows: {c['repeated']:,} "
        f"repeated, {c['empty']:,} empty, {c['padded']:,} padded)"
    )
    if s.sample:
        names = [category["name"] for category in categories]
        return write_sheet(Path(s.out), e, names, s.sample, s.seed)

    learned, prompt = frozenset(), None
    if local:
        train = read_given(s.train)
        if train.sae in ("", sae_name(e.sae)):  # else its features are others, and only texts count
            learned = frozenset(k for of in train.labels.values() for k in of)
        if person:
            person.unseen(learned)  # refuse before the work, not after it
        verdicts = learn(s, e, train)
    else:
        blank = [question(category, "", s.judge_role) for category in categories]
        prompt = digest(blank, s.request_fields())
        if s.judge == "retrieval":
            verdicts = retrieve(s, e, categories)
        else:
            verdicts = ask(s, e, categories, np.arange(len(e.texts)))
    if verdicts is not None:
        write(s, e, verdicts, prompt, learned)
        if person:
            report(Path(s.out), person)
