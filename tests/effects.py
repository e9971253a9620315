"""What tests of eval_ablation.py and of the audit's effects share: the golden policy in float64."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, load

import data
import train
from data import Pair
from fsrl import Adapter, SteeredModel
from labels import Labels
from policy import DEFAULTS, Policy
from runtime.device import Device

CPU = Device("cpu", torch.float32)


@pytest.fixture(scope="session")
def golden() -> tuple[Policy, list[Pair]]:
    """The golden policy in float64, and its evaluation pairs."""
    parts = load(torch.float64)
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    pairs = data.load_pairs(str(GOLDEN / "dataset"), tokenizer, 2048, 1800, "test")
    steered = parts.steered.requires_grad_(False)
    return Policy(steered, tokenizer, CPU, DEFAULTS, "golden"), pairs


def evaluated(policy: Policy, pairs, **weights) -> float:
    """train.evaluate's loss, with the adapter's weight and bias replaced."""
    adapter = Adapter(64, 256).to(torch.float64)
    adapter.load_state_dict(policy.steered.adapter.state_dict() | weights)
    steered = SteeredModel(policy.base, policy.steered.sae, adapter, policy.steered.layer)
    scorer = train.Scorer(policy.recorded.beta, policy.recorded.gamma_ratio, 8192, CPU)
    return train.evaluate(steered, pairs, scorer)["loss"]


def some_masks(conditions: int, share: float = 0.3) -> torch.Tensor:
    return torch.rand(conditions, 256, generator=torch.Generator().manual_seed(0)) < share


def table_of(masks: dict[str, np.ndarray], name="fires") -> Labels:
    return Labels(name, "fires", {}, masks, True, {}, None, "")
