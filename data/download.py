"""Fetch the paper's own split files and check them against their SHA-256.

    python -m data.download                    # all three tasks -> data/real/
    python -m data.download mquake --mirror https://example.org/lo-fit/dataset

What is there and right is left alone; what was cut off goes on where it stopped.
"""

import argparse
import hashlib
import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from lofit import errors
from lofit.errors import InputError

COMMIT = "ebd344a273d3dab0b63d8bbfd7ecdb5185ae5b7b"
ORIGIN = f"https://raw.githubusercontent.com/fc2869/lo-fit/{COMMIT}/dataset"
TRIES, TIMEOUT_S, CHUNK = 4, 30, 1 << 16
LICENCES = {
    "mquake": "MQuAKE: MIT (Zhong et al., 2023)",
    "clutrr": "CLUTRR: CC BY-NC 4.0, non-commercial use only (Sinha et al., 2019)",
    "truthfulqa": "TruthfulQA: Apache 2.0 (Lin et al., 2022)",
}
# (task, folder) -> lines as sha256sum writes them
SUMS = {
    ("mquake", "MQuAKE"): """
3090ef350f4322878968466881de9ec988b5b71daf55d5d9b04fb894a5ebac87  test.jsonl
5db931bd09457245d1a133fe8df86a45985d28767ba6f032d1b7dcc737e22498  train.jsonl
3cbf9245ba671458d0979c5bba569e838d54fce860e8d0c5af0bc2ce54d41e83  val.jsonl
""",
    ("clutrr", "clutrr"): """
cf400381f8a12a703265f95df1387c217a71525325f725ff2b8dc08123c30056  test.json
8640526e573444bdf52bd78eee0bf3a9f2e96bb3bb6d7610021dc05751a5c873  train.json
afcae888ed7862081496151a33b9bed157d709b01589c2db566266ecdd906f1e  val.json
""",
    ("truthfulqa", "truthfulqa"): """
4bd4d0db03751e652c6811b053e14c2f4ea43da888571fa0f15df42e7544a67c  fold_0_test_seed_42.csv
e80aebee6876ceec76ac030bcfd31c070b9c23809077500a3b183640386fb136  fold_0_train_seed_42.csv
5563034f53a463202f4c2ac82336a58d81d0ec02460f7d80e8abce6a4972161a  fold_0_val_seed_42.csv
e9019df6fca8a1e25eed3e2256196d30a2675528e76eae0b812b5092fa114455  fold_1_test_seed_42.csv
0342def493a6afdaae11737cd557393c0cde2cc35d26d58e7a2fd4c954997fba  fold_1_train_seed_42.csv
375030fc5bfe7315825f0272b95f6d2b0b0f6332f7121ba57537ec5c1fc1969e  fold_1_val_seed_42.csv
""",
}
SHA256 = {  # task -> file below dataset/ -> hash
    task: {f"{folder}/{line.split()[1]}": line.split()[0] for line in text.strip().splitlines()}
    for (task, folder), text in SUMS.items()
}


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch url to path; InputError if it cannot be fetched or is not the file of this hash.

    Until it is whole and right it is called .NAME.partial, and a later call goes on with that.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, TRIES + 1):
            resumed = partial.exists()
            problem = _fetch(url, partial)
            if problem is None and digest(partial) == sha256:
                partial.replace(path)
                return
            if problem is None:
                partial.unlink()
                problem = f"SHA-256 is not {sha256[:12]}…, the file was changed on the way"
                if not resumed:  # a whole file of wrong content will not change
                    break
            elif attempt < TRIES:
                time.sleep(2 ** (attempt - 1))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    raise InputError(f"{url}: {problem}; try again later, or another --mirror")


def _fetch(url: str, partial: Path) -> str | None:
    """One attempt to complete the partial file; None, or what went wrong and may not next time.

    Raises InputError for what another attempt will not mend.
    """
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            if response.status != 206:  # the server sends all of it
                start = 0
            size = response.length
            with partial.open("ab" if start else "wb") as file, _bar(url, start, size) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                got = file.tell() - start
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the hash will tell
            return None
        if error.code < 500 and error.code != 429:
            raise InputError(f"{url}: HTTP {error.code}; is the --mirror right?") from None
        return f"HTTP {error.code}"
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
        return f"{getattr(e, 'reason', None) or type(e).__name__}"
    return None if size in (None, got) else f"cut off after {start + got:,} bytes"


def _bar(url: str, start: int, size: int | None) -> tqdm:
    total = None if size is None else start + size
    name = "/".join(url.split("/")[-2:])
    return tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=None)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", default="all", choices=[*SHA256, "all"])
    parser.add_argument("--out", type=Path, default=Path("data/real"))
    parser.add_argument("--mirror", default=ORIGIN, help="URL of a copy of the folder dataset/")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for task in SHA256 if args.task == "all" else [args.task]:
        print(LICENCES[task])
        for name, sha256 in SHA256[task].items():
            path = args.out / name
            if path.is_file() and digest(path) == sha256:
                print(f"  {path}: there already, verified")
                continue
            download(f"{args.mirror.rstrip('/')}/{name}", path, sha256)
            print(f"  {path}: fetched, verified")


if __name__ == "__main__":
    errors.run(main)
