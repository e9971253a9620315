"""Cached generation against transformers and against the uncached forward; sampling; the script as
a user runs it."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, ROOT, load, script

import data
from data import pack
from fsrl import Unsteered
from generation import chat, decode
from generation.decode import GREEDY, Sampling, choose
from kernels.cache import Cache
from labels import load_labels
from model import Gemma2
from policy import DEFAULTS, Policy, greedy, open_policy
from runtime import cli, ranks
from runtime.device import resolve_device
from runtime.sources import UserError
from tiny import LABELS_DIR, MODEL_DIR

WARM = Sampling(1.5, top_k=50, seed=3)  # greedy, the random golden model would repeat one token


def never(new):
    return False


def golden(which, dtype=torch.float32):
    """The golden model, "base" or "steered"."""
    loaded = load(dtype)
    return loaded.steered if which == "steered" else Unsteered(loaded.model)


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
    """Ragged prompts together, in float32. The golden model, random, soon repeats itself; the tiny
    one writes text."""
    rows = json.loads((GOLDEN / "generate.json").read_text())[name]
    model = golden("base") if name == "golden" else Unsteered(Gemma2.from_pretrained("tiny"))
    expected = [row["new"] for row in rows]
    assert (
        decode.generate(model, [row["prompt"] for row in rows], len(expected[0]), never) == expected
    )
    assert len(expected[0]) >= 2 * model.model.config.sliding_window
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
        Unsteered(Gemma2.from_pretrained("tiny")),
        [torch.randint(4, 2048, (n,), generator=g).tolist() for n in (3, 41)],
    )
    for prompt, new in zip(mine, decode.generate(model, mine, 40, never), strict=True):
        ids = torch.tensor([prompt])
        more = dict(
            max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **more)
        assert out[0, len(prompt) :].tolist() == new


@pytest.mark.parametrize("which", ["base", "steered"])
def test_cached_logits_equal_uncached_ones(which, monkeypatch):
    """Ragged prompts together, over the window and past a growing cache, float32."""
    monkeypatch.setattr(decode, "ROOM", 8)
    seen = []

    def watching(logits, *args):
        seen.append(logits)
        return choose(logits, *args)

    monkeypatch.setattr(decode, "choose", watching)
    model, mine = golden(which), prompts(1, 37, 5, 20)
    new = decode.generate(model, mine, 40, never, WARM)
    for i, prompt in enumerate(mine):
        whole = model.logits(torch.tensor(prompt + new[i][:-1]))[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.stack([step[i] for step in seen]), whole, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("which", ["base", "steered"])
def test_generation_equals_uncached_token_for_token(which):
    model, mine = golden(which, torch.float64), prompts(2, 33, 11)
    new = decode.generate(model, mine, 30, never, WARM)
    assert new == [uncached(model, prompt, 30, WARM) for prompt in mine]
    assert len({*new[0]}) > 15
    if which == "steered":
        assert new != decode.generate(golden("base", torch.float64), mine, 30, never, WARM)


def test_prompts_that_end_leave_the_others_alone():
    """Rows leave the cache at different times; among them the longest prompt, which the others are
    aligned to."""
    steered, mine = golden("steered", torch.float64), prompts(50, 3, 17, 29, seed=3)
    alone = [decode.generate(steered, [prompt], 40, never, WARM)[0] for prompt in mine]
    stops = {alone[0][4], alone[2][20]}
    together = decode.generate(steered, mine, 40, lambda new: new[-1] in stops, WARM)
    for new, whole in zip(together, alone, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), 39)
        assert new == whole[: end + 1]
    assert len({len(new) for new in together}) > 1


def test_several_forwards_of_prompts_fill_one_cache(monkeypatch):
    steered, mine = golden("steered", torch.float64), prompts(9, 30, 4, 22)
    whole = decode.generate(steered, mine, 20, never, WARM)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 35)
    assert decode.generate(steered, mine, 20, never, WARM) == whole


def test_bfloat16_runs_and_stays_finite(monkeypatch):
    seen = []
    monkeypatch.setattr(
        decode, "choose", lambda logits, *args: seen.append(logits) or choose(logits, *args)
    )
    new = decode.generate(golden("steered", torch.bfloat16), prompts(3, 40), 30, never)
    assert [len(n) for n in new] == [30, 30]
    assert all(step.isfinite().all() and step.dtype == torch.float32 for step in seen)


def test_generation_ends_where_the_models_positions_do():
    model = golden("base")
    longest = model.model.config.max_position_embeddings
    (new,) = decode.generate(model, prompts(longest - 3), 10, never)
    assert len(new) == 3
    for wrong in ([], [4] * longest):
        with pytest.raises(UserError, match="Prompt 0"):
            decode.generate(model, [wrong], 10, never)


def test_watch_sees_every_position_once_with_the_v_of_one_long_forward():
    loaded, mine = load(torch.float64), prompts(6, 31)
    seen = {0: [], 1: []}

    def watch(owners, v):
        for owner, row in zip(owners, v, strict=True):
            seen[owner].append(row)

    end = decode.generate(loaded.steered, mine, 20, never, WARM)[1][7]
    new = decode.generate(loaded.steered, mine, 20, lambda n: n[-1] == end, WARM, watch=watch)
    assert len(new[1]) < 20
    for i, prompt in enumerate(mine):
        packed = pack([(prompt + new[i], [])])
        v = loaded.adapter(loaded.steered.residual(packed, loaded.model.plan(packed)))
        torch.testing.assert_close(torch.stack(seen[i]), v, atol=1e-9, rtol=1e-9)


def test_scale_0_is_the_base_model_and_a_changed_v_the_changed_model():
    loaded, mine = load(torch.float64), prompts(6, 31)
    base = decode.generate(Unsteered(loaded.model), mine, 25, never, WARM)
    assert decode.generate(loaded.steered, mine, 25, never, WARM, change=lambda v: v * 0) == base
    halved = load(torch.float64)
    with torch.no_grad():
        halved.adapter.weight.mul_(0.5), halved.adapter.bias.mul_(0.5)
    expected = decode.generate(halved.steered, mine, 25, never, WARM)
    assert (
        decode.generate(loaded.steered, mine, 25, never, WARM, change=lambda v: v * 0.5)
        == expected
        != base
    )


def test_a_few_rows_give_what_many_give_with_gradients():
    """A step's shortcuts: thin products, RMSNorm in one operation, and W_dec only where v is not
    0."""
    loaded = load()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=g)
    steer, norm = loaded.steered, loaded.model.model.layers[2].input_layernorm
    sparse = torch.randn(64, 256, generator=g) * (torch.rand(256, generator=g) < 0.1)
    with torch.no_grad():
        for f in (
            loaded.adapter,
            norm,
            loaded.model.head,
            lambda rows: steer.add(rows, sparse[: len(rows)]),
        ):
            for n in (1, 2, 3, 8, 15):
                torch.testing.assert_close(f(x[:n]), f(x)[:n], atol=2e-5, rtol=1e-5)
    v = torch.zeros(3, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(steer.add(x[:3], v).sum(), v)
    torch.testing.assert_close(gradient, loaded.sae.W_dec.sum(1).expand(3, 256))


# --- sampling -------------------------------------------------------------------------------------


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    for s in (Sampling(1e-310), Sampling(5e-324, top_k=5), Sampling(1e-310, top_p=0.5)):
        assert choose(logits, s, torch.full((8,), 0.5).double()).equal(logits.argmax(-1))


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
    steered, mine = golden("steered", torch.float64), prompts(12, 30, 5)
    together = decode.generate(steered, mine, 25, never, WARM)
    assert together == [decode.generate(steered, [prompt], 25, never, WARM)[0] for prompt in mine]
    assert together == decode.generate(steered, mine[::-1], 25, never, WARM)[::-1]
    assert together != decode.generate(steered, mine, 25, never, Sampling(1.5, top_k=50, seed=4))
    assert together != decode.generate(steered, mine, 25, never, GREEDY)


def test_the_cache_grows_and_empty_slots_are_never_seen():
    def block(window):
        return SimpleNamespace(index=0, window=window, scale=1.0, softcap=None)

    cache = Cache([3, 1], 1, "cpu")
    packed = pack([([1, 2, 3], []), ([4], [])])
    k = torch.tensor([[1.0, 0], [2, 0], [3, 0], [9, 0]])[:, None]  # [T, KV, hd]
    prefill = cache.prefill(packed.tree, packed.position, 0, lambda block, q, k, v: q)
    assert prefill(block(None), k, k, k) is k
    query, newest = torch.zeros(2, 1, 2), torch.full((2, 1, 2), 5.0)
    for step in range(5):
        position, attend = cache.step()
        assert position.tolist() == [3 + step, 1 + step]
        out = attend(block(None), query, newest, newest)
    # Equal weights: means over what each may see.
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([31 / 8, 34 / 6]))
    out = attend(block(6), query, newest, newest)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([28 / 6, 34 / 6]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_model_generates_and_goes_on_training(tmp_path, dtype):
    """As train.py's samples do under --shard: weights are DTensors, and with --full --dtype
    bfloat16 float32 ones."""
    prompt = prompts(3, 20, 1)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for which in ("base", "steered"):
            expected = decode.generate(golden(which), prompt, 12, never)
            ours = golden(which)
            own = ours.adapter if which == "steered" else None
            blocks = ours.model.model.layers
            ranks.shard(ours, blocks, own, "cpu", dtype)
            new = decode.generate(ours, prompt, 12, never)
            assert len(new[0]) == 12 and (new == expected or dtype == torch.bfloat16)
            if own is not None:
                ours(pack([(prompt[0], [])])).l1.sum().backward()
                assert own.weight.grad.full_tensor().any()
    finally:
        torch.distributed.destroy_process_group()


def test_training_samples_equal_these_tokens():
    """policy.greedy is the plain loop of one sequence."""
    steered = golden("steered")
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    (prompt,) = prompts(30)
    whole = [*prompt, *data.header_ids(tokenizer)]
    (new,) = decode.generate(steered, [whole], 24, decode.end_of_turn(tokenizer))
    policy = Policy(steered, tokenizer, resolve_device("cpu"), DEFAULTS, "golden")
    assert greedy(policy, prompt, 24) == tokenizer.decode(new)


# --- text -----------------------------------------------------------------------------------------


def test_streamed_pieces_join_to_the_decoded_text_and_never_split_a_character():
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    text = "né → 漢字 🙂 plain"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    shown = [chat.stable(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
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
        cli.parse(chat.Settings, ["--model", "tiny", *flags])


def test_unknown_features_and_categories_are_refused_naming_the_known(policy):
    labels = load_labels(LABELS_DIR / "fires.jsonl", policy.steered.sae)

    def part(labels=labels, policy=policy, **flags):
        return chat.part(chat.Settings(run="x", **flags), policy, labels)

    assert part() is None
    v = torch.ones(1, 1024)
    style = torch.from_numpy(labels.categories["style"])
    torch.testing.assert_close(part(without="style")(v)[0], (~style).float())
    torch.testing.assert_close(
        part(only="style, 3", scale=2.0)(v)[0], 2.0 * (style | (torch.arange(1024) == 3))
    )
    base = policy._replace(model=Unsteered(policy.base))
    for flags, message in (
        (dict(without="stile"), "alignment, chat, content, style"),
        (dict(only="1024"), "0 to 1023"),
        (dict(only="9" * 5000), "0 to 1023"),
        (dict(only="style", labels=None), "need --labels"),
        (dict(scale=0.5, policy=base), "--scale: .* has no adapter"),
    ):
        with pytest.raises(UserError, match=message):
            part(**flags)


@pytest.fixture(scope="module")
def policy(tiny_run):
    return open_policy(str(tiny_run))


@pytest.fixture
def say(policy, monkeypatch, capsys):
    """The script in this process, on models that were opened already: say(flags, stdin) -> what it
    prints."""
    opened = {str(policy.name): policy}

    def open_once(run, model=None, *args, **kwargs):
        name = str(run or model)
        if name not in opened:
            opened[name] = open_policy(run, model, *args, **kwargs)
        return opened[name]

    monkeypatch.setattr(chat, "open_policy", open_once)

    def run(*flags, stdin=None):
        monkeypatch.setattr(sys, "argv", ["generation", *map(str, flags)])
        text = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", text)
        try:
            cli.run(chat.main)
            code = 0
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return SimpleNamespace(out=out, err=err, code=code)

    return run


@pytest.fixture
def questions(tmp_path):
    facts = {"prompt": "Can you list some facts about marble <b>?"}
    kite = {"prompt": [{"role": "user", "content": "How does a kite change over time?"}]}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(facts) + "\n" + json.dumps(kite))
    return path


def test_the_script_compares_traces_and_switches_a_category_off(say, tiny_run, questions, tmp_path):
    labels = LABELS_DIR / "fires.jsonl"
    common = ("--prompts", questions, "--max-new-tokens", 24)
    page, rows = tmp_path / "t.html", tmp_path / "t.jsonl"
    result = say("--run", tiny_run, *common, "--compare", "--labels", labels, "--trace", page)
    assert result.code == 0, result.err
    assert "--- base" in result.out and "--- steered" in result.out and "kite" in result.out
    text = page.read_text()
    assert "fires on" in text and "<b>" not in text and "&lt;" in text and "<script" not in text

    off = say("--run", tiny_run, *common, "--scale", 0, "--labels", labels, "--trace", rows).out
    base = say("--model", "tiny", *common).out
    assert base == off and "kite" in base
    trace = list(map(json.loads, rows.read_text().splitlines()))
    assert {row["part"] for row in trace} == {"prompt", "answer"}
    assert {row["prompt"] for row in trace} == {0, 1}
    assert all(row["l1"] == 0 and not row["features"] for row in trace)


def test_a_trace_names_features_and_says_what_it_was_made_with(say, tiny_run, tmp_path):
    """Without --labels: the embedded world has labels of its own."""
    page = tmp_path / "t.html"
    flags = ("--run", tiny_run, "--prompt", "What is a kettle?", "--max-new-tokens", 8)
    flags += ("--without", "style", "--scale", 0.5)
    printed = say(*flags, "--trace", "-").out
    assert say(*flags, "--trace", page).code == 0
    for text in (printed, page.read_text()):
        assert re.search(r"fires on .* \(feature \d+\)", text)
        assert "what it does shows in the token after that" in text
        for setting in ("0.5", "style", "the likeliest", "tiny", "fires"):
            assert setting in text
    assert "https:" not in page.read_text() and "http:" not in page.read_text()


def test_a_trace_that_cannot_be_written_leaves_nothing(say, tiny_run, tmp_path, monkeypatch):
    page = tmp_path / "t.html"
    page.write_text("an earlier trace")
    flags = ("--run", tiny_run, "--prompt", "Why?", "--max-new-tokens", 2, "--trace", page)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chat.trace, "write_whole", full)
    result = say(*flags)
    assert result.code == 2 and f"--trace {page}: cannot be written (No space" in result.err
    assert page.read_text() == "an earlier trace" and list(tmp_path.iterdir()) == [page]


def test_several_answers_stream_in_order_and_none_is_mixed_with_another(say, tiny_run):
    prompts = ("What is a pump for?", "Why?", "How does a kite change over time?")
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    common = ("--run", tiny_run, "--max-new-tokens", 30)
    together = say(*common, *flags).out
    alone = [say(*common, "--prompt", prompt).out for prompt in prompts]
    blocks = [
        f"\n--- prompt\n{prompt}\n--- answer\n{out.removesuffix(chr(10))}"
        for prompt, out in zip(prompts, alone, strict=True)
    ]
    assert together == "".join(blocks) + "\n"
    assert say(*common, *flags, "--batch-size", 2).out == together


# --- chat, and what reaches it --------------------------------------------------------------------


def test_chat_answers_each_line_until_its_input_ends(say, tiny_run):
    talk = b"How does a kite change over time?\n\nWhat is a pump for?\n"
    result = say("--run", tiny_run, "--max-new-tokens", 8, "--trace", "-", stdin=talk)
    assert result.code == 0, result.err
    assert result.out.count("features steered most") == 2


def test_chat_marks_turns_when_piped_and_says_what_tiny_does_not_know(say, tiny_run):
    result = say("--run", tiny_run, "--max-new-tokens", 4, stdin=b"Why?\nHow?\n")
    marks = [line for line in result.out.splitlines() if line.startswith("---")]
    assert marks == ["--- prompt", "--- answer"] * 2
    assert result.out.index("Why?") < result.out.index("How?")
    assert result.err.count("no second turns") == 1


def test_control_characters_are_written_out(say, tiny_run, tmp_path):
    """What a model, a prompt or a label says must not move the terminal's cursor."""
    (tmp_path / "p.txt").write_text("clear \x1b[2J me\x07\n")
    for flags, stdin in (
        (("--prompts", tmp_path / "p.txt", "--prompt", "Why?"), None),
        (("--prompts", tmp_path / "p.txt", "--compare"), None),
        ((), b"clear \x1b[2J me\x07\n"),
    ):
        result = say("--run", tiny_run, "--max-new-tokens", 2, *flags, stdin=stdin)
        assert result.code == 0 and "\x1b" not in result.out and "\x07" not in result.out
        assert r"clear \x1b[2J me\x07" in result.out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b'{"text": "no prompt"}\n', "row 0: `prompt` must be text"),
        (b'{"prompt": "Why?"}\n{"prompt"\n', "row 1: not a line of json"),
        (b'{"prompt": "Why?"}\n[1, 2]\n', "row 1: a row must be a json object"),
        (b'{"prompt": [{"role": "judge", "content": "x"}]}\n', "row 0: unknown role"),
        (b'{"prompt": "\xff"}\n', "row 0: not a line of json"),
        (b'{"prompt": "\\ud800"}\n', "row 0: `prompt` holds half a character"),
        (b"", "holds no prompt"),
    ],
)
def test_a_bad_line_of_prompts_is_one_sentence_naming_the_row(say, tmp_path, rows, message):
    (tmp_path / "p.jsonl").write_bytes(rows)
    result = say("--model", "tiny", "--prompts", tmp_path / "p.jsonl")
    assert result.code == 2 and result.err.count("\n") == 1 and not result.out
    assert "p.jsonl" in result.err and message in result.err


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling", "long", "bytes", "suffix", "none"])
def test_a_prompts_file_that_is_none_is_one_sentence(say, tmp_path, kind):
    path = tmp_path / "p.txt"
    if kind == "fifo":
        os.mkfifo(path)  # opened, it would wait for a writer for ever
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere.txt")
    elif kind == "bytes":
        path.write_bytes(b"Why?\n\xff\n")
    elif kind == "long":
        path = tmp_path / f"{'x' * 300}.txt"
    elif kind == "suffix":
        path = tmp_path / "p.csv"
        path.write_text("Why?\n")
    result = say("--model", "tiny", "--prompts", path)
    assert result.code == 2 and result.err.count("\n") == 1 and "--prompts" in result.err


def test_stdin_that_is_no_text_is_one_sentence(say, tiny_run):
    result = say("--run", tiny_run, "--max-new-tokens", 2, stdin=b"\xff\xfe\n")
    assert result.code == 2 and "Traceback" not in result.err
    assert "stdin line 1: not UTF-8" in result.err


def test_a_closed_stdin_is_an_empty_one(say, tiny_run):
    closed, empty = (say("--run", tiny_run, stdin=stdin) for stdin in (None, b""))
    assert closed == empty and closed.code == 0 and not closed.out.strip()


def test_the_script_as_a_user_runs_it(tmp_path):
    """A mistake is one sentence and exit code 2; a reader that has read enough ends it quietly."""
    (tmp_path / "p.jsonl").write_text('{"text": "no prompt"}\n')
    result = script("-m", "generation", "--model", "tiny", "--prompts", tmp_path / "p.jsonl")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "p.jsonl row 0" in result.stderr and "prompt" in result.stderr

    read, write = os.pipe()
    os.close(read)
    flags = ("--model", "tiny", "--prompt", "Why?", "--max-new-tokens", "4")
    command = [sys.executable, "-m", "generation", *flags]
    closed = subprocess.run(
        command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert closed.returncode == 0 and not closed.stderr
