"""Load everything that belongs to a policy: model, SAE, adapter, tokenizer and pairs.

train.py starts a run with new_policy. Every other script takes --run OUT and reads what train.py
has written there with open_policy.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch
from tokenizers import Tokenizer
from torch import Tensor

import data
from data import Packed, Pair
from fsrl import ADAPTER_FILES, Adapter, SteeredModel, Unsteered
from kernels.cache import Cache
from model import Gemma2, Plan
from runtime import ranks, sae_ids
from runtime.device import Device, resolve_device
from runtime.folder import finished
from runtime.messages import brief
from runtime.output import replacing
from runtime.progress import progress_bar
from runtime.ranks import Ranks
from runtime.rows import DataFile, data_files
from runtime.sources import UserError, fetch, local, read_json, sha256, split_revision
from sae import JumpReLUSAE


class Recorded(NamedTuple):
    """The settings of a run that are needed to open it again.

    The values here are those of train.py, and of a run whose config.json has none.
    """

    model: str = "google/gemma-2-2b-it"
    sae: str | None = "google/gemma-scope-2b-pt-res"  # None after --full without --sae
    sae_id: str | None = None
    layer: int = 12
    data: str = "princeton-nlp/llama3-ultrafeedback-armorm"
    eval_data: str | None = None
    beta: float = 10.0
    gamma_ratio: float = 0.5
    max_length: int = 2048
    max_prompt_length: int = 1800
    on_bad_row: str = "error"
    tokens_per_microbatch: int = 8192


DEFAULTS = Recorded()
TINY = dict(sae="tiny", data="tiny", layer=2)  # what --model tiny changes


class Stream(NamedTuple):
    """A micro-batch of pairs, computed as far as the adapter's layer."""

    pairs: list[int]  # which: indices into the list of pairs
    packed: Packed
    plan: Plan
    x: Tensor  # [T, d], the residual stream that the adapter reads


class Policy(NamedTuple):
    model: SteeredModel | Unsteered
    tokenizer: Tokenizer
    device: Device
    recorded: Recorded
    name: str  # for titles: the run, or the model of a run that starts
    folder: Path | None = None  # the run's folder; None for a base model and a run that starts

    @property
    def base(self) -> Gemma2:
        """The Gemma2 inside: frozen, or trained itself after --full."""
        return self.model.model

    @property
    def steered(self) -> SteeredModel:
        """The model, for callers that need an adapter. Raises UserError where there is none."""
        if isinstance(self.model, Unsteered):
            raise UserError(f"--run {self.name}: has no adapter, so nothing is steered in it.")
        return self.model

    def autocast(self) -> AbstractContextManager:
        return self.device.autocast()

    def streams(self, pairs: list[Pair], what: str | None = None) -> Iterator[Stream]:
        """Yield the pairs as packed micro-batches with the residual stream that the adapter reads.

        what: title of a progress bar; None: no bar. x is computed under autocast here; callers
        enter autocast again for what they compute from it.
        """
        steered = self.steered
        how = dict(total=len(pairs), desc=what, unit="pair", leave=False, shown=bool(what))
        with progress_bar(**how) as bar:
            for indices in data.microbatches(pairs, self.recorded.tokens_per_microbatch):
                packed = data.pack_pairs([pairs[i] for i in indices]).to(self.device.name)
                with self.autocast():
                    plan = self.base.plan(packed)
                    x = steered.residual(packed, plan)
                yield Stream(indices, packed, plan, x)
                bar.update(len(indices))

    def eval_pairs(
        self, source: str | None = None, limit: int | None = None, split: str = "test"
    ) -> tuple[list[Pair], str]:
        """(pairs, name of the data set): of `source`, or else of the run's own evaluation data.

        Raises UserError where there are no pairs.
        """
        given = source or (self.recorded.eval_data if split == "test" else None)
        name = given or self.recorded.data
        read = split_or_all if given else read_pairs
        pairs = read(name, self.tokenizer, self.recorded, split)
        if not pairs:
            raise UserError(f"--data {name}: has no {split} split; name the data to evaluate on.")
        return pairs[:limit], _repo(name, "dataset")


# --- a run to start -------------------------------------------------------------------------------


