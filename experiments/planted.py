"""Does the audit find the truth? Train policies on preferences whose cause is known, audit them,
and count the right names.

    python -m experiments.planted --quick     # one seed of every cause, under 10 minutes on 2 cores
    python -m experiments.planted             # every cause, and policies that disagree with data
    python -m experiments.planted --update    # the same, and the tables go into PLANTED.md

Each run trains an adapter on pairs of one cause (planting.py). Every measure is then asked which
category the policy was trained for: on fresh pairs of that cause, of every other cause, and on
plain prompts. A measure sees what an auditor of real data has: the policy, its SAE, texts and the
label files. It never sees what was planted; the one exception is "true spans". What a policy does
is counted on answers that it samples, by the world's own grammar.

OUT/runs.jsonl     one row a run; a run that stands here already is not made again
OUT/policies/      the trained adapters; a policy that is here is not trained again
OUT/planted.json   what the tables count
OUT/tables.md      the tables of PLANTED.md
"""

import functools
import json
import math
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import eval_ablation
import train
from audit import behaviour, counting, ranking, shift
from audit import choices as ch
from audit.attribution import Attribution, attribute
from data import Pair
from experiments.fitting import scorer_of, tiny_policy
from experiments.planted_tables import Answer, Audited, Does, contrasted, summarise, tables_md
from experiments.planting import (
    CAUSES,
    DISAGREEING,
    DOSED,
    MIXED,
    Cause,
    Recipe,
    plant,
    tokenise,
    training_settings,
)
from fsrl import Unsteered
from labels import Labels, load_labels
from policy import Policy
from runtime import cli, rows
from runtime.cli import flag
from runtime.messages import brief
from runtime.output import writable, write_whole
from runtime.progress import parts
from runtime.sources import UserError
from tiny import LABELS_DIR, measure, world

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
ANSWER_TOKENS = 96  # of a sampled answer, at most
# Rankings whose first features are tried in sampled answers, too.
IN_ANSWERS = ("v · gradient", "usage", "random")


@dataclass(frozen=True)
class Settings:
    seeds: int = flag(3, "seeds of every policy")
    first_seed: int = flag(3, "the first of them; thresholds were chosen on 0 to 2")
    quick: bool = flag(False, "one seed of every cause, and no other policy")
    policies: tuple[str, ...] = flag((), "only these, by the names in the tables")
    pairs: int = flag(768, "training pairs of a run, each seen once")
    eval_pairs: int = flag(32, "fresh pairs of its own cause that a policy is audited on")
    other_pairs: int = flag(16, "pairs of each other cause")
    loss_pairs: int = flag(
        8, "so many of its own for ablation, attribution and features, which need many passes"
    )
    costly_seeds: int = flag(1, "seeds for which those, and the shift's null, are measured at all")
    prompts: int = flag(48, "plain prompts that are answered for behaviour, as many again judge")
    steps: int = flag(4, "nodes of the attribution's integral")
    out: str = flag("runs/planted", "folder to write")
    update: bool = flag(False, "put the tables into experiments/PLANTED.md")

    def __post_init__(self):
        sizes = ("pairs", "eval_pairs", "other_pairs", "loss_pairs", "prompts", "steps")
        cli.at_least(self, 1, "seeds", *sizes)
        cli.at_least(self, 0, "first_seed", "costly_seeds")
        if self.pairs < 32 or self.loss_pairs > self.eval_pairs:
            wanted = "at least 32 were expected; --loss-pairs: at most --eval-pairs"
            raise UserError(f"--pairs: {wanted}.")
        for name in self.policies:
            if name not in RECIPES:
                raise UserError(f"--policies {name}: one of {'; '.join(RECIPES)} was expected.")


RECIPES = {recipe.name: recipe for recipe in (*CAUSES, *DISAGREEING, *MIXED, *DOSED)}


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
    """Table 2: relative change of a category's share, adapter against SAE, of prompt + chosen. As
    the paper measures it, a mean over positions without the first; and pooled over events.
    """
    masks = members(tables)
    counts = counting.count(policy, pairs, torch.stack(list(masks.values())))
    pooled = torch.stack([counting.composition(counts, mask) for mask in masks.values()])
    estimates = {
        "composition, pooled": (pooled, counting.resampled_composition(counts.pair_events, 200, 0)),
        "composition": (
            counting.paper_composition(counts)[:, 0],
            counting.resampled_paper_composition(counts, 200, 0)[:, :, 0],
        ),
    }
    answers = {}
    for name, (share, drawn) in estimates.items():
        change = counting.relative_change(share)[..., 1]  # [C, 2, 3] -> [C]
        error = counting.relative_change(drawn)[..., 1].std(0)
        values = zip(change.tolist(), (change / error).tolist(), strict=True)
        answers |= by_kind(name, dict(zip(masks, values, strict=True)))
    return answers


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


