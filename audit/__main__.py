"""What a policy learned: every table and figure about it, report.html, and the adapter's card.

    python -m audit --run runs/tiny
    python -m audit --run OUT --labels alignment.jsonl style.jsonl --human agreement.csv
    python -m audit --run OUT --only attribution

Each part leaves its tables in OUT/eval/, as csv, json and png of the same numbers. A part whose
tables are there already is left alone, unless they were made with another adapter, other data,
labels or settings. --only makes the parts that it names again, and no other.

    usage        which features are active where (features.py): composition_paper (Table 2) and
                 composition, which pools positions; top_usage, top_value (Tables 3 and 4),
                 value_difference (Figure 3), usage_rank (Figure 5), l0, l0_by_position,
                 features.parquet, examples.json (with what the page says of single features)
    ablation     topk (Figure 2), ablation and masks/, as eval_ablation.py makes them
    static       steering that does not read its context (static.py)
    choices      the widened preference gap by kinds of tokens, which features' labels or
                 --token-rules tell apart (choices.py, rules.py), beside what the pairs alone show
    shift        how the distribution over the next token moved, by kinds of tokens, on the pairs'
                 responses and on texts that both models sample (shift.py)
    behaviour    what differs between the two models' answers to the same prompts (behaviour.py)
    carriers     which features carry the category that changed most, by keeping few of them
                 (ranking.py): carriers, carried_by
    attribution  integrated gradients (attribution.py): attribution by category and by where the
                 steering acts, attribution_features, attribution_features.parquet,
                 attribution_cards.json

Everything is measured on the evaluation pairs. Intervals are 95 % percentile intervals over pairs,
which are drawn with replacement; of shift and carriers over texts, two of each pair, and of
behaviour over prompts.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # see train.py

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import eval_ablation
from audit import card, change_tables, effect_tables, features, figures, ranking, report, static
from audit.attribution import attribute
from audit.behaviour import answered, compare
from audit.choices import Classes, choices, classes, data_alone
from audit.counting import CONTEXTS, FIRST, Counts, count
from audit.feature_cards import cards, of_interest
from audit.label_noise import read_human
from audit.lead import lead
from audit.published import beside
from audit.ranking import gradient_scores, rankings
from audit.rules import Rules, by_rules, read_rules
from audit.shift import null, shift
from audit.verdict import verdict
from data import Pair
from eval_ablation import Evaluation, open_evaluation, seconds_per_condition
from labels import Labels
from runtime import cli
from runtime.cli import flag
from runtime.messages import shown
from runtime.output import publish
from runtime.progress import Line, say
from runtime.sources import UserError, read_json, sha256
from runtime.tables import interval, write_table

PARTS = ("usage", "ablation", "static", "choices", "shift", "behaviour", "attribution", "carriers")
DRAWING = 0.7  # seconds that a figure takes, about
ANSWERED = 64  # features that carriers keeps alone while prompts are answered
VERSION = 2  # of the columns of the tables of usage, choices and attribution


@dataclass(frozen=True)
class Settings(eval_ablation.Settings):
    human: str | None = flag(
        None, "a person's labels of some features, csv or jsonl: feature, category, label"
    )
    count_first: bool = flag(
        False, "include the first position, <bos>, in composition_paper, as the authors do"
    )
    token_rules: str | None = flag(
        None, "regular expressions for choices to tell tokens apart by, as audit/token_rules.json"
    )
    coefficients: tuple[float, ...] = flag((1, 2, 4), "coefficients c of static steering")
    top_features: tuple[int, ...] = flag(
        (1, 16, 256), "numbers m of top mean features to steer with in static steering"
    )
    static_pairs: int = flag(
        256, "number of training pairs that static steering is made from; 0: no static steering"
    )
    rest: tuple[str, ...] = flag(("content", "chat"), "categories that choices sums up as the rest")
    nodes: int = flag(
        8, "nodes of attribution's integral, each a forward and a backward pass; 0: no attribution"
    )
    only: tuple[str, ...] = flag(
        (), f"compute only these parts, even if they exist: {', '.join(PARTS)}"
    )
    shift_pairs: int = flag(64, "pairs whose responses shift reads, the first ones")
    prompts: int = flag(
        64, "prompts that both models answer, the first ones; 0: no behaviour, no shift of answers"
    )
    answer_tokens: int = flag(96, "tokens of such an answer, at most")
    carrier_pairs: int = flag(16, "pairs that carriers measures on; 0: no carriers")

    def __post_init__(self):
        super().__post_init__()
        cli.at_least(self, 0, "static_pairs", "nodes", "prompts", "carrier_pairs")
        cli.at_least(self, 1, "shift_pairs", "answer_tokens")
        if self.prompts == 1:
            raise UserError("--prompts 1: an interval needs two; 0 leaves the part out.")
        if not all(abs(c) <= 1e6 for c in self.coefficients):  # larger ones overflow the loss
            raise UserError("--coefficients: numbers from -1e6 to 1e6 were expected.")
        if not all(m >= 1 for m in self.top_features):
            raise UserError("--top-features: whole numbers from 1 were expected.")
        for name in self.only:
            if name not in PARTS:
                raise UserError(f"--only {name}: one of {', '.join(PARTS)} was expected.")


# --- the parts ------------------------------------------------------------------------------------


class Part(NamedTuple):
    name: str
    tables: tuple[str, ...]  # eval/NAME.csv, .json and .png of each
    files: tuple[str, ...]  # what else it leaves in eval/
    about: dict  # of its tables, as far as it is known before they are made
    # What it shows progress of, and the work of each: forward passes through the blocks above the
    # adapter, about.
    work: dict[str, float]
    make: Callable[[Path], None]  # writes tables and files into a folder


class Audit:
    """One evaluation's parts, and what they share."""

    def __init__(self, e: Evaluation, s: Settings):
        self.e, self.s = e, s
        self.human = read_human(s.human, e.labels) if s.human else {}
        self.rules = read_rules(s.token_rules) if s.token_rules else None
        if self.rules and self.rules.name in {table.name for table in e.labels}:
            same = "has the name of a label file, by which tables tell them apart"
            raise UserError(f"--token-rules {s.token_rules}: {same}.")
        found = features.all_categories(e.labels)
        self.masks = [torch.from_numpy(mask) for *_, mask in found]
        self.labelled = [torch.from_numpy(table.has_label(name)) for table, name, _ in found]

    @functools.cached_property
    def counts(self) -> Counts:
        policy, pairs = self.e.policy, self.e.pairs
        if not self.masks:
            return count(policy, pairs, what="usage")
        masks, labelled = torch.stack(self.masks), torch.stack(self.labelled)
        return count(policy, pairs, masks, "usage", labelled)

    def parts(self) -> list[Part]:
        """Those that the settings and the labels allow."""
        found = [self.usage_part(), self.ablation_part()]
        found += [self.static_part()] if self.s.static_pairs else []
        told_apart = bool(self.rules or self.interesting())
        if told_apart:
            found += [self.choices_part(), self.shift_part()]
            found += [self.behaviour_part()] if self.s.prompts else []
        found += [self.attribution_part()] if self.s.nodes else []
        found += [self.carriers_part()] if told_apart and self.s.carrier_pairs else []
        return found

    def usage_part(self) -> Part:
        e, s = self.e, self.s
        about = e.about | dict(human=sha256(Path(s.human)) if s.human else None)
        about |= dict(first=FIRST[s.count_first], version=VERSION)
        names = ("top_usage", "top_value", "value_difference", "usage_rank", "l0", "l0_by_position")
        names = ("composition_paper", "composition", *names) if self.masks else names

        def make(folder: Path) -> None:
            counts = self.counts
            positions = dict(zip(CONTEXTS, counts.positions.tolist(), strict=True))
            found = about | dict(positions=positions)
            tables = features.usage_tables(counts, e.labels)
            if self.masks:
                given = (counts, e.labels, self.human, s.bootstrap, s.seed)
                tables["composition"] = features.composition_rows(*given)
                tables["composition_paper"] = features.paper_composition_rows(*given)
            for name, rows in tables.items():
                save(folder, name, found, rows)
            pq.write_table(features.feature_table(counts, e.labels), folder / "features.parquet")
            shown = dict(about=found) | features.examples(e.policy, e.pairs, e.labels)
            shown["cards"] = cards(e.policy, e.pairs, of_interest(counts, shown))
            (folder / "examples.json").write_text(json.dumps(shown) + "\n")

        files = ("features.parquet", "examples.json")
        work = {"usage": 2, "strongest contexts": 1}
        return Part("usage", names, files, about, work, make)

    def ablation_part(self) -> Part:
        e, s = self.e, self.s
        names = ("topk", "ablation") if any(mask.any() for mask in self.masks) else ("topk",)

        def make(folder: Path) -> None:
            found = eval_ablation.evaluate(e, s)
            with publish(e.out / "eval" / "masks") as masks:
                eval_ablation.write(e, s, found, folder, masks)

        work = dict(usage=1, ablating=eval_ablation.conditions(e, s) - 1)
        return Part("ablation", names, (), eval_ablation.about_tables(e, s), work, make)

    def static_part(self) -> Part:
        e, s = self.e, self.s
        policy = e.policy
        # A bare adapter's folder does not say what it was trained on.
        recorded = (policy.folder / "config.json").is_file() or not s.data
        source = policy.recorded.data if recorded else s.data
        asked = dict(static_pairs=s.static_pairs, coefficients=s.coefficients)
        about = e.about | asked | dict(labels=[], top_features=s.top_features)

        def make(folder: Path) -> None:
            pairs, name = policy.eval_pairs(source, s.static_pairs, split="train")
            if pairs[:1] == e.pairs[:1]:
                say(
                    f"--data {name} has no train split: static steering is made from the pairs "
                    "that it is measured on, which flatters it."
                )
            found = static.means(count(policy, pairs, what="static steering: means"))
            vectors = static.vectors(found, policy.steered, s.coefficients, s.top_features)
            losses = static.losses(policy, e.pairs, vectors)
            rows = static.static_rows(vectors, losses, s.bootstrap, s.seed)
            save(folder, "static", about | dict(static_data=name), rows)

        vectors = 3 * len(s.coefficients) + len(s.top_features)
        work = {"static steering: means": s.static_pairs / len(e.pairs)}
        work |= {"static steering": 2 + vectors}
        return Part("static", ("static",), (), about, work, make)

    def interesting(self) -> list[tuple[Labels, dict[str, np.ndarray]]]:
        """Of each label file the categories that choices tells apart, if there are any."""
        found = []
        for table in self.e.labels:
            masks = {name: m for name, m in table.categories.items() if name not in self.s.rest}
            masks = {name: mask for name, mask in masks.items() if mask.any()}
            found += [(table, masks)] if masks else []
        return found

    @property
    def told_apart(self) -> dict:
        """What says which classes tokens are divided into."""
        return dict(rest=self.s.rest, token_rules=self.rules.described() if self.rules else None)

    @functools.cached_property
    def partitions(self) -> list[tuple[Labels | Rules, Classes]]:
        """The vocabulary under each label file, and under the rules."""
        policy, pairs = self.e.policy, self.e.pairs
        found = [
            (table, classes(policy, pairs, categories, table.kind))
            for table, categories in self.interesting()
        ]
        return found + ([(self.rules, by_rules(self.rules, policy, pairs))] if self.rules else [])

    @functools.cached_property
    def answers(self) -> list[Pair]:
        """Prompts, each with the base model's and the policy's answer."""
        s, prompts = self.s, [pair.prompt for pair in self.e.pairs[: self.s.prompts]]
        return answered(self.e.policy, prompts, s.answer_tokens, s.seed)

    def choices_part(self) -> Part:
        e, s = self.e, self.s
        about = e.about | self.told_apart | dict(version=VERSION)

        def make(folder: Path) -> None:
            tables, partitions = zip(*self.partitions, strict=True)
            rows = []
            results = choices(e.policy, e.pairs, partitions, "choices")
            for table, partition, found in zip(tables, partitions, results, strict=True):
                alone = data_alone(e.pairs, partition)
                rows += effect_tables.choice_rows(found, alone, table, s.bootstrap, s.seed)
            change = results[0].change[None]
            low, high = (end.item() for end in interval(change, s.bootstrap, s.seed))
            gap = dict(change=change.mean().item(), change_low=low, change_high=high)
            save(folder, "choices", about | gap, rows)

        work = {f"classes of tokens, {table.kind}": 1 for table in e.labels} | dict(choices=4)
        return Part("choices", ("choices",), (), about, work, make)

    def shift_part(self) -> Part:
        e, s = self.e, self.s
        sizes = dict(shift_pairs=s.shift_pairs, prompts=s.prompts, answer_tokens=s.answer_tokens)
        about = e.about | self.told_apart | sizes

        def make(folder: Path) -> None:
            tables, partitions = zip(*self.partitions, strict=True)
            pairs = e.pairs[: s.shift_pairs]
            own = shift(e.policy, pairs, partitions, "shift")
            permuted = null(e.policy, pairs, partitions, s.seed, "shift: null")
            measured = [("responses", own, permuted)]
            if s.prompts:
                found = shift(e.policy, self.answers, partitions, "shift of answers")
                nothing = [None] * len(found)
                for i, name in enumerate(("base model's answers", "policy's answers")):
                    texts = [of.of(slice(i, None, 2)) for of in found]
                    measured.append((name, texts, nothing))
            rows = []
            for name, found, nulls in measured:
                for table, of, of_null in zip(tables, found, nulls, strict=True):
                    given = (table, s.bootstrap, s.seed)
                    rows += change_tables.shift_rows(name, of, of_null, *given)
            save(folder, "shift", about, rows)

        texts, prompts = s.shift_pairs / len(e.pairs), s.prompts / len(e.pairs)
        work = {"shift": 3 * texts, "shift: null": 7 * texts + 80 / len(e.pairs)}
        work |= {"shift of answers": 6 * prompts} if s.prompts else {}
        return Part("shift", ("shift",), (), about, work, make)

    def behaviour_part(self) -> Part:
        e, s = self.e, self.s
        about = e.about | self.told_apart | dict(prompts=s.prompts, answer_tokens=s.answer_tokens)

        def make(folder: Path) -> None:
            rows, tokenizer = [], e.policy.tokenizer
            for table, divided in self.partitions:
                if isinstance(table, Rules):
                    divided = by_rules(table, e.policy, self.answers)
                (found,) = compare(self.answers, [divided], seed=s.seed)
                given = (table, tokenizer, s.bootstrap, s.seed)
                rows += change_tables.behaviour_rows(found, *given)
            save(folder, "behaviour", about, rows)

        work = dict(answers=4 * s.prompts / len(e.pairs))
        return Part("behaviour", ("behaviour",), (), about, work, make)

    def attribution_part(self) -> Part:
        e, s = self.e, self.s
        about = e.about | dict(nodes=s.nodes, version=VERSION)
        files = ("attribution_features.parquet", "attribution_cards.json")

        def make(folder: Path) -> None:
            masks = [torch.from_numpy(x.mask) for x in effect_tables.category_masks(e.labels)]
            members = torch.stack(masks) if masks else None
            found = attribute(e.policy, e.pairs, s.nodes, members, "attribution")
            usage, mean_v = over_both_responses(self.counts)
            settings = (e.labels, usage > 0, s.bootstrap, s.seed)
            said = about | dict(change=found.change, residual=found.residual)
            save(folder, "attribution", said, effect_tables.attribution_rows(found, *settings))
            columns = effect_tables.feature_columns(found, e.labels, usage, mean_v)
            rows = effect_tables.earned_by_rows(columns, e.labels)
            save(folder, "attribution_features", said, rows)
            pq.write_table(pa.table(columns), folder / files[0])
            shown = dict(about=said, cards=cards(e.policy, e.pairs, [row.feature for row in rows]))
            (folder / files[1]).write_text(json.dumps(shown) + "\n")

        names = ("attribution", "attribution_features")
        work = {"attribution": 3 + 3 * s.nodes, "strongest contexts": 1}
        return Part("attribution", names, files, about, work, make)

    def carriers_part(self) -> Part:
        e, s = self.e, self.s
        about = e.about | self.told_apart | dict(carrier_pairs=s.carrier_pairs, prompts=s.prompts)
        about |= dict(answer_tokens=s.answer_tokens, nodes=s.nodes)

        def make(folder: Path) -> None:
            (table, divided), pairs = self.partitions[0], e.pairs[: s.carrier_pairs]
            (whole,) = shift(e.policy, pairs, [divided])
            category = divided.names[int(whole.divergence[:, :-2].mean(0).argmax())]
            usage, mean_v = over_both_responses(self.counts)
            # On the same few pairs, so that the part can be made again without the other.
            earned = attribute(e.policy, pairs, s.nodes, None, "carriers") if s.nodes else None
            gradient = gradient_scores(e.policy, pairs, divided, category, "carriers")
            orders = rankings(category, e.labels, usage, mean_v, earned, gradient, s.seed)
            curves = ranking.curves(e.policy, pairs, divided, category, orders, what="carriers")
            in_answers = self.kept_in_answers(curves, divided, category) if s.prompts else {}
            answers = len(self.answers) if s.prompts else 0
            given = (ranking.NUMBERS, table, category, in_answers, answers, s.bootstrap, s.seed)
            save(folder, "carriers", about, change_tables.carrier_rows(curves, *given))
            best = max(curves, key=lambda curve: curve.area)
            rows = change_tables.carried_rows(best.order, usage, mean_v, e.labels)
            save(folder, "carried_by", about | dict(ranking=best.ranking, category=category), rows)

        conditions = (7 * len(ranking.NUMBERS) + 3 * s.nodes + 6) * s.carrier_pairs + 6 * s.prompts
        work = dict(carriers=conditions / len(e.pairs))
        return Part("carriers", ("carriers", "carried_by"), (), about, work, make)

    def kept_in_answers(
        self, curves: list[ranking.Curve], divided: Classes, category: str
    ) -> dict[tuple[str, int], float]:
        """(ranking, n) -> share of the change in the category's tokens that answers still show, for
        the best ranking, usage and random features, ANSWERED of them.
        """
        e, s, c = self.e, self.s, divided.names.index(category)
        divided = divided._replace(own=None)  # those of the pairs' responses, not of answers
        prompts = [pair.prompt for pair in self.answers]
        (whole,) = compare(self.answers, [divided], seed=s.seed)
        best = max(curves, key=lambda curve: curve.area).ranking
        found = {}
        for curve in curves:
            if curve.ranking in (best, "usage", "random"):
                mask = ranking.kept(curve.order, ANSWERED)
                kept = ranking.answers_keeping(e.policy, mask, prompts, s.answer_tokens, s.seed)
                pairs = [p._replace(rejected=a) for p, a in zip(self.answers, kept, strict=True)]
                (part,) = compare(pairs, [divided], seed=s.seed)
                if whole.excess[c] > 0:
                    found[curve.ranking, ANSWERED] = (part.excess[c] / whole.excess[c]).item()
        return found


