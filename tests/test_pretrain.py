"""Pretraining resumes exactly; its batches, tokenizer and probes are what they say."""

import random
import shutil

import pytest
import torch
from conftest import MINI, REPO

from data.world import World
from lofit.llm.checkpoint import load_model
from lofit.llm.tokenizer import load_tokenizer
from weights import pretrain, probes
from weights.corpus import MIX, Corpus


@pytest.fixture(scope="module")
def corpus():
    return Corpus(World())


@pytest.fixture(params=pretrain.MODELS)
def tokenizer(request):
    """The shipped one, which is the script's: see below."""
    return load_tokenizer(REPO / "weights" / request.param)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Pretraining of a very small model, in an empty folder."""
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)

    def write_tokenizer(corpus, out):
        out.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MINI / name, out)
        return {"vocab_size": 891, "bos_token_id": 1, "eos_token_id": 2}

    small = (pretrain.MODELS["mini-llama"][0] | shape, write_tokenizer)
    monkeypatch.setitem(pretrain.MODELS, "mini-llama", small)
    monkeypatch.setattr(pretrain, "run_probes", lambda *args: {"one_hop": 0.0})
    monkeypatch.chdir(tmp_path)
    steps = ["--steps", "2", "--late-steps", "2", "--probe-every", "1"]
    return lambda out: pretrain.main(["--out", out, *steps])


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(small, monkeypatch):
    small("whole")
    original, calls = pretrain.train_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(pretrain, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small("halves")
    small("halves")
    assert len(calls) == 4 + 1  # step 4 was done again
    one, two = (load_model(name).state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"), [("mini-llama", "tokenizer.json"), ("mini-gemma", "tokenizer.model")]
)
def test_the_shipped_tokenizer_is_the_scripts(corpus, tmp_path, name, file):
    pretrain.MODELS[name][1](corpus, tmp_path)
    assert (tmp_path / file).read_bytes() == (REPO / "weights" / name / file).read_bytes()


def test_every_document_survives_the_tokenizer(corpus, tokenizer):
    for doc in corpus.step(random.Random(3)):
        ids = tokenizer.encode(doc)
        assert tokenizer.decode(ids).replace(" ", "") == doc.replace(" ", "")
    prompt = "Q: Imagine that the capital is located in the city. Who is the employer of? A:city"
    assert tokenizer.decode(tokenizer.encode(prompt)) == prompt  # with its own spacing


def test_micro_batches_hold_every_token_once():
    docs = [[i] * (1 + i % 90) for i in range(sum(MIX.values()))]
    batches = pretrain.micro_batches(docs)
    assert [len(b) for b in batches] == list(pretrain.ROWS)
    assert all(b.shape[1] % 4 == 0 for b in batches)
    kept = sorted([t for t in row.tolist() if t >= 0] for b in batches for row in b)
    assert kept == sorted(docs)


def test_probes_count_only_whole_right_answers(tokenizer):
    """A model that always says `city` and then ends."""
    ids, n = tokenizer.encode_pair("Q: Who is it? A:", "city")
    city = ids[n:]
    after = dict(zip(ids[n - 1 :], [*city, tokenizer.eos_ids[0]], strict=True))

    class Says(torch.nn.Module):
        lm_head = torch.nn.Linear(1, 1)

        def forward(self, ids):
            best = ids.clone().apply_(lambda token: after.get(token, 0))
            return torch.nn.functional.one_hot(best, 2048).float()

    pairs = [("Q: Who is it? A:", answer) for answer in ("city", "city city", "country", "")]
    assert probes.says(Says(), tokenizer, pairs) == [True, False, False, False]
