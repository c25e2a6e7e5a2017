"""What an export costs, and whether stock transformers then says what eval.py says.

python tests/measure/export.py                 # peak memory: 2 GB of random weights in 5 shards
python tests/measure/export.py --run runs/mini-llama/mquake    # greedy predictions of a run's split
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
from loading import memory, write_checkpoint
from lofit.llm.files import read_json
from lofit.run.artefacts import save_offsets

from lofit.export import formats
from lofit.llm.checkpoint import load_model


def in_a_process(work, *args):
    """The result of work(results, *args) in a process of its own, whose peak is then the work's."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(results, *args))
    process.start()
    found = results.get()
    process.join()
    return found


def make_run(results: multiprocessing.Queue, base: Path, run: Path) -> None:
    """Random offsets for one head of each layer."""
    model = load_model(base, dtype=torch.bfloat16)
    heads = [(layer, 0) for layer in range(model.config.num_hidden_layers)]
    offsets = torch.randn(len(heads), model.config.head_dim)
    info = {"model": str(base), "fingerprint": model.source.fingerprint}
    save_offsets(run / "offsets.safetensors", heads, offsets, info)
    results.put(None)


def run_export(results: multiprocessing.Queue, run: Path, out: Path) -> None:
    before, start = memory("VmRSS"), time.time()
    with contextlib.redirect_stdout(None):
        formats.main([str(run), "--format", "hf", "--out", str(out)])
    results.put((before, memory("VmHWM"), time.time() - start))


def measure_memory(gigabytes: float, shards: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        base, run, out = (Path(name) / part for part in ("base", "run", "out"))
        base.mkdir()
        n_values = write_checkpoint(base, gigabytes, shards)
        in_a_process(make_run, base, run)
        before, peak, seconds = in_a_process(run_export, run, out)
        largest = max(path.stat().st_size for path in out.glob("*.safetensors"))
        print(
            f"{n_values:,} values stored in bfloat16, {shards} shards, the largest"
            f" {largest / 1e6:.0f} MB: exported in {seconds:.1f} s; the process had"
            f" {before / 1e6:.0f} MB before and {peak / 1e6:.0f} MB at its peak, the largest shard"
            f" {(peak - largest) / 1e6:+.0f} MB"
        )


@torch.no_grad()
def compare_predictions(run: Path) -> None:
    """Greedy predictions of stock transformers on the exported folder against predictions.jsonl."""
    import transformers

    told, lines = read_json(run / "results.json"), (run / "predictions.jsonl").open()
    items = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        formats.main([str(run), "--format", "hf", "--out", str(out)])
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    same = right = 0
    for start in range(0, len(items), 50):
        part = items[start : start + 50]
        asked = tokenizer([item["prompt"] for item in part], return_tensors="pt", padding=True)
        asked.pop("token_type_ids", None)
        new = model.generate(**asked, do_sample=False, max_new_tokens=16)
        for item, ids in zip(part, new[:, asked.input_ids.shape[1] :], strict=True):
            prediction = tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip()
            same += prediction == item["tuned"]["prediction"].strip()
            right += prediction.lower() in [answer.lower() for answer in item["references"]]
    n = len(items)
    print(
        f"{same} of {n} predictions equal; em {right / n:.1%}, eval.py's {told['tuned']['em']:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--run", type=Path)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.run:
        compare_predictions(args.run)
    else:
        measure_memory(args.gigabytes, args.shards)


if __name__ == "__main__":
    main()
