"""Damaged and hostile files end in a sentence, never in a traceback or in memory.

A seeded fuzzer over every reader, FSRL_FUZZ inputs each (default 150).
"""

import io
import json
import os
import random
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SAE_ID
from safetensors.torch import load_file, save

import data
from fsrl import Adapter
from model import Gemma2, Gemma2Config
from runtime import checkpoint
from runtime.ranks import ALONE
from runtime.rows import decode_row, read_rows
from runtime.sources import UserError
from runtime.weights import read_npz
from sae import ARRAYS, JumpReLUSAE

BUDGET = int(os.environ.get("FSRL_FUZZ", "150"))


def mutate(whole: bytes, rng: random.Random) -> bytes:
    """Damage of the kinds that disks, networks and people do."""
    text = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(text) + 1)
        j = min(len(text), i + rng.choice((1, 1, 2, 8, 64, 1024)))
        kind = rng.randrange(7)
        if kind == 0:
            del text[i:]
        elif kind == 1:
            del text[i:j]
        elif kind == 2:
            text[i:j] = rng.randbytes(j - i)
        elif kind == 3:
            text[i:i] = text[i:j]
        elif kind == 4 and i < len(text):
            text[i] ^= 1 << rng.randrange(8)
        elif kind == 5:
            token = (
                b"null",
                b"-1",
                b"1e999",
                b"99999999999999999999",
                b'"',
                b"[",
                b"{}",
                b"\xff",
                b"\0",
                b"true",
            )
            text[i:j] = rng.choice(token)
        elif kind == 6:  # headers are where the interest is
            i = rng.randrange(min(len(text) + 1, 64))
            text[i : i + 1] = rng.randbytes(1)
    return bytes(text)


def files_of(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def rows() -> bytes:
    turn = [dict(role="user", content="<start_of_turn>q"), dict(role="assistant", content="a")]
    return b"".join(
        json.dumps(r).encode() + b"\n" for r in (dict(chosen=turn, rejected=turn), dict(a=1)) * 3
    )


def parquet() -> bytes:
    path = next(GOLDEN.glob("dataset/**/*.parquet"), None)
    if path is not None:
        return path.read_bytes()
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table(dict(prompt=["q"] * 9, chosen=["a"] * 9, rejected=["b"] * 9)), sink)
    return sink.getvalue()


def read_data(folder: Path):
    for name in ("rows.jsonl", "rows.parquet"):
        if (folder / name).exists():
            for where, row in read_rows(folder / name):
                data.parse_row(where, decode_row(where, row))


def small_model() -> dict[str, bytes]:
    names = ("config.json", "model.safetensors.index.json", "model-00001-of-00008.safetensors")
    return files_of(
        GOLDEN / "model", *(name for name in names if (GOLDEN / "model" / name).exists())
    )


def read_model(folder: Path):
    for path in (GOLDEN / "model").iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    Gemma2.from_pretrained(folder)


def small() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Linear(4, 3, bias=False)
    return module, torch.optim.AdamW(module.parameters())


def a_checkpoint() -> dict[str, bytes]:
    folder = Path(os.environ["FSRL_CACHE"]) / "checkpoints"
    if not folder.exists():
        checkpoint.save(folder, 1, *small(), ALONE)
    return {p.name: p.read_bytes() for p in (folder / "step-00000001").iterdir()}


def read_checkpoint(folder: Path):
    inner = folder / "checkpoints" / "step-00000001"
    inner.mkdir(parents=True)
    for path in folder.glob("*.*"):
        shutil.move(path, inner)
    checkpoint.newest(folder / "checkpoints", ALONE)
    checkpoint.load(inner, *small(), ALONE)  # also where the hashes were made to agree


