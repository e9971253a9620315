"""Attention over packed prompts with continuations: a plain kernel (CPU), FlexAttention (CUDA).

A tree is a prompt (branch 0) with its continuations (branches 1, 2, ...). For the query at position
i of branch b, both compute

    o_i = Σ_j softmax_j( c tanh(s q_i·k_j / c) ) v_j

over the keys j of the same tree that are in branch 0 or b, at a position up to i and, with a window
w, above i - w. Without a softcap c the scores are s q_i·k_j.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kernels.pointwise import at_least_float32

NEVER = 1 << 30  # position given to padding among the keys, larger than that of any query
TILE = 128  # queries that share their keys; a longer tile computes more scores of hidden keys
SCORES = 1 << 18  # limit on a bucket's scores per head, so that they stay in the processor's cache

# (attention module, of which index, window, scale and softcap are read; q [T, H, hd]; k and v
# [T, KV, hd]) -> [T, H, hd]
Attend = Callable[[object, Tensor, Tensor, Tensor], Tensor]

# --- the plain kernel -----------------------------------------------------------------------------


class Bucket(NamedTuple):
    """S tiles of queries with the keys they may see, padded to one shape for one matrix product.

    A tile is up to TILE consecutive queries of a prompt, whose keys are the prompt so far, or of a
    continuation, whose keys are its prompt and itself so far. Padding repeats a tile's last query,
    and gives a key the position NEVER.
    """

    queries: Tensor  # int64 [S, Lq], indices into the stream
    keys: Tensor  # int64 [S, Lk], indices into the stream
    query_position: Tensor  # int64 [S, Lq]
    key_position: Tensor  # int64 [S, Lk]; padding has NEVER
    real: Tensor  # bool [S, Lq], False for padding


class Stretch(NamedTuple):
    """Consecutive tokens of a prompt or of a continuation in a stream."""

    first: int  # index in the stream of its first token
    length: int
    prompt: int  # index in the stream of the prompt's first token
    before: int  # length of the prompt before a continuation; 0 for a prompt
    own: int = 0  # earlier tokens of the same prompt or continuation

    @property
    def keys(self) -> int:
        """How many keys its last token sees; the others see the first of these."""
        return self.before + self.own + self.length


def buckets(stretches: list[Stretch]) -> tuple[Bucket, ...]:
    """Cut whole prompts and continuations into tiles, and group similar tiles into buckets."""
    tiles = []
    for whole in stretches:
        for own in range(0, whole.length, TILE):
            length = min(TILE, whole.length - own)
            tiles.append(whole._replace(first=whole.first + own, length=length, own=own))
    tiles.sort(key=lambda tile: (tile.keys, tile.length))

    groups: list[list[Stretch]] = [[]]
    longest, area = 0, 0  # of the last group: most queries of a tile; scores without padding
    for tile in tiles:
        scores = tile.length * tile.keys
        # Tiles are sorted by keys, so this one has the most of its group.
        padded = (len(groups[-1]) + 1) * max(longest, tile.length) * tile.keys
        # Padding by a third, or by 32k scores per head, costs less time than another bucket.
        most = max(1.33 * (area + scores), area + scores + 32_768)
        if padded > min(SCORES, most):
            groups.append([])
            longest, area = 0, 0
        groups[-1].append(tile)
        longest, area = max(longest, tile.length), area + scores
    return tuple(map(_bucket, filter(None, groups)))


def _bucket(tiles: list[Stretch]) -> Bucket:
    Lq, Lk = max(tile.length for tile in tiles), max(tile.keys for tile in tiles)
    queries = torch.empty(len(tiles), Lq, dtype=torch.int64)
    query_position = torch.empty_like(queries)
    keys = torch.zeros(len(tiles), Lk, dtype=torch.int64)
    key_position = torch.full((len(tiles), Lk), NEVER, dtype=torch.int64)
    real = torch.zeros(len(tiles), Lq, dtype=torch.bool)
    for row, tile in enumerate(tiles):
        first, n, prompt, before, own = tile
        repeated = torch.arange(Lq).clamp(max=n - 1)  # padding repeats the last query
        queries[row] = first + repeated
        query_position[row] = before + own + repeated
        real[row, :n] = True
        keys[row, :before] = torch.arange(prompt, prompt + before)
        keys[row, before : tile.keys] = torch.arange(first - own, first + n)
        key_position[row, : tile.keys] = torch.arange(tile.keys)
    return Bucket(queries, keys, query_position, key_position, real)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: tuple[Bucket, ...],
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The attention above, bucket by bucket: q [T, H, hd], k and v [T, KV, hd] -> o [T, H, hd].

    softcap: at most 75, because no maximum is subtracted from capped scores before exp: float32
    still holds exp(75) times 900,000 keys.
    """
    return _Plain.apply(q, k, v, buckets, window, scale, softcap)


