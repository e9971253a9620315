"""A run to start or a run to read, opened: model, SAE, adapter, tokenizer and pairs.

Every script but train.py takes --run OUT and reads it through open_policy; train.py starts from
new_policy.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import data
import sae as saes
from data import Packed, Pair
from fsrl import ADAPTER_FILES, Adapter, SteeredModel, Unsteered
from kernels.cache import Cache
from model import Gemma2, Plan
from runtime import ranks
from runtime.device import Device, resolve_device
from runtime.folder import code_revision
from runtime.messages import brief
from runtime.output import replacing, writable
from runtime.ranks import Ranks
from runtime.sources import UserError, fetch, local, read_json, sha256, split_revision


class Recorded(NamedTuple):
    """What of a run's settings reading it needs. The defaults are those of train.py."""

    model: str = "google/gemma-2-2b-it"
    sae: str = "google/gemma-scope-2b-pt-res"
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
TINY = dict(sae="tiny", data="tiny", layer=2)  # what --model tiny changes of them


class Stream(NamedTuple):
    """A micro-batch of pairs on its way through the model."""

    pairs: list[int]  # which
    packed: Packed
    plan: Plan
    x: Tensor  # [T, d], the residual stream below the adapter


class Policy(NamedTuple):
    model: SteeredModel | Unsteered
    tokenizer: Tokenizer
    device: Device
    run: Recorded
    name: str  # what was opened, for titles
    folder: Path | None = None  # the run's, where its evaluations go; None for a base model alone

    @property
    def base(self) -> Gemma2:
        """The frozen model; of a full fine-tuning run, the trained one."""
        return self.model.model

    @property
    def steered(self) -> SteeredModel:
        """Raises UserError where there is no adapter."""
        if isinstance(self.model, Unsteered):
            raise UserError(f"--run {self.name}: has no adapter, so nothing is steered in it.")
        return self.model

    def autocast(self) -> AbstractContextManager:
        return self.device.autocast()

    def streams(self, pairs: list[Pair], what: str | None = None) -> Iterator[Stream]:
        """Walk pairs a micro-batch at a time. what: shown with the progress; None: none is shown.

        The caller enters autocast for its own products; the stream x is computed under it here.
        """
        steered = self.steered
        with tqdm(total=len(pairs), desc=what, unit="pair", leave=False, disable=not what) as bar:
            for indices in data.microbatches(pairs, self.run.tokens_per_microbatch):
                packed = data.pack_pairs([pairs[i] for i in indices]).to(self.device.name)
                with self.autocast():
                    plan = self.base.plan(packed)
                    x = steered.residual(packed, plan)
                yield Stream(indices, packed, plan, x)
                bar.update(len(indices))

    def eval_pairs(
        self, source: str | None = None, limit: int | None = None, split: str = "test"
    ) -> tuple[list[Pair], str]:
        """The pairs of `source`, or of the run's evaluation data, and the name of where they are.

        A source given for the purpose need not call its rows a test split: without one, all of it
        is used. Raises UserError where there is nothing to evaluate on.
        """
        given = source or (self.run.eval_data if split == "test" else None)
        name = given or self.run.data
        pairs = read_pairs(name, self.tokenizer, self.run, split)
        if not pairs and given:
            pairs = read_pairs(name, self.tokenizer, self.run, None)
        if not pairs:
            raise UserError(f"--data {name}: has no {split} split; name the data to evaluate on.")
        return pairs[:limit], split_revision(name)[0]


# --- a run to start -------------------------------------------------------------------------------


def load_base(model: str | Path, dtype: torch.dtype, device: str) -> tuple[Gemma2, Tokenizer]:
    """Raises UserError where the two do not belong together."""
    base = Gemma2.from_pretrained(model, dtype, device)
    tokenizer = data.load_tokenizer(base.folder)
    if tokenizer.get_vocab_size(with_added_tokens=True) > base.config.vocab_size:
        more = "its tokenizer knows more tokens than its embedding has rows"
        raise UserError(f"--model {model}: {more}.")
    return base, tokenizer


def load_sae(run: Recorded, device: Device) -> saes.JumpReLUSAE:
    sae_id = run.sae_id or saes.default_id(run.sae, run.layer)
    return saes.JumpReLUSAE.from_pretrained(run.sae, sae_id, device.dtype, device.name)