def attributed(found: Attribution, tables: list[Labels]) -> dict[str, Answer]:
    """What a category's features earned of the loss (integrated gradients), in all and per feature
    in use. found.pair_category: of `members`.
    """
    masks = members(tables)
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


def on_pairs(
    policy: Policy, pairs: list[Pair], partitions: dict[str, ch.Classes]
) -> dict[str, Answer]:
    """Choices and shift under each kind of labels, from one pass, and the data alone."""
    classes = list(partitions.values())
    choices = ch.ChoiceSums(policy, len(pairs), classes)
    moved = shift.ShiftSums(policy, 2 * len(pairs), classes)
    for some in ch.compared(policy, pairs, ch.as_trained(policy)):
        choices.add(some)
        moved.add(some)
    answers = {}
    for kind, found in zip(partitions, choices.result(), strict=True):
        shares, p = found.shares.mean(0).tolist(), found.p_values().tolist()
        values = zip(shares, p, strict=True)  # p stands where other measures have z
        answers[f"choices|{kind}"] = dict(zip(found.names, values, strict=True))
    return answers | shifted(moved.result(), list(partitions)) | in_data(pairs, partitions)


def in_data(pairs: list[Pair], partitions: dict[str, ch.Classes]) -> dict[str, Answer]:
    """Without any policy: how often tokens of each class stand in chosen rather than in rejected
    responses.
    """
    answers = {}
    for kind, classes in partitions.items():
        gap = ch.data_alone(pairs, classes)
        values = zip(classes.names, over_pairs(gap), strict=True)
        answers[f"data alone|{kind}"] = {name: (abs(mean), z) for name, (mean, z) in values}
    return answers


def shifted(found: Sequence[shift.Shift], kinds: Sequence[str]) -> dict[str, Answer]:
    """The shift by class under each kind of labels, over texts: its mean, and the lower end of its
    95 % interval, which stands where other measures have z.
    """
    answers = {}
    for kind, of in zip(kinds, found, strict=True):
        measured = {
            "shift": of.divergence,
            "shift, share of KL": of.share,
            "shift, mass": (of.after - of.before).abs(),
        }
        for name, values in measured.items():
            mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
            bounds = zip(mean.tolist(), (mean - 1.96 * error).tolist(), strict=True)
            answers[f"{name}|{kind}"] = dict(zip(of.names, bounds, strict=True))
    return answers


def beyond_null(
    found: Sequence[shift.Shift], null: Sequence[shift.Shift], kinds: Sequence[str]
) -> dict[str, Answer]:
    """Divergence by class beyond that of permuted steering of equal KL: mean and z over texts."""
    answers = {}
    for kind, of, other in zip(kinds, found, null, strict=True):
        values = over_pairs(of.divergence - other.divergence)
        answers[f"shift - null|{kind}"] = dict(zip(of.names, values, strict=True))
    return answers


def behaved(pairs: list[Pair], partitions: dict[str, ch.Classes]) -> dict[str, Answer]:
    """What changed between two answers to each prompt; p stands where other measures have z."""
    answers = {}
    for kind, of in zip(
        partitions, behaviour.compare(pairs, list(partitions.values())), strict=True
    ):
        values = zip(of.excess.tolist(), of.p_values.tolist(), strict=True)
        answers[f"behaviour|{kind}"] = dict(zip(of.names, values, strict=True))
    return answers


