"""Install the package into empty environments: time, size, a first use, and tests.

`--write` adds rows to benchmarks/results/fresh_install.json and to the table of benchmarks/README.md.

    python benchmarks/fresh_install.py --write                        # `make fresh`: pip install . with this Python
    python benchmarks/fresh_install.py --torch 2.13.0+cpu --write     # with another build of PyTorch
    python benchmarks/fresh_install.py --python 3.11 3.13 --torch current 2.6.0 --tests tests/pruning   # `make matrix`

Each combination gets a virtual environment of its own, which is deleted afterwards. Times include downloads, from where pip
finds packages; `--no_cache_dir` leaves out those of earlier installations. The first use prunes a small UNet in one call,
saves it and loads it again. Tests are run with the extra `training`, and with what they need themselves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from documents import write_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/fresh_install.json"
CURRENT = "current"
TEST_PACKAGES = ("filelock", "hypothesis", "pytest", "scikit-learn", "torch-pruning>=1.6")
FIRST_USE = """
import json, platform, tempfile, time
start = time.perf_counter()
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers_gfprune import PruneDDPMPipeline
imported = time.perf_counter()
unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1,
                   norm_num_groups=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
small = PruneDDPMPipeline(unet=unet, scheduler=DDPMScheduler()).prune(torch.rand(4, 1, 8, 8) * 2 - 1, ratio=0.3)
with tempfile.TemporaryDirectory() as folder:
    small.save_pretrained(folder)
    loaded = DiffusionPipeline.from_pretrained(folder).unet
assert all(torch.equal(a, b) for a, b in zip(small.unet.parameters(), loaded.parameters()))
used = time.perf_counter()
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "import_seconds": imported - start,
                  "use_seconds": used - imported}))
"""


def interpreter(version: str) -> str:
    """Path of a Python by its version, such as 3.12.

    Raises:
        ValueError: There is none.
    """
    places = [f"python{version}", *map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))]
    found = next((path for place in places if (path := shutil.which(place)) and _runs(path)), None)
    if platform.python_version().startswith(f"{version}."):
        found = sys.executable
    if found is None:
        raise ValueError(f"python={version} was not found: there is no python{version} on the path, or in ~/.pyenv")
    return found


def _runs(python: str) -> bool:
    """False for pyenv's stand-in for a version that is not switched on."""
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def folder_size(folder: Path) -> int:
    """Size of all files in a folder, in bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def install(python: str, torch: str, extra: str | None, tests: list[str], options: list[str]) -> dict:
    """Install into an empty environment, and try it.

    Args:
        python: Path of the interpreter.
        torch: Version of PyTorch, or `CURRENT`.
        extra: Extra of the package; None: none.
        tests: Tests to run, if any.
        options: More options of pip.

    Raises:
        subprocess.CalledProcessError: The installation or the first use failed.
    """
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([python, "-m", "venv", place], check=True)
        inside = Path(place, "bin/python")
        empty = folder_size(Path(place))
        extras = [name for name in (extra, "training" if tests else None) if name]
        wanted = [f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)]
        wanted += [] if torch == CURRENT else [f"torch=={torch}"]
        wanted += TEST_PACKAGES if tests else ()
        start = time.perf_counter()
        subprocess.run([inside, "-m", "pip", "install", "--quiet", *options, *wanted], check=True)
        row = {"extra": ",".join(extras) or None, "install_seconds": time.perf_counter() - start}
        row["bytes"] = folder_size(Path(place)) - empty
        used = subprocess.run([inside, "-c", FIRST_USE], cwd=place, check=True, capture_output=True, text=True)
        row |= json.loads(used.stdout.splitlines()[-1])
        if tests:
            ran = subprocess.run(
                [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT, capture_output=True, text=True
            )
            lines = ran.stdout.splitlines() or ran.stderr.splitlines()
            row |= {"tests": lines[-1], "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}
    return row


def table(rows: list[dict]) -> str:
    """All rows in Markdown, sorted by versions."""
    lines = [
        "| Python | torch | extra | installed in | size | import | first use | tests |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["extra"] or "", [*map(int, row["python"].split("."))], row["torch"])):
        figures = f"{row['install_seconds']:.0f} s | {row['bytes'] / 2**30:.2f} GiB | {row['import_seconds']:.1f} s"
        ends = f"{row['use_seconds']:.1f} s | {row.get('tests', '-')}"
        lines.append(f"| {row['python']} | {row['torch']} | {row['extra'] or '-'} | {figures} | {ends} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Install the package into empty environments.", allow_abbrev=False)
    parser.add_argument(
        "--python", nargs="+", default=[".".join(platform.python_version_tuple()[:2])], help="versions, as 3.12"
    )
    parser.add_argument("--torch", nargs="+", default=[CURRENT], help=f"versions of PyTorch (default: {CURRENT})")
    parser.add_argument("--extra", help="extra of the package, such as training or demo")
    parser.add_argument("--tests", nargs="+", default=[], help="tests to run in each environment")
    parser.add_argument("--no_cache_dir", action="store_true", help="download everything, as on a fresh machine")
    parser.add_argument("--write", action="store_true", help=f"add the rows to {RESULTS.relative_to(ROOT)} and to the table")
    args = parser.parse_args()
    try:
        pythons = [interpreter(version) for version in args.python]
    except ValueError as error:
        parser.error(str(error))
    rows, failed = [], False
    for python, torch in itertools.product(pythons, args.torch):
        try:
            rows.append(install(python, torch, args.extra, args.tests, ["--no-cache-dir"] if args.no_cache_dir else []))
        except subprocess.CalledProcessError as error:
            print(f"{python} with torch {torch} failed:\n{error.stderr or error}", file=sys.stderr)
            failed = True
            continue
        print(table(rows[-1:]), *rows[-1].get("failed", []), sep="\n", flush=True)
        failed |= bool(rows[-1].get("failed"))
    if args.write:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        same = {(row["python"], row["torch"], row["extra"]) for row in rows}
        kept = [row for row in kept if (row["python"], row["torch"], row["extra"]) not in same]
        RESULTS.write_text(json.dumps([*kept, *rows], indent=2) + "\n")
        write_table("fresh install", table([*kept, *rows]))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
