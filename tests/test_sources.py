"""Tasks by their names from their originals to their results, the originals' traps, and what the
real files gave."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import REPO, SHARED, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import eval as eval_script
import select_heads
import train
from data import download, listops, sources
from lofit.errors import InputError
from lofit.llm.save import save_model
from lofit.tasks import find_tasks, own
from lofit.tasks.own import NAMED

CHOICE_TASKS = ["siqa", "arc_challenge", "boolq", "boolq_passage", "winogrande"]


def adapters(instruction, answer):
    reasoning = "Step 1: 4 - 1 = 3. The answer is 999"  # as the math sets have it
    return {"instruction": instruction, "input": "", "output": reasoning, "answer": answer}


def choose(i, n=3):
    options = " ".join(f"Answer{k}: thing {k}" for k in range(1, n + 1))
    names = "/".join(f"answer{k}" for k in range(1, n + 1))
    text = f"Please choose the correct answer to the question: Which is {i}?\n\n{options}\n\n"
    return adapters(f"{text}Answer format: {names}", f"answer{i % n + 1}")


def true_false(i):
    text = f"Please answer the following question with true or false, question: is it {i}?"
    return adapters(f"{text}\n\nAnswer format: true/false", ("true", "false")[i % 2])


def blank(i):  # i and i + 1 are twins
    one, two = (f"Ann{i // 2}", f"Bea{i // 2}")[:: (-1) ** (i % 2)]
    ending = ("better", "worse")[i % 2]
    text = f"Please choose the correct answer to fill in the blank: _ is {ending}.\n\n"
    text += f"Option1: {one} Option2: {two} Answer format: option1/option2"
    return adapters(text, f"option{i % 2 + 1}")


def arc(i, labels="ABCD"):
    choices = [{"text": f"thing {label}", "label": label} for label in labels]
    question = {"stem": f"Which is {i}?", "choices": choices}
    return {"id": str(i), "question": question, "answerKey": labels[i % len(labels)]}


def passage(i):
    label = ("true", "false")[i % 2]
    return {"question": f"is it {i}", "passage": f"T -- It is {i}.", "idx": i, "label": label}


def passage_of_the_copy(i):
    prompt = f"passage: T -- It is {i}.\nquestion: {{}}"
    return {
        "prompt": prompt,
        "subject": f"is it {i}",
        "target_new": {"str": ("True", "False")[i % 2]},
    }


def svamp(i):
    body, question = f"Ann has {i} pens and buys 3", "How many pens has she?"
    equation = f"( {i}.0 + 3.0 )"
    return {"ID": f"chal-{i}", "Body": body, "Question": question, "Equation": equation,
            "Answer": i + 3.0, "Type": "Addition"}  # fmt: skip


def gsm8k(i):
    steps = f"She has {i}+1,000 = <<{i}+1000={i + 1000}>>{i + 1000} pens."
    return {"question": f"Ann has {i} pens, and 1,000?", "answer": f"{steps}\n#### 1,{i:03}"}


# file -> (maker, numbers of the items)
SMALL = {
    "tasks/llm-adapters/social_i_qa/train.json": (choose, range(10)),
    "tasks/llm-adapters/social_i_qa/test.json": (choose, range(20, 26)),
    "tasks/llm-adapters/ARC-Challenge/train.json": (choose, range(10)),
    "tasks/arc/ARC-Challenge-Dev.jsonl": (arc, range(20, 24)),
    "tasks/arc/ARC-Challenge-Test.jsonl": (arc, range(30, 36)),
    "tasks/llm-adapters/boolq/train.json": (true_false, range(10)),
    "tasks/llm-adapters/boolq/test.json": (true_false, range(20, 26)),
    "tasks/boolq/train.jsonl": (passage_of_the_copy, range(10)),
    "tasks/boolq/val.jsonl": (passage, range(20, 26)),
    "tasks/llm-adapters/winogrande/train.json": (blank, range(12)),
    "tasks/llm-adapters/winogrande/test.json": (blank, range(20, 26)),
    "tasks/svamp/SVAMP.json": (svamp, range(1, 15)),
    "tasks/gsm8k/train.jsonl": (gsm8k, range(10)),
    "tasks/gsm8k/test.jsonl": (gsm8k, range(20, 26)),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small files in the originals' formats; their hashes and sizes are in the tables."""
    source = tmp_path / "source"
    for name, (make, numbers) in SMALL.items():
        put(source, name, [make(i) for i in numbers], monkeypatch)
    for task, source_of in sources.SOURCES.items():
        if source_of.sizes:
            small = replace(source_of, sizes=dict.fromkeys(source_of.sizes, 4))
            small = replace(small, test_ids="5 3 9 1 7 2" if small.test_ids else "")
            monkeypatch.setitem(sources.SOURCES, task, small)
    return source


