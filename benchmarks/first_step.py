"""Time to the first optimiser step of train.py, that step, and memory, at a published size.

    python -m benchmarks.first_step --shape gemma-2-2b --folder DIR

Makes random weights in the published layout (bfloat16 shards with an index, GemmaScope's params.npz
in float32; at gemma-2-2b 5.2 and 1.2 GB) and one pair of --tokens tokens, where DIR does not hold
them yet. Then runs one step of train.py as a user would and watches the process from outside.

Prints one line of JSON: seconds until the run is open (weights read, data tokenised, inputs
hashed), until its first step (the samples before training), of the step (forward, backward, AdamW),
and of the whole; tokens; and the peak of resident memory at the end of the step and of the whole.
"""

import json
import math
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from benchmarks.throughput import SHAPES
from data import load_pairs
from model import Gemma2, Gemma2Config
from runtime import cli
from runtime.cli import flag
from runtime.device import DTYPES
from runtime.output import publish, writable, write_whole
from runtime.sources import TINY, UserError
from sae import save_gemmascope

ROOT = Path(__file__).resolve().parents[1]
SHARDS = 6
WORDS = "kettle water boils because limescale gathers in it vinegar removes that"


@dataclass(frozen=True)
class Settings:
    shape: str = flag("gemma-2-2b", "size of model and SAE", ("mid", "gemma-2-2b"))
    folder: str = flag("runs/first-step", "for the random weights, the pair and the run")
    tokens: int = flag(1969, "of the pair, its prompt counted once")
    samples: int = flag(1, "prompts answered before and after the step, as in train.py")
    dtype: str = flag("bfloat16", "as in train.py", DTYPES)
    seed: int = flag(0, "seed of the weights")

    def __post_init__(self):
        cli.at_least(self, 64, "tokens", most=2048)
        cli.at_least(self, 0, "samples", "seed")


# --- what a user would have downloaded ------------------------------------------------------------


def make_model(folder: Path, config: Gemma2Config, seed: int) -> None:
    """Random bfloat16 weights, a shard in memory at a time, and the small world's tokenizer."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Gemma2(config).state_dict().items()}
    g = torch.Generator().manual_seed(seed)
    names, files = list(shapes), {}
    with publish(folder) as part:
        each = math.ceil(len(names) / SHARDS)
        for number in range(SHARDS):
            held = {}
            for name in names[number * each : (number + 1) * each]:
                held[name] = torch.zeros(shapes[name], dtype=torch.bfloat16)
                if len(shapes[name]) > 1:
                    held[name].normal_(std=config.initializer_range, generator=g)
            file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
            save_file(held, part / file)
            files |= dict.fromkeys(held, file)
        index = json.dumps(dict(metadata={}, weight_map=files))
        (part / "model.safetensors.index.json").write_text(index)
        config.to_json(part / "config.json", torch.bfloat16)
        shutil.copy(TINY / "model" / "tokenizer.json", part)


def make_sae(path: Path, d: int, width: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(width, d, generator=g), dim=1)
    vectors = dict(b_enc=torch.zeros(width), b_dec=torch.zeros(d), threshold=torch.ones(width))
    save_gemmascope(path, dict(W_enc=W_dec.T, W_dec=W_dec, **vectors))


def make_pair(path: Path, tokenizer: Tokenizer, tokens: int) -> None:
    """One pair of so many tokens: a fifth of the words ask, the others answer twice."""
    draw = random.Random(0)
    words = draw.choices(WORDS.split(), k=tokens)
    few, many = 0, tokens
    while many - few > 1:  # a word is one token or several
        n = (few + many) // 2
        a, b = n // 5, 3 * n // 5
        row = dict(prompt=words[:a], chosen=words[a:b], rejected=words[b:n])
        row = {column: " ".join(some) for column, some in row.items()}
        write_whole(path, json.dumps(row) + "\n")
        (pair,) = load_pairs(path, tokenizer)
        few, many = (n, many) if pair.tokens <= tokens else (few, n)


# --- the run, from outside ------------------------------------------------------------------------


def peak(pid: int) -> int:
    """Bytes of resident memory that a process had at most so far; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("VmHWM")), 0)


def watched(command: list[str], out: Path) -> dict:
    started, opened, at_step, most = time.time(), None, None, 0
    with open(out.parent / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            most = max(most, peak(process.pid))
            if opened is None and (out / "metrics.jsonl").exists():
                opened = time.time() - started
            if at_step is None and opened and (out / "metrics.jsonl").stat().st_size:
                at_step = time.time() - started, most
            time.sleep(0.05)
    if process.returncode or at_step is None:
        raise UserError(f"train.py ended with exit code {process.returncode}; see {log.name}.")
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return dict(
        tokens=row["tokens"],
        seconds_until_open=opened,
        seconds_until_step=at_step[0] - row["seconds"],
        seconds_step=row["seconds"],
        seconds_whole=time.time() - started,
        peak_bytes_step=at_step[1],
        peak_bytes=most,
    )


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    config, width, layer = SHAPES[s.shape]
    folder = writable(Path(s.folder), "folder").absolute()
    model, pair = folder / s.shape, folder / f"pair-{s.tokens}.jsonl"
    sae = folder / f"{s.shape}-sae.npz"
    if not model.exists():
        make_model(model, config, s.seed)
    if not sae.exists():
        make_sae(sae, config.hidden_size, width, s.seed)
    make_pair(pair, Tokenizer.from_file(str(model / "tokenizer.json")), s.tokens)
    out = folder / "run"
    if out.exists():
        shutil.rmtree(out)
    flags = dict(model=model, sae=sae, data=pair, layer=layer, dtype=s.dtype, samples=s.samples)
    flags |= {"batch-size": 1, "max-steps": 1, "out": out, "device": "cpu"}
    command = [sys.executable, "train.py"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    found = watched(command, out)
    print(json.dumps(dict(shape=s.shape, dtype=s.dtype, threads=torch.get_num_threads()) | found))


if __name__ == "__main__":
    cli.run(main)
