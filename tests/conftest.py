"""Shared by all tests: the golden model, scripts run as subprocesses, a token cache of ours."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # see train.py

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"  # larger real data, where the checkout stands beside it
SAE_ID = "layer_1/width_256/average_l0_8"
HOSTILE = "<script>alert('x')</script> & \"$x^{2$ \u202e"  # an explanation of a feature
# A short audit of the small world.
SMALL = ("--pairs", 12, "--bootstrap", 40, "--random-sets", 1, "--keep", 1, "--nodes", 2)
SMALL += ("--static-pairs", 16, "--coefficients", 1, 2, "--top-features", 4, 8)
SMALL += ("--shift-pairs", 4, "--prompts", 4, "--answer-tokens", 8, "--carrier-pairs", 2)

sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    os.environ["FSRL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="session")
def report() -> dict:
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A run on the small world, long enough for a sparse policy that lowers the loss."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    result = script(
        "train.py", "--model", "tiny", "--max-steps", 16, "--eval-every", 0, "--out", out
    )
    assert result.returncode == 0, result.stderr
    (out.parent / "stdout").write_text(result.stdout)
    return out


@pytest.fixture(scope="session")
def audited(tiny_run, tmp_path_factory) -> tuple[Path, tuple]:
    """A copy of the short run, audited with a label file that means harm, the usual promotion
    labels, and a person's judgements; and the flags that did it.
    """
    import labels
    import tiny

    folder = tmp_path_factory.mktemp("audit")
    out = shutil.copytree(tiny_run, folder / "run")
    _, rows = labels.read_header_and_rows(tiny.LABELS_DIR / "fires.jsonl")
    for row in rows:
        row["description"] = HOSTILE
    header = dict(kind="fires", sae="tiny", sae_id=tiny.SAE_ID, judge="<b>nobody</b>")
    labels.write_labels(folder / "hostile.jsonl", header, rows)
    human = [f"{k},style,{int(rows[k]['category'] == 'style')}" for k in range(60)]
    (folder / "human.csv").write_text("\n".join(["feature,category,label", *human]))
    files = (folder / "hostile.jsonl", tiny.LABELS_DIR / "promotes.jsonl")
    flags = ("--run", out, "--labels", *files, "--human", folder / "human.csv", *SMALL)
    audit(*flags)
    return out, flags


def audit(*flags) -> None:
    """python -m audit in this process."""
    command = importlib.import_module("audit.__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["audit", *map(str, flags)])
        command.main()


def load(dtype: torch.dtype = torch.float32, adapter: str = "mid") -> SimpleNamespace:
    """The golden model, SAE, adapter, and the steered model made of them."""
    from fsrl import Adapter, SteeredModel
    from model import Gemma2
    from sae import JumpReLUSAE

    model = Gemma2.from_pretrained(GOLDEN / "model", dtype)
    sae = JumpReLUSAE.from_pretrained(GOLDEN / "sae", SAE_ID, dtype)
    adapter = Adapter.from_pretrained(GOLDEN / f"adapter_{adapter}").to(dtype)
    return SimpleNamespace(
        model=model, sae=sae, adapter=adapter, steered=SteeredModel(model, sae, adapter, 1)
    )


def small_gemma3(folder: Path) -> None:
    """A random Gemma 3 of three blocks as wide as the golden SAE, with the golden tokenizer."""
    from model import FULL, SLIDING, Gemma2, Gemma2Config
    from runtime.config_json import GEMMA3

    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=3)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8)
    own = dict(GEMMA3 | sizes | heads, layer_types=(SLIDING, FULL, SLIDING))
    model = Gemma2(Gemma2Config(**own))
    model.init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    tokenizer = (GOLDEN / "model" / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(tokenizer)


def ragged(seed: int, trees: int = 4, longest: int = 40, vocabulary: int = 512) -> list:
    """Random prompts with 0 to 3 continuations of random lengths, empty continuations included."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    def tokens(n):
        return torch.randint(0, vocabulary, (n,), generator=g).tolist()

    return [
        (tokens(draw(1, longest)), [tokens(draw(0, longest)) for _ in range(draw(0, 3))])
        for _ in range(draw(1, trees))
    ]


def script(
    *arguments, env: dict | None = None, timeout: float = 240
) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user would."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def golden_run(out: Path, *arguments, **options) -> subprocess.CompletedProcess:
    """train.py on the golden model, with further flags."""
    g = GOLDEN
    where = (
        "--model",
        g / "model",
        "--sae",
        g / "sae",
        "--sae-id",
        SAE_ID,
        "--data",
        g / "dataset",
        "--layer",
        1,
    )
    return script("train.py", *where, "--batch-size", 4, "--out", out, *arguments, **options)


def metrics(out: Path, split: str = "train") -> list[dict]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == split]
