"""The embedded default: a small world of text, a small Gemma-2 that speaks it, and a JumpReLU SAE
inside it.

    python -m tiny.build            # write every file below, in under 30 minutes on 2 cores
    python -m tiny.build --check    # measure what is on disk

The names of the built files live here, once; `train.py --model tiny` and the tests read them from
here.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODEL_ID = "fsrl-tiny"  # the modelId of the label files
LAYER = 2  # the SAE reads the output of block 2: of six blocks, three lie below it, three above
WIDTH = 1024  # features
SAE_ID = "layer_2/width_1k/average_l0_8"

MODEL_DIR = ROOT / "model"  # Hugging Face layout
SAE_DIR = ROOT / "sae"  # GemmaScope layout: SAE_DIR / SAE_ID / params.npz
DATA_DIR = ROOT / "data"  # train-… and test-….parquet, columns prompt_id, prompt, chosen, rejected
LABELS_DIR = ROOT / "labels"  # fires.jsonl, promotes.jsonl
