"""Translate between Neuronpedia's source ids and the ids of SAEs.

A source id without `__l0-` means the SAE of one particular average L0 for each block, by SAELens's
table of published SAEs. The paper's SAEs, of lowest L0, have ids with that suffix: at layer 12,
`12-gemmascope-res-65k` is average_l0_72, and average_l0_21 is `12-gemmascope-res-65k__l0-21`.
Of Gemma Scope 2, only the SAEs of medium L0 have pages: `12-gemmascope-2-res-65k` is
resid_post/layer_12_width_65k_l0_medium.
"""

import re
from pathlib import Path

SOURCE = re.compile(r"(\d+)-gemmascope-(2-)?res-(\d+[km])(?:__l0-(\d+))?")
SAE_ID = re.compile(r"(?:resid_post/)?layer_(\d+)[/_]width_(\w+)[/_](?:average_)?l0_(\w+)")
REPO = {  # modelId -> Hub repository of its SAEs
    "gemma-2-2b": "google/gemma-scope-2b-pt-res",
    "gemma-2-9b": "google/gemma-scope-9b-pt-res",
    "gemma-2-9b-it": "google/gemma-scope-9b-it-res",
}
for size in ("270m", "1b", "4b", "12b", "27b"):
    REPO[f"gemma-3-{size}"] = f"google/gemma-scope-2-{size}-pt"
    REPO[f"gemma-3-{size}-it"] = f"google/gemma-scope-2-{size}-it"
# (modelId, width) -> average L0 of the id without suffix, for each block.
AVERAGE_L0 = {
    ("gemma-2-2b", "16k"): (
        "105 102 141 59 124 68 70 69 71 73 77 80 82 84 84 78 78 77 74 73 71 70 72 75 73 116"
    ),
    ("gemma-2-2b", "65k"): (
        "73 121 77 89 89 105 107 107 111 118 128 70 72 75 73 127 128 125 116 115 114 111 116 123 "
        "124 93"
    ),
    ("gemma-2-9b", "16k"): (
        "129 69 67 90 91 77 93 92 99 100 113 118 130 132 67 131 75 73 71 132 68 129 123 120 114 "
        "114 116 118 119 119 120 114 111 114 114 120 120 124 128 131 125 113"
    ),
    ("gemma-2-9b", "131k"): (
        "41 56 70 103 101 94 120 119 72 75 84 88 96 99 105 103 121 117 113 110 114 109 105 101 97 "
        "96 97 96 98 97 95 92 88 91 89 94 93 96 101 99 94 84"
    ),
}


def sae_of(model_id: str, source: str) -> tuple[str, str] | None:
    """("gemma-2-2b", "12-gemmascope-res-65k__l0-21") -> (Hub repository, SAE id); None: unknown."""
    m = SOURCE.fullmatch(source)
    if m is None or model_id not in REPO:
        return None
    layer, second, width, l0 = m.groups()
    if bool(second) != ("gemma-scope-2-" in REPO[model_id]):
        return None
    if second:
        return None if l0 else (REPO[model_id], f"resid_post/layer_{layer}_width_{width}_l0_medium")
    if l0 is None:
        known = AVERAGE_L0.get((model_id, width), "").split()
        if int(layer) >= len(known):
            return None
        l0 = known[int(layer)]
    return REPO[model_id], f"layer_{int(layer)}/width_{width}/average_l0_{l0}"


def page_of(repo: str, sae_id: str | None) -> tuple[str, str] | None:
    """(Hub repository or its copy, SAE id) -> (modelId, source id) of its pages; None: unknown."""
    m = SAE_ID.fullmatch(sae_id or "")
    model_id = next((i for i, known in REPO.items() if Path(known).name == Path(repo).name), None)
    if m is None or model_id is None:
        return None
    layer, width, l0 = m.groups()
    plain = f"{layer}-gemmascope-res-{width}"
    sources = (f"{layer}-gemmascope-2-res-{width}", plain, f"{plain}__l0-{l0}")
    named = (s for s in sources if sae_of(model_id, s) == (REPO[model_id], sae_id))
    source = next(named, None)
    return (model_id, source) if source else None
