"""CUHK01, CUHK02 and VIPeR, PersonX and RandPerson, whose people train, and Occluded-REID, a test set."""

from itertools import product
from pathlib import Path

from PIL import Image

from ...records import Split
from .renderer import Layout, Renderer


PEOPLE = 4


def write_cuhk01(root: Path, seed: int = 0) -> Layout:
    """Write ``campus``: images 1 and 2 of a person from camera 1, images 3 and 4 from camera 2."""
    layout, renderer = Layout(root), Renderer("cuhk01", seed)
    for number, shot in product(range(1, PEOPLE + 1), range(1, 5)):
        camera = 1 if shot <= 2 else 2
        image, _ = renderer.render(number, camera, shot)
        path = f"campus/{number:04d}{shot:03d}.png"
        renderer.add(layout, image, path, split="train", person=f"{number:04d}", camera=str(camera))
    return layout


def write_cuhk02(root: Path, seed: int = 0) -> Layout:
    """Write five camera pairs, in each of which the people's numbers start again."""
    layout, renderer = Layout(root / "Dataset"), Renderer("cuhk02", seed)
    for pair, published, camera, index in product(range(1, 6), range(1, 3), (1, 2), range(2)):
        image, _ = renderer.render(2 * pair + published, 2 * pair + camera, index)
        path = f"P{pair}/cam{camera}/{published:03d}_{index:04d}.png"
        renderer.add(
            layout, image, path, split="train", person=f"P{pair}_{published:03d}", camera=f"P{pair}_cam{camera}"
        )
    return layout


def write_viper(root: Path, seed: int = 0) -> Layout:
    """Write ``cam_a`` and ``cam_b``: one image each, with the angle in its name; a Windows leftover beside them."""
    layout, renderer = Layout(root / "VIPeR"), Renderer("viper", seed)
    for number, (camera, angle) in product(range(PEOPLE), (("a", 45), ("b", 135))):
        image, _ = renderer.render(number + 1, 1 if camera == "a" else 2, 0)
        path = f"cam_{camera}/{number:03d}_{angle}.bmp"
        renderer.add(layout, image, path, split="train", person=f"{number:03d}", camera=camera)
    (layout.root / "cam_a" / "Thumbs.db").write_bytes(b"thumbs")
    layout.skipped["not an image file"] = 1
    return layout


def write_occludedreid(root: Path, seed: int = 0) -> Layout:
    """Write occluded and whole images of the same people, as TIFF."""
    layout, renderer = Layout(root), Renderer("occludedreid", seed)
    for number, index in product(range(1, PEOPLE + 1), range(2)):
        whole, _ = renderer.render(number, index + 1, index)
        other, _ = renderer.render(number, index + 1, index + 2)
        shots: tuple[tuple[str, Split, Image.Image], ...] = (
            ("whole_body_images", "gallery", whole),
            ("occluded_body_images", "query", _hide_legs(other)),
        )
        for folder, split, image in shots:
            path = f"{folder}/{number:03d}/{number:03d}_{index + 1:02d}.tif"
            renderer.add(layout, image, path, split=split, person=f"{number:03d}", camera=path)
    return layout


def _hide_legs(image: Image.Image) -> Image.Image:
    """Put a grey board before the lower half."""
    hidden = image.copy()
    hidden.paste((128, 128, 128), (0, image.height // 2, image.width, image.height))
    return hidden


TRAIN_PEOPLE, TEST_PEOPLE, VIEWS = 3, 2, 3
# PersonX's cameras are its backgrounds, which have these numbers in the file names.
PERSONX_CAMERAS = {"4": 10, "5": 11}


def write_personx(root: Path, seed: int = 0) -> Layout:
    """Write two of PersonX's backgrounds, each with its own training, query and gallery folder."""
    layout, renderer = Layout(root / "PersonX_v1"), Renderer("personx", seed)
    people = range(1, TRAIN_PEOPLE + TEST_PEOPLE + 1)
    for (background, camera), number, view in product(PERSONX_CAMERAS.items(), people, range(VIEWS)):
        image, _ = renderer.render(number, camera, view)
        split: Split = "train" if number <= TRAIN_PEOPLE else "query" if view == 0 else "gallery"
        folder = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}[split]
        path = f"{background}/{folder}/{number:04d}_c{camera}s1_{view:02d}.jpg"
        renderer.add(layout, image, path, split=split, person=f"{number:04d}", camera=str(camera))
    return layout


def write_randperson_subset(root: Path, seed: int = 0) -> Layout:
    """Write the subset of the paper: one folder, scene before camera."""
    layout, renderer = Layout(root), Renderer("randperson", seed)
    for number, scene, camera in product(range(TRAIN_PEOPLE), range(2), range(2)):
        image, _ = renderer.render(number + 1, 2 * scene + camera + 1, 0)
        path = f"randperson_subset/{number:06d}_s{scene:02d}_c{camera:02d}_f{100 * number + camera:06d}.jpg"
        renderer.add(layout, image, path, split="train", person=f"{number:06d}", camera=f"s{scene:02d}_c{camera:02d}")
    return layout


def write_randperson_full(root: Path, seed: int = 0) -> Layout:
    """Write folders of scenes with camera before scene, and a folder of frames that the authors left out."""
    layout, renderer = Layout(root), Renderer("randperson", seed)
    for number, scene, camera in product(range(TRAIN_PEOPLE), range(2), range(2)):
        image, _ = renderer.render(number + 1, 2 * scene + camera + 1, 1)
        name = f"{number:06d}_c{camera:02d}_s{scene:02d}_f{100 * number + camera:06d}.jpg"
        path = f"images/scene{scene:02d}/camera{camera}_1/{name}"
        renderer.add(layout, image, path, split="train", person=f"{number:06d}", camera=f"s{scene:02d}_c{camera:02d}")
    for number in range(TRAIN_PEOPLE):
        image, _ = renderer.render(number + 1, 1, 2)
        renderer.save(image, layout, f"images/scene00/delete_camera0_1/{number:06d}_c00_s00_f000999.jpg")
    layout.skipped["left out by the authors (delete_ folder)"] = TRAIN_PEOPLE
    return layout


LAYOUTS = {
    "personx": write_personx,
    "randperson:subset": write_randperson_subset,
    "randperson:full": write_randperson_full,
    "cuhk01": write_cuhk01,
    "cuhk02": write_cuhk02,
    "viper": write_viper,
    "occludedreid": write_occludedreid,
}