def new_policy(
    run: Recorded,
    device: Device,
    full: bool = False,
    kind: str = "relu",
    init_adapter: str | None = None,
    mask_features: str | None = None,
    seed: int = 0,
) -> Policy:
    """A fresh adapter, or the one of init_adapter, on a frozen model; with full a model whose own
    weights train.

    mask_features: a json file of features that never steer.
    """
    base, tokenizer = load_base(run.model, torch.float32 if full else device.dtype, device.name)
    if full:
        base.recompute = True
        return Policy(Unsteered(base.requires_grad_(True)), tokenizer, device, run, run.model)

    sae = load_sae(run, device)
    if init_adapter:
        adapter = Adapter.from_pretrained(init_adapter, kind)
    else:
        adapter = Adapter(base.config.hidden_size, sae.d_sae, kind)
        adapter.init_weights(torch.Generator().manual_seed(seed))
    if mask_features:
        adapter.silence(read_features(mask_features, sae.d_sae))
    steered = SteeredModel(base, sae, adapter.to(device.name), run.layer)
    return Policy(steered, tokenizer, device, run, run.model)


def identity(policy: Policy) -> dict:
    """What an adapter file says about where it belongs."""
    steered, run = policy.steered, policy.run
    return dict(
        base_model=split_revision(run.model)[0],
        base_model_revision=steered.model.revision,
        layer=run.layer,
        sae=split_revision(run.sae)[0],
        sae_id=steered.sae.sae_id,
        sae_revision=steered.sae.revision,
        sae_sha256=steered.sae.sha256,
    )


@torch.no_grad()
def greedy(
    policy: Policy, prompt: list[int], most: int, tick: Callable[[], object] = lambda: None
) -> str:
    """The likeliest answer to a prompt that ends after a user turn (Pair.prompt).

    most: tokens at most. tick: called after each. The plain loop; generation/ has batches, sampling
    and chat.
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
    source: str, tokenizer: Tokenizer, run: Recorded, split: str | None, progress: bool = True
) -> list[Pair]:
    limits = run.max_length, run.max_prompt_length
    return data.load_pairs(source, tokenizer, *limits, split, progress, run.on_bad_row)


class Preferences(NamedTuple):
    pairs: list[Pair]
    eval_pairs: list[Pair]  # empty where there is no evaluation data
    files: list[data.DataFile]  # that both came from
    revision: str | None  # commit of a Hub dataset


def load_preferences(run: Recorded, tokenizer: Tokenizer, progress: bool = True) -> Preferences:
    """Training and evaluation pairs. A branch on the Hub is resolved once, so that both come from
    one commit.
    """
    files, commit = data.data_files(run.data)
    pinned = f"{split_revision(run.data)[0]}@{commit}" if commit else run.data
    pairs = read_pairs(pinned, tokenizer, run, "train", progress)
    if run.eval_data is None:
        eval_pairs = read_pairs(pinned, tokenizer, run, "test", progress)
    else:  # what is given for evaluation need not call itself a test split
        files += data.data_files(run.eval_data)[0]
        eval_pairs = read_pairs(run.eval_data, tokenizer, run, "test", progress)
        eval_pairs = eval_pairs or read_pairs(run.eval_data, tokenizer, run, None, progress)
        if not eval_pairs:
            raise UserError(f"--eval-data {run.eval_data}: holds no pair to evaluate on.")
    return Preferences(pairs, eval_pairs, files, commit)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("tokenizer.model", "chat_template.jinja", "generation_config.json")


def save(out: Path, policy: Policy, who: Ranks) -> None:
    """OUT/adapter, or of a full run OUT/model: float32 weights and the tokenizer's files.

    Whole or not at all; every process calls it. Raises UserError where the disk refuses.
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
            for path in policy.base.folder.iterdir():
                if path.name in TOKENIZER_FILES:
                    shutil.copyfile(path, part / path.name)


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
    """Open what train.py left (OUT, with adapter/ or model/), an adapter folder (ours or the
    authors'), or its Hub id.

    None as run is the base model alone. model, sae and sae_id stand in for the names that the run
    recorded, for when those have moved. Raises UserError where something is missing or does not fit
    together.
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

    if (folder / "metrics.jsonl").is_file() and not (
        folder / "adapter" / ADAPTER_FILES[0][0]
    ).is_file():
        raise UserError(f"--run {run}: has not finished; train.py goes on with it by --resume.")
    adapter = Adapter.from_pretrained(folder)
    recorded = _with_identity(recorded, adapter.identity)
    if model:
        recorded = recorded._replace(model=model)
    if sae:
        recorded = recorded._replace(sae=sae, sae_id=sae_id)
    base, tokenizer = load_base(recorded.model, where.dtype, where.name)
    steered = SteeredModel(base, load_sae(recorded, where), adapter.to(where.name), recorded.layer)
    return Policy(steered.requires_grad_(False), tokenizer, where, recorded, str(run), folder)


def _recorded(path: Path) -> Recorded:
    """The settings in a run's config.json; the defaults where there is none (a bare adapter
    folder).
    """
    if not path.is_file():
        return DEFAULTS
    try:
        config = read_json(path)
        settings = config.get("settings", {})  # without them it is an adapter's or a model's own
        kept = {name: settings[name] for name in Recorded._fields if name in settings}
        for name, kind in get_type_hints(Recorded).items():
            kind = float | int if kind is float else kind
            if not isinstance(kept.get(name, getattr(DEFAULTS, name)), kind):
                raise ValueError(f"{name} is {kept[name]!r}")
        commits = dict(data=config.get("data_revision"))
        # Runs of an earlier version named revisions apart.
        commits |= dict(model=settings.get("model_revision"), sae=settings.get("sae_revision"))
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not the config.json of a run ({brief(e)}).") from e
    for name, commit in commits.items():
        if commit and name in kept:
            kept[name] = _pinned(kept[name], commit, name)
    return DEFAULTS._replace(**kept)


def _with_identity(recorded: Recorded, identity: dict) -> Recorded:
    """What an adapter file says about where it belongs goes before what the run's settings say."""
    layer = saes.layer_of(identity.get("sae_id"))  # the authors' files state it only so
    layer = recorded.layer if layer is None else layer
    if identity.get("layer") is not None:
        layer = identity["layer"]
    return recorded._replace(
        layer=layer,
        model=_pinned(
            identity.get("base_model") or recorded.model,
            identity.get("base_model_revision"),
            "model",
        ),
        sae=_pinned(identity.get("sae") or recorded.sae, identity.get("sae_revision"), "sae"),
        sae_id=identity.get("sae_id") or recorded.sae_id,
    )


