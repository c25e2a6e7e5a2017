"""What the offsets of a run write: the tokens that each one raises and lowers most.

    python -m lofit.inspect.explain runs/mini-llama/mquake

RUN is what `eval.py --offsets` takes. Prints a table and writes explain.json to a run's folder.

A head's offset v adds W_o v to the hidden state of every position. The logit lens (nostalgebraist,
2020) reads such a vector through the final norm and lm_head as if no layer followed. It is a
reading, not a proof: what later layers make of the shift is not in it.
"""

import argparse

import torch

from lofit import errors
from lofit.errors import InputError
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
    arg("run", metavar="RUN")
    arg("--model", help="where the base model is (default: where the run had it)")
    arg("--tokens", type=natural, default=5, help="how many each (default: %(default)s)")
    return parser.parse_args(argv)


@torch.no_grad()
def head_write(model: CausalLM, layer: int, head: int, v: torch.Tensor) -> torch.Tensor:
    """W_o v, what an offset [head_dim] of a head adds after o_proj: [hidden_size] fp32."""
    weight, dim = model.model.layers[layer].self_attn.o_proj.weight, model.config.head_dim
    return weight[:, head * dim : (head + 1) * dim].float() @ v.float().to(weight.device)


@torch.no_grad()
def lens(model: CausalLM, layer: int, shift: torch.Tensor) -> torch.Tensor:
    """A shift [hidden_size] of a layer's attention output -> logits [V] fp32. Norms make its length
    immaterial."""
    block, shift = model.model.layers[layer], shift.to(model.lm_head.weight)
    if block.sandwich:  # Gemma 2 and 3 norm the attention's output first
        shift = block.post_attention_layernorm(shift)
    return model.lm_head(model.model.norm(shift)).float()


def explain(model: CausalLM, tokenizer: Tokenizer, n: int) -> dict:
    """What the attached offsets write: {"heads": one entry a head, by layer, "layers": one a layer,
    of all its heads together}; each with norms and the n tokens of highest and of lowest logit,
    "raises" and "lowers": [[token, logit], ...]."""

    def entry(layer: int, shift: torch.Tensor, **more) -> dict:
        logits = lens(model, layer, shift)[: tokenizer.size]
        order = logits.argsort(descending=True, stable=True).tolist()
        words = {
            name: [[tokenizer.token(i), round(logits[i].item(), 2)] for i in which]
            for name, which in (("raises", order[:n]), ("lowers", order[::-1][:n]))
        }
        return {"layer": layer} | more | {"written_norm": shift.norm().item()} | words

    heads, together, count = [], {}, {}
    for (layer, head), v in zip(*attached_offsets(model), strict=True):
        shift = head_write(model, layer, head, v)
        together[layer] = together.get(layer, 0) + shift
        count[layer] = count.get(layer, 0) + 1
        heads.append(entry(layer, shift, head=head, norm=v.norm().item()))
    layers = [entry(layer, shift, heads=count[layer]) for layer, shift in together.items()]
    return {"heads": heads, "layers": layers}


def as_table(found: dict) -> str:
    """Both parts of `explain` as text."""
    lines = [f"{'layer':>5} {'head':>4} {'|v|':>7} {'|Wv|':>7}  raises | lowers"]
    for part in ("heads", "layers"):
        for e in found[part]:
            first = f"{e['head']:4} {e['norm']:7.2f}" if "head" in e else f"{e['heads']:4} {'':7}"
            raises, lowers = (
                " ".join(repr(token) for token, _ in e[name]) for name in ("raises", "lowers")
            )
            lines.append(f"{e['layer']:5} {first} {e['written_norm']:7.2f}  {raises} | {lowers}")
        lines += ["\nall edited heads of a layer together"] if part == "heads" else []
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tuned = open_tuned(args.run, args.model, device=pick_device("auto"))
    found = explain(tuned.model, load_tokenizer(tuned.base), args.tokens)
    if not found["heads"]:
        raise InputError(f"{args.run}: edits of {tuned.method} are no offsets of heads")
    path = tuned.folder_to_write / EXPLAIN
    write_json(path, found)
    print(f"{as_table(found)}\n-> {path}")


if __name__ == "__main__":
    errors.run(main)
