"""Which tokens each offset of a run raises and lowers most.

    python -m lofit.inspect.explain runs/mini-llama/mquake

RUN is a run folder, an adapter or a hub id. Prints a table and writes explain.json to its folder.

A head's offset v adds W_o v to the hidden state of every position. The logit lens (nostalgebraist,
2020) reads such a vector through the final norm and lm_head as if no layer followed. It is a
reading, not a proof: what later layers make of the shift is not in it.
"""

import argparse

import torch

from lofit import errors
from lofit.errors import InputError
from lofit.export.folding import weight_of
from lofit.files import write_json
from lofit.heads import attached_offsets
from lofit.llm.model import CausalLM
from lofit.llm.tokenizer import Tokenizer, load_tokenizer
from lofit.run.arguments import natural
from lofit.run.setup import pick_device
from lofit.run.tuned import open_tuned

EXPLAIN = "explain.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg = parser.add_argument
    arg("run", metavar="RUN", help="a run folder, an adapter folder or a hub id")
    arg("--model", help="where the base model is now (default: where the run had it)")
    arg("--tokens", type=natural, default=5, help="tokens of each kind (default: %(default)s)")
    return parser.parse_args(argv)


@torch.no_grad()
def head_write(model: CausalLM, layer: int, head: int, v: torch.Tensor) -> torch.Tensor:
    """W_o v, what an offset [head_dim] of a head adds after o_proj: [hidden_size] fp32."""
    weight, dim = weight_of(model.model.layers[layer].self_attn.o_proj), model.config.head_dim
    return weight[:, head * dim : (head + 1) * dim] @ v.float().to(weight.device)


@torch.no_grad()
def lens(model: CausalLM, layer: int, shift: torch.Tensor) -> torch.Tensor:
    """A shift [hidden_size] of a layer's attention output -> logits [V] fp32. Norms make its length
    immaterial."""
    block, shift = model.model.layers[layer], shift.to(model.lm_head.weight)
    if block.sandwich:  # Gemma 2 and 3 norm the attention's output first
        shift = block.post_attention_layernorm(shift)
    return model.lm_head(model.model.norm(shift)).float()


def explain(model: CausalLM, tokenizer: Tokenizer, n: int) -> list[dict]:
    """What the attached offsets write: an entry for each head, by layer, and where a layer has
    several one of their sum ("head": "all"). Each has |W_o v| ("written_norm") and the n tokens of
    highest and of lowest logit, "raises" and "lowers": [[token, logit], ...]."""

    def entry(layer: int, head: int | str, shift: torch.Tensor) -> dict:
        logits = lens(model, layer, shift)[: tokenizer.size]
        order = logits.argsort(descending=True, stable=True).tolist()
        raises, lowers = (
            [[tokenizer.token(i), round(logits[i].item(), 2)] for i in which]
            for which in (order[:n], order[::-1][:n])
        )
        found = {"layer": layer, "head": head, "written_norm": shift.norm().item()}
        return found | {"raises": raises, "lowers": lowers}

    found, together = [], {}
    for (layer, head), v in zip(*attached_offsets(model), strict=True):
        shift = head_write(model, layer, head, v)
        together.setdefault(layer, []).append(shift)
        found.append(entry(layer, head, shift) | {"norm": v.norm().item()})
    found += [entry(layer, "all", sum(own)) for layer, own in together.items() if len(own) > 1]
    return sorted(found, key=lambda e: e["layer"])  # stable: "all" stands after its heads


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tuned = open_tuned(args.run, args.model, device=pick_device("auto"))
    found = explain(tuned.model, load_tokenizer(tuned.base), args.tokens)
    if not found:
        raise InputError(f"{args.run}: edits of {tuned.method} are no offsets of heads")
    path = tuned.folder_to_write / EXPLAIN
    write_json(path, {"offsets": found})
    print("layer head     |v|   |Wv|  raises | lowers")
    for e in found:
        norm = f"{e['norm']:.2f}" if "norm" in e else ""
        words = [" ".join(repr(token) for token, _ in e[name]) for name in ("raises", "lowers")]
        numbers = f"{e['layer']:5} {e['head']:>4} {norm:>7} {e['written_norm']:6.2f}"
        print(f"{numbers}  {' | '.join(words)}")
    print(f"-> {path}")


if __name__ == "__main__":
    errors.run(main)
