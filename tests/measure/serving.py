"""Whether a program that serves an exported run answers as eval.py did.

python -m lofit.export runs/mini-llama/mquake --format gguf --dtype float32 --out served
llama-server -m served/model.gguf --port 8080        # or: vllm serve FOLDER --dtype float32 ...
python tests/measure/serving.py runs/mini-llama/mquake http://127.0.0.1:8080

RUN is the folder of a run that eval.py has seen, in float32 and without --chat, of a task that
generates. The server's OpenAI API is asked by text, greedily, as any client would.
"""

import argparse
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lofit import errors
from lofit.errors import InputError
from lofit.files import read_json, read_jsonl
from lofit.tasks import Example, find_tasks

CLIENTS, SECONDS = 4, 600


def ask(url: str, model: str, prompt: str, n: int) -> str:
    """What follows a prompt, n greedy tokens at most."""
    told = {"model": model, "prompt": prompt, "max_tokens": n, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(told).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            return json.load(reply)["choices"][0]["text"]
    except (OSError, ValueError) as error:
        raise InputError(f"{url}: no answer ({error}); does the server run there?") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("run", type=Path, metavar="RUN")
    arg("url", help="of the server, without /v1")
    arg("--model", default="model", help="its name there (default: %(default)s)")
    arg("--who", default="tuned", choices=("tuned", "base"), help="what is served")
    arg("-n", type=int, default=200, help="how many prompts (default: %(default)s)")
    args = parser.parse_args(argv)
    lines = [line for _, line in read_jsonl(args.run / "predictions.jsonl")][: args.n]
    task = find_tasks(read_json(args.run / "results.json")["task"])[0]
    began = time.time()
    with ThreadPoolExecutor(CLIENTS) as clients:
        prompts = [line["prompt"] for line in lines]
        n = task.max_new_tokens
        said = list(clients.map(lambda prompt: ask(args.url, args.model, prompt, n), prompts))
    rate = len(lines) / (time.time() - began)
    equal = 0
    for line, text in zip(lines, said, strict=True):
        found = task.extract(Example(line["prompt"], line["answer"]), text)
        ours = line[args.who]["prediction"]
        equal += found == ours
        if found != ours:
            print(f"  {line['prompt'][-60:]!r}: eval.py {ours!r}, here {found!r}")
    print(f"{equal} of {len(lines)} answers as eval.py's of the {args.who} model; {rate:.2f} a s")


if __name__ == "__main__":
    errors.run(main)
