"""promotes.py against whole logits at golden size."""

from conftest import GOLDEN, SAE_ID, load

import data
from labelling import promotes
from labels import load_labels


def test_promoted_tokens_against_whole_logits(tmp_path, monkeypatch):
    out = tmp_path / "p.jsonl"
    flags = ["--model", GOLDEN / "model", "--sae", GOLDEN / "sae", "--sae-id", SAE_ID]
    monkeypatch.setattr("sys.argv", ["promotes", *map(str, flags), "--tokens=3", f"--out={out}"])
    monkeypatch.setattr(promotes, "LOGITS", 512 * 100)  # the last piece has fewer rows
    promotes.main()
    golden = load()
    found = load_labels(out, golden.sae)
    assert found.kind == "promotes" and found.matched and len(found.explanations) == 256
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    embedding, norm = golden.model.model.embed_tokens.weight, golden.model.model.norm.weight
    for k in (0, 101, 255):
        logits = embedding @ (golden.sae.W_dec[k] * (1 + norm))
        best = logits.argsort(descending=True)[:3].tolist()
        words = [tokenizer.decode([i], skip_special_tokens=False) for i in best]
        assert found.explanations[k] == "promotes " + ", ".join(map(repr, words))
