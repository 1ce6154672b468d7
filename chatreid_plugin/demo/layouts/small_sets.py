"""CUHK01, CUHK02, VIPeR (every person trains) and Occluded-REID (a test set, with leftovers that are no images)."""

from itertools import product
from pathlib import Path

from PIL import Image

from ...records import Split
from .studio import Layout, Studio


PEOPLE = 4


def write_cuhk01(root: Path, seed: int = 0) -> Layout:
    """Write ``campus``: images 1 and 2 of a person from camera 1, images 3 and 4 from camera 2."""
    layout, studio = Layout(root), Studio("cuhk01", seed)
    for number, shot in product(range(1, PEOPLE + 1), range(1, 5)):
        camera = 1 if shot <= 2 else 2
        image, _ = studio.photograph(number, camera, shot)
        path = f"campus/{number:04d}{shot:03d}.png"
        studio.add(layout, image, path, split="train", person=f"{number:04d}", camera=str(camera))
    return layout


def write_cuhk02(root: Path, seed: int = 0) -> Layout:
    """Write five camera pairs, in each of which the people's numbers start again."""
    layout, studio = Layout(root / "Dataset"), Studio("cuhk02", seed)
    for pair, published, camera, index in product(range(1, 6), range(1, 3), (1, 2), range(2)):
        image, _ = studio.photograph(2 * pair + published, 2 * pair + camera, index)
        path = f"P{pair}/cam{camera}/{published:03d}_{index:04d}.png"
        studio.add(
            layout, image, path, split="train", person=f"P{pair}_{published:03d}", camera=f"P{pair}_cam{camera}"
        )
    return layout


def write_viper(root: Path, seed: int = 0) -> Layout:
    """Write ``cam_a`` and ``cam_b``: one image each, with the angle in its name; a Windows leftover beside them."""
    layout, studio = Layout(root / "VIPeR"), Studio("viper", seed)
    for number, (camera, angle) in product(range(PEOPLE), (("a", 45), ("b", 135))):
        image, _ = studio.photograph(number + 1, 1 if camera == "a" else 2, 0)
        path = f"cam_{camera}/{number:03d}_{angle}.bmp"
        studio.add(layout, image, path, split="train", person=f"{number:03d}", camera=camera)
    (layout.root / "cam_a" / "Thumbs.db").write_bytes(b"thumbs")
    layout.skipped["not an image file"] = 1
    return layout


def write_occludedreid(root: Path, seed: int = 0) -> Layout:
    """Write occluded and whole images of the same people, as TIFF."""
    layout, studio = Layout(root), Studio("occludedreid", seed)
    for number, index in product(range(1, PEOPLE + 1), range(2)):
        whole, _ = studio.photograph(number, index + 1, index)
        other, _ = studio.photograph(number, index + 1, index + 2)
        shots: tuple[tuple[str, Split, Image.Image], ...] = (
            ("whole_body_images", "gallery", whole),
            ("occluded_body_images", "query", _hide_legs(other)),
        )
        for folder, split, image in shots:
            path = f"{folder}/{number:03d}/{number:03d}_{index + 1:02d}.tif"
            studio.add(layout, image, path, split=split, person=f"{number:03d}", camera=path)
    return layout


def _hide_legs(image: Image.Image) -> Image.Image:
    """Put a grey board before the lower half."""
    hidden = image.copy()
    hidden.paste((128, 128, 128), (0, image.height // 2, image.width, image.height))
    return hidden
