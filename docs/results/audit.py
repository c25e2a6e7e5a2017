"""A second opinion on the numbers of README.md, results.md and tables.md, with numpy alone.

    python docs/results/audit.py [FOLDER]        # another copy of the repository

Nothing of lofit is imported. The lines of docs/results/*.jsonl are read anew. Every table of
docs/tables.md is computed again from them, cell by cell, with the flags of the command above it and
the labels of the row. Then the text: a number with a decimal point or a comma must be one of those
that were recomputed for the tables under the same heading or for the verdicts (where no table is,
as in README.md, of any table), and an interval must be one as a whole; sentences of CLAIMS are
computed; ELSEWHERE lists what no record holds. Other whole numbers are counted, not checked. Exit
code 1, and a line for each difference, if anything differs.
"""

import argparse
import gzip
import itertools
import json
import math
import re
import shlex
import statistics
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

RESULTS, TABLES = "docs/results.md", "docs/tables.md"
# (page, part of the heading) -> numbers of its text that come from no record
ELSEWHERE = {
    ("README.md", "Run it"): "3.10",  # of Python
    (RESULTS, "How it was"): "0.01 0.03 0.1 2.13 2.11",  # rates, versions of torch
    (RESULTS, "5 How"): "0.03",
    (RESULTS, "8 What"): "0.03",
    (RESULTS, "9 What"): "0.4.13",  # lm-evaluation-harness
    (RESULTS, "What surprised"): "100.0 67.7 69.7 98.0 1.7 27.3 82.7 57.7 3.3 0.3 23.3"
    " 99.3 17.7 24.6 2.5 96.2 0.0",  # weights.probes
}
FIELDS = "kind model task data seed dtype method by k heads_of select train lr_factor tested"
FIELDS = f"{FIELDS} quantize".split()
TASKS = {"MQuAKE": "mquake", "CLUTRR": "clutrr", "TruthfulQA": "truthfulqa", "ListOps": "listops"}
METRIC = {"mquake": "em_stripped", "truthfulqa": "mc1", "svamp": "accuracy", "gsm8k": "accuracy"}
HEADS = {"smollm2-135m-instruct": 270, "gemma-3-270m": 72, "mini-llama": 128}
DRAWN = ("random", "spread")
LABELS = ("claim", "model", "task", "LoFiT", "the other", "heads", "method", "chosen by", "what")
LABELS += ("from", "tested on", "tuned on", "by", "asked", "beside", "examples", "weights")
TRIED = {
    "lora": "--lr 1e-4 5e-4 2e-3",
    "lora_rank1": "--lr 2e-3 1e-2 5e-2",
    "red": "--lr 1e-3 5e-3 2e-2",
    "bias": "--lr 1e-3 5e-3 2e-2",
    "post_block": "--lr 5e-3 2e-2 8e-2",
    "iti": "--alpha 5 15 30",
    "repe": "--alpha 0.5 2 8",
}
DEFAULTS = (
    "--model weights/mini-llama --task mquake clutrr truthfulqa --data data/mini --seeds 42 43 44"
    " --dtype float32 --select-flags --train-flags --by scales --heads 10% --draws 5"
    " --lora-lr 5e-4 --chosen-on --methods 'lofit 10%'"
)
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
TABLE = re.compile(r"```\npython -m lofit\.studies (.*)\n```\n\n(?:[^|\n].*\n)*\n*((?:\|.*\n)+)")
INTERVAL = re.compile(r"([+-]?[\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]")


# Statistics


@lru_cache(None)
def t_value(df: float, level: float = 0.95) -> float:
    """t with `level` of Student's distribution between -t and t, by bisection of Simpson's rule."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    low, high = 0.0, 500.0
    for _ in range(60):
        t = (low + high) / 2
        y = (1 + np.linspace(0, t, 4001) ** 2 / df) ** (-(df + 1) / 2)
        mass = 2 * scale * t / 12000 * (y[0] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum() + y[-1])
        low, high = (t, high) if mass < level else (low, t)
    return low


def of_mean(deviations: np.ndarray, groups: np.ndarray) -> float:
    """The variance of a mean of items that vary by group."""
    n, sizes = len(groups), np.bincount(groups)
    sums = np.bincount(groups, deviations)
    return (sums**2 / (1 - sizes / n))[sizes > 0].sum() / n**2


def runs_of(side: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """(variance of the mean over runs, without what items add to it; degrees of freedom)."""
    df = len(side) - 1
    rest = side - side.mean(1, keepdims=True) - side.mean(0) + side.mean()
    left = sum(of_mean(row, groups) for row in rest) / df
    return max(0.0, side.mean(1).var(ddof=1) - left) / len(side), df


def parts_of(ones, others, groups=None, borrowed=(None, None)) -> tuple[float, list[tuple]]:
    """(difference of the means, [(variance, degrees of freedom)]) over items or groups, and over
    runs. borrowed: of runs, for a side with one."""
    each = ones.mean(0) - others.mean(0)
    groups = np.arange(len(each)) if groups is None else np.array(groups)
    middle, runs, by_df = each.mean(), 0.0, 0.0
    items = of_mean(each - middle, groups), len(np.unique(groups)) - 1
    for side, spread in zip((ones, others), borrowed, strict=True):
        if len(side) > 1 or spread:
            part, df = runs_of(side, groups) if len(side) > 1 else spread
            runs, by_df = runs + part, by_df + part**2 / df
    return middle, [items, *([(runs, runs**2 / by_df)] if runs else [])]


def half_of(parts: list[tuple], level: float = 0.95) -> float:
    """Half of an interval: Cochran's mean of the quantiles."""
    error = math.sqrt(sum(variance for variance, _ in parts))
    width = sum(t_value(df, level) * variance for variance, df in parts)
    return width / error if error else 0.0


