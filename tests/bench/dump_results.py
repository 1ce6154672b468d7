"""Write the results of every shipped evaluation on its synthetic layout, to be compared before and after a change.

    python tests/bench/dump_results.py before.json [--layouts DIR] [--model tiny_model]
    python tests/bench/dump_results.py after.json [--layouts DIR] [--model tiny_model] --compare before.json

Scores come from chance, from colours (as the filter and as the scorer) and, with ``--model``, from a checkpoint that
filters by its own features. What names paths, versions or keys of the settings is left out.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))  # the tests' table of cases

from conftest import CASES  # noqa: E402  # pyright: ignore[reportMissingImports]

from chatreid_plugin.eval.run import run_evaluation  # noqa: E402


KINDS: dict[str, dict[str, Any]] = {
    "random": {"backend": "random", "filter": "none"},
    "filtered": {"backend": "random", "filter": "colour", "top_k": 3, "floor": 1},
    "features": {"backend": "features", "filter": "colour", "tau": -1},
    "fused": {"backend": "random", "filter": "colour", "fusion": "k_reciprocal", "k1": 4, "k2": 2},
}
KEPT = ("metrics", "cmc_curve", "trials", "strict", "filter", "protocol")


def run_all(layouts: Path, root: Path, names: list[str], model: str | None) -> dict[str, Any]:
    """Return what is kept of the results, by case and kind of scores; why there are none, if there cannot be."""
    kinds = {name: KINDS[name] for name in names}
    if model is not None:
        size = {"image_max_pixels": 8192, "image_min_pixels": 8192, "dtype": "float32", "device": "cpu"}
        kinds["model"] = {"backend": "transformers", "model_name_or_path": model, "max_queries": 4, **size}
    found: dict[str, Any] = {}
    for case in CASES.values():
        for kind, keys in kinds.items():
            folder = root / case.name / kind
            try:
                run_evaluation(case.load(layouts, output_dir=folder, report_queries=0, **keys))
            except Exception as error:
                found[f"{case.name} {kind}"] = type(error).__name__
                continue
            content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            found[f"{case.name} {kind}"] = {key: content[key] for key in KEPT}
    return found


def main() -> int:
    """Run the command line; 1 if results differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layouts", type=Path, help="folder of the synthetic layouts, for another run to find")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--model")
    parser.add_argument("--compare", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        layouts = arguments.layouts or Path(folder) / "layouts"
        found = run_all(layouts, Path(folder), arguments.kinds, arguments.model)
    arguments.output.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
    measured = sum(isinstance(one, dict) for one in found.values())
    print(f"{len(found)} evaluations, {measured} with results")
    if arguments.compare is None:
        return 0
    before = json.loads(arguments.compare.read_text(encoding="utf-8"))
    differing = sorted(key for key in found.keys() | before.keys() if found.get(key) != before.get(key))
    print("\n".join(differing) or "all equal, number by number")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
