"""How fast features are labelled, in how much memory, and how rightly on the embedded world.

    python benchmarks/labels.py endpoint      requests per second against a server that takes 200 ms for each
    python benchmarks/labels.py million       retrieval over a million made-up explanations
    python benchmarks/labels.py tiny          each judge on tiny's features, against their true categories

The server is the tests' stand-in for vLLM, in a process of its own. It knows the answers: what it costs to think,
and how well a language model judges, is not measured here.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_labelling import AXBENCH, TINY, Server, fill, realised

from labelling import label as classify_features
from labels import read_rows

TRUTH = {row["description"]: row["category"] for row in TINY}


def serve(latency: float, tiny: bool, address) -> None:
    """Process: the tests' server."""
    truth = (
        (lambda category, text: TRUTH[text] == category)
        if tiny
        else (lambda category, text: "code" in text)
    )
    server = Server(truth)
    server.latency = latency
    address.put(server.url)
    time.sleep(3600)


def memory() -> float:
    """Resident MiB of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def texts(n: int) -> list[str]:
    """n made-up explanations: beginnings and ends of real ones."""
    real = [row["description"].split() for row in read_rows(AXBENCH)[1]]
    draw = random.Random(0)
    halves = ((draw.choice(real), draw.choice(real)) for _ in range(n))
    return [" ".join([*a[: (len(a) + 1) // 2], *b[len(b) // 2 :]]) for a, b in halves]


def label(folder: Path, *flags) -> float:
    """Run classify_features.py in this process: seconds."""
    start = time.monotonic()
    classify_features.main(
        [*map(str, flags), "--judge-model", "judge", "--out", str(folder / "labels.jsonl")]
    )
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("endpoint", "million", "tiny"))
    parser.add_argument(
        "--features", type=int, help="made-up features (endpoint: 20,480; million: 1,000,000)"
    )
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    options = parser.parse_args()
    start = multiprocessing.get_context("spawn")
    address, latency = start.Queue(), 0.2 if options.what == "endpoint" else 0.0
    start.Process(
        target=serve, args=(latency, options.what == "tiny", address), daemon=True
    ).start()
    url = address.get()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, two = folder / "one.json", folder / "two.json"
        one.write_text(
            json.dumps([dict(name="code", definition="about code", yes="loops", no="birds")])
        )
        two.write_text(
            json.dumps(
                [dict(name=n, definition=n, yes="a", no="b") for n in ("alignment", "style")]
            )
        )
        made = folder / "made.csv"
        if options.what != "tiny":
            n = options.features or {"endpoint": 20_480, "million": 1_000_000}[options.what]
            rows = (f'{k},"{text.replace(chr(34), "")}"\n' for k, text in enumerate(texts(n)))
            made.write_text("feature,explanation\n" + "".join(rows))
            flags = [
                "--explanations",
                made,
                "--sae",
                "made/up",
                "--categories",
                one,
                "--endpoint",
                url,
            ]
        if options.what == "endpoint":
            seen: list[float] = []

            def watch():
                while True:
                    time.sleep(1)
                    seen.append(memory())

            threading.Thread(target=watch, daemon=True).start()
            label(folder, *flags, "--concurrency", options.concurrency)
            answered = [json.loads(line) for line in open(folder / "labels.journal.jsonl")]
            print(f"resident MiB, second by second: after 5 {seen[5]:.0f}, half way {seen[len(seen) // 2]:.0f}, "
                  f"at the end {seen[-1]:.0f}; {len(answered):,} answers")  # fmt: skip
        elif options.what == "million":
            seconds = label(folder, *flags, "--judge", "retrieval", "--ask", 400)
            right = [
                row["label"] == ("code" in row["description"])
                for row in read_rows(folder / "labels.jsonl")[1]
            ]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(
                f"{n:,} features in {seconds:.0f} s; peak {peak:,.0f} MiB; right {sum(right) / len(right):.4f}"
            )
        else:
            truth = {int(row["index"]): row["category"] for row in TINY}
            flags = ["--explanations", "tiny", "--categories", two, "--endpoint", url]
            sheet = folder / "sheet.csv"
            classify_features.main([*map(str, flags), "--sample", "300", "--out", str(sheet)])
            fill(sheet, lambda k, name: truth[k] == name)
            judges = {
                "endpoint": ("judge", []),
                "retrieval": ("nearest", ["--ask", 300]),
                "local": ("linear", ["--train", sheet]),
            }
            for judge, (by, more) in judges.items():
                label(folder, *flags, "--judge", judge, *more)
                learned = (
                    {int(row["feature"]) for row in read_rows(sheet)[1]} if judge == "local" else ()
                )
                for category, a in realised(folder / "labels.jsonl", truth, by, learned).items():
                    print(f"==> {judge}, {category}: {classify_features.describe(a)}")


if __name__ == "__main__":
    main()
