"""Market-1501's layout: junk and distractors in the gallery, test people apart from the training people."""

from itertools import product
from pathlib import Path

from .renderer import Layout, Renderer


TRAIN_PEOPLE, TEST_PEOPLE, CAMERAS, IMAGES = 4, 3, 3, 2


def write_market1501(root: Path, seed: int = 0) -> Layout:
    """Write ``bounding_box_train``, ``query`` and ``bounding_box_test``: 4 + 3 identities, 3 cameras."""
    layout, renderer = Layout(root), Renderer("market1501", seed)
    people = range(1, TRAIN_PEOPLE + TEST_PEOPLE + 1)
    for person, camera, index in product(people, range(1, CAMERAS + 1), range(IMAGES)):
        split = "train" if person <= TRAIN_PEOPLE else "query" if index == 0 else "gallery"
        folder = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}[split]
        image, _ = renderer.render(person, camera, index)
        path = f"{folder}/{person:04d}_c{camera}s1_{index + 1:06d}_01.jpg"
        renderer.add(layout, image, path, split=split, person=f"{person:04d}", camera=str(camera))
    for index, camera in enumerate((1, 2, 3)):
        image = renderer.render_background(camera, index)
        path = f"bounding_box_test/0000_c{camera}s1_{index + 1:06d}_00.jpg"
        renderer.add(layout, image, path, split="gallery", person="0000", camera=str(camera))
        junk = renderer.render_junk(100 + index, camera, index)
        renderer.save(junk, layout, f"bounding_box_test/-1_c{camera}s1_{index + 1:06d}_00.jpg")
    layout.skipped["junk (identity -1)"] = 3
    return layout


LAYOUTS = {
    "market1501": write_market1501,
}