def difference(*args) -> tuple[float, float, float]:
    """(difference of the means, half of its 95 % interval, standard error)."""
    middle, parts = parts_of(*args)
    return middle, half_of(parts), math.sqrt(sum(variance for variance, _ in parts))


def p_of(middle: float, parts: list[tuple]) -> float:
    """One less the level of the interval that ends at 0."""
    low, high = 0.0, 1.0
    for _ in range(24):
        level = (low + high) / 2
        low, high = (low, level) if half_of(parts, level) >= abs(middle) else (level, high)
    return 1 - high


def holm(ps: list[float]) -> list[float]:
    """Each of n ordered p-values times how many are left, and never below the one before."""
    order = np.argsort(ps)
    steps = np.minimum(1, np.array(ps)[order] * np.arange(len(ps), 0, -1))
    return np.maximum.accumulate(steps)[np.argsort(order)].tolist()


def pooled(means: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """(mean, half of its interval): random effects of DerSimonian and Laird, with Knapp and
    Hartung's interval."""
    weights = errors**-2
    fixed, df = (weights * means).sum() / weights.sum(), len(means) - 1
    excess = (weights * (means - fixed) ** 2).sum() - df
    between = max(0.0, excess / (weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1 / (errors**2 + between)
    middle = (weights * means).sum() / weights.sum()
    scale = max(1.0, (weights * (means - middle) ** 2).sum() / df)
    return middle, t_value(df) * math.sqrt(scale / weights.sum())


# Records. A run is a dict of what identifies it.


def key_of(run: dict) -> tuple:
    return tuple(run.get(name, 1.0 if name == "lr_factor" else "") for name in FIELDS)


def metric_of(run: dict) -> str:
    return METRIC.get(run.get("tested") or run["task"], "em")


def n_heads(line: dict) -> int:
    return len(line["heads"] if isinstance(line["heads"][0][0], int) else line["heads"][0])


class Records:
    """All lines, by what identifies a run, and the scores of all heads."""

    def __init__(self, folder: Path):
        self.lines, self.grids = {}, {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in map(json.loads, path.read_text().splitlines()):
                self.lines[key_of(line)] = line
        for path in sorted(folder.glob("*.scores.json.gz")):
            for model, found in json.loads(gzip.decompress(path.read_bytes())).items():
                self.grids |= {(Path(model).name, title): grids for title, grids in found.items()}

    def get(self, run: dict) -> dict:
        return self.lines.get(key_of(run), {})

    def base(self, run: dict) -> dict:
        of = {name: run.get(name, "") for name in ("model", "data", "dtype", "quantize")}
        return self.get(of | {"kind": "base", "task": run.get("tested") or run["task"], "seed": 42})

    def done(self, runs: list[dict]) -> list[dict]:
        return [run for run in runs if "eval.py" in self.get(run).get("seconds", {})]

    def hits(self, runs: list[dict], metric: str = "") -> np.ndarray:
        found = [self.get(run)["hits"][metric or metric_of(run)] for run in runs]
        return np.array([[float(hit) for hit in hits] for hits in found])

    def of_base(self, run: dict, metric: str = "") -> np.ndarray:
        hits = self.base(run)["hits"][metric or metric_of(run)]
        return np.array([[float(hit) for hit in hits]])

    def rule_scores(self, run: dict) -> np.ndarray:
        """The items' scores by the cheap rule of a run's task, as one run."""
        (hits,) = self.base(run)["rule_scores"].values()
        return np.array([[float(hit) for hit in hits]])

    def compare(self, ones: list[dict], others: list[dict] | None, metric="", borrowed=(None,) * 2):
        """others None: the base model, which does not vary."""
        other = self.of_base(ones[0], metric) if others is None else self.hits(others, metric)
        groups = self.base(ones[0]).get("clusters")
        return difference(self.hits(ones, metric), other, groups, borrowed)


def said(middle: float, half: float) -> str:
    ends = (100 * middle, 100 * (middle - half), 100 * (middle + half))
    return "{:+.9f} [{:+.9f}, {:+.9f}]".format(*ends)


class Verdicts:
    """The table of `studies verdicts`: LoFiT − the other. A cell with all digits for each row."""

    def __init__(self, records: Records):
        self.records = records
        every = [dict(zip(FIELDS, key, strict=True)) for key in records.lines]
        common = {"kind": "train", "data": "data/real", "dtype": "float32", "quantize": ""}
        common = (common | {"lr_factor": 1.0}).items()
        every = [run for run in every if common <= run.items()]
        self.runs = [run for run in records.done(every) if not run["model"].endswith("mini-llama")]
        self.spread = {drawn: self.spread_of(drawn) for drawn in (True, False)}

    def which(self, model: str, **wanted) -> list[dict]:
        wanted = dict.fromkeys(("heads_of", "train", "select"), "") | wanted
        found = (run for run in self.runs if run["model"].endswith(model))
        return [run for run in found if wanted.items() <= run.items()]

    def side(self, model: str, task: str, label: str) -> list[dict]:
        """The runs of a label like "10 %, 25 examples", "CLUTRR's heads", "lora --lr 5e-4"."""
        name, _, flags = label.partition(" ")
        if name in TRIED:
            return self.which(model, task=task, method=name, train=flags)
        every = label.startswith("all heads")
        by = "all" if every else "gradient" if "gradients" in label else "scales"
        share = re.match(r"(\d+) %", label)  # else it says whose heads
        k = "all" if every else f"{share[1]}%" if share else "10%"
        wanted = {"task": task, "method": "lofit", "by": by, "k": k}
        if found := re.search(r"(\d+) examples", label):
            wanted |= {"train": f"--n-train {found[1]}"}
            wanted |= {} if every else {"select": wanted["train"]}
        if found := re.match(r"(\w+)'s heads", label):
            wanted |= {"heads_of": TASKS[found[1]]}
        return self.which(model, **wanted)

    def spread_of(self, drawn: bool) -> tuple[float, int]:
        """How single runs of LoFiT vary with seven heads or more and all examples."""
        cells, ways = {}, ("random",) if drawn else ("scales", "gradient", "all")
        for run in self.runs:
            plain = run["train"] == run["select"] == ""  # on all examples
            if run["method"] == "lofit" and run["by"] in ways and plain:
                if n_heads(self.records.get(run)) >= 7:
                    cells.setdefault(key_of(run | {"seed": 0}), []).append(run)
        parts = []
        for side in cells.values():
            if len(side) > 1:
                hits, groups = self.records.hits(side), self.records.base(side[0]).get("clusters")
                groups = np.arange(hits.shape[1]) if groups is None else np.array(groups)
                parts.append((len(side) * runs_of(hits, groups)[0], len(side) - 1))
        shares = np.array([v * d for v, d in parts]) / sum(d for _, d in parts)
        return shares.sum(), shares.sum() ** 2 / sum(shares**2 / [d for _, d in parts])

    def compared(self, ours: list[dict], theirs: list[dict] | None) -> tuple[float, float, float]:
        sides = (ours, theirs or [])
        lent = [self.spread[s[0]["by"] == "random"] if len(s) == 1 else None for s in sides]
        return self.records.compare(ours, theirs, borrowed=lent)

    def expected(self, row: dict) -> dict[str, str]:
        if row["claim"] == "2":
            found, n = self.pooled(row["LoFiT"].startswith("7 or more"))
            return {"task": f"{n} test sets pooled", "LoFiT − other": found}
        task, versus = row["task"].split()[0], row["the other"]
        ours = self.side(row["model"], task, row["LoFiT"])
        theirs, lent = [], [None, None]
        if versus == "cheap rule":
            other = self.records.rule_scores(ours[0])
        elif versus == "base model":
            other = self.records.of_base(ours[0])
        else:
            theirs = self.side(row["model"], task, versus)
            other = self.records.hits(theirs)
        if versus != "cheap rule":
            sides = (ours, theirs)
            lent = [self.spread[s[0]["by"] == "random"] if len(s) == 1 else None for s in sides]
        hits, groups = self.records.hits(ours), self.records.base(ours[0]).get("clusters")
        middle, parts = parts_of(hits, other, groups, lent)
        return {
            "runs": ", ".join(str(len(side)) for side in (ours, theirs) if side),
            "percent": f"{100 * hits.mean():.9f} and {100 * other.mean():.9f}",
            "LoFiT − other": said(middle, half_of(parts)),
            "p": f"{p_of(middle, parts):.9f}",
        }

    def pooled(self, many: bool) -> tuple[str, int]:
        """Each model's task counts once, with the mean of its differences and errors."""
        sets: dict[tuple, list] = {}
        for model in HEADS:
            for task, k in {(run["task"], run["k"]) for run in self.which(model, by="scales")}:
                wanted = {"task": task, "k": k, "method": "lofit"}
                ours, theirs = (self.which(model, by=by, **wanted) for by in ("scales", "random"))
                if len(ours) > 1 and len(theirs) > 1:
                    if (n_heads(self.records.get(ours[0])) >= 7) == many:
                        sets.setdefault((model, task), []).append(self.compared(ours, theirs))
        means, _, errors = np.array([np.mean(cells, 0) for cells in sets.values()]).T
        return said(*pooled(means, errors)), len(sets)


class Command:
    """The flags of a study, the runs that they name, and what is said of runs: a cell's text with
    all digits, None where nothing is recorded."""

    def __init__(self, text: str, records: Records):
        self.records, self.flags, name = records, {}, ""
        self.study, *words = shlex.split(text)
        for word in [*shlex.split(DEFAULTS), *words]:
            if word.startswith("--") and " " not in word:
                name = word[2:]
                self.flags[name] = []
            else:
                self.flags[name].append(word)
        once = ("sweep", "tasks", "rules", "quantized")
        factors = [1.0] if self.study in once else [0.3, 1.0, 3.0]
        self.factors = [float(x) for x in self.flags.get("lr-factors", factors)]
        self.seeds = [int(seed) for seed in self.flags["seeds"]]

    def one(self, name: str) -> str:
        return " ".join(self.flags[name])

    def run(self, model: str, task: str, **more) -> dict:
        model = next((m for m in self.flags["model"] if m.endswith("/" + model)), "")
        found = {"kind": "train", "model": model, "task": task}
        return found | {"data": self.one("data"), "dtype": self.one("dtype")} | more

    def best(self, tried, seeds=(), task="", tested="", kind="asked", quantize="") -> list[dict]:
        """For each seed the run that did best on validation with the first."""
        seeds, tried = seeds or self.seeds, [run | {"quantize": quantize} for run in tried]
        known = [self.records.get(run | {"seed": seeds[0]}).get("val") for run in tried]
        if len(tried) > 1 and None in known:
            return []

        def validation(i: int) -> float:
            folds = known[i] if isinstance(known[i], list) else [known[i]]
            return float(np.mean([val[metric_of(tried[i])] for val in folds]))

        run = tried[max(range(len(tried)), key=validation) if len(tried) > 1 else 0]
        run |= {"task": task or run["task"]}
        run |= {"tested": tested, "kind": kind} if tested else {}
        return [run | {"seed": seed} for seed in seeds]

    def lofit(self, model, task, by, k, more="", heads_of="", **test) -> list[dict]:
        by = "all" if k == "all" else by
        select = "" if by in ("all", *DRAWN) else more
        if by in ("scales", "gates"):
            select = f"{more} {self.one('select-flags')}".strip()
        run = self.run(model, task, method="lofit", by=by, k=k, heads_of=heads_of, select=select)
        run |= {"train": f"{more} {self.one('train-flags')}".strip()}
        return self.best([run | {"lr_factor": factor} for factor in self.factors], **test)

    def method(self, model, task, name, more="", **test) -> list[dict]:
        name, _, k = name.partition(" ")
        if name in ("lofit", "random"):
            by = {"lofit": "scales"}.get(name, name)
            return self.lofit(model, task, by, k, more=more, **test)
        flag, *values = TRIED[name].split()
        if k.startswith(flag):
            values, k = [k.split()[1]], ""
        more = f"{more} --top {k}".strip() if k else more
        if flag == "--lr":
            more = f"{more} {self.one('train-flags')}".strip()
        first = self.run(model, flag == "--lr" and self.one("chosen-on") or task, method=name)
        tried = [first | {"train": f"{more} {flag} {value}".strip()} for value in values]
        return self.best(tried, task=task, **test)

    def less(self, ones: list[dict], others: list[dict] | None, metric: str = "") -> str | None:
        """others None: the base model, which does not vary."""
        one, other = self.records.done(ones), self.records.done(others or [])
        if not one or not (other or others is None):
            return None
        single = len(one) == 1 or len(other) == 1
        found = self.records.compare(one, None if others is None else other, metric)
        return said(*found[:2]) + "°" * single

    def against_rule(self, runs: list[dict]) -> dict[str, str]:
        rule, groups = self.records.rule_scores(runs[0]), self.records.base(runs[0]).get("clusters")
        less = said(*difference(self.records.hits(runs), rule, groups)[:2])
        less += "°" * (len(runs) == 1)
        return {"rule": f"{100 * rule.mean():.9f}", "LoFiT − rule": less}

    def means(self, runs: list[dict], metric: str = "") -> np.ndarray:
        done = self.records.done(runs)
        return 100 * self.records.hits(done, metric).mean(1) if done else np.array([])

    def score(self, runs: list[dict]) -> str | None:
        each = " ".join(f"{value:.9f}" for value in self.means(runs))
        return f"{self.mean(runs)}% ({self.less(runs, None)}): {each}" if each else None

    def mean(self, runs: list[dict], metric: str = "") -> str | None:
        means = self.means(runs, metric)
        return f"{means.mean():.9f}" if len(means) else None

    def base(self, runs: list[dict], metric: str = "", sign: str = "%") -> str | None:
        found = self.records.base(runs[0]) if runs else {}
        return f"{100 * found['base'][metric or metric_of(runs[0])]:.9f}{sign}" if found else None

    def values(self, runs: list[dict]) -> str | None:
        done = self.records.done(runs)
        return f"{self.records.get(done[0])['trained_values']:,}" if done else None

    def chosen(self, runs: list[dict]) -> str | None:
        words = []
        for run in self.records.done(runs):
            rate = f"lr{self.records.get(run)['settings'].get('lr', 0):.3g}"
            flags = "".join(run["train"].split()[-2:]).removeprefix("--")
            words.append(rate if run["method"] == "lofit" else flags)
        ours = runs[0]["method"] == "lofit"
        if self.one("chosen-on") and words and words[0].startswith("lr") and not ours:
            words.append(f"(of {self.one('chosen-on')})")
        return " ".join(words) or None

    def spread(self, runs: list[dict]) -> str | None:
        means = self.means(runs)
        return f"{statistics.stdev(means):.9f}" if len(means) > 1 else None

    def text_loss(self, runs: list[dict]) -> str | None:
        found = [line["losses"] for line in map(self.records.get, runs) if line]
        if not found:
            return None
        base, tuned = np.array([found[0]["base"]]), np.array([line["tuned"] for line in found])
        middle, half, _ = difference(tuned, base)
        ends = f"[{middle - half:+.9f}, {middle + half:+.9f}]" + "°" * (len(tuned) == 1)
        return f"{base.mean():.9f} → {tuned.mean():.9f} {ends}"

    def grids(self, model: str, task: str) -> list[np.ndarray]:
        data, dtype, by = (self.one(key) for key in ("data", "dtype", "by"))
        titles = [f"select {task} {data} {seed} {dtype} {by}" for seed in self.seeds]
        return [np.array(g) for t in titles for g in self.records.grids.get((model, t), [])]


def count(k: str, model: str) -> int:
    """How many heads "10%", "all" or "13" are."""
    if "%" in k:
        return max(1, round(float(k[:-1]) * HEADS[model] / 100))
    return HEADS[model] if k == "all" else int(k)


def best(grid: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-grid.ravel(), kind="stable")[:k]


def expected(c: Command, row: dict[str, str]) -> dict[str, str | None]:
    """Column -> what the records say, for the row with these labels."""
    model, by, k = row["model"], c.one("by"), c.one("heads")
    task, _, metric = row.get("task", row.get("tested on", "")).rstrip(")").partition(" (")
    if c.study == "sweep":
        k = next(k for k in c.flags["heads"] if count(k, model) == int(row["heads"]))
        ours, drawn = c.lofit(model, task, by, k), c.lofit(model, task, "random", k)
        drawn = [] if k == "all" else drawn
        some = c.records.done(ours) or c.records.done(drawn)
        found = {"base": c.base(some), "values": c.values(some), "LoFiT": c.score(ours)}
        return found | {"random heads": c.score(drawn), "LoFiT − random": c.less(ours, drawn)}
    if c.study == "heads":
        draws = range(c.seeds[0], c.seeds[0] + int(c.one("draws")))
        way, k = row["chosen by"], row["heads"]
        ours = c.lofit(model, task, way, k, seeds=draws if way in DRAWN else ())
        drawn = c.lofit(model, task, "random", k, seeds=draws) if "random" in c.flags["by"] else []
        less = None if way == "random" else c.less(ours, drawn)
        found = {"score": c.score(ours), "− random": less, "± runs": c.spread(ours)}
        return found | {"lr": c.chosen(ours)}
    if c.study in ("methods", "data", "quantized"):
        more = "" if row.get("examples", "all") == "all" else f"--n-train {row['examples']}"
        first = f"lofit {c.flags['heads'][0]}" if c.study == "methods" else c.flags["methods"][0]
        first, four = row["method"] if "weights" in row else first, row.get("weights") == "nf4"
        ours = c.method(model, task, row["method"], more, quantize="nf4" * four)
        others = c.method(model, task, first, more)
        found = {"score": c.score(ours), "chosen": c.chosen(ours), "values": c.values(ours)}
        found["base"] = c.base(c.records.done(ours))
        found["− float32"] = None if ours == others else c.less(ours, others)
        less = None if ours == others else c.less(others, ours)
        return found | {f"{first} − it": less, "LoFiT − it": less}
    if c.study == "rules":
        ours, found = c.records.done(c.method(model, task, row["method"])), {}
        for column, hit in (("rule right", "1"), ("rule wrong", "0")):
            chosen = c.records.rule_scores(ours[0])[0] == float(hit)
            share = 100 * c.records.hits(ours)[:, chosen].mean()
            found[column] = f"{share:.9f} ({chosen.sum()} items)"
        rule = c.against_rule(ours)
        return found | rule | {"score": c.mean(ours), "it − rule": rule["LoFiT − rule"]}
    if c.study == "tasks":
        ours, drawn = c.lofit(model, task, by, k), c.lofit(model, task, "random", k)
        lora = c.run(model, task, method="lora")
        lora |= {"train": f"{c.one('train-flags')} --lr {c.one('lora-lr')}".strip()}
        lora, always = c.best([lora]), c.records.base(ours[0]).get("always")
        found = {"one answer": f"{100 * always['share']:.9f}" if always else None}
        found |= {"base": c.base(ours, metric, ""), "LoFiT − base": c.less(ours, None, metric)}
        done = c.records.done(ours)
        if done and "rule_scores" in c.records.base(done[0]):
            found |= c.against_rule(done)
        for name, runs in (("random heads", drawn), ("LoRA", lora), ("LoFiT", ours)):
            found[name] = c.mean(runs, metric)
            found[f"LoFiT − {name.split()[0]}"] = c.less(ours, runs, metric)
        return found
    if c.study == "transfer":
        own, source = c.lofit(model, task, by, k), row["from"]
        if row["what"] == "heads":
            ours = c.lofit(model, task, by, k, heads_of=source * (source != task))
        else:
            ours = c.lofit(model, source, by, k, tested=task)
        less = None if source == task else c.less(own, ours)
        return {"score": c.score(ours), "own − taken": less}
    if c.study == "forgets":
        asked, tuned, first = row["asked"].split(" (")[0], row["tuned on"], c.flags["methods"][0]
        ours, others = (c.method(model, tuned, name, tested=asked) for name in (row["by"], first))
        text = c.method(model, tuned, row["by"], tested=asked, kind="text")
        found = {"base": c.base(c.records.done(ours)), "loss of text": c.text_loss(text)}
        found[f"{first} − it"] = None if ours == others else c.less(others, ours)
        return found | {"change": c.less(ours, None)}
    one, two = (c.grids(model, row[column]) for column in ("task", "beside"))  # study layers
    k, same_task = count(row["heads"], model), row["task"] == row["beside"]
    shared, ranks = [], []
    for pair in itertools.combinations(one, 2) if same_task else itertools.product(one, two):
        shared.append(len({*best(pair[0], k)} & {*best(pair[1], k)}) / k)
        ranks.append(np.corrcoef(*(grid.ravel().argsort().argsort() for grid in pair))[0, 1])
    layer = np.array([best(grid, k) for grid in one]) // one[0].shape[1]
    found = {"mean layer": f"{layer.mean():.9f}", "layers": f"{layer.min()} to {layer.max()}"}
    return found | {"shared": f"{np.mean(shared):.9f}", "correlation": f"{np.mean(ranks):.9f}"}


def claims(records: Records) -> list[tuple[str, list[float]]]:
    """Sentences of results.md whose numbers stand in no table, and those numbers."""
    real, model = "--model weights/smollm2-135m-instruct --data data/real", "smollm2-135m-instruct"
    three, one, options = (
        Command(f"{study} {real}{more}", records)
        for study, more in (("data", ""), ("data", " --lr-factors 1"), ("tasks", "-300 --seeds 42"))
    )
    ours = [float(c.mean(c.lofit(model, "mquake", "scales", "10%"))) for c in (three, one)]
    mini = []
    for factor, k in ((0.3, "all"), (1, "10%"), (1, "all")):
        c = Command(f"data --model weights/mini-llama --lr-factors {factor}", records)
        mini.append(float(c.mean(c.lofit("mini-llama", "mquake", "scales", k))))
    costs, lines = [], {}
    for name in ("lofit 10%", "lora"):
        runs = three.method(model, "mquake", name, tested="truthfulqa", kind="text")
        losses = [records.get(run)["losses"] for run in runs]
        costs.append(np.mean([line["tuned"] for line in losses]) - np.mean(losses[0]["base"]))
    for task, by in (("listops", "gradient"), ("winogrande", "scales"), ("siqa", "scales")):
        lines[task] = records.get(options.lofit(model, task, by, "10%")[0])
    of = lines["listops"]["groups"]
    operations = [100 * of[name]["tuned"]["em"] for name in ("MIN", "MAX", "MED", "SM")]
    chosen = [records.get(run)["heads"] for run in c.lofit("mini-llama", "mquake", "scales", "10%")]
    low = sorted({sum(layer == 0 for layer, _ in heads) for heads in chosen})
    of_two, of_three = (lines[task]["given"]["tuned"] for task in ("winogrande", "siqa"))
    return [
        (r"it has ([\d.]+) % instead of ([\d.]+) %", ours),
        (r"rises by ([\d.]+) with LoFiT, by ([\d.]+) with LoRA", costs),
        (r"right in (\d+) % where the outer operation is MIN, (\d+) % of MAX, (\d+) % of MED and"
         r" (\d+) % of SM", operations),
        (r"\*option1\* to (\d+) of (\d+) items", [of_two["option1"], sum(of_two.values())]),
        (r"mini-llama's MQuAKE \(([\d.]+) % instead\s+of\s+([\d.]+)\) with a rate of 0.3; with 1.0,"
         r" the rate of its 10 %, they have ([\d.]+) %", mini),
        (r"(\d) or (\d) of its first\s+13 heads are in layer 0", low),
        (r"the three answers (\d+), (\d+)\s+and (\d+) times", list(of_three.values())[:3]),
    ]  # fmt: skip


def ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place.ravel()]


# The pages


def plain(text: str) -> str:
    return text.replace("−", "-")


def close(printed: str, found: str) -> bool:
    """Whether a number is another one, rounded to as many decimals as it has; both come from
    approximate quantiles, which may differ by 0.0001."""
    decimals = len(printed.partition(".")[2]) if "e" not in printed else 12
    error = abs(float(printed.replace(",", "")) - float(found.replace(",", "")))
    return error <= 0.5 * 10**-decimals + 1e-4 * ("." in printed)


def same(printed: str, found: str) -> bool:
    """Whether a cell says the same but for rounding."""
    both = [NUMBER.findall(plain(text)) for text in (printed, found)]
    alike = NUMBER.sub("#", plain(printed)) == NUMBER.sub("#", plain(found))
    return alike and all(map(close, *both))


class Audit:
    def __init__(self, root: Path):
        names = (TABLES, RESULTS, "README.md")
        self.pages = {name: (root / name).read_text() for name in names}
        self.folder = root / "docs" / "results"
        self.records = Records(self.folder)
        self.wrong: list[str] = []
        self.found: dict[str, list[str]] = {}  # heading of tables.md -> its recomputed cells
        self.in_tables = self.in_text = self.elsewhere = self.unchecked = self.gone = 0

    def differs(self, page: str, number: int, printed: str, found: str) -> None:
        found = re.sub(r"\d+\.\d{9}", lambda m: f"{float(m[0]):.3f}", found)
        self.wrong.append(f"{page}:{number}: printed {printed}, recomputed {found}")

    def cell(self, page: str, number: int, column: str, printed: str, found: str | None) -> None:
        self.in_tables += len(NUMBER.findall(plain(printed)))
        if not same(printed, found or "–"):
            self.differs(page, number, f"{printed} ({column})", found or "–")

    def tell(self, at: int, cell: str) -> None:
        """A cell of tables.md was recomputed: at this character of the page."""
        heading = re.findall(r"^## (.*)", self.pages[TABLES][:at], re.M)[-1]
        self.found.setdefault(heading, []).append(plain(cell))

    def tables(self) -> None:
        """Every table under a command of docs/tables.md."""
        page = TABLES
        for match in TABLE.finditer(self.pages[page]):
            verdicts = match[1] == "verdicts"
            command = Verdicts(self.records) if verdicts else Command(match[1], self.records)
            above = self.pages[page][: match.start(2)].count("\n") + 3
            header, _, *rows = (line[2:-2].split(" | ") for line in match[2].splitlines())
            rows, every = [dict(zip(header, cells, strict=True)) for cells in rows], []
            for number, row in enumerate(rows, above):
                try:
                    every.append(command.expected(row) if verdicts else expected(command, row))
                except (LookupError, ValueError, StopIteration) as error:
                    text = " | ".join(row.values())
                    self.differs(page, number, text, f"no such run ({error!r})")
                    every.append({})
            tested = [found for found in every if "p" in found]
            corrected = holm([float(found["p"]) for found in tested])
            for found, p in zip(tested, corrected, strict=True):
                found["p"] = f"{p:.9f}"
            for column in header:
                told = column in LABELS or any(column in found for found in every)
                if not told and any(NUMBER.search(row[column]) for row in rows):
                    self.differs(page, above, column, "a column that nothing here recomputes")
            for number, (row, found) in enumerate(zip(rows, every, strict=True), above):
                for column in (column for column in header if column in found):
                    self.cell(page, number, column, row[column], found[column])
                    self.tell(match.start(), found[column] or "")

    def alone(self) -> None:
        """Section 2's single heads: the two tables of each map, and the numbers of the text."""
        for match in re.finditer(
            r"^python -m lofit\.studies\.alone(.*)$", self.pages[TABLES], re.M
        ):
            folder = re.search(r"--model (\S+)", match[1])
            self.map(match.start(), Path(folder[1] if folder else "mini-llama").name)

    def map(self, begin: int, model: str) -> None:
        """The two tables of one map, which begin there. nan: a head that was not run."""
        grids = {way: [] for way in ("scales", "gradient", "probe")}
        for (of, title), (grid, *_) in self.records.grids.items():
            kind, task, _, seed, _, way, *more = title.split()
            if (of, kind, task, more) == (model, "select", "mquake", []) and way in grids:
                grids[way].append((seed, np.array(grid)))
        alone = np.full_like(grids["scales"][0][1], np.nan)
        for line in (self.folder / "alone" / f"{model}.jsonl").read_text().splitlines():
            head, hits = (json.loads(line)[key] for key in ("head", "hits"))
            score = 100 * np.mean([float(hit) for hit in hits])
            if head:
                alone[tuple(head)] = score
            else:
                base = score
        known = ~np.isnan(alone)
        n = known.sum(1, keepdims=True)
        inner = alone - np.nanmean(alone, 1, keepdims=True)
        shares = []
        for first in (0, 1):  # all layers, and without layer 0
            part, free = alone[first:][known[first:]], (n[first:] - 1).sum()
            inside = np.square(inner[first:][known[first:]]).sum() / free
            shares.append(100 * (1 - inside / part.var(ddof=1)))
        lead = f"{model}, mquake: {known.sum()} of {known.size} heads, each trained alone; the base"
        rows, several = {lead: [base]}, n.min() > 1
        if several:
            rows["Of the variance"] = shares
        for layer, row in enumerate(alone):
            run = row[known[layer]]
            if len(run):
                rows[str(layer)] = [f"{len(run)}", run.mean(), run.min(), run.max()]
        if several:
            others = (np.nansum(alone, 1, keepdims=True) - alone) / (n - 1)
            one, two = (ranks(values[known]) for values in (others, alone))
            rows["layer alone"] = [np.corrcoef(one, two)[0, 1], "–", "–"]
        for way, found in grids.items():
            cells = [[], [], []]
            for _, grid in sorted(found, key=lambda each: each[0]):
                within = grid - np.where(known, grid, 0).sum(1, keepdims=True) / n
                for cell, pair in zip(cells, ((grid, alone), (within, inner)), strict=False):
                    cell.append(np.corrcoef(*(ranks(each[known]) for each in pair))[0, 1])
                best = alone[known][grid[known].argmax()]
                cells[2].append(f"{(alone[known] > best).sum() + 1}")
            inside = np.mean(cells[1]) if several else "–"
            rows[way] = [np.mean(cells[0]), inside, " ".join(cells[2])]
        at = self.pages[TABLES][:begin].count("\n") + 1
        section, told = re.split(r"\n(?:#|```\npython)", self.pages[TABLES][begin:])[0], []
        for offset, line in enumerate(section.splitlines()):
            label, *cells = line[2:-2].split(" | ")
            if not line.startswith("| "):
                label = next((each for each in rows if line.startswith(each)), "")
                cells = re.findall(r"(-?[\d.]+)%", line)
            if label in rows:
                for printed, value in zip(cells, rows.pop(label), strict=True):
                    value = value if isinstance(value, str) else f"{value:.9f}"
                    self.cell(TABLES, at + offset, label, printed, value)
                    told.append(value)
        assert not rows, f"{TABLES}: the tables of {model}'s single heads lack {', '.join(rows)}"
        self.tell(begin, " ".join(told))

    def readme(self) -> None:
        """The README's table of results, and the output of its first command, whose interval comes
        from a bootstrap: ours is to be within 0.5 points."""
        page, model = "README.md", ""
        calls = re.findall(r"^python -m lofit\.studies (tasks .*)$", self.pages[page], re.M)
        commands = [Command(call, self.records) for call in calls]
        first = Command("tasks", self.records).lofit("mini-llama", "mquake", "scales", "10%")[:1]
        middle, half, _ = (100 * x for x in self.records.compare(first, None))
        means = [100 * self.records.of_base(*first).mean(), 100 * self.records.hits(first).mean()]
        for number, line in enumerate(plain(self.pages[page]).splitlines(), 1):
            label = re.match(r"\| (?:(S\w+-135M-Instruct|Gemma-3-270M), |– )(\w+)[^|]* \|", line)
            if label:
                model, task = (label[1] or model).lower(), TASKS[label[2]]
                command = next(c for c in commands if task in c.flags["task"])
                found = expected(command, {"model": model, "task": f"{task} ()"})
                rules = self.records.base(command.run(model, task, seed=42)).get("rules")
                rule = f"{100 * next(iter(rules.values())):.9f}" if rules else found["base"]
                columns = [rule, found["random heads"], found["LoRA"]]
                columns.append(f"{found['LoFiT']} ({found['LoFiT − base']})".replace("°", ""))
                for printed, value in zip(line[2:-2].split(" | ")[1:], columns, strict=True):
                    self.cell(page, number, label[2], printed, value)
            elif match := re.match(r"epoch 30/30 .* val em_stripped (.*)%", line):
                val = self.records.get(*first)["val"]["em_stripped"]
                self.cell(page, number, "val", match[1], f"{100 * val:.9f}")
            elif match := re.match(r"em_stripped +(\S+% +\S+% +\S+) \[(\S+), (\S+)\]", line):
                found = "{:.9f}% {:.9f}% {:+.9f}".format(*means, middle)
                self.cell(page, number, "example", " ".join(match[1].split()), found)
                for printed, value in ((match[2], middle - half), (match[3], middle + half)):
                    self.in_tables += 1
                    if abs(float(printed) - value) > 0.5:
                        self.differs(page, number, printed, f"about {value:+.1f}")

    def sentences(self) -> None:
        page = RESULTS
        text = re.sub(r"\s", " ", self.pages[page])
        for pattern, values in claims(self.records):
            match = re.search(pattern, text)
            self.gone += match is None
            for printed, value in zip(match.groups() if match else (), values, strict=False):
                self.in_text += 1
                if not close(printed, f"{value:.9f}"):
                    number = self.pages[page][: match.start()].count("\n") + 1
                    self.differs(page, number, f"{printed} in “{match[0]}”", f"{value:.9f}")

    def text(self, page: str) -> None:
        """The numbers of a page's text, against what was recomputed for its section."""
        of_claims = "|".join(pattern for pattern, _ in claims(self.records)).replace(" ", r"\s+")
        text = re.sub(of_claims, lambda m: re.sub(r"[\d.]+", " ", m[0]), plain(self.pages[page]))
        text = TABLE.sub(lambda m: "\n" * m[0].count("\n"), text)
        text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M)
        text = re.sub(
            r"`[^`]*`|\]\([^)]*\)|arXiv \S+|<[^>]*>", lambda m: re.sub(r"\S", "", m[0]), text
        )
        heading = section = ""
        for number, line in enumerate(text.splitlines(), 1):
            heading = line.lstrip("# ") if line.startswith("#") else heading
            section = line.removeprefix("## ") if line.startswith("## ") else section
            told = next((v for (p, h), v in ELSEWHERE.items() if p == page and h in heading), "")
            if page == "README.md" and re.match(r"\| (S\w+-135M|Gemma-3-270M|–)", line):
                continue
            own = page != "README.md" and section != "Verdicts" and self.found.get(section)
            every = [cell for cells in self.found.values() for cell in cells]
            cells = own + self.found["Verdicts"] if own else every
            self.line(page, number, line, cells, told.split())

    def line(self, page: str, number: int, line: str, cells: list[str], told: list[str]) -> None:
        whole = [match.groups() for cell in cells for match in INTERVAL.finditer(cell)]
        for match in INTERVAL.finditer(line):
            self.in_text += 3
            if not any(all(map(close, match.groups(), of)) for of in whole):
                self.differs(page, number, match[0], "no interval of these tables")
        signed = {x for cell in cells for x in NUMBER.findall(cell)}
        values = {"": {x.lstrip("+-") for x in signed}}
        values |= {sign: {x for x in signed if x.startswith(sign)} for sign in "+-"}
        for printed in NUMBER.findall(INTERVAL.sub(" ", line)):
            if printed in told:
                self.elsewhere += 1
            elif not re.search(r"\.\d|,\d{3}", printed):
                self.unchecked += 1
            elif any(close(printed, v) for v in values[printed[0] if printed[0] in "+-" else ""]):
                self.in_text += 1
            else:
                self.differs(page, number, printed, "no number of these tables")

    def report(self) -> int:
        self.tables()
        self.alone()
        self.readme()
        self.sentences()
        for page in self.pages:
            self.text(page)
        print(*self.wrong, sep="\n", end="\n" * bool(self.wrong))
        print(
            f"{self.in_tables} numbers of tables and {self.in_text} of the text were recomputed:"
            f" {len(self.wrong)} differences. {self.elsewhere} numbers of the text have no record"
            f" (ELSEWHERE), {self.unchecked} whole numbers of the text are tied to nothing,"
            f" {self.gone} sentences of CLAIMS are gone."
        )
        return int(bool(self.wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[2])
    sys.exit(Audit(parser.parse_args().root).report())
