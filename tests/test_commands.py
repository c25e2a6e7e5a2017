"""Commands that the pages print run as they stand, in a copy of the repository."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from test_docs import PAGES, commands

# commands that no test of this file runs, and why
ELSEWHERE = [
    # a network, or a server
    r"meta-llama|data\.download|URL",
    # weights or data that are no part of the repository; test_packaged unpacks them
    r"--data data/real|weights/smollm2|weights/gemma|runs/smollm2|weights\.packaged",
    # minutes, or a GPU
    r"weights\.pretrain|measure/benchmark|gpu\.py all --out|gpu\.py all$|--device cuda",
    r"gpu\.py all --device cpu",  # test_gpu
    r"^python (select_heads|train|eval)\.py",  # test_readme
    # test_studies prints the whole page
    r"lofit\.studies (tasks|heads|transfer|methods|data|forgets|layers|sweep --model)",
    r"lofit\.studies (rules|quantized)",
]
RUN = "runs/mini-llama/mquake"
HERE = dict.fromkeys(
    command.replace("RUN", RUN).replace("FOLDER", "weights/mini-llama")
    for page in PAGES
    for command in commands(page)
    if not any(re.search(pattern, command) for pattern in ELSEWHERE)
)


def start(command: str, folder: Path) -> subprocess.CompletedProcess:
    python, *words = shlex.split(command)
    assert python == "python"
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with a run that was hardly trained."""
    folder = tmp_path_factory.mktemp("copy") / "lofit"

    def others(where: str, names: list[str]) -> set[str]:
        """What a working copy has beside the repository."""
        kept = {"weights": ("mini-llama", "mini-gemma"), "data": ("mini",)}.get(Path(where).name)
        folders = {name for name in names if (Path(where) / name).is_dir()}
        return folders - {*kept} if kept else {*names} & {".git", "runs", "__pycache__"}

    shutil.copytree(REPO, folder, ignore=others)
    for script in ("select_heads.py", "train.py", "eval.py"):
        flags = "" if script == "eval.py" else " --epochs 1 --n-train 8"
        done = start(f"python {script}{flags} --dtype float32", folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE)
def test_it_runs(copy, command):
    done = start(command, copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_there_are_some():
    assert len(HERE) > 15
