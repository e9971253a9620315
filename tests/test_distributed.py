"""Several processes give the run of one; --full has the gradients of plain autograd."""

import os
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT, metrics
from forked import GOLDEN_FLAGS, Run, free_port, golden, good
from safetensors.torch import load_file

import data
import model as models
import train
from fsrl import Adapter, Unsteered
from kernels import attention
from runtime import ranks as distributed
from runtime.device import resolve_device
from runtime.sources import UserError

# Several micro-batches a step, of unequal number on the processes; an adapter that steers from the
# first step.
STEPS = ("--max-steps", 4, "--lr", 1e-3, "--tokens-per-microbatch", 150)
ADAPTER = (*STEPS, "--init-adapter", GOLDEN / "adapter_mid")
FULL = (*STEPS, "--full", "--schedule", "constant")


def weights(out):
    path = out / "model/model.safetensors"
    return load_file(path if path.exists() else out / "adapter/adapter.safetensors")


def at_first(flags):
    """What a run starts from."""
    if "--full" in flags:
        return models.Gemma2.from_pretrained(GOLDEN / "model").state_dict()
    return Adapter.from_pretrained(GOLDEN / "adapter_mid").state_dict()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, by their flags: made once each."""
    made = {}

    def run(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("alone") / "run"
            good(golden(made[flags], *flags))
        return made[flags]

    return run


@pytest.mark.parametrize(
    "processes, flags, spread",
    [
        (2, ADAPTER, ()),
        (3, (*ADAPTER, "--batch-size", 2), ()),  # one process has none
        (3, ADAPTER, ("--shard",)),  # 4 pairs on 3 processes
        (2, FULL, ()),
        (3, (*FULL, "--batch-size", 2), ("--shard",)),
    ],
)
def test_any_number_of_processes_gives_the_run_of_one(tmp_path, alone, processes, flags, spread):
    one, many = alone(*flags), tmp_path / "run"
    said, *others = golden(many, *flags, *spread, processes=processes)
    good([said, *others])
    for split in ("train", "eval"):
        for a, b in zip(metrics(one, split), metrics(many, split), strict=True):
            assert a["pairs"] == b["pairs"] and a["tokens"] == b["tokens"]
            close = dict(loss=1e-5, l1=1e-5, l0=1e-3, accuracy=0, margin=1e-4, grad_norm=1e-4)
            if (
                "--full" in flags and b["step"] > 1
            ):  # Adam's first steps make ±lr of gradients that are all rounding
                close |= dict(loss=2e-4, margin=2e-3, grad_norm=2e-3)
            assert all(
                a[k] == pytest.approx(b[k], rel=close[k], abs=1e-6) for k in close if k in a
            ), (a, b)
    before, after, others_after = at_first(flags), weights(one), weights(many)
    for name, weight in after.items():
        moved = (weight - before[name]).norm()
        assert moved > 0 and (others_after[name] - weight).norm() <= 2e-3 * moved, name
    assert said.stdout.count("--- before") == 2 and "Written to" in said.stdout
    assert all(
        other.stdout == other.stderr == "" for other in others
    )  # the first process alone prints


@pytest.mark.parametrize("flags, close", [(ADAPTER, 1e-5), (FULL, 0.05)])
def test_slices_in_bfloat16_compute_what_one_process_does(tmp_path, alone, flags, close):
    """A pair to a micro-batch, so that packing rounds nothing differently: a frozen model in slices
    is the same to the digit, its residual stream float32 as ever. A trained one's norms are
    bfloat16 when gathered, float32 alone.
    """
    flags = (*flags, "--dtype", "bfloat16", "--tokens-per-microbatch", 1, "--max-steps", 1)
    one, many = alone(*flags), tmp_path / "run"
    good(golden(many, *flags, "--shard", processes=2))
    for split in ("train", "eval"):
        a, b = metrics(one, split)[0], metrics(many, split)[0]
        assert b["loss"] == pytest.approx(a["loss"], rel=close), (a, b)
        assert split == "eval" or b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=max(close, 2e-3)
        )


def test_a_mistake_is_said_once_by_whoever_makes_it(tmp_path):
    out, nothing = ("--out", tmp_path / "run"), ("--data", tmp_path / "nothing.jsonl")
    both = Run([*GOLDEN_FLAGS, *out, *nothing], processes=2)
    one = Run([*GOLDEN_FLAGS, *out], processes=2, call=fail_on_rank_1)
    ends = both.wait()
    assert [end.returncode for end in ends] == [2, 2]
    assert sorted(end.stderr.count("nothing.jsonl") for end in ends) == [0, 1]
    ends = one.wait()
    assert [end.returncode for end in ends] == [2, 2]
    assert "trouble" not in ends[0].stderr  # it says how many rows are used, and no more
    assert ends[1].stderr == "rank 1's own trouble.\n"


def fail_on_rank_1():
    real = train.new_policy

    def new_policy(*arguments):
        if os.environ["RANK"] == "1":
            raise UserError("rank 1's own trouble.")
        return real(*arguments)

    train.new_policy = new_policy


def test_when_one_process_dies_the_others_end_and_say_so(tmp_path):
    run = Run(
        [*GOLDEN_FLAGS, "--out", tmp_path / "run", *ADAPTER, "--max-steps", 100_000], processes=2
    )
    wait_for(
        lambda: (tmp_path / "run/metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 2
    )
    run.kill(1)
    ended = run.wait(30)
    assert (
        ended[0].returncode == 1
        and "Rank 0 ends" in ended[0].stderr
        and "Traceback" not in ended[0].stderr
    )


@pytest.fixture(scope="module")
def hanging(tmp_path_factory):
    """A run of two processes, of which one is stopped; the other gives up after a while."""
    out = tmp_path_factory.mktemp("hanging") / "run"
    flags = ("--max-steps", 100_000, "--timeout", 0.1)  # minutes
    run = Run([*GOLDEN_FLAGS, "--out", out, *ADAPTER, *flags], processes=2)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2)
    os.kill(run.processes[1].pid, signal.SIGSTOP)
    yield run
    run.kill()
    run.wait()


def wait_for(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_hosts_survive_the_loss_of_a_process(tmp_path, alone, hanging):
    """Two torchrun agents on two loopback addresses meet by c10d; one worker is killed, both start
    again and resume. (The timeout of the next test passes meanwhile.)
    """
    out, port = tmp_path / "run", free_port()
    flags = (*ADAPTER, "--max-steps", 20, "--checkpoint-every", 1)
    agents = []
    for host in ("127.0.0.1", "127.0.0.2"):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            2,
            "--nproc-per-node",
            1,
        ]
        command += [
            "--max-restarts",
            1,
            "--monitor-interval",
            0.1,
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "7",
        ]
        command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", host, "train.py"]
        command = [*map(str, (*command, *GOLDEN_FLAGS, "--out", out, *flags))]
        env = os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        agents.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    try:
        wait_for(
            lambda: (
                len([*out.glob("checkpoints/step-????????")]) == 2 or agents[0].poll() is not None
            ),
            120,
        )
        os.kill(worker_of(agents[1].pid), signal.SIGKILL)
        said = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert [row["step"] for row in metrics(out)] == [*range(1, 21)]
    one, many = weights(alone(*flags)), weights(out)
    assert all((many[name] - w).norm() <= 1e-4 * w.norm() for name, w in one.items())


def test_a_process_that_hangs_ends_all_after_the_timeout(hanging):
    hanging.processes[0].join(30)
    said = hanging.text(0)
    assert "Rank 0 ends" in said and "waited 0.1 minutes" in said


def worker_of(agent: int) -> int:
    with open(f"/proc/{agent}/task/{agent}/children") as f:
        return int(f.read().split()[0])


# --- what is shared out ---------------------------------------------------------------------------


def test_shares_hold_every_pair_once_and_are_even_in_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (33,), generator=generator).tolist()
    pairs = [data.Pair([0] * n, [0], [0]) for n in lengths]
    for processes in (1, 2, 3, 8, 40):
        shares = data.shares(pairs, processes)
        assert sorted(chain(*shares)) == [*range(33)] and len(shares) == processes
        tokens = [sum(pairs[i].tokens for i in share) for share in shares]
        assert max(tokens) - min(tokens) <= 402
    assert data.shares(pairs[:2], 3)[2] == []


def test_what_torchrun_says_is_read(monkeypatch):
    for name, value in dict(
        RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", TORCHELASTIC_RESTART_COUNT="2"
    ).items():
        monkeypatch.setenv(name, value)
    assert distributed.ranks_here() == (3, 8, 1, 2)
    monkeypatch.setenv("RANK", "third")
    with pytest.raises(UserError, match="torchrun"):
        distributed.ranks_here()


# --- full fine-tuning -----------------------------------------------------------------------------


def naive_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def naive_attend(model, packed):
    """Gemma2.attend by one masked softmax over the whole stream."""

    def attend(block, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * block.scale
        scores = block.softcap * torch.tanh(scores / block.softcap)
        tree = packed.tree, packed.branch, packed.position
        i = torch.arange(len(q))
        visible = attention.tree_mask(*tree, block.window)(0, 0, i[:, None], i[None, :])
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)

    return attend


def naive_logps(hidden, weight, target, softcap):
    logits = softcap * torch.tanh(hidden @ weight.T / softcap)
    return -F.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_every_weight_are_those_of_plain_autograd(monkeypatch, recompute):
    """Norms, tied embedding, attention, MLP in float64, against the same model with nothing but
    torch's own ops.
    """
    model = models.Gemma2.from_pretrained(GOLDEN / "model", torch.float64).requires_grad_(True)
    with torch.no_grad():  # norms that do something
        for p in model.parameters():
            p += 0.1 * torch.randn(
                p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())
            )
    pairs = data.load_pairs(
        GOLDEN / "dataset", data.load_tokenizer(GOLDEN / "model"), split="train"
    )[:3]
    scorer = train.Scorer(10.0, 0.5, 200, resolve_device("cpu"))
    model.recompute = recompute
    sums = train.backward(Unsteered(model), pairs, train.Penalty(), scorer)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(models, "rms_norm", naive_norm)
    monkeypatch.setattr(models.Gemma2, "attend", naive_attend)
    monkeypatch.setattr(models, "token_logps", naive_logps)
    model.recompute = False
    naive = train.backward(Unsteered(model), pairs, train.Penalty(), scorer)
    assert torch.allclose(torch.stack(sums), torch.stack(naive), rtol=1e-9)
    for name, p in model.named_parameters():
        # The rotary angles and SimPO's lengths are float32 on both sides.
        assert (ours[name] - p.grad).norm() <= 1e-8 * p.grad.norm() and p.grad.norm() > 0, name


def test_gradients_of_every_weight_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / "model", dtype=torch.float32, attn_implementation="eager"
    )
    model = models.Gemma2.from_pretrained(GOLDEN / "model").requires_grad_(True)
    pair = data.load_pairs(
        GOLDEN / "dataset", data.load_tokenizer(GOLDEN / "model"), split="train"
    )[0]
    scorer = train.Scorer(10.0, 0.5, 8192, resolve_device("cpu"))
    train.backward(Unsteered(model), [pair], train.Penalty(), scorer)
    means = []
    for response in (pair.chosen, pair.rejected):
        logits = theirs(torch.tensor([pair.prompt + response])).logits[0, len(pair.prompt) - 1 : -1]
        means.append(-F.cross_entropy(logits, torch.tensor(response)))
    (-F.logsigmoid(scorer.beta * (means[0] - means[1] - scorer.gamma_ratio))).backward()
    own = dict(model.named_parameters())
    for name, p in theirs.named_parameters():
        assert (own[name].grad - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_a_full_run_leaves_a_model_that_other_code_reads(tmp_path, alone):
    out = alone(*FULL)
    start, end = metrics(out)[0], metrics(out)[-1]
    assert end["loss"] < start["loss"] and start["l1"] == start["penalty"] == 0
    saved = models.Gemma2.from_pretrained(out / "model")
    assert saved.model.norm.weight.dtype == torch.float32
    assert {"tokenizer.json", "config.json"} <= {p.name for p in (out / "model").iterdir()}
    assert not (out / "adapter").exists() and not [*out.glob("*.part")]
    pairs = data.load_pairs(GOLDEN / "dataset", data.load_tokenizer(out / "model"), split="test")
    scorer = train.Scorer(10.0, 0.5, 8192, resolve_device("cpu"))
    again = train.evaluate(Unsteered(saved), pairs, scorer)
    assert again["loss"] == pytest.approx(metrics(out, "eval")[-1]["loss"], rel=1e-6)


def test_what_a_full_run_leaves_loads_in_transformers(alone):
    transformers = pytest.importorskip("transformers")
    out = alone(*FULL)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out / "model", attn_implementation="eager"
    )
    tokens = torch.arange(3, 40)
    ours = models.Gemma2.from_pretrained(out / "model").logits(tokens)
    assert (theirs(tokens[None]).logits[0].float() - ours).abs().max() <= 1e-4
    assert transformers.AutoTokenizer.from_pretrained(out / "model")("a")["input_ids"]
