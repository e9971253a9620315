"""Runs whose cause is planted, as a user would train and audit them; what tests/test_verdict.py
reads of their tables stands beside this file.

    python -m tests.golden.verdicts.make OUT [CAUSE ...]

A run takes about a minute on two cores. OUT/CAUSE is the run, with its report; without --only the
audit fills in the rest of the page.
"""

import json
import subprocess
import sys
from pathlib import Path

from tiny import world

HERE = Path(__file__).resolve().parent
CAUSES = ("none", "style", "bullets", "bold", "honesty", "refusal", "anti-flattery")
TABLES = ("choices", "attribution", "attribution_features", "ablation", "topk", "static")
KEPT = {"attribution_features": 5}  # rows
ABOUT = ("pairs", "change", "change_low", "change_high", "labels")
SIZES = dict(train=768, test=128)
TRAIN = "--model tiny --eval-every 0 --samples 0 --checkpoint-every 0"
AUDIT = "--pairs 64 --static-pairs 16 --coefficients 1 --top-features 16 --random-sets 1"
AUDIT += " --keep 0.1 1 5 --nodes 4 --bootstrap 300 --only ablation static choices attribution"


def write_pairs(cause: str, path: Path) -> None:
    rows = []
    for seed, (split, n) in enumerate(SIZES.items()):
        for i, pair in enumerate(world.pairs(cause, n, 70_000 + seed)):
            rows.append(pair.row(f"{split}-{i}") | dict(split=split))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(cause: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pairs, run = out / f"{cause}.jsonl", out / cause
    commands = []
    if not (run / "adapter").is_dir():
        write_pairs(cause, pairs)
        commands.append(["train.py", *TRAIN.split(), "--data", pairs, "--out", run])
    commands.append(["-m", "audit", "--run", run, *AUDIT.split()])
    for command in commands:
        subprocess.run([sys.executable, *map(str, command)], check=True)
    (HERE / f"{cause}.json").write_text(json.dumps(kept(run), indent=1) + "\n")


def kept(run: Path) -> dict:
    """The rows of the tables, numbers to 5 digits, without what no sentence reads."""

    def short(value):
        return float(f"{value:.5g}") if isinstance(value, float) else value

    tables = {}
    for name in TABLES:
        found = json.loads((run / "eval" / f"{name}.json").read_text())
        rows = found["rows"][: KEPT.get(name)]
        rows = [row for row in rows if row.get("where", "(all)") == "(all)"]
        about = {k: short(v) for k, v in found["about"].items() if k in ABOUT}
        about["labels"] = [{k: t[k] for k in ("name", "kind", "judge")} for t in about["labels"]]
        tables[name] = dict(
            about=about, rows=[{k: short(v) for k, v in row.items()} for row in rows]
        )
    return tables


if __name__ == "__main__":
    for name in sys.argv[2:] or CAUSES:
        make(name, Path(sys.argv[1]))
