"""What a kill loses, and what it costs that it loses nothing. Runs on the miniatures.

python tests/measure/durability.py kills --n 100     # SIGKILL
python tests/measure/durability.py signals --n 40    # Ctrl-C and SIGTERM, while imports run too
python tests/measure/durability.py cost --rounds 7   # training with states written and without

kills: each of the three scripts on a part of each task, over an older run's files, is killed at
random moments and started again until it is whole; its files must then be, byte for byte, those of
a run that was left alone. Behind every kill, files that belong together must be of one run. A
killed process is a fork of this one, which spares it the seconds of imports.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPO = Path(__file__).parents[2]
RUNS = REPO / "runs"
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

import eval as eval_script  # noqa: E402
import select_heads  # noqa: E402
import train  # noqa: E402
from lofit import errors  # noqa: E402
from lofit.llm.checkpoint import load_model  # noqa: E402
from lofit.run import resume, summary  # noqa: E402
from lofit.run.resume import TrainingState  # noqa: E402

SMALL = ["--epochs", "2", "--batch-size", "2"]
STEPS = [(select_heads, SMALL), (train, SMALL), (eval_script, ["--batch-size", "2"])]
SETS = {
    "heads.json": ["heads.png"], "offsets.safetensors": ["lofit_config.json"],
    "results.json": ["predictions.jsonl"],
}  # fmt: skip
TASKS = ("mquake", "clutrr", "truthfulqa")


def part_of_the_data(folder: Path) -> Path:
    """12 examples of each task to train on, 4 for validation, 8 to be asked."""
    mini = REPO / "data" / "mini"
    for task in ("MQuAKE", "clutrr", "truthfulqa"):
        (folder / task).mkdir(parents=True)
        for path in (mini / task).iterdir():
            kind = next((k for k in ("train", "val", "test") if k in path.name), None)
            n = {"train": 12, "val": 4, "test": 8}.get(kind)
            text = path.read_text()
            if path.suffix == ".json" and n:
                text = json.dumps(json.loads(text)[:n])
            elif n:
                text = "".join(text.splitlines(keepends=True)[: n + (path.suffix == ".csv")])
            (folder / task / path.name).write_text(text)
    return folder


def start(script, argv: list[str]) -> int:
    """A process that runs the script's main; its output goes nowhere."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.environ["CHILD_ERRORS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    code = 1
    try:
        errors.run(lambda: script.main(argv))
        code = 0
    finally:
        os._exit(code)


def run(script, argv: list[str]) -> float:
    """To its end; the seconds that it took."""
    began = time.perf_counter()
    code = os.waitstatus_to_exitcode(os.waitpid(start(script, argv), 0)[1])
    assert code == 0, (script.__name__, code, Path(os.environ["CHILD_ERRORS"]).read_text())
    return time.perf_counter() - began


