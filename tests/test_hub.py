"""Models by their name on the hub: what is fetched and what is not, commits, the cache without a network, and errors.

A small server answers on this machine as the hub does; nothing here needs a network.
"""
import json
import shutil
import threading
import time
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from mini import write_clips, write_config, write_model, write_tokenizer
from tiny import published_config, randomise

import minixmd
from minixmd.config import Evaluate
from minixmd.config.references import check_files
from minixmd.models import hub
from minixmd.models.families import read_config
from minixmd.models.hub import pinned
from minixmd.models.lora import add_lora
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import load_model, save_adapter, save_model
from minixmd.runner import main
from minixmd.runs.hub_names import parse_hub_name

COMMIT, OTHER = "1" * 40, "2" * 40
BRACKETS = ["<|audio_bos|>", "<|audio_eos|>", "<|vision_bos|>", "<|vision_eos|>"]


class Answers(BaseHTTPRequestHandler):
    """GET and HEAD of a repository's description, its list of files, and a file."""

    def log_message(self, *_):
        pass

    def say(self, status, body=b"", cut=False, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        if path != "/api/agent-harnesses":  # the hub library's own question
            hub.asked.append((self.command, path))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = hub.repos.get("/".join(parts[:2]))
        if hub.status != 200:
            return self.say(hub.status)
        if repo is None:  # a private one answers in the same way
            return self.say(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        what, revision = parts[2] if len(parts) > 2 else "revision", parts[3] if len(parts) > 3 else "main"
        commit = repo.refs.get(revision, revision)
        files = repo.commits.get(commit)
        if files is None:
            return self.say(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        if what == "revision":
            found = {"id": "/".join(parts[:2]), "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.say(200, json.dumps(found).encode(), Content_Type="application/json")
        if what == "tree":
            found = [{"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                     for name, data in files.items()]
            return self.say(200, json.dumps(found).encode(), Content_Type="application/json")
        name = "/".join(parts[4:])
        if repo.gated:
            return self.say(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
        if name not in files:
            return self.say(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
        self.say(200, files[name], hub.cut, ETag=f'"{sha256(files[name]).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub: `put` a folder into a repository, `asked` has every request, `close` ends the network."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()

    def put(repo, folder, commit=COMMIT, gated=False):
        found = http.hub.repos.setdefault(repo, SimpleNamespace(refs={}, commits={}, gated=gated))
        found.refs["main"] = commit
        found.commits[commit] = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    def close():
        if thread.is_alive():
            http.shutdown()
            http.server_close()
            thread.join()

    def files():
        return sorted(path.rpartition("/")[2] for method, path in http.hub.asked
                      if method == "GET" and "/resolve/" in path)

    http.hub = SimpleNamespace(repos={}, asked=[], status=200, cut=False, put=put, close=close, files=files)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{http.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        huggingface_hub.constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub._pin.cache_clear()
    yield http.hub
    close()
    hub._pin.cache_clear()


@pytest.fixture
def ears(server, tmp_path):
    """A local model folder that is also owner/ears on the hub, with files beside it that nothing reads."""
    folder = write_model(tmp_path / "ears", "audio")
    for name in ("README.md", "pytorch_model.bin", "model.fp16.safetensors", "training_args.bin"):
        (folder / name).write_text("not read")
    server.put("owner/ears", folder)
    return folder


def error_of(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
    return str(caught.value)


def assert_same(name, folder):
    """What the hub's name loads is what the folder loads."""
    ours, theirs = minixmd.load(name), minixmd.load(folder)
    for (path, p), q in zip(ours[0].named_parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(p, q), path
    assert ours[1].suppressed_ids == theirs[1].suppressed_ids


# ---- what is fetched ----


def test_a_repository_loads_as_its_folder_does_and_only_what_is_read_is_fetched(server, ears, capsys):
    assert_same(f"owner/ears@{COMMIT}", ears)
    assert server.files() == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "minixmd" not in capsys.readouterr().err


def test_without_a_revision_stderr_says_once_which_commit_main_is(server, ears, capsys):
    for _ in range(2):
        assert_same("owner/ears", ears)
    said = [line for line in capsys.readouterr().err.split("\n") if line.startswith("minixmd")]
    assert said == [f"minixmd: owner/ears is taken at its main, {COMMIT}; to pin it, write owner/ears@{COMMIT}"]


def test_a_process_sees_one_commit_of_a_name_and_the_next_one_sees_the_new_main(server, ears, tmp_path):
    assert pinned("owner/ears") == f"owner/ears@{COMMIT}"
    other = write_model(tmp_path / "other", "audio", seed=1)
    server.put("owner/ears", other, commit=OTHER)
    assert_same("owner/ears", ears)
    hub._pin.cache_clear()  # as in a new process
    assert pinned("owner/ears") == f"owner/ears@{OTHER}"
    assert_same("owner/ears", other)
    assert_same(f"owner/ears@{COMMIT}", ears)


def test_a_branch_or_tag_is_the_commit_that_it_stands_for(server, ears, tmp_path):
    server.put("owner/ears", write_model(tmp_path / "other", "audio", seed=1), commit=OTHER)
    server.repos["owner/ears"].refs["v1.0"] = COMMIT
    assert pinned("owner/ears@v1.0") == f"owner/ears@{COMMIT}"
    assert_same("owner/ears@v1.0", ears)


def test_shards_that_hold_only_parts_that_are_not_built_are_not_fetched(server, tmp_path):
    folder = tmp_path / "omni"
    write_tokenizer(folder, ["<|AUDIO|>", "<|VIDEO|>", "<|IMAGE|>", *BRACKETS])
    raw = published_config("omni", vocab=340)
    for name in ("audio_token_index", "video_token_index", "image_token_index"):
        del raw["thinker_config"][name]
    save_model(randomise(MultimodalLM(read_config(raw))), folder, folder, shard_bytes=60_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].update({"talker.a": "far.safetensors", "token2wav.b": "far.safetensors"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "far.safetensors").write_bytes(b"not read")
    server.put("owner/omni", folder)
    assert_same(f"owner/omni@{COMMIT}", folder)
    fetched = server.files()
    assert "far.safetensors" not in fetched
    assert set(index["weight_map"].values()) - {"far.safetensors"} == {f for f in fetched if "-of-" in f}


def test_a_local_folder_goes_before_a_repository_of_the_same_name(server, ears, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "owner" / "ears", "audio", seed=1)
    assert_same("owner/ears", tmp_path / "owner" / "ears")
    assert pinned("owner/ears") == str(tmp_path / "owner" / "ears") and not server.asked


# ---- adapters ----


def adapter_of(folder, base, out):
    model = load_model(folder)
    add_lora(model, rank=3, alpha=5, targets=r"model\..*_proj", seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_()
    save_adapter(model, base, out)
    return model


def test_an_adapter_finds_its_base_on_the_hub_at_the_commit_that_it_records(server, ears, tmp_path):
    model = adapter_of(ears, pinned("owner/ears"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/ears", COMMIT)  # as PEFT reads them
    server.put("owner/ears", write_model(tmp_path / "other", "audio", seed=1), commit=OTHER)
    hub._pin.cache_clear()
    loaded, processor = minixmd.load(tmp_path / "adapter")
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert processor.folder.name == COMMIT


def test_an_adapter_on_the_hub_loads_with_its_base(server, ears, tmp_path):
    model = adapter_of(ears, "owner/ears", tmp_path / "adapter")
    server.put("owner/adapter", tmp_path / "adapter", commit=OTHER)
    loaded, _ = minixmd.load(f"owner/adapter@{OTHER}")
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert server.files().count("adapter_model.safetensors") == 1


def test_an_adapter_whose_base_is_nowhere_is_one_line_that_names_both(server, ears, tmp_path):
    adapter_of(ears, "owner/gone", tmp_path / "adapter")
    line = error_of(lambda: minixmd.load(tmp_path / "adapter"))
    assert line.startswith(f"{tmp_path / 'adapter'}: the adapter's base model: owner/gone: no such folder, and no such")


# ---- the cache, and errors ----


def test_what_is_cached_loads_without_a_network_and_a_commit_without_a_question(server, ears, capsys):
    minixmd.load("owner/ears")
    server.asked.clear()
    assert_same(f"owner/ears@{COMMIT}", ears)
    assert not server.asked
    server.close()
    hub._pin.cache_clear()
    capsys.readouterr()
    assert_same("owner/ears", ears)
    assert f"owner/ears is taken at its main, {COMMIT}" in capsys.readouterr().err


def test_a_cache_that_another_program_filled_is_read_and_its_gaps_are_named(server, ears, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)  # between the hub library's retries
    server.close()
    cache = tmp_path / "cache" / "models--owner--ears"
    shutil.copytree(ears, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    assert_same("owner/ears", ears)
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert error_of(lambda: minixmd.load("owner/ears")) == (
        f"owner/ears@{COMMIT}: the repository, or its cached copy, has no model.safetensors")
    (cache / "snapshots" / COMMIT / "config.json").unlink()
    assert error_of(lambda: minixmd.load("owner/ears")) == (
        f"owner/ears@{COMMIT}: the repository has neither config.json nor adapter_config.json")


def test_each_way_that_the_hub_can_fail_is_one_line_that_names_the_repository(server, ears, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)  # between the hub library's retries
    monkeypatch.chdir(tmp_path)

    def said(name):
        return error_of(lambda: minixmd.load(name))

    assert said("owner/gone") == (
        "owner/gone: no such folder, and no such repository on the hub, or a private one (log in with: hf auth login)")
    assert said("owner/ears@v9") == "owner/ears@v9: the repository has no revision v9"
    assert said(f"owner/ears@{OTHER}") == f"owner/ears@{OTHER}: the repository has no revision {OTHER}"
    assert said("owner/a--b").startswith("owner/a--b: cannot be fetched: ")
    for name in ("ears@v1", "a/b/c", "./owner/ears", "~/ears", "owner/", str(tmp_path / "gone")):
        assert said(name).endswith(": no such model folder"), name
    server.put("owner/gated", ears, gated=True)
    assert said("owner/gated") == (
        "owner/gated: access to it must be granted: ask for it on its page, then log in with: hf auth login")
    for commit, gone in ((COMMIT, "model.safetensors"), (OTHER, "config.json")):
        server.put("owner/pickled", ears, commit)
        del server.repos["owner/pickled"].commits[commit][gone]
    assert said(f"owner/pickled@{COMMIT}") == (
        f"owner/pickled@{COMMIT}: the repository, or its cached copy, has no model.safetensors")
    assert said(f"owner/pickled@{OTHER}") == (
        f"owner/pickled@{OTHER}: the repository has neither config.json nor adapter_config.json")
    server.cut = True
    assert said("owner/ears").startswith("owner/ears: cannot be fetched: ")
    server.cut, server.status = False, 503
    assert said("owner/ears").startswith("owner/ears: no such folder, the hub cannot be reached (")
    server.close()
    line = said("owner/new")
    assert line.startswith("owner/new: no such folder, the hub cannot be reached (") and "refused" in line
    assert said(f"owner/new@{COMMIT}").startswith(f"owner/new@{COMMIT}: no such folder, the hub cannot be reached (")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in said("owner/new")


# ---- configs ----


@pytest.mark.parametrize("value, found", [
    ("Qwen/Qwen2-Audio-7B", ("Qwen/Qwen2-Audio-7B", None)), (f"a/b@{COMMIT}", ("a/b", COMMIT)),
    ("a/b@refs/pr/1", ("a/b", "refs/pr/1")), ("a/b.c_d-e@v1.0", ("a/b.c_d-e", "v1.0")), ("a", None), ("a/b/c", None),
    ("./a", None), ("../a", None), ("/a/b", None), ("~/a", None), ("a/", None), ("a/b@", None), ("a/b@c d", None),
    ("@train/best", None), ("a/b@c@d", None), (".a/b", None), ("ä/b", None)])
def test_a_name_on_the_hub_is_told_from_a_path(value, found):
    assert parse_hub_name(value) == found
    if found:
        assert parse_hub_name(Path(value)) == found


def test_a_config_may_name_a_repository_as_a_model_and_as_nothing_else(tmp_path):
    (tmp_path / "m.jsonl").touch()
    check_files([Evaluate(name="e", model=f"owner/ears@{COMMIT}", manifest=str(tmp_path / "m.jsonl"))])
    with pytest.raises(ValueError, match="evaluate 'e' manifest 'owner/m.jsonl' does not exist"):
        check_files([Evaluate(name="e", model="owner/ears", manifest="owner/m.jsonl")])
    with pytest.raises(ValueError, match="evaluate 'e' model 'models/a/b' does not exist"):
        check_files([Evaluate(name="e", model="models/a/b", manifest=str(tmp_path / "m.jsonl"))])


def test_a_run_on_a_repository_is_finished_for_its_commit_only(server, ears, tmp_path, capsys):
    manifest = write_clips(tmp_path / "clips", count=3)
    config = write_config(tmp_path / "c.py", "[Evaluate(name='e', model='owner/ears', media='audio', device='cpu', "
                                             f"dtype='float32', manifest='{manifest}')]")
    argv = [str(config), f"run_dir={tmp_path / 'run'}"]
    assert main(argv) == 0
    prints = json.loads((tmp_path / "run" / "e" / "inputs.json").read_text())
    assert prints["model"] == f"owner/ears@{COMMIT}"
    assert main(argv) == 0 and "skipped" in capsys.readouterr().out
    server.put("owner/ears", write_model(tmp_path / "other", "audio", seed=1), commit=OTHER)
    hub._pin.cache_clear()
    assert main(argv) == 1
    assert "model owner/ears changed" in capsys.readouterr().err
    argv[1] = f"run_dir={tmp_path / 'pinned'}"
    assert main([*argv, f"e.model=owner/ears@{COMMIT}"]) == 0
    assert json.loads((tmp_path / "pinned" / "e" / "inputs.json").read_text())["model"] == f"owner/ears@{COMMIT}"
    argv[1] = f"run_dir={tmp_path / 'gone'}"
    assert main([*argv, "e.model=owner/gone"]) == 1
    assert "owner/gone: no such folder, and no such repository on the hub" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()
