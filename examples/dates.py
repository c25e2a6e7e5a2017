"""Own data for docs/own-model.md: dates in words, to be written as numbers.

python examples/dates.py DIR   # -> DIR/train.jsonl (200 lines), val.jsonl (50), test.jsonl (100)
"""

import argparse
import json
import random
from datetime import date, timedelta
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder, draw = parser.parse_args().folder, random.Random(0)
    days = draw.sample(range(365 * 120), 350)  # from 1920 on, none of them twice
    lines = []
    for day in (date(1920, 1, 1) + timedelta(days=n) for n in days):
        words = f"{day:%A}, {day:%B} {day.day}, {day.year}"
        lines.append({"prompt": f"Write as numbers: {words}", "answer": f"{day:%Y-%m-%d}"})
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", lines[:200]), ("val", lines[200:250]), ("test", lines[250:])):
        text = "".join(json.dumps(line) + "\n" for line in part)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
