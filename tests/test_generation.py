"""Cached generation against transformers and against the uncached forward; sampling; the script as a user runs it."""

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT, load, script

import data
from generation import cache as kvcache
from generation import chat as generate
from generation import decode as decoding
from generation.decode import GREEDY, Sampling, choose
from model import Gemma2
from packed import pack
from runtime import ranks as distributed
from runtime.sources import UserError
from tiny import LABELS_DIR, MODEL_DIR

WARM = Sampling(1.5, top_k=50, seed=3)  # greedy, the random golden model would repeat one token


def never(new):
    return False


def prompts(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 512, (n,), generator=g).tolist() for n in lengths]


def uncached(model, prompt, n, sampling):
    """Tokens by running the whole sequence again for each."""
    sequence, g = list(prompt), torch.Generator().manual_seed(sampling.seed)
    for _ in range(n):
        logits = model.logits(torch.tensor(sequence))[-1:]
        sequence.append(
            int(choose(logits, sampling, torch.rand(1, dtype=torch.float64, generator=g)))
        )
    return sequence[len(prompt) :]


@pytest.mark.parametrize("name", ["golden", "tiny"])
def test_greedy_tokens_equal_transformers_beyond_the_sliding_window(name):
    """Ragged prompts together, in float32. The golden model, random, soon repeats itself; the tiny one writes text."""
    rows = json.loads((GOLDEN / "generate.json").read_text())[name]
    model = load().model if name == "golden" else Gemma2.from_pretrained("tiny")
    expected = [row["new"] for row in rows]
    assert (
        decoding.generate(model, [row["prompt"] for row in rows], len(expected[0]), never)
        == expected
    )
    assert len(expected[0]) >= 2 * model.config.sliding_window
    assert name == "golden" or min(len(set(new)) for new in expected) > 20


def test_greedy_tokens_equal_transformers_directly():
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not a dependency; compared when there"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, dtype=torch.float32, attn_implementation="eager"
    )
    g = torch.Generator().manual_seed(5)
    model, mine = (
        Gemma2.from_pretrained("tiny"),
        [torch.randint(4, 2048, (n,), generator=g).tolist() for n in (3, 41)],
    )
    for prompt, new in zip(mine, decoding.generate(model, mine, 40, never), strict=True):
        ids = torch.tensor([prompt])
        more = dict(
            max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **more)
        assert out[0, len(prompt) :].tolist() == new


@pytest.mark.parametrize("which", ["model", "steered"])
def test_cached_logits_equal_uncached_ones(which, monkeypatch):
    """Ragged prompts together, over the window and past a growing cache, float32."""
    monkeypatch.setattr(decoding, "ROOM", 8)
    seen = []

    def watching(logits, *args):
        seen.append(logits)
        return choose(logits, *args)

    monkeypatch.setattr(decoding, "choose", watching)
    model, mine = getattr(load(), which), prompts(1, 37, 5, 20)
    new = decoding.generate(model, mine, 40, never, WARM)
    for i, prompt in enumerate(mine):
        whole = model.logits(torch.tensor(prompt + new[i][:-1]))[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.stack([step[i] for step in seen]), whole, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("which", ["model", "steered"])
def test_generation_equals_uncached_token_for_token(which):
    model, mine = getattr(load(torch.float64), which), prompts(2, 33, 11)
    new = decoding.generate(model, mine, 30, never, WARM)
    assert new == [uncached(model, prompt, 30, WARM) for prompt in mine]
    assert len({*new[0]}) > 15
    if which == "steered":
        assert new != decoding.generate(load(torch.float64).model, mine, 30, never, WARM)


def test_prompts_that_end_leave_the_others_alone():
    """Rows leave the cache at different times; among them the longest prompt, which the others are aligned to."""
    steered, mine = load(torch.float64).steered, prompts(50, 3, 17, 29, seed=3)
    alone = [decoding.generate(steered, [prompt], 40, never, WARM)[0] for prompt in mine]
    stops = {alone[0][4], alone[2][20]}
    together = decoding.generate(steered, mine, 40, lambda new: new[-1] in stops, WARM)
    for new, whole in zip(together, alone, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), 39)
        assert new == whole[: end + 1]
    assert len({len(new) for new in together}) > 1


def test_several_forwards_of_prompts_fill_one_cache(monkeypatch):
    steered, mine = load(torch.float64).steered, prompts(9, 30, 4, 22)
    whole = decoding.generate(steered, mine, 20, never, WARM)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 35)
    assert decoding.generate(steered, mine, 20, never, WARM) == whole


def test_bfloat16_runs_and_stays_finite(monkeypatch):
    seen = []
    monkeypatch.setattr(
        decoding, "choose", lambda logits, *args: seen.append(logits) or choose(logits, *args)
    )
    new = decoding.generate(load(torch.bfloat16).steered, prompts(3, 40), 30, never)
    assert [len(n) for n in new] == [30, 30]
    assert all(step.isfinite().all() and step.dtype == torch.float32 for step in seen)


