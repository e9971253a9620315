"""What benchmarks.gpu found, its JSON file, as a Markdown table."""

import statistics
from typing import NamedTuple

PAPERS = "gemma-2-2b"  # the shape of the paper's run
EPOCH_PAIRS = 59_876  # of its training set
WIDEST = 90  # characters of a kernel's name


class Row(NamedTuple):
    """Of the main table."""

    what: str
    first: float  # seconds, with compilation
    seconds: list[float]  # of each later one
    rate: float | None = None  # pairs a second
    fraction: float | None = None  # of the limit
    matmul: float | None = None  # FLOP/s
    memory: tuple[int, int] | None = None  # bytes at the peak: allocated, reserved

    def cells(self) -> list[str]:
        median = f"{statistics.median(self.seconds):.3g}"
        spread = f" ({min(self.seconds):.3g} to {max(self.seconds):.3g})"
        return [
            self.what,
            f"{self.first:.3g}",
            median + spread * (len(self.seconds) > 1),
            "" if self.rate is None else f"{self.rate:.3g}",
            "" if self.fraction is None else f"**{self.fraction:.2f}**",
            "" if self.matmul is None else f"{self.matmul / 1e12:.3g}",
            " / ".join(f"{n / 1e9:.2f}" for n in self.memory or ()),
        ]


TITLES = ["", "first, s", "then, s: median", "pairs/s", "fraction of the limit"]
TITLES += ["matmul, TFLOP/s", "peak memory, GB: allocated / reserved"]


def table(content: dict) -> str:
    s, parts = content["settings"], content["parts"]
    gpu = content.get("hardware", dict(name="GPU unknown"))  # no process lived to name it
    good = {name: part for name, part in parts.items() if "failed" not in part}
    memory = f"{gpu['bytes'] / 1e9:.1f} GB, " if "bytes" in gpu else ""
    here = ", ".join(f"{key} {value}" for key, value in gpu.items() if key not in ("name", "bytes"))
    here = here or "Versions unknown"
    cap = f", capped at {s['memory_cap']:g} GB" if s["memory_cap"] else ""
    lines = [f"# {gpu['name']}{cap}", "", f"{memory}{here}.", ""]
    lines += [f"{s['shape']}, dtype {s['dtype']}, random weights, {s['pairs']} pairs a step.", ""]

    lines += checked(good["checks"]) if "checks" in good else []
    lines += speeds(good, s["tokens"])
    if s["shape"] == PAPERS and (part := good.get(f"step-{s['tokens'][0]}")):
        minutes = EPOCH_PAIRS / part["pairs_per_second"] / 60
        said = f"an epoch of {EPOCH_PAIRS:,} pairs would take {minutes:.3g} minutes"
        lines += [f"At the first row's speed {said}, evaluations apart (computed, not run).", ""]
    lines += decoded(good)
    lines += compared(good["compare"]) if "compare" in good else []
    lines += profiled(good["profile"]) if "profile" in good else []
    missing = {name: parts.get(name, {}).get("failed", "not yet") for name in content["wanted"]}
    missing = [f"{name} ({why})" for name, why in missing.items() if name not in good]
    lines += [f"Not measured: {'; '.join(missing)}.", ""] if missing else []
    return "\n".join(lines)


def markdown(titles: list[str], rows: list[list[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines] + [""]


def checked(part: dict) -> list[str]:
    failures = f" ({', '.join(part['failures'])})" if part["failures"] else ""
    said = f"{part['passed']} passed, {len(part['failures'])} failed{failures}"
    return [f"Checks: {said}, {part['skipped']} skipped.", ""]


def speeds(parts: dict, tokens: list[int]) -> list[str]:
    """Steps, evaluations and the audit."""
    rows = []
    for n in tokens:
        if part := parts.get(f"step-{n}"):
            rows += [step_row(f"training step, {n:,} tokens a micro-batch", part)]
            rows += [evaluation_row(f"evaluation, {n:,} tokens a micro-batch", part)]
    if part := parts.get("full"):
        rows += [step_row(f"`--full` step, {tokens[0]:,} tokens, blocks computed again", part)]
    if part := parts.get("audit"):
        for what, (first, *seconds) in part["seconds"].items():
            said = f"audit of {part['pairs']} pairs: {what}"
            rows += [Row(said, first, seconds, memory=memory_of(part))]
    if not rows:
        return []

    lines = markdown(TITLES, [row.cells() for row in rows])
    outside = [part["outside_bytes"] for part in parts.values() if "outside_bytes" in part]
    if outside:
        lines += [f"CUDA itself and other processes take {max(outside) / 1e9:.2f} GB more.", ""]
    return lines


def step_row(what: str, part: dict) -> Row:
    limit = part["fraction_of_limit"], part["matmul_flops_per_second"]
    seconds = part["first_seconds"], part["seconds"]
    return Row(what, *seconds, part["pairs_per_second"], *limit, memory_of(part))


def evaluation_row(what: str, part: dict) -> Row:
    limit = part["evaluation_fraction_of_limit"], part["matmul_flops_per_second"]
    seconds = part["evaluation_seconds"]
    rate = part["pairs"] / statistics.median(seconds)
    return Row(what, part["first_evaluation_seconds"], seconds, rate, *limit)


def memory_of(part: dict) -> tuple[int, int]:
    return part["peak_bytes"], part["reserved_bytes"]


def decoded(parts: dict) -> list[str]:
    rows = []
    for name, part in parts.items():
        if name.startswith("decode-"):
            rates = (part[f"{way}_tokens_per_second"] for way in ("ours", "ours_steered"))
            rows.append([name.removeprefix("decode-"), *(f"{rate:.1f}" for rate in rates)])
    titles = ["sequences decoded together", "tokens/s, unsteered", "tokens/s, steered"]
    return markdown(titles, rows) if rows else []


def compared(part: dict) -> list[str]:
    if "skipped" in part:
        return [f"{part['skipped']}.", ""]
    titles = ["pairs", "ours, pairs/s", "plain, pairs/s", "ratio", "peak memory, ours / plain"]
    titles += ["largest difference of a pair's loss"]
    memory = f"{part['bytes'] / 1e9:.2f} / {part['plain_bytes'] / 1e9:.2f} GB"
    row = [str(part["pairs"]), f"{part['pairs_per_second']:.3g}"]
    row += [f"{part['plain_pairs_per_second']:.3g}", f"**{part['ratio']:.2f}**", memory]
    row += [f"{part['largest_loss_difference']:.2g} at a mean loss of {part['mean_loss']:.3g}"]
    return markdown(titles, [row])


def profiled(part: dict) -> list[str]:
    busy = part["kernel_seconds"]
    rows = [
        [
            f"`{kernel['name'][:WIDEST]}`",
            str(kernel["calls"]),
            f"{1e3 * kernel['seconds']:.1f}",
            f"{kernel['seconds'] / busy:.1%}",
        ]
        for kernel in part["kernels"]
    ]
    said = f"The kernels of a step of {part['step_seconds']:.3g} s take {busy:.3g} s together"
    return [f"{said}; the longest:", "", *markdown(["kernel", "calls", "ms", "share"], rows)]
