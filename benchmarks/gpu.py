"""One command measures a GPU: checks, speed against the GPU's own limit, memory, where time goes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --memory-cap 24 --only step-8192 --out runs/gpu-24.json
    python -m benchmarks.gpu --device cpu --shape tiny --pairs 4 --steps 1

It needs no files: random weights of Gemma-2-2B's true size are made on the device. --out is one
JSON file, and beside it stands a Markdown table made from it (runs/gpu.md). Its parts:

    checks     tests/test_cuda.py, by pytest
    step-N     a training step and an evaluation at N tokens a micro-batch (throughput.py)
    profile    the kernels that take most of a step's time, at the first N (torch.profiler)
    audit      one pass each of usage, ablation and integrated gradients over the first 8 pairs
    decode-B   cached greedy decoding of B sequences together, unsteered and steered (decode.py)
    full       a step of train.py --full, with activation checkpointing
    compare    a step of the first 8 pairs against transformers with a hook (compare.py)

Each part is written as soon as it is known. The same command goes on with the parts that are
missing or failed; --only measures the parts that it names again, and no other. --minutes bounds the
whole: each group of parts (SHARES) has its share and what earlier groups left, and a group that is
not done by then is ended.

--memory-cap makes a large GPU stand for a smaller one: CUDA's own memory and what torch may take
are together that many GB (10^9 bytes), so that a part either finishes within them or fails. checks
and compare are left out then, since they start processes of their own.
"""

import functools
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import data
from audit.attribution import attribute
from audit.counting import count
from benchmarks import compare, decode, throughput
from benchmarks.gpu_table import table
from benchmarks.throughput import SHAPES, build, random_model, random_pairs, synchronise
from eval_ablation import all_losses
from fsrl import SteeredModel, Unsteered
from policy import DEFAULTS, Policy
from runtime import cli
from runtime.cli import flag
from runtime.device import DTYPES, peak_memory, resolve_device
from runtime.folder import code_revision
from runtime.messages import brief
from runtime.output import writable_file, write_whole
from runtime.sources import TINY, UserError, read_json

ROOT = Path(__file__).resolve().parents[1]
FORMAT = "fsrl-gpu-1"
# Parts that share a process, and so its compiled kernels, and their share of --minutes.
SHARES = {"checks": 0.26, "ours": 0.44, "full": 0.14, "compare": 0.16}
BATCHES = (1, 8)  # sequences decoded together
FEW_PAIRS = 8  # of audit and compare
KERNELS = 15
LEAST_SECONDS = 10  # a group with less time than this is not started


@dataclass(frozen=True)
class Settings:
    shape: str = flag("gemma-2-2b", "size of model and SAE", tuple(SHAPES))
    dtype: str = flag("auto", "as in train.py", DTYPES)
    device: str = flag("cuda", "cpu is for the smoke test", ("cuda", "cpu"))
    pairs: int = flag(32, "pairs per optimiser step")
    steps: int = flag(5, "steps measured, after the first one")
    tokens: tuple[int, ...] = flag((8192, 4096, 2048), "of a micro-batch, a part each")
    minutes: float = flag(9.0, "for all parts together")
    memory_cap: float | None = flag(None, "GB that the GPU is taken to have; unset: all of it")
    only: tuple[str, ...] = flag((), "measure these parts again and no other")
    out: str = flag("runs/gpu.json", "file to write, or to go on with")
    role: str = flag("", "used by the script itself", ("", *SHARES))

    def __post_init__(self):
        cli.at_least(self, 1, "pairs", "steps")
        cli.at_least(self, 0, "minutes", "memory_cap")
        if not self.tokens or min(self.tokens) < 1:
            raise UserError("--tokens: whole numbers from 1 were expected.")
        if self.memory_cap is not None and self.device == "cpu":
            raise UserError("--memory-cap: only a GPU's memory can be capped.")
        known = [name for names in groups(self).values() for name in names]
        for name in self.only:
            if name not in known:
                raise UserError(f"--only {name}: one of {', '.join(known)} was expected.")


