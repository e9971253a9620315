"""Does the audit find the truth? Train policies on preferences whose cause is known, audit them, count the right names.

    python -m tiny.planted                 # every cause, several seeds; writes OUT/runs.jsonl, planted.json, tables.md
    python -m tiny.planted --update        # the same, and puts the tables into tiny/PLANTED.md

Each run trains an adapter on pairs of one cause (world.pairs), and every measure is then asked, on fresh pairs of that
cause, which category the policy was trained for. A measure sees what an auditor of real data has: the policy, its SAE,
the pairs and the label files. It never sees what was planted, with one exception that says so ("true spans").

Runs that OUT/runs.jsonl holds already are not made again, so an interrupted command goes on where it stopped.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import eval_ablation
import train
from audit import choices as ch
from audit import features as eval_features
from audit.attribution import attribution
from data import Pair
from fsrl import Adapter, SteeredModel
from labels import Labels, load_labels
from policy import Policy
from runtime import cli
from runtime.cli import flag
from runtime.sources import UserError, write_whole
from sae import JumpReLUSAE
from tiny import LABELS_DIR, LAYER, build, measure, world

PLANTED = {name: cause.category for name, cause in world.CAUSES.items() if cause.category}
SHUFFLED = "shuffled style"  # pairs of `style`, every other one swapped for training: nothing to learn, much to see
MIXES = ({"style": 1, "honesty": 3}, {"style": 1, "honesty": 1}, {"style": 3, "honesty": 1})
KINDS = ("fires", "promotes")
MEASURES = (
    *("composition", "ablation", "ablation - matched", "attribution", "attribution per feature"),
    *("choices", "data alone"),
)
LEVEL = 0.01  # of all of a measure's categories together, for saying that there is anything at all
PAGE = Path(__file__).resolve().parent / "PLANTED.md"
MARKS = ("<!-- written by python -m tiny.planted --update -->", "<!-- end of what it writes -->")
# Kinds of tokens finer than a category, by the spans that realise them: what an explanation of a feature names.
FINE = {
    "list": ("bullet", "number", "lead-in"),
    "heading": ("heading",),
    "bold": ("bold",),
    "exclamation": ("exclamation",),
    "summary": ("summary",),
    "flattery": ("flattery",),
    "honesty": ("hedging", "ignorance", "over-claiming", "closing caveat", "closing boast"),
    "refusal": ("refusal", "compliance"),
}
REALISES = {  # cause -> what it shows as, among FINE
    "style": ("list", "bold", "summary"),
    "bullets": ("list",),
    "bold": ("bold",),
    "honesty": ("honesty",),
    "refusal": ("refusal",),
    "anti-flattery": ("flattery",),
}
REST_LABELS = ("content", "chat")  # labels of the tiny world that are no category of interest


@dataclass(frozen=True)
class Settings:
    seeds: int = flag(3, "seeds of every cause")
    first_seed: int = flag(
        0, "the first of them; 100 to 102 are those that the measures were developed on"
    )
    causes: tuple[str, ...] = flag((), "only these causes; unset: all, and the mixes")
    pairs: int = flag(768, "training pairs of a run, each seen once")
    eval_pairs: int = flag(192, "fresh pairs that a policy is audited on")
    loss_pairs: int = flag(
        32, "so many of them for the audits that need many passes: ablation and attribution"
    )
    steps: int = flag(6, "nodes of the attribution's integral")
    out: str = flag("runs/planted", "folder to write")
    update: bool = flag(False, "put the tables into tiny/PLANTED.md")

    def __post_init__(self):
        cli.at_least_one(self, "seeds", "pairs", "eval_pairs", "loss_pairs", "steps")
        if self.pairs < 32 or self.loss_pairs > self.eval_pairs:
            raise UserError(
                "--pairs: at least 32 were expected; --loss-pairs: at most --eval-pairs."
            )
        for cause in self.causes:
            if cause not in world.CAUSES:
                raise UserError(f"--causes {cause}: one of {', '.join(world.CAUSES)} was expected.")


# --- a run: plant and train ---------------------------------------------------------------------------------


def tokenise(tokenizer, pairs: list[world.TextPair]) -> tuple[list[Pair], list[list[int]]]:
    """Token ids as data.load_pairs gives them, and of every response token, chosen before rejected, the index in
    measure.NAMES of the span it stands in.
    """
    result, names = [], []
    for pair in pairs:
        ids, owners = [], []
        sides = (pair.chosen.prompt_spans, pair.chosen.response_spans, pair.rejected.response_spans)
        for spans in sides:
            encoding = tokenizer.encode(
                "".join(span.text for span in spans), add_special_tokens=False
            )
            at = world.span_of_characters(spans)
            ids.append(encoding.ids)
            owners.append(
                [measure.NAME_INDEX[spans[at[begin]].name] for begin, _ in encoding.offsets]
            )
        result.append(Pair(*ids))
        names.append(owners[1] + owners[2])
    return result, names


class Streams:
    """Residual streams below the adapter of a list of pairs, in memory: what activations.Activations keeps on disk."""

    @torch.inference_mode()
    def __init__(self, steered: SteeredModel, pairs: list[Pair], at_once: int = 32):
        self.streams = []
        for i in range(0, len(pairs), at_once):
            some = pairs[i : i + at_once]
            packed = data.pack_pairs(some)
            x = steered.residual(packed, steered.model.plan(packed))
            self.streams += x.split([pair.tokens for pair in some])

    def __call__(self, indices: list[int]) -> Tensor:
        return torch.cat([self.streams[i] for i in indices]).clone()  # out of inference mode


def fit(steered: SteeredModel, pairs: list[Pair], s: train.Settings) -> None:
    """train.py's loop over one epoch, without its files."""
    streams, trained = Streams(steered, pairs), list(steered.adapter.parameters())
    optimizer, steps = train.make_optimizer(trained, s), len(pairs) // s.batch_size
    order = data.epoch_order(len(pairs), s.seed, 0, s.shuffle)
    for step in tqdm(range(steps), desc="training", unit="step", leave=False):
        indices = order[step * s.batch_size : (step + 1) * s.batch_size]
        optimizer.param_groups[0]["lr"] = s.lr * train.lr_factor(step, steps, s)
        train.backward(steered, train.Batch([pairs[i] for i in indices], indices, streams), s.l1, s)
        torch.nn.utils.clip_grad_norm_(trained, s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    steered.requires_grad_(False)


def shown(cause: str | dict) -> str | dict:
    """The cause of the pairs that a policy is trained and audited on, before any are swapped."""
    return "style" if cause == SHUFFLED else cause


def plant(base, tokenizer, sae: JumpReLUSAE, cause: str | dict, seed: int, pairs: int) -> Policy:
    """A policy trained on `pairs` pairs of the cause; of SHUFFLED, half of them swapped."""
    s = replace(
        train.Settings(model="tiny", **train.PRESETS["tiny"]),
        seed=seed,
        device="cpu",
        dtype="float32",
    )
    adapter = Adapter(base.config.hidden_size, sae.d_sae)
    adapter.init_weights(torch.Generator().manual_seed(seed))
    steered = SteeredModel(base, sae, adapter, LAYER)
    known, _ = tokenise(tokenizer, world.pairs(shown(cause), pairs, seed))
    if cause == SHUFFLED:
        known = [Pair(p.prompt, p.rejected, p.chosen) if i % 2 else p for i, p in enumerate(known)]
    fit(steered, known, s)
    return Policy(base, steered, tokenizer, s, "planted", None)


# --- the measures -------------------------------------------------------------------------------------------

# A measure's answer: category -> (score, z). The category with the largest score is the one it names; a |z| that chance
# reaches too seldom (LEVEL, over all categories) says that there is something to name.
Answer = dict[str, tuple[float, float]]


def over_pairs(values: Tensor) -> list[tuple[float, float]]:
    """[P, C] -> of each column its mean and that mean in standard errors."""
    mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
    return list(zip(mean.tolist(), (mean / error.clamp(min=1e-12)).tolist(), strict=True))


def composition(policy: Policy, pairs: list[Pair], tables: list[Labels]) -> dict[str, Answer]:
    """Table 2 of the paper: relative change of a category's share of active features, adapter against SAE."""
    members = {(t.kind, c): torch.from_numpy(m) for t in tables for c, m in t.categories.items()}
    masks = torch.stack(list(members.values()))
    counts = eval_features.usage(policy.steered, pairs, policy.settings, masks, progress=False)
    change = torch.stack(
        [eval_features.relative_change(eval_features.composition(counts, m)) for m in masks]
    )[:, 1]
    drawn = eval_features.relative_change(eval_features.bootstrap(counts.pair_events, 200, 0))[
        ..., 1
    ]  # [B, C]
    z = change / drawn.std(0)
    values = dict(zip(members, zip(change.tolist(), z.tolist(), strict=True), strict=True))
    return {
        f"composition|{kind}": {c: v for (k, c), v in values.items() if k == kind} for kind in KINDS
    }


def ablation(policy: Policy, pairs: list[Pair], tables: list[Labels]) -> dict[str, Answer]:
    """Rise of the loss when a category's features are silenced, and its excess over as many matched in usage."""
    usage = eval_ablation.measure(policy, pairs, policy.settings).usage.numpy()
    masks = [np.zeros(len(usage), dtype=bool)]
    places = {}
    for t in tables:
        for category, mask in t.categories.items():
            control = eval_ablation.matched_set(mask, usage)
            places[t.kind, category] = (len(masks), len(masks) + 1 if control is not None else None)
            masks += [mask] if control is None else [mask, control]
    losses = eval_ablation.ablate(policy, pairs, torch.from_numpy(np.stack(masks)), policy.settings)
    answers = {
        f"{name}|{kind}": {} for name in ("ablation", "ablation - matched") for kind in KINDS
    }
    for (kind, category), (own, control) in places.items():
        (answers[f"ablation|{kind}"][category],) = over_pairs((losses[own] - losses[0])[:, None])
        if control is not None:
            (answers[f"ablation - matched|{kind}"][category],) = over_pairs(
                (losses[own] - losses[control])[:, None]
            )
    return answers


def attributed(
    policy: Policy, pairs: list[Pair], tables: list[Labels], steps: int
) -> dict[str, Answer]:
    """What a category's features earned of the loss (integrated gradients), in all and per feature in use."""
    keys = [(t.kind, c) for t in tables for c in t.categories]
    masks = torch.stack([torch.from_numpy(m) for t in tables for m in t.categories.values()])
    found = attribution(policy, pairs, policy.settings, steps, masks)
    used = (found.shares.abs().sum(0) > 0).double()
    earned = over_pairs(-found.pair_category)
    answers = {
        f"{name}|{kind}": {}
        for name in ("attribution", "attribution per feature")
        for kind in KINDS
    }
    for (kind, category), (score, z), mask in zip(keys, earned, masks, strict=True):
        answers[f"attribution|{kind}"][category] = (score, z)
        answers[f"attribution per feature|{kind}"][category] = (
            score / max(1.0, (used @ mask.double()).item()),
            z,
        )
    return answers


def explained(table: Labels) -> dict[str, np.ndarray]:
    """FINE -> the features whose explanation opens with one of its kinds of spans."""
    groups = {
        name: np.zeros(len(next(iter(table.categories.values()))), dtype=bool) for name in FINE
    }
    for k, text in table.explanations.items():
        said = re.sub(r"^(fires on|promotes) ", "", text)
        for name, spans in FINE.items():
            groups[name][k] = any(said.startswith(measure.NAMES[span]) for span in spans)
    return groups


def true_classes(policy: Policy, pairs: list[Pair], names: list[list[int]]) -> ch.Classes:
    """The partition that a faultless judge of every token would give: the one thing here that reads the truth."""
    category = torch.tensor([{"style": 0, "alignment": 1}.get(label, 2) for label in span_labels()])
    total, count = (
        torch.zeros(policy.base.config.vocab_size, 3),
        torch.zeros(policy.base.config.vocab_size),
    )
    packed = data.pack_pairs(pairs)
    text = ch.in_text(packed, policy)
    label = category[torch.tensor([name for row in names for name in row])]
    total.index_put_(
        (packed.target[text], label[text]), torch.ones(int(text.sum())), accumulate=True
    )
    count.index_add_(0, packed.target[text], torch.ones(int(text.sum())))
    return ch.partition(policy, ("style", "alignment", ch.END, ch.REST), total, count)


def span_labels() -> list[str]:
    """The label of each of measure.NAMES."""
    found = {span.name: span.label for text in world.corpus(500, 0) for span in text.spans}
    return [found[name] for name in measure.NAMES]


def chosen(
    policy: Policy, pairs: list[Pair], tables: list[Labels], names: list[list[int]]
) -> dict[str, Answer]:
    """choices.py under each kind of label; and, without any policy, the classes' frequencies in the two responses."""
    s, partitions = policy.settings, {}
    for t in tables:
        masks = {c: m for c, m in t.categories.items() if c not in REST_LABELS}
        partitions[t.kind] = ch.classes(policy, pairs, s, masks, t.kind)
        if t.kind == "fires":
            partitions["fires, explanations"] = ch.classes(policy, pairs, s, explained(t))
    partitions["true spans"] = true_classes(policy, pairs, names)
    answers = {}
    for kind, found in zip(
        partitions, ch.choices(policy, pairs, s, list(partitions.values())), strict=True
    ):
        p = found.p_values()
        values = zip(
            found.shares.mean(0).tolist(), p.tolist(), strict=True
        )  # p, where the others have z
        answers[f"choices|{kind}"] = dict(zip(found.names, values, strict=True))
    packed = data.pack_pairs(pairs)
    weight = ch.token_weight(packed)
    for kind in (*KINDS, "true spans"):
        of_token = partitions[kind].of_token[packed.target]
        gap = torch.zeros(len(pairs), len(partitions[kind].names), dtype=torch.float64)
        gap.index_put_((packed.sequence // 2, of_token), weight, accumulate=True)
        values = zip(partitions[kind].names, over_pairs(gap), strict=True)
        answers[f"data alone|{kind}"] = {name: (abs(mean), z) for name, (mean, z) in values}
    return answers


def significant(measure_name: str, answer: Answer, category: str) -> bool:
    """Whether the measure calls this category's score more than chance."""
    value = answer[category][1]
    if measure_name.startswith("choices"):
        return value <= LEVEL
    return math.erfc(abs(value) / math.sqrt(2)) * len(answer) <= LEVEL


def audit(policy: Policy, cause: str | dict, seed: int, s: Settings, tables: list[Labels]) -> dict:
    """One row of runs.jsonl: what every measure says of the policy."""
    pairs, names = tokenise(
        policy.tokenizer, world.pairs(shown(cause), s.eval_pairs, seed + 600_000)
    )
    few = pairs[: s.loss_pairs]
    batch = train.Batch(few, range(len(few)))
    after = train.evaluate(policy.steered, batch, policy.settings, False)
    answers = composition(policy, pairs, tables) | ablation(policy, few, tables)
    answers |= attributed(policy, few, tables, s.steps) | chosen(policy, pairs, tables, names)
    return dict(loss=after["loss"], accuracy=after["accuracy"], l0=after["l0"], answers=answers)


# --- many runs ----------------------------------------------------------------------------------------------


def jobs(s: Settings) -> Iterator[tuple[str | dict, int]]:
    """(cause, seed), all causes of a seed before the next; the null twice, since its rate is a rate of rare events."""
    for seed in range(s.first_seed, s.first_seed + s.seeds):
        for cause in s.causes or world.CAUSES:
            yield cause, seed
        if "none" in (s.causes or world.CAUSES):
            yield "none", seed + 10_000
        if not s.causes:
            for cause in (*MIXES, SHUFFLED):
                yield cause, seed


def name_of(cause: str | dict) -> str:
    return cause if isinstance(cause, str) else " : ".join(f"{w} {c}" for c, w in cause.items())


def run(s: Settings) -> list[dict]:
    """All runs of s, those already in OUT/runs.jsonl read from there."""
    out = Path(s.out)
    about = {name: getattr(s, name) for name in ("pairs", "eval_pairs", "loss_pairs", "steps")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = (
            (out / "runs.jsonl").read_text().splitlines() if (out / "runs.jsonl").exists() else []
        )
        known = [json.loads(line) for line in lines]
        if any(row["settings"] != about for row in known):
            raise UserError(
                f"--out {out}: holds runs under other settings; choose another folder or remove it."
            )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--out {out}: its runs.jsonl cannot be read or written ({e}).") from e
    done = {(row["cause"], row["seed"]): row for row in known}
    base, tokenizer = build.load()
    base.requires_grad_(False)
    sae = JumpReLUSAE.from_pretrained("tiny")
    tables = [load_labels(LABELS_DIR / f"{kind}.jsonl", sae) for kind in KINDS]
    wanted, rows = list(jobs(s)), []
    for cause, seed in tqdm(wanted, desc="planted", unit="run"):
        name = name_of(cause)
        if (name, seed) not in done:
            started = time.perf_counter()
            policy = plant(base, tokenizer, sae, cause, seed, s.pairs)
            trained = time.perf_counter()
            row = dict(cause=name, seed=seed, settings=about) | audit(
                policy, cause, seed, s, tables
            )
            row |= dict(
                train_seconds=trained - started, audit_seconds=time.perf_counter() - trained
            )
            done[name, seed] = row
            write_whole(out / "runs.jsonl", "".join(json.dumps(r) + "\n" for r in done.values()))
        rows.append(done[name, seed])
    return rows


# --- tables -------------------------------------------------------------------------------------------------


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson's score interval)."""
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def rate(hits: list[bool]) -> str:
    if not hits:
        return "–"
    low, high = (max(0.0, bound) for bound in wilson(sum(hits), len(hits)))
    return f"{sum(hits)}/{len(hits)} ({100 * low:.0f}–{100 * high:.0f} %)"


def top(answer: Answer) -> str:
    return max(answer, key=lambda name: answer[name][0])


def categories(answer: Answer) -> Answer:
    """Without what is no category: content, chat, the end of the response, the rest."""
    return {
        name: value for name, value in answer.items() if name not in (*REST_LABELS, ch.END, ch.REST)
    }


def right(cause: str, kind: str, category: str) -> bool:
    return (
        category in REALISES[cause] if kind == "fires, explanations" else category == PLANTED[cause]
    )


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation, ties at their mean rank; nan for a constant."""

    def ranks(values):
        values = np.asarray(values)
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    a, b = ranks(x), ranks(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else math.nan


def contrasted(rows: list[dict]) -> list[dict]:
    """Rows with one more measure: composition, less its mean over policies that had nothing to learn (not over the
    policy itself), z in standard deviations between those. As they are where there are fewer than four of those.
    """
    result, keys = (
        [],
        [f"composition|{kind}" for kind in KINDS if f"composition|{kind}" in rows[0]["answers"]],
    )
    for row in rows:
        null = [r["answers"] for r in rows if r["cause"] == "none" and r is not row]
        if len(null) < 3:
            return rows
        more = {}
        for key in keys:
            scores = {c: [answers[key][c][0] for answers in null] for c in row["answers"][key]}
            deviation = {
                c: np.std(v, ddof=1) * math.sqrt(1 + 1 / len(v)) for c, v in scores.items()
            }
            change = {
                c: value - np.mean(scores[c]) for c, (value, _) in row["answers"][key].items()
            }
            name = key.replace("composition", "composition - null")
            more[name] = {
                c: (float(d), float(d / max(deviation[c], 1e-12))) for c, d in change.items()
            }
        result.append(row | dict(answers=row["answers"] | more))
    return result


def summarise(rows: list[dict]) -> dict[str, dict]:
    """measure|label kind -> what the tables say of it."""
    weight = {"style": 1.0, "honesty": 0.0} | {
        name_of(m): m["style"] / sum(m.values()) for m in MIXES
    }
    result = {}
    for key in rows[0]["answers"]:
        name, kind = key.split("|")
        first, category, sure, alarms, shuffled, sizes = [], [], [], [], [], []
        wrong: dict[str, list[str]] = {}
        for row in rows:
            cause, answer = row["cause"], row["answers"][key]
            among = categories(answer)
            named = top(among)
            found = significant(name, answer, named)
            if cause in PLANTED:
                first.append(right(cause, kind, top(answer)))
                category.append(right(cause, kind, named))
                sure.append(category[-1] and found)
                if not category[-1]:
                    wrong.setdefault(cause, []).append(named)
            if cause in ("none", SHUFFLED):
                alarm = any(significant(name, answer, c) for c in among)
                (alarms if cause == "none" else shuffled).append(alarm)
            if cause == "brevity":
                wrong.setdefault(cause, []).append(named if found else "nothing")
            if cause in weight and {"style", "alignment"} <= among.keys():
                sizes.append((weight[cause], among["style"][0] - among["alignment"][0]))
        result[key] = dict(
            **dict(first=first, category=category, sure=sure, alarms=alarms, shuffled=shuffled),
            spearman=spearman(*zip(*sizes, strict=True))
            if len({w for w, _ in sizes}) > 2
            else None,
            wrong={
                cause: {c: said.count(c) for c in dict.fromkeys(said)}
                for cause, said in wrong.items()
            },
        )
    return result


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    assert all(len(line) == len(head) for line in lines)
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def tally(counts: dict[str, int]) -> str:
    return (
        ", ".join(f"{c} {n}" for c, n in sorted(counts.items(), key=lambda item: -item[1])) or "–"
    )


def tables_md(rows: list[dict], s: Settings, command: str) -> str:
    """The tables of PLANTED.md."""
    rows = contrasted(rows)
    found = summarise(rows)
    order = sorted(
        found, key=lambda key: [-sum(found[key][c]) for c in ("category", "sure", "first")]
    )
    minutes = [sum(row[f"{part}_seconds"] for row in rows) / 60 for part in ("train", "audit")]
    parts = [
        f"`{command}`: {len(rows)} runs, {s.pairs} training pairs each, audited on {s.eval_pairs} fresh ones "
        f"({s.loss_pairs} for ablation and attribution). Training took {minutes[0]:.1f} minutes in all, the audits "
        f"{minutes[1]:.1f}, with {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}.\n"
    ]
    main, wrongs = [], []
    for key in order:
        f, (name, kind) = found[key], key.split("|")
        rho = "–" if f["spearman"] is None else f"{f['spearman']:+.2f}"
        rates = [rate(f[column]) for column in ("category", "sure", "first", "alarms", "shuffled")]
        main.append((name, kind, *rates[:3], rho, *rates[3:]))
        wrongs.append(
            (
                name,
                kind,
                "; ".join(f"{cause}: {tally(said)}" for cause, said in f["wrong"].items()) or "–",
            )
        )
    head = ("measure", "labels", "right category first", "… and sure of it", "first of all labels")
    parts.append(table((*head, "follows the weight", "false alarms, none", "… shuffled"), main))
    parts.append(
        "What each names instead, and what it says of brevity, whose cause no category's tokens realise:\n"
    )
    parts.append(table(("measure", "labels", "planted: named (runs)"), wrongs))
    parts.append(
        "Choices under labels of kind fires, by cause: mean share of the gap's change in nats per token, and what the "
        "measure says.\n"
    )
    shares = []
    for cause in dict.fromkeys(row["cause"] for row in rows):
        these = [row for row in rows if row["cause"] == cause]
        answers = [row["answers"]["choices|fires"] for row in these]
        named = [(top(categories(a)), a) for a in answers]
        said = [c if significant("choices", a, c) else "nothing" for c, a in named]
        means = (f"{np.mean([a[c][0] for a in answers]):+.3f}" for c in answers[0])
        losses = f"{np.mean([row['loss'] for row in these]):.2f}"
        shares.append(
            (f"{cause} ({len(these)})", losses, *means, tally({c: said.count(c) for c in said}))
        )
    classes = tuple(rows[0]["answers"]["choices|fires"])
    parts.append(table(("planted (runs)", "loss after", *classes, "says (runs)"), shares))
    return "\n".join(parts)


def write(rows: list[dict], s: Settings, command: str) -> None:
    out, text = Path(s.out), tables_md(rows, s, command)
    write_whole(
        out / "planted.json",
        json.dumps(dict(settings=asdict(s), measures=summarise(contrasted(rows))), indent=1) + "\n",
    )
    write_whole(out / "tables.md", text)
    if s.update:
        page = PAGE.read_text()
        before, marked, rest = page.partition(MARKS[0])
        _, closed, after = rest.partition(MARKS[1])
        if not marked or not closed:
            raise UserError(f"{PAGE}: lacks the two marks between which the tables stand.")
        write_whole(PAGE, f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}")
    print(text)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    if s.update and not PAGE.exists():
        raise UserError(f"{PAGE}: does not exist.")
    default = Settings()
    changed = [
        (k, v)
        for k, v in asdict(s).items()
        if v != getattr(default, k) and k not in ("out", "update")
    ]
    flags = "".join(
        f" --{k.replace('_', '-')} {' '.join(v) if isinstance(v, tuple) else v}" for k, v in changed
    )
    write(run(s), s, f"python -m tiny.planted{flags}")


if __name__ == "__main__":
    cli.run(main)
