"""Does the audit find the truth? Train policies on preferences whose cause is known, audit them,
and count the right names.

    python -m experiments.planted             # every cause, several seeds
    python -m experiments.planted --update    # the same, and the tables go into PLANTED.md

Each run trains an adapter on pairs of one cause (world.pairs). Every measure is then asked, on
fresh pairs of that cause, which category the policy was trained for. A measure sees what an auditor
of real data has: the policy, its SAE, the pairs and the label files. It never sees what was
planted; the one exception is "true spans".

OUT/runs.jsonl     one row a run; a run that stands here already is not made again
OUT/planted.json   what the tables count
OUT/tables.md      the tables of PLANTED.md
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import data
import eval_ablation
import train
from audit import choices as ch
from audit import counting
from audit.attribution import attribute
from data import Pair
from experiments.fitting import fit, fresh, passes, tiny_policy
from experiments.planted_tables import Answer, Audited, contrasted, summarise, tables_md
from labels import Labels, load_labels
from policy import Policy
from runtime import cli, rows
from runtime.cli import flag
from runtime.messages import brief
from runtime.output import writable, write_whole
from runtime.progress import parts
from runtime.sources import UserError
from tiny import LABELS_DIR, measure, world

# Pairs of `style`, every other one swapped for training: nothing to learn, much to see.
SHUFFLED = "shuffled style"
MIXES = ({"style": 1, "honesty": 3}, {"style": 1, "honesty": 1}, {"style": 3, "honesty": 1})
KINDS = ("fires", "promotes")
PAGE = Path(__file__).resolve().parent / "PLANTED.md"
MARKS = (
    "<!-- written by python -m experiments.planted --update -->",
    "<!-- end of what it writes -->",
)
# Kinds of tokens finer than a category, by the spans that show them: a feature's explanation names
# one of these.
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
NOT_OF_INTEREST = ("content", "chat")  # labels of the tiny world that are no category of the audit


@dataclass(frozen=True)
class Settings:
    seeds: int = flag(3, "seeds of every cause")
    first_seed: int = flag(0, "the first of them; the measures were developed on 100 to 102")
    causes: tuple[str, ...] = flag((), "only these causes; unset: all, and the mixes")
    pairs: int = flag(768, "training pairs of a run, each seen once")
    eval_pairs: int = flag(192, "fresh pairs that a policy is audited on")
    loss_pairs: int = flag(
        32, "so many of them for ablation and attribution, which need many passes"
    )
    steps: int = flag(6, "nodes of the attribution's integral")
    out: str = flag("runs/planted", "folder to write")
    update: bool = flag(False, "put the tables into experiments/PLANTED.md")

    def __post_init__(self):
        cli.at_least(self, 1, "seeds", "pairs", "eval_pairs", "loss_pairs", "steps")
        if self.pairs < 32 or self.loss_pairs > self.eval_pairs:
            sizes = "at least 32 were expected; --loss-pairs: at most --eval-pairs"
            raise UserError(f"--pairs: {sizes}.")
        for cause in self.causes:
            if cause not in world.CAUSES:
                raise UserError(f"--causes {cause}: one of {', '.join(world.CAUSES)} was expected.")


# --- a run: plant and train -----------------------------------------------------------------------

Cause = str | dict[str, float]  # a name in world.CAUSES, SHUFFLED, or a mix


def tokenise(
    tokenizer: Tokenizer, pairs: list[world.TextPair]
) -> tuple[list[Pair], list[list[int]]]:
    """Token ids as data.load_pairs gives them; and of every response token, chosen before rejected,
    the index in measure.NAMES of the span that it stands in.
    """
    result, names = [], []
    for pair in pairs:
        ids, owners = [], []
        sides = (pair.chosen.prompt_spans, pair.chosen.response_spans, pair.rejected.response_spans)
        for spans in sides:
            text = "".join(span.text for span in spans)
            encoding = tokenizer.encode(text, add_special_tokens=False)
            at = world.span_of_characters(spans)
            ids.append(encoding.ids)
            of_token = (spans[at[begin]].name for begin, _ in encoding.offsets)
            owners.append([measure.NAME_INDEX[name] for name in of_token])
        result.append(Pair(*ids))
        names.append(owners[1] + owners[2])
    return result, names


def shown(cause: Cause) -> Cause:
    """The cause of the pairs that a policy is trained and audited on, before any are swapped."""
    return "style" if cause == SHUFFLED else cause


def training_settings(seed: int) -> train.Settings:
    return train.Settings(model="tiny", **train.PRESETS["tiny"], seed=seed)


def plant(start: Policy, cause: Cause, seed: int, pairs: int) -> Policy:
    """A policy trained on `pairs` pairs of the cause; of SHUFFLED, half of them swapped."""
    policy = fresh(start, seed=seed)
    known, _ = tokenise(policy.tokenizer, world.pairs(shown(cause), pairs, seed))
    if cause == SHUFFLED:
        known = [Pair(p.prompt, p.rejected, p.chosen) if i % 2 else p for i, p in enumerate(known)]
    fit(policy, known, training_settings(seed))
    policy.model.requires_grad_(False)
    return policy


# --- the measures ---------------------------------------------------------------------------------


def over_pairs(values: Tensor) -> list[tuple[float, float]]:
    """[P, C] -> of each column its mean, and that mean in standard errors."""
    mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
    return list(zip(mean.tolist(), (mean / error.clamp(min=1e-12)).tolist(), strict=True))


Members = dict[tuple[str, str], Tensor]  # (kind of labels, category) -> bool [F]


def members(tables: list[Labels]) -> Members:
    return {(t.kind, c): torch.from_numpy(m) for t in tables for c, m in t.categories.items()}


def by_kind(name: str, values: Mapping[tuple[str, str], tuple[float, float]]) -> dict[str, Answer]:
    """(kind, category) -> (score, z), as the answers of a measure under each kind of labels."""
    answers = {f"{name}|{kind}": {} for kind in KINDS}
    for (kind, category), value in values.items():
        answers[f"{name}|{kind}"][category] = value
    return answers


def composition(policy: Policy, pairs: list[Pair], tables: list[Labels]) -> dict[str, Answer]:
    """Table 2, over events: relative change of a category's share, adapter against SAE."""
    masks = members(tables)
    counts = counting.count(policy, pairs, torch.stack(list(masks.values())))
    drawn = counting.relative_change(counting.resampled_composition(counts.pair_events, 200, 0))
    error = drawn[..., 1].std(0)  # of prompt + chosen: [B, C] -> [C]
    values = {}
    for (key, mask), e in zip(masks.items(), error, strict=True):
        change = counting.relative_change(counting.composition(counts, mask))[1]
        values[key] = (change.item(), (change / e).item())
    return by_kind("composition", values)


