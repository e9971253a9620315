"""The report in Chromium: it asks for nothing, fits a phone, can be read in light and dark, and its
script shows cards. The words about a training run.
"""

import pytest
from browser import browser

from runtime.outcome import Sample, outcome, repetition

# Text whose contrast against what lies behind it is below WCAG AA: 4.5, or 3 for large text.
PALE = """
const rgba = text => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
const over = (a, b) => [0, 1, 2].map(i => a[3] * a[i] + (1 - a[3]) * b[i]);
const linear = x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
const light = c => c.map(x => linear(x / 255))
  .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const behind = element => {
  const layers = [];
  for (let e = element; e; e = e.parentElement)
    layers.push(rgba(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
};
const pale = [];
for (const details of document.querySelectorAll("details")) details.open = true;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walk.nextNode(); node; node = walk.nextNode()) {
  const element = node.parentElement, style = getComputedStyle(element);
  if (!node.data.trim() || !element.getClientRects().length || element.closest("script")) continue;
  const back = behind(element), ink = over(rgba(style.color), back);
  const [low, high] = [light(back), light(ink)].sort((a, b) => a - b);
  const ratio = (high + .05) / (low + .05), size = parseFloat(style.fontSize);
  if (ratio < (size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5))
    pale.push(node.data.trim().slice(0, 40) + " " + ratio.toFixed(2));
}
return pale.slice(0, 5);
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_report_in_a_browser(audited, chromium, width, scheme):
    chromium.log("performance")
    page = audited[0] / "report.html"
    chromium.open(page, width, scheme)
    assert chromium.log("browser") == []
    asked = {url for url in chromium.requests() if not url.startswith(("data:", "chrome:"))}
    assert asked == {page.resolve().as_uri()}

    wide, high = chromium.run(
        "const d = document.documentElement; return [d.scrollWidth, d.scrollHeight]"
    )
    assert wide <= width and high < 12_000
    assert chromium.run(PALE) == []
    # Every number of every table can be seen, folded parts opened by the line before.
    hidden = "return [...document.querySelectorAll('td')].filter(e => e.textContent.trim() && "
    hidden += "!(e.offsetWidth && e.offsetLeft + e.offsetWidth <= innerWidth)).length"
    assert chromium.run(hidden) == 0
    assert chromium.run("return document.documentElement.scrollWidth") <= width


def test_a_tap_shows_cards(audited, chromium):
    chromium.open(audited[0] / "report.html", 390)
    shown = "const d = document.querySelector('dialog'); const text = d.open && d.textContent; "
    shown += "d.close(); return text"
    number = chromium.run(
        "const a = document.querySelector('a.f'); a.click(); return a.textContent"
    )
    assert f"Feature {number}" in chromium.run(shown)
    note = chromium.run(
        "const i = document.querySelector('i[data-f]'); i.click(); return i.dataset.t"
    )
    text = chromium.run(shown)
    assert note.splitlines()[0] in text and "Feature" in text
    first = "const t = [...document.querySelectorAll('table.sorts')].find(t => t.rows.length > 6); "
    values = first + "return [...t.tBodies[0].rows].map(r => parseFloat(r.cells[2].textContent))"
    chromium.run(first + "t.tHead.rows[0].cells[2].click()")
    found = chromium.run(values)
    assert found == sorted(found, reverse=True)


# --- what training did, in words ------------------------------------------------------------------


def rows(*evals: tuple[float, float, float]) -> list[dict]:
    """(loss, log p of chosen, of rejected) of evaluations, 16 steps apart."""
    keys = ("loss", "logp_chosen", "logp_rejected")
    of = (dict(zip(keys, numbers, strict=True)) for numbers in evals)
    return [dict(split="eval", step=16 * i, **row) for i, row in enumerate(of)]


SAME = [Sample("Why?", "so it is, and so it was", "so it is, and so it was")]


def test_which_response_moved():
    (said,) = outcome(rows((4, -0.439, -0.36), (0.1, -0.43, -1.5)), SAME)
    assert "rejected responses went from -0.360 to -1.500" in said
    assert said.endswith("99% of the widened gap is rejected text made unlikely.")
    (said,) = outcome(rows((4, -1.0, -1.0), (1, -0.5, -1.1)), SAME)
    assert said.endswith("83% of the widened gap is chosen text made likelier.")
    (said,) = outcome(rows((4, -1.0, -1.0), (1, -1.5, -3.0)), SAME)
    assert said.startswith("Warning: displacement. Chosen responses became less likely too")
    (said,) = outcome(rows((4, -1.0, -1.0), (4, -1.001, -1.001)), SAME)
    assert said.startswith("The gap between chosen and rejected responses did not widen.")


def test_over_training_and_collapse_are_said():
    moved = (-1.0, -1.0), (-0.9, -2.0), (-0.9, -2.1)
    losses = zip((4.0, 0.0086, 0.027), moved, strict=True)
    *_, said = outcome(rows(*((loss, *of) for loss, of in losses)), SAME)
    assert said == (
        "Warning: over-training. The evaluation loss was lowest at step 16 (0.0086) and is 0.027 "
        "at step 32."
    )
    perfect = rows((4, -1.0, -1.0), (0.0, -0.9, -9.0))
    loop = Sample("Why?", "so it is, and so it was, as before", " ".join(["so it is"] * 9))
    *_, said = outcome(perfect, [*SAME, loop])
    assert said.startswith("Warning: collapse. 1 of 2 sampled answers repeat themselves")
    *_, said = outcome(perfect, [Sample("Why?", "one two three four", "")])
    assert said.startswith("Warning: length. 1 of 1") and "0 words (4 before)" in said
    assert repetition("a b c d e f") == 0 and repetition("a b a b a b a b") == pytest.approx(0.6)


def test_without_evaluation_pairs_the_training_pairs_speak():
    of = [row | dict(split="train") for row in rows((4, -1, -1), (1, -0.9, -2), (3, -0.9, -1.5))]
    *_, said = outcome(of, SAME)
    assert said.startswith("There were no evaluation pairs") and "over-training" in said