def load_base(model: str | Path, dtype: torch.dtype, device: str) -> tuple[Gemma2, Tokenizer]:
    """The frozen model and its tokenizer. Raises UserError where they do not fit each other."""
    base = Gemma2.from_pretrained(model, dtype, device)
    tokenizer = data.load_tokenizer(base.folder)
    if tokenizer.get_vocab_size(with_added_tokens=True) > base.config.vocab_size:
        more = "its tokenizer knows more tokens than its embedding has rows"
        raise UserError(f"--model {model}: {more}.")
    return base, tokenizer


def load_sae(recorded: Recorded, device: Device) -> JumpReLUSAE:
    """The run's SAE; without a recorded id, the layer's by sae_ids.default_id."""
    sae_id = recorded.sae_id or sae_ids.default_id(recorded.sae, recorded.layer)
    return JumpReLUSAE.from_pretrained(recorded.sae, sae_id, device.dtype, device.name)


def new_policy(
    recorded: Recorded,
    device: Device,
    full: bool = False,
    kind: str = "relu",
    init_adapter: str | None = None,
    mask_features: str | None = None,
    seed: int = 0,
) -> Policy:
    """The policy that a run starts from: a frozen model with a fresh adapter of a kind.

    init_adapter: take this adapter instead. mask_features: json file of features that never steer.
    full: no adapter; all weights of the model train. seed: of the fresh adapter's weights.
    """
    dtype = torch.float32 if full else device.dtype
    base, tokenizer = load_base(recorded.model, dtype, device.name)
    if full:
        base.recompute = True
        model = Unsteered(base.requires_grad_(True))
        return Policy(model, tokenizer, device, recorded, recorded.model)

    sae = load_sae(recorded, device)
    if init_adapter:
        adapter = Adapter.from_pretrained(init_adapter, kind)
    else:
        adapter = Adapter(base.config.hidden_size, sae.d_sae, kind)
        adapter.init_weights(torch.Generator().manual_seed(seed))
    if mask_features:
        adapter.silence(read_features(mask_features, sae.d_sae))
    steered = SteeredModel(base, sae, adapter.to(device.name), recorded.layer)
    return Policy(steered, tokenizer, device, recorded, recorded.model)


def identity(policy: Policy) -> dict:
    """Which model, layer and SAE an adapter belongs to, as adapter_config.json states it."""
    steered, recorded = policy.steered, policy.recorded
    return dict(
        base_model=_repo(recorded.model, "model"),
        base_model_revision=steered.model.revision,
        layer=recorded.layer,
        sae=_repo(recorded.sae, "sae"),
        sae_id=steered.sae.sae_id,
        sae_revision=steered.sae.revision,
        sae_sha256=steered.sae.sha256,
    )


@torch.no_grad()
def greedy(
    policy: Policy, prompt: list[int], most: int, tick: Callable[[], object] = lambda: None
) -> str:
    """Answer a prompt (Pair.prompt) by taking the likeliest token each time.

    most: limit on the answer's tokens. tick: called after each token. generation/ does the same in
    batches, with sampling and chat.
    """
    model, base, tokenizer = policy.model, policy.base, policy.tokenizer
    stops = tokenizer.token_to_id("<end_of_turn>"), tokenizer.token_to_id("<eos>")
    tokens, new = [*prompt, *data.header_ids(tokenizer)], []
    room = min(most, base.config.max_position_embeddings - len(tokens))
    cache = Cache([len(tokens)], most, base.device)
    packed = data.pack([(tokens, [])]).to(base.device)
    attend = cache.prefill(packed.tree, packed.position, 0, base.attend(packed))
    while len(new) < room:
        last = model.states(packed, attend).hidden[-1:]  # [1, d]
        new.append(int(base.head(last).argmax()))
        tick()
        if new[-1] in stops:
            break
        position, attend = cache.step()
        packed = data.Newest(torch.tensor(new[-1:], device=base.device), position)
    return tokenizer.decode(new)


def read_features(path: str, d_sae: int) -> list[int]:
    """A json list of feature indices. Raises UserError for anything else."""
    try:
        features = read_json(path, list)
    except (OSError, ValueError) as e:
        why = f"a json list of features was expected ({brief(e)})"
        raise UserError(f"--mask-features {path}: {why}.") from e
    if not all(type(k) is int and 0 <= k < d_sae for k in features):
        raise UserError(
            f"--mask-features {path}: a json list of numbers from 0 to {d_sae - 1} was expected."
        )
    return features


