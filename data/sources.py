"""Where each task's original files come from, and how their items become lines of our own forms.

boolq and boolq_passage are two tasks: the paper calls BoolQ closed-book and uses LLM-Adapters'
prompt, which has no passage, but gives long passages as its reason for small batches. Nobody can
tell from it which of the two it used.

Prompts are LLM-Adapters' instructions (Hu et al., 2023) without a frame around them. Ours are
"Answer:", the space before an answer, and the prompts of svamp (the paper's is not known), gsm8k
and of the passage. Sizes of train and val are the paper's; winogrande and gsm8k, which it does not
have, get those of its other choices and of svamp. Test is the whole evaluation set.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_json_list, read_jsonl, reading, write_jsonl
from lofit.tasks import last_number

SEED = 42  # of the draw
# characters of an item to train or validate on: it bounds the memory of a batch, and leaves out 4 %
# of GSM8K's items and 24 % of BoolQ's passages. Test keeps the long ones
LONGEST = 900
CHOOSE = "Please choose the correct answer to the question: "
TRUE_FALSE = "Please answer the following question with true or false, question: "


def option_line(item: dict) -> dict:
    """An item of LLM-Adapters: the options are named at the end of its instruction, so there may be
    2 to 5. Its `output` is not read: in other sets it is a model's reasoning."""
    names = item["instruction"].rpartition("Answer format: ")[2].split("/")
    return {
        "prompt": f"{item['instruction']}\n\nAnswer:",
        "answer": f" {item['answer']}",
        "choices": [f" {name}" for name in names],
    }


def arc_line(item: dict) -> dict:
    """An item of ARC, labels A to E or 1 to 5, in LLM-Adapters' words; or an item of theirs."""
    if "instruction" in item:
        return option_line(item)
    choices = item["question"]["choices"]
    names = [f"answer{i}" for i in range(1, len(choices) + 1)]
    right = [choice["label"] for choice in choices].index(item["answerKey"])
    texts = zip(names, choices, strict=True)
    options = " ".join(f"{name.capitalize()}: {choice['text']}" for name, choice in texts)
    instruction = f"{CHOOSE}{item['question']['stem']}\n\n{options}"
    instruction += "\n\nAnswer format: " + "/".join(names)
    return option_line({"instruction": instruction, "answer": names[right]})


def passage_line(item: dict) -> dict:
    """An item of SuperGLUE's BoolQ, its label a text; or of a copy that holds the training items,
    its passage with round brackets for curly ones."""
    if "subject" in item:
        passage = item["prompt"].removeprefix("passage: ").removesuffix("\nquestion: {}")
        question, label = item["subject"], item["target_new"]["str"].lower()
    else:
        passage, question, label = item["passage"], item["question"], item["label"]
    if label not in ("true", "false"):
        raise ValueError(f"label {label!r}: expected the text 'true' or 'false'")
    instruction = f"Passage: {passage}\n\n{TRUE_FALSE}{question}?\n\nAnswer format: true/false"
    return option_line({"instruction": instruction, "answer": label})


def svamp_line(item: dict) -> dict:
    """An item of SVAMP: trained on the gold equation and answer, which differ in chal-680 alone; it
    is no test item."""
    body, question = item["Body"].strip(), item["Question"].strip()
    body += "" if body.endswith(".") else "."
    equation, value = re.sub(r"\.0\b", "", item["Equation"]), item["Answer"]
    return {
        "id": item["ID"],
        "prompt": f"Question: {body} {question}\nEquation and answer:",
        "answer": f" {equation} = {value:.15g}",
        "value": value,
    }


def gsm8k_line(item: dict) -> dict:
    """An item of GSM8K: the solution without its marks for a calculator, <<48/2=24>>."""
    solution = re.sub(r"<<[^>]*>>", "", item["answer"])
    steps, mark, final = solution.rpartition("\n#### ")
    if not mark or not steps:
        raise ValueError("expected a solution that ends with a line '#### NUMBER'")
    prompt = f"Question: {item['question']}\nAnswer:"
    return {"prompt": prompt, "answer": f" {solution}", "value": last_number(final)}


