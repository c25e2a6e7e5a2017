"""Pretrain a miniature model on the synthetic world, from nothing, on CPU or GPU.

    python -m weights.pretrain                 # -> weights/mini-llama, about 50 minutes on 2 cores
    python -m weights.pretrain mini-gemma      # -> weights/mini-gemma

An interrupted run continues from its checkpoint in runs/pretrain/. Every few hundred steps it logs
the loss and the zero-shot probes (what the base model knows, and what it does with edits).
The documents of a step depend on the seed and the step alone, so a resumed run sees the same text.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data.world import World
from lofit.files import read_tensors, write_json, write_tensors
from lofit.llm.config import ModelConfig
from lofit.llm.model import CausalLM
from lofit.llm.save import save_model
from lofit.llm.tokenizer import load_tokenizer
from weights.corpus import EARLY, LATE, Corpus
from weights.probes import run_probes
from weights.vocabulary import write_pieces, write_words

SHAPE = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=16, head_dim=16, max_position_embeddings=1024, rms_norm_eps=1e-5,
)  # fmt: skip
# name -> (config.json, what writes the tokenizer). As in Gemma 7B, its heads together are wider
# than hidden_size.
MODELS = {
    "mini-llama": (SHAPE | {"model_type": "llama"}, write_words),
    "mini-gemma": (SHAPE | {"model_type": "gemma", "head_dim": 24}, write_pieces),
}
WARMUP = 200
ROWS = (58, 40, 40, 10, 1)  # documents of one micro-batch, shortest first; sums to MIX


def micro_batches(docs: list[list[int]]) -> list[torch.Tensor]:
    """Token lists -> batches [rows, positions] of like length, padded on the right with -100.

    Rows are fixed and lengths rounded up, for on CPU every new shape costs a new matmul kernel.
    """
    docs = sorted(docs, key=len)
    batches, start = [], 0
    for rows in ROWS:
        part = docs[start : start + rows]
        width = -(-len(part[-1]) // 4) * 4
        batches.append(torch.tensor([doc + [-100] * (width - len(doc)) for doc in part]))
        start += rows
    return batches


def init_weights(model: CausalLM) -> None:
    """GPT-2's initialisation: N(0, 0.02), the two projections into the residual stream smaller."""
    depth = 2 * model.config.num_hidden_layers
    for name, p in model.named_parameters():
        if p.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(depth) if into_residual else 0.02)


def learning_rate(step: int, steps: int, late_steps: int, peak: float) -> float:
    """Linear warm-up, a cosine to zero; for the late steps from a quarter of it down to zero."""
    if step >= steps:
        return peak / 4 * (1 - (step - steps) / late_steps)
    warm = min(1.0, (step + 1) / WARMUP)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


class Checkpoint:
    """Weights, AdamW's moments and the step, as safetensors."""

    def __init__(self, path: Path, model: CausalLM, optimizer: torch.optim.AdamW):
        self.path, self.model, self.optimizer = path, model, optimizer

    def save(self, step: int) -> None:
        tensors = {"step": torch.tensor(step)}
        for name, p in self.model.named_parameters():
            tensors[name] = p.detach()
            tensors |= {f"{k}.{name}": v for k, v in self.optimizer.state[p].items()}
        write_tensors(self.path, tensors, {})

    def load(self) -> int:
        """Restore everything if a checkpoint is there; returns the step to go on from."""
        if not self.path.exists():
            return 0
        tensors, _ = read_tensors(self.path)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[name])
                self.optimizer.state[p] = {
                    k: tensors[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")
                }
        return int(tensors["step"])


def train_step(
    model: CausalLM, optimizer: torch.optim.AdamW, batches: list[torch.Tensor], device: str
) -> float:
    """One optimiser step over all tokens of the micro-batches; returns the loss per token."""
    n_tokens = sum((batch[:, 1:] >= 0).sum().item() for batch in batches)
    total = 0.0
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch.clamp(min=0)[:, :-1])
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        )
        (loss / n_tokens).backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total / n_tokens


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg, shown = parser.add_argument, "(default: %(default)s)"
    arg("name", nargs="?", default="mini-llama", choices=MODELS, help=f"which model {shown}")
    arg("--out", type=Path, help="where to (default: weights/NAME)")
    arg("--steps", type=int, default=2500, help=f"with the EARLY habits of corpus.py {shown}")
    arg("--late-steps", type=int, default=500, help=f"with the LATE ones {shown}")
    arg("--lr", type=float, default=2e-3, help=f"peak learning rate {shown}")
    arg("--seed", type=int, default=0, help=f"of weights and documents {shown}")
    arg("--probe-every", type=int, default=250, help=f"steps between two checkpoints {shown}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arg("--device", default=device, help="cpu or cuda (default: cuda where there is one)")
    return parser.parse_args(argv)


def build_optimizer(model: CausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    corpus, late_corpus = Corpus(World(), EARLY), Corpus(World(), LATE)
    out = args.out or Path("weights") / args.name
    shape, write_tokenizer = MODELS[args.name]
    write_json(out / "config.json", shape | write_tokenizer(corpus, out))
    config, tokenizer = ModelConfig.from_file(out / "config.json"), load_tokenizer(out)
    model = CausalLM(config).to(args.device)
    init_weights(model)
    optimizer = build_optimizer(model, args.lr)
    work = Path("runs/pretrain") / out.name
    checkpoint = Checkpoint(work / "checkpoint.safetensors", model, optimizer)
    start = checkpoint.load()
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} parameters, {config.vocab_size} tokens, from step {start}", flush=True)

    def log(step: int, values: dict[str, float]) -> None:
        with (work / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        print(f"step {step}", *(f" {k} {v:.4g}" for k, v in values.items()), flush=True)

    work.mkdir(parents=True, exist_ok=True)
    losses, tokens, since = [], 0, time.time()
    last = args.steps + args.late_steps
    for step in range(start, last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.late_steps, args.lr)
        rng = random.Random(f"{args.seed} {step}")
        texts = (corpus if step < args.steps else late_corpus).step(rng)
        docs = [tokenizer.encode(text) + [config.eos_token_id[0]] for text in texts]
        tokens += sum(map(len, docs))
        losses.append(train_step(model, optimizer, micro_batches(docs), args.device))
        done = step + 1
        if done % 50 == 0:
            speed = tokens / (time.time() - since)
            log(done, {"loss": sum(losses) / len(losses), "tokens_per_s": speed})
            losses, tokens, since = [], 0, time.time()
        if done % args.probe_every == 0 or done == last:
            checkpoint.save(done)
            save_model(model, out, torch.bfloat16)
            log(done, run_probes(model, tokenizer, corpus))


if __name__ == "__main__":
    main()
