"""Shared by all tests: the golden model, scripts run as subprocesses, a token cache of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"  # larger real data, where the checkout stands beside it
SAE_ID = "layer_1/width_256/average_l0_8"

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
        "train.py", "--model", "tiny", "--max-steps", 24, "--eval-every", 0, "--out", out
    )
    assert result.returncode == 0, result.stderr
    (out.parent / "stdout").write_text(result.stdout)
    return out


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
    from model import FULL, GEMMA3, SLIDING, Gemma2, Gemma2Config

    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=3)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8)
    own = dict(GEMMA3 | sizes | heads, layer_types=(SLIDING, FULL, SLIDING))
    model = Gemma2(Gemma2Config(**own, model_type="gemma3_text"))
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
