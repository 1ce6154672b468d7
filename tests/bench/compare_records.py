"""Are records built by two versions of the code the same, byte by byte? The demo's world and all layouts are built.

Run: python tests/bench/compare_records.py OLD NEW, two working copies. The first one writes the images.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml


# Small, and every task has records.
WORLD = "from pathlib import Path; from chatreid_plugin.demo.world import write_world; "
WORLD += "write_world(Path('data/world'), train_people=24, test_people=6, junk=4, distractors=4, workers=1)"
SIZES = "records.stage1=80 records.stage2=4000 records.stage3=2000 workers=1 gallery.max_size=4".split()


def run(code: Path, folder: Path, *command: str) -> str:
    """Run Python with a working copy's package and return what it prints."""
    environment = dict(os.environ, PYTHONPATH=str(code), OMP_NUM_THREADS="1")
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode not in (0, 3):  # 3: an audit that found something
        raise SystemExit(f"{code}: {' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return result.stdout


def write_data(code: Path, folder: Path) -> None:
    """Write the world, every layout of the full recipe, captions, and both recipes."""
    recipe: dict[str, Any] = yaml.safe_load((code / "examples" / "data_engine_full.yaml").read_text(encoding="utf-8"))
    (folder / "data").mkdir()
    for source in recipe["sources"]:
        name = ":".join([source.get("parser", source["name"]), *filter(None, [source.get("variant")])])
        if name != "cuhk03:labeled":  # in the same file as the detected ones
            run(code, folder, "-m", "chatreid_plugin", "synth", name, source["root"])
        source["allow_count_mismatch"] = True
    recipe["sources"][0]["captions"] = "data/captions.jsonl"
    coats = enumerate(("red", "blue", "green", "white"), 1)
    lines = [{"person": f"{n:04d}", "captions": [f"A {c} coat."], "attributes": {"upper_colour": c}} for n, c in coats]
    (folder / "data" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (folder / "full.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(code, folder, "-c", WORLD)
    world = {"name": "world", "parser": "market1501", "root": "data/world", "allow_count_mismatch": True}
    recipe = recipe | {"sources": [world | {"captions": "data/world/captions.jsonl"}]}
    (folder / "world.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def hash_build(code: Path, folder: Path, recipe: str) -> dict[str, str]:
    """Return file -> hash of the manifests and shards of a recipe, and of what the audit says."""
    name = recipe.removesuffix(".yaml")
    places = [f"manifest_dir={name}/manifests", f"output_dir={name}/out"]
    said: dict[str, str] = {}
    for command in ("parse", "audit", "build", "stats"):
        sizes = SIZES if command == "build" else []
        form = [] if command == "parse" else ["--json"]
        target = [f"{name}/out"] if command == "stats" else [recipe, *places, *sizes]
        text = run(code, folder, "-m", "chatreid_plugin", command, *target, *form)
        lines = [line for line in text.splitlines() if '"seconds"' not in line and "version" not in line]
        said[f"{recipe}: chatreid {command}"] = hashlib.blake2b("\n".join(lines).encode()).hexdigest()[:16]
        (folder / f"{name}-{command}.txt").write_text("\n".join(lines), encoding="utf-8")
    for path in sorted((folder / name).rglob("*")):
        if path.suffix in (".parquet", ".jsonl") or path.name == "dataset_info.json":
            digest = hashlib.blake2b(path.read_bytes()).hexdigest()[:16]
            said[str(path.relative_to(folder))] = digest
    return said


def main() -> None:
    """Print each file with both hashes where they differ, and how many there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codes", nargs="+", type=Path, metavar="WORKING_COPY")
    parser.add_argument("--keep", type=Path, help="a folder for data and results, used again if it exists")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        codes = [code.resolve() for code in arguments.codes]
        if not (folder / "data").exists():
            write_data(codes[0], folder)
        found: list[dict[str, str]] = []
        for number, code in enumerate(codes):
            kept = folder / f"hashes-{number}.json"
            hashes: dict[str, str] = json.loads(kept.read_text()) if number == 0 and kept.exists() else {}
            for recipe in () if hashes else ("world.yaml", "full.yaml"):
                # Manifests hold the roots as they were given, so both versions work in the same place.
                for path in sorted((folder / recipe.removesuffix(".yaml")).rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                hashes |= hash_build(code, folder, recipe)
            kept.write_text(json.dumps(hashes, indent=1), encoding="utf-8")
            found.append(hashes)
    names = sorted({name for hashes in found for name in hashes})
    different = [name for name in names if len({hashes.get(name) for hashes in found}) > 1]
    for name in different:
        print(name, *(hashes.get(name) for hashes in found))
    print(f"{len(names)} files and outputs, {len(different)} differ")


if __name__ == "__main__":
    main()
