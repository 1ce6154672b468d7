"""Tests of the images of synthetic pedestrians and of the cameras that take them."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from chatreid_plugin.demo.figure import PALETTE
from chatreid_plugin.demo.people import VOCABULARY, Person, sample_people
from chatreid_plugin.demo.render import (
    BACKGROUNDS,
    MAXIMUM_CAMERAS,
    VIEWS,
    Camera,
    develop,
    draw_occluder,
    make_cameras,
    render_background,
    render_partial,
    render_person,
)


CAMERAS = make_cameras(MAXIMUM_CAMERAS, seed=0)
FRONT, BACK, LEFT, RIGHT = range(len(VIEWS))
TORSO = (0.42, 0.28, 0.58, 0.42)
THIGHS = (0.4, 0.55, 0.6, 0.66)
PLAIN = {"upper_type": "t-shirt", "upper_pattern": "plain", "bag": "no bag", "hat": "no hat"}


def make_person(**attributes: str) -> Person:
    person = sample_people(1, seed=0)[0]
    return replace(person, attributes=person.attributes | PLAIN | attributes)


def aim_camera(camera: Camera, view: int) -> Camera:
    front, back, left, right = (float(index == view) for index in range(len(VIEWS)))
    return replace(camera, viewpoint_weights=(front, back, left, right), occlusion_probability=0.0)


def render(person: Person, camera: Camera, seed: int = 0) -> Image.Image:
    return render_person(person, camera, np.random.default_rng(seed))[0]


def read_pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)


def measure_colour(image: Image.Image, box: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """Return the mean colour of a box given as shares of width and height."""
    width, height = image.size
    part = image.crop((round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)))
    return read_pixels(part).reshape(-1, 3).mean(axis=0)


def name_colour(colour: NDArray[np.float64]) -> str:
    """Return the nearest colour name of the upper garments."""
    return min(VOCABULARY["upper_colour"], key=lambda name: float(np.abs(np.asarray(PALETTE[name]) - colour).sum()))


def test_cameras_are_deterministic_and_keep_their_place() -> None:
    assert make_cameras(MAXIMUM_CAMERAS, seed=0) == CAMERAS
    assert make_cameras(2, seed=0) == CAMERAS[:2]
    assert make_cameras(2, seed=1) != CAMERAS[:2]


@pytest.mark.parametrize("count", [0, MAXIMUM_CAMERAS + 1])
def test_impossible_number_of_cameras_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="must be 1 to 6"):
        make_cameras(count, seed=0)


def test_cameras_cover_sizes_and_backgrounds() -> None:
    assert [camera.size for camera in CAMERAS] == [
        (64, 128),
        (96, 192),
        (128, 256),
        (160, 320),
        (128, 256),
        (192, 384),
    ]
    assert {camera.background for camera in CAMERAS} == set(BACKGROUNDS)


@pytest.mark.parametrize("seed", range(5))
def test_camera_defects_are_moderate(seed: int) -> None:
    for camera in make_cameras(MAXIMUM_CAMERAS, seed):
        assert all(0.85 <= gain <= 1.15 for gain in camera.gains)
        assert 0.75 <= camera.light <= 1.2
        assert sum(camera.viewpoint_weights) == pytest.approx(1.0)
        assert min(camera.viewpoint_weights) > 0.05
        assert camera.jpeg_quality >= 70


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda camera: f"camera{camera.number}")
def test_same_draw_gives_same_image(camera: Camera) -> None:
    person = sample_people(1, seed=1)[0]
    first, posture = render_person(person, camera, np.random.default_rng(5))
    second, same_posture = render_person(person, camera, np.random.default_rng(5))
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()
    assert posture == same_posture


def test_other_draw_gives_other_image() -> None:
    person = make_person()
    camera = aim_camera(CAMERAS[0], FRONT)
    assert len({render(person, camera, seed).resize((32, 64)).tobytes() for seed in range(5)}) == 5


def test_sizes_vary_a_little_around_the_native_size() -> None:
    for camera in CAMERAS[:3]:
        sizes = {render(make_person(), camera, seed).size for seed in range(6)}
        assert len(sizes) > 1
        for width, height in sizes:
            assert abs(width / camera.size[0] - 1) < 0.09
            assert abs(height / camera.size[1] - 1) < 0.09


def test_both_postures_occur() -> None:
    postures = [render_person(make_person(), CAMERAS[0], np.random.default_rng(seed))[1] for seed in range(25)]
    assert set(postures) == {"walking", "standing"}


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda camera: f"camera{camera.number}")
def test_red_and_blue_shirts_differ_in_the_right_direction(camera: Camera) -> None:
    aimed = aim_camera(camera, FRONT)
    red, _, blue = measure_colour(render(make_person(upper_colour="red"), aimed), TORSO)
    assert red > blue + 50
    red, _, blue = measure_colour(render(make_person(upper_colour="blue"), aimed), TORSO)
    assert blue > red + 50


def test_shirt_colours_stay_recognisable_in_all_cameras() -> None:
    cases = [(name, camera) for name in VOCABULARY["upper_colour"] for camera in CAMERAS[:5]]
    found = [
        name_colour(measure_colour(render(make_person(upper_colour=n), aim_camera(c, FRONT)), TORSO)) for n, c in cases
    ]
    right = sum(seen == name for seen, (name, _) in zip(found, cases, strict=True))
    assert right >= 0.9 * len(cases)


def test_trouser_colour_shows() -> None:
    camera = aim_camera(CAMERAS[2], FRONT)
    bright = measure_colour(render(make_person(lower_type="trousers", lower_colour="white"), camera), THIGHS)
    dark = measure_colour(render(make_person(lower_type="trousers", lower_colour="black"), camera), THIGHS)
    assert bright.mean() > dark.mean() + 80


@pytest.mark.parametrize("name", sorted(set(VOCABULARY) - {"gender", "age"}))
def test_every_value_of_an_attribute_looks_different(name: str) -> None:
    camera = aim_camera(replace(CAMERAS[2], noise=0.0), FRONT)
    base = {"hair": "short black hair", "upper_colour": "red", "lower_type": "trousers", "lower_colour": "blue"}
    images = [render(make_person(**base | {name: value}), camera) for value in VOCABULARY[name]]
    for index, first in enumerate(images):
        for second in images[index + 1 :]:
            changed = np.abs(read_pixels(first) - read_pixels(second)).max(axis=2) > 25
            assert changed.mean() > 0.002


def test_gender_and_age_change_the_body() -> None:
    camera = aim_camera(replace(CAMERAS[2], noise=0.0), FRONT)
    young = render(make_person(gender="female", age="young"), camera)
    assert render(make_person(gender="male", age="young"), camera).tobytes() != young.tobytes()
    assert render(make_person(gender="female", age="elderly"), camera).tobytes() != young.tobytes()


def test_backpack_hides_the_back_and_not_the_chest() -> None:
    person = make_person(upper_colour="yellow", bag="black backpack")
    chest = measure_colour(render(person, aim_camera(CAMERAS[2], FRONT)), (0.47, 0.28, 0.53, 0.36))
    back = measure_colour(render(person, aim_camera(CAMERAS[2], BACK)), (0.47, 0.28, 0.53, 0.36))
    assert chest[0] > back[0] + 80


def test_side_views_face_opposite_ways() -> None:
    person = make_person(bag="red backpack", upper_colour="green")
    # The backpack is behind the body: in the right half of the image of somebody who faces left.
    for view, sign in ((LEFT, 1), (RIGHT, -1)):
        image = render(person, aim_camera(CAMERAS[2], view))
        left, right = (measure_colour(image, (start, 0.26, start + 0.2, 0.42)) for start in (0.2, 0.6))
        assert sign * ((right[0] - right[1]) - (left[0] - left[1])) > 40


def test_same_person_is_closer_than_another_person() -> None:
    camera, other = aim_camera(CAMERAS[2], FRONT), aim_camera(CAMERAS[4], FRONT)
    red = make_person(upper_colour="red", lower_type="trousers", lower_colour="black")
    white = make_person(upper_colour="white", lower_type="trousers", lower_colour="blue")

    def distance(first: Image.Image, second: Image.Image) -> float:
        boxes = (TORSO, THIGHS)
        return float(sum(np.abs(measure_colour(first, box) - measure_colour(second, box)).sum() for box in boxes))

    query = render(red, camera)
    assert distance(query, render(red, other, 1)) < 0.5 * distance(query, render(white, other, 1))


def test_occlusion_follows_its_probability() -> None:
    never = aim_camera(CAMERAS[0], FRONT)
    always = replace(never, occlusion_probability=1.0)
    assert render(make_person(), never).tobytes() != render(make_person(), always).tobytes()


@pytest.mark.parametrize("seed", range(12))
def test_occluder_hides_a_part_only(seed: int) -> None:
    canvas = Image.new("RGB", (128, 256), (255, 0, 255))
    draw_occluder(canvas, np.random.default_rng(seed))
    hidden = (read_pixels(canvas) != (255, 0, 255)).any(axis=2).mean()
    assert 0.02 < hidden < 0.45


def test_light_and_gains_act_on_the_image() -> None:
    canvas = Image.new("RGB", (128, 256), (120, 120, 120))
    neutral = replace(CAMERAS[0], light=1.0, gains=(1.0, 1.0, 1.0), noise=0.0)

    def measure(camera: Camera) -> NDArray[np.float64]:
        return read_pixels(develop(canvas, camera, np.random.default_rng(0))).mean(axis=(0, 1))

    plain = measure(neutral)
    assert measure(replace(neutral, light=0.8)).mean() == pytest.approx(0.8 * plain.mean(), abs=2)
    red, green, _ = measure(replace(neutral, gains=(1.1, 0.9, 1.0)))
    assert red == pytest.approx(1.1 * plain[0], abs=2)
    assert green == pytest.approx(0.9 * plain[1], abs=2)


def test_noise_and_blur_act_on_the_image() -> None:
    canvas = Image.new("RGB", (128, 256), (120, 120, 120))
    canvas.paste((220, 220, 220), (64, 0, 128, 256))
    sharp = replace(CAMERAS[0], noise=0.0, blur_radius=0.0)

    def measure_edge(camera: Camera) -> float:
        pixels = read_pixels(develop(canvas, camera, np.random.default_rng(0)))
        return float(np.abs(np.diff(pixels[:, :, 0], axis=1)).max())

    assert measure_edge(replace(sharp, blur_radius=0.03)) < 0.7 * measure_edge(sharp)
    flat = Image.new("RGB", (128, 256), (120, 120, 120))
    noisy = read_pixels(develop(flat, replace(sharp, noise=6.0), np.random.default_rng(0)))
    assert 4 < noisy[:, 20:40, 0].std() < 9


def test_background_holds_no_person() -> None:
    camera = aim_camera(CAMERAS[2], FRONT)
    image = render_background(camera, np.random.default_rng(0))
    red, green, blue = measure_colour(image, TORSO)
    assert max(red, green, blue) - min(red, green, blue) < 90
    assert image.tobytes() == render_background(camera, np.random.default_rng(0)).tobytes()


def test_partial_box_cuts_the_person() -> None:
    person = make_person(upper_colour="red", hat="red cap")
    camera = aim_camera(CAMERAS[2], FRONT)
    whole = read_pixels(render(person, camera).resize((64, 128)))
    for seed in range(6):
        partial = render_partial(person, camera, np.random.default_rng(seed))
        assert abs(partial.size[0] / camera.size[0] - 1) < 0.09
        assert np.abs(read_pixels(partial.resize((64, 128))) - whole).mean() > 15
