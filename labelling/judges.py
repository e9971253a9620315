"""Labels without asking about every feature: embeddings, nearest neighbours and a linear model.

A few labelled explanations (x [n, D], y [n]) give a score to every other. Scores become
probabilities by Platt's logistic calibration, fitted on explanations that the scorer had not seen;
the same held-out ones say what agreement with the full labelling to expect. This module needs
scikit-learn (requirements-label.txt).
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from sklearn.cluster import kmeans_plusplus
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from runtime.sources import UserError

TERMS, DIMENSIONS = 1 << 17, 128  # of the TF-IDF embedding: terms counted, directions kept
SAMPLE = 30_000  # explanations that the directions are found in
COVERED = 100_000  # explanations at most from which a covering set is drawn
CHUNK = 16_384  # explanations at a time
FOLDS = 5
WORD = re.compile(r"\w+|[^\w\s]")  # punctuation counts as words: it describes features of form


def embed(texts: list[str], embedder: str, seed: int = 0) -> np.ndarray:
    """Explanations -> float32 [N, D], rows of length 1.

    embedder: "tfidf", or a model of sentence-transformers. Raises UserError if the package that it
    needs, or the model, is not there.
    """
    if embedder == "tfidf":
        return tfidf(texts, seed)
    # Safetensors only: nothing is unpickled, and no code of a repository is run.
    safe = dict(trust_remote_code=False, model_kwargs={"use_safetensors": True})
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(embedder, **safe)
    except ImportError as e:
        needed = "pip install sentence-transformers"
        raise UserError(f"--embedder {embedder}: needs `{needed}`; tfidf does not.") from e
    except (OSError, ValueError) as e:
        raise UserError(f"--embedder {embedder}: cannot be loaded ({e}).") from e
    form = dict(normalize_embeddings=True, convert_to_numpy=True)
    x = model.encode(texts, batch_size=256, show_progress_bar=True, **form)
    return np.asarray(x, dtype=np.float32)


def terms(text: str) -> Iterator[str]:
    """What TF-IDF counts: words, pairs of words, and the first 4 letters of words."""
    words = WORD.findall(text.lower())
    yield from words
    yield from (word[:4] + "-" for word in words)
    yield from map(" ".join, pairwise(words))


def tfidf(texts: list[str], seed: int = 0) -> np.ndarray:
    """Latent semantic analysis (Deerwester et al. 1990) of TF-IDF: float32 [N, D].

    Words used alike come to lie close. Terms and directions come from at most SAMPLE texts.
    """
    sample = np.random.default_rng(seed).permutation(len(texts))[:SAMPLE]
    weigh = TfidfVectorizer(analyzer=terms, max_features=TERMS, sublinear_tf=True, dtype=np.float32)
    weights = weigh.fit_transform([texts[i] for i in sample])
    directions = TruncatedSVD(min(DIMENSIONS, *weights.shape), random_state=seed).fit(weights)
    embedding = make_pipeline(weigh, directions, Normalizer(copy=False))
    starts = range(0, len(texts), CHUNK)
    chunks = [embedding.transform(texts[i : i + CHUNK]).astype(np.float32) for i in starts]
    return np.concatenate(chunks)


def cover(x: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Indices of n rows of x [N, D] spread over its space, none of them a copy of another.

    k-means++ seeding (Arthur and Vassilvitskii 2007), from at most COVERED rows.
    """
    pool = np.random.default_rng(seed).permutation(len(x))[:COVERED]
    pool = np.sort(pool[np.unique(x[pool], axis=0, return_index=True)[1]])
    n = min(n, len(pool))
    return pool[kmeans_plusplus(x[pool], n, random_state=seed)[1]]


def neighbours(k: int, labelled: int) -> KNeighborsClassifier:
    """A classifier by the k nearest labelled rows, weighted by cosine similarity."""
    return KNeighborsClassifier(
        min(k, labelled), metric="cosine", weights=lambda distance: np.maximum(1 - distance, 1e-3)
    )


