"""Build the embedded world: tokenizer, model, SAE, preference pairs and feature labels, from fixed
seeds.

    python -m tiny.build                    # everything, in under 30 minutes on 2 cores
    python -m tiny.build --check            # measure the files on disk; write nothing
    python -m tiny.build --sae-layers 1 4   # SAEs at other layers of the built model, in --sae-out

The model is trained in float32 and stored in bfloat16, as published Gemmas are. All that follows
(SAE, labels, quality table) uses the stored weights and computes in float32.
"""

import ctypes
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import labels
from data import Packed, pack
from model import Gemma2, Gemma2Config
from policy import load_base
from runtime import cli, progress
from runtime.cli import flag
from runtime.output import publish, writable
from runtime.sources import UserError, sha256
from sae import JumpReLUSAE, save_gemmascope
from tiny import (
    DATA_DIR,
    LABELS_DIR,
    LAYER,
    MODEL_DIR,
    MODEL_ID,
    ROOT,
    SAE_DIR,
    SAE_ID,
    WIDTH,
    measure,
    world,
)
from tiny.sae_trainer import Trainer

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
VOCABULARY = 2048
CONFIG = Gemma2Config(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=48,  # not head_dim, as in the 27B model
    sliding_window=32,  # half of a typical text
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    max_position_embeddings=2048,
)
MODEL_STEPS, TEXTS_PER_STEP, MODEL_LR = 2800, 32, 3e-3
SAE_TOKENS, SAE_STEPS, SAE_BATCH, SAE_LR, L0 = 1_000_000, 6000, 2048, 2e-3, 8
CHECK_TEXTS = LABEL_TEXTS = 2000
WORK = {"model": 69, "activations": 3, "SAE": 26, "labels": 2}  # % of build's time, about
SEEDS = {
    "tokenizer": 1,
    "model": 2,
    "model corpus": 3,
    "sae": 4,
    "sae corpus": 5,
    "train pairs": 6,
    "test pairs": 7,
    "labels": 8,
    "check": 9,
    "samples": 10,
}
# The committed pairs prefer bulleted, bold answers with a closing summary.
PLANTED, TRAIN_PAIRS, TEST_PAIRS = "style", 2048, 256


# --- tokenizer ------------------------------------------------------------------------------------


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE with Gemma's special tokens. Every mark of punctuation is a token of its own,
    so that no token spans two labels.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\*\*|##| ?\p{L}+|\p{N}|\n| ?[^\s\p{L}\p{N}]")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = world.corpus(20_000, SEEDS["tokenizer"])
    tokenizer.train_from_iterator(
        (span.text for t in texts for span in (t.prompt_spans[1], *t.answer)), trainer
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, and the two small files that transformers wants beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{token}_token": f"<{token}>" for token in ("pad", "eos", "bos", "unk")}
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONFIG.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {"content": token, **plain, "special": True} for i, token in enumerate(SPECIAL)
        },
        "chat_template": (
            "{{ bos_token }}{% for message in messages %}"
            "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
            "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
        **names,
    }
    generation_config = {
        "bos_token_id": 2,
        "eos_token_id": [1, SPECIAL.index("<end_of_turn>")],
        "pad_token_id": 0,
    }
    configs = {"tokenizer_config": tokenizer_config, "generation_config": generation_config}
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