def test_generation_ends_where_the_models_positions_do():
    model = load().model
    longest = model.config.max_position_embeddings
    (new,) = decoding.generate(model, prompts(longest - 3), 10, never)
    assert len(new) == 3
    for wrong in ([], [4] * longest):
        with pytest.raises(UserError, match="Prompt 0"):
            decoding.generate(model, [wrong], 10, never)


def test_watch_sees_every_position_once_with_the_v_of_one_long_forward():
    golden, mine = load(torch.float64), prompts(6, 31)
    seen = {0: [], 1: []}

    def watch(owners, v):
        for owner, row in zip(owners, v, strict=True):
            seen[owner].append(row)

    end = decoding.generate(golden.steered, mine, 20, never, WARM)[1][7]
    new = decoding.generate(golden.steered, mine, 20, lambda n: n[-1] == end, WARM, watch=watch)
    assert len(new[1]) < 20
    for i, prompt in enumerate(mine):
        packed = pack([(prompt + new[i], [])])
        v = golden.adapter(golden.steered.residual(packed, golden.model.plan(packed)))
        torch.testing.assert_close(torch.stack(seen[i]), v, atol=1e-9, rtol=1e-9)


def test_scale_0_is_the_base_model_and_a_changed_v_the_changed_model():
    golden, mine = load(torch.float64), prompts(6, 31)
    base = decoding.generate(golden.model, mine, 25, never, WARM)
    assert decoding.generate(golden.steered, mine, 25, never, WARM, change=lambda v: v * 0) == base
    halved = load(torch.float64)
    with torch.no_grad():
        halved.adapter.weight.mul_(0.5), halved.adapter.bias.mul_(0.5)
    expected = decoding.generate(halved.steered, mine, 25, never, WARM)
    assert (
        decoding.generate(golden.steered, mine, 25, never, WARM, change=lambda v: v * 0.5)
        == expected
        != base
    )


def test_a_few_rows_give_what_many_give_with_gradients():
    """A step's shortcuts: thin products, RMSNorm in one operation, and W_dec only where v is not 0."""
    golden = load()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=g)
    steer, norm = golden.steered, golden.model.model.layers[2].input_layernorm
    sparse = torch.randn(64, 256, generator=g) * (torch.rand(256, generator=g) < 0.1)
    with torch.no_grad():
        for f in (
            golden.adapter,
            norm,
            golden.model.head,
            lambda rows: steer.add(rows, sparse[: len(rows)]),
        ):
            for n in (1, 2, 3, 8, 15):
                torch.testing.assert_close(f(x[:n]), f(x)[:n], atol=2e-5, rtol=1e-5)
    v = torch.zeros(3, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(steer.add(x[:3], v).sum(), v)
    torch.testing.assert_close(gradient, golden.sae.W_dec.sum(1).expand(3, 256))


# --- sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "s", [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.6), Sampling(2.0, 40, 0.8)]
)
def test_choose_is_the_inverse_cdf_of_the_restricted_distribution(s):
    """Against a plain loop in Python, for many draws on few tokens."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(50, generator=g) * 2
    p = (logits.double() / s.temperature).softmax(0).tolist()
    order = sorted(range(50), key=lambda i: -p[i])[: s.top_k or 50]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        if mass / total < s.top_p:
            kept.append(i)
        mass += p[i]
    draws = torch.rand(20_000, dtype=torch.float64, generator=g)
    picked = choose(logits.expand(20_000, 50), s, draws).bincount(minlength=50) / 20_000
    expected = torch.tensor([p[i] / sum(p[j] for j in kept) if i in kept else 0 for i in range(50)])
    assert ((picked > 0) <= (expected > 0)).all()
    assert (picked - expected).abs().max() < 0.015


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours():
    steered, mine = load(torch.float64).steered, prompts(12, 30, 5)
    together = decoding.generate(steered, mine, 25, never, WARM)
    assert together == [decoding.generate(steered, [prompt], 25, never, WARM)[0] for prompt in mine]
    assert together == decoding.generate(steered, mine[::-1], 25, never, WARM)[::-1]
    assert together != decoding.generate(steered, mine, 25, never, Sampling(1.5, top_k=50, seed=4))
    assert together != decoding.generate(steered, mine, 25, never, GREEDY)


def test_the_cache_grows_and_empty_slots_are_never_seen():
    cache = kvcache.Cache(1, [3, 1], 1, torch.device("cpu"))
    cache.prompts(pack([([1, 2, 3], []), ([4], [])]), 0)
    k = torch.tensor([[1.0, 0], [2, 0], [3, 0], [9, 0]])[:, None]
    cache.write(0, k, k)
    for step in range(5):
        assert cache.step().tolist() == [3 + step, 1 + step]
        cache.write(0, torch.full((2, 1, 2), 5.0), torch.full((2, 1, 2), 5.0))
    out = cache.attend(
        0, torch.zeros(2, 1, 2), None, 1.0, None
    )  # equal weights: means over what each may see
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([31 / 8, 34 / 6]))
    out = cache.attend(0, torch.zeros(2, 1, 2), 6, 1.0, None)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([28 / 6, 34 / 6]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_model_generates_and_goes_on_training(tmp_path, dtype):
    """As train.py's samples do under --shard: weights are DTensors, and with --full --dtype bfloat16 float32 ones."""
    prompt = prompts(3, 20, 1)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for name in ("model", "steered"):
            expected = decoding.generate(getattr(load(), name), prompt, 12, never)
            ours = getattr(load(), name)
            base, own = (ours, None) if name == "model" else (ours.model, ours.adapter)
            distributed.shard(ours, base.model.layers, own, "cpu", dtype)
            new = decoding.generate(ours, prompt, 12, never)
            assert len(new[0]) == 12 and (new == expected or dtype == torch.bfloat16)
            if own is not None:
                ours(pack([(prompt[0], [])])).l1.sum().backward()
                assert own.weight.grad.full_tensor().any()
    finally:
        torch.distributed.destroy_process_group()