def ablation(policy: Policy, pairs: list[Pair], tables: list[Labels]) -> dict[str, Answer]:
    """Rise of the loss when a category's features are silenced, and its excess over as many matched
    in usage.
    """
    usage = eval_ablation.feature_usage(policy, pairs)
    masks = members(tables)
    controls = {key: eval_ablation.matched_set(mask.numpy(), usage) for key, mask in masks.items()}
    controls = {key: torch.from_numpy(m) for key, m in controls.items() if m is not None}
    nothing = torch.zeros(len(usage), dtype=torch.bool)
    sets = torch.stack([nothing, *masks.values(), *controls.values()])
    whole, *losses = eval_ablation.ablate(policy, pairs, sets)
    without = dict(zip(masks, losses, strict=False))
    matched = dict(zip(controls, losses[len(masks) :], strict=True))

    def rise(key: tuple[str, str], over: Tensor) -> tuple[float, float]:
        return over_pairs((without[key] - over)[:, None])[0]

    alone = {key: rise(key, whole) for key in masks}
    excess = {key: rise(key, matched[key]) for key in controls}
    return by_kind("ablation", alone) | by_kind("ablation - matched", excess)


def attributed(
    policy: Policy, pairs: list[Pair], tables: list[Labels], steps: int
) -> dict[str, Answer]:
    """What a category's features earned of the loss (integrated gradients), in all and per feature
    in use.
    """
    masks = members(tables)
    found = attribute(policy, pairs, steps, torch.stack(list(masks.values())))
    used = found.shares.abs().sum(0) > 0
    earned = dict(zip(masks, over_pairs(-found.pair_category), strict=True))
    each = {}
    for key, (score, z) in earned.items():
        each[key] = (score / max(1, int((used & masks[key]).sum())), z)
    return by_kind("attribution", earned) | by_kind("attribution per feature", each)