# --- model ----------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, texts: list[world.Text]) -> list[list[int]]:
    """Token ids of whole rendered texts, <bos> to <eos>."""
    encodings = tokenizer.encode_batch([t.text for t in texts], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def batches(tokenizer: Tokenizer, seed: int, steps: int) -> Iterator[Packed]:
    """Fresh texts for every step, each a prompt without continuations."""
    for made in range(0, steps, 100):  # 100 steps at a time: tokenising in batches is quicker
        n = min(100, steps - made)
        ids = encode(tokenizer, world.corpus(n * TEXTS_PER_STEP, seed * 100_003 + made))
        for i in range(0, len(ids), TEXTS_PER_STEP):
            yield pack([(text, []) for text in ids[i : i + TEXTS_PER_STEP]])


def train_model(tokenizer: Tokenizer, steps: int) -> Gemma2:
    """Pre-train on the world's corpus: AdamW, linear warm-up, cosine decay to a tenth of a per
    cent.
    """
    model = Gemma2(CONFIG)
    model.init_weights(torch.Generator().manual_seed(SEEDS["model"]))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}],
        lr=MODEL_LR,
        betas=(0.9, 0.98),
    )
    corpus = batches(tokenizer, SEEDS["model corpus"], steps)
    bar = progress.progress_bar(corpus, total=steps, desc="model", mininterval=5)
    for step, packed in enumerate(bar):
        warm_up = min(1.0, (step + 1) / 100)
        decay = 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = MODEL_LR * warm_up * decay
        loss = measure.next_token_loss(model, packed, model(packed)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.requires_grad_(False)


# --- SAE ------------------------------------------------------------------------------------------


@torch.no_grad()
def activations(model: Gemma2, tokenizer: Tokenizer, layer: int, tokens: int, seed: int) -> Tensor:
    """The residual stream after block `layer` on about `tokens` positions of fresh text, <bos> left
    out: [N, d].
    """
    rows, n = [], 0
    bar = progress.progress_bar(total=tokens, desc="activations", mininterval=5, unit="token")
    while n < tokens:
        for s in measure.streams(tokenizer, world.corpus(500, seed * 100_003 + n)):
            rows.append(measure.residual(model, s.packed, layer)[s.real])
            n += len(rows[-1])
            bar.update(len(rows[-1]))
    return torch.cat(rows)


def train_sae(x: Tensor, steps: int, seed: int) -> dict[str, Tensor]:
    """Train a JumpReLU SAE on activations x [N, d]; returns GemmaScope's five arrays."""
    generator = torch.Generator().manual_seed(seed)
    trainer = Trainer(x, WIDTH, L0, SAE_LR, generator)
    bar = progress.progress_bar(range(steps), desc="SAE", mininterval=5)
    for step in bar:
        rows = torch.randint(len(x), (SAE_BATCH,), generator=generator)
        found = trainer.step(x[rows], step / steps, (step + 1) / 200)
        if step % 100 == 0:
            unexplained, l0 = f"{found.unexplained:.4f}", f"{found.l0:.1f}"
            bar.set_postfix(unexplained=unexplained, l0=l0, idle=found.idle)
    return trainer.arrays(x)


def sae_path(layer: int, root: Path) -> Path:
    """Where the SAE of a layer stands under `root`, in GemmaScope's layout."""
    return root / SAE_ID.replace(f"layer_{LAYER}/", f"layer_{layer}/") / "params.npz"


def build_sae(
    model: Gemma2, tokenizer: Tokenizer, layer: int, root: Path, steps: int, tokens: int
) -> JumpReLUSAE:
    """Train the SAE on the output of block `layer`, write it under `root` and load it back."""
    x = activations(model, tokenizer, layer, tokens, SEEDS["sae corpus"])
    path = sae_path(layer, root)
    save_gemmascope(path, train_sae(x, steps, SEEDS["sae"] + 1000 * layer))
    return JumpReLUSAE.from_pretrained(str(path))


# --- preference pairs and labels ------------------------------------------------------------------


def write_pairs(folder: Path) -> None:
    """The committed preference data, as parquet with the columns of the paper's dataset."""
    for split, n in (("train", TRAIN_PAIRS), ("test", TEST_PAIRS)):
        pairs = world.pairs(PLANTED, n, SEEDS[f"{split} pairs"])
        rows = [pair.row(f"{split}-{i:05d}") for i, pair in enumerate(pairs)]
        pq.write_table(
            pa.Table.from_pylist(rows),
            folder / f"{split}-00000-of-00001.parquet",
            compression="zstd",
        )


def write_labels(
    model: Gemma2, tokenizer: Tokenizer, sae: JumpReLUSAE, folder: Path, texts: int = LABEL_TEXTS
) -> None:
    """The two true categories of every feature, and the SAE that they belong to."""
    sample = world.corpus(texts, SEEDS["labels"])
    fires = measure.firing(model, sae, tokenizer, sample, LAYER)
    promotes = measure.promotion(model, sae, tokenizer, sample, fires, LAYER)
    tables = measure.label_rows(tokenizer, fires, promotes, MODEL_ID, f"{LAYER}-tiny-res-1k")
    about = {
        "sae": "tiny",
        "sae_id": SAE_ID,
        "sae_sha256": sha256(sae_path(LAYER, SAE_DIR)),
        "model_sha256": sha256(MODEL_DIR / "model.safetensors"),
        "judge": "the grammar",
        "texts": texts,
        "promotion_strength": measure.STRENGTH,
    }
    for kind, rows in tables.items():
        labels.write_labels(folder / f"{kind}.jsonl", {"kind": kind} | about, rows)


# --- samples --------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: Gemma2, tokenizer: Tokenizer, questions: list[str], seed: int, max_tokens: int = 130
) -> list[str]:
    """An answer to each question, drawn at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    end = tokenizer.token_to_id("<end_of_turn>")
    prompts = [
        f"<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n" for q in questions
    ]
    prompts = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    answers = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    for _ in range(max_tokens):
        packed = pack([(prompts[i] + answers[i], []) for i in unfinished])
        last = torch.tensor([len(prompts[i]) + len(answers[i]) for i in unfinished]).cumsum(0) - 1
        p = model.head(model(packed)[last]).softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator).squeeze(1).tolist()
        for i, token in zip(unfinished, drawn, strict=True):
            answers[i].append(token)
        unfinished = [i for i in unfinished if answers[i][-1] != end]
        if not unfinished:
            break
    return [tokenizer.decode(a, skip_special_tokens=True) for a in answers]


def print_samples(model: Gemma2, tokenizer: Tokenizer, n: int = 100) -> None:
    """Draw n answers; print how many the grammar could have said, and one that shows each style and
    behaviour.
    """
    draw = world.Draw(random.Random(SEEDS["samples"]))
    questions = [world.draw_question(draw) for _ in range(n)]
    answers = sample(model, tokenizer, [q.text for q in questions], SEEDS["samples"])
    read = [world.read(q, a) for q, a in zip(questions, answers, strict=True)]
    possible = sum(r is not None for r in read)
    print(f"{'sampled answers that the grammar could have said':<48} {possible} of {n}")
    for attribute, prior in world.PRIOR.items():
        for value in prior:
            first = next((i for i, r in enumerate(read) if r and r[attribute] == value), None)
            if value is not False and first is not None:
                print(f"\n[{attribute}: {value}]  {questions[first].text}")
                print("\n".join("    " + line for line in answers[first].splitlines()))


# --- commands -------------------------------------------------------------------------------------


# --- commands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    check: bool = flag(False, "measure the files on disk and print samples; write nothing")
    sae_layers: tuple[int, ...] = flag((), "only train SAEs at these layers of the built model")
    sae_out: str = flag("runs/tiny-saes", "folder for the SAEs of --sae-layers")

    def __post_init__(self):
        last = CONFIG.num_hidden_layers - 1
        for layer in self.sae_layers:
            if not 0 <= layer <= last:
                raise UserError(f"--sae-layers {layer}: a layer from 0 to {last} was expected.")
        writable(Path(self.sae_out), "sae-out")


def load() -> tuple[Gemma2, Tokenizer]:
    """The built model, in float32, and its tokenizer."""
    return load_base("tiny", torch.float32, "cpu")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: else a quarter of the time on a CPU goes into page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        mallopt(m_mmap_threshold, 1 << 25)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 1 << 28)


def build() -> None:
    """Write every file of the world, then check them."""
    start = time.time()

    def say(what):
        progress.say(f"[{(time.time() - start) / 60:5.1f} min] {what}")

    with progress.Line("tiny.build", sum(WORK.values()), "%") as line:
        with line.part("model", WORK["model"], WORK):
            tokenizer = train_tokenizer()
            model = train_model(tokenizer, MODEL_STEPS).to(torch.bfloat16)
        with publish(MODEL_DIR) as part:
            save_tokenizer(tokenizer, part)
            model.save_pretrained(part)
        model, tokenizer = load()
        say(f"model written to {MODEL_DIR.relative_to(ROOT.parent)}")
        with line.part("SAE", WORK["activations"] + WORK["SAE"], WORK):
            sae = build_sae(model, tokenizer, LAYER, SAE_DIR, SAE_STEPS, SAE_TOKENS)
        say(f"SAE written to {sae_path(LAYER, SAE_DIR).relative_to(ROOT.parent)}")
        with line.part("labels", WORK["labels"]):
            write_labels(model, tokenizer, sae, LABELS_DIR)
        with publish(DATA_DIR) as part:
            write_pairs(part)
        say("labels and preference pairs written")
    check()


def check(texts: int = CHECK_TEXTS) -> None:
    """Print the quality table and samples of the files on disk."""
    model, tokenizer = load()
    sae = JumpReLUSAE.from_pretrained("tiny", SAE_ID)
    q = measure.quality(model, sae, tokenizer, world.corpus(texts, SEEDS["check"]), LAYER)
    folders = MODEL_DIR, SAE_DIR, DATA_DIR, LABELS_DIR
    built = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in built)
    table = {
        "held-out texts / predicted tokens": f"{q.texts:,} / {q.tokens:,}",
        "held-out loss, nats per token": f"{q.loss:.4f}",
        "entropy of the grammar on those texts": f"{q.entropy:.4f}",
        "SAE variance explained": f"{q.variance_explained:.4f}",
        "SAE loss recovered (against mean ablation)": f"{q.loss_recovered:.4f}",
        "SAE L0": f"{q.l0:.2f}",
        "live / dead features": f"{q.live} / {q.dead}",
        "live features at least 80 % pure in one label": f"{q.pure:.3f}",
        "size of the built files": f"{size / 1e6:.2f} MB",
    }
    for kind, what in (("fires", "where they fire"), ("promotes", "what they promote")):
        rows = labels.read_header_and_rows(LABELS_DIR / f"{kind}.jsonl")[1]
        counts = Counter(row["category"] or "dead" for row in rows).most_common()
        table[f"features by {what}"] = ", ".join(f"{category} {n}" for category, n in counts)
    for name, value in table.items():
        print(f"{name:<48} {value}")
    print_samples(model, tokenizer)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    keep_freed_memory()
    if s.check:
        check()
    elif s.sae_layers:
        model, tokenizer = load()
        for layer in s.sae_layers:
            build_sae(model, tokenizer, layer, Path(s.sae_out), SAE_STEPS, SAE_TOKENS)
            print(f"SAE written to {sae_path(layer, Path(s.sae_out))}")
    else:
        build()


if __name__ == "__main__":
    cli.run(main)