# SVAMP's test items, chal-N, in their order: those of MosaicML's llm-foundry (8c8dd48f)
SVAMP_TEST = """
363 442 675 947 97 195 417 710 249 485 591 585 136 754 220 768 686 286 244 527 729 339 873 70 875
61 647 725 73 8 968 735 236 568 603 22 347 828 231 254 124 463 530 449 832 972 688 845 320 731 206
707 939 785 867 434 622 541 856 170 563 487 676 132 129 546 71 498 750 88 934 866 247 60 246 315
372 809 20 501 332 614 1 544 553 166 799 383 835 974 895 797 1000 306 641 109 520 183 781 513 931
737 740 4 909 162 446 932 999 956 657 788 900 769 937 699 118 739 831 12 567 258 542 480 964 391
395 66 611 957 697 812 959 643 157 113 49 774 94 506 522 142 882 926 409 598 439 599 765 270 552
975 763 253 993 272 147 470 659 406 512 672 218 323 736 581 217 68 275 411 324 825 983 842 235 58
795 787 864 333 702 225 571 705 656 277 389 474 168 995 747 547 176 908 624 74 664 700 971 274 687
215 364 380 167 374 855 651 465 955 948 104 888 979 876 82 297 792 234 678 47 72 722 197 592 371
883 907 634 644 850 301 566 81 388 128 550 471 748 45 827 271 619 353 868 368 100 390 95 991 345
782 221 160 965 349 984 715 164 826 778 7 891 829 285 604 460 226 430 987 719 666 734 204 575 28
617 518 239 224 96 31 33 433 605 90 559 914 759 693 105 755 143 229 251 282 760 26 115 655
"""
LOFIT = "fc2869/lo-fit/ebd344a273d3dab0b63d8bbfd7ecdb5185ae5b7b/dataset/"
ADAPTERS = "AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a/dataset/"
SUITE = "FormulaMonks/llm-benchmarker-suite/5d3c8009ab8f5adab4899c34dd203cbf7afcb372/data/"
MATH = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
# we did not see this file in this commit, but it probably is there; its hash decides
EDITING = "heddayam/kb-model-editing/8e586d1a62b068f235f582a0366729b601fe0ef1/data/boolq/"
# beginning of a file's name below data/real -> its beginning below raw.githubusercontent.com:
# OWNER/NAME/COMMIT/FOLDER/
PLACES = {
    "MQuAKE/": LOFIT + "MQuAKE/",
    "clutrr/": LOFIT + "clutrr/",
    "truthfulqa/": LOFIT + "truthfulqa/",
    "tasks/llm-adapters/": ADAPTERS,
    "tasks/arc/": SUITE + "ARC/ARC-c/",
    "tasks/boolq/val": SUITE + "SuperGLUE/BoolQ/val",
    "tasks/boolq/train": EDITING + "train",
    "tasks/gsm8k/": MATH,
    "tasks/svamp/": "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/",
}


def _read_sums() -> dict[str, str]:
    text = Path(__file__).with_name("SHA256SUMS").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {name: sha for sha, name in lines}


SUMS = _read_sums()  # our name of a file, below data/real or --source -> its hash


def place_of(name: str) -> str:
    """Where a file of SUMS stands below raw.githubusercontent.com."""
    ours = next(ours for ours in PLACES if name.startswith(ours))
    return PLACES[ours] + name.removeprefix(ours)


@dataclass(frozen=True)
class Source:
    """A task's original files: split -> file of SUMS. sizes: of the splits that are drawn from the
    train file, which are train, and val where it has no file of its own."""

    licence: str
    files: dict[str, str]
    line: Callable[[dict], dict] | None = None  # None: the files are used as they are
    sizes: dict[str, int] | None = None
    test_ids: str = ""  # of the test items, where one file holds all


def _choices(licence: str, line: Callable, train: str, test: str, val: str | None = None) -> Source:
    files = {"train": train, "test": test} | ({"val": val} if val else {})
    sizes = {"train": 100} if val else {"train": 100, "val": 100}
    return Source(licence, {split: f"tasks/{file}" for split, file in files.items()}, line, sizes)


def _paper(licence: str, folder: str) -> Source:
    return Source(licence, {name: name for name in SUMS if name.startswith(folder)})


FORM = "form: ODC-By (LLM-Adapters, Hu et al., 2023)"
SOURCES = {
    "mquake": _paper("MQuAKE: MIT (Zhong et al., 2023)", "MQuAKE/"),
    "clutrr": _paper(
        "CLUTRR: CC BY-NC 4.0, non-commercial use only (Sinha et al., 2019)", "clutrr/"
    ),
    "truthfulqa": _paper("TruthfulQA: Apache 2.0 (Lin et al., 2022)", "truthfulqa/"),
    "siqa": _choices(
        f"SocialIQA: CC BY 4.0, not confirmed (Sap et al., 2019); {FORM}",
        option_line, "llm-adapters/social_i_qa/train.json", "llm-adapters/social_i_qa/test.json",
    ),
    "arc_challenge": _choices(
        f"ARC: CC BY-SA 4.0, not confirmed (Clark et al., 2018); {FORM}",
        arc_line, "llm-adapters/ARC-Challenge/train.json", "arc/ARC-Challenge-Test.jsonl",
        "arc/ARC-Challenge-Dev.jsonl",
    ),
    "boolq": _choices(
        f"BoolQ: CC BY-SA 3.0 (Clark et al., 2019); {FORM}",
        option_line, "llm-adapters/boolq/train.json", "llm-adapters/boolq/test.json",
    ),
    "boolq_passage": _choices(
        f"BoolQ: CC BY-SA 3.0 (Clark et al., 2019); {FORM}",
        passage_line, "boolq/train.jsonl", "boolq/val.jsonl",
    ),
    "winogrande": _choices(
        f"WinoGrande: CC BY (Sakaguchi et al., 2020); {FORM}",
        option_line, "llm-adapters/winogrande/train.json", "llm-adapters/winogrande/test.json",
    ),
    "svamp": Source(
        "SVAMP: MIT (Patel et al., 2021)", {"train": "tasks/svamp/SVAMP.json"}, svamp_line,
        {"train": 350, "val": 350}, SVAMP_TEST,
    ),
    "gsm8k": Source(
        "GSM8K: MIT (Cobbe et al., 2021)",
        {"train": "tasks/gsm8k/train.jsonl", "test": "tasks/gsm8k/test.jsonl"}, gsm8k_line,
        {"train": 350, "val": 350},
    ),
}  # fmt: skip