class _Plain(torch.autograd.Function):
    """plain, with its backward written out: scores are computed in place, a bucket at a time, so
    that they stay in the processor's cache.

        e = visible · exp(c tanh(s q kᵀ / c)),   n = Σ_keys e,   o = e v / n
        δ = do / n;   dv = eᵀ δ;   dS = e (δ vᵀ - Σ δ o) (1 - tanh²);   dq = s dS k;   dk = s dSᵀ q

    Without a softcap, each row's maximum is subtracted from its scores before exp.
    """

    @staticmethod
    def forward(ctx, q, k, v, buckets, window, scale, softcap):
        ctx.buckets, ctx.scale, ctx.softcap = buckets, scale, softcap
        keep = any(ctx.needs_input_grad[:3])
        KV, G = k.shape[1], q.shape[1] // k.shape[1]
        out, kept = torch.empty_like(q), [q, k, v]
        for bucket in buckets:
            qb = _gather(q, bucket.queries, KV)  # [S, KV, G Lq, hd]
            kb, vb = _keys(k, bucket), _keys(v, bucket)  # [S, KV, Lk, hd]
            t = (qb * (scale / (softcap or 1.0))) @ kb.mT  # [S, KV, G Lq, Lk]
            distance = bucket.query_position[:, :, None] - bucket.key_position[:, None, :]
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            hidden = hidden.repeat(1, G, 1)[:, None]  # [S, Lq, Lk] -> [S, 1, G Lq, Lk]
            if softcap:
                t.tanh_()
                e = t * softcap if keep else t.mul_(softcap)
                e = e.exp_().masked_fill_(hidden, 0)
            else:
                t.masked_fill_(hidden, -torch.inf)
                e = t.sub_(t.amax(-1, keepdim=True)).exp_()
            n = e.sum(-1, keepdim=True, dtype=at_least_float32(e.dtype))
            o = (e @ vb).div_(n)
            out[bucket.queries] = _ungather(o, bucket.queries)  # padding writes the same row again
            if keep:
                kept += [e, n]
                kept += [t.square_()] if softcap else []
        if keep:
            ctx.save_for_backward(out, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        out, q, k, v, *kept = ctx.saved_tensors
        kept = iter(kept)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        KV, G = k.shape[1], q.shape[1] // k.shape[1]
        for bucket in ctx.buckets:
            e, n = next(kept), next(kept)
            qb, kb, vb = _gather(q, bucket.queries, KV), _keys(k, bucket), _keys(v, bucket)
            real = bucket.real.repeat(1, G)[:, None, :, None]  # a repeated query counts once
            delta = (_gather(grad, bucket.queries, KV) * (real / n)).to(q.dtype)
            dS = delta @ vb.mT
            dS.sub_((delta * _gather(out, bucket.queries, KV)).sum(-1, keepdim=True)).mul_(e)
            if ctx.softcap:
                dS.addcmul_(dS, next(kept), value=-1)  # times 1 - tanh²

            queries, keys = bucket.queries.flatten(), bucket.keys.flatten()
            dq_b = _ungather((dS @ kb).mul_(ctx.scale), bucket.queries)
            dk_b = (dS.mT @ qb).mul_(ctx.scale).transpose(1, 2)
            dv_b = (e.mT @ delta).transpose(1, 2)
            dq.index_add_(0, queries, dq_b.flatten(0, 1))
            dk.index_add_(0, keys, dk_b.flatten(0, 1))
            dv.index_add_(0, keys, dv_b.flatten(0, 1))
        return dq, dk, dv, None, None, None, None


def _gather(x: Tensor, queries: Tensor, KV: int) -> Tensor:
    """x [T, H, hd], queries [S, Lq] -> [S, KV, G Lq, hd]; G = H / KV heads share a key head."""
    (S, Lq), (_, H, hd) = queries.shape, x.shape
    grouped = x[queries].view(S, Lq, KV, H // KV, hd)
    return grouped.permute(0, 2, 3, 1, 4).reshape(S, KV, H // KV * Lq, hd)


def _ungather(x: Tensor, queries: Tensor) -> Tensor:
    """The inverse of _gather: x [S, KV, G Lq, hd] -> [S, Lq, H, hd]."""
    (S, Lq), (_, KV, _, hd) = queries.shape, x.shape
    return x.view(S, KV, -1, Lq, hd).permute(0, 3, 1, 2, 4).reshape(S, Lq, -1, hd)


def _keys(x: Tensor, bucket: Bucket) -> Tensor:
    return x[bucket.keys].transpose(1, 2)  # [T, KV, hd] -> [S, KV, Lk, hd]


# --- FlexAttention --------------------------------------------------------------------------------


def tree_mask(tree: Tensor, branch: Tensor, position: Tensor, window: int | None):
    """Which keys a query sees, as a mask_mod of FlexAttention; tree, branch, position int64 [T]."""

    def visible(b, h, q, k):
        own_branch = (branch[k] == 0) | (branch[k] == branch[q])
        ok = (tree[q] == tree[k]) & own_branch & (position[q] >= position[k])
        return ok if window is None else ok & (position[q] - position[k] < window)

    return visible


def block_mask(tree: Tensor, branch: Tensor, position: Tensor, window: int | None) -> BlockMask:
    """tree_mask as a BlockMask, made on the device without T x T entries in memory."""
    visible = tree_mask(tree, branch, position, window)
    return compiled(_make_block_mask, dynamic=True)(visible, len(tree), tree.device)


def flexible(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> Tensor:
    """The attention above by FlexAttention: q [T, H, hd], k and v [T, KV, hd] -> o [T, H, hd]."""

    def cap(score, b, h, q_index, k_index):
        return softcap * torch.tanh(score / softcap)

    # Inside a compiled block the call is compiled with the block, elsewhere by itself.
    alone = q.is_cuda and not torch.compiler.is_compiling()
    kernel = compiled(flex_attention) if alone else flex_attention
    out = kernel(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),  # [T, H, hd] -> [1, H, T, hd]
        score_mod=cap if softcap else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
        kernel_options=_tiles(q.device, q.dtype) if q.is_cuda else None,
    )
    return out[0].transpose(0, 1)


def _tiles(device: torch.device, dtype: torch.dtype) -> dict | None:
    """Tile sizes for GPUs whose shared memory is too small for FlexAttention's defaults, else None.

    With heads of 256 (Gemma-2 2B and 9B) the defaults need 115,000 to 155,000 bytes. An RTX 3090,
    4090 or 5090 has 101,376, an A100 166,912.
    """
    if _shared_memory(device) > 150_000:
        return None
    if dtype == torch.float32:
        return dict(fwd_BLOCK_M=32, fwd_BLOCK_N=16, fwd_num_stages=2)
    backward = {f"bwd_BLOCK_{name}": 32 for name in ("M1", "N1", "M2", "N2")}
    return dict(fwd_BLOCK_M=32, fwd_BLOCK_N=64, fwd_num_stages=2, **backward, bwd_num_stages=2)


def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _make_block_mask(visible, T: int, device: torch.device) -> BlockMask:
    """create_block_mask as a function of T, so that dynamic=True makes T symbolic and leaves the
    block size constant.
    """
    return create_block_mask(visible, None, None, T, T, device=device)


@functools.cache
def compiled(function: Callable, **options) -> Callable:
    """torch.compile, once for each function.

    After too many recompilations it raises an error, where torch.compile by default would go on
    with the slow, unfused form without a word. A few graphs are expected: with and without a
    window, gradients and autocast; lengths become symbolic when they differ a second time. The
    settings are made here, because importing torch._dynamo takes 0.6 s.
    """
    torch.compiler.assume_constant_result(_shared_memory)  # torch.compile cannot trace it
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, **options)
