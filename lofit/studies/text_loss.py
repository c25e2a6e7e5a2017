"""Mean -log p of a token of plain text, of the base model and with a run's offsets.

    python -m lofit.studies.text_loss --offsets runs/mini-llama/mquake --task clutrr

The text is a task's first 200 test prompts, or the first 200 lines of --text.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from lofit import errors
from lofit.files import read_text, write_json
from lofit.heads import edits_off
from lofit.llm.model import CausalLM
from lofit.run.arguments import common_parser
from lofit.run.files import load_offsets
from lofit.run.setup import open_runs

N_TEXTS = 200


@torch.no_grad()
def text_losses(model: CausalLM, texts: list[list[int]]) -> list[float]:
    """The mean -log p of each text's tokens after the first. texts: ids, two at least."""
    device = model.lm_head.weight.device
    found = []
    for ids in texts:
        tokens = torch.tensor([ids], device=device)
        logits = model(tokens[:, :-1])[0].float()
        found.append(F.cross_entropy(logits, tokens[0, 1:]).item())
    return found


def main(argv: list[str] | None = None) -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--offsets", required=True, help="run folder or adapter")
    parser.add_argument("--text", type=Path, help="a file, one text a line")
    args = parser.parse_args(argv)
    with open_runs(args, "text_loss") as runs:
        run = next(runs)  # of one fold: they share their prompts
        if args.text:
            texts = [line for line in read_text(args.text).splitlines() if line.strip()]
        else:
            texts = [example.prompt for example in run.read("test")]
        limit = run.model.config.max_position_embeddings
        ids = [run.tokenizer.encode(text)[:limit] for text in texts[:N_TEXTS]]
        ids = [each for each in ids if len(each) > 1]
        if not ids:
            raise errors.InputError(f"{args.text or args.task}: no text of two tokens or more")
        load_offsets(args.offsets, run.model)
        tuned = text_losses(run.model, ids)
        with edits_off(run.model):
            base = text_losses(run.model, ids)
        write_json(run.folder / "text_loss.json", run.info | {"base": base, "tuned": tuned})
    print(f"{len(ids)} texts: {sum(base) / len(ids):.4f} -> {sum(tuned) / len(ids):.4f}")


if __name__ == "__main__":
    errors.run(main)