def files_of(folder: Path) -> dict[str, bytes]:
    """Bytes by name of all files but logs, states and temporary ones."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != "log.jsonl"]
    paths = [p for p in paths if p.suffix not in (".unfinished", ".partial")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths)}


def faults(folder: Path, old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """What is torn, lost or mixed in the folder of a killed run."""
    found, now = [], files_of(folder)
    for name, data in now.items():
        if data not in (old.get(name), new.get(name)):
            found.append(f"{name} is of neither run")
    for name in new.keys() & {n for n in new if Path(n).name in SETS}:
        whole = [name] + [str(Path(name).with_name(n)) for n in SETS[Path(name).name]]
        whole = [n for n in whole if n in new]
        if name not in now or len(whole) == 1:
            continue  # the one that tells is away
        if not any(all(now.get(n) == of.get(n) for n in whole) for of in (old, new)):
            found.append(f"{whole} are of two runs")
    return found


def kills(n: int, seed: int) -> None:
    draw, began = random.Random(seed), time.time()
    with contextlib.suppress(ImportError):  # what is imported here is not by each fork
        import matplotlib.pyplot  # noqa: F401
    load_model(REPO / "weights/mini-llama")
    summary.paired_bootstrap.__defaults__ = (0, 100)  # draws: no more than it takes
    resume.SHARE = 1.0  # states often: more moments to be killed at, and to go on from
    print(f"{'task':12}{'script':14}{'alone':>7}{'kills':>7}{'away':>6}{'whole':>7}  faults")
    told = [0, 0, 0]
    for task in TASKS:
        with tempfile.TemporaryDirectory() as tmp:
            os.environ["CHILD_ERRORS"] = f"{tmp}/errors"
            work, snaps = Path(tmp) / "run", [Path(tmp) / f"snap{i}" for i in range(4)]
            flags = [
                "--task",
                task,
                "--run",
                str(work),
                "--model",
                str(REPO / "weights/mini-llama"),
            ]
            flags += ["--data", str(part_of_the_data(Path(tmp) / "data")), "--device", "cpu"]
            for script, extra in STEPS:
                run(script, [*flags, *extra, "--seed", "7"])
            shutil.copytree(work, snaps[0])
            for i, (script, extra) in enumerate(STEPS):
                alone = run(script, [*flags, *extra])
                shutil.copytree(work, snaps[i + 1])
                old, new = files_of(snaps[i]), files_of(snaps[i + 1])
                killed, away, wholes, wrong = 0, 0, 0, []
                quota = (n + 8) // 9
                while killed < quota:
                    shutil.rmtree(work)
                    shutil.copytree(snaps[i], work)
                    while True:
                        pid = start(script, [*flags, *extra])
                        wait = draw.uniform(0, alone) if killed < quota else 1e9
                        until, ended = time.perf_counter() + wait, 0
                        while not ended and time.perf_counter() < until:
                            time.sleep(0.002)
                            ended, status = os.waitpid(pid, os.WNOHANG)
                        if ended:
                            break
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                        killed += 1
                        wrong += faults(work, old, new)
                        away += any(name not in files_of(work) for name in new if name in old)
                    if code := os.waitstatus_to_exitcode(status):
                        wrong.append(f"exit code {code}")
                    wholes += 1
                    if files_of(work) != new:
                        wrong.append("not the bytes of a run left alone")
                    left = [p.name for p in work.rglob("*") if p.name.startswith(".")]
                    left += [p.name for p in work.rglob("*.unfinished")]
                    wrong += [f"{name} is left" for name in left]
                told = [told[0] + killed, told[1] + wholes, told[2] + len(wrong)]
                line = f"{task:12}{script.__name__:14}{alone:6.1f}s{killed:7}{away:6}{wholes:7}"
                print(f"{line}  {'; '.join(dict.fromkeys(wrong)) or 'none'}", flush=True)
    print(
        f"{told[0]} kills, {told[1]} runs continued to their end, {told[2]} faults"
        f" ({time.time() - began:.0f} s; away: a set of files that a kill hit while it was renamed)"
    )


def signals(n: int, seed: int) -> None:
    draw, bad, codes = random.Random(seed), 0, {}
    scripts = [["select_heads.py"], ["train.py", "--heads", "random"]]
    scripts += [["eval.py", "--base-only", "--split", "val"]]
    with tempfile.TemporaryDirectory() as tmp:
        for i in range(n):
            command = [sys.executable, *scripts[i % 3], "--run", f"{tmp}/{i}"]
            by = draw.choice([signal.SIGINT, signal.SIGTERM])
            child = subprocess.Popen(
                command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            after = draw.uniform(0.05, 2) if i % 2 else draw.uniform(2, 12)
            time.sleep(after)
            child.send_signal(by)
            lines = [line for line in child.communicate()[1].splitlines() if line.strip()]
            code, whole = child.returncode, child.returncode == 0 and not lines
            codes[code] = codes.get(code, 0) + 1
            if not whole and (code != 128 + by or len(lines) != 1):
                bad += 1
                print(f"{scripts[i % 3][0]}, {by.name} after {after:.2f} s: {code}, {lines[-2:]}")
    print(f"{n} signals: exit codes {codes}, {bad} that were not one line with code 130 or 143")


def cost(rounds: int) -> None:
    """A B A B in one process, so that what else the machine does is the same for both; seconds of
    the processor and of the clock."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    step, written, inside = TrainingState.__call__, [], []

    def timed(self, training, record):
        before, began = self.next_write, time.perf_counter()
        step(self, training, record)
        inside.append(time.perf_counter() - began)
        if self.next_write != before:
            written.append(self.path.stat().st_size)

    flags = ["--model", str(REPO / "weights/mini-llama"), "--data", str(REPO / "data/mini")]
    for script, extra in ((select_heads, []), (train, ["--heads", "random"]),
                          (train, ["--method", "lora"])):  # fmt: skip
        spent: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        extra += ["--validate", "last"] if script is train else []
        for states in (True, False) * rounds:
            TrainingState.__call__ = timed if states else lambda *_: None
            with (
                tempfile.TemporaryDirectory(dir=RUNS) as tmp,
                open(os.devnull, "w") as null,
            ):
                began = time.process_time(), time.perf_counter()
                with contextlib.redirect_stdout(null):
                    script.main([*flags, "--run", tmp, "--epochs", "6", *extra])
                now = time.process_time(), time.perf_counter()
            spent[states].append((now[0] - began[0], now[1] - began[1]))
        cpu, clock = (
            statistics.median(a[i] / b[i] for a, b in zip(spent[True], spent[False], strict=True))
            for i in (0, 1)
        )
        whole = sum(seconds for _, seconds in spent[True])
        print(
            f"{script.__name__:13}{' '.join(extra[:2]):15} with / without: processor {cpu:.3f},"
            f" clock {clock:.3f}; {sum(inside) / whole:.2%} of {whole / rounds:.1f} s in states,"
            f" {len(written) / rounds:.0f} states of {max(written) / 1024:.0f} KiB a run",
            flush=True,
        )
        written.clear(), inside.clear()


def main() -> None:
    RUNS.mkdir(exist_ok=True)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kills", "signals", "cost"))
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "cost":
        cost(args.rounds)
    else:
        (kills if args.what == "kills" else signals)(args.n, args.seed)


if __name__ == "__main__":
    main()
