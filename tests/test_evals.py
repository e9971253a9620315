"""Benchmarks: the prompts, scores and texts are those of lm-evaluation-harness itself, and a run of
them resumes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, ROOT, SAE_ID, load, metrics, script

import evals
from evals import run
from evals.chat_template import ChatTemplate
from evals.run import Score, Settings
from fsrl import Unsteered
from generation.export import export
from policy import open_policy
from runtime import cli
from runtime.sources import UserError

HARNESS = importlib.util.find_spec("lm_eval") is not None
if HARNESS:
    import datasets
    import lm_eval.evaluator
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager, manager
    from lm_eval.tasks._yaml_loader import load_yaml

    from evals import harness
    from evals.harness import FSRL, before, generation, load_tasks

needs_harness = pytest.mark.skipif(not HARNESS, reason="needs requirements-eval.txt")

SUBJECTS = [
    line.partition("mmlu_")[2].partition(",")[0]
    for file in sorted((ROOT / "evals" / "tasks").glob("mmlu_*.yaml"))
    for line in file.read_text().splitlines()
    if line.startswith("  - {task: ")
]
STEERED = (
    "--run",
    GOLDEN / "adapter_mid",
    "--model",
    GOLDEN / "model",
    "--sae",
    GOLDEN / "sae",
    "--sae-id",
    SAE_ID,
)


@pytest.fixture(scope="module", autouse=True)
def one_index():
    """The harness reads its thousands of yaml files for every TaskManager; here once for each set
    of folders."""
    if not HARNESS:
        yield
        return
    real, known = manager.TaskIndex.build, {}

    def build(paths):
        paths = list(paths)
        if str(paths) not in known:
            known[str(paths)] = real(paths)
        return dict(known[str(paths)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.TaskIndex, "build", staticmethod(build))
        yield


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A few rows of each benchmark in the files that --data-dir reads, with text that is awkward to
    render."""
    folder = tmp_path_factory.mktemp("questions")
    odd = [
        "  What is 1 + 1?\n",
        "Is “naïve” {{two}} words?",
        "Which <b> of 5%?  ",
        "Why\tnot?",
        "Who? ",
        "Ω ≠ ω?",
    ]

    def write(name, rows):
        (folder / name).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )

    def choices(i, n):
        return [f"{'very ' * k}{odd[(i + k) % 6].strip()} {k}" for k in range(n)]

    write(
        "truthfulqa_mc.jsonl",
        [
            {
                "question": odd[i],
                "mc1_targets": {"choices": choices(i, 4), "labels": [1, 0, 0, 0]},
                "mc2_targets": {
                    "choices": choices(i, 3 + i),
                    "labels": [1] * (1 + i % 3) + [0] * (2 + i - i % 3),
                },
            }
            for i in range(6)
        ],
    )
    for split, n in (("train", 12), ("test", 3)):
        sums = [
            {"question": f"{odd[i % 6]} {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}
            for i in range(n)
        ]
        write(f"gsm8k_{split}.jsonl", sums)
    for split, n in (("dev", 5), ("test", 3)):
        rows = [
            {
                "question": f"{odd[i]} {subject}",
                "subject": subject,
                "choices": choices(i, 4),
                "answer": i % 4,
            }
            for subject in SUBJECTS
            for i in range(n)
        ]
        write(f"mmlu_{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def local(questions):
    names = ("truthfulqa_mc1", "truthfulqa_mc2", "gsm8k", "mmlu")
    return load_tasks(names, str(questions), num_fewshot=3)


def requests(task) -> list:
    task.build_all_requests(limit=3, rank=0, world_size=1)
    return [(i.request_type, i.doc_id, i.idx, i.arguments) for i in task.instances]


@needs_harness
@pytest.mark.parametrize(
    "name", ["truthfulqa_mc1", "truthfulqa_mc2", "gsm8k", "mmlu_anatomy", "mmlu_us_foreign_policy"]
)
def test_tasks_ask_and_score_as_the_harness_does(name, local, questions):
    """Against the harness's own definition of the task, its data set replaced by the same rows."""
    task = local.tasks[name]
    config = load_yaml(TaskManager().task_index[name].yaml_path)
    splits = {split: datasets.Dataset.from_list(list(rows)) for split, rows in task.dataset.items()}
    config = {k: v for k, v in config.items() if k != "tag"} | dict(
        custom_dataset=lambda **_: splits
    )
    theirs = ConfigurableTask(config=config)
    if theirs.get_config("num_fewshot") != 0:
        theirs.set_config(key="num_fewshot", value=3)
    theirs.set_fewshot_seed(seed=harness.FEWSHOT_SEED)
    task.set_fewshot_seed(seed=harness.FEWSHOT_SEED)
    ours = requests(task)
    assert ours == requests(theirs) and len(ours) >= 3
    assert task.VERSION == theirs.VERSION

    answers = ["I add.\n#### 0", "#### 2 or 3", "so $4, done"]
    for one in (task, theirs):
        for i, instance in enumerate(one.instances):
            choice = (-1.5 * (i % 5) - 3, i % 2 == 0)
            instance.resps = [answers[i] if name == "gsm8k" else choice]
        one.apply_filters()
    for doc_id, doc in task.doc_iterator(limit=3):
        for key in task.instances[0].filtered_resps:
            mine, other = (
                one.process_results(
                    doc, [i.filtered_resps[key] for i in one.instances if i.doc_id == doc_id]
                )
                for one in (task, theirs)
            )
            assert mine.keys() == other.keys()
            for metric in mine:
                assert mine[metric] == pytest.approx(other[metric], abs=1e-12)


@needs_harness
def test_mmlu_is_all_57_subjects_in_the_harness_groups(local):
    assert len(SUBJECTS) == len(set(SUBJECTS)) == 57
    entries = TaskManager().task_index
    for group in ("stem", "other", "social_sciences", "humanities"):
        children = {task.task_name for task in local.groups[f"mmlu_{group}"].get_all_tasks()}
        assert children == entries[f"mmlu_{group}_tasks"].tags
    metrics = {
        name: {"acc,none": i / 57, "acc_stderr,none": 0.1, "sample_len": i + 2}
        for i, name in enumerate(local.tasks)
    }
    total = local.groups["mmlu"].aggregate(metrics)
    subjects = [metrics[f"mmlu_{subject}"] for subject in SUBJECTS]
    weights = [m["sample_len"] for m in subjects]
    expected = sum(m["acc,none"] * w for m, w in zip(subjects, weights, strict=True)) / sum(weights)
    assert total["acc,none"] == pytest.approx(expected) and total["sample_len"] == sum(weights)


@pytest.fixture(scope="module")
def both():
    """Our model and the harness's own of the same weights."""
    if not importlib.util.find_spec("transformers") or not importlib.util.find_spec("accelerate"):
        pytest.skip("compares with the harness's hf model, which needs transformers and accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = str(GOLDEN / "model")
    return FSRL(model=folder), HFLM(folder, device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def both_steered(tmp_path_factory):
    """A steered model, and the harness's own `hf` model of its export."""
    if not importlib.util.find_spec("transformers") or not importlib.util.find_spec("accelerate"):
        pytest.skip("compares with the harness's hf model, which needs transformers and accelerate")
    from lm_eval.models.huggingface import HFLM

    given = zip(STEERED[::2], STEERED[1::2], strict=True)
    ours = FSRL(**{flag[2:].replace("-", "_"): str(value) for flag, value in given})
    folder = tmp_path_factory.mktemp("export") / "hf"
    export(ours.policy, folder)
    return ours, HFLM(str(folder), device="cpu", batch_size=4, trust_remote_code=True)


class Asked:
    def __init__(self, *args):
        self.args = args


@needs_harness
@pytest.mark.parametrize("which", ["both", "both_steered"])
@pytest.mark.parametrize("name", ["truthfulqa_mc2", "mmlu_anatomy"])
def test_scores_equal_those_of_the_harness_own_model(name, which, local, request):
    """Of a base model, and of an exported policy."""
    task, found = local.tasks[name], []
    for lm in request.getfixturevalue(which):
        result = lm_eval.evaluator.evaluate(lm, dict(tasks={name: task}, groups={}), limit=3)
        found.append(result["samples"][name])
    for ours, theirs in zip(*found, strict=True):
        for (logp, greedy), (other, also) in zip(
            ours["filtered_resps"], theirs["filtered_resps"], strict=True
        ):
            assert logp == pytest.approx(other, abs=1e-3) and greedy == also
        assert ours["acc"] == pytest.approx(theirs["acc"], abs=1e-3)


@needs_harness
def test_long_contexts_empty_ones_and_trailing_spaces_equal_the_harness_own(both):
    """Left truncation at the model's 1,024 positions, the <bos> that stands for an empty context,
    moved spaces.
    """
    pairs = [
        ("word " * 900, " and more"),
        ("word " * 900, " x"),
        ("", "Hello there"),
        ("Q: yes?\nA: ", "no"),
        ("a", "b"),
    ]
    ours, theirs = (
        lm.loglikelihood([Asked(*pair) for pair in pairs], disable_tqdm=True) for lm in both
    )
    for (logp, greedy), (other, also) in zip(ours, theirs, strict=True):
        assert logp == pytest.approx(other, abs=1e-3) and greedy == also


@needs_harness
def test_rolling_likelihoods_equal_the_harness_own(both):
    texts = [Asked("the cat sat on a mat, " * 150), Asked("a"), Asked("Zwölf Boxkämpfer\n\njagen")]
    ours, theirs = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in both)
    assert ours == pytest.approx(
        theirs, abs=1e-3, rel=1e-6
    )  # thousands of tokens, summed there in float32


@needs_harness
def test_texts_equal_the_harness_own(both):
    """Greedy, several at once, beyond the window and cut from the left, with a stop string that
    occurs.
    """
    contexts = ["Question: what?\nAnswer:", "long text here " * 300, "x", "x"]
    free = dict(until=["\n\n"], do_sample=False, max_gen_toks=24)
    stopped = both[0].generate_until([Asked("Question: what?\nAnswer:", free)], disable_tqdm=True)[
        0
    ]
    asked = [(c, free) for c in contexts] + [(contexts[0], free | dict(until=[stopped[2:5]]))]
    ours, theirs = (
        lm.generate_until([Asked(c, dict(k)) for c, k in asked], disable_tqdm=True) for lm in both
    )
    assert (
        ours == theirs
        and ours[4] == stopped[: stopped.index(stopped[2:5])]
        and ours[2] == ours[3] != ""
    )


HISTORY = [
    dict(role="user", content=" Hi\n"),
    dict(role="assistant", content="Hello. "),
    dict(role="user", content="Why?"),
]


@pytest.fixture(scope="module")
def both_tiny():
    """Ours and the harness's own of the embedded world, whose tokenizer states a chat template."""
    if not importlib.util.find_spec("transformers") or not importlib.util.find_spec("accelerate"):
        pytest.skip("compares with the harness's hf model, which needs transformers and accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = str(ROOT / "tiny" / "model")
    return FSRL(model="tiny"), HFLM(folder, device="cpu", dtype="float32", batch_size=4)


@needs_harness
def test_the_chat_template_is_that_of_the_tokenizer(both_tiny):
    lm, hf = both_tiny
    system = dict(role="system", content="Be brief.")
    for turns, more in (
        (HISTORY, True),
        (HISTORY[:2], False),
        ([system, *HISTORY], True),
        ([system, *HISTORY[:2]], False),
    ):
        text = lm.apply_chat_template(turns, add_generation_prompt=more)
        assert text == hf.apply_chat_template(turns, add_generation_prompt=more)
        ids = lm.tok_encode(text)
        assert ids == hf.tok_encode(text) and ids.count(lm.prefix_token_id) == 1
    assert lm.chat_template(True) == hf.chat_template(True)
    assert "system" in lm.apply_chat_template([system, *HISTORY])


def test_a_template_that_refuses_a_system_message_gets_the_turns_without_it():
    """As Gemma-2's published template does."""
    source = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    template = ChatTemplate(source, dict(bos_token="<bos>"))
    whole = template.render(HISTORY)
    assert whole == "<bos>[user] Hi\n[assistant] Hello.\n[user] Why?\n[model]"
    assert template.render([dict(role="system", content="Be brief."), *HISTORY]) == whole
    assert template.render(HISTORY[:2], False) == "<bos>[user] Hi\n[assistant] Hello."
    kept = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}!", {})
    assert kept.render(HISTORY[:2], False) == " Hi\nHello. "


def test_a_template_comes_from_others_and_may_do_nothing(tmp_path):
    with pytest.raises(UserError, match="states no chat template"):
        ChatTemplate.from_folder(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for source, message in (
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses a prompt"),
        ("{% for %}", "states no valid template"),
    ):
        config.write_text(json.dumps(dict(chat_template=source)))
        with pytest.raises(UserError, match=message):
            ChatTemplate.from_folder(tmp_path).render(HISTORY)
    config.write_text(json.dumps(dict(chat_template=[dict(name="default", template="named")])))
    assert ChatTemplate.from_folder(tmp_path).render(HISTORY) == "named"
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    assert ChatTemplate.from_folder(tmp_path).render(HISTORY) == "a file of its own"


@needs_harness
@pytest.mark.parametrize("name", ["gsm8k", "mmlu_anatomy", "truthfulqa_mc2"])
def test_scores_under_the_chat_template_equal_the_harness_own(name, both_tiny, local):
    """The harness's own evaluation of its own model, told apply_chat_template alone: turns, worked
    examples and system message are rendered alike.
    """
    lm, hf = both_tiny
    task = local.tasks[name]
    ours = harness.evaluate_task(lm, name, task, limit=2, chat_template=True).samples
    our_requests = [instance.arguments for instance in task.instances]
    same = SimpleNamespace(load=lambda _: dict(tasks={name: task}, groups={}), task_index={})
    settings = dict(task_manager=same, limit=2, bootstrap_iters=0, apply_chat_template=True)
    found = lm_eval.evaluator.simple_evaluate(hf, tasks=[name], **settings)
    theirs = found["samples"][name]
    once = [sample for sample in theirs if sample["filter"] == theirs[0]["filter"]]
    asked = [arguments for sample in once for arguments in sample["arguments"]]
    assert our_requests == asked
    assert "<start_of_turn>user" in asked[0][0]
    for mine, other in zip(ours, theirs, strict=True):
        if name == "gsm8k":
            assert mine["responses"] == other["filtered_resps"]
            continue
        pairs = zip(mine["responses"], other["filtered_resps"], strict=True)
        for (logp, greedy), (its, also) in pairs:
            assert logp == pytest.approx(its, abs=1e-3) and greedy == also


@needs_harness
def test_generation_settings():
    until, most, sampling = generation(
        dict(until="\n", max_gen_toks=7, do_sample=False, temperature=0.7), 3
    )
    assert (until, most, sampling.temperature, sampling.seed) == (["\n"], 7, 0.0, 3)
    assert generation(dict(temperature=0.7, top_p=0.9, do_sample=True), 0)[2].top_p == 0.9
    assert generation({}, 0)[:2] == ([], harness.MAX_NEW_TOKENS)
    with pytest.raises(UserError, match="num_beams"):
        generation(dict(num_beams=4), 0)
    assert before("one two three", ["three", "wo"]) == "one t" and before("one", ["x"]) == "one"


@needs_harness
def test_repeated_requests_are_sampled_anew():
    lm = FSRL(model=str(GOLDEN / "model"))
    sampled = dict(do_sample=True, temperature=2.0, max_gen_toks=12)
    texts = lm.generate_until(
        [Asked("x", sampled), Asked("y", sampled), Asked("x", sampled)], disable_tqdm=True
    )
    again = lm.generate_until([Asked("x", sampled)], disable_tqdm=True)
    assert texts[0] != texts[2] and texts[0] == again[0]


@needs_harness
def test_a_steered_run_end_to_end_by_both_command_lines(questions, tmp_path, monkeypatch, capsys):
    """Our script, and the harness's own `--model fsrl`, on the same documents: the same scores."""
    limits = ("--limit", 3, "--tasks", "truthfulqa_mc2")
    flags = (*STEERED, "--data-dir", questions, "--out", tmp_path, *limits)
    monkeypatch.setattr(sys, "argv", ["evals", *map(str, flags)])
    run.main()
    printed = capsys.readouterr().out
    folder = tmp_path / "eval" / "benchmarks"
    ours = json.loads((folder / "results.json").read_text())
    assert {"model_sha256", "adapter_sha256", "sae_sha256", "data_sha256"} <= ours[
        "identity"
    ].keys()
    assert len((folder / "results.csv").read_text().splitlines()) == 2
    (row,) = ours["results"]
    assert row["documents"] == 3 and f"{row['value']:.4f} ± {row['stderr']:.4f}" in printed
    samples = json.loads((folder / "truthfulqa_mc2.json").read_text())["samples"]
    assert row["value"] == pytest.approx(sum(s["acc"] for s in samples) / 3)
    task = load_tasks(("truthfulqa_mc2",), str(questions)).tasks["truthfulqa_mc2"]
    lm = FSRL(model=str(GOLDEN / "model"))
    base = harness.evaluate_task(lm, "truthfulqa_mc2", task, limit=1)
    assert abs(base.samples[0]["responses"][0][0] - samples[0]["responses"][0][0]) > 1e-3, (
        "the run is steered"
    )

    code = "import evals.harness, lm_eval.__main__ as harness; harness.cli_evaluate()"
    where = dict(run="adapter_mid", model="model", sae="sae")
    model = ",".join(f"{key}={GOLDEN / name}" for key, name in where.items()) + f",sae_id={SAE_ID}"
    theirs = script(
        *("-c", code, "run", "--model", "fsrl", "--model_args", model, "--device", "auto"),
        *(
            "--include_path",
            "evals/tasks",
            "--metadata",
            f"data_dir={questions}",
            "--output_path",
            tmp_path / "theirs.json",
            *limits,
        ),
    )
    assert theirs.returncode == 0, theirs.stderr
    (file,) = tmp_path.glob("theirs*.json")
    found = json.loads(file.read_text())["results"]["truthfulqa_mc2"]
    assert found["acc,none"] == pytest.approx(row["value"], abs=1e-6)
    assert found["acc_stderr,none"] == pytest.approx(row["stderr"], abs=1e-6)


@needs_harness
def test_the_simpo_loss_stands_beside_the_papers(tiny_run, questions, tmp_path, capsys):
    """A trained run's own last evaluation; the paper's figure for models of its shape, and for no
    other.
    """
    last = metrics(tiny_run, "eval")[-1]
    s = Settings(
        run=str(tiny_run),
        tasks=("truthfulqa_mc2",),
        data_dir=str(questions),
        limit=1,
        out=str(tmp_path),
    )
    run.evaluate(s)
    shown = capsys.readouterr().out
    assert f"{last['loss']:.4f}" in shown and "paper" not in shown
    found = json.loads((tmp_path / "eval" / "benchmarks" / "results.json").read_text())["results"]
    assert [row["task"] for row in found] == ["simpo", "truthfulqa_mc2"]
    assert found[0]["value"] == last["loss"] and found[0]["documents"] == last["pairs"]

    of_2b = SimpleNamespace(config=SimpleNamespace(hidden_size=2304))
    for steered, figure in ((load().steered, 2.73), (Unsteered(None), 2.19)):
        opened = SimpleNamespace(folder=tiny_run, base=of_2b, model=steered)
        own, paper = run.simpo_scores(opened)
        assert own[0].value == last["loss"] and paper[0].value == figure
        print(run.table(dict(run=own + [Score(**row) for row in found[1:]], paper=paper)))
        header, simpo, _ = capsys.readouterr().out.strip("\n").splitlines()
        assert header.split()[-2:] == ["run", "paper"] and simpo.split()[-1] == f"{figure:.4f}"
    assert run.simpo_scores(SimpleNamespace(folder=None, base=of_2b, model=None)) == ([], [])


@needs_harness
def test_an_interrupted_run_goes_on_with_the_next_task(questions, tmp_path, monkeypatch, capsys):
    asked, interrupted, real = [], True, harness.evaluate_task

    def evaluate_task(lm, name, *rest):
        if interrupted and asked:
            raise KeyboardInterrupt
        asked.append(name)
        return real(lm, name, *rest)

    monkeypatch.setattr(harness, "evaluate_task", evaluate_task)
    names = ("truthfulqa_mc2", "truthfulqa_mc1")
    settings = dict(
        model=str(GOLDEN / "model"), data_dir=str(questions), limit=2, out=str(tmp_path)
    )
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(Settings(tasks=names, **settings))
    assert asked == ["truthfulqa_mc2"] and not (tmp_path / "eval/benchmarks/results.json").exists()
    interrupted = False
    run.evaluate(Settings(tasks=names, **settings))
    assert asked == ["truthfulqa_mc2", "truthfulqa_mc1"]
    whole = json.loads((tmp_path / "eval/benchmarks/results.json").read_text())["results"]
    assert [row["task"] for row in whole] == list(names)
    with pytest.raises(UserError, match=r"truthfulqa_mc2.json: holds a result with limit 2, not 3"):
        run.evaluate(Settings(tasks=names, **settings | dict(limit=3)))

    other = tmp_path / "other"
    run.evaluate(
        Settings(tasks=names[:1], **settings | dict(out=str(other)), beside=(str(tmp_path),))
    )
    assert capsys.readouterr().out.count(f"{whole[0]['value']:.4f} ± {whole[0]['stderr']:.4f}") >= 3
    with pytest.raises(UserError, match="limit 2, not 1"):
        fresh = settings | dict(limit=1, out=str(tmp_path / "third"))
        run.evaluate(Settings(tasks=names[:1], **fresh, beside=(str(tmp_path),)))


@needs_harness
def test_mistakes_are_one_sentence(questions, tmp_path):
    model, folder = dict(model=str(GOLDEN / "model"), out=str(tmp_path)), str(questions)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "truthfulqa_mc.jsonl").write_text('{"question": "?", "mc1_targets": {}}\n')

    def refused(match, **settings):
        with pytest.raises(UserError, match=match):
            run.evaluate(Settings(**model | settings))

    refused("--tasks", tasks=())
    refused("--limit 0", tasks=("gsm8k",), limit=0)
    refused("--tasks nonsense", tasks=("nonsense",), data_dir=folder)
    refused("gsm8k_train", tasks=("gsm8k",), data_dir=str(broken))
    refused("nowhere", tasks=("gsm8k",), data_dir="nowhere")
    refused(
        "truthfulqa_mc.jsonl row 0: its mc2_targets is None",
        tasks=("truthfulqa_mc2",),
        data_dir=str(broken),
    )
    refused("--tasks gsm8k", tasks=("gsm8k",), data_dir=folder, num_fewshot=40)
    refused("--max-length 5000", tasks=("gsm8k",), data_dir=folder, max_length=5000)
    refused("states no chat template", tasks=("gsm8k",), data_dir=folder, chat_template=True)


def test_columns_of_one_name_are_told_apart():
    assert run.titles(ROOT / "a" / "x", ("b/x", "c/y")) == ["x (a)", "x (b)", "y"]
    for again in (str(ROOT / "a" / "x"), str(ROOT / "b" / ".." / "a" / "x"), "other/a/x"):
        with pytest.raises(UserError, match="--beside .*x: a column of the table has its name"):
            run.titles(ROOT / "a" / "x", (again,))


def test_the_results_of_a_run_on_the_hub_are_not_written_to_its_cache(tmp_path):
    opened = SimpleNamespace(folder=tmp_path, name=str(tmp_path))
    for name, out in (("own/name@v1", "runs/name"), (str(tmp_path), tmp_path)):
        assert run.out_of(Settings(run=name, tasks=("gsm8k",)), opened) == Path(out)


def test_the_tokenizer_identifies_a_score(tmp_path):
    shutil.copytree(GOLDEN / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    opened, s = open_policy(None, model=str(tmp_path / "model")), Settings(tasks=("gsm8k",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "version", lambda _: "1")
        known = [run.identity(opened, s, 8)]
        for name in run.TOKENIZER:
            (tmp_path / "model" / name).write_text("changed")
            known.append(run.identity(opened, s, 8))
    assert len({str(i) for i in known}) == len(known)


def test_without_the_harness_help_works_and_a_run_says_what_to_install(monkeypatch, capsys):
    """lm_eval and datasets are optional: nothing is loaded before it is needed."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import of it raises ModuleNotFoundError
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "evals.harness", raising=False)
    monkeypatch.delattr(evals, "harness", raising=False)

    def ends(*flags):
        monkeypatch.setattr(sys, "argv", ["evals", *flags])
        code = 0
        try:
            cli.run(run.main)
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    code, out, _ = ends("--help")
    assert code == 0 and "--num-fewshot" in out
    code, out, err = ends("--tasks", "gsm8k", "--model", "tiny")
    assert code == 2 and "requirements-eval.txt" in err and len(err.splitlines()) == 1
    code, out, err = ends("--tasks", "gsm8k", "--limit", "0")
    assert code == 2 and "--limit 0" in err and len(err.splitlines()) == 1


def test_each_tasks_own_number_of_worked_examples_is_the_default():
    """The paper states neither shots nor template, so nothing here claims a number for it."""
    assert Settings(tasks=("x",)).num_fewshot is None
    text = (ROOT / "evals" / "run.py").read_text() + (ROOT / "evals" / "README.md").read_text()
    assert "--num-fewshot 5" not in text


@needs_harness
@pytest.mark.skipif(
    not importlib.util.find_spec("accelerate"), reason="compares with the harness's hf model"
)
def test_the_benchmark_finds_the_same_scores(questions):
    flags = ("--shape", "tiny", "--limit", 2, "--rounds", 1, "--batch-sizes", 2)
    result = script("-m", "benchmarks.evals", *flags, "--data-dir", questions)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    assert (
        line["largest_logp_difference"] < 1e-3
        and line["greedy_differences"] == 0
        and line["ratio"] > 0
    )