def over_both_responses(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Usage and mean of v over the positions of prompt+chosen and prompt+rejected, [F] each."""
    positions = counts.positions[1:].sum()
    usage, mean = (x[0, 1:].sum(0).double() / positions for x in (counts.events, counts.sums))
    return usage.numpy(), mean.numpy()


def save(folder: Path, name: str, about: dict, rows: list) -> None:
    """A table of NamedTuples or dicts."""
    rows = [row if isinstance(row, dict) else row._asdict() for row in rows]
    write_table(folder, name, about, rows)


# --- what is there already ------------------------------------------------------------------------

# Entries of `about` that differ without changing a number.
NAMES = ("run", "code")
NO_LABELS = ("topk", "static")  # tables that no label enters


def is_current(folder: Path, part: Part) -> bool:
    """Whether eval/ holds the part, made with this adapter, data, labels and settings."""
    if not all((folder / name).is_file() for name in part.files):
        return False
    for name in part.tables:
        wanted = part.about | (dict(labels=[]) if name in NO_LABELS else {})
        wanted = json.loads(json.dumps(wanted))
        try:
            there = dict(read_json(folder / f"{name}.json")["about"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if any(there.get(key) != value for key, value in wanted.items() if key not in NAMES):
            return False
    return True


def make(part: Part, folder: Path, out_of_date: bool) -> None:
    """Write a part into eval/, or the pictures that it lacks there."""
    with publish(folder) as new:
        if out_of_date:
            part.make(new)
        for name in part.tables:
            if out_of_date or not figures.is_current(folder, name):
                figures.draw(new if out_of_date else folder, name, new)


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    e = open_evaluation(s)
    audit = Audit(e, s)
    folder = e.out / "eval"
    parts = [part for part in audit.parts() if not s.only or part.name in s.only]
    for name in {*s.only} - {part.name for part in parts}:
        raise UserError(f"--only {name}: the other flags leave this part out.")
    due = [part.name for part in parts if s.only or not is_current(folder, part)]
    if not audit.masks:
        print("No --labels with categories: no composition (Table 2).", file=sys.stderr)

    work = {part.name: sum(part.work.values()) for part in parts if part.name in due}
    seconds = seconds_per_condition(e.policy, e.pairs) * sum(work.values())
    seconds += DRAWING * sum(len(part.tables) for part in parts if part.name in due)
    print(f"{len(e.pairs):,} pairs; to make: {', '.join(due) or 'nothing'}; about {seconds:.0f} s.")
    with Line("audit", sum(work.values()), "passes") as line:
        for part in parts:
            started = time.perf_counter()
            with line.part(part.name, work.get(part.name, 0), part.work):
                make(part, folder, part.name in due)
            seconds = time.perf_counter() - started
            took = f"{seconds:.1f} s" if part.name in due else "there already"
            say(f"{part.name:<12} {took:>13}  {', '.join((*part.tables, *part.files))}")

    run = report.read_run(e.out, e.about)
    if run.left_out:
        names = ", ".join(run.left_out)
        why = "made with another adapter, other pairs or other labels"
        print(f"Left out of the report, because {why}: {names}.", file=sys.stderr)
    figures_beside = beside(run.metrics, run.tables)
    if figures_beside:
        with publish(folder) as new:
            save(new, "beside_published", e.about, figures_beside)
    page = report.write_report(e.out, e.about)
    if (e.out / "adapter").is_dir() or (e.out / "adapter_config.json").is_file():
        card.write_card(e.out, e.about)
    print(summary(report.read_run(e.out, e.about).tables))
    print(f"The rest: {page}, and the tables in {folder}.")


def summary(tables: dict[str, dict]) -> str:
    """Three lines for the terminal: what the policy does, where that was measured, and what it
    learned on the given pairs; "" where neither was measured.
    """
    found, does = verdict(tables), " ".join(lead(tables))
    lines = [does] if does else []
    if found is not None:
        asked = ("By which features?",) if does else ("How sure is that?", "By which features?")
        lines.append(f"{found.headline} {found.answer('What was learned?')}")
        lines += [found.answer(question) for question in asked]
    return "\n".join(["", *map(shown, lines), ""]) if lines else ""


if __name__ == "__main__":
    cli.run(main)
