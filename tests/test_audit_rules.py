"""Rules over tokens: exact places of tokens in the text, the first rule wins, choices by them."""

import csv
import json
import shutil

import pytest
import torch
from conftest import ROOT, script
from test_planted import golden_pairs, golden_policy
from tokenizers import Tokenizer, decoders, models

import data
import tiny
from audit import choices as ch
from audit import rules as rl
from runtime.sources import UserError
from tiny import world

EXAMPLE = ROOT / "audit" / "token_rules.json"
MARKUP = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PIECES = ("model", "\n", "▁", "▁**", "**", "bold", "▁a", "1", ".", "-", "é", "\n\n", "�", "x")


def gemma_like() -> Tokenizer:
    """Pieces and bytes, decoded as Gemma's tokenizer does it."""
    names = (*MARKUP, *PIECES, *(f"<0x{byte:02X}>" for byte in range(256)))
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Ids of pieces; one that is no piece becomes the tokens of its bytes."""
    found = []
    for piece in pieces:
        one = tokenizer.token_to_id(piece)
        bytes_ = [f"<0x{byte:02X}>" for byte in piece.encode()]
        found += [one] if one is not None else map(tokenizer.token_to_id, bytes_)
    return found


def written(tmp_path, rules: object):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(rules))
    return path


# --- places ---------------------------------------------------------------------------------------


def test_every_token_has_its_characters():
    """Against the bytes: a token's characters are those that its bytes lie in."""
    t = gemma_like()
    pieces = ("▁a", "🦜", "▁**", "bold", "ü", "**", "\n\n", "é", "�", "日", "x")
    text, spans = rl.token_spans(ids(t, *pieces), t)
    plain = [piece.replace("▁", " ") for piece in pieces]
    assert text == "".join(plain) == t.decode(ids(t, *pieces))
    wanted, at = [], 0
    for piece in plain:
        tokens = 1 if t.token_to_id(piece.replace(" ", "▁")) is not None else len(piece.encode())
        wanted += [(at, at + len(piece))] * tokens
        at += len(piece)
    assert spans == wanted
    assert spans[1:5] == [(2, 3)] * 4  # the four bytes of one character


def test_the_bytes_of_a_truncated_character_stand_for_themselves():
    t = gemma_like()
    text, spans = rl.token_spans([*ids(t, "x", "🦜")[:3], *ids(t, "x")], t)
    assert text == "x��x" and spans == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_places_in_the_embedded_worlds_texts():
    """Its tokenizer works on bytes in another way."""
    t = data.load_tokenizer(tiny.MODEL_DIR)
    for written_text in ("Zoë: 🦜 **déjà** vu\n- 日本", *(x.text for x in world.corpus(20, 0))):
        found = t.encode(written_text, add_special_tokens=False)
        text, spans = rl.token_spans(found.ids, t)
        assert text == written_text
        assert [text[a:b] for a, b in spans if b - a > 1] == [
            text[a:b] for a, b in found.offsets if b - a > 1
        ]
        covered = {i for a, b in spans for i in range(a, b)}
        assert covered == set(range(len(text)))


# --- rules ----------------------------------------------------------------------------------------


def kinds(tmp_path, rules: dict, *pieces: str, end: bool = True) -> list[str]:
    t = gemma_like()
    found = rl.read_rules(written(tmp_path, rules))
    tail = ids(t, "<end_of_turn>", "\n", "<eos>") if end else []
    response = [*ids(t, "<start_of_turn>", "model", "\n", *pieces), *tail]
    names = [found.names[k] for k in rl.response_kinds(found, response, t)]
    assert names[:3] == [ch.REST] * 3
    return names[3:]


@pytest.fixture(autouse=True)
def header_of_three_tokens(monkeypatch):
    """The small tokenizer has no merges to encode `model` with."""
    whole = data.header_ids

    def header(tokenizer: Tokenizer) -> list[int]:
        small = tokenizer.token_to_id("▁**") is not None and tokenizer.get_vocab_size() < 400
        return ids(tokenizer, "<start_of_turn>", "model", "\n") if small else whole(tokenizer)

    monkeypatch.setattr(rl, "header_ids", header)


def test_a_token_belongs_to_a_rule_that_matches_one_of_its_characters(tmp_path):
    rules = {"bold": r"\*\*", "break": r"\n+", "list": [r"^1\.", "^-"]}
    pieces = ("1", ".", "▁**", "bold", "**", "\n\n", "-", "▁a", "-", "1", ".")
    wanted = ["list", "list", "bold", "rest", "bold", "break", "list", *["rest"] * 4]
    assert kinds(tmp_path, rules, *pieces) == [*wanted, "end", "rest", "rest"]
    assert kinds(tmp_path, rules, *pieces, end=False) == wanted


def test_the_first_rule_of_the_file_wins_and_bytes_count_as_their_character(tmp_path):
    rules = {"birds": "🦜", "all": ".+", "never": "bold"}
    wanted = ["all", *["birds"] * 4, "all", "end", "rest", "rest"]
    assert kinds(tmp_path, rules, "x", "🦜", "bold") == wanted


def test_markup_and_lines_end_where_the_text_does(tmp_path):
    """`model` of the header and the line break after <end_of_turn> are no text of the answer."""
    rules = {"all": r"(?s)^\A.*\Z$", "model": "model"}
    assert kinds(tmp_path, rules, "1", "\n", "x") == ["all"] * 3 + ["end", "rest", "rest"]