NPZ = ("params.npz",)
READERS = {  # name -> files that are whole, and what reads them from a folder
    "npz": (
        lambda: files_of(GOLDEN / "sae" / SAE_ID, *NPZ),
        lambda f: JumpReLUSAE.from_pretrained(str(f)),
    ),
    "adapter": (
        lambda: files_of(
            GOLDEN / "adapter_mid", *(p.name for p in (GOLDEN / "adapter_mid").iterdir())
        ),
        Adapter.from_pretrained,
    ),
    "model": (small_model, read_model),
    "jsonl": (lambda: {"rows.jsonl": rows()}, read_data),
    "parquet": (lambda: {"rows.parquet": parquet()}, read_data),
    "tokenizer": (lambda: files_of(GOLDEN / "model", "tokenizer.json"), data.load_tokenizer),
    "checkpoint": (a_checkpoint, read_checkpoint),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path, name):
    make, read = READERS[name]
    whole, refused = make(), 0
    # The tokenizer's library takes a tenth of a second for a file.
    for seed in range(BUDGET if name != "tokenizer" else BUDGET // 10):
        rng, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        damaged = rng.choice([*whole])
        for file, content in whole.items():
            (folder / file).write_bytes(mutate(content, rng) if file == damaged else content)
        try:
            read(folder)
        except UserError as e:
            refused += 1
            assert str(e).strip() and len(" ".join(str(e).split())) < 2000
        shutil.rmtree(folder)
    assert refused > 0


# --- made to deceive ------------------------------------------------------------------------------


def npy(shape: str, body: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def npz(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


ZEROS = npy("(4096, 4096)", bytes(4 * 4096 * 4096))  # 64 MB that deflate to 64 kB
TINY = npy("(1,)", bytes(4))
BOMBS = {
    "deflated": {name: ZEROS if name == "W_enc" else TINY for name in ARRAYS},
    "a claim": {name: npy("(1000000000000,)") for name in ARRAYS},
    "a claim beyond numbers": {name: npy(f"({10**400},)") for name in ARRAYS},
    "claims that cancel": {
        n: npy("(1000000000000,)" if n == "W_enc" else "(-1000000000000,)") for n in ARRAYS
    },
    "a decoy of the same name": {n: ZEROS for n in ARRAYS} | {f"decoy/{n}": TINY for n in ARRAYS},
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_npz_bombs_are_refused_before_memory_is_taken(tmp_path, bomb):
    path = npz(tmp_path / "params.npz", BOMBS[bomb])
    tracemalloc.start()
    try:
        with pytest.raises(
            UserError
        ):  # the decoy: what was checked is what is read, and has another shape
            JumpReLUSAE({k: torch.as_tensor(v) for k, v in read_npz(path, ARRAYS).items()})
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


LIES = {
    "a header longer than the file": (10**12).to_bytes(8, "little") + b"{}",
    "data beyond the file": b'{"weight":{"dtype":"F32","shape":[1000000000],'
    b'"data_offsets":[0,4000000000]}}',
    "a shape of another size": b'{"weight":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}'
    + b"    ",
    "offsets that overlap": b'{"bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}    ',
    "a size that overflows": b'{"weight":{"dtype":"F32","shape":[4294967296,4294967296],'
    b'"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_headers_that_lie_are_refused(tmp_path, lie):
    folder = shutil.copytree(GOLDEN / "adapter_mid", tmp_path / "adapter")
    content = LIES[lie]
    if content.startswith(b"{"):
        header = content.rstrip(b" ")
        content = len(header).to_bytes(8, "little") + content
    (folder / "adapter_weights.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Adapter.from_pretrained(folder)


def test_nothing_is_unpickled(tmp_path):
    """A torch.save file, which is a pickle, in the place of each file of weights."""
    for make, read, name in (
        (*READERS["npz"], "params.npz"),
        (*READERS["adapter"], "adapter_weights.safetensors"),
        (*READERS["model"], "model-00001-of-00008.safetensors"),
        (*READERS["checkpoint"], next(n for n in a_checkpoint() if n.endswith(".safetensors"))),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in make().items():
            (folder / file).write_bytes(content)
        (folder / name).unlink()
        torch.save({"weight": Trap()}, folder / name)
        with pytest.raises(UserError):
            read(folder)
    assert not Trap.sprung


class Trap:
    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


ABSURD = (dict(num_hidden_layers=10**9), dict(hidden_size=2**60), dict(head_dim=3))
ABSURD += (dict(layer_types=7), dict(vocab_size="9"))


@pytest.mark.parametrize("changed", ABSURD)
def test_a_config_of_absurd_sizes_is_refused_at_once(tmp_path, changed):
    raw = json.loads((GOLDEN / "model/config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError):
        Gemma2Config.from_json(tmp_path / "config.json")


def test_json_nested_without_end_is_refused(tmp_path):
    for name, read in (
        ("fsrl_adapter_config.json", Adapter.from_pretrained),
        ("config.json", Gemma2.from_pretrained),
    ):
        (tmp_path / name).write_text("[" * 200_000)
        with pytest.raises(UserError):
            read(tmp_path)


@pytest.mark.parametrize("name", ["../params", "/etc/passwd", "a/../../b", "sub/x.safetensors"])
def test_no_path_leaves_its_folder(tmp_path, name):
    with pytest.raises(UserError):
        JumpReLUSAE.from_pretrained(str(tmp_path / "nothing"), name)
    folder = shutil.copytree(GOLDEN / "model", tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={"a": name})))
    (folder / "sub").mkdir()
    with pytest.raises(UserError):
        Gemma2.from_pretrained(folder)


# --- bad rows at scale ----------------------------------------------------------------------------


def test_bad_rows_are_left_out_counted_and_named(tmp_path, capsys):
    good = dict(prompt="q", chosen="a", rejected="b")
    bad = [b"{", b"\xff\xfe", b"[1]", b'{"chosen": "a"}', b"[" * 100_000]
    bad.append(b'{"prompt": 1, "chosen": "a", "rejected": "b"}')
    lines = [json.dumps(good).encode(), *bad] * 3
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    for _ in range(2):  # said again when the tokens come from the cache
        pairs = data.load_pairs(
            tmp_path / "rows.jsonl", tokenizer, progress=True, on_bad_row="skip"
        )
        said = capsys.readouterr().err.splitlines()[-1]
        assert len(pairs) == 3 and "18 malformed rows are left out: " in said
        assert said.endswith("rows.jsonl row 10, rows.jsonl row 11, ...."), said
    with pytest.raises(UserError, match="rows.jsonl row 1: not a line of json"):
        data.load_pairs(tmp_path / "rows.jsonl", tokenizer)
    assert len(np.unique([len(p.prompt) for p in pairs])) == 1


def test_safetensors_of_integers_or_of_other_names_are_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "adapter_mid", tmp_path / "adapter")
    (folder / "adapter_weights.safetensors").write_bytes(
        save({"weight": torch.zeros(2, 2), "extra": torch.zeros(2)})
    )
    with pytest.raises(UserError, match="weight"):
        Adapter.from_pretrained(folder)


# --- weights that cannot be computed with ---------------------------------------------------------


def copied(tmp_path, source: Path, name: str, change) -> Path:
    """A folder of weights with one file's tensors changed."""
    folder = shutil.copytree(source, tmp_path / "copy")
    state = load_file(folder / name)
    change(state)
    (folder / name).write_bytes(save(state))
    return folder


def poison(value: float, *names: str):
    def change(state):
        tensor = next(state[name] for name in names if name in state)
        tensor.view(-1)[7] = value

    return change


WEIGHTS = {  # what is read -> its folder, file, a tensor in it, and the reader
    "model": (
        GOLDEN / "model",
        "model-00001-of-00008.safetensors",
        "model.embed_tokens.weight",
        Gemma2.from_pretrained,
    ),
    "adapter": (
        GOLDEN / "adapter_mid",
        "adapter_weights.safetensors",
        "adapter_linear.weight",
        Adapter.from_pretrained,
    ),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_finite_are_refused_by_name_and_index(tmp_path, kind, value):
    source, file, tensor, read = WEIGHTS[kind]
    folder = copied(tmp_path, source, file, poison(value, tensor))
    with pytest.raises(UserError, match=rf"{file}: tensor {tensor} is -?(nan|inf) at \[0, 7\]"):
        read(folder)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_integers_are_refused(tmp_path, kind):
    source, file, tensor, read = WEIGHTS[kind]

    def change(state):
        state[tensor] = state[tensor].to(torch.int32)

    with pytest.raises(UserError, match=f"{tensor} holds int32"):
        read(copied(tmp_path, source, file, change))


@pytest.mark.parametrize("name", ARRAYS)
def test_an_sae_that_is_not_finite_is_refused(tmp_path, name):
    with np.load(GOLDEN / "sae" / SAE_ID / "params.npz") as npz:
        arrays = {key: npz[key].copy() for key in npz}
    arrays[name].reshape(-1)[3] = np.nan
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(UserError, match=f"params.npz: tensor {name} is nan at"):
        JumpReLUSAE.from_pretrained(tmp_path)