def groups(s: Settings) -> dict[str, list[str]]:
    """The parts of each process."""
    steps = [f"step-{n}" for n in s.tokens]
    decoded = [f"decode-{n}" for n in BATCHES]
    own = {"ours": [*steps, "profile", "audit", *decoded], "full": ["full"]}
    if s.memory_cap:
        return own
    return {"checks": ["checks"], **own, "compare": ["compare"]}


# --- the parts, each in a process that is asked for it --------------------------------------------


class Parts:
    """How each part is measured. What they share is made when the first one needs it."""

    def __init__(self, s: Settings):
        self.s = s
        self.device = resolve_device(s.device, s.dtype)
        self.pairs = random_pairs(s.pairs, SHAPES[s.shape].config.vocab_size, seed=0)

    @functools.cached_property
    def steered(self) -> SteeredModel:
        return build(self.s.shape, self.device.dtype, self.s.device, seed=0)

    def by_name(self) -> dict[str, Callable[[], dict]]:
        found = {f"step-{n}": functools.partial(self.step, n) for n in self.s.tokens}
        found |= {f"decode-{n}": functools.partial(self.decode, n) for n in BATCHES}
        found |= dict(profile=self.profile, audit=self.audit)
        return found | dict(checks=checks, full=self.full, compare=self.compare)

    def throughput(self, tokens: int, steps: int) -> throughput.Settings:
        s = self.s
        sizes = dict(pairs=s.pairs, steps=steps, tokens_per_microbatch=tokens)
        return throughput.Settings(s.shape, self.device.dtype_name, s.device, **sizes)

    def step(self, tokens: int) -> dict:
        self.steered.adapter.requires_grad_(True)
        return throughput.result(self.throughput(tokens, self.s.steps), self.steered, self.pairs)

    def profile(self) -> dict:
        self.steered.adapter.requires_grad_(True)
        how = throughput.scorer_of(self.throughput(self.s.tokens[0], 1), self.device)
        step = throughput.stepper(self.steered, self.pairs, how)
        step()  # compiled now, and Adam's moments are there
        (seconds,) = timed(self.s.device, step, times=1)
        gpu = self.s.device != "cpu"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
        with torch.profiler.profile(activities=activities) as profiled:
            step()
            synchronise(self.s.device)
        kernels = kernel_times(profiled, gpu)
        busy = sum(kernel["seconds"] for kernel in kernels)
        return dict(step_seconds=seconds, kernel_seconds=busy, kernels=kernels[:KERNELS])

    def audit(self) -> dict:
        self.steered.requires_grad_(False)
        run = DEFAULTS._replace(tokens_per_microbatch=self.s.tokens[0])
        tokenizer = data.load_tokenizer(TINY / "model")  # the vocabulary does not matter here
        policy = Policy(self.steered, tokenizer, self.device, run, "random weights")
        pairs, features = self.pairs[:FEW_PAIRS], self.steered.sae.d_sae
        categories = torch.rand(3, features, generator=torch.Generator().manual_seed(0)) < 0.1
        kept = [features // 10_000 + 1, features // 100, features // 10]
        passes = dict(
            usage=lambda: count(policy, pairs, categories),
            ablation=lambda: all_losses(policy, pairs, kept, categories),
            attribution=lambda: attribute(policy, pairs, 2, categories),
        )
        throughput.forget_peak(self.s.device)
        seconds = {name: timed(self.s.device, one, times=2) for name, one in passes.items()}
        memory = peak_memory(self.s.device), throughput.reserved_memory(self.s.device)
        named = dict(zip(("peak_bytes", "reserved_bytes"), memory, strict=True))
        return dict(pairs=len(pairs), seconds=seconds, **named)

    def decode(self, batch: int) -> dict:
        sizes = dict(batch=batch, tokens=64, rounds=2)
        s = decode.Settings(self.s.shape, self.device.dtype_name, self.s.device, **sizes)
        found = decode.result(s, decode.measure(s, self.steered))
        self.steered.adapter.bias.zero_()  # as it was: decoding sets how many features are steered
        return found

    def full(self) -> dict:
        """The baseline keeps float32 weights, gradients and moments of the whole model."""
        g = torch.Generator(self.s.device).manual_seed(0)
        model = random_model(self.s.shape, torch.float32, self.s.device, g)
        model.recompute = True
        s = self.throughput(self.s.tokens[0], 1)
        return throughput.result(s, Unsteered(model), self.pairs, evaluates=False)

    def compare(self) -> dict:
        if not find_spec("transformers"):
            needs = "it needs transformers: pip install -r requirements-dev.txt"
            return dict(skipped=f"not compared with the plain way, because {needs}")
        sizes = dict(pairs=min(FEW_PAIRS, self.s.pairs), tokens_per_microbatch=self.s.tokens[0])
        s = compare.Settings(self.s.shape, self.device.dtype_name, self.s.device, **sizes)
        return compare.result(s)


def timed(device: str, work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call."""
    found = []
    for _ in range(times):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - started)
    return found


def kernel_times(profiled: torch.profiler.profile, gpu: bool) -> list[dict]:
    """Kernels of a GPU, or operators on a CPU, those that took longest first."""
    found = []
    for event in profiled.key_averages():
        if (event.device_type == DeviceType.CUDA) != gpu or event.is_user_annotation:
            continue
        micro = event.self_device_time_total if gpu else event.self_cpu_time_total
        found.append(dict(name=brief(event.key), calls=event.count, seconds=micro / 1e6))
    return sorted(found, key=lambda row: -row["seconds"])


def checks() -> dict:
    """Which tests of tests/test_cuda.py pass. Each is told as it ends, since time may be up."""
    command = [sys.executable, "-m", "pytest", "-v", "tests/test_cuda.py"]
    ended: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            if test := re.match(r"\S+::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", line):
                ended[test[2]].append(test[1])
                failures = ended["FAILED"] + ended["ERROR"]
                so_far = f"{len(ended['PASSED'])} passed, {len(failures)} failed {failures}"
                say(part="checks", failed=f"not all tests have ended: {so_far}")
    if process.returncode > 1:
        raise RuntimeError(f"pytest ended with exit code {process.returncode}")
    passed, skipped = len(ended["PASSED"]), len(ended["SKIPPED"])
    return dict(passed=passed, failures=ended["FAILED"] + ended["ERROR"], skipped=skipped)


def worker(s: Settings) -> None:
    """Measure the parts --only, a line of JSON each. The first failure ends the process, because a
    fault may leave the GPU in a state in which everything after it fails.
    """
    say(hardware=hardware(s))
    if s.memory_cap is not None:
        cap_memory(s.memory_cap * 1e9)
    parts = Parts(s).by_name()
    for name in s.only:
        started = time.perf_counter()
        try:
            gc.collect()
            if s.device != "cpu":
                torch.cuda.empty_cache()
            found = parts[name]()
        except (Exception, SystemExit) as e:
            say(part=name, failed=brief(f"{type(e).__name__}: {e}"))
            traceback.print_exc()
            raise SystemExit(1) from e
        if s.device != "cpu" and "peak_bytes" in found:
            found |= dict(outside_bytes=outside_torch())
        say(part=name, took=time.perf_counter() - started, **found)


def say(**found) -> None:
    print(json.dumps(found), flush=True)


def hardware(s: Settings) -> dict:
    found = dict(python=platform.python_version(), torch=torch.__version__)
    if s.device == "cpu":
        return dict(name=f"{platform.machine()} CPU", threads=torch.get_num_threads(), **found)
    gpu = torch.cuda.get_device_properties(0)
    capability = f"{gpu.major}.{gpu.minor}"
    found |= dict(cuda=torch.version.cuda, capability=capability, bytes=gpu.total_memory)
    return dict(name=gpu.name, **found)


def outside_torch() -> int:
    """Bytes of the GPU that are taken, but not by torch's allocator in this process."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def cap_memory(most: float) -> None:
    """Refuse to let torch take more than `most` bytes, less what CUDA itself takes."""
    torch.cuda.synchronize()  # CUDA's context is there now
    outside, (_, total) = outside_torch(), torch.cuda.mem_get_info()
    if not outside < most <= total:
        has = f"this GPU has {total / 1e9:.1f} GB, of which {outside / 1e9:.1f} GB are taken"
        raise UserError(f"--memory-cap {most / 1e9:g}: {has}.")
    torch.cuda.set_per_process_memory_fraction((most - outside) / total)


# --- asking for the parts -------------------------------------------------------------------------


def ask(s: Settings, group: str, names: list[str], seconds: float) -> Iterator[dict]:
    """Let a process measure some parts of a group; yields its lines. It is ended after so long."""
    flags = dict(shape=s.shape, dtype=s.dtype, device=s.device, pairs=s.pairs, steps=s.steps)
    flags |= dict(memory_cap=s.memory_cap) if s.memory_cap is not None else {}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    words += ["--tokens", *map(str, s.tokens), f"--role={group}", "--only", *names]
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    # A session of its own, so that what it starts ends with it.
    started = dict(stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    process = subprocess.Popen(command, **started)
    late = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr)
        if process.wait() == 2:
            raise SystemExit(2)  # a person's mistake, which the process has named
    finally:
        late.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Record:
    """The JSON file and the table beside it, both written anew with every part."""

    def __init__(self, s: Settings):
        """Raises UserError where the file is of other settings."""
        self.path = writable_file(s.out)
        kept = ("shape", "dtype", "device", "pairs", "steps", "tokens", "memory_cap")
        settings = json.loads(json.dumps({name: getattr(s, name) for name in kept}))
        wanted = [name for names in groups(s).values() for name in names]
        self.content = dict(format=FORMAT, settings=settings, wanted=wanted, parts={})
        if not self.path.exists():
            return
        try:
            there = read_json(self.path)
            if there["format"] != FORMAT or not isinstance(there["parts"], dict):
                raise ValueError(f"its format is not {FORMAT}")
            for name, value in settings.items():
                if there["settings"][name] != value:
                    found = f"was made with {name} {there['settings'][name]}, now it is {value}"
                    raise UserError(f"--out {self.path}: {found}; name another file.")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"--out {self.path}: not a file of this script ({brief(e)}).") from e
        self.content = there

    def measured(self, name: str) -> bool:
        return "failed" not in self.content["parts"].get(name, {"failed": ""})

    def note(self, line: dict) -> None:
        """Take in a line of a worker's. Raises UserError where it runs on another GPU."""
        if "hardware" in line:
            there = self.content.setdefault("hardware", line["hardware"])
            if there != line["hardware"]:
                here = line["hardware"]["name"]
                why = f"was measured on {there['name']}, with its versions; this is {here}"
                raise UserError(f"--out {self.path}: {why}; name another file.")
            return
        at = dict(code=code_revision(), measured=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        found = {name: value for name, value in line.items() if name != "part"}
        self.content["parts"][line["part"]] = found | at
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")
        write_whole(self.path.with_suffix(".md"), table(self.content))


def measure(s: Settings, record: Record) -> None:
    """All parts that are due, in order, within --minutes."""
    ends = time.monotonic() + 60 * s.minutes
    due = {
        group: [n for n in names if (n in s.only if s.only else not record.measured(n))]
        for group, names in groups(s).items()
    }
    for number, (group, names) in enumerate(due.items()):
        later = sum(SHARES[g] for g, rest in [*due.items()][number + 1 :] if rest)
        until = ends - 60 * s.minutes * later
        while names and (seconds := until - time.monotonic()) > LEAST_SECONDS:
            print(f"{', '.join(names)}: {seconds:.0f} s at most", file=sys.stderr)
            line = {}
            with closing(ask(s, group, names, seconds)) as lines:
                for line in lines:
                    names = [name for name in names if name != line.get("part")]
                    record.note(line)
            if names and "failed" not in line:  # it ended without a word
                over = time.monotonic() >= until
                why = f"ended after {seconds:.0f} s" if over else "its process died"
                record.note(dict(part=names[0], failed=why))
                names = names[1:]


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    if s.role:
        worker(s)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of ask, which ends its process
    resolve_device(s.device, s.dtype)
    record = Record(s)
    measure(s, record)
    if record.content["parts"]:
        print(table(record.content))
    print(f"Written to {record.path} and {record.path.with_suffix('.md')}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