def _pinned(name: str, commit: str | None, kind: str) -> str:
    """owner/name -> owner/name@commit; a local path as it is."""
    if commit is None or local(name, kind) is not None:
        return name
    return f"{split_revision(name)[0]}@{commit}"


# --- an evaluation of a run -----------------------------------------------------------------------


def out_folder(run: str, out: str | None) -> Path:
    """Where an evaluation writes: --out, or the folder that --run names (a Hub id names none).

    Raises UserError, before any work, where it could not be written.
    """
    if out:
        return writable(Path(out))
    if not Path(run).is_dir():
        raise UserError(
            f"--run {run}: no such folder; for a Hub id, --out must say where the results go."
        )
    return writable(Path(run), "run")


def described_run(policy: Policy, source: str, pairs: list[Pair], labels: list[dict]) -> dict:
    """What was evaluated on what, for a table's `about`. labels: of each file, labels.described."""
    sae = policy.steered.sae
    return dict(
        run=policy.name,
        adapter_sha256=adapter_sha256(policy.folder),
        data=source,
        pairs=len(pairs),
        base_model=policy.run.model,
        layer=policy.steered.layer,
        d_sae=sae.d_sae,
        sae=sae.source,
        sae_id=sae.sae_id,
        sae_sha256=sae.sha256,
        dtype=policy.device.dtype_name,
        labels=labels,
        code=code_revision(),
    )


def adapter_sha256(folder: Path | None) -> str | None:
    """Of the weights in an adapter's or a run's folder; None where it holds none."""
    names = [weights for _, weights in ADAPTER_FILES]
    folders = (folder / "adapter", folder) if folder else ()
    places = [place / name for place in folders for name in names]
    return next((sha256(path) for path in places if path.is_file()), None)
