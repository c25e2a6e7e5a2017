"""The pieces of work that the benchmark times, and how each side does them."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch
from lofit.fast.folded import folded_offsets
from peers import (
    hf_batch,
    hf_generate,
    hf_score,
    hf_twin,
    hook_offsets,
    hook_scales,
    lora,
    unhook,
)
from shapes import SHAPES, Ids, random_model, text

from lofit import load_model, load_tokenizer
from lofit.fast.decoding import GraphedDecoding
from lofit.fast.graphs import GraphedObjective
from lofit.fast.packed import packed_weights
from lofit.heads import (
    attach_offsets,
    attach_scales,
    get_edits,
    init_offsets,
    init_scales,
    set_edits,
)
from lofit.llm.batches import common_prefix_length
from lofit.llm.generate import Decoding, compiled_step, generate_all
from lofit.llm.scoring import score_answers
from lofit.llm.tokenizer import Tokenizer
from lofit.objectives import CrossEntropy
from lofit.run.arguments import TASKS
from lofit.training import Schedule, Training, fit, optimizer_for, train_step

LR = 1e-3
# what users get, and on a GPU the same without CUDA graphs beside it
OURS = _, EAGER = "ours", "ours, eager"


def as_ids(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[str, str]:
    """A prompt and its answer as texts of `Ids`."""
    ids, n = tokenizer.encode_pair(prompt, answer)
    return tuple("".join(f" {i}" for i in part) for part in (ids[:n], ids[n:]))


class Bench:
    """The model, its twins and the data; each method is one side of one piece of work."""

    def __init__(
        self,
        shape: str,
        device: str,
        dtype: torch.dtype,
        sides: str = "ours hf lora",
        data: Path | None = None,
        task: str = "mquake",
        epochs: int = 5,
    ):
        """shape: a name of SHAPES, of random weights and texts; or a model folder, with `data` the
        folder of the splits, whose training texts of `task` and TruthfulQA questions are used."""
        torch.manual_seed(0)
        self.device, self.epochs = device, epochs
        self.graphs = device != "cpu"  # whether steps are replays of CUDA graphs
        self.during = ExitStack()  # to be closed after a piece of work
        if shape in SHAPES:
            self.model = random_model(SHAPES[shape], dtype, device)
            self.random_texts(random.Random(0))
        else:
            self.model = load_model(shape, dtype=dtype, device=device)
            self.real_texts(load_tokenizer(shape), data, task)
        self.config = self.model.config
        self.prompts = [[*map(int, prompt.split())] for prompt, _ in self.examples[:16]]
        questions = [[*map(int, question.split())] for question, _ in self.asked]
        self.shared = common_prefix_length(questions)  # tokens that all questions begin with
        layers, n = self.config.num_hidden_layers, self.config.num_attention_heads
        self.heads = {
            "upper": [(layer, 0) for layer in range(layers // 2, layers)],
            "all": [(layer, layer % n) for layer in range(layers)],
        }
        if "hf" in sides:
            self.twin = hf_twin(self.model)
        if "lora" in sides:
            self.lora, self.lora_parameters = lora(hf_twin(self.model))

    def random_texts(self, rng: random.Random) -> None:
        """8 texts of 128 tokens with 8 to predict; as many examples as MQuAKE has, lengths drawn;
        50 questions of 416 tokens, 401 of them shared, with 8 answers each."""

        def draw(low: int, high: int | None = None) -> str:
            n = rng.randint(low, high) if high else low
            return text(rng, n, self.model.config.vocab_size)

        self.step = [(" 1" + draw(119), draw(7)) for _ in range(8)]
        self.examples = [(" 1" + draw(28, 60), draw(2, 5)) for _ in range(134)]
        start = " 1" + draw(400)
        self.asked = [(start + draw(15), [draw(5, 15) for _ in range(8)]) for _ in range(50)]

    def real_texts(self, tokenizer: Tokenizer, data: Path, task: str) -> None:
        """The task's training texts, the first 8 for a step; 50 questions of TruthfulQA."""
        examples = TASKS[task].read(data, "train")
        self.examples = [as_ids(tokenizer, e.prompt, e.answer) for e in examples]
        self.step, self.asked = self.examples[:8], []
        for e in TASKS["truthfulqa"].read(data, "test", fold=0)[:50]:
            pairs = [as_ids(tokenizer, e.question, answer) for answer in (*e.right, *e.wrong)]
            self.asked.append((pairs[0][0], [answer for _, answer in pairs]))

    def offsets(self, where: str) -> torch.Tensor:
        return init_offsets(self.model, len(self.heads[where]), 0)

    def replayed(self, side: str, objective: CrossEntropy):
        """The objective as `Session.objective` gives it: on a GPU steps of "ours" are replays."""
        return GraphedObjective(objective) if self.graphs and side == "ours" else objective

    def selection(self, side: str) -> Callable[[], object]:
        """A training step of the scales on 8 texts."""
        objective = CrossEntropy(self.model, Ids(), self.step, "step")
        if side not in OURS:
            return self.one_step(*self.theirs(side, objective, lambda: range(8)))
        ours = self.replayed(side, objective)
        parameters = attach_scales(self.model, init_scales(self.model, 0))
        edits = get_edits(self.model)

        def loss() -> torch.Tensor:
            set_edits(self.model, edits)  # the other side of ours has had its turn
            return ours.loss(list(range(8)))

        return self.one_step(parameters, loss)

    def theirs(self, side: str, objective: CrossEntropy, rows: Callable, where: str | None = None):
        """(parameters, loss) of transformers with hooks on scales or on the heads `where`, or of
        LoRA."""

        def loss_of(model):
            batch = hf_batch([objective.rows[i] for i in rows()], self.device)
            return model(**batch, use_cache=False).loss

        if side == "lora":
            return self.lora_parameters, lambda: loss_of(self.lora)
        unhook(self.twin)
        if where is None:
            parameters = hook_scales(self.twin, init_scales(self.model, 0))
        else:
            parameters = hook_offsets(self.twin, self.heads[where], self.offsets(where))
        return parameters, lambda: loss_of(self.twin)

    def one_step(self, parameters: list[torch.Tensor], loss: Callable[[], torch.Tensor]):
        optimizer, schedule = optimizer_for(parameters, LR), Schedule(LR, 1, l1=1e-4)
        return lambda: train_step(optimizer, parameters, loss(), schedule, 0, 1)["task_loss"]

    def training(self, side: str, where: str, epochs: int | None = None) -> Callable[[], object]:
        """Offset training on all examples in batches of 8."""
        objective = CrossEntropy(self.model, Ids(), self.examples, "examples")

        def run() -> float:
            objective.cache.layer, objective.cache.kept = 0, {}
            if side in OURS:
                parameters = attach_offsets(self.model, self.heads[where], self.offsets(where))
                loss_of = self.replayed(side, objective).loss  # captures its own
            else:
                chosen: list[int] = []
                parameters, loss = self.theirs(side, objective, lambda: chosen, where)

                def loss_of(rows: list[int]) -> torch.Tensor:
                    chosen[:] = rows
                    return loss()

            schedule = Schedule(LR, epochs or self.epochs, by_length=side in OURS)
            asked = SimpleNamespace(lengths=objective.lengths, loss=loss_of)
            return [loss for _, loss in fit(Training(parameters, asked, schedule, 0))][-1]

        return run

    def greedy(self, side: str) -> Callable[[], object]:
        """16 tokens after each of 16 prompts, offsets in the upper half."""
        if side == "hf":
            unhook(self.twin)
            hook_offsets(self.twin, self.heads["upper"], self.offsets("upper"))
            return lambda: hf_generate(self.twin, self.prompts, 16)
        attach_offsets(self.model, self.heads["upper"], self.offsets("upper"))
        decoding = None
        if self.graphs and side == "ours":
            # an evaluation has many batches, for which it folds and captures once
            self.during.enter_context(folded_offsets(self.model))
            decoding = GraphedDecoding()

        def run() -> list[list[int]]:
            with folded_offsets(self.model), packed_weights(self.model):
                return generate_all(self.model, self.prompts, 16, (-1,), 16, "", decoding=decoding)

        return run

    def choices(self, side: str, questions: slice) -> Callable[[], object]:
        """Scores of the answers to each question."""
        asked = self.asked[questions]
        if side == "ours":
            attach_offsets(self.model, self.heads["upper"], self.offsets("upper"))

            def run() -> list[list[float]]:
                with folded_offsets(self.model), packed_weights(self.model):
                    return score_answers(self.model, Ids(), asked, 64, "")

            return run
        unhook(self.twin)
        hook_offsets(self.twin, self.heads["upper"], self.offsets("upper"))
        split = [([*map(int, q.split())], [list(map(int, a.split())) for a in answers])
                 for q, answers in asked]  # fmt: skip
        return lambda: [[hf_score(self.twin, q, a) for a in answers] for q, answers in split]

    def decode(self, side: str) -> Callable[[], object]:
        """129 tokens after one prompt, as a graph or compiled; time / 128 is that of a step."""
        decoding = GraphedDecoding() if side == "ours" else Decoding(compiled_step())
        prompts = self.prompts[:1]
        return lambda: generate_all(self.model, prompts, 129, (-1,), 1, "", decoding=decoding)
