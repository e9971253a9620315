"""The Hub route: the real huggingface-hub client against a loopback server in the Hub's place.

`Hub` serves the golden model, SAE and dataset under the default ids of train.py, each at two
commits (branch main, tag v1) and beside files that nobody should ask for. Runs are processes of
their own, because the client reads HF_ENDPOINT and HF_HOME when it is imported.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from conftest import GOLDEN, SAE_ID, metrics, script, small_gemma3
from forked import Run, golden
from safetensors.torch import load, save

import sae as saes
import train
from audit import card
from experiments.train_sae import save_gemmascope2
from runtime import folder as run_folder
from runtime import sae_ids
from runtime.sources import UserError

MODEL, SAE = "google/gemma-2-2b-it", "google/gemma-scope-2b-pt-res"
DATA = "princeton-nlp/llama3-ultrafeedback-armorm"
PAGE = 10  # entries of a listing per answer; the Hub's own pages hold 1,000
LOWEST, SECOND = (
    "layer_1/width_65k/average_l0_8",
    "layer_1/width_65k/average_l0_30",
)  # the first is golden
SHARD = "model-00003-of-00008.safetensors"


# --- a small Hub ----------------------------------------------------------------------------------


class Repo:
    """Files by commit; a commit is the hash of what it holds. refs: branches and tags."""

    def __init__(
        self, main: dict[str, bytes], v1: dict[str, bytes] | None = None, gated: bool = False
    ):
        self.gated, self.commits, self.refs = gated, {}, {}
        for ref, files in (("main", main), ("v1", v1)):
            if files is not None:
                self.refs[ref] = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
                self.commits[self.refs[ref]] = files


class Hub(ThreadingHTTPServer):
    """Serves `repos`, by "models/owner/name" or "datasets/owner/name"; remembers what was asked.

    fault: None, "503" (an answer that is none) or "cut" (the connection closes without one).
    """

    daemon_threads = True

    def __init__(self, repos: dict[str, Repo]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.asked, self.fault = repos, [], None
        self.commits, self.cards = [], []  # (repository, its files) of each, and cards to validate
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(
            target=self.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True
        ).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def downloads(self) -> set[str]:
        """repository@commit/path of every file asked for."""
        files = filter(None, map(Handler.file_of, self.asked))
        return {f"{repo}@{revision}/{path}" for repo, revision, path in files}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    API = re.compile(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
    FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")

    @classmethod
    def file_of(cls, path: str) -> tuple[str, str, str] | None:
        found = cls.FILE.fullmatch(path)
        return found and ((found[1] or "models/") + found[2], unquote(found[3]), unquote(found[4]))

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.asked.append(url.path)
        if self.server.fault == "cut":
            self.close_connection = True
        elif self.server.fault == "503":
            self.answer(503)
        elif found := self.API.fullmatch(url.path):
            repo, question, revision = found[1], found[2], unquote(found[3] or "main")
            self.with_commit(repo, revision, self.tree if question == "tree" else self.info)
        elif found := self.file_of(url.path):
            self.with_commit(
                found[0], found[1], lambda repo, commit: self.file(repo, commit, found[2])
            )
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self):
        """The four questions of an upload. A commit is lines of json, each file in base64."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url, repos = urlsplit(self.path), self.server.repos
        name = self.API.match(url.path)
        if url.path == "/api/repos/create":
            name = "models/{organization}/{name}".format(**json.loads(body))
            repos.setdefault(name, Repo({}))
            return self.answer(200, json.dumps(dict(url=f"{self.server.endpoint}/{name}")).encode())
        if url.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self.answer(200, json.dumps(dict(errors=[], warnings=[])).encode())
        if name[1].endswith("/forbidden"):
            return self.answer(403)
        if url.path.endswith("/preupload/main"):
            files = [
                dict(f, uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]
            ]
            return self.answer(200, json.dumps(dict(files=files)).encode())
        rows = [json.loads(line) for line in body.splitlines()]
        added = [row["value"] for row in rows if row["key"] == "file"]
        files = {f["path"]: base64.b64decode(f["content"]) for f in added}
        repos[name[1]] = Repo(files)
        self.server.commits.append((name[1], sorted(files)))
        done = dict(
            commitOid="0" * 40,
            commitUrl=f"{self.server.endpoint}/{name[1][7:]}/commit/{'0' * 40}",
            success=True,
        )
        self.answer(200, json.dumps(done).encode())

    def with_commit(self, name: str, revision: str, then) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            return self.refuse(404, "RepoNotFound")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        then(repo, commit)

    def info(self, repo: Repo, commit: str) -> None:
        name = self.API.fullmatch(urlsplit(self.path).path)[1].split("/", 1)[1]
        self.answer(
            200, json.dumps(dict(id=name, sha=commit, gated=repo.gated, private=False)).encode()
        )

    def tree(self, repo: Repo, commit: str) -> None:
        url, files = urlsplit(self.path), sorted(repo.commits[commit].items())
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        stop = start + PAGE
        entries = [
            dict(type="file", path=p, size=len(b), oid=etag(b)) for p, b in files[start:stop]
        ]
        more = f'<{self.server.endpoint}{url.path}?recursive=true&cursor={stop}>; rel="next"'
        self.answer(
            200, json.dumps(entries).encode(), **(dict(Link=more) if stop < len(files) else {})
        )

    def file(self, repo: Repo, commit: str, path: str) -> None:
        if repo.gated:  # who has not accepted a licence sees the listing, not the files
            return self.refuse(401, "GatedRepo")
        if path not in repo.commits[commit]:
            return self.refuse(404, "EntryNotFound")
        body = repo.commits[commit][path]
        about = {"ETag": f'"{etag(body)}"', "X-Repo-Commit": commit}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return self.answer(206, body[int(asked[1]) : int(asked[2]) + 1], **about)
        self.answer(200, body, **about)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, json.dumps(dict(error=code)).encode(), **{"X-Error-Code": code})

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