def linear(ridge: float, labelled: int) -> LogisticRegression:
    """Logistic regression: Σ cross-entropy + ridge/2 |w|², the intercept without penalty."""
    return LogisticRegression(C=1 / ridge, solver="newton-cholesky", tol=1e-6)


NEIGHBOURS = [partial(neighbours, k) for k in (1, 3, 5, 10, 20, 40)]
LINEAR = [partial(linear, ridge) for ridge in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)]


class Judge(NamedTuple):
    """A calibrated classifier, and what it said about labelled rows that it had not seen."""

    probability: Callable[[np.ndarray], np.ndarray]  # new rows [N, D] -> P(yes) [N]
    held_out: np.ndarray  # P(yes) [m]: classifier and calibration both fitted without the row
    chosen: str  # the classifier's setting


def fit(kinds: list, x: np.ndarray, y: np.ndarray, held: np.ndarray, seed: int = 0) -> Judge:
    """Fit the classifier of least held-out log-loss to labelled rows x [n, D], y bool [n].

    held: indices of the rows to cross-validate over. If they are a uniform sample of all features,
    what the judge says about them estimates without bias what it says about the rest; the other
    rows only ever train.
    """
    known = y[held]
    fold = np.random.default_rng(seed).permutation(len(held)) % FOLDS
    scores = np.empty((len(kinds), len(held)))  # of every classifier, fitted without the row's fold
    for i in range(FOLDS):
        rest = np.setdiff1d(np.arange(len(x)), held[fold == i])
        for s, kind in enumerate(kinds):
            scores[s, fold == i] = _scorer(kind, x[rest], y[rest])(x[held[fold == i]])

    def best(rows: np.ndarray) -> int:
        """The classifier that, calibrated on these rows, has the least log-loss on them."""
        losses = []
        for of in scores[:, rows]:
            p = _platt(of, known[rows])(of)
            losses.append(-np.log(np.where(known[rows], p, 1 - p)).mean())
        return int(np.argmin(losses))

    held_out = np.empty(len(held))
    for i in range(FOLDS):  # classifier and calibration are chosen on the other folds
        others = fold != i
        of = scores[best(others)]
        held_out[~others] = _platt(of[others], known[others])(of[~others])

    chosen = best(np.full(len(held), True))
    score, calibrate = _scorer(kinds[chosen], x, y), _platt(scores[chosen], known)

    def probability(new: np.ndarray) -> np.ndarray:
        starts = range(0, len(new), CHUNK)
        return np.concatenate([calibrate(score(new[i : i + CHUNK])) for i in starts])

    kind = kinds[chosen]
    return Judge(probability, held_out, f"{kind.func.__name__} {kind.args[0]}")


def _scorer(kind: Callable, x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """New rows [N, D] -> log-odds of a yes [N]; 0 where only one label was seen."""
    if len(np.unique(y)) < 2:
        return lambda new: np.zeros(len(new))
    model = kind(labelled=len(x)).fit(x, y)

    def score(new: np.ndarray) -> np.ndarray:
        p = model.predict_proba(new)[:, 1].clip(1e-3, 1 - 1e-3)
        return np.log(p / (1 - p))

    return score


def _platt(scores: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Scores [N] -> probabilities [N] by σ(a s + b), fitted to held-out scores and their labels.

    Each label counts as a little of its opposite, by Platt's rule: few rows, or a single class,
    give no certainty. a is not negative: where scores say nothing, those of held-out rows run
    against their labels, because a row's label is missing from what its score was learned from.
    """
    yes, no = int(y.sum()), int((~y).sum())
    target = np.where(y, (yes + 1) / (yes + 2), 1 / (no + 2))
    both = np.concatenate([scores, scores])[:, None]
    labels = np.repeat([True, False], len(y))
    weight = np.concatenate([target, 1 - target])
    line = LogisticRegression(C=100.0, solver="newton-cholesky").fit(both, labels, weight)
    if line.coef_[0, 0] <= 0:
        return lambda new: np.full(len(new), target.mean())
    return lambda new: line.predict_proba(new[:, None])[:, 1]
