"""The paper's values, and K as a number or a share."""

from dataclasses import replace

import pytest

from lofit.errors import InputError
from lofit.llm.config import ModelConfig
from lofit.recipes import LARGE, SHAPES, count_heads
from lofit.recipes import find_recipe as by_size
from lofit.tasks.own import NAMED

SIZES = {(layers, heads, kind): (hidden, rows) for (kind, layers, heads, _, hidden), (_, rows) in
         SHAPES.items()}  # fmt: skip


TASKS = ("mquake", "clutrr", "truthfulqa")


def find_recipe(of, task, n_parameters=LARGE - 1):
    return by_size(of, task, n_parameters)


def config(layers, heads, model_type="llama", **other):
    """A configuration with so many layers and heads: of the model that the recipes know, if any."""
    hidden, rows = SIZES.get((layers, heads, model_type), (64, 32000))
    sizes = (rows, hidden, 64, layers, heads, heads, 8, 64, 1e-5, model_type)
    return replace(ModelConfig(*sizes), **other)


@pytest.mark.parametrize(
    "model",
    [
        config(32, 32, num_key_value_heads=8, vocab_size=128256),  # Llama-3-8B
        config(32, 32, vocab_size=128256), config(32, 32, hidden_size=2560),
        config(8, 16, vocab_size=32000), config(8, 16, hidden_size=512),
    ],
)  # fmt: skip
def test_as_many_heads_do_not_make_another_model_the_papers(model):
    origin, recipe = find_recipe(model, "mquake")
    assert origin == "recipe of Llama-2-7B for mquake; offsets by rule"
    assert (recipe.offset_lr, recipe.heads) == (0.01, "3%")


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (config(32, 32), (5e-3, 1e-3, 1e-2, "32")),
        (config(32, 32, vocab_size=32001), (5e-3, 1e-3, 1e-2, "32")),  # the paper's row of padding
        (config(40, 40), (1e-3, 1e-3, 8e-3, "48")),
        (config(28, 16, "gemma"), (5e-3, 5e-4, 8e-3, "16")),
    ],
)
def test_the_papers_values(model, values):
    _, r = find_recipe(model, "mquake")
    assert (r.select_lr, r.l1, r.offset_lr, r.heads) == values
    assert (r.select_epochs, r.offset_epochs, r.batch_size) == (5, 5, 8)


@pytest.mark.parametrize(
    ("model_type", "family", "shape"),
    [
        ("llama", "Llama-2-7B", (32, 32)),
        ("gemma", "Gemma-7B", (28, 16, "gemma")),
        ("gemma3_text", "Gemma-7B", (28, 16, "gemma")),
    ],
)
def test_an_unknown_model_gets_its_familys_values_and_a_share_of_heads(model_type, family, shape):
    name, recipe = find_recipe(config(26, 4, model_type), "mquake")
    assert family in name and name.endswith(" for mquake; offsets by rule")
    paper = find_recipe(config(*shape), "mquake")[1]
    assert recipe == replace(paper, heads="3%", offset_lr=0.01, lr_scales_inversely_with_k=True)
    assert [recipe.lr_of(k, 104) for k in (104, 26, 3)] == [0.01, 0.04, 0.1]  # 26 x 4 heads
    assert paper.lr_of(1, 104) == paper.lr_of(104, 104) == paper.offset_lr
    dpo = find_recipe(config(26, 4, model_type), "truthfulqa")[1]
    assert [dpo.lr_of(k, 104) for k in (104, 26, 3)] == [0.01, 0.03, 0.03]


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, "gemma")])
def test_the_miniatures_have_a_recipe_for_each_task(shape):
    found = {task: find_recipe(config(*shape), task) for task in TASKS}
    assert all(" for " not in origin and recipe.heads == "10%" for origin, recipe in found.values())
    assert len({recipe for _, recipe in found.values()}) == len(TASKS)


def test_a_task_without_a_recipe_takes_the_models_values_for_mquake():
    name, recipe = find_recipe(config(8, 16), "mine")
    assert name == "recipe of mini-llama for mquake"
    assert recipe == find_recipe(config(8, 16), "mquake")[1]
    name, recipe = find_recipe(config(32, 32), "clutrr")
    assert name == "recipe of Llama-2-7B" and (recipe.select_lr, recipe.l1) == (5e-4, 5e-3)
    name, recipe = find_recipe(config(7, 7), "truthfulqa")
    assert name == "recipe of Llama-2-7B for truthfulqa; offsets by rule"
    assert recipe.l1 == 5e-4


def test_from_a_billion_parameters_on_the_papers_learning_rate_is_taken():
    """The rule was found on models of 0.1 to 0.3 B; it gave Llama-3.1-8B ten times the paper's."""
    shape = config(32, 32, num_key_value_heads=8, vocab_size=128256)
    origin, recipe = find_recipe(shape, "mquake", 8 * 10**9)
    assert origin == "recipe of Llama-2-7B for mquake"
    assert recipe.heads == "3%" and recipe.lr_of(31, 1024) == recipe.lr_of(1024, 1024) == 0.01
    small, rule = find_recipe(shape, "mquake")
    assert small == f"{origin}; offsets by rule" and rule.lr_of(31, 1024) == 0.1


@pytest.mark.parametrize(
    ("text", "k"), [("13", 13), ("10%", 13), ("3%", 4), ("0.1%", 1), ("100%", 128), ("128", 128)]
)
def test_count_heads(text, k):
    assert count_heads(text, config(8, 16)) == k


@pytest.mark.parametrize(
    "text", ["0", "129", "101%", "-3", "0%", "nan%", "many", "", "%", "3.5", "inf%"]
)
def test_no_such_number_of_heads(text):
    with pytest.raises(InputError, match=r"not in 1\.\.128, the heads there are|a share like 3%"):
        count_heads(text, config(8, 16))


@pytest.mark.parametrize("shape", [(32, 32), (28, 16, "gemma"), (8, 16), (30, 9)])
def test_the_tasks_with_a_name_have_recipes(shape):
    """10 % of the heads, the paper's epochs and batch sizes, learning rates by the rule."""
    found = {task: find_recipe(config(*shape), task) for task in NAMED}
    assert all(origin.endswith("offsets by rule") for origin, _ in found.values())
    plan = {task: (r.heads, r.select_epochs, r.offset_epochs, r.batch_size)
            for task, (_, r) in found.items()}  # fmt: skip
    choices, boolq, numbers = ("10%", 3, 3, 8), ("10%", 3, 3, 4), ("10%", 5, 5, 8)
    assert plan == {
        "siqa": choices, "arc_challenge": choices, "winogrande": choices, "boolq": boolq,
        "boolq_passage": boolq, "svamp": numbers, "gsm8k": numbers, "listops": numbers,
    }  # fmt: skip
    assert {r.lr_of(27, 270) for _, r in found.values()} == {0.1}
