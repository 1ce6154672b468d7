"""Check the four settings of SYSU-MM01 against their golden numbers: ``python tests/golden/check_sysu.py FOLDER``.

FOLDER holds ``rand_perm_cam.mat`` and ``test_id.mat`` of github.com/wuancong/SYSU-MM01, evaluation/data_split. The
project may not copy them, so this is a script and no test. The images are stand-ins that lie where SYSU-MM01's do;
parser, protocol and evaluator are the real ones.
"""

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from make_vectors import IntArray, rank_by_index, read_golden
from PIL import Image
from scipy.io import loadmat

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.engine.manifests import parse_source
from chatreid_plugin.eval.report import Results
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.shards import write_manifest
from tests.support import make_eval_settings


CAMERAS = range(1, 7)
TOLERANCE = 1e-6


def write_images(published: Path, root: Path) -> tuple[list[str], IntArray]:
    """Write SYSU-MM01's test images as one grey pixel each; return their paths, by camera, and identities from 0."""
    cells = loadmat(str(published / "rand_perm_cam.mat"))["rand_perm_cam"].ravel()
    identities = loadmat(str(published / "test_id.mat"))["id"].ravel().tolist()
    Image.new("L", (1, 1)).save(root / "pixel.jpg")
    paths: list[str] = []
    people: list[int] = []
    for camera in CAMERAS:
        for place, identity in enumerate(identities):
            for number in range(1, cells[camera - 1].ravel()[identity - 1].shape[-1] + 1):
                paths.append(f"cam{camera}/{identity:04d}/{number:04d}.jpg")
                people.append(place)
                (root / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
                os.link(root / "pixel.jpg", root / paths[-1])
    (root / "exp").mkdir()
    for name in ("train_id", "val_id"):
        (root / "exp" / f"{name}.txt").write_text("", encoding="utf-8")
    for name in ("test_id.mat", "rand_perm_cam.mat"):
        shutil.copy(published / name, root / "exp")
    return paths, np.array(people)


def write_scores(file: Path, paths: list[str], people: IntArray, seed: int, n_ids: int, amp: int) -> None:
    """Draw features as the golden numbers' recipe does and write minus the ranks, equal similarities in order."""
    stream = np.random.RandomState(seed)
    centres = stream.randint(-4, 5, size=(n_ids, 64))
    features = (centres[people] + stream.randint(-amp, amp + 1, size=(len(people), 64))).astype(np.float32)
    infrared = np.array([path[3] in "36" for path in paths])
    # Stable: the gallery by identity, then by camera, which is the order of equal similarities.
    gallery = np.flatnonzero(~infrared)[np.argsort(people[~infrared], kind="stable")]
    scores = -rank_by_index(features[infrared] @ features[gallery].T)
    np.savez(file, scores=scores, queries=np.array(paths)[infrared], gallery=np.array(paths)[gallery])


def compare(results: Results, golden: dict[str, Any]) -> float:
    """Return the largest difference of the means and of each trial."""
    ranking, trials = results.ranking, results.measured.trials
    pairs = [(ranking.mean_ap, golden["mAP"]), (ranking.mean_inp, golden["mINP"])]
    pairs += [(ranking.valid_queries, golden["num_valid"])]
    pairs += [(ranking.cmc[int(k)], value) for k, value in golden["cmc"].items()]
    pairs += list(zip([trial.mean_ap for trial in trials], golden["mAP_per_trial"], strict=True))
    pairs += list(zip([trial.cmc[1] for trial in trials], golden["rank_1_per_trial"], strict=True))
    return max(abs(found - expected) for found, expected in pairs)


def main() -> None:
    """Print the largest difference of each setting; fail if one is not within 1e-6."""
    golden, published = read_golden("sysu_mm01"), Path(sys.argv[1])
    with TemporaryDirectory() as name:
        folder = Path(name)
        root = folder / "SYSU-MM01"
        root.mkdir()
        write_scores(folder / "scores.npz", *write_images(published, root), **golden["args"])
        parsed = parse_source(SourceSettings(name="sysumm01", root=root, allow_count_mismatch=True))
        write_manifest(folder / "m.parquet", parsed.records, parsed.root, {"protocol": parsed.protocol})
        files = {"manifest": folder / "m.parquet", "output_dir": folder / "out", "scores": folder / "scores.npz"}
        differences: list[float] = []
        for setting, expected in golden["settings"].items():
            keys = dict(zip(("setting", "shots"), setting.split("_"), strict=True))
            results = run_evaluation(
                make_eval_settings({"protocol": "sysumm01", "backend": "scores", **files, **keys})
            )
            differences.append(compare(results, expected))
            print(f"{setting}: mAP {results.ranking.mean_ap:.6f}, largest difference {differences[-1]:.1e}")
    sys.exit(int(max(differences) > TOLERANCE))


if __name__ == "__main__":
    main()
