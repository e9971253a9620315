"""The report's paragraph says what its tables support, and no more."""

from audit.lead import lead


def behaviour(**moved) -> dict:
    """category -> (before, after, low, high, gained, lost, excess, p)"""
    moved |= dict(end=(1, 1, 0, 0, 0, 0, 0.0, 1.0), rest=(20, 30, 5, 15, 12, 2, 9.0, 0.0004))
    rows = []
    for name, (before, after, low, high, gained, lost, excess, p) in moved.items():
        rows.append(
            dict(labels="fires", kind="fires", tokens=name, before=before, after=after, low=low,
                 change=after - before, high=high, gained=gained, lost=lost, excess=excess,
                 p_value=p, named=False, more="' **'", less="'You'")
        )  # fmt: skip
    whole = dict(tokens="(all)", before=45.0, after=67.0, change=22.0, low=15.0, high=29.0)
    rows.append(dict(labels="fires", kind="fires", p_value=None, excess=None) | whole)
    other = [row | dict(labels="promotes", kind="promotes") for row in rows]
    about = dict(prompts=64, pairs=200, answer_tokens=96)
    return dict(about=about, rows=[*other, *rows])


def shift(name: str | None) -> dict:
    numbers = dict(before=0.1, after=0.2, low=0.05, high=0.15, share=0.2, divergence=0.3,
                   divergence_low=0.2, divergence_high=0.4)  # fmt: skip
    kinds = ("style", "alignment", "end", "rest")
    about = dict(texts="responses", labels="fires", kind="fires")
    rows = [about | dict(tokens=kind, named=kind == name) | numbers for kind in kinds]
    return dict(about={}, rows=rows)


def choices(name: str | None) -> dict:
    kinds = ("style", "alignment", "end", "rest")
    rows = [
        dict(labels="fires", kind="fires", tokens=k, named=False, data_named=k == name)
        for k in kinds
    ]
    return dict(about={}, rows=rows)


def carriers(kept: float) -> dict:
    rows = [
        dict(ranking=name, n=n, kept=share * n / 256, low=0.0, high=1.0, category="style",
             wins=name == "v · gradient")
        for name, share in (("v · gradient", kept), ("random", 0.01)) for n in (16, 64, 256)
    ]  # fmt: skip
    return dict(about={}, rows=rows)


STYLE = (9.6, 18.6, 7.1, 11.0, 9.1, 0.1, 7.4, 0.0004)
REPLACED = (16.0, 16.2, -0.5, 0.9, 3.1, 2.9, 4.0, 0.0008)
CHANCE = (16.0, 16.3, -0.5, 0.9, 1.1, 0.9, 0.1, 0.6)


def test_a_policy_of_style():
    tables = dict(
        behaviour=behaviour(alignment=REPLACED, style=STYLE),
        shift=shift("style"),
        choices=choices("alignment"),
        carriers=carriers(0.9),
    )
    first, second, length, moved, data, features, limits = lead(tables)
    assert "more tokens of style (18.6 against 9.6 an answer; +7.1 to +11.0" in first
    assert "64 prompts" in first and "' **'" in first and "p = 0.0004" in first
    assert "other tokens of alignment" in second and "3.1 gained and 2.9 lost" in second
    assert "longer: 67 tokens, against 45" in length
    assert "changed most is style" in moved and "from 10.0 to 20.0 %" in moved and "25 %" in moved
    assert data.endswith("suggest alignment, and the policy changed it.")
    assert "the 256 features that v · gradient ranks first keep 90 %" in features
    assert "random ones 1 %" in features
    assert "96 tokens" in limits and "which features" not in limits


def test_nothing_learned_is_said_so():
    tables = dict(behaviour=behaviour(style=CHANCE), shift=shift(None), choices=choices("style"))
    nothing, length, moved, data, limits = lead(tables)
    assert "no category of tokens changed more than chance explains (smallest p = 0.6)" in nothing
    assert "can hide a change of few tokens" in nothing
    assert "longer" in length and "no category by enough" in moved
    assert data.endswith("suggest style, which the policy did not change by these measures.")
    assert "which features carry the change" in limits


def test_words_stand_only_where_numbers_do():
    assert lead({}) == [] and lead(dict(choices=choices("style"))) == []
    said = lead(dict(shift=shift("style")))
    assert "what the policy writes by itself" in said[-1] and "pairs alone" not in " ".join(said)
    weak = " ".join(lead(dict(shift=shift("style"), carriers=carriers(0.3))))
    assert "keep 30 %" in weak and "No tested ranking names fewer features" in weak