# --- what it serves -------------------------------------------------------------------------------


def folder(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def louder(shard: bytes) -> bytes:
    """The same tensors, each one and a half times as large."""
    return save({name: 1.5 * tensor for name, tensor in load(shard).items()})


UNWANTED = dict.fromkeys(
    ("README.md", ".gitattributes", "pytorch_model.bin", "original/model.pt"), b"unread"
)
PAPER = {6: 17, 12: 21, 18: 21, 24: 19}  # layer -> average L0 of the SAE that the paper used


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    model, data = folder(GOLDEN / "model"), folder(GOLDEN / "dataset")
    del model["config.hub_style.json"]
    golden_sae = saes.JumpReLUSAE.from_pretrained(GOLDEN / "sae" / SAE_ID)
    other_npz = tmp_path_factory.mktemp("sae") / "params.npz"
    saes.save_gemmascope(other_npz, {name: 2 * getattr(golden_sae, name) for name in saes.ARRAYS})
    others = [f"layer_1/width_{rest}" for rest in ("65k/average_l0_107", "16k/average_l0_5")]
    others += ["layer_2/width_65k/average_l0_4"]
    for layer, l0 in PAPER.items():
        others += [f"layer_{layer}/width_65k/average_l0_{n}" for n in (l0, l0 + 1, 10 * l0, 107)]
        others += [f"layer_{layer}/width_16k/average_l0_{l0 - 1}"]
    v1_sae = {f"{SECOND}/params.npz": other_npz.read_bytes()} | UNWANTED
    sae = v1_sae | {f"{place}/params.npz": other_npz.read_bytes() for place in others}
    sae |= {
        "layer_1/width_65k/average_l0_2/notes.txt": b"",
        "layer_12/width_65k/average_l0_3/notes.txt": b"",
    }
    sae[f"{LOWEST}/params.npz"] = (GOLDEN / "sae" / SAE_ID / "params.npz").read_bytes()
    hub = Hub(
        {
            f"models/{MODEL}": Repo(
                model | UNWANTED, model | UNWANTED | {SHARD: louder(model[SHARD])}
            ),
            f"models/{SAE}": Repo(sae, v1_sae),
            f"datasets/{DATA}": Repo(data | UNWANTED, data | UNWANTED | {"README.md": b"of v1"}),
            "models/owner/torn": Repo(
                {name: body for name, body in model.items() if name != SHARD}
            ),
            "models/owner/gated": Repo(model, gated=True),
        }
    )
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def dead() -> SimpleNamespace:
    """A server that was there and is no more: its port refuses connections."""
    gone = Hub({})
    gone.close()
    return gone


def client(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a user of this Hub, with all that the client keeps under `home`."""
    kept = dict(HF_HOME="", HF_HUB_CACHE="hub", HF_XET_CACHE="xet", HF_TOKEN_PATH="token")
    plain = dict(HF_TOKEN="", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    reach = dict(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", no_proxy="127.0.0.1")
    return reach | plain | {name: str(home / place) for name, place in kept.items()}


BRIEF = ("--layer", 1, "--batch-size", 4, "--max-steps", 2, "--eval-every", 0, "--device", "cpu")


def hub_run(hub: Hub, home: Path, out: Path, *arguments):
    """train.py with its default ids: two steps at layer 1."""
    return Run([*BRIEF, "--out", out, *arguments], env=client(hub, home)).wait()[0]


def succeeded(result, out: Path) -> SimpleNamespace:
    """What a run left: rows without timings, config.json, adapter_config.json, adapter bytes."""
    assert result.returncode == 0, result.stderr
    timed = ("seconds", "tokens_per_second")
    rows = [*metrics(out, "train"), *metrics(out, "eval")]
    rows = [{k: v for k, v in row.items() if k not in timed} for row in rows]
    assert [row["step"] for row in rows] == [1, 2, 0, 2]
    return SimpleNamespace(
        rows=rows,
        config=json.loads((out / "config.json").read_text()),
        adapter=json.loads((out / "adapter" / "adapter_config.json").read_text()),
        weights=(out / "adapter" / "adapter.safetensors").read_bytes(),
    )


@pytest.fixture(scope="module")
def first(hub, tmp_path_factory) -> SimpleNamespace:
    """The first run on a new machine, everything by default; `home` then holds its downloads."""
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("first")
    hub.asked.clear()
    run = succeeded(hub_run(hub, home, out), out)
    run.home, run.out, run.downloads = home, out, hub.downloads()
    return run


def expect_sentence(result, *words: str) -> None:
    """Exit code 2, and the last line on stderr is one sentence with all of `words`."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    sentence = result.stderr.splitlines()[-1]
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence


# --- tests ----------------------------------------------------------------------------------------


def test_default_ids_train_as_the_same_files_on_disk_do(first, tmp_path):
    local = succeeded(golden(tmp_path, *BRIEF)[0], tmp_path)
    assert first.rows == local.rows
    assert first.weights == local.weights
    assert first.adapter["sae_sha256"] == local.adapter["sae_sha256"]
    assert sorted(first.config["sha256"].values()) == sorted(local.config["sha256"].values())


def test_a_run_records_ids_and_commits(hub, first):
    commit = {name: repo.refs["main"] for name, repo in hub.repos.items()}
    recorded = dict(
        base_model=MODEL, base_model_revision=commit[f"models/{MODEL}"], sae=SAE, sae_id=LOWEST
    )
    assert recorded.items() <= first.adapter.items()
    assert recorded.items() <= first.config["adapter"].items()
    assert first.config["data_revision"] == commit[f"datasets/{DATA}"]
    assert (first.config["settings"]["data"], first.config["settings"]["sae_id"]) == (DATA, None)


def test_only_wanted_files_are_downloaded(hub, first):
    wanted = {
        f"models/{MODEL}": {*folder(GOLDEN / "model")} - {"config.hub_style.json"},
        f"models/{SAE}": {f"{LOWEST}/params.npz"},
        f"datasets/{DATA}": {*folder(GOLDEN / "dataset")},
    }
    main = {name: repo.refs["main"] for name, repo in hub.repos.items()}
    assert first.downloads == {
        f"{name}@{main[name]}/{path}" for name in wanted for path in wanted[name]
    }


def test_revisions_are_pinned(hub, first, tmp_path):
    names = (f"models/{MODEL}", f"models/{SAE}", f"datasets/{DATA}")
    model, _, data = v1 = [hub.repos[name].refs["v1"] for name in names]
    hub.asked.clear()
    pins = ("--model", f"{MODEL}@v1", "--sae", f"{SAE}@v1", "--data", f"{DATA}@{data}")
    run = succeeded(hub_run(hub, tmp_path / "home", tmp_path / "out", *pins), tmp_path / "out")
    assert run.adapter["base_model_revision"] == model != first.adapter["base_model_revision"]
    assert run.config["data_revision"] == data != first.config["data_revision"]
    assert run.adapter["sae_id"] == SECOND  # the only one that v1 holds
    assert run.adapter["sae_sha256"] != first.adapter["sae_sha256"]
    assert {re.search("@([0-9a-f]{40})/", file)[1] for file in hub.downloads()} == set(v1)
    sha256 = {Path(path).name: digest for path, digest in run.config["sha256"].items()}
    assert sha256[SHARD] == hashlib.sha256(hub.repos[names[0]].commits[model][SHARD]).hexdigest()
    before = [next(r["loss"] for r in rows if r["step"] == 0) for rows in (run.rows, first.rows)]
    assert abs(before[0] - before[1]) > 1e-3


NO_SAE = "layer_1/width_65k/average_l0_9"
MISTAKES = {  # flags -> what the sentence names
    ("--model", f"{MODEL}@v9"): (f"--model {MODEL}", "no revision 'v9'"),
    ("--model", "owner/nothing", "--sae", SAE): ("--model owner/nothing", "no such model"),
    ("--model", "owner/no--id", "--sae", SAE): ("--model owner/no--id", "'owner/no--id'"),
    ("--model", "owner/gated", "--sae", SAE): ("--model owner/gated", "gated", "licence"),
    ("--model", "owner/torn", "--sae", SAE): (SHARD, "missing"),
    ("--sae", "owner/nothing"): ("--sae owner/nothing", "no such model"),
    ("--sae-id", NO_SAE): (f"--sae {SAE}", f"--sae-id {NO_SAE}"),
    ("--sae", f"{SAE}@v9"): (f"--sae {SAE}", "no revision 'v9'"),
    ("--layer", "3"): ("--layer 3", SAE, "width 65k", "--sae-id"),
    ("--data", "owner/nothing"): ("--data owner/nothing", "no such dataset"),
    ("--data", f"{DATA}@v9"): (f"--data {DATA}", "no revision 'v9'"),
}
SEVERAL = """
import contextlib, io, json, sys, traceback
import train
from runtime import cli
told = []
for flags in json.loads(sys.argv[1]):
    sys.argv[1:], code = flags, 0
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            cli.run(train.main)
        except SystemExit as e:
            code = e.code
        except Exception:
            code = traceback.print_exc() or 1
    told.append([code, stderr.getvalue()])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def mistaken(hub, first, tmp_path_factory) -> dict:
    """What train.py says to each of MISTAKES, all in one process, which imports torch once."""
    outs = [tmp_path_factory.mktemp("mistake") / "out" for _ in MISTAKES]
    runs = [
        [*map(str, BRIEF), "--out", str(out), *flags]
        for flags, out in zip(MISTAKES, outs, strict=True)
    ]
    result = script("-c", SEVERAL, json.dumps(runs), env=client(hub, first.home))
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    ends = [
        SimpleNamespace(returncode=c, stderr=e, out=out)
        for (c, e), out in zip(told, outs, strict=True)
    ]
    return dict(zip(MISTAKES, ends, strict=True))


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_what_the_hub_does_not_have_is_said_in_one_sentence(mistaken, flags):
    expect_sentence(mistaken[flags], *MISTAKES[flags])
    assert not mistaken[flags].out.exists()


def test_a_dead_server_leaves_the_cached_copy(dead, first, tmp_path):
    run = succeeded(hub_run(dead, first.home, tmp_path), tmp_path)
    assert run.rows == first.rows
    assert run.adapter == first.adapter
    for key in ("adapter", "data_revision", "sha256"):
        assert run.config[key] == first.config[key]


def test_a_dead_server_and_no_copy_is_said_in_one_sentence(dead, tmp_path):
    result = hub_run(dead, tmp_path / "home", tmp_path / "out")
    expect_sentence(result, f"--model {MODEL}", "the Hub did not answer", "no whole copy is cached")
    assert not (tmp_path / "out").exists()


ASK = """
import json, sys
from runtime import sources
told = []
for question, *arguments in json.loads(sys.argv[1]):
    try:
        answer = getattr(sources, question)(*arguments)
        told.append(["ok", answer if question == "list_files" else answer.revision])
    except sources.UserError as e:
        told.append(["error", str(e)])
print(json.dumps(told))
"""


def ask(hub: Hub, home: Path, *questions: tuple) -> list[tuple[str, object]]:
    """Functions of sources.py, called in one fresh process."""
    result = script("-c", ASK, json.dumps(questions), env=client(hub, home))
    assert result.returncode == 0, result.stderr
    return [tuple(pair) for pair in json.loads(result.stdout)]


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_failing_server_never_ends_in_a_traceback(hub, first, tmp_path, fault):
    fetch, files = ("fetch", SAE, "sae", [f"{LOWEST}/*"]), ("list_files", SAE, "sae")
    hub.fault = fault
    try:
        cached, unknown = ask(hub, first.home, files, fetch), ask(hub, tmp_path, files, fetch)
    finally:
        hub.fault = None
    repo = hub.repos[f"models/{SAE}"]
    assert cached[0] == ("ok", sorted(repo.commits[repo.refs["main"]]))
    if fault == "503":
        assert cached[1] == ("ok", repo.refs["main"])
    else:
        assert cached[1][0] == "error" and "--sae" in cached[1][1]
    for kind, sentence in unknown:
        assert (
            kind == "error"
            and sentence.startswith(f"--sae {SAE}: the Hub")
            and "\n" not in sentence
        )


def test_the_papers_sae_of_each_layer_is_the_lowest_l0_of_the_listing(hub, tmp_path, monkeypatch):
    listed = f"[sae_ids.default_id('{SAE}', n) for n in {[*PAPER]}]"
    program = "import json; from runtime import sae_ids; sae_ids.PAPER_REPO = None; "
    program += f"print(json.dumps({listed}))"
    result = script("-c", program, env=client(hub, tmp_path))
    assert result.returncode == 0, result.stderr
    paper = [f"layer_{layer}/width_65k/average_l0_{l0}" for layer, l0 in PAPER.items()]
    assert json.loads(result.stdout) == paper
    monkeypatch.setattr(sae_ids, "list_files", None)  # these four are known without asking
    assert [sae_ids.default_id(SAE, layer) for layer in PAPER] == paper


def test_a_published_adapter_is_opened_and_trained_on_by_its_id(hub, first, tmp_path):
    """The adapter folder, uploaded as it is, is enough: it names model, SAE and layer."""
    hub.repos["models/owner/adapter"] = Repo(
        folder(first.out / "adapter") | {"notes.bin": b"unread"}
    )
    hub.asked.clear()
    flags = ("--prompt", "A question", "--max-new-tokens", 3, "--trace", "-", "--device", "cpu")
    result = script(
        "-m", "generation", "--run", "owner/adapter", *flags, env=client(hub, first.home)
    )
    assert result.returncode == 0, result.stderr
    assert {name.split("/")[-1] for name in hub.downloads()} == {
        "adapter.safetensors",
        "adapter_config.json",
    }
    again = succeeded(
        hub_run(hub, first.home, tmp_path / "on", "--init-adapter", "owner/adapter"),
        tmp_path / "on",
    )
    ended = [row for row in first.rows if "margin" in row][-1]
    assert (
        again.rows[2]["loss"] == ended["loss"]
    )  # evaluated before its first step: where the other run stopped
    result = script(
        "-m", "generation", "--run", "owner/nothing", *flags, env=client(hub, first.home)
    )
    assert result.returncode == 2 and result.stderr.startswith(
        "--run owner/nothing: no such model on the Hub"
    )


def test_push_to_uploads_adapter_card_and_report_in_one_commit(hub, first, tmp_path):
    """A run that is finished is not trained again, and one that was audited keeps its report."""
    out = shutil.copytree(first.out, tmp_path / "out")
    card.write_card(out)
    (out / "report.html").write_text("a report")
    user = client(hub, first.home) | dict(HF_TOKEN="hf_writes")
    flags = ("--out", out, "--resume", "--push-to", "owner/pushed")
    result = script("train.py", *BRIEF, *flags, env=user)
    assert result.returncode == 0, result.stderr
    files = ["README.md", "adapter.safetensors", "adapter_config.json", "report.html"]
    assert hub.commits == [("models/owner/pushed", files)] and "Uploaded to" in result.stdout
    held = next(iter(hub.repos["models/owner/pushed"].commits.values()))
    assert held["adapter.safetensors"] == first.weights and held["report.html"] == b"a report"

    text = held["README.md"].decode()
    assert hub.cards == [text]  # which the Hub was asked to validate
    data = huggingface_hub.ModelCard(text).data  # raises for metadata that are none
    for name in (data.base_model, *data.datasets):
        huggingface_hub.utils.validate_repo_id(name)
    wanted = dict(base_model=MODEL, base_model_relation="adapter", license="gemma")
    wanted |= dict(datasets=[DATA], library_name="fsrl")
    assert {k: v for k, v in data.to_dict().items() if k != "tags"} == wanted
    assert "fsrl" in data.tags and len(data.tags) == len(set(data.tags))
    before, after = (row["loss"] for row in metrics(out, "eval"))
    assert f"| SimPO loss | {before:.3f} | {after:.3f} |" in text

    asked = [("upload", {"x": str(out / "config.json")}, "owner/forbidden", "no")]
    ((kind, sentence),) = ask(hub, first.home, *asked)
    assert kind == "error" and "\n" not in sentence
    assert (
        sentence.startswith("--push-to owner/forbidden: the Hub did not take it (")
        and "403" in sentence
    )


def test_push_to_audits_first_and_refuses_early(first, tmp_path, monkeypatch):
    commands = []

    def run(command, cwd):
        commands.append(command[1:])
        return SimpleNamespace(returncode=2)

    out = shutil.copytree(first.out, tmp_path / "out")
    monkeypatch.setattr(run_folder.subprocess, "run", run)
    with pytest.raises(UserError, match="--push-to owner/name: nothing was uploaded"):
        run_folder.push(out, "owner/name")
    assert commands == [["-m", "audit", "--run", str(out)]]

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for name, sentence in {
        "owner": "OWNER/NAME on the Hub was expected",
        "owner/name@v1": "OWNER/NAME on the Hub was expected",
        "owner/name": "needs a token that may write; run `hf auth login`",
    }.items():
        with pytest.raises(UserError, match=f"--push-to {name}: {sentence}"):
            train.Settings(model="tiny", sae="tiny", push_to=name)


def test_a_reference_is_small_and_loads_base_and_sae_by_their_commits(hub, first, tmp_path):
    pytest.importorskip("transformers", reason="exports are for transformers")
    flags = ("--run", first.out, "--to", tmp_path / "hf", "--reference")
    result = script("-m", "generation.export", *flags, env=client(hub, first.home))
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    main = {name: repo.refs["main"] for name, repo in hub.repos.items()}
    named = dict(base_model=MODEL, base_model_revision=main[f"models/{MODEL}"], sae=SAE)
    named |= dict(sae_file=f"{LOWEST}/params.npz", sae_revision=main[f"models/{SAE}"])
    assert named.items() <= config.items()
    shapes = {
        n: list(t.shape)
        for n, t in load((tmp_path / "hf" / "steering.safetensors").read_bytes()).items()
    }
    assert shapes == {"weight": [256, 64], "bias": [256], "threshold": [256]}

    full = ("--run", first.out, "--to", tmp_path / "full")
    result = script("-m", "generation.export", *full, env=client(hub, first.home))
    assert result.returncode == 0, result.stderr
    compare = f"""
import torch, transformers
ids = torch.arange(4, 40)[None]
for cls in (transformers.AutoModelForCausalLM, transformers.AutoModel):
    by_name, whole = (
        cls.from_pretrained("{tmp_path}/" + folder, trust_remote_code=True).eval()
        for folder in ("hf", "full")
    )
    state = whole.state_dict()
    assert by_name.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in by_name.state_dict().items())
    assert torch.equal(by_name(ids)[0], whole(ids)[0])
"""
    result = script("-c", compare, env=client(hub, tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert "newly initialized" not in result.stderr


# --- Gemma 3 --------------------------------------------------------------------------------------

GEMMA3, SCOPE2 = "google/gemma-3-270m-it", "google/gemma-scope-2-270m-it"
SMALL = "resid_post/layer_1_width_65k_l0_small"
SCOPE2_LOADED = """
import sys, torch
from sae_lens.loading.pretrained_sae_loaders import gemma_3_sae_huggingface_loader
from sae import JumpReLUSAE
repo, sae_id = sys.argv[1:]
cfg, theirs, _ = gemma_3_sae_huggingface_loader(repo, sae_id)
ours = JumpReLUSAE.from_pretrained(repo, sae_id)
assert not cfg["apply_b_dec_to_input"] and cfg["architecture"] == "jumprelu"
print(all(torch.equal(getattr(ours, name), array) for name, array in theirs.items()), len(theirs))
"""


@pytest.fixture(scope="module")
def gemma3(hub, tmp_path_factory):
    """The same Hub with a small Gemma 3 under the 270m's name, and SAEs beside it."""
    place = tmp_path_factory.mktemp("gemma3")
    small_gemma3(place / "model")
    golden_sae = saes.JumpReLUSAE.from_pretrained(GOLDEN / "sae" / SAE_ID)
    arrays = {name: getattr(golden_sae, name) for name in saes.ARRAYS}
    save_gemmascope2(place / "sae", arrays, GEMMA3, 1)
    sae = {}
    others = ("width_65k_l0_medium", "width_65k_l0_small_seed_1", "width_16k_l0_small")
    for name in (SMALL, *(f"resid_post/layer_1_{other}" for other in others)):
        sae |= {f"{name}/{path}": body for path, body in folder(place / "sae").items()}
    sae |= {f"transcoder/{SMALL.split('/')[1]}/params.safetensors": b"unread"}
    hub.repos[f"models/{GEMMA3}"] = Repo(folder(place / "model") | UNWANTED)
    hub.repos[f"models/{SCOPE2}"] = Repo(sae | UNWANTED)
    return hub


def test_a_gemma_3_by_name_and_layer_trains_with_its_gemma_scope_2(gemma3, tmp_path):
    gemma3.asked.clear()
    out = tmp_path / "out"
    run = succeeded(hub_run(gemma3, tmp_path / "home", out, "--model", GEMMA3), out)
    assert (run.adapter["sae"], run.adapter["sae_id"]) == (SCOPE2, SMALL)
    assert run.adapter["base_model"] == GEMMA3
    assert run.config["unit"] != 1  # of the stream's norm
    commit = gemma3.repos[f"models/{SCOPE2}"].refs["main"]
    asked = {file.split("@")[1] for file in gemma3.downloads() if SCOPE2 in file}
    assert asked == {f"{commit}/{SMALL}/{name}" for name in ("params.safetensors", "config.json")}


def test_gemma_scope_2_equals_sae_lens_over_the_hub(gemma3, tmp_path):
    pytest.importorskip("sae_lens", reason="compared where it is installed")
    environment = client(gemma3, tmp_path) | dict(HF_HUB_DISABLE_XET="1")
    result = script("-c", SCOPE2_LOADED, SCOPE2, SMALL, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "5"]
