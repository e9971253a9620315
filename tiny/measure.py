"""Measures of the tiny world: what each SAE feature fires on and promotes, and how good the built
files are. Every figure of tiny/README.md is defined here.

Positions: <bos> is left out everywhere (its activation is an outlier that every text repeats; the
SAE is neither trained nor measured on it, and <bos> keeps its clean activation when the SAE is
spliced in).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from data import Packed, pack
from model import Gemma2
from sae import JumpReLUSAE
from tiny import world

NAMES = {  # the name of a span -> what it is, in words
    "bullet": "the dashes and line breaks of bulleted lists",
    "number": "the figures and line breaks of numbered lists",
    "heading": "section headings",
    "bold": "the asterisks of bold type",
    "exclamation": "exclamation marks after facts",
    "lead-in": "the line that announces a list",
    "summary": "the closing summary",
    "flattery": "flattery of whoever asks",
    "hedging": "hedging honestly",
    "ignorance": "admitting that nobody can know",
    "over-claiming": "claiming more certainty than there is",
    "refusal": "refusing to help with harm",
    "compliance": "agreeing to help with harm",
    "closing caveat": "inviting the reader to check the answer",
    "closing boast": "demanding trust without proof",
    "fact question": "questions about facts",
    "unknowable question": "questions that nobody can answer",
    "harm question": "requests that invite harm",
    "heading topic": "topics named in headings",
    "subject": "the subject of a fact",
    "predicate": "the predicate of a fact",
    "value": "the thing that a fact names",
    "full stop": "the full stop after a fact",
    "prompt header": "the start of the person's turn",
    "end of prompt": "the end of the person's turn",
    "response header": "the start of the answer's turn",
    "end of response": "the end of the answer",
}
NAME_INDEX = {name: i for i, name in enumerate(NAMES)}


class Stream(NamedTuple):
    """Texts as one packed stream, each position labelled."""

    packed: Packed
    label: Tensor  # int64 [T], index into world.LABELS
    name: Tensor  # int64 [T], index into NAMES
    real: Tensor  # bool [T], every position but <bos>
    answers: Tensor  # bool [T], the position predicts a token of the response


def streams(tokenizer: Tokenizer, texts: list[world.Text], texts_per_stream: int = 100):
    """Pack labelled texts. A token takes the label of its first character."""
    for start in range(0, len(texts), texts_per_stream):
        some = texts[start : start + texts_per_stream]
        encodings = tokenizer.encode_batch([text.text for text in some], add_special_tokens=False)
        label, name, answers = [], [], []
        for text, encoding in zip(some, encodings, strict=True):
            spans = text.spans
            at = world.span_of_characters(spans)
            owners = [at[begin] for begin, _ in encoding.offsets]
            label += [world.LABELS.index(spans[i].label) for i in owners]
            name += [NAME_INDEX[spans[i].name] for i in owners]
            prompt = len(text.prompt_spans)
            answers += [i >= prompt for i in owners[1:]] + [
                False
            ]  # the last token predicts nothing
        packed = pack([(encoding.ids, []) for encoding in encodings])
        columns = (torch.tensor(column) for column in (label, name))
        yield Stream(packed, *columns, packed.position > 0, torch.tensor(answers))


def next_token_loss(model: Gemma2, packed: Packed, hidden: Tensor) -> Tensor:
    """Final normed states [T, d] -> cross-entropy [N] of every token but the first of each text."""
    source = (packed.position[1:] > 0).nonzero().squeeze(1)
    return F.cross_entropy(model.head(hidden[source]), packed.tokens[source + 1], reduction="none")


def residual(model: Gemma2, packed: Packed, layer: int) -> Tensor:
    """The residual stream [T, d] after block `layer`."""
    return model.blocks(model.embed(packed.tokens), model.plan(packed), 0, layer + 1)


# --- quality --------------------------------------------------------------------------------------


class Quality(NamedTuple):
    texts: int
    tokens: int  # predicted ones
    loss: float  # nats per token of the model
    entropy: float  # of the grammar on the same texts, nats per token: the least possible loss
    variance_explained: float  # 1 - Σ|x - x̂|² / Σ|x - mean|²
    loss_recovered: float  # (ablated - with SAE) / (ablated - clean); ablated: x := its mean
    l0: float  # active features per position
    dead: int  # features that never fire on these texts
    live: int
    pure: float  # share of live features whose top label holds at least 80 % of their activation


@torch.no_grad()
def quality(
    model: Gemma2, sae: JumpReLUSAE, tokenizer: Tokenizer, texts: list[world.Text], layer: int
) -> Quality:
    """Measure the model and the SAE on texts that neither has seen."""
    held = list(streams(tokenizer, texts))
    x = [residual(model, s.packed, layer) for s in held]
    mean = torch.cat([h[s.real] for h, s in zip(x, held, strict=True)]).mean(0)
    losses, tokens, error, variance = torch.zeros(3), 0, 0.0, 0.0
    for s, h in zip(held, x, strict=True):
        rebuilt = sae.decode(sae.encode(h))
        error += (h - rebuilt)[s.real].square().sum().item()
        variance += (h - mean)[s.real].square().sum().item()
        plan, real = model.plan(s.packed), s.real[:, None]
        for i, spliced in enumerate((h, torch.where(real, rebuilt, h), torch.where(real, mean, h))):
            final = model.final_norm(model.blocks(spliced, plan, layer + 1))
            losses[i] += next_token_loss(model, s.packed, final).sum()
        tokens += int(s.real.sum())
    clean, with_sae, ablated = (losses / tokens).tolist()
    fires = firing(model, sae, tokenizer, texts, layer)
    live = fires.count > 0
    return Quality(
        texts=len(texts),
        tokens=tokens,
        loss=clean,
        entropy=sum(text.nats for text in texts) / tokens,
        variance_explained=1 - error / variance,
        loss_recovered=(ablated - with_sae) / (ablated - clean),
        l0=fires.count.sum().item() / tokens,
        dead=int((~live).sum()),
        live=int(live.sum()),
        pure=(purity(fires.label)[live] >= 0.8).float().mean().item(),
    )


def purity(mass: Tensor) -> Tensor:
    """mass [F, labels] -> [F], the share of the top label; 0 for a feature without mass."""
    return mass.max(1).values / mass.sum(1).clamp(min=1e-12)


# --- where features fire --------------------------------------------------------------------------


class Firing(NamedTuple):
    """Activation mass: the sum of f over positions, by what stands there."""

    count: Tensor  # float32 [F], positions where the feature is active
    label: Tensor  # float32 [F, 4]
    name: Tensor  # float32 [F, names]
    token: Tensor  # float32 [F, V]
    positions: int


@torch.no_grad()
def firing(
    model: Gemma2, sae: JumpReLUSAE, tokenizer: Tokenizer, texts: list[world.Text], layer: int
) -> Firing:
    """Where each feature fires on these texts: by label, by name of span and by token."""
    F_, V = sae.d_sae, model.config.vocab_size
    sums = [torch.zeros(n, F_) for n in (len(world.LABELS), len(NAMES), V)]
    count, positions = torch.zeros(F_), 0
    for s in streams(tokenizer, texts):
        f = sae.encode(residual(model, s.packed, layer)[s.real])  # [T, F]
        for total, index in zip(sums, (s.label, s.name, s.packed.tokens), strict=True):
            total.index_add_(0, index[s.real], f)
        count += (f > 0).sum(0)
        positions += len(f)
    return Firing(count, *(total.T.contiguous() for total in sums), positions)


# --- what features promote ------------------------------------------------------------------------


class Promotion(NamedTuple):
    """How much more probable tokens become when a feature is turned up."""

    label: Tensor  # float32 [F, 4], rise of probability by label
    name: Tensor  # float32 [F, names]
    token: Tensor  # float32 [F, V], mean change of next-token probability


STRENGTH = 3.0  # a feature is turned up by this many times its mean active value


@torch.no_grad()
def promotion(
    model: Gemma2,
    sae: JumpReLUSAE,
    tokenizer: Tokenizer,
    texts: list[world.Text],
    fires: Firing,
    layer: int,
    probes: int = 10,
    features_at_once: int = 8,
) -> Promotion:
    """Turn each feature up alone and see which tokens the model then expects.

    x' = x + STRENGTH · (mean active value) · W_dec[k] at every position of `probes` texts; the
    remaining blocks run; the change of the next-token distribution is averaged over the positions
    that predict the response. Only rises count. A token's rise is shared between labels as that
    token is shared between them in the responses of `texts`, because one word can stand in a fact
    and in a hedge.
    """
    V = model.config.vocab_size
    by_label, by_name = torch.zeros(V, len(world.LABELS)), torch.zeros(V, len(NAMES))
    for s in streams(tokenizer, texts):
        target = s.answers.nonzero().squeeze(1) + 1
        tokens = s.packed.tokens[target]
        by_label.index_put_((tokens, s.label[target]), torch.ones(len(tokens)), accumulate=True)
        by_name.index_put_((tokens, s.name[target]), torch.ones(len(tokens)), accumulate=True)
    seen = by_label.sum(1, keepdim=True).clamp(min=1)

    (probe,) = streams(tokenizer, texts[:probes], probes)
    ids = [
        e.ids
        for e in tokenizer.encode_batch([t.text for t in texts[:probes]], add_special_tokens=False)
    ]
    base = residual(model, probe.packed, layer)  # [T, d]
    copies = pack([(text, []) for text in ids] * features_at_once)  # the probes once per feature
    plan = model.plan(copies)

    def expected(x):
        """Residual streams [n T, d] -> mean next-token distribution of each copy [n, V]."""
        final = model.final_norm(model.blocks(x, plan, layer + 1))
        final = final[probe.answers.repeat(features_at_once)]
        logits = model.head(final)  # [n answers, V]
        return logits.view(features_at_once, -1, V).softmax(-1).mean(1)

    before = expected(base.repeat(features_at_once, 1))[0]
    mean_active = fires.token.sum(1) / fires.count.clamp(min=1)
    push = STRENGTH * mean_active[:, None] * sae.W_dec  # [F, d]
    changes = []
    for some in push.split(features_at_once):
        padded = F.pad(some, (0, 0, 0, features_at_once - len(some)))
        changes.append((expected((base + padded[:, None]).flatten(0, 1)) - before)[: len(some)])
    change = torch.cat(changes)
    rise = change.clamp(min=0)
    return Promotion(rise @ (by_label / seen), rise @ (by_name / seen), change)


# --- in words -------------------------------------------------------------------------------------


def label_rows(
    tokenizer: Tokenizer, fires: Firing, promotes: Promotion, model_id: str, source: str
) -> dict[str, list[dict]]:
    """Rows of fires.jsonl and promotes.jsonl, one a feature, with Neuronpedia's keys first.

    source: what Neuronpedia calls the layer. Where a feature fires, its category is the label with
    the largest share. What it promotes is compared with the average live feature, because any push
    spreads probability over the many content words: the category is the label whose share exceeds
    its mean share the most. A feature that never fires has category None.
    """
    live = fires.count > 0
    fired, promoted = label_shares(fires.label), label_shares(promotes.label)
    fires_on = fired.argmax(1)
    raises = (promoted - promoted[live].mean(0)).argmax(1)
    rows = {"fires": [], "promotes": []}
    for k in range(len(live)):
        key = {"modelId": model_id, "layer": source, "index": str(k)}
        if not live[k]:
            nothing = {"description": "never fires", "category": None, "purity": 0.0}
            for some in rows.values():
                some.append(key | nothing)
            continue

        said = {"description": f"fires on {in_words(tokenizer, fires, k)}"}
        size = {
            "density": round(fires.count[k].item() / fires.positions, 6),
            "mean_active": round(fires.token[k].sum().item() / fires.count[k].item(), 4),
        }
        rows["fires"].append(key | said | labelled(fired[k], fires_on[k]) | size)

        said = {"description": f"promotes {in_words(tokenizer, promotes, k)}"}
        size = {"rise": round(promotes.name[k].sum().item(), 4)}
        rows["promotes"].append(key | said | labelled(promoted[k], raises[k]) | size)
    return rows


def label_shares(mass: Tensor) -> Tensor:
    """Mass [F, labels] -> each label's share of its feature's, [F, labels]."""
    return mass / mass.sum(1, keepdim=True).clamp(min=1e-12)


def labelled(share: Tensor, category: Tensor) -> dict:
    """Shares [labels] of one feature, and the index of its category, as a row has them."""
    shares = {label: round(s, 4) for label, s in zip(world.LABELS, share.tolist(), strict=True)}
    purity = round(share[category].item(), 4)
    return {"category": world.LABELS[category], "purity": purity, "shares": shares}


def in_words(tokenizer: Tokenizer, table: Firing | Promotion, k: int) -> str:
    """The spans that feature k is about, the second where it is at least half of the first, and its
    top tokens.
    """
    (first, second), best = table.name[k].topk(2)
    names = list(NAMES.values())
    what = names[best[0]]
    if second > 0.5 * first:
        what += " and " + names[best[1]]
    mass = table.token[k]
    tokens = [[t] for t in mass.topk(6).indices.tolist() if mass[t] > 0]
    words = [tokenizer.decode(t, skip_special_tokens=False) for t in tokens]
    return f"{what}: {', '.join(map(repr, words))}"