def does(
    policy: Policy, questions: Sequence[world.Question], answers: list[Pair]
) -> dict[str, Does]:
    """The arbiter: of each attribute of the world's answers, how the share of answers with each
    value changed from base model to policy, by the grammar.
    """
    texts = [[text_of(policy, pair[side]) for side in (1, 2)] for pair in answers]
    shown = [
        [world.shows(question, text) for text in both]
        for question, both in zip(questions, texts, strict=True)
    ]
    things = sorted({(a, v) for both in shown for one in both for a, v in one.items()}, key=str)
    columns = {thing: i for i, thing in enumerate(things)}
    counts = torch.zeros(2, len(shown), len(things), dtype=torch.float64)
    for i, both in enumerate(shown):
        for side, one in enumerate(both):
            for thing in one.items():
                counts[side, i, columns[thing]] = 1
    attributes = list(world.CATEGORY_OF)
    member = torch.zeros(len(things), len(attributes), dtype=torch.float64)
    for (name, value), i in columns.items():
        # Half, because a text that loses one value gains another.
        member[i, attributes.index(name)] = 0.5 * (value is not None)
    found = behaviour.excess(counts[1] - counts[0], member)
    rates = counts.mean(1).tolist()
    result = {}
    for k, name in enumerate(attributes):
        of = {str(v): [rates[0][i], rates[1][i]] for (a, v), i in columns.items() if a == name}
        result[name] = Does(found.excess[k].item(), found.p_values[k].item(), of)
    return result


def text_of(policy: Policy, answer: list[int]) -> str:
    text = policy.tokenizer.decode(answer, skip_special_tokens=True)
    return text.removeprefix("model\n").strip()