def test_the_example_tells_markdown_apart(tmp_path):
    text = "# A\n\nI think **x** may\n- one\n2. two\nI'm sorry, I cannot"
    t = data.load_tokenizer(tiny.MODEL_DIR)
    rules = rl.read_rules(EXAMPLE)
    encoder = data.Encoder(t)
    encoder.learn([("model", text)])
    response = encoder.response(text)
    found = rl.response_kinds(rules, response, t)
    by_name = {name: "" for name in rules.names}
    for token, kind in zip(response, found, strict=True):
        by_name[rules.names[kind]] += t.decode([token], skip_special_tokens=False)
    assert by_name["heading"] == "#" and by_name["list"] == "-2."
    assert by_name["markdown"].replace(" ", "") == "****"
    assert by_name["line break"] == "\n" * 5
    assert by_name["hedge"].split() == ["I", "think", "may"]
    assert by_name["refusal"].replace(" ", "") == "I'msorry,Icannot"
    assert by_name[ch.END] == "<end_of_turn>"


# --- choices by them ------------------------------------------------------------------------------


def test_choices_with_places_of_their_own_equal_the_plain_form():
    """At each position the vocabulary is parted with the token that stands there moved to its own
    class.
    """
    policy = golden_policy()
    pairs, V = golden_pairs(policy.tokenizer, 3), policy.base.config.vocab_size
    g = torch.Generator().manual_seed(2)
    names = ("a", "b", ch.END, ch.REST)
    own = [torch.randint(0, 4, (len(p.chosen) + len(p.rejected),), generator=g) for p in pairs]
    parted = ch.Classes(names, torch.randint(0, 4, (V,), generator=g), own)
    (found,) = ch.choices(policy, pairs, [parted])

    shares = torch.zeros(len(pairs), len(names), dtype=torch.float64)
    for i, pair in enumerate(pairs):
        classes = iter(own[i])
        for sign, response in ((1, pair.chosen), (-1, pair.rejected)):
            tokens = torch.tensor(pair.prompt + response)
            with torch.inference_mode():
                base = policy.base.logits(tokens).double().log_softmax(-1)
                steered = policy.model.logits(tokens).double().log_softmax(-1)
            for k, token in enumerate(response):
                at, kind = len(pair.prompt) + k - 1, next(classes)
                of_token = parted.of_token.clone()
                of_token[token] = kind
                columns = torch.eye(len(names), dtype=torch.float64)[of_token]
                mass = [(lp[at].exp() @ columns)[None] for lp in (base, steered)]
                change = (steered[at, token] - base[at, token])[None]
                terms = ch.token_shares(change, *mass, kind[None])
                shares[i] += sign * terms[0] / len(response)
    torch.testing.assert_close(found.shares, shares, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(found.shares.sum(1), found.change)


def test_in_the_vocabulary_a_token_has_the_class_that_it_most_often_has(tmp_path):
    policy = golden_policy()
    pairs = golden_pairs(policy.tokenizer)
    rules = rl.read_rules(written(tmp_path, {"letters": "[a-m]", "others": "[n-z]"}))
    found = rl.by_rules(rules, policy, pairs)
    occurrences: dict[int, list[int]] = {}
    for pair in pairs:
        both = rl.pair_kinds(rules, pair, policy.tokenizer)
        for response, kinds in zip((pair.chosen, pair.rejected), both, strict=True):
            for token, kind in zip(response, kinds, strict=True):
                occurrences.setdefault(token, []).append(kind)
    for token, kind in enumerate(found.of_token.tolist()):
        seen = occurrences.get(token, [3])
        assert kind == max(sorted(set(seen)), key=seen.count)
    assert found.names == ("letters", "others", ch.END, ch.REST)
    assert len(set(found.of_token.tolist())) == 4


SMALL = ("--only", "choices", "--pairs", 24, "--bootstrap", 20)


def test_choices_needs_no_label_of_a_feature(tiny_run, tmp_path):
    """Bold and bullets are what the tiny policy learned; no label file is read."""
    out = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    sae = ("--sae", tiny.SAE_DIR, "--sae-id", tiny.SAE_ID)  # under its path no labels come with it
    arguments = ("-m", "audit", "--run", out, *sae, *SMALL)
    result = script(*arguments, "--token-rules", EXAMPLE)
    assert result.returncode == 0, result.stderr
    with open(out / "eval" / "choices.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [*json.loads(EXAMPLE.read_text()), ch.END, ch.REST]
    assert [row["tokens"] for row in rows] == names
    assert {(row["labels"], row["kind"], row["matched"]) for row in rows} == {
        ("token_rules", "rules", "True")
    }
    assert sum(float(row["part_of_change"]) for row in rows) == pytest.approx(1)
    assert {row["tokens"] for row in rows if row["named"] == "True"} <= {"markdown", "list"}
    about = json.loads((out / "eval" / "choices.json").read_text())["about"]
    assert about["labels"] == [] and list(about["token_rules"]["patterns"]) == names[:-2]
    assert "token_rules" in (out / "report.html").read_text()


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([], "not an object"),
        ({}, "holds no rule"),
        ({"a": 1}, "a: a regular expression or a list of them was expected"),
        ({"a": []}, "a: a regular expression or a list of them was expected"),
        ({"a": ["x", None]}, "a: a regular expression or a list of them was expected"),
        ({"a": "("}, r"a: not a regular expression \(missing \)"),
        ({"rest": "x"}, "'rest' cannot be the name of a rule"),
        ({" ": "x"}, "' ' cannot be the name of a rule"),
    ],
)
def test_a_mistake_in_the_rules_is_named(tmp_path, rules, says):
    with pytest.raises(UserError, match=says):
        rl.read_rules(written(tmp_path, rules))


def test_what_is_no_json_is_named(tmp_path):
    (tmp_path / "rules.json").write_text("{")
    for path in (tmp_path / "rules.json", tmp_path / "absent.json", tmp_path):
        with pytest.raises(UserError, match=f"--token-rules {path}: a json object of rules"):
            rl.read_rules(path)