def read_pairs(
    source: str, tokenizer: Tokenizer, recorded: Recorded, split: str | None, progress: bool = True
) -> list[Pair]:
    """data.load_pairs with the run's settings."""
    limits = recorded.max_length, recorded.max_prompt_length
    return data.load_pairs(source, tokenizer, *limits, split, progress, recorded.on_bad_row)


def split_or_all(
    source: str, tokenizer: Tokenizer, recorded: Recorded, split: str, progress: bool = True
) -> list[Pair]:
    """The pairs of data that is named for one purpose: those of the split or, without any, all."""
    pairs = read_pairs(source, tokenizer, recorded, split, progress)
    return pairs or read_pairs(source, tokenizer, recorded, None, progress)


class Preferences(NamedTuple):
    pairs: list[Pair]
    eval_pairs: list[Pair]  # empty where there is no evaluation data
    files: list[DataFile]  # the files of both
    revision: str | None  # commit of --data, if it is on the Hub
    eval_revision: str | None  # commit of --eval-data, if it is given and on the Hub


def load_preferences(
    recorded: Recorded, tokenizer: Tokenizer, progress: bool = True
) -> Preferences:
    """Training and evaluation pairs. A branch on the Hub is resolved to one commit at the start."""
    given, eval_commit = recorded.eval_data, None
    files, commit = data_files(recorded.data)
    source = _pinned(recorded.data, commit, "data")
    pairs = read_pairs(source, tokenizer, recorded, "train", progress)
    if given is None:
        eval_pairs = read_pairs(source, tokenizer, recorded, "test", progress)
    else:
        eval_files, eval_commit = data_files(given)
        files += eval_files
        pinned = _pinned(given, eval_commit, "data")
        eval_pairs = split_or_all(pinned, tokenizer, recorded, "test", progress)
        if not eval_pairs:
            raise UserError(f"--eval-data {given}: holds no pair to evaluate on.")
    return Preferences(pairs, eval_pairs, files, commit, eval_commit)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("tokenizer.model", "chat_template.jinja", "generation_config.json")


def save(out: Path, policy: Policy, who: Ranks) -> None:
    """Write OUT/adapter, or after --full OUT/model with the tokenizer's files; weights in float32.

    Every process must call it. After a failure nothing has changed. Raises UserError where the
    folder cannot be written.
    """
    if not isinstance(policy.model, Unsteered):
        with ranks.whole(policy.model.adapter):
            if who.first:
                policy.model.adapter.save_pretrained(out / "adapter", identity(policy))
        return

    state = ranks.gather(policy.base, who)
    if who.first:
        with replacing(out / "model") as part:
            policy.base.save_pretrained(part, state)
            copy_tokenizer(policy, part)


def copy_tokenizer(policy: Policy, folder: Path) -> None:
    """Copy the base model's tokenizer files to a folder of weights for transformers.

    Without a generation_config.json it would end an answer at <eos> alone, which config.json names,
    and not at <end_of_turn>; a model that has none gets one.
    """
    for path in policy.base.folder.iterdir():
        if path.name in TOKENIZER_FILES:
            shutil.copyfile(path, folder / path.name)
    path, stop = folder / "generation_config.json", policy.tokenizer.token_to_id("<end_of_turn>")
    if stop is not None and not path.exists():
        ids = dict(bos_token_id=2, eos_token_id=[1, stop], pad_token_id=0)  # as in config.json
        path.write_text(json.dumps(ids, indent=2) + "\n")


# --- a run to read --------------------------------------------------------------------------------