def explained(table: Labels) -> dict[str, np.ndarray]:
    """FINE -> the features whose explanation opens with one of its kinds of spans."""
    features = len(next(iter(table.categories.values())))
    groups = {name: np.zeros(features, dtype=bool) for name in FINE}
    for k, text in table.explanations.items():
        said = re.sub(r"^(fires on|promotes) ", "", text)
        for name, spans in FINE.items():
            groups[name][k] = any(said.startswith(measure.NAMES[span]) for span in spans)
    return groups


def true_classes(policy: Policy, pairs: list[Pair], names: list[list[int]]) -> ch.Classes:
    """The partition that a faultless judge of every token would give: only this reads the truth."""
    V = policy.base.config.vocab_size
    category = torch.tensor([{"style": 0, "alignment": 1}.get(label, 2) for label in span_labels()])
    packed = data.pack_pairs(pairs)
    text = ch.in_text(packed, policy)
    target = packed.target[text]
    label = category[torch.tensor([name for row in names for name in row])[text]]
    total = torch.zeros(V, 3).index_put_((target, label), torch.tensor(1.0), accumulate=True)
    return ch.partition(policy, ("style", "alignment", ch.END, ch.REST), total, total.sum(1))


def span_labels() -> list[str]:
    """The label of each of measure.NAMES."""
    found = {span.name: span.label for text in world.corpus(500, 0) for span in text.spans}
    return [found[name] for name in measure.NAMES]


def chosen(
    policy: Policy, pairs: list[Pair], tables: list[Labels], names: list[list[int]]
) -> dict[str, Answer]:
    """The choices measure under each kind of labels; and, without any policy, how often tokens of
    each class stand in chosen rather than in rejected responses.
    """
    partitions = {}
    for t in tables:
        masks = {c: m for c, m in t.categories.items() if c not in NOT_OF_INTEREST}
        partitions[t.kind] = ch.classes(policy, pairs, masks, t.kind)
        if t.kind == "fires":
            partitions["fires, explanations"] = ch.classes(policy, pairs, explained(t))
    partitions["true spans"] = true_classes(policy, pairs, names)

    answers = {}
    measured = ch.choices(policy, pairs, list(partitions.values()))
    for kind, found in zip(partitions, measured, strict=True):
        shares, p = found.shares.mean(0).tolist(), found.p_values().tolist()
        # p stands where the other measures have z.
        answers[f"choices|{kind}"] = dict(
            zip(found.names, zip(shares, p, strict=True), strict=True)
        )

    for kind in (*KINDS, "true spans"):
        alone = over_pairs(ch.data_alone(pairs, partitions[kind]))
        values = zip(partitions[kind].names, alone, strict=True)
        answers[f"data alone|{kind}"] = {name: (abs(mean), z) for name, (mean, z) in values}
    return answers


# --- many runs ------------------------------------------------------------------------------------


def jobs(s: Settings) -> Iterator[tuple[Cause, int]]:
    """(cause, seed), all causes of a seed before the next. The null comes twice, because the rate
    of its alarms is a rate of rare events.
    """
    for seed in range(s.first_seed, s.first_seed + s.seeds):
        for cause in s.causes or world.CAUSES:
            yield cause, seed
        if "none" in (s.causes or world.CAUSES):
            yield "none", seed + 10_000
        if not s.causes:
            for cause in (*MIXES, SHUFFLED):
                yield cause, seed


