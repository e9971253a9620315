"""A Gemma steered through the features of a sparse autoencoder (SAE): FSRL, arXiv 2509.12934.

    v = ReLU(x W_aᵀ + b_a)      x' = x + v W_dec      after block config.steering_layer

config.steering_scale multiplies v (0: the base model), and features in config.silenced_features
never steer; both are read at every forward. This file needs transformers 5 alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.utils import cached_file

MULTIMODAL = {r"^(model\.)?language_model\.(model\.)?": "model."}  # names of a Gemma 3's text part


class Steering(nn.Module):
    """x [..., d] -> x'. threshold: θ or τ of the adapter, 0 for relu. b_enc, theta: the SAE's."""

    def __init__(self, config):
        super().__init__()
        self.config, self.kind = config, config.steering_kind
        n, d = config.steering_features, config.hidden_size
        shapes = {"weight": (n, d), "bias": (n,), "threshold": (n,), "W_dec": (n, d)}
        if self.kind == "soft-threshold":
            shapes |= {"W_enc": (d, n), "b_enc": (n,), "theta": (n,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x):
        z = F.linear(x, self.weight).float() + self.bias  # [..., d] -> [..., F]
        soft = self.kind == "soft-threshold"
        v = z.sign() * F.relu(z.abs() - self.threshold) if soft else z * (z > self.threshold)
        v = v * self.config.steering_scale
        if self.config.silenced_features:
            v[..., self.config.silenced_features] = 0
        if soft:  # v may be negative, but the SAE's features f + v are not
            z = (x @ self.W_enc).float() + self.b_enc
            f = z * (z > self.theta)
            v = F.relu(f + v) - f
        return x + v.to(self.W_dec.dtype) @ self.W_dec  # [..., F] -> [..., d]


class Steered:
    """A model with one steered block. Its folder holds base and SAE, or names them on the Hub."""

    # In bfloat16, what biases and thresholds have learned would be rounded away.
    _keep_in_fp32_modules_strict = ("bias", "threshold", "b_enc", "theta")
    _no_split_modules = ("Gemma2DecoderLayer", "Gemma3DecoderLayer", "Gemma2Layer", "Gemma3Layer")

    def __init__(self, config):
        super().__init__(config)
        self._keys_to_ignore_on_load_missing = ["steering"] if config.base_model else None
        layer = Gemma2Layer if isinstance(config, FSRLGemma2Config) else Gemma3Layer
        self.get_decoder().layers[config.steering_layer] = layer(config, config.steering_layer)

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, revision=None, **kwargs):
        hub = {k: kwargs[k] for k in ("cache_dir", "local_files_only", "token") if k in kwargs}
        config = config or cls.config_class.from_pretrained(folder, revision=revision, **hub)
        kwargs |= dict(config=config, revision=revision)
        if config.base_model is None:
            return super().from_pretrained(folder, *args, **kwargs)

        kwargs |= dict(revision=config.base_model_revision, key_mapping=MULTIMODAL)
        model = super().from_pretrained(config.base_model, *args, **kwargs)
        own = load_file(cached_file(folder, "steering.safetensors", revision=revision, **hub))
        path = cached_file(config.sae, config.sae_file, revision=config.sae_revision, **hub)
        sae = np.load(path) if path.endswith(".npz") else load_file(path)
        sae = {name.lower(): torch.as_tensor(sae[name]) for name in sae}
        steering = model.get_decoder().layers[config.steering_layer].steering
        for name, parameter in steering.named_parameters():
            parameter.data.copy_(own[name] if name in own else sae[name.lower()])
        return model


class SteeredLayer:
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.steering = Steering(config)

    def forward(self, *args, **kwargs):
        return self.steering(super().forward(*args, **kwargs))


class Gemma2Layer(SteeredLayer, gemma2.Gemma2DecoderLayer):
    pass


class Gemma3Layer(SteeredLayer, gemma3.Gemma3DecoderLayer):
    pass


class FSRLGemma2Config(gemma2.Gemma2Config):
    model_type = "fsrl_gemma2"


class FSRLGemma2Model(Steered, gemma2.Gemma2Model):
    config_class = FSRLGemma2Config


class FSRLGemma2ForCausalLM(Steered, gemma2.Gemma2ForCausalLM):
    config_class = FSRLGemma2Config


class FSRLGemma3Config(gemma3.Gemma3TextConfig):
    model_type = "fsrl_gemma3_text"


class FSRLGemma3Model(Steered, gemma3.Gemma3TextModel):
    config_class = FSRLGemma3Config


class FSRLGemma3ForCausalLM(Steered, gemma3.Gemma3ForCausalLM):
    config_class = FSRLGemma3Config
