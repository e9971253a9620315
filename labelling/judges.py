"""Labels without asking about every feature: embeddings, nearest neighbours, a linear model, and how far to trust them.

A few labelled explanations (x [n, D], y [n]) give a score to every other. Scores become probabilities by Platt's
logistic calibration, fitted on explanations that the scorer had not seen, and the same held-out ones say what
agreement with the full labelling to expect.
"""

import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from runtime.sources import UserError

BUCKETS, DIMENSIONS = 1 << 17, 128  # of the TF-IDF embedding: terms, and what they are projected to
SAMPLE = 30_000  # explanations that its directions are found in
CHUNK = 16_384  # explanations at a time
FOLDS = 5
WORD = re.compile(
    r"\w+|[^\w\s]"
)  # a mark of punctuation is a word: features of form are described by them


# --- embeddings -----------------------------------------------------------------------------------------------


def embed(texts: list[str], embedder: str, seed: int = 0) -> np.ndarray:
    """Explanations -> float32 [N, D], rows of length 1. embedder: "tfidf", or a model of sentence-transformers.

    Raises UserError when sentence-transformers or the model is not there.
    """
    if embedder == "tfidf":
        return tfidf(texts, seed)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as e:
        raise UserError(
            f"--embedder {embedder}: needs `pip install sentence-transformers`, tfidf nothing."
        ) from e
    try:  # safetensors only: nothing is unpickled, no code of a repository is run
        model = SentenceTransformer(
            embedder, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError) as e:
        raise UserError(f"--embedder {embedder}: cannot be loaded ({e}).") from e
    x = model.encode(
        texts,
        batch_size=256,
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=True,
    )
    return np.asarray(x, dtype=np.float32)


def tfidf(texts: list[str], seed: int = 0) -> np.ndarray:
    """Hashed TF-IDF of words, word pairs and word beginnings, along its main directions: float32 [N, DIMENSIONS].

    The directions are latent semantic analysis (Deerwester et al. 1990) of at most SAMPLE explanations, so that words
    used alike come to lie close. There is no vocabulary; of size N are the result and the terms alone.
    """
    chunks, frequency = [], np.zeros(BUCKETS, dtype=np.int64)
    bar = tqdm(
        total=2 * len(texts),
        desc="embedding",
        unit="explanation",
        mininterval=1,
        disable=len(texts) < CHUNK,
    )
    for start in range(0, len(texts), CHUNK):
        chunks.append(_terms(texts[start : start + CHUNK]))
        frequency += np.bincount(chunks[-1].bucket, minlength=BUCKETS)
        bar.update(len(texts[start : start + CHUNK]))
    idf = torch.from_numpy(np.log((1 + len(texts)) / (1 + frequency)) * (frequency > 1)).float()
    sample = np.random.default_rng(seed).permutation(len(texts))[:SAMPLE]
    directions = _directions(_terms([texts[i] for i in sample]), idf, seed)
    x = np.empty((len(texts), directions.shape[1]), dtype=np.float32)
    for i, terms in enumerate(chunks):
        rows = _project(terms, idf, directions)
        x[i * CHUNK : i * CHUNK + len(rows)] = F.normalize(rows, dim=1).numpy()
        bar.update(len(rows))
    return x


class Terms(NamedTuple):
    """The distinct terms of some texts, text after text: a sparse matrix [N, BUCKETS] of counts."""

    bucket: np.ndarray  # int32 [terms]
    count: np.ndarray  # int32 [terms]
    start: np.ndarray  # int64 [N], where each text's terms begin


def _terms(texts: list[str]) -> Terms:
    hashes: dict[str, int] = {}

    def bucket(word):
        if word not in hashes:
            hashes[word] = zlib.crc32(word.encode())
        return hashes[word]

    words = [WORD.findall(text.lower()) for text in texts]
    document = np.repeat(np.arange(len(texts)), [len(w) for w in words])
    whole = np.array([bucket(w) for text in words for w in text], dtype=np.int64)
    begins = np.array([bucket(w[:4] + "-") for text in words for w in text], dtype=np.int64)
    same = document[1:] == document[:-1]
    pairs = (whole[:-1] * 1_000_003 + whole[1:])[same]
    term = np.concatenate([whole, begins, pairs]) % BUCKETS
    document = np.concatenate([document, document, document[1:][same]])
    keys, counts = np.unique(document * BUCKETS + term, return_counts=True)
    start = np.searchsorted(keys, np.arange(len(texts)) * BUCKETS)
    return Terms((keys % BUCKETS).astype(np.int32), counts.astype(np.int32), start)