def name_of(cause: Cause) -> str:
    return cause if isinstance(cause, str) else " : ".join(f"{w} {c}" for c, w in cause.items())


def runner(s: Settings) -> Callable[[Cause, int], Audited]:
    """Load the world once; returns what trains and audits a policy in it."""
    start = tiny_policy()
    tables = [load_labels(LABELS_DIR / f"{kind}.jsonl", start.steered.sae) for kind in KINDS]

    def run(cause: Cause, seed: int) -> Audited:
        began = time.perf_counter()
        policy = plant(start, cause, seed, s.pairs)
        trained = time.perf_counter()
        drawn = world.pairs(shown(cause), s.eval_pairs, seed + 600_000)
        pairs, names = tokenise(policy.tokenizer, drawn)
        few = pairs[: s.loss_pairs]
        after = train.evaluate(policy.model, few, passes(policy, training_settings(seed)))
        answers = composition(policy, pairs, tables) | ablation(policy, few, tables)
        answers |= attributed(policy, few, tables, s.steps) | chosen(policy, pairs, tables, names)
        seconds = trained - began, time.perf_counter() - trained
        measured = after["loss"], after["accuracy"], after["l0"]
        return Audited(name_of(cause), seed, sizes(s), *measured, answers, *seconds)

    return run


def sizes(s: Settings) -> dict[str, int]:
    """What the runs of one folder share."""
    return {name: getattr(s, name) for name in ("pairs", "eval_pairs", "loss_pairs", "steps")}


def run(s: Settings) -> list[Audited]:
    """All runs of s; those already in OUT/runs.jsonl are read from there."""
    path = writable(Path(s.out)) / "runs.jsonl"
    found = rows.read(path) if path.exists() else []
    try:
        known = [Audited(**row) for row in found]
    except TypeError as e:
        raise UserError(f"{path}: not the runs of this experiment ({brief(e)}).") from e
    if any(row.settings != sizes(s) for row in known):
        other = "holds runs under other settings; choose another folder or remove it"
        raise UserError(f"--out {s.out}: {other}.")

    done = {(row.cause, row.seed): row for row in known}
    planned = list(jobs(s))
    missing = [job for job in planned if (name_of(job[0]), job[1]) not in done]
    make = runner(s) if missing else None
    bars = dict(training=0.5)  # of a run's time, about
    for cause, seed in parts(missing, "planted", "runs", lambda job: name_of(job[0]), bars):
        done[name_of(cause), seed] = make(cause, seed)
        text = "".join(json.dumps(row._asdict()) + "\n" for row in done.values())
        write_whole(path, text)
    return [done[name_of(cause), seed] for cause, seed in planned]


def write(audited: list[Audited], s: Settings, command: str) -> None:
    """planted.json, tables.md, and with --update the tables of PLANTED.md."""
    audited = contrasted(audited)
    text = tables_md(audited, command)
    found = dict(settings=asdict(s), measures=summarise(audited))
    write_whole(Path(s.out) / "planted.json", json.dumps(found, indent=1) + "\n")
    write_whole(Path(s.out) / "tables.md", text)
    if s.update:
        before, marked, rest = PAGE.read_text().partition(MARKS[0])
        _, closed, after = rest.partition(MARKS[1])
        if not marked or not closed:
            raise UserError(f"{PAGE}: lacks the two marks between which the tables stand.")
        write_whole(PAGE, f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}")
    print(text)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    if s.update and not PAGE.exists():
        raise UserError(f"{PAGE}: does not exist.")
    flags = ""
    for name, value in asdict(s).items():
        if value != getattr(Settings(), name) and name not in ("out", "update"):
            value = " ".join(value) if isinstance(value, tuple) else value
            flags += f" --{name.replace('_', '-')} {value}"
    write(run(s), s, f"python -m experiments.planted{flags}")


if __name__ == "__main__":
    cli.run(main)
