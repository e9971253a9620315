"""Training an SAE: it explains the stream, goes on where it was interrupted, and reads as Gemma
Scope 2's.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from experiments import train_sae
from runtime.sources import UserError
from sae import JumpReLUSAE
from tiny import sae_trainer

SMALL = train_sae.Settings(
    model="tiny", layer=2, data="tiny", width=1024, l0=12, passes=2, tokens=6000,
    round_tokens=3000, batch=32, lr=3e-3, max_length=128, test_pairs=6, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("sae")
    return train_sae.train(replace(SMALL, out=str(out)))


def test_the_sae_explains_held_out_text_at_its_l0(trained):
    report = json.loads((trained / "quality.json").read_text())
    assert report["variance_explained"] > 0.5 and report["loss_recovered"] > 0.5
    assert report["l0"] == pytest.approx(SMALL.l0, rel=0.3)
    assert report["loss"] < report["loss_spliced"] < report["loss_with_mean"]
    sae = JumpReLUSAE.from_pretrained(trained)
    assert (sae.d_sae, sae.d_model) == (1024, 128) and sae.sha256 == report["sha256"]
    assert 0 <= report["never_fired"] < 1024


def test_an_interrupted_training_goes_on_to_the_same_bytes(trained, tmp_path, monkeypatch):
    step, count = sae_trainer.Trainer.step, 0

    def failing(self, *arguments):
        nonlocal count
        count += 1
        if count == 230:  # in the third of four rounds
            raise KeyboardInterrupt
        return step(self, *arguments)

    again = replace(SMALL, out=str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sae_trainer.Trainer, "step", failing)
        train_sae.train(again)
    folder = train_sae.train(again)
    for name in ("params.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes(), name
    with pytest.raises(UserError, match="holds a training with --l0 12, not 13"):
        train_sae.train(replace(again, l0=13))
    shutil.rmtree(tmp_path)


def test_mistakes_are_found_before_the_work(tmp_path):
    with pytest.raises(UserError, match="--layer 6: tiny has blocks 0 to 5"):
        train_sae.train(replace(SMALL, layer=6, out=str(tmp_path / "sae")))
    pairs = tmp_path / "pairs.jsonl"
    s = replace(SMALL, data=str(pairs))
    pairs.write_text("then")
    train_sae.check_same(s, tmp_path)
    train_sae.check_same(s, tmp_path)
    pairs.write_text("now")
    with pytest.raises(UserError, match="a training on other content of --data"):
        train_sae.check_same(s, tmp_path)


def test_the_arrays_act_on_the_raw_stream_as_the_trainer_does_on_the_scaled_one():
    g = torch.Generator().manual_seed(0)
    x = 300 * torch.randn(400, 8, generator=g) + 50
    trainer = sae_trainer.Trainer(x, 32, 4, 1e-3, g)
    for i in range(20):
        trainer.step(x, i / 20)
    sae = JumpReLUSAE({name: a.detach() for name, a in trainer.arrays(x).items()})
    y = (x - trainer.mean) / trainer.scale
    z = y @ trainer.W_enc + trainer.b_enc
    f = z * (z > sae.threshold / trainer.scale)
    clear = ((z - sae.threshold / trainer.scale).abs() > 1e-4).all(1)  # of rounding
    encoded = sae.encode(x)
    torch.testing.assert_close(encoded[clear] / trainer.scale, f[clear], atol=1e-4, rtol=1e-4)
    decoded = trainer.scale * (f @ trainer.W_dec + trainer.b_dec) + trainer.mean
    torch.testing.assert_close(sae.decode(encoded)[clear], decoded[clear], atol=0.05, rtol=1e-4)
    assert clear.sum() > 390
    assert (f > 0).sum().item() == pytest.approx(4 * len(x), abs=2)


def test_the_sae_of_a_scaled_stream_becomes_that_of_the_stream():
    g = torch.Generator().manual_seed(0)
    spread = torch.rand(8, generator=g) * 100 + 1
    x = spread * torch.randn(50, 8, generator=g)
    shapes = dict(W_enc=(8, 32), W_dec=(32, 8), b_enc=(32,), b_dec=(8,))
    arrays = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    arrays["threshold"] = torch.rand(32, generator=g)
    scaled, raw = JumpReLUSAE(arrays), JumpReLUSAE(train_sae.undo(arrays, spread))
    decoded = spread * scaled.decode(scaled.encode(x / spread))
    torch.testing.assert_close(raw.decode(raw.encode(x)), decoded, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(32))


def test_spread_is_that_of_positions_of_usual_norm():
    x = torch.randn(1000, 4) * torch.tensor([1.0, 2.0, 3.0, 400.0])
    found = train_sae.spread(torch.cat([x, torch.full((5, 4), 1e5)]))
    torch.testing.assert_close(found, x.std(0), rtol=0.15, atol=0)
