"""Both kinds of tokenizer file: ids as transformers makes them, prompt and answer apart."""

import json
import shutil

import pytest
from conftest import MINI, MINI_GEMMA

from lofit.errors import InputError
from lofit.llm.tokenizer import load_tokenizer

TEXTS = [
    "Q: Imagine that Bogusvia is a citizen of Sweden. What is it? A:",
    "  two  spaces\nand a line break\n\nand accents: Karl Döhler, 東京",
    "",
]


def test_the_miniatures_tokenizer():
    tokenizer = load_tokenizer(MINI)
    ids = tokenizer.encode("Q: What is the capital of this? A:")
    assert ids[0] == tokenizer.bos_id == 1 and ids.count(1) == 1
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.decode(ids) == "Q: What is the capital of? A:"  # "this": no word of the world


def test_prompt_and_answer_are_split_by_characters():
    tokenizer = load_tokenizer(MINI)
    prompt, answer = "Q: What is the capital of it? A:", "is the capital"
    ids, n = tokenizer.encode_pair(prompt, answer)
    assert ids == tokenizer.encode(prompt + answer)
    assert ids[:n] == tokenizer.encode(prompt)
    assert tokenizer.decode(ids[n:]) == answer


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def one_kind(request, oracle, tmp_path):
    """The paper's tiny tokenizer, from one of its two files."""
    for name in ("config.json", "tokenizer_config.json", request.param):
        shutil.copy(oracle / name, tmp_path / name)
    return load_tokenizer(tmp_path)


def test_both_kinds_agree_with_transformers(oracle, one_kind):
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(oracle / "tokenizer.json"))
    for text in TEXTS:
        ids = one_kind.encode(text)
        assert ids == [1, *theirs.encode(text, add_special_tokens=False)]
        assert one_kind.decode(ids) == text


def test_gemmas_two_files_give_the_same_ids(tmp_path):
    """transformers makes tokenizer.json out of tokenizer.model: we read both, it gives its ids."""
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    pytest.importorskip("google.protobuf", reason='needs pip install -e ".[test]"')
    theirs = transformers.AutoTokenizer.from_pretrained(MINI_GEMMA)
    theirs.save_pretrained(tmp_path)
    shutil.copy(MINI_GEMMA / "config.json", tmp_path / "config.json")
    assert not (tmp_path / "tokenizer.model").exists()
    pieces, json_file = load_tokenizer(MINI_GEMMA), load_tokenizer(tmp_path)
    for text in (*TEXTS, "A:Norvia", " a"):
        ids = pieces.encode(text)
        assert ids == json_file.encode(text) == theirs.encode(text)
        assert pieces.decode(ids) == json_file.decode(ids) == text


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("Q: Who? A:", "Sweden"), ("the fam", "ily"), ("Karl D", "öhler"), ("東", "京"), ("", "A")],
)
def test_a_token_across_the_border_counts_as_answer(one_kind, prompt, answer):
    """SentencePiece may join the prompt's end with the answer's start; training then sees it."""
    ids, n = one_kind.encode_pair(prompt, answer)
    assert ids == one_kind.encode(prompt + answer)
    inside = [k for k in range(1, len(ids)) if prompt.startswith(one_kind.decode(ids[:k]))]
    assert n == max(inside)


@pytest.mark.parametrize("character", [".", "e"])
def test_ids_with_a_character_in_them(one_kind, character):
    """Every id whose text has it and no other: in long tokens too."""
    ids = one_kind.ids_with(character)
    assert ids and all(character in one_kind.decode([i]) for i in ids)
    text = "One. Two... three, 3.5 and the rest of `here.md`."
    assert character not in one_kind.decode([i for i in one_kind.encode(text) if i not in ids])


def test_bos_and_eos_follow_the_config(tiny_folder):
    """The two fields that the mutation test of test_model.py leaves to this one."""
    config = json.loads((tiny_folder / "config.json").read_text())

    def reload(settings=None, **values):
        (tiny_folder / "config.json").write_text(json.dumps(config | values))
        (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
        return load_tokenizer(tiny_folder)

    assert reload(bos_token_id=7).encode("Q:")[0] == 7
    assert reload(eos_token_id=[5, 6]).eos_ids == (5, 6)
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    by_name = reload(named, bos_token_id=None, eos_token_id=None)
    assert (by_name.bos_id, by_name.eos_ids) == (1, (2,))
    assert reload({"add_bos_token": False}).bos_id is None
    assert reload(bos_token_id=None).bos_id is None
    with pytest.raises(InputError, match="config.json: no eos_token_id"):
        reload(eos_token_id=None)


def test_bad_tokenizer_files_are_refused(tiny_folder):
    (tiny_folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer.json"):
        load_tokenizer(tiny_folder)
    (tiny_folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tiny_folder)
    (tiny_folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tiny_folder)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(InputError, match="has 891 tokens, config.json's vocab_size is 100"):
        load_tokenizer(tiny_folder)
