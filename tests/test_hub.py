"""Models by hub id: from the cache, and what the hub's refusals say to do; exports pushed there."""

import fnmatch
import os
import pickle
import shutil
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from conftest import MINI, REPO, make_run, run_export
from huggingface_hub import errors

from lofit.errors import InputError
from lofit.llm.checkpoint import load_model
from lofit.llm.hub import find_folder, weight_files
from lofit.run.arguments import common_parser
from lofit.run.setup import run_folder
from lofit.tasks import find_tasks


def test_a_model_in_the_hubs_cache_loads_offline_and_records_its_commit(
    tiny, tiny_folder, tmp_path, monkeypatch
):
    commit, cache = "0123456789" * 4, tmp_path / "cache"
    repo = cache / "models--owner--tiny"
    shutil.copytree(tiny_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = load_model("owner/tiny")
    assert (model.source.name, model.source.revision) == ("owner/tiny", commit)
    assert model.source.fingerprint == tiny.source.fingerprint
    pinned = load_model(f"owner/tiny@{commit}").source
    assert (pinned.name, pinned.revision) == (f"owner/tiny@{commit}", commit)
    assert load_model(tiny_folder).source.revision is None


@pytest.mark.parametrize(
    "name",
    ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja",
     "README.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md"],
)  # fmt: skip
def test_what_is_read_and_copied_is_fetched(monkeypatch, tmp_path, name):
    def snapshot(repo, revision, allow_patterns):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
        return tmp_path

    monkeypatch.setattr("lofit.llm.hub.snapshot_download", snapshot)
    assert find_folder("owner/name") == tmp_path


@pytest.mark.parametrize(
    "name",
    ["no/such/folder", "./nowhere", "nowhere", "/nowhere/else", "owner/not-in-the-cache",
     "s" * 1000, "a\0b", __file__, "\ud800", "owner/name@no such@revision"],
)  # fmt: skip
def test_a_name_that_is_nothing_or_a_file_is_refused(name):
    with pytest.raises(InputError, match="no such folder|neither a folder here"):
        find_folder(name)


def test_the_shipped_models_are_found_from_anywhere(tmp_path, monkeypatch):
    """And a name that begins as they do is never asked of the hub, where others could register
    it."""
    monkeypatch.setattr("lofit.llm.hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    assert find_folder("weights/mini-llama") == MINI
    args = common_parser("").parse_args([])
    assert args.data == REPO / "data" / "mini"
    assert run_folder(args, find_tasks("mquake")[0], "", True).parts[1] == "mini-llama"
    for name in ("weights/mini-lama", "runs/mini-llama", "data/mini-llama", "weights/a/b"):
        with pytest.raises(InputError, match=f"{name}: no such folder"):
            find_folder(name)
    mine = tmp_path / "weights" / "mini-llama"
    mine.mkdir(parents=True)
    assert find_folder("weights/mini-llama").resolve() == mine.resolve()


OTHERS = {  # what a folder holds instead of a checkpoint -> what the error says
    "adapter_config.json": "adapter_config.json: a peft adapter, no model: name its base",
    "consolidated.00.pth": "consolidated.00.pth: weights in Meta's own format",
    "tiny-Q4_K_M.gguf": "tiny-Q4_K_M.gguf: a GGUF file .*gguf_file=NAME",
    "pytorch_model.bin": "pytorch_model.bin: pickled weights, .*are never loaded.*save_pretrained",
}


class Bomb:
    """Unpickled it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_is_named_for_what_it_is(tiny_folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "other" / "adapter_model.safetensors").write_text("")
    for _ in range(2):
        for read in (load_model, weight_files):
            with pytest.raises(InputError, match=OTHERS[name]):
                read(tmp_path / "other")
        shutil.copy(tiny_folder / "config.json", tmp_path / "other")  # again, with a config.json
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "gated; accept its licence on huggingface.co, then set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such repository on the hub; check the name, or set"),
        (errors.RevisionNotFoundError, "no such revision; check what follows the @"),
        (errors.HfHubHTTPError, "neither a folder here nor to be fetched from the hub .first line"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(monkeypatch, kind, message):
    def refuse(*args, **kwargs):
        raise kind("first line\nsecond", response=MagicMock())

    monkeypatch.setattr("lofit.llm.hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=f"owner/name: .*{message}"):
        find_folder("owner/name")


def test_push_to_hub(tiny_folder, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", tiny_folder)
    calls = []

    class Api:
        def whoami(self):
            calls.append("whoami")

        def create_repo(self, repo, exist_ok):
            calls.append(repo)
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, repo_id, folder_path):
            calls.append(sorted(path.name for path in folder_path.iterdir()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    out = run_export(tmp_path / "run", "peft", tmp_path / "out", "--push-to-hub", "me/tuned")
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert calls == ["whoami", "me/tuned", files]
    assert "https://huggingface.co/me/tuned" in capsys.readouterr().out
    assert 'from_pretrained(base, "me/tuned")' in (out / "README.md").read_text()

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(Api, "upload_folder", fail)
    with pytest.raises(InputError, match="no network; .* is complete: upload it with"):
        run_export(tmp_path / "run", "peft", tmp_path / "kept", "--push-to-hub", "me/tuned")
    assert (tmp_path / "kept" / "adapter_config.json").exists()
    monkeypatch.setattr(Api, "whoami", fail)
    for repo in ("me/tuned", "not an id"):
        with pytest.raises(InputError, match="set HF_TOKEN"):
            run_export(tmp_path / "run", "peft", tmp_path / "new", "--push-to-hub", repo)
    assert not (tmp_path / "new").exists()