def register(source, name, content, monkeypatch):
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_bytes(content)
    monkeypatch.setitem(sources.SUMS, name, hashlib.sha256(content).hexdigest())


def put(source, name, items, monkeypatch):
    lines = "".join(json.dumps(item) + "\n" for item in items)
    text = json.dumps(items) if name.endswith(".json") else lines
    register(source, name, text.encode(), monkeypatch)


def prepare(source, out, *tasks):
    download.main([*tasks, "--source", str(source), "--out", str(out)])


def lines_of(out, task):
    return {
        split: [json.loads(line) for line in (out / task / f"{split}.jsonl").open()]
        for split in ("train", "val", "test")
    }


@pytest.fixture
def reader(tmp_path, tiny_config):
    """A tiny random model whose tokenizer reads any text: bytes."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    model = random_model(replace(tiny_config, vocab_size=259, max_position_embeddings=2048))
    save_model(model, tmp_path / "reader", torch.float32)
    tokenizer.save(str(tmp_path / "reader" / "tokenizer.json"))
    mini = REPO / "weights" / "mini-llama" / "tokenizer_config.json"
    shutil.copy(mini, tmp_path / "reader")
    return tmp_path / "reader"


def test_some_test_items_are_drawn_and_keep_their_order(folder, tmp_path, capsys):
    def prepared(name, *flags):
        prepare(folder, tmp_path / name, "arc_challenge", *flags)
        return lines_of(tmp_path / name, "arc_challenge")

    every, four = prepared("all"), prepared("four", "--test", "4")
    assert prepared("more", "--test", "99") == every and prepared("again", "--test", "4") == four
    assert four | {"test": every["test"]} == every
    assert len(four["test"]) == 4 < len(every["test"]) and four["test"] != every["test"][:4]
    assert [line for line in every["test"] if line in four["test"]] == four["test"]
    with pytest.raises(SystemExit):
        prepared("none", "--test", "0")
    assert "--test: expected a whole number above 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["boolq_passage", "svamp", "listops"])
def test_a_task_of_each_form_runs_by_its_name(folder, reader, tmp_path, task):
    data, run = tmp_path / "data", tmp_path / "run"
    if task == "listops":
        sizes = ("--train", "8", "--val", "4", "--test", "6")
        listops.main(["--out", str(data / "listops"), *sizes])
    else:
        prepare(folder, data, task)
    flags = ["--task", task, "--data", str(data), "--run", str(run), "--model", str(reader)]
    select_heads.main([*flags, "--epochs", "1"])
    train.main([*flags, "--epochs", "1"])
    eval_script.main(flags)
    results = json.loads((run / "results.json").read_text())
    assert (results["task"], results["n"]) == (task, 6)
    scores = results["scores"]
    assert set(scores["base"]) == set(scores["tuned"]) == set(find_tasks(task)[0].metrics)
    assert len(json.loads((run / "heads.json").read_text())["heads"]) == 1  # 10 % of 12
    assert sum(results["given"]["tuned"].values()) == 6
    assert ("groups" in results) == (task == "listops")


@pytest.mark.slow
def test_a_number_is_learnt_and_scored(reader, tmp_path, monkeypatch):
    task = tmp_path / "mine"
    task.mkdir()
    line = json.dumps({"prompt": "Q: 1111 + 1111? A: ", "answer": "2222", "value": 2222}) + "\n"
    for split in ("train", "val", "test"):
        (task / f"{split}.jsonl").write_text(line * 4)
    monkeypatch.setitem(own.NEW_TOKENS, "number", 4)
    flags = ["--task", str(task), "--model", str(reader), "--run", str(tmp_path / "run")]
    train.main([*flags, "--heads", "all", "--epochs", "40", "--lr", "0.5"])
    eval_script.main(flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["scores"]["tuned"] == {"accuracy": 1}
    assert results["given"]["tuned"] == {"2222": 4, "other": 0}


def test_splits_are_of_one_draw(tmp_path, monkeypatch):
    """If a write fails, train.jsonl is gone, so that nobody trains on what is tested now."""
    splits = {split: [{"prompt": "p", "answer": split}] for split in ("train", "val", "test")}
    sources.write_splits(tmp_path / "mine", splits)
    assert lines_of(tmp_path, "mine") == splits
    monkeypatch.setattr(sources, "write_jsonl", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sources.write_splits(tmp_path / "mine", splits)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"val.jsonl", "test.jsonl"}


def test_our_lines_of_each_set(folder, tmp_path):
    prepare(folder, tmp_path, *(task for task in NAMED if task != "listops"))
    for task, named in NAMED.items():
        if task == "listops":
            continue
        found = lines_of(tmp_path, task)
        assert [len(lines) for lines in found.values()] == [4, 4, 6]
        prompts = [line["prompt"] for lines in found.values() for line in lines]
        assert len(set(prompts)) == 14
        for split in found:
            assert len(named.read(named.file(tmp_path, split), split, 42)) == len(found[split])
    test = {task: lines_of(tmp_path, task)["test"][0] for task in NAMED if task != "listops"}
    choices = "Please choose the correct answer to the question: "
    question = "Please answer the following question with true or false, question: is it 20?"
    assert test["siqa"] == {
        "prompt": choices + "Which is 20?\n\nAnswer1: thing 1 Answer2: thing 2 Answer3: thing 3\n\n"
        "Answer format: answer1/answer2/answer3\n\nAnswer:",
        "answer": " answer3", "choices": [" answer1", " answer2", " answer3"],
    }  # fmt: skip
    assert test["arc_challenge"] == {
        "prompt": choices + "Which is 30?\n\nAnswer1: thing A Answer2: thing B Answer3: thing C "
        "Answer4: thing D\n\nAnswer format: answer1/answer2/answer3/answer4\n\nAnswer:",
        "answer": " answer3", "choices": [" answer1", " answer2", " answer3", " answer4"],
    }  # fmt: skip
    assert test["boolq"] == {
        "prompt": f"{question}\n\nAnswer format: true/false\n\nAnswer:",
        "answer": " true", "choices": [" true", " false"],
    }  # fmt: skip
    passage = "Passage: T -- It is 20.\n\n" + test["boolq"]["prompt"]
    assert test["boolq_passage"] == test["boolq"] | {"prompt": passage}
    assert test["winogrande"]["answer"] == " option1"
    assert test["svamp"] == {
        "id": "chal-5", "answer": " ( 5 + 3 ) = 8", "value": 8,
        "prompt": "Question: Ann has 5 pens and buys 3. How many pens has she?\n"
        "Equation and answer:",
    }  # fmt: skip
    assert test["gsm8k"] == {
        "prompt": "Question: Ann has 20 pens, and 1,000?\nAnswer:", "value": 1020,
        "answer": " She has 20+1,000 = 1020 pens.\n#### 1,020",
    }  # fmt: skip


@pytest.mark.parametrize("labels", ["ABC", "ABCDE", "1234", "12345", "ABCD"])
def test_arc_has_3_to_5_options_with_letters_or_digits(labels):
    answers = [f" answer{k + 1}" for k in range(len(labels))]
    for i, answer in enumerate(answers):
        line = sources.arc_line(arc(i, labels))
        assert (line["answer"], line["choices"]) == (answer, answers)
        assert f"Answer{len(labels)}: thing {labels[-1]}\n\n" in line["prompt"]


@pytest.mark.parametrize("label", [True, False, "False", 0, 1, None])
def test_a_boolq_label_is_the_text_true_or_false(label):
    assert sources.passage_line(passage(1))["answer"] == " false"
    assert sources.passage_line(passage(3)) == sources.passage_line(passage_of_the_copy(3))
    with pytest.raises(ValueError, match="expected the text 'true' or 'false'"):
        sources.passage_line(passage(1) | {"label": label})


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_what_is_kin_stays_in_one_split(folder, tmp_path, monkeypatch, task):
    """Also a question that stands twice, and one that stands in train and in test."""
    source = sources.SOURCES[task]
    name = source.files["train"]
    make = SMALL[name][0]
    items = [make(i) for i in (*range(12), 0, 1, *range(20, 26))]
    put(folder, name, items, monkeypatch)
    prepare(folder, tmp_path, task)
    found = lines_of(tmp_path, task)
    kin = [{sources.kin(line) for line in lines} for lines in found.values()]
    assert [len(lines) for lines in found.values()] == [4, 4, 6]
    assert not (kin[0] & kin[1] or kin[0] & kin[2] or kin[1] & kin[2])
    assert "999" not in json.dumps(found)  # no model's reasoning is a target
    prompts = [line["prompt"] for split in ("train", "val") for line in found[split]]
    assert len(set(prompts)) == 8
    if task == "winogrande":
        assert [len(names) for names in kin] == [2, 2, 3]  # both twins of each


def test_what_is_too_long_to_train_on_is_not_drawn(folder, tmp_path, monkeypatch):
    name = sources.SOURCES["boolq_passage"].files["train"]
    long = [passage(i) | {"passage": f"T{i} -- {'word ' * 200}"} for i in range(90, 99)]
    put(folder, name, [*long, *(passage(i) for i in range(8))], monkeypatch)
    prepare(folder, tmp_path, "boolq_passage")
    found = lines_of(tmp_path, "boolq_passage")
    assert max(len(line["prompt"]) for s in ("train", "val") for line in found[s]) < 200


@pytest.mark.parametrize("task", ["siqa", "boolq_passage", "winogrande", "gsm8k", "arc_challenge"])
def test_without_a_train_file_it_is_cut_from_test(folder, tmp_path, monkeypatch, capsys, task):
    source = sources.SOURCES[task]
    make, name = SMALL[source.files["test"]][0], source.files["test"]
    put(folder, name, [make(i) for i in range(40, 60)], monkeypatch)
    (folder / source.files["train"]).unlink()
    unverified = tmp_path / source.files["train"]  # in the folder of the output: is not read
    unverified.parent.mkdir(parents=True)
    unverified.write_text("no JSON")
    prepare(folder, tmp_path, task)
    found = lines_of(tmp_path, task)
    n_drawn = 4 if task == "arc_challenge" else 8  # which has a file for val
    assert [len(lines) for lines in found.values()] == [4, 4, 20 - n_drawn]
    printed = capsys.readouterr().out
    assert f"{source.files['train']}: no such file: train and val are cut" in printed
    kin = [{sources.kin(line) for line in lines} for lines in found.values()]
    assert not (kin[0] & kin[1] or kin[0] & kin[2] or kin[1] & kin[2])


def test_drawn_test_items_do_not_depend_on_the_train_file(folder, tmp_path, monkeypatch):
    source = sources.SOURCES["winogrande"]  # of twins one is drawn and one is left
    put(folder, source.files["test"], [blank(i) for i in range(40, 100)], monkeypatch)
    tests = []
    for cut in (False, True):
        if cut:
            (folder / source.files["train"]).unlink()
        prepare(folder, tmp_path / str(cut), "winogrande", "--test", "24")
        found = lines_of(tmp_path / str(cut), "winogrande")
        assert [len(lines) for lines in found.values()] == [4, 4, 24]
        kin = [{sources.kin(line) for line in lines} for lines in found.values()]
        assert not (kin[0] & kin[1] or kin[0] & kin[2] or kin[1] & kin[2])
        tests.append(found["test"])
    assert tests[0] == tests[1]


@pytest.mark.parametrize(
    ("name", "items", "message"),
    [
        ("tasks/gsm8k/train.jsonl", [{"question": "?", "answer": "5"}], "line 1: .*: expected a"),
        ("tasks/gsm8k/train.jsonl", [{"question": "?"}], "line 1: .*: key 'answer' is missing"),
        ("tasks/gsm8k/train.jsonl", [gsm8k(1)], "train.jsonl: 1 items for train, expected 4"),
        ("tasks/svamp/SVAMP.json", [svamp(1)], "SVAMP.json: lacks the test item chal-5"),
        ("tasks/llm-adapters/boolq/test.json", [{"instruction": 3}], "item 0: missing or malf"),
        ("tasks/arc/ARC-Challenge-Dev.jsonl", [arc(1) | {"answerKey": "E"}], "line 1: missing or"),
    ],
)
def test_malformed_originals(folder, tmp_path, monkeypatch, name, items, message):
    put(folder, name, items, monkeypatch)
    task = next(task for task, s in sources.SOURCES.items() if name in s.files.values())
    with pytest.raises(InputError, match=message):
        prepare(folder, tmp_path, task)
    assert not (tmp_path / task).exists()


REAL = {  # lines of the splits, and the start of their SHA-256 when they were compared with another
    # reading of the originals (commit db76b4d)
    "siqa": (100, 100, 1751, "8147f94406ea9ce7"),
    "arc_challenge": (100, 299, 1172, "20213b90fddac359"),
    "boolq": (100, 100, 3270, "4f39c7f91cb7521e"),
    "boolq_passage": (100, 100, 3070, "20b71e26b69bc352"),
    "winogrande": (100, 100, 1067, "d0f2cb7744d51b3d"),
    "svamp": (350, 350, 300, "1cfd063f3a745af6"),
    "gsm8k": (350, 350, 1319, "65b576dee7e8a634"),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not (SHARED / "datasets" / "tasks").is_dir():
        pytest.skip("the real files are not on this machine")
    out = tmp_path_factory.mktemp("real")
    prepare(SHARED / "datasets", out, "all")
    return out


@pytest.mark.parametrize("task", REAL)
def test_the_real_files_give_the_lines_that_were_checked(real, task):
    """siqa, boolq_passage and winogrande are cut from 1954, 3270 and 1267 items there, of siqa
    without three that repeat a question which was drawn."""
    found, named = lines_of(real, task), NAMED[task]
    texts = b"".join((real / task / f"{split}.jsonl").read_bytes() for split in found)
    assert (*map(len, found.values()), hashlib.sha256(texts).hexdigest()[:16]) == REAL[task]
    kin = [{sources.kin(line) for line in lines} for lines in found.values()]
    assert not (kin[0] & kin[1] or kin[0] & kin[2])
    assert len(kin[1] & kin[2]) == (2 if task == "arc_challenge" else 0)  # its own two files
    for split in found:
        assert len(named.read(named.file(real, split), split, 42)) == len(found[split])
