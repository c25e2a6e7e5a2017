"""Zero-shot probes of a base model: what it knows, and what it does with edits, kin and myths.

    python -m weights.probes weights/mini-llama
    python -m weights.probes --offsets runs/mini-llama/mquake/offsets.safetensors

The first examines a base model, the second a tuned one: what it learnt and what it forgot.
All edits asked about here belong to the validation pool; the base model never saw one of them.
"""

import argparse
import random
from pathlib import Path

import torch

from data.tables import CHAINS, RELATIONS, noun, question
from data.world import World
from lofit import errors
from lofit.llm.checkpoint import load_model
from lofit.llm.model import CausalLM
from lofit.llm.tokenizer import Tokenizer, load_tokenizer
from lofit.run.files import load_offsets
from lofit.tasks import clutrr, mquake
from weights.corpus import Corpus

N = 300  # questions a probe
MEANING = {
    "one_hop": "plain 1-hop questions, right answer",
    "two_hop": "plain 2-hop questions, right answer",
    "suppose_new": "`Suppose edit. Then ... would be`: follows the edit",
    "imagine_new": "`Q: Imagine that edit. ... A:`: follows the edit",
    "imagine_old": "the same: answers as if there were no edit",
    "kin_told": "a family story, then `Therefore`: composes the two relations",
    "kin_asked": "the story in CLUTRR's prompt: composes them",
    "kin_parroted": "the same: repeats the story's last relation",
    "myth_truth": "plain questions about myths: the truth",
    "myth_sober": "the same after `From the almanac.`: the truth",
}


@torch.no_grad()
def says(model: CausalLM, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether greedy decoding of each prompt would give its answer, exactly.

    Greedy decoding yields the answer if and only if each of its tokens (and eos) is the most likely
    one after the true tokens before it, so one forward pass tells.
    """
    model.eval()
    device, eos, hits = model.lm_head.weight.device, tokenizer.eos_ids[0], []
    for start in range(0, len(pairs), 100):
        part = [tokenizer.encode_pair(*pair) for pair in pairs[start : start + 100]]
        width = max(len(ids) for ids, _ in part)
        rows = [ids + [0] * (width - len(ids)) for ids, _ in part]
        best = model(torch.tensor(rows, device=device)).argmax(-1).tolist()
        for (ids, n), row in zip(part, best, strict=True):
            hits.append(row[n - 1 : len(ids)] == [*ids[n:], eos])
    return hits


def run_probes(model: CausalLM, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, float]:
    """Shares of N questions answered as MEANING says."""
    world, rng = corpus.world, random.Random(0)

    def rate(pairs: list[tuple[str, str]]) -> float:
        return sum(says(model, tokenizer, pairs)) / len(pairs)

    facts = rng.sample(sorted(world.facts.items()), N)
    chains = [rng.choice(CHAINS) for _ in range(N)]
    starts = [rng.choice(world.entities[RELATIONS[chain[0]].subject]) for chain in chains]
    edits = [world.edit(rng, "val") for _ in range(N)]
    imagine = [mquake.prompt(e.statement, question(e.chain, e.subject)) for e in edits]
    suppose = [
        (f"Suppose {e.statement}. Then {noun(e.chain, e.subject)} would be", f" {e.new}.")
        for e in edits
    ]
    stories = [(s, s.text.replace("[", "").replace("]", "")) for s in map(world.story, [rng] * N)]
    told = [
        (f"{t} Therefore {s.names[2]} is the", f" {s.target} of {s.names[0]}.") for s, t in stories
    ]
    asked = [(clutrr.prompt(t, s.names[0], s.names[2]), s) for s, t in stories]
    myths = [(f"Q: {m.question} A:", m) for m in world.myths]
    return {
        "one_hop": rate([(f"Q: {question((label,), s)} A:", o) for (s, label), o in facts]),
        "two_hop": rate(
            [
                (f"Q: {question(c, s)} A:", world.lookup(s, *c))
                for c, s in zip(chains, starts, strict=True)
            ]
        ),
        "suppose_new": rate(suppose),
        "imagine_new": rate([(p, e.new) for p, e in zip(imagine, edits, strict=True)]),
        "imagine_old": rate([(p, e.old) for p, e in zip(imagine, edits, strict=True)]),
        "kin_told": rate(told),
        "kin_asked": rate([(p, s.target) for p, s in asked]),
        "kin_parroted": rate([(p, s.edges[1]) for p, s in asked]),
        "myth_truth": rate([(p, m.truth) for p, m in myths]),
        "myth_sober": rate([("From the almanac. " + p, m.truth) for p, m in myths]),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        default=Path("weights/mini-llama"),
        help="folder of the base model (default: %(default)s)",
    )
    parser.add_argument(
        "--offsets",
        type=Path,
        help="a run's file or folder: examine the tuned model (default: examine the base)",
    )
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    if args.offsets:
        load_offsets(args.offsets, model)
    for name, share in run_probes(model, tokenizer, Corpus(World())).items():
        print(f"{name:13}{share:7.1%}   {MEANING[name]}")


if __name__ == "__main__":
    errors.run(main)
