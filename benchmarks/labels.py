"""How fast features are labelled, in how much memory, and how rightly on the embedded world.

    python -m benchmarks.labels --what endpoint   requests a second; the server takes 200 ms each
    python -m benchmarks.labels --what million    retrieval over a million made-up explanations
    python -m benchmarks.labels --what tiny       each judge on tiny, against the true categories

The server is the tests' stand-in for vLLM, in a process of its own, and knows the answers: neither
the cost of a language model nor how well it judges is measured here.
"""

import json
import multiprocessing
import os
import random
import resource
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from labelling.label import main as run_labelling
from labels import read_header_and_rows
from runtime import cli
from runtime.cli import flag
from tests.judge import AXBENCH, TINY, Server, fill, realised

TRUTH = {row["description"]: row["category"] for row in TINY}


def serve(latency: float, tiny: bool, address) -> None:
    """Process: the tests' server."""

    def true_on_tiny(category, text):
        return TRUTH[text] == category

    def made_up(category, text):
        return "code" in text

    server = Server(true_on_tiny if tiny else made_up)
    server.latency = latency
    address.put(server.url)
    time.sleep(3600)


def memory() -> float:
    """Resident MiB of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def texts(n: int) -> list[str]:
    """n made-up explanations: beginnings and ends of real ones."""
    real = [row["description"].split() for row in read_header_and_rows(AXBENCH)[1]]
    draw = random.Random(0)
    halves = ((draw.choice(real), draw.choice(real)) for _ in range(n))
    return [" ".join([*a[: (len(a) + 1) // 2], *b[len(b) // 2 :]]) for a, b in halves]


def label(folder: Path, *flags) -> float:
    """Run `python -m labelling` in this process: seconds."""
    out = folder / "labels.jsonl"
    start = time.monotonic()
    run_labelling([*map(str, flags), "--judge-model", "judge", "--out", str(out)])
    return time.monotonic() - start


def endpoint(folder: Path, flags: list, concurrency: int) -> None:
    seen = [memory()]

    def watch():
        while True:
            time.sleep(1)
            seen.append(memory())

    threading.Thread(target=watch, daemon=True).start()
    seconds = label(folder, *flags, "--concurrency", concurrency)
    answers = len((folder / "labels.journal.jsonl").read_text().splitlines())
    print(f"{answers:,} answers, {answers / seconds:.0f} a second, reading and writing included")
    early, half_way = seen[min(5, len(seen) - 1)], seen[len(seen) // 2]
    print(f"resident MiB after 5 s {early:.0f}, half way {half_way:.0f}, at the end {seen[-1]:.0f}")


def million(folder: Path, flags: list) -> None:
    seconds = label(folder, *flags, "--judge", "retrieval", "--ask", 400)
    rows = read_header_and_rows(folder / "labels.jsonl")[1]
    right = sum(row["label"] == ("code" in row["description"]) for row in rows) / len(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{len(rows):,} features in {seconds:.0f} s; peak {peak:,.0f} MiB; right {right:.4f}")


def tiny(folder: Path, url: str) -> None:
    two, sheet = folder / "two.json", folder / "sheet.csv"
    names = ("alignment", "style")
    two.write_text(json.dumps([dict(name=n, definition=n, yes="a", no="b") for n in names]))
    truth = {int(row["index"]): row["category"] for row in TINY}
    explained = ["--explanations", "tiny", "--categories", str(two)]
    run_labelling([*explained, "--sample", "300", "--out", str(sheet)])
    fill(sheet, lambda k, name: truth[k] == name)
    learned = {int(row["feature"]) for row in read_header_and_rows(sheet)[1]}
    judges = {
        "endpoint": ("judge", (), ["--endpoint", url]),
        "retrieval": ("nearest", (), ["--endpoint", url, "--ask", 300]),
        "local": ("linear", learned, ["--train", sheet]),
    }
    for judge, (by, without, flags) in judges.items():
        label(folder, *explained, "--judge", judge, *flags)
        for category, a in realised(folder / "labels.jsonl", truth, by, without).items():
            print(f"==> {judge}, {category}: {a}")


@dataclass(frozen=True)
class Settings:
    what: str = flag("tiny", "what is measured", ("endpoint", "million", "tiny"))
    features: int | None = flag(None, "made-up features; unset: 20,480, of million a million")
    concurrency: int = flag(64, "requests in flight")

    def __post_init__(self):
        cli.at_least(self, 1, "features", "concurrency")


def main() -> None:
    options = cli.parse(Settings, doc=__doc__)
    spawn = multiprocessing.get_context("spawn")
    address, latency = spawn.Queue(), 0.2 if options.what == "endpoint" else 0.0
    arguments = (latency, options.what == "tiny", address)
    spawn.Process(target=serve, args=arguments, daemon=True).start()
    url = address.get()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.what == "tiny":
            return tiny(folder, url)
        measure = million
        n = options.features or 1_000_000
        if options.what == "endpoint":
            measure = partial(endpoint, concurrency=options.concurrency)
            n = options.features or 20_480
        made, one = folder / "made.csv", folder / "one.json"
        rows = (f'{k},"{text.replace(chr(34), "")}"\n' for k, text in enumerate(texts(n)))
        made.write_text("feature,explanation\n" + "".join(rows))
        one.write_text(
            json.dumps([dict(name="code", definition="about code", yes="loops", no="birds")])
        )
        flags = ["--explanations", made, "--sae", "made/up", "--categories", one, "--endpoint", url]
        measure(folder, flags)


if __name__ == "__main__":
    cli.run(main)
