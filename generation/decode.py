"""Token ids from a base or steered model: whole prompts first, then one token of each sequence at
a time.

    prompts             -> one packed forward that keeps keys and values -> logits at their ends
    newest tokens [B]   -> a forward of B positions -> logits [B, V] -> choose -> ...

A steered model steers each new position as it comes, from the residual stream there, exactly as in
one long forward (kernels/cache.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Newest, Packed, pack
from fsrl import Change, SteeredModel, Unsteered
from kernels.cache import Cache
from model import Attend
from runtime.sources import UserError

PREFILL_TOKENS = 8192  # of prompts in one forward; a longer prompt goes alone
ROOM = 256  # new tokens the cache starts with; it doubles when they are used up

Ended = Callable[[list[int]], bool]  # of a prompt's new tokens: whether the answer is complete
# Which prompt each row belongs to, and v [rows, F] as it is added to the residual stream.
Watch = Callable[[list[int], Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. top_k counts before top_p, as in transformers."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        """Raises UserError for numbers that no sampling has."""
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
    """Logits [B, V] -> token ids [B].

    draws: one number a row, uniform in [0, 1), that picks the row's token by inverse CDF. A token
    therefore depends on nothing but its own row's logits and draw.
    """
    if s.temperature == 0:
        return logits.argmax(-1)

    # The largest becomes 0, so that a tiny temperature makes no infinity of it.
    logits, ids = logits.double(), None
    logits = (logits - logits.amax(-1, keepdim=True)) / s.temperature
    if s.top_k or s.top_p < 1:
        logits, ids = logits.topk(min(s.top_k or logits.shape[1], logits.shape[1]))  # descending
    p = logits.softmax(-1)
    if s.top_p < 1:
        p = p * (p.cumsum(-1) - p < s.top_p)  # the fewest tokens that reach top_p together
    cdf = p.cumsum(-1)
    # The first token whose CDF exceeds the draw.
    picked = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


@torch.no_grad()  # not inference_mode, whose tensors FSDP2 could not train on afterwards
def decode(
    model: SteeredModel | Unsteered,
    prompts: list[list[int]],
    max_new_tokens: int,
    ended: Ended,
    sampling: Sampling = GREEDY,
    change: Change | None = None,
    watch: Watch | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[dict[int, int]]:
    """Continue all prompts (token ids) together; yield at each step {index of prompt: next token}.

    A prompt ends when `ended` says so, after max_new_tokens, and at the model's last position
    (config.max_position_embeddings). Each prompt has a random generator of its own, so that its
    text does not depend on the others. They are all seeded with sampling.seed, or each with its own
    of `seeds`, which makes the texts independent draws.

    change and watch get the steering of a SteeredModel. With watch, a prompt's last token passes
    through the model too, so that every position has been seen. Raises UserError for an empty
    prompt, and for one that leaves no position for a new token.
    """
    base = model.model
    longest = base.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < longest:
            raise UserError(
                f"Prompt {i}: has {len(prompt)} tokens; 1 to {longest - 1} were expected."
            )
    if not prompts or max_new_tokens < 1:
        return

    seeds = [sampling.seed] * len(prompts) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    new: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the prompts that the cache's rows belong to
    cache = Cache([len(prompt) for prompt in prompts], min(max_new_tokens, ROOM), base.device)
    x = _read(model, prompts, cache, change, watch)
    while True:
        draws = _draws(generators, active, sampling)
        tokens = choose(base.head(x), sampling, draws.to(x.device))
        # tolist is the step's one wait for the device.
        chosen = dict(zip(active, tokens.tolist(), strict=True))
        for i, token in chosen.items():
            new[i].append(token)
        yield chosen

        going = []
        for row, i in enumerate(active):
            full = len(new[i]) == max_new_tokens or len(prompts[i]) + len(new[i]) == longest
            if not full and not ended(new[i]):
                going.append(row)
        if not going and not watch:
            return
        if not watch and len(going) < len(active):
            cache.keep(going)
            active, tokens = [active[row] for row in going], tokens[going]

        position, attend = cache.step()
        x = _states(model, Newest(tokens, position), attend, change, watch, active)
        if watch and len(going) < len(active):
            if not going:
                return
            cache.keep(going)
            active, x = [active[row] for row in going], x[going]


def generate(
    model: SteeredModel | Unsteered,
    prompts: list[list[int]],
    max_new_tokens: int,
    ended: Ended,
    *args,
    **options,
) -> list[list[int]]:
    """All of decode: the new token ids of each prompt, its end token included."""
    new: list[list[int]] = [[] for _ in prompts]
    for chosen in decode(model, prompts, max_new_tokens, ended, *args, **options):
        for i, token in chosen.items():
            new[i].append(token)
    return new


def end_of_turn(tokenizer: Tokenizer) -> Ended:
    """An answer in a chat is complete with <end_of_turn> or <eos>."""
    stops = {tokenizer.token_to_id("<end_of_turn>"), tokenizer.token_to_id("<eos>")}
    return lambda new: new[-1] in stops


def _read(
    model, prompts: list[list[int]], cache: Cache, change: Change | None, watch: Watch | None
) -> Tensor:
    """Fill the cache with all prompts: final states at each prompt's last position, [B, d]."""
    base, states = model.model, []
    for group in _groups(prompts):
        packed = pack([(prompts[i], []) for i in group])
        lengths = torch.tensor([len(prompts[i]) for i in group])
        ends = (lengths.cumsum(0) - 1).to(base.device)
        packed = packed.to(base.device)
        owners = [i for i in group for _ in prompts[i]]
        attend = cache.prefill(packed.tree, packed.position, group[0], base.attend(packed))
        states.append(_states(model, packed, attend, change, watch, owners)[ends])
    return torch.cat(states)


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


def _states(
    model,
    positions: Packed | Newest,
    attend: Attend,
    change: Change | None,
    watch: Watch | None,
    owners: list[int],
) -> Tensor:
    """Final states [T, d] of a packed stream or of the newest tokens; owners: the prompt of each
    position.
    """
    if watch is None:
        return model.states(positions, attend, change).hidden

    seen = 0

    def change_and_watch(v: Tensor) -> Tensor:
        nonlocal seen
        v = change(v) if change else v
        watch(owners[seen : seen + len(v)], v)
        seen += len(v)
        return v

    return model.states(positions, attend, change_and_watch).hidden


def _draws(generators: list[torch.Generator], active: list[int], s: Sampling) -> Tensor:
    """float64 [B], one number from each active prompt's own generator; greedy needs none."""
    if s.temperature == 0:
        return torch.empty(len(active), dtype=torch.float64)
    drawn = [torch.rand((), dtype=torch.float64, generator=generators[i]) for i in active]
    return torch.stack(drawn)
