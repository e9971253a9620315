"""Tokens from a base or steered model: prompts in one packed stream, then one token of each sequence at a time.

    prompts  -> packed forward, keys and values kept (kvcache.py) -> logits at each prompt's end
    newest tokens [B] -> one forward of B positions -> logits [B, V] -> choose -> ...

A steered model steers each new position as it comes, from the residual stream there, exactly as in one long forward.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fsrl import Change, SteeredModel
from generation.cache import Cache
from model import Gemma2
from packed import pack
from runtime.sources import UserError

PREFILL_TOKENS = 8192  # of prompts, in one forward (a longer prompt goes alone)
ROOM = 256  # new tokens the cache starts with; it doubles when they are used up


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. top_k counts before top_p, as in transformers."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature}: must be finite and not negative (0: greedy)."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: a share above 0 and up to 1 was expected.")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must not be negative (0: no limit).")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: from 0 to 2^63 - 1 was expected.")


GREEDY = Sampling()


def choose(logits: Tensor, s: Sampling, draws: Tensor) -> Tensor:
    """Logits [B, V] -> token ids [B]. draws: uniform in [0, 1), one a row, that picks the row's token by inverse CDF: a
    token depends on nothing but its own row's logits and draw.
    """
    if s.temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits.double() / s.temperature, None
    if s.top_k or s.top_p < 1:
        logits, ids = logits.topk(min(s.top_k or logits.shape[1], logits.shape[1]))  # descending
    p = logits.softmax(-1)
    if s.top_p < 1:
        p = p * (p.cumsum(-1) - p < s.top_p)  # the fewest tokens that reach top_p together
    cdf = p.cumsum(-1)
    picked = torch.searchsorted(
        cdf, draws[:, None] * cdf[:, -1:], right=True
    )  # the first whose CDF exceeds the draw
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


class Newest(NamedTuple):
    """One new token of each sequence: what of a Packed stream a forward with a cache needs."""

    tokens: Tensor  # int64 [B]
    position: Tensor  # int64 [B]


Watch = Callable[
    [list[int], Tensor], None
]  # which prompt each row belongs to, and v [rows, F] as it is added


@torch.no_grad()  # not inference_mode, whose tensors FSDP2 could not train on afterwards
def decode(
    model: Gemma2 | SteeredModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    ended: Callable[[list[int]], bool],
    sampling: Sampling = GREEDY,
    change: Change | None = None,
    watch: Watch | None = None,
) -> Iterator[dict[int, int]]:
    """Continue all prompts (token ids) together; yields, step by step, {index of prompt: its next token}.

    ended: of a prompt's new tokens, whether they are complete; asked after each. A prompt also ends after
    max_new_tokens, and where the model's positions do (config.max_position_embeddings). Each prompt draws from a
    generator of its own, seeded with sampling.seed: its text does not depend on the others. change and watch are for
    a steered model; with watch a prompt's last token, too, passes through the model, so that all have been seen.
    Raises UserError for an empty prompt, or one that leaves no position for a new token.
    """
    base = model.model if isinstance(model, SteeredModel) else model
    longest = base.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < longest:
            raise UserError(
                f"Prompt {i}: has {len(prompt)} tokens; 1 to {longest - 1} were expected."
            )
    if not prompts or max_new_tokens < 1:
        return
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the prompts that the cache's rows belong to

    cache = base.cache([len(p) for p in prompts], min(max_new_tokens, ROOM))
    states = []
    for group in _groups(prompts):
        packed = pack([(prompts[i], []) for i in group])
        owners = [i for i in group for _ in prompts[i]]
        ends = torch.tensor([len(prompts[i]) for i in group]).cumsum(0) - 1
        packed = packed.to(base.device)
        cache.prompts(packed, group[0])
        states.append(_forward(model, packed, cache, change, watch, owners)[ends.to(base.device)])
    logits = model.head(torch.cat(states))

    while True:
        draws = torch.empty(len(active), dtype=torch.float64)
        if sampling.temperature:
            draws = torch.stack(
                [torch.rand((), dtype=torch.float64, generator=generators[i]) for i in active]
            )
        tokens = choose(logits, sampling, draws.to(logits.device))
        chosen = dict(
            zip(active, tokens.tolist(), strict=True)
        )  # the step's one wait for the device
        for i, token in chosen.items():
            new[i].append(token)
        yield chosen
        going = [
            row
            for row, i in enumerate(active)
            if len(new[i]) < max_new_tokens
            and len(prompts[i]) + len(new[i]) < longest
            and not ended(new[i])
        ]
        if not going and not watch:
            return
        if not watch and len(going) < len(active):
            cache.keep(going)
            active, tokens = [active[row] for row in going], tokens[going]
        newest = Newest(tokens, cache.step())
        x = _forward(model, newest, cache, change, watch, active)
        if watch and len(going) < len(active):
            if not going:
                return
            cache.keep(going)
            active, x = [active[row] for row in going], x[going]
        logits = model.head(x)


def _groups(prompts: list[list[int]]) -> Iterator[list[int]]:
    """Indices of consecutive prompts that share a forward."""
    group, tokens = [], 0
    for i, prompt in enumerate(prompts):
        if group and tokens + len(prompt) > PREFILL_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += len(prompt)
    yield group


def _forward(
    model, positions, cache: Cache, change: Change | None, watch: Watch | None, owners: list[int]
) -> Tensor:
    """Normed final states [T, d] of a packed stream or of the newest tokens; owners: the prompt of each position."""
    if not isinstance(model, SteeredModel):
        return model(positions, cache)
    done = 0

    def changed(v: Tensor) -> Tensor:
        nonlocal done
        v = change(v) if change else v
        if watch:
            watch(owners[done : done + len(v)], v)
        done += len(v)
        return v

    return model(positions, cache=cache, change=changed).hidden


def generate(
    model, prompts: list[list[int]], max_new_tokens: int, ended, *args, **options
) -> list[list[int]]:
    """decode, all of it: the new token ids of each prompt, its end token included."""
    new: list[list[int]] = [[] for _ in prompts]
    for chosen in decode(model, prompts, max_new_tokens, ended, *args, **options):
        for i, token in chosen.items():
            new[i].append(token)
    return new


def end_of_turn(tokenizer: Tokenizer) -> Callable[[list[int]], bool]:
    """`ended` for chat: an answer is complete with <end_of_turn> or <eos>."""
    stops = {tokenizer.token_to_id("<end_of_turn>"), tokenizer.token_to_id("<eos>")}
    return lambda new: new[-1] in stops


def header(tokenizer: Tokenizer) -> list[int]:
    """Token ids of "<start_of_turn>model\\n", which stand between a prompt and its answer."""
    return [
        tokenizer.token_to_id("<start_of_turn>"),
        *tokenizer.encode("model\n", add_special_tokens=False).ids,
    ]


def greedy(
    model: Gemma2 | SteeredModel, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int = 96
) -> str:
    """The model's answer to a prompt that ends after a user turn (Pair.prompt): token ids -> text."""
    prompt = [*prompt, *header(tokenizer)]
    return tokenizer.decode(generate(model, [prompt], max_new_tokens, end_of_turn(tokenizer))[0])
