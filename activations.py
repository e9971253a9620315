"""Residual streams on disk: what lies below the adapter never changes, so it need be computed only once.

One file per (model, layer, pairs, dtype), named by their hash, shared by epochs, runs and sweeps: the stream
after block `layer` for every token of a list of pairs, packed order, pair after pair, [tokens, d] without a header,
memory-mapped when read.
"""

import hashlib
import os
import shutil
import sys
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
from data import Pair
from fsrl import SteeredModel
from runtime.sources import UserError, sha256

FORMAT = "1"  # raise when the forward or the layout changes, so that old files are not used


class Activations:
    """x of any of the pairs it was made for: Activations.open(...)([3, 17]) -> [tokens of pairs 3 and 17, d]."""

    def __init__(self, path: Path, pairs: list[Pair], d: int, dtype: torch.dtype):
        self.ends = list(accumulate(pair.tokens for pair in pairs))
        stored = torch.from_file(str(path), shared=False, size=self.ends[-1] * d, dtype=dtype)
        self.stored = stored.view(-1, d)

    def __call__(self, indices: list[int]) -> Tensor:
        """Streams of the pairs at `indices`, one after the other as data.pack_pairs lays them: float32 [T, d]."""
        rows = [self.stored[self.ends[i - 1] if i else 0 : self.ends[i]] for i in indices]
        return torch.cat(rows).float()

    @classmethod
    def open(cls, folder: str, steered: SteeredModel, pairs: list[Pair], s) -> "Activations":
        """Map the file of these pairs, writing it first where it is missing. s: train.Settings.

        Prints the size before anything is written; raises UserError when the disk has no room for it.
        """
        dtype, d = getattr(torch, s.dtype), steered.model.config.hidden_size
        weights = [sha256(path) for path in sorted(steered.model.folder.glob("*.safetensors"))]
        key = hashlib.sha256(
            repr((FORMAT, weights, steered.model.config, steered.layer, s.dtype)).encode()
        )
        for pair in pairs:
            key.update(repr(tuple(pair)).encode())
        path = Path(folder) / f"layer{steered.layer}-{key.hexdigest()[:32]}.bin"
        size = sum(pair.tokens for pair in pairs) * d * dtype.itemsize
        if not (path.exists() and path.stat().st_size == size):
            try:
                _write(path, size, steered, pairs, s)
            except OSError as e:
                raise UserError(f"--cache-activations {folder}: cannot be written ({e}).") from e
        return cls(path, pairs, d, dtype)


@torch.inference_mode()
def _write(path: Path, size: int, steered: SteeredModel, pairs: list[Pair], s) -> None:
    """Fill the file under another name and rename it, so that an interrupted pass leaves nothing to be believed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    tokens = sum(pair.tokens for pair in pairs)
    print(
        f"Writing {size / 1e9:.2f} GB of activations ({tokens:,} tokens) to {path}.",
        file=sys.stderr,
    )
    if size > free:
        raise UserError(
            f"--cache-activations {path.parent}: {size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free."
        )
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with (
            open(part, "wb") as file,
            tqdm(total=tokens, desc="activations", unit="token", leave=False) as bar,
        ):
            for group in _in_order(pairs, s.tokens_per_microbatch):
                packed = data.pack_pairs(group).to(s.device)
                x = steered.residual(packed, steered.model.plan(packed)).to(getattr(torch, s.dtype))
                file.write(x.cpu().view(torch.uint8).numpy())
                bar.update(len(x))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _in_order(pairs: list[Pair], tokens: int):
    """Runs of consecutive pairs of at most `tokens` tokens, or of one pair."""
    group, filled = [], 0
    for pair in pairs:
        if group and filled + pair.tokens > tokens:
            yield group
            group, filled = [], 0
        group.append(pair)
        filled += pair.tokens
    yield group
