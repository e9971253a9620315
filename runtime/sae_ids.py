"""Names of the published SAEs, on the Hub and on Neuronpedia.

    GemmaScope        layer_12/width_65k/average_l0_21           12-gemmascope-res-65k__l0-21
    Gemma Scope 2     resid_post/layer_12_width_65k_l0_medium    12-gemmascope-2-res-65k

Neuronpedia's id without `__l0-` means the GemmaScope SAE of one particular average L0 for each
block, by SAELens's table of published SAEs: `12-gemmascope-res-65k` is average_l0_72. Of Gemma
Scope 2, only the SAEs of medium L0 have pages.
"""

import re
from pathlib import Path
from typing import NamedTuple

from runtime.sources import UserError, list_files, local, split_revision

SAE_ID = re.compile(  # experiments/train_sae writes L0 as digits
    r"layer_(\d+)/width_(\w+)/average_l0_(\d+)"
    r"|resid_post(?:_all)?/layer_(\d+)_width_([^_]+)_l0_(small|medium|big|\d+)"
)
WEIGHTS = {False: "params.npz", True: "params.safetensors"}  # by whether it is of Gemma Scope 2
L0_NAMES = {"small": 20, "medium": 60, "big": 150}  # Gemma Scope 2's names -> approximate L0
PAPER_REPO = "google/gemma-scope-2b-pt-res"
PAPER_L0 = {6: 17, 12: 21, 18: 21, 24: 19}  # layer -> average L0 of the paper's SAE, of width 65k


class SAEName(NamedTuple):
    """What an SAE's id says of it."""

    layer: int
    width: str  # "65k"
    l0: str  # digits, or one of L0_NAMES
    second: bool  # whether the id is one of Gemma Scope 2


def parse(sae_id: str) -> SAEName | None:
    """The parts of a published SAE's id; None for any other."""
    m = SAE_ID.fullmatch(sae_id)
    if m is None:
        return None
    layer, width, l0 = filter(None, m.groups())  # of one of the two forms
    return SAEName(int(layer), width, l0, second=m[1] is None)


def layer_of(sae_id: str | None) -> int | None:
    """The block whose output a published SAE reads, by its id; None where the id does not say."""
    m = re.match(r"(?:resid_post(?:_all)?/)?layer_(\d+)[/_]", sae_id or "")
    return int(m[1]) if m else None


def only_id(folder: Path) -> str | None:
    """The id of the SAE in a folder that holds exactly one; otherwise None."""
    found = [path.parent for path in folder.glob("**/params.*")]
    return found[0].relative_to(folder).as_posix() if len(found) == 1 else None


# --- on the Hub -----------------------------------------------------------------------------------


def default_source(model: str) -> str:
    """The Hub repository of a published model's SAEs. Raises UserError where none is known."""
    name = split_revision(str(model))[0]
    if m := re.fullmatch(r"google/gemma-2-(2b|9b|27b)(-it)?", name):
        return f"google/gemma-scope-{m[1]}-pt-res"
    if m := re.fullmatch(r"google/gemma-3-(270m|1b|4b|12b|27b)(-it|-pt)?", name):
        return f"google/gemma-scope-2-{m[1]}{m[2] or '-pt'}"
    raise UserError(f"--model {model}: no SAE is published under its name; give --sae.")


def default_id(source: str | Path, layer: int, width: str | None = None) -> str | None:
    """The id of a layer's SAE of lowest average L0, which is the one that the paper uses.

    width: as in the names of the folders. None: 65k; in a local folder without a 65k SAE, any
    width. Returns None for a local path whose folders have other names. Raises UserError where the
    Hub repository holds none.
    """
    folder = local(source, "sae")
    if folder is not None:
        files = [path.relative_to(folder).as_posix() for path in folder.glob("**/params.*")]
        found = lowest_l0(files, layer, width or "65k")
        return found or (None if width else lowest_l0(files, layer, None))
    width = width or "65k"
    if source == PAPER_REPO and width == "65k" and layer in PAPER_L0:  # no need to ask the Hub
        return f"layer_{layer}/width_65k/average_l0_{PAPER_L0[layer]}"
    found = lowest_l0(list_files(source, "sae"), layer, width)
    if found is None:
        raise UserError(f"--layer {layer}: {source} holds no SAE of width {width}; give --sae-id.")
    return found


def lowest_l0(files: list[str], layer: int, width: str | None) -> str | None:
    """The folder of a layer's SAE of lowest L0 among a repository's files; None without any."""
    found = []
    for file in files:
        sae_id, _, name = file.rpartition("/")
        sae = parse(sae_id)
        if sae and (sae.layer, WEIGHTS[sae.second]) == (layer, name) and width in (None, sae.width):
            found.append((L0_NAMES.get(sae.l0) or int(sae.l0), sae_id))
    return min(found)[1] if found else None


# --- on Neuronpedia -------------------------------------------------------------------------------

SOURCE_ID = re.compile(r"(\d+)-gemmascope-(2-)?res-(\d+[km])(?:__l0-(\d+))?")
SIZES = ("270m", "1b", "4b", "12b", "27b")
MODEL_IDS = ["gemma-2-2b", "gemma-2-9b", *(f"gemma-3-{n}{it}" for n in SIZES for it in ("", "-it"))]
REPO = {model_id: default_source(f"google/{model_id}") for model_id in MODEL_IDS}
REPO["gemma-2-9b-it"] = "google/gemma-scope-9b-it-res"
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


def sae_of(model_id: str, source_id: str) -> tuple[str, str] | None:
    """("gemma-2-2b", "12-gemmascope-res-65k__l0-21") -> (Hub repository, SAE id); None: unknown."""
    m = SOURCE_ID.fullmatch(source_id)
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
    sae = parse(sae_id or "")
    model_id = next((i for i, known in REPO.items() if Path(known).name == Path(repo).name), None)
    if sae is None or model_id is None:
        return None
    plain = f"{sae.layer}-gemmascope-{'2-' * sae.second}res-{sae.width}"
    for source_id in (plain, f"{plain}__l0-{sae.l0}"):
        if sae_of(model_id, source_id) == (REPO[model_id], sae_id):
            return model_id, source_id
    return None