# --- text ---------------------------------------------------------------------------------------------------


def test_streamed_pieces_join_to_the_decoded_text_and_never_split_a_character():
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    text = "né → 漢字 🙂 plain"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    shown = [generate.stable(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
    whole = tokenizer.decode(ids)
    assert shown[-1] == whole and all("\ufffd" not in piece for piece in shown)
    assert all(b.startswith(a) for a, b in itertools.pairwise(shown))
    assert len(set(shown)) < len(shown), "some token of this text is part of a character"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--top-k", "-2"], "--top-k -2"),
        (["--scale", "inf"], "--scale inf"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--trace", "nowhere/x.html"], "--trace nowhere/x.html"),
        (["--compare"], "--compare"),
    ],
)
def test_settings_that_mean_nothing_are_refused(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        generate.cli.parse(generate.Settings, ["--model", "tiny", *flags])


def test_unknown_features_and_categories_are_refused_naming_the_known(tiny_run):
    policy = generate.open_policy(str(tiny_run))
    labels = generate.load_labels(LABELS_DIR / "fires.jsonl", policy.steered.sae)

    def part(labels=labels, policy=policy, **flags):
        return generate.part(generate.Settings(run="x", **flags), policy, labels)

    assert part() is None
    v = torch.ones(1, 1024)
    style = torch.from_numpy(labels.categories["style"])
    torch.testing.assert_close(part(without="style")(v)[0], (~style).float())
    torch.testing.assert_close(
        part(only="style, 3", scale=2.0)(v)[0], 2.0 * (style | (torch.arange(1024) == 3))
    )
    for flags, message in (
        (dict(without="stile"), "alignment, chat, content, style"),
        (dict(only="1024"), "0 to 1023"),
        (dict(only="style", labels=None), "need --labels"),
        (dict(scale=0.5, policy=policy._replace(steered=None)), "--scale: .* has no adapter"),
    ):
        with pytest.raises(UserError, match=message):
            part(**flags)


def test_the_script_compares_traces_and_switches_a_category_off(
    tiny_run, tmp_path, monkeypatch, capsys
):
    (tmp_path / "questions.jsonl").write_text(
        json.dumps({"prompt": "Can you list some facts about marble <b>?"})
        + "\n"
        + json.dumps({"prompt": [{"role": "user", "content": "How does a kite change over time?"}]})
    )
    labels = LABELS_DIR / "fires.jsonl"
    common = (
        "-m",
        "generation",
        "--run",
        tiny_run,
        "--prompts",
        tmp_path / "questions.jsonl",
        "--max-new-tokens",
        24,
    )
    page, rows = tmp_path / "t.html", tmp_path / "t.jsonl"
    result = script(*common, "--compare", "--labels", labels, "--trace", page)
    assert result.returncode == 0, result.stderr
    assert (
        "--- base" in result.stdout and "--- steered" in result.stdout and "kite" in result.stdout
    )
    text = page.read_text()
    assert "fires on" in text and "<b>" not in text and "&lt;" in text and "<script" not in text

    said = []
    for flags in (
        ("", *common[2:], "--scale", 0, "--labels", labels, "--trace", rows),
        ("", "--model", "tiny", *common[4:]),
    ):
        monkeypatch.setattr(sys, "argv", [*map(str, flags)])
        generate.main()
        said.append(capsys.readouterr().out)
    off, base = said
    assert base == off and "kite" in base
    trace = list(map(json.loads, rows.read_text().splitlines()))
    assert {row["part"] for row in trace} == {"prompt", "answer"} and {
        row["prompt"] for row in trace
    } == {0, 1}
    assert all(row["l1"] == 0 and not row["features"] for row in trace)


def test_chat_answers_each_line_until_its_input_ends(tiny_run):
    command = [
        sys.executable,
        "-m",
        "generation",
        "--run",
        tiny_run,
        "--max-new-tokens",
        "8",
        "--trace",
        "-",
    ]
    talk = "How does a kite change over time?\n\nWhat is a pump for?\n"
    result = subprocess.run(
        command, cwd=ROOT, input=talk, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("features steered most") == 2


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "no prompt"}\n')
    result = script("-m", "generation", "--model", "tiny", "--prompts", tmp_path / "p.jsonl")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "p.jsonl row 0" in result.stderr and "prompt" in result.stderr