def _weights(terms: Terms, idf: Tensor) -> tuple[Tensor, Tensor]:
    """Of the matrix A of TF-IDF weights, rows of length 1: column and value of every entry [terms]."""
    column = torch.from_numpy(terms.bucket).long()
    value = torch.from_numpy(terms.count).float().sqrt() * idf[column]
    row = torch.from_numpy(
        np.repeat(np.arange(len(terms.start)), np.diff(terms.start, append=len(column)))
    )
    square = torch.zeros(len(terms.start)).index_add(0, row, value.square())
    return column, value / square.sqrt().clamp(min=1e-12)[row]


def _project(terms: Terms, idf: Tensor, directions: Tensor) -> Tensor:
    """A @ directions: [N, BUCKETS] @ [BUCKETS, D] -> [N, D]."""
    column, value = _weights(terms, idf)
    start = torch.from_numpy(terms.start)
    return F.embedding_bag(column, directions, start, mode="sum", per_sample_weights=value)


def _directions(terms: Terms, idf: Tensor, seed: int) -> Tensor:
    """The leading right singular vectors of A, up to rotation: [BUCKETS, D], by randomised subspace iteration (Halko,
    Martinsson and Tropp 2011)."""
    column, value = _weights(terms, idf)
    row = torch.from_numpy(
        np.repeat(np.arange(len(terms.start)), np.diff(terms.start, append=len(column)))
    )
    entries, shape = torch.stack([column, row]), (BUCKETS, len(terms.start))
    transposed = torch.sparse_coo_tensor(entries, value, shape, check_invariants=False)
    width = min(DIMENSIONS, len(terms.start))
    v = torch.randn(BUCKETS, width, generator=torch.Generator().manual_seed(seed))
    for _ in range(5):
        q = torch.linalg.qr(_project(terms, idf, v)).Q  # [n, D]
        v = transposed @ q  # [BUCKETS, n] @ [n, D]
    return torch.linalg.qr(v).Q


