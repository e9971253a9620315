"""The paragraph that a report leads with: what the policy does more and less of, how sure that is,
what the pairs alone would have suggested, which features carry it, and what was not tested.

It is made from the tables of OUT/eval/ alone. A sentence stands only where a number supports it.
"""

from collections.abc import Sequence

from audit.choices import END, LEVEL, REST

TESTS = {"(all)", END, REST}  # rows of a table that are no category


def lead(tables: dict[str, dict]) -> list[str]:
    """tables: name -> {about, rows}, as report.read_run gives them -> sentences, in order.

    [] where neither behaviour nor shift was measured.
    """
    said = [
        *does(tables.get("behaviour", {})),
        *moved(tables.get("shift", {})),
    ]
    if not said:
        return []
    said += alone(tables)
    said += carried(tables.get("carriers", {}))
    return [*said, *untested(tables)]


def leading(rows: Sequence[dict]) -> list[dict]:
    """The rows of the label file that leads: the first of kind "fires" or of rules, else the
    first.
    """
    files = dict.fromkeys((row["labels"], row["kind"]) for row in rows)
    first = next((name for name, kind in files if kind in ("fires", "rules")), None)
    first = first or next((name for name, _ in files), None)
    return [row for row in rows if row["labels"] == first]


def named(rows: Sequence[dict]) -> str | None:
    return next((row["tokens"] for row in rows if row["named"]), None)


# --- what it does ---------------------------------------------------------------------------------


def does(table: dict) -> list[str]:
    """From behaviour: the changed categories, the most changed first, and the length."""
    rows = leading(table.get("rows", ()))
    if not rows:
        return []
    prompts = min(table["about"]["prompts"], table["about"]["pairs"])
    length = next(row for row in rows if row["tokens"] == "(all)")
    changed = changed_rows(table)
    if not changed:
        least = min(row["p_value"] for row in rows if row["tokens"] not in TESTS)
        said = [
            f"In answers to {prompts} prompts, no category of tokens changed more than chance "
            f"explains (smallest p = {least:.2g}); so few answers can hide a change of few tokens."
        ]
    else:
        first, *others = map(phrase, changed)
        said = [f"Its answers to {prompts} prompts have, compared with the base model's, {first}."]
        said += [f"They also have {other}." for other in others]
    if length["low"] > 0 or length["high"] < 0:
        longer = "longer" if length["change"] > 0 else "shorter"
        said.append(
            f"Its answers are {longer}: {length['after']:.0f} tokens, against "
            f"{length['before']:.0f} ({interval(length)})."
        )
    return said


def changed_rows(table: dict) -> list[dict]:
    """Rows of behaviour of the categories that changed more than chance explains, the most changed
    first.
    """
    rows = [row for row in leading(table.get("rows", ())) if row["tokens"] not in TESTS]
    return sorted((row for row in rows if row["p_value"] <= LEVEL), key=lambda row: -row["excess"])


def on_responses(table: dict) -> list[dict]:
    """Rows of shift on the pairs' responses."""
    return leading([row for row in table.get("rows", ()) if row["texts"] == "responses"])


def phrase(row: dict) -> str:
    """What happened to the tokens of one category."""
    name, counts = row["tokens"], f"{row['after']:.1f} against {row['before']:.1f} an answer"
    if row["low"] > 0:
        said = f"more tokens of {name} ({counts}; {interval(row)})"
        words = [("such as", row["more"])]
    elif row["high"] < 0:
        said = f"fewer tokens of {name} ({counts}; {interval(row)})"
        words = [("such as", row["less"])]
    else:
        said = (
            f"other tokens of {name} in place of those before ({row['gained']:.1f} gained and "
            f"{row['lost']:.1f} lost an answer)"
        )
        words = [("more of", row["more"]), ("less of", row["less"])]
    said += "".join(f", {how} {shown}" for how, shown in words if shown)
    return f"{said}, p = {row['p_value']:.2g}"


def interval(row: dict) -> str:
    return f"{row['low']:+.1f} to {row['high']:+.1f}, 95 % over prompts"


def moved(table: dict) -> list[str]:
    """From shift on the pairs' responses."""
    rows = on_responses(table)
    if not rows:
        return []
    kl = sum(row["share"] for row in rows)
    name = named(rows)
    if name is None:
        return [
            "On given texts its distribution over the next token differs from the base model's by "
            f"{kl:.2g} nats a token, and no category by enough to be named."
        ]
    row = next(row for row in rows if row["tokens"] == name)
    whole = sum(r["divergence"] for r in rows)
    more = "up" if row["after"] > row["before"] else "down"
    sure = row["low"] > 0 or row["high"] < 0
    mass = (
        f", whose probability goes {more} from {100 * row['before']:.1f} to "
        f"{100 * row['after']:.1f} %"
        if sure
        else ""
    )
    said = (
        f"On given texts, whatever they prefer, the category that its distribution over the next "
        f"token changed most is {name}{mass}: {100 * row['divergence'] / whole:.0f} % of the whole "
        f"divergence, {row['divergence']:.2g} nats a token ({row['divergence_low']:.2g} to "
        f"{row['divergence_high']:.2g}, 95 % over texts)."
    )
    return [said]


# --- what else is known ---------------------------------------------------------------------------


def alone(tables: dict[str, dict]) -> list[str]:
    """What the pairs would have suggested without a policy, beside what the policy does."""
    rows = leading(tables.get("choices", {}).get("rows", ()))
    if not rows or "data_named" not in rows[0]:
        return []
    suggested = next((row["tokens"] for row in rows if row["data_named"]), None)
    if suggested is None:
        return ["The pairs alone, without a policy, suggest no category."]
    found = {row["tokens"] for row in changed_rows(tables.get("behaviour", {}))}
    found.add(named(on_responses(tables.get("shift", {}))) or "")
    if suggested in found:
        end = "and the policy changed it."
    else:
        end = "which the policy did not change by these measures."
    return [f"The pairs alone, without a policy, suggest {suggested}, {end}"]


def carried(table: dict) -> list[str]:
    """From carriers: how much few features keep."""
    rows = [row for row in table.get("rows", ()) if row["wins"]]
    if not rows or not rows[0]["kept"] > 0:
        return []
    enough = next((row for row in rows if row["kept"] >= 0.5), rows[-1])
    others = {row["ranking"]: row for row in table["rows"] if row["n"] == enough["n"]}
    chance = others.get("random")
    beside = f"; as many random ones {100 * chance['kept']:.0f} %" if chance else ""
    n = enough["n"]
    overshoot = ", more than all features together" if enough["kept"] > 1 else ""
    said = (
        f"Of its shift in {enough['category']}, the {n} features that {enough['ranking']} ranks "
        f"first keep {100 * enough['kept']:.0f} % by themselves{overshoot} "
        f"({100 * enough['low']:.0f} to {100 * enough['high']:.0f} %, 95 % over texts){beside}."
    )
    if all(row["kept"] < 0.5 for row in table["rows"]):
        said += " No tested ranking names fewer features that keep half of it."
    return [said]


def untested(tables: dict[str, dict]) -> list[str]:
    """The limits of what was measured."""
    said = []
    about = tables.get("behaviour", {}).get("about")
    if about:
        said.append(
            f"answers longer than {about['answer_tokens']} tokens, or to prompts unlike these"
        )
    else:
        said.append("what the policy writes by itself")
    if not tables.get("carriers", {}).get("rows"):
        said.append("which features carry the change")
    said.append("kinds of tokens that no label or rule names")
    said.append("another seed of the training")
    return [f"Not tested: {'; '.join(said)}."]