def features(
    policy: Policy,
    pairs: list[Pair],
    tables: list[Labels],
    classes: ch.Classes,
    category: str,
    found: Attribution,
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Ranking -> the share of the policy's divergence in the category that its first features
    keep alone, for each of ranking.NUMBERS; and ranking -> the features in its order.
    """
    counts = counting.count(policy, pairs)
    positions = counts.positions[1:].sum()
    usage, mean_v = (x[0, 1:].sum(0).double() / positions for x in (counts.events, counts.sums))
    gradient = ranking.gradient_scores(policy, pairs, classes, category)
    given = (usage.numpy(), mean_v.numpy(), found, gradient)
    orders = ranking.rankings(category, tables, *given)
    curves = ranking.curves(policy, pairs, classes, category, orders)
    return {curve.ranking: curve.shares.tolist() for curve in curves}, orders


def features_in_answers(
    policy: Policy, orders: dict[str, Tensor], category: str, ground: "Ground"
) -> dict[str, list[float]]:
    """Ranking -> change of the category's tokens in answers beyond chance (behaviour) where its
    first features steer alone, for each of ranking.NUMBERS.
    """
    _, prompts, base = ground.plain
    prompts, base = prompts[: ground.s.prompts], base[: ground.s.prompts]
    classes = ground.pairs("none", ground.s.other_pairs)[1]["fires"]

    def moved(mask: Tensor) -> float:
        given = (prompts, ANSWER_TOKENS, ground.seed * 100_000)
        answers = ranking.answers_keeping(policy, mask, *given)
        (found,) = behaviour.compare(list(map(Pair, prompts, base, answers)), [classes])
        return found.excess[classes.names.index(category)].item()

    return {
        name: [moved(ranking.kept(orders[name], n)) for n in ranking.NUMBERS] for name in IN_ANSWERS
    }


# --- what a policy is audited on ------------------------------------------------------------------


class Ground:
    """What all policies of a seed are audited on. It is drawn, divided and answered once."""

    def __init__(self, s: Settings, seed: int, start: Policy, tables: list[Labels]):
        self.s, self.seed, self.start, self.tables = s, seed, start, tables
        self.drawn: dict[tuple[str, int], tuple[list[Pair], dict[str, ch.Classes]]] = {}

    def pairs(self, cause: Cause, n: int) -> tuple[list[Pair], dict[str, ch.Classes]]:
        """Fresh pairs of a cause, and the classes of tokens that their texts give."""
        key = repr(cause), n
        if key not in self.drawn:
            drawn = world.pairs(cause, n, self.seed + 600_000)
            pairs, names = tokenise(self.start.tokenizer, drawn)
            self.drawn[key] = pairs, self.partitions(pairs, names, fine=n == self.s.eval_pairs)
        return self.drawn[key]

    def partitions(
        self, pairs: list[Pair], names: list[list[int]], fine: bool
    ) -> dict[str, ch.Classes]:
        """fine: by features' explanations, too."""
        partitions = {}
        for t in self.tables:
            masks = {c: m for c, m in t.categories.items() if c not in NOT_OF_INTEREST}
            partitions[t.kind] = ch.classes(self.start, pairs, masks, t.kind)
            if t.kind == "fires" and fine:
                partitions["fires, explanations"] = ch.classes(self.start, pairs, explained(t))
        partitions["true spans"] = true_classes(self.start, pairs, names)
        return partitions

    @functools.cached_property
    def plain(self) -> tuple[list[world.Question], list[list[int]], list[list[int]]]:
        """Questions, their prompts as token ids, and the base model's answers. Half of the
        questions invite harm, where alone refusal can show.
        """
        given = self.s.prompts, self.seed + 700_000
        plain, harmful = world.pairs("none", *given), world.pairs("refusal", *given)
        drawn = [pair for both in zip(plain, harmful, strict=True) for pair in both]
        pairs, _ = tokenise(self.start.tokenizer, drawn)
        prompts = [pair.prompt for pair in pairs]
        base = Unsteered(self.start.base)
        answers = self.answers(base, prompts)
        return [pair.chosen.question for pair in drawn], prompts, answers

    def answers(self, model, prompts: list[list[int]]) -> list[list[int]]:
        return behaviour.answers_of(self.start, model, prompts, ANSWER_TOKENS, self.seed * 100_000)


def audit(policy: Policy, recipe: Recipe, ground: Ground) -> dict[str, dict[str, Answer]]:
    """The measures on every audit set of pairs: set -> "measure|kind of labels" -> answer."""
    s = ground.s
    pairs, partitions = ground.pairs(recipe.cause, s.eval_pairs)
    result = {"own": on_pairs(policy, pairs, partitions)}
    result["own"] |= composition(policy, pairs, ground.tables)
    if recipe.steps is not None:
        return result
    for cause in world.CAUSES if recipe in CAUSES else ("none", "style", "honesty"):
        if cause != recipe.cause:
            pairs, partitions = ground.pairs(cause, s.other_pairs)
            result[cause] = on_pairs(policy, pairs, partitions)
    return result


def audit_costly(
    policy: Policy, recipe: Recipe, ground: Ground
) -> tuple[dict[str, Answer], dict[str, list[float]], dict[str, list[float]]]:
    """Measures that need many passes, on the first pairs of the policy's own cause; and how much
    of the planted category the first features of each ranking keep (features), in answers, too.
    """
    s, tables = ground.s, ground.tables
    pairs, partitions = ground.pairs(recipe.cause, s.eval_pairs)
    few, classes = pairs[: s.loss_pairs], list(partitions.values())
    earned = attribute(policy, few, s.steps, torch.stack(list(members(tables).values())))
    answers = ablation(policy, few, tables) | attributed(earned, tables)
    moved, null = shift.shift(policy, few, classes), shift.null(policy, few, classes)
    answers |= beyond_null(moved, null, list(partitions))
    category = world.CAUSES[recipe.name].category
    kept, orders = features(policy, few, tables, partitions["fires"], category, earned)
    return answers, kept, features_in_answers(policy, orders, category, ground)


def audit_answers(
    policy: Policy, ground: Ground
) -> tuple[dict[str, dict[str, Answer]], dict[str, Does], list[float]]:
    """On plain prompts: measures of what the two models answer; what the policy does; and the mean
    tokens of an answer of each.
    """
    questions, prompts, base = ground.plain
    answers = list(map(Pair, prompts, base, ground.answers(policy.steered, prompts)))
    # Other prompts for the arbiter than for the measure that it judges.
    measured, judging = answers[: ground.s.prompts], answers[ground.s.prompts :]
    _, partitions = ground.pairs("none", ground.s.other_pairs)
    moved = shift.shift(policy, measured[: ground.s.other_pairs], list(partitions.values()))
    kinds = list(partitions)
    result = {
        "answers": behaved(measured, partitions),
        "base's texts": shifted([m.of(slice(0, None, 2)) for m in moved], kinds),
        "policy's texts": shifted([m.of(slice(1, None, 2)) for m in moved], kinds),
    }
    lengths = [float(np.mean([len(pair[side]) for pair in answers])) for side in (1, 2)]
    return result, does(policy, questions[ground.s.prompts :], judging), lengths


# --- many runs ------------------------------------------------------------------------------------


def jobs(s: Settings) -> Iterator[tuple[Recipe, int]]:
    """(recipe, seed), all policies of a seed before the next. The null comes twice, because the
    rate of its alarms is a rate of rare events.
    """
    recipes = CAUSES if s.quick else tuple(RECIPES.values())
    recipes = [RECIPES[name] for name in s.policies] or recipes
    for seed in range(s.first_seed, s.first_seed + (1 if s.quick else s.seeds)):
        for recipe in recipes:
            yield recipe, seed
        if not s.quick and RECIPES["none"] in recipes:
            yield RECIPES["none"], seed + 10_000


def costly(s: Settings, recipe: Recipe, seed: int) -> bool:
    """Whether audit_costly is due for this policy."""
    causes = world.CAUSES.get(recipe.name, (None,))
    return bool(causes[0]) and seed < s.first_seed + s.costly_seeds


class Runner:
    """Loads the world once; trains and audits policies in it."""

    def __init__(self, s: Settings):
        self.s, self.start = s, tiny_policy()
        sae = self.start.steered.sae
        self.tables = [load_labels(LABELS_DIR / f"{kind}.jsonl", sae) for kind in KINDS]
        self.ground: Ground | None = None

    def __call__(self, recipe: Recipe, seed: int) -> Audited:
        s = self.s
        if self.ground is None or self.ground.seed != seed:
            self.ground = Ground(s, seed, self.start, self.tables)
        folder = Path(s.out) / "policies"
        policy, trained = plant(self.start, recipe, seed, s.pairs, folder, self.tables)
        began = time.perf_counter()
        pairs, _ = self.ground.pairs(recipe.cause, s.eval_pairs)
        few = pairs[: s.loss_pairs]
        after = train.evaluate(policy.model, few, scorer_of(policy, training_settings(seed)))
        answers, kept, kept_in_answers = audit(policy, recipe, self.ground), {}, {}
        sampled, found, lengths = audit_answers(policy, self.ground)
        if costly(s, recipe, seed):
            more, kept, kept_in_answers = audit_costly(policy, recipe, self.ground)
            answers["own"] |= more
        return Audited(
            policy=recipe.name,
            cause=recipe.cause if isinstance(recipe.cause, str) else "mix",
            seed=seed,
            settings=sizes(s),
            loss=after["loss"],
            accuracy=after["accuracy"],
            l0=after["l0"],
            answers=answers | sampled,
            does={name: list(of) for name, of in found.items()},
            lengths=lengths,
            kept=kept,
            kept_in_answers=kept_in_answers,
            train_seconds=trained,
            audit_seconds=time.perf_counter() - began,
        )


def sizes(s: Settings) -> dict[str, int]:
    """What the runs of one folder share."""
    names = ("pairs", "eval_pairs", "other_pairs", "loss_pairs", "prompts", "steps")
    return {name: getattr(s, name) for name in names}


def run(s: Settings) -> list[Audited]:
    """The runs in OUT/runs.jsonl, and those of s that it lacks."""
    path = writable(Path(s.out)) / "runs.jsonl"
    found = rows.read(path) if path.exists() else []
    try:
        known = [Audited(**row) for row in found]
    except TypeError as e:
        raise UserError(f"{path}: not the runs of this experiment ({brief(e)}).") from e
    if any(row.settings != sizes(s) for row in known):
        other = "holds runs under other settings; choose another folder or remove it"
        raise UserError(f"--out {s.out}: {other}.")

    done = {(row.policy, row.seed): row for row in known}
    missing = []
    for recipe, seed in jobs(s):
        row = done.get((recipe.name, seed))
        if row is None or (costly(s, recipe, seed) and not row.kept):  # made under fewer of them
            missing.append((recipe, seed))
    make = Runner(s) if missing else None
    bars = dict(training=0.5)  # of a run's time, about
    for recipe, seed in parts(missing, "planted", "runs", lambda job: job[0].name, bars):
        done[recipe.name, seed] = make(recipe, seed)
        text = "".join(json.dumps(row._asdict()) + "\n" for row in done.values())
        write_whole(path, text)
    return list(done.values())


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
            words = () if value is True else value if isinstance(value, tuple) else (value,)
            words = (f"--{name.replace('_', '-')}", *(shlex.quote(str(word)) for word in words))
            flags += "".join(f" {word}" for word in words)
    write(run(s), s, f"python -m experiments.planted{flags}")


if __name__ == "__main__":
    cli.run(main)