def open_policy(
    run: str | None,
    model: str | None = None,
    sae: str | None = None,
    sae_id: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tokens_per_microbatch: int = DEFAULTS.tokens_per_microbatch,
) -> Policy:
    """Open a run's folder, an adapter folder (ours or the authors'), or the Hub id of either.

    run: None opens the base model alone. model, sae, sae_id: where these are now, if no longer
    where the run recorded them. Raises UserError for anything missing, and for a model, SAE and
    adapter that do not fit each other.
    """
    where = resolve_device(device, dtype)
    if run is None:
        own = TINY if model == "tiny" else {}
        recorded = DEFAULTS._replace(**own, model=model or DEFAULTS.model)
        recorded = recorded._replace(tokens_per_microbatch=tokens_per_microbatch)
        base, tokenizer = load_base(recorded.model, where.dtype, where.name)
        return Policy(Unsteered(base), tokenizer, where, recorded, recorded.model)

    names = [name for files in ADAPTER_FILES for name in files]
    patterns = ["config.json", *names, *(f"adapter/{name}" for name in names), "model/*"]
    folder = fetch(run, "run", patterns).path
    recorded = _recorded(folder / "config.json")._replace(
        tokens_per_microbatch=tokens_per_microbatch
    )
    if (folder / "model" / "config.json").is_file():
        base, tokenizer = load_base(folder / "model", where.dtype, where.name)
        return Policy(Unsteered(base), tokenizer, where, recorded, str(run), folder)

    if (folder / "metrics.jsonl").is_file() and not finished(folder):
        raise UserError(f"--run {run}: has not finished; train.py goes on with it by --resume.")
    adapter = Adapter.from_pretrained(folder)
    recorded = _with_identity(recorded, adapter.identity)
    if model:
        recorded = recorded._replace(model=model)
    if sae:
        place = local(sae, "sae")
        inside = place is None or (place / str(recorded.sae_id)).is_dir()
        recorded = recorded._replace(sae=sae, sae_id=recorded.sae_id if inside else None)
    if sae_id:
        recorded = recorded._replace(sae_id=sae_id)
    base, tokenizer = load_base(recorded.model, where.dtype, where.name)
    steered = SteeredModel(base, load_sae(recorded, where), adapter.to(where.name), recorded.layer)
    return Policy(steered.requires_grad_(False), tokenizer, where, recorded, str(run), folder)


def _recorded(path: Path) -> Recorded:
    """The settings in a run's config.json; the defaults where there is no such file."""
    if not path.is_file():
        return DEFAULTS
    try:
        config = read_json(path)
        settings = config.get("settings", {})  # the config.json of a model has none
        kept = {name: settings[name] for name in Recorded._fields if name in settings}
        for name, kind in get_type_hints(Recorded).items():
            kind = float | int if kind is float else kind
            if not isinstance(kept.get(name, getattr(DEFAULTS, name)), kind):
                raise ValueError(f"{name} is {kept[name]!r}")
        commits = {name: config.get(f"{name}_revision") for name in ("data", "eval_data")}
        # Runs of an earlier version have the commits of model and SAE in settings of their own.
        commits |= dict(model=settings.get("model_revision"), sae=settings.get("sae_revision"))
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not the config.json of a run ({brief(e)}).") from e
    for name, commit in commits.items():
        if commit and name in kept:
            kept[name] = _pinned(kept[name], commit, name.removeprefix("eval_"))
    return DEFAULTS._replace(**kept)


def _with_identity(recorded: Recorded, identity: dict) -> Recorded:
    """The settings, with those replaced that the adapter's own file states."""
    layer = identity.get("layer")
    if layer is None:  # the authors' files state it in the SAE's id alone
        layer = sae_ids.layer_of(identity.get("sae_id"))
    model = identity.get("base_model") or recorded.model
    sae = identity.get("sae") or recorded.sae
    return recorded._replace(
        layer=recorded.layer if layer is None else layer,
        model=_pinned(model, identity.get("base_model_revision"), "model"),
        sae=_pinned(sae, identity.get("sae_revision"), "sae"),
        sae_id=identity.get("sae_id") or recorded.sae_id,
    )


def _repo(name: str, kind: str) -> str:
    """owner/name@revision -> owner/name; a local path stays as it is."""
    return split_revision(name)[0] if local(name, kind) is None else name


def _pinned(name: str, commit: str | None, kind: str) -> str:
    """owner/name -> owner/name@commit; a local path stays as it is."""
    if commit is None or local(name, kind) is not None:
        return name
    return f"{split_revision(name)[0]}@{commit}"


def adapter_sha256(folder: Path | None) -> str | None:
    """Of the weights in an adapter's or a run's folder; None where it holds none."""
    names = [weights for _, weights in ADAPTER_FILES]
    folders = (folder / "adapter", folder) if folder else ()
    places = [place / name for place in folders for name in names]
    return next((sha256(path) for path in places if path.is_file()), None)
