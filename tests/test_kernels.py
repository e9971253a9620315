"""Every kernel against its naive twin, values and gradients."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ragged
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import FlexKernelOptions, create_block_mask

from data import pack
from kernels import attention, logps, pointwise
from kernels.attention import TILE

# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [30.0, 2.0, None])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("trains_head", [False, True])
def test_chunked_logps_equal_the_full_log_softmax(monkeypatch, softcap, chunk, trains_head):
    g = torch.Generator().manual_seed(chunk)
    hidden = torch.randn(19, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, generator=g, dtype=torch.float64, requires_grad=trains_head)
    target = torch.randint(0, 50, (19,), generator=g)
    probe = torch.randn(19, generator=g, dtype=torch.float64)
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cpu", chunk * 50)
    monkeypatch.setattr(logps, "CHUNK_ROWS", 1)

    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    naive = F.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)
    ours = logps.token_logps(hidden, weight, target, softcap)
    torch.testing.assert_close(ours, naive, atol=1e-12, rtol=1e-12)
    wanted = [hidden, weight] if trains_head else [hidden]
    for a, b in zip(
        *(torch.autograd.grad((y * probe).sum(), wanted) for y in (ours, naive)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("softcap", [30.0, None])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_scores_say_which_targets_are_likeliest(monkeypatch, softcap, chunk):
    g = torch.Generator().manual_seed(chunk)
    hidden, weight = torch.randn(40, 8, generator=g), torch.randn(50, 8, generator=g)
    best = (hidden @ weight.T).argmax(1)
    target = torch.where(torch.arange(40) % 3 > 0, best, torch.randint(0, 50, (40,), generator=g))
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cpu", chunk * 50)
    monkeypatch.setattr(logps, "CHUNK_ROWS", 1)
    scores = logps.token_scores(hidden, weight, target, softcap)
    assert torch.equal(scores.greedy, target == best) and 20 < scores.greedy.sum() < 40
    assert torch.equal(scores.logp, logps.token_logps(hidden, weight, target, softcap))


def test_a_frozen_head_gets_no_gradient_and_evaluation_keeps_none():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8)
    logps.token_logps(hidden, weight, torch.arange(5), 30.0).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.inference_mode():
        assert logps.token_logps(hidden, weight, torch.arange(5), 30.0).grad_fn is None


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch):
    """The largest tensor on the way is one chunk, forward and backward."""
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cpu", 4 * 5000)
    monkeypatch.setattr(logps, "CHUNK_ROWS", 1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return result

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(5000, 4)
    with Watch():
        logps.token_logps(hidden, weight, torch.arange(64), 30.0).sum().backward()
    assert largest == 4 * 5000


def test_bfloat16_inputs_still_give_float32_logits():
    """Rounding logits near 30 to bfloat16 would move log-probabilities by 0.06."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=g).bfloat16() for n in (30, 200))
    target = torch.randint(0, 200, (30,), generator=g)
    exact = logps.token_logps(hidden.double(), weight.double(), target, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = logps.token_logps(hidden, weight, target, 30.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("softcap", [30.0, None])
@pytest.mark.parametrize("trains_head", [False, True])
def test_a_large_head_is_never_cast_whole(monkeypatch, softcap, trains_head):
    """In pieces, values and gradients are those of the head that is cast at once."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(19, 8, generator=g, requires_grad=True)
    weight = torch.randn(500, 8, generator=g).bfloat16().requires_grad_(trains_head)
    target = torch.randint(0, 500, (19,), generator=g)
    wanted = [hidden, weight] if trains_head else [hidden]

    def found():
        ours = logps.token_logps(hidden, weight, target, softcap)
        return ours, *torch.autograd.grad(ours.sum(), wanted)

    whole = found()
    for name, value in dict(WHOLE=100, PIECE=8 * 77).items():
        monkeypatch.setattr(logps, f"{name}_ELEMENTS", value)
    monkeypatch.setattr(logps, "PIECED_CHUNK", 500 * 7)
    monkeypatch.setattr(torch.Tensor, "float", None)  # what casts the whole
    for a, b in zip(found(), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# --- attention ------------------------------------------------------------------------------------


def tree(packed):
    return packed.tree, packed.branch, packed.position


def block_mask(packed, window):
    visible, T = attention.tree_mask(*tree(packed), window), len(packed.tokens)
    return create_block_mask(visible, None, None, T, T, device="cpu")


@pytest.mark.parametrize("softcap", [5.0, None])
@pytest.mark.parametrize("window", [None, 3, 200])
@pytest.mark.parametrize("seed", range(4))
def test_plain_attention_equals_the_definition_with_gradients(seed, window, softcap):
    """Against one masked softmax over the whole stream; stretches longer than a tile included."""
    packed = pack(ragged(seed, longest=300))
    T, g = len(packed.tokens), torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(T, heads, 8, generator=g, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    probe = torch.randn(T, 4, 8, generator=g, dtype=torch.float64)
    ours = attention.plain(q, k, v, packed.buckets, window, 0.7, softcap)

    visible = attention.tree_mask(*tree(packed), window)(
        0, 0, torch.arange(T)[:, None], torch.arange(T)[None]
    )
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.7
    scores = pointwise.softcap(scores, softcap).masked_fill(~visible, -torch.inf)
    naive = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(ours, naive, atol=1e-12, rtol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad((y * probe).sum(), (q, k, v)) for y in (ours, naive)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("window", [None, 3, 16])
@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_equals_plain_attention(seed, window):
    packed = pack(ragged(seed))
    T = len(packed.tokens)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(T, heads, 16, generator=g) for heads in (4, 2, 2))
    mask = block_mask(packed, window)
    flexible = attention.flexible(q, k, v, mask, 0.3, 5.0)
    torch.testing.assert_close(
        flexible, attention.plain(q, k, v, packed.buckets, window, 0.3, 5.0), atol=2e-6, rtol=1e-5
    )


def test_buckets_keep_padding_low_and_few():
    """Many short trees share a few products; a stream of unlike ones stays within a third of
    padding or 32k scores.
    """
    alike = pack([([1] * 20, [[1] * 30, [1] * 28])] * 64)
    assert len(alike.buckets) <= 4
    for seed in range(20):
        trees = ragged(seed, trees=12, longest=400)
        stretches = [(0, len(p)) for p, _ in trees] + [
            (len(p), len(c)) for p, branches in trees for c in branches
        ]
        tiles = [(b + i, min(TILE, n - i)) for b, n in stretches for i in range(0, n, TILE)]
        seen = sum(n * (before + n) for before, n in tiles)
        buckets = pack(trees).buckets
        padded = sum(bucket.queries.numel() * bucket.keys.shape[1] for bucket in buckets)
        assert seen <= padded <= 1.33 * seen + 32_768 * len(buckets)
        assert sum(int(bucket.real.sum()) for bucket in buckets) == sum(n for _, n in tiles)


@pytest.mark.parametrize(
    "shared, fits", [(101_376, False), (166_912, True), (232_448, True)]
)  # RTX 4090, A100, H100
def test_small_gpus_get_small_tiles(monkeypatch, shared, fits):
    """What FlexAttention takes by itself for heads of 256, 154,624 bytes forward, is more than
    consumer GPUs have.
    """
    properties = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for dtype in (torch.bfloat16, torch.float32):
        options = attention._tiles(torch.device("cuda:0"), dtype)
        assert (options is None) == fits
        unknown = {name.removeprefix("fwd_").removeprefix("bwd_") for name in options or {}}
        assert unknown <= FlexKernelOptions.__annotations__.keys()


# --- pointwise ------------------------------------------------------------------------------------


def test_rms_norm_equals_its_definition_with_gradients():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(12, generator=g, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 12, generator=g, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(7, 12, generator=g, dtype=torch.float64)
    naive = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + weight)
    torch.testing.assert_close(pointwise.rms_norm(x, weight, 1e-3), naive, atol=1e-12, rtol=1e-12)
    for a, b in zip(
        *(
            torch.autograd.grad((y * probe).sum(), (x, weight))
            for y in (pointwise.rms_norm(x, weight, 1e-3), naive)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_autocast_rounds_nothing_in_a_norm():
    """Training enters autocast for its matrix products, and the backward runs under it too."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, generator=g), torch.randn(20, 64, generator=g)
    probe = torch.randn(20, 64, generator=g) + x
    found = []
    for low in (False, True):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = pointwise.rms_norm(own, weight, 1e-6)
            (y * probe).sum().backward()
        found.append((y.detach(), own.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_jumprelu_and_step_equal_saelens():
    want = load_file(GOLDEN / "jumprelu.safetensors")
    z, threshold = want["z"].requires_grad_(), want["threshold"].requires_grad_()
    v, l0 = pointwise.jumprelu(z, threshold, want["bandwidth"].item())
    assert torch.equal(v, want["v"]) and torch.equal(l0, want["l0"])
    grad_z, grad_threshold = torch.autograd.grad(
        (v * want["grad_v"]).sum(), (z, threshold), retain_graph=True
    )
    torch.testing.assert_close(grad_z, want["jumprelu_grad_z"], atol=0, rtol=0)
    torch.testing.assert_close(
        grad_threshold, want["jumprelu_grad_threshold"], atol=1e-12, rtol=1e-12
    )
    grad_z, grad_threshold = torch.autograd.grad((l0 * want["grad_l0"]).sum(), (z, threshold))
    torch.testing.assert_close(grad_threshold, want["step_grad_threshold"], atol=1e-12, rtol=1e-12)
    assert not grad_z.any() and want["step_grad_threshold"].any()


@pytest.mark.parametrize("seed", range(5))
def test_the_estimator_is_the_derivative_of_the_smoothed_objective(seed):
    """Each z smeared over a rectangle of width ε gives v and ‖v‖₀ a true derivative in θ: theirs,
    by differences.
    """
    g = torch.Generator().manual_seed(seed)
    bandwidth = 0.1 + 0.2 * seed
    z = torch.randn(30, 8, generator=g, dtype=torch.float64).relu()
    threshold = torch.rand(8, generator=g, dtype=torch.float64)
    probe, weight = torch.randn(30, 8, generator=g).double(), torch.randn(30, generator=g).double()

    def smoothed(threshold):
        """∫ t 1[t > θ] dt and ∫ 1[t > θ] dt, both over |t - z| < ε/2 and divided by ε."""
        low, high = (z - bandwidth / 2).maximum(threshold), (z + bandwidth / 2).maximum(threshold)
        v, on = (high.square() - low.square()) / (2 * bandwidth), (high - low) / bandwidth
        return ((v * probe) + on * weight[:, None]).sum(0)

    step = 1e-7
    numeric = (smoothed(threshold + step) - smoothed(threshold - step)) / (2 * step)
    threshold.requires_grad_()
    v, l0 = pointwise.jumprelu(z, threshold, bandwidth)
    (ours,) = torch.autograd.grad((v * probe).sum() + (l0 * weight).sum(), threshold)
    assert numeric.abs().max() > 0.1
    torch.testing.assert_close(ours, numeric, atol=1e-6, rtol=1e-6)


# --- logits of a bfloat16 head on a CPU -----------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
def test_no_rounding_decides_a_token(monkeypatch, rows):
    """Logits so close that bfloat16 products order them otherwise; far ones may be rounded."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 64, generator=g).bfloat16()
    hidden = torch.randn(rows, 64, generator=g)
    weight[:40] = weight[0] + (torch.randn(40, 64, generator=g) * 2e-2).bfloat16()
    hidden += 3 * weight[0].float()
    exact = hidden.bfloat16().float() @ weight.float().T
    rounded = torch.nn.functional.linear(hidden.bfloat16(), weight).float()
    assert (rounded.argmax(1) != exact.argmax(1)).any()
    ours = logps.all_logits(hidden.bfloat16().float(), weight)
    assert ours.dtype == torch.float32 and torch.equal(ours.argmax(1), exact.argmax(1))
    best = exact.topk(100).indices
    torch.testing.assert_close(ours.gather(1, best), exact.gather(1, best), atol=1e-4, rtol=1e-5)
    assert (ours - exact).abs().max() <= 2**-8 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):  # as the audit asks for them
        assert torch.equal(logps.all_logits(hidden.bfloat16().float(), weight), ours)
        wide = logps.all_logits(hidden.float(), weight.float())
    assert torch.equal(wide, logps.all_logits(hidden.float(), weight.float()))
