"""TruthfulQA: prompts byte for byte, the metrics by hand, and the paper's own texts."""

import json
import math

import pytest
from conftest import GOLDEN, SHARED

from lofit.errors import InputError
from lofit.llm.tokenizer import load_tokenizer
from lofit.tasks import truthfulqa

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
ROW = 'A,B,Can pigs fly?,"No, they cannot","Pigs fly in planes.; No, they cannot; ",'
ROW += '"; Yes; Often ",x\n'


def read(data, split, fold):
    return truthfulqa.read(truthfulqa.FOLDS[fold].file(data, split), split, 42)


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        folder = tmp_path / "truthfulqa"
        folder.mkdir(exist_ok=True)
        (folder / "fold_1_val_seed_42.csv").write_text(text)
        return tmp_path

    return write


def test_an_item_is_read_as_the_paper_reads_it(write):
    (example,) = read(write(HEADER + ROW), "val", fold=1)
    assert example.prompt == "Q: Can pigs fly? A:"
    assert (example.answer, example.rejected) == ("No, they cannot", "Yes")  # the first not empty
    assert example.right == (" No, they cannot.", " Pigs fly in planes.")
    assert example.wrong == (" Yes.", " Often.")
    assert example.question.startswith("Interpret each question literally, and as a question")
    assert example.question.endswith("held in Barcelona, Spain.\n\nQ: Can pigs fly?\nA:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Question,Best Answer\nWhy?,Yes\n", "line 2: .*key 'Correct Answers' is missing"),
        (HEADER + ROW + "A,B,Why?\n", "line 3: not a TruthfulQA question"),
        (HEADER + "A,B, ,Yes,Yes,No,x\n", "line 2: not a TruthfulQA question: .*expected a text"),
        (HEADER + "A,B,Why?,Yes,Yes,;,x\n", "line 2: .*and one incorrect"),
    ],
)
def test_bad_files_are_refused(write, text, message):
    with pytest.raises(InputError, match=f"fold_1_val_seed_42.csv(, |: ){message}"):
        read(write(text), "val", fold=1)


def test_the_metrics_by_hand():
    half, quarter = math.log(0.5), math.log(0.25)
    found = truthfulqa.score_choices([half, -900.0], [quarter, -1000.0])
    assert found == {"mc1": 1.0, "mc2": pytest.approx(2 / 3), "mc3": 0.5}
    found = truthfulqa.score_choices([-2000.0, half], [quarter])
    assert found == {"mc1": 0.0, "mc2": pytest.approx(2 / 3), "mc3": 0.5}
    # so improbable that no probability is left in a float
    found = truthfulqa.score_choices([-2000.0], [-2000.0 + math.log(3)])
    assert found == {"mc1": 0.0, "mc2": pytest.approx(0.25), "mc3": 0.0}


@pytest.mark.parametrize("fold", [0, 1])
def test_the_real_splits(fold):
    if not SHARED.is_dir():
        pytest.skip("the real splits are not on this machine")
    sizes = [len(read(SHARED / "datasets", s, fold=fold)) for s in ("train", "val", "test")]
    assert sizes == [[326, 82, 409], [327, 82, 408]][fold]


def test_questions_and_answers_are_the_papers(recordings):
    """Prompts and answers as texts, and the ids of tests/golden made of them."""
    told = json.loads((recordings / "tqa_mc.json").read_text())["variants"]["unmodified"]
    golden = json.loads((GOLDEN / "tqa_mc.json").read_text())
    tokenizer = load_tokenizer(recordings)
    examples = read(SHARED / "datasets", "test", fold=0)[:5]
    for example, text, ids in zip(examples, told["questions"], golden, strict=True):
        assert example.question == text["input_prompt"] + "\nA:"
        assert example.right[0] == " " + text["best"]
        for kind, answers in (("true", example.right), ("false", example.wrong)):
            found = {}
            for answer in answers:
                whole, n = tokenizer.encode_pair(example.question, answer)
                assert whole[:n] == ids["question"]
                found[answer] = whole[n:]
            want = {
                " " + one["answer"]: each["ids"]
                for one, each in zip(text[kind], ids[kind], strict=True)
            }
            assert found == want
            # where the answer starts: ours by characters, theirs by dropping three tokens
            for one in text[kind]:
                assert found[" " + one["answer"]] == one["tokens_after_input_prompt"][3:]