def convert(
    task: str, folder: Path, missing: list[str] = (), n_test: int | None = None
) -> dict[str, list[dict]]:
    """{"train", "val", "test": lines} of a task from its files below a folder; of test n_test items
    are drawn. If the train file is missing, train and val are drawn from the test file: with n_test
    from the rest, so that the test items are the same with and without the train file; else first,
    and test is what they leave. InputError if a file is malformed or has too few items."""
    source = SOURCES[task]
    there = {s: folder / file for s, file in source.files.items() if file not in missing}
    lines = {split: list(_lines(path, source.line)) for split, path in there.items()}
    if source.test_ids:
        of_id = {line["id"]: line for line in lines["train"]}
        wanted = [f"chal-{number}" for number in source.test_ids.split()]
        if missing := [name for name in wanted if name not in of_id]:
            raise InputError(f"{there['train']}: lacks the test item {missing[0]}")
        lines["test"] = [of_id.pop(name) for name in wanted]
        lines["train"] = list(of_id.values())
    whole, few = lines["test"], n_test is not None and n_test < len(lines["test"])
    if few:
        drawn = random.Random(SEED).sample(range(len(whole)), n_test)
        lines["test"] = [whole[i] for i in sorted(drawn)]  # in their order
    if "train" in lines:
        pool, others = lines["train"], [*whole, *lines.get("val", [])]
    else:
        pool, others = whole, [*(lines["test"] if few else []), *lines.get("val", [])]
    where = there["train" if "train" in there else "test"]
    drawn = draw(pool, source.sizes, {kin(line) for line in others}, str(where))
    if pool is whole and not few:
        used = {kin(line) for split in drawn.values() for line in split}
        lines["test"] = [line for line in whole if kin(line) not in used]
    return {split: (lines | drawn)[split] for split in ("train", "val", "test")}


def draw(pool: list[dict], sizes: dict[str, int], others: set, where: str) -> dict[str, list[dict]]:
    """Draw splits of these sizes from a pool, without items that are too long or akin to one of the
    others. Items that are akin (see `kin`) come into the same split, and a prompt comes once.
    InputError if the pool is too small."""
    groups: dict[object, dict[str, dict]] = {}
    for line in pool:
        if len(line["prompt"] + line["answer"]) > LONGEST:
            continue
        groups.setdefault(kin(line), {}).setdefault(line["prompt"], line)
    left = [group for key, group in groups.items() if key not in others]
    random.Random(SEED).shuffle(left)
    drawn = {}
    for split, size in sizes.items():
        drawn[split], rest = [], []
        for group in left:
            fits = len(drawn[split]) + len(group) <= size
            (drawn[split] if fits else rest).extend(group.values() if fits else [group])
        left = rest
        if len(drawn[split]) < size:
            raise InputError(f"{where}: {len(drawn[split])} items for {split}, expected {size}")
    return drawn


def kin(line: dict) -> object:
    """What items have in common that must stay in one split: the two options of WinoGrande's twin
    sentences, else the first paragraph, which is the question, or the passage."""
    options = re.search(r"\n\nOption1: (.*) Option2: (.*) Answer format", line["prompt"])
    if options:
        return frozenset(text.lower() for text in options.groups())
    return line["prompt"].partition("\n\n")[0]


def write_splits(folder: Path, splits: dict[str, list[dict]]) -> None:
    """Write train.jsonl, val.jsonl and test.jsonl of one draw. train.jsonl is removed before the
    others change, and written last: where it is, all three are of one draw, so that no test item is
    trained on."""
    train = folder / "train.jsonl"
    try:
        train.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{train}: cannot be written ({error.strerror})") from None
    for split in ("val", "test", "train"):
        write_jsonl(folder / f"{split}.jsonl", splits[split])


def _lines(path: Path, line: Callable[[dict], dict]) -> Iterator[dict]:
    read = read_json_list if path.suffix == ".json" else read_jsonl
    for where, item in read(path):
        with reading(where):
            made = line(item)
        yield made
