"""Training of a JumpReLU SAE on positions of a residual stream: the embedded world's, and those of
experiments/train_sae.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IDLE = 200  # batches without firing after which a feature learns from the others' error
FINAL = 50_000  # positions on which the final threshold is set


class Progress(NamedTuple):
    unexplained: float  # share of the batch's variance
    l0: float
    idle: int  # features that have not fired for IDLE batches


class Trainer:
    """A JumpReLU SAE in training, on y = (x - mean) / scale.

    While training all features share one threshold, moved after every batch so that L0 settles on
    its target (BatchTopK without the sorting). Features that have not fired for a while learn from
    the error that the others leave (the auxiliary loss of TopK SAEs).
    """

    def __init__(self, x: Tensor, width: int, l0: int, lr: float, generator: torch.Generator):
        """x [N, d]: positions that give mean and scale."""
        d = x.shape[1]
        self.l0, self.lr = l0, lr
        self.mean = x.mean(0)
        self.scale = (x - self.mean).square().mean().sqrt()
        W_dec = F.normalize(torch.randn(width, d, generator=generator), dim=1)
        self.W_dec = W_dec.to(x.device).requires_grad_()
        self.W_enc = self.W_dec.detach().T.clone().requires_grad_()
        self.b_enc = torch.zeros(width, device=x.device, requires_grad=True)
        self.b_dec = torch.zeros(d, device=x.device, requires_grad=True)
        self.trained = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(self.trained, lr=lr, betas=(0.9, 0.99))
        self.threshold, self.silent = 0.5, torch.zeros(width, device=x.device)

    def step(self, x: Tensor, done: float, warmup: float = 1.0) -> Progress:
        """One batch x [n, d]. done: share of the training that lies behind; warmup: of the rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, warmup, 2.5 * (1 - done))
        # At first four times as many features are active, so that fewer of them die.
        target = self.l0 * max(1.0, 4 - 12 * done)
        y = (x - self.mean) / self.scale
        z = y @ self.W_enc + self.b_enc  # [n, d] -> [n, F]
        f = z * (z > self.threshold)
        error = y - (f @ self.W_dec + self.b_dec)  # [n, F] -> [n, d]
        loss = error.square().sum(1).mean()

        fired = (z.detach() > self.threshold).sum(0)
        self.silent = torch.where(fired > 0, 0.0, self.silent + 1)
        idle = (self.silent > IDLE).nonzero().squeeze(1)
        if len(idle):
            best = torch.relu(z[:, idle]).topk(min(self.l0, len(idle)), dim=1)
            g = torch.zeros(len(y), len(idle), device=y.device)
            g = g.scatter(1, best.indices, best.values)
            missed = error.detach() - g @ self.W_dec[idle]
            loss = loss + missed.square().sum(1).mean() / 32
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.W_dec.copy_(F.normalize(self.W_dec, dim=1))

        l0 = fired.sum().item() / len(x)
        off = max(-1.0, min(1.0, l0 / target - 1))
        self.threshold = max(1e-3, self.threshold * math.exp(0.02 * off))
        spread = (y - y.mean(0)).square().sum()
        return Progress((error.detach().square().sum() / spread).item(), l0, len(idle))

    @torch.no_grad()
    def arrays(self, x: Tensor) -> dict[str, Tensor]:
        """GemmaScope's five arrays, which act on the raw stream; L0 on x [N, d], of which FINAL
        positions are taken, is the target.
        """
        z = ((x[:FINAL] - self.mean) / self.scale) @ self.W_enc + self.b_enc
        threshold = z.flatten().topk(self.l0 * len(z)).values[-1]
        # z is linear in y = (x - mean) / scale, and f scales with x: W_enc stays, thresholds and
        # biases grow.
        return {
            "W_enc": self.W_enc.detach(),
            "W_dec": self.W_dec.detach(),
            "b_enc": self.scale * self.b_enc - self.mean @ self.W_enc,
            "b_dec": self.scale * self.b_dec + self.mean,
            "threshold": torch.full_like(self.b_enc, self.scale * threshold),
        }

    def state(self) -> dict[str, Tensor]:
        """Everything that goes on, by name."""
        held = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), self.trained, strict=True))
        held |= dict(mean=self.mean, scale=self.scale, silent=self.silent)
        held["threshold"] = torch.tensor(self.threshold, dtype=torch.float64)
        for name, parameter in zip(("W_enc", "W_dec", "b_enc", "b_dec"), self.trained, strict=True):
            of = self.optimizer.state[parameter]
            held |= {f"adam.{name}.{key}": value for key, value in of.items()}
        return {name: tensor.detach().contiguous() for name, tensor in held.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, parameter in zip(("W_enc", "W_dec", "b_enc", "b_dec"), self.trained, strict=True):
            parameter.copy_(state[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {k: state[f"adam.{name}.{k}"].clone() for k in keys}
        self.mean, self.scale, self.silent = state["mean"], state["scale"], state["silent"]
        self.threshold = state["threshold"].item()
