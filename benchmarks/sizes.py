"""The configurations of the published models, for models of their size with random weights."""

from model import Gemma2Config
from runtime.config_json import GEMMA3

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "head_dim", "query_pre_attn_scalar")


def _published(family: dict, *sizes: int) -> Gemma2Config:
    """sizes: the values of _SIZES."""
    return Gemma2Config(**family | dict(zip(_SIZES, sizes, strict=True)))


_GEMMA2 = dict(vocab_size=256_000)
_LARGE = GEMMA3 | dict(sliding_window=1024, rope_factor=8.0)
_SMALL = GEMMA3 | dict(sliding_window=512, vocab_size=262_144)
_SMALL |= dict(max_position_embeddings=32_768)
PUBLISHED = {  # google/gemma-2-{2b,9b,27b}[-it], google/gemma-3-{270m,1b,4b,12b,27b}-{pt,it}
    "gemma-2-2b": _published(_GEMMA2, 2304, 9216, 26, 8, 4, 256, 256),
    "gemma-2-9b": _published(_GEMMA2, 3584, 14336, 42, 16, 8, 256, 256),
    "gemma-2-27b": _published(_GEMMA2, 4608, 36864, 46, 32, 16, 128, 144),
    "gemma-3-270m": _published(_SMALL, 640, 2048, 18, 4, 1, 256, 256),
    "gemma-3-1b": _published(_SMALL, 1152, 6912, 26, 4, 1, 256, 256),
    "gemma-3-4b": _published(_LARGE, 2560, 10240, 34, 8, 4, 256, 256),
    "gemma-3-12b": _published(_LARGE, 3840, 15360, 48, 16, 8, 256, 256),
    "gemma-3-27b": _published(_LARGE, 5376, 21504, 62, 32, 16, 128, 168),
}
