"""What the offsets of a run write: the tokens that each one raises and lowers most.

    python -m lofit.inspect.explain runs/mini-llama/mquake

RUN is what `eval.py --offsets` takes. Prints a table and writes explain.json to a run's folder.

A head's offset v adds W_o v to the hidden state of every position. The logit lens (nostalgebraist,
2020) reads such a vector through the final norm and lm_head as if no layer followed. It is a
reading, not a proof: what later layers make of the shift is not in it.
"""

import argparse

import torch

from lofit import errors, load_tokenizer
from lofit.files import write_json
from lofit.llm.device import pick_device
from lofit.llm.model import CausalLM
from lofit.llm.tokenizer import Tokenizer
from lofit.run.adapters import Adapter, open_adapter, open_tuned

EXPLAIN = "explain.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--model", help="where the base model is (default: where the run had it)")
    parser.add_argument(
        "--tokens", type=int, default=5, help="how many each (default: %(default)s)"
    )
    return parser.parse_args(argv)


def head_write(model: CausalLM, layer: int, head: int, v: torch.Tensor) -> torch.Tensor:
    """W_o v, what an offset [head_dim] of a head adds after o_proj: [hidden_size] fp32."""
    dim = model.config.head_dim
    columns = slice(head * dim, (head + 1) * dim)
    return model.model.layers[layer].self_attn.o_proj.weight[:, columns].float() @ v.float().to(
        model.lm_head.weight.device
    )


@torch.no_grad()
def lens(model: CausalLM, layer: int, shift: torch.Tensor) -> torch.Tensor:
    """A shift [hidden_size] of a layer's attention output -> logits [V] fp32, by the final norm and
    lm_head; Gemma 2 and 3 norm the attention's output first. Norms make its length immaterial."""
    block = model.model.layers[layer]
    shift = shift.to(model.lm_head.weight)
    shift = block.post_attention_layernorm(shift) if block.sandwich else shift
    return model.lm_head(model.model.norm(shift)).float()


def extremes(tokenizer: Tokenizer, logits: torch.Tensor, n: int) -> dict[str, list]:
    """The n tokens of highest and of lowest logit: {"raises", "lowers"}: [[token, logit], ...]."""

    def pairs_of(which: torch.Tensor) -> list:
        return [[tokenizer.token(i), round(logits[i].item(), 2)] for i in which.tolist()]

    order = logits[: tokenizer.size].argsort(descending=True, stable=True)
    return {"raises": pairs_of(order[:n]), "lowers": pairs_of(order.flip(0)[:n])}


def explain(model: CausalLM, tokenizer: Tokenizer, adapter: Adapter, n: int) -> dict:
    """{"heads": one entry an edited head in the adapter's order, "layers": one an edited layer, of
    all its heads together}, each with norms and `extremes`."""
    heads, shifts = [], {}
    for (layer, head), v in zip(adapter.heads, adapter.offsets, strict=True):
        shift = head_write(model, layer, head, v)
        shifts[layer] = shifts.get(layer, 0) + shift
        entry = {"layer": layer, "head": head, "norm": v.norm().item()}
        entry |= {"written_norm": shift.norm().item()}
        heads.append(entry | extremes(tokenizer, lens(model, layer, shift), n))
    layers = [
        {"layer": layer, "heads": sum(at == layer for at, _ in adapter.heads)}
        | {"written_norm": shift.norm().item()}
        | extremes(tokenizer, lens(model, layer, shift), n)
        for layer, shift in sorted(shifts.items())
    ]
    return {"heads": heads, "layers": layers}


def explain_run(name: str, model_name: str | None, n: int) -> tuple[dict, Adapter]:
    """`explain` of a run by name. InputError if its base model is missing or another one."""
    adapter = open_adapter(name)
    model = open_tuned(adapter, name, model_name, device=pick_device("auto"))
    tokenizer = load_tokenizer(model.source.name, model.source.revision)
    return explain(model, tokenizer, adapter, n), adapter


def as_table(found: dict) -> str:
    """Both parts of `explain` as text."""

    def words(pairs: list) -> str:
        return " ".join(repr(token) for token, _ in pairs)

    lines = [f"{'layer':>5} {'head':>4} {'|v|':>7} {'|Wv|':>7}  raises | lowers"]
    for entry in found["heads"]:
        lines.append(
            f"{entry['layer']:5} {entry['head']:4} {entry['norm']:7.2f}"
            f" {entry['written_norm']:7.2f}  {words(entry['raises'])} | {words(entry['lowers'])}"
        )
    lines.append("\nall edited heads of a layer together")
    for entry in found["layers"]:
        lines.append(
            f"{entry['layer']:5} {entry['heads']:4} {'':7} {entry['written_norm']:7.2f}"
            f"  {words(entry['raises'])} | {words(entry['lowers'])}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.tokens < 1:
        raise errors.InputError(f"--tokens {args.tokens}: expected at least 1")
    found, adapter = explain_run(args.run, args.model, args.tokens)
    path = adapter.folder_to_write() / EXPLAIN
    write_json(path, found)
    print(f"{as_table(found)}\n-> {path}")


if __name__ == "__main__":
    errors.run(main)