def cover(x: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n rows of x [N, D] spread over its space: k-means++ seeding, each drawn in proportion to its squared distance
    from those drawn before (Arthur and Vassilvitskii 2007). Drawn from at most 100,000 rows."""
    rng = np.random.default_rng(seed)
    pool = np.sort(rng.choice(len(x), min(len(x), 100_000), replace=False))
    rows = torch.from_numpy(x[pool])
    distance = torch.ones(len(pool), dtype=torch.float64)  # the first is drawn uniformly
    chosen = []
    for _ in range(min(n, len(pool))):
        total = float(distance.sum())
        if total <= 0:  # nothing left but copies of those chosen
            break
        chosen.append(
            int(
                torch.searchsorted(distance.cumsum(0), rng.random() * total).clamp(
                    max=len(pool) - 1
                )
            )
        )
        distance = torch.minimum(distance, (2 - 2 * rows @ rows[chosen[-1]]).clamp(min=0).double())
        distance[chosen[-1]] = 0
    return pool[chosen]


# --- scorers: labelled rows x [n, D], y [n] -> a score for every new row -----------------------------------------


def neighbours(x: Tensor, y: Tensor, new: Tensor, k: int) -> Tensor:
    """Log-odds of a yes among the k nearest labelled rows, weighted by cosine similarity: new [N, D] -> [N]."""
    similarity, index = (new @ x.T).topk(min(k, len(x)), dim=1)  # [N, n] -> [N, k]
    weight = similarity.clamp(min=1e-3)
    prior = y.mean().clamp(
        0.01, 0.99
    )  # where the neighbours are far and few, the share of yes among all
    share = ((weight * y[index]).sum(1) + 0.5 * prior) / (weight.sum(1) + 0.5)
    return torch.logit(share, eps=1e-4)


def linear(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """Log-odds of a yes by logistic regression: new [N, D] -> [N]."""
    w, b = logistic(x, y, ridge)
    return new @ w + b


NEIGHBOURS = [partial(neighbours, k=k) for k in (1, 3, 5, 10, 20, 40)]
LINEAR = [partial(linear, ridge=ridge) for ridge in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)]


def logistic(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """w [D], b of the minimum of Σ cross-entropy + ridge/2 |w|², by Newton's method; b is not penalised."""
    X = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    y, penalty = y.double(), torch.full((X.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 1e-6
    w = torch.zeros_like(penalty)
    for _ in range(50):
        p = torch.sigmoid(X @ w)
        gradient = X.T @ (p - y) + penalty * w
        hessian = X.T @ ((p * (1 - p)).unsqueeze(1) * X) + torch.diag(penalty + 1e-9)
        step = torch.linalg.solve(hessian, gradient)
        w = w - step * min(1.0, 5 / float(step.abs().max().clamp(min=1e-12)))
        if float(step.abs().max()) < 1e-8:
            break
    return w[:-1].float(), w[-1].float()


# --- calibration ----------------------------------------------------------------------------------------------


class Judge(NamedTuple):
    """A calibrated scorer, and what it said about labelled rows that it had not seen."""

    probability: Callable[[np.ndarray], np.ndarray]  # new rows [N, D] -> P(yes) [N]
    held_out: np.ndarray  # P(yes) [m]: scorer and calibration both fitted without the row
    chosen: str  # the scorer's setting


def fit(scorers: list, x: np.ndarray, y: np.ndarray, held: np.ndarray, seed: int = 0) -> Judge:
    """Fit the scorer of least held-out log-loss to labelled rows x [n, D], y bool [n], and calibrate it.

    held: indices of the rows to cross-validate over. Where they are a uniform sample of all features, what the judge
    says about them estimates without bias what it says about the rest; the other rows only ever train.
    """
    X, Y = torch.from_numpy(x), torch.from_numpy(y.astype(np.float32))
    known = Y[held]
    fold = np.random.default_rng(seed).permutation(len(held)) % FOLDS
    scores = torch.empty(len(scorers), len(held))  # of every scorer, fitted without the row's fold
    for i in range(FOLDS):
        rest = np.setdiff1d(np.arange(len(x)), held[fold == i])
        for s, scorer in enumerate(scorers):
            scores[s, fold == i] = scorer(X[rest], Y[rest], X[held[fold == i]])

    def best(rows: np.ndarray) -> int:
        """The scorer that, calibrated on these rows, has the least log-loss on them."""
        p = [torch.sigmoid(_platt(of[rows], known[rows], of[rows])) for of in scores]
        return min(range(len(p)), key=lambda s: float(F.binary_cross_entropy(p[s], known[rows])))

    held_out = torch.empty(len(held))
    for i in range(FOLDS):  # scorer and calibration are chosen on the other folds
        of = scores[best(fold != i)]
        held_out[fold == i] = torch.sigmoid(_platt(of[fold != i], known[fold != i], of[fold == i]))
    scorer, of = scorers[best(fold >= 0)], scores[best(fold >= 0)]

    def probability(new: np.ndarray) -> np.ndarray:
        out = np.empty(len(new), dtype=np.float32)
        for start in range(0, len(new), CHUNK):
            s = scorer(X, Y, torch.from_numpy(new[start : start + CHUNK]))
            out[start : start + CHUNK] = torch.sigmoid(_platt(of, known, s)).numpy()
        return out

    setting = ", ".join(f"{name} {value}" for name, value in scorer.keywords.items())
    return Judge(probability, held_out.numpy(), setting)


def _platt(scores: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Log-odds a s + b fitted to held-out scores. Targets lie off 0 and 1 by Platt's rule: few rows, or a single class,
    give no certainty. a is not negative: where scores say nothing, those of held-out rows run against their labels,
    because a row's label is missing from what its score was learned from, and a slope could exploit that."""
    yes = float(y.sum())
    target = torch.where(y > 0, (yes + 1) / (yes + 2), 1 / (len(y) - yes + 2))
    a, b = logistic(scores.unsqueeze(1), target, ridge=1e-2)
    return a * new + b if a > 0 else torch.logit(target.mean()).expand(len(new))


# --- agreement ------------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """Of a judge (predicted) with a person (true)."""

    n: int
    accuracy: float
    mcc: float
    mcc_low: float  # bounds of the 95 % bootstrap interval
    mcc_high: float
    kappa: float  # Cohen's
    tp: int
    fp: int
    fn: int
    tn: int


def agreement(
    tp: int, fp: int, fn: int, tn: int, resamples: int = 10_000, seed: int = 0
) -> Agreement:
    """Accuracy, Matthews correlation and Cohen's kappa of a confusion table.

    Resampling the n rows with replacement is drawing the four counts from a multinomial, which is what is done. MCC
    and kappa are 0 where a side uses one label only.
    """
    table = np.array([tp, fp, fn, tn], dtype=np.float64)
    n = int(table.sum())
    if n == 0:
        return Agreement(0, *[float("nan")] * 5, 0, 0, 0, 0)
    drawn = np.random.default_rng(seed).multinomial(n, table / n, size=resamples)
    low, high = np.percentile(mcc(drawn.T.astype(np.float64)), [2.5, 97.5])
    accuracy = (tp + tn) / n
    chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / n**2
    kappa = (accuracy - chance) / (1 - chance) if chance < 1 else 0.0
    return Agreement(n, accuracy, float(mcc(table)), float(low), float(high), kappa, tp, fp, fn, tn)


def compare(predicted: np.ndarray, true: np.ndarray) -> Agreement:
    """Agreement of two bool arrays [n]."""
    cells = (predicted & true, predicted & ~true, ~predicted & true, ~predicted & ~true)
    return agreement(*(int(cell.sum()) for cell in cells))


def mcc(table: np.ndarray) -> np.ndarray:
    """Matthews correlation of tp, fp, fn, tn [4, ...] -> [...]; 0 where a side uses one label only."""
    tp, fp, fn, tn = table
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return np.where(product > 0, (tp * tn - fp * fn) / np.sqrt(np.maximum(product, 1)), 0.0)
