"""Renders synthetic pedestrians: a camera, its backdrop, the figure in it, clutter, occluders and image defects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .figure import Colour, Pen, draw_figure, make_pose
from .people import Person


MAXIMUM_CAMERAS = 6
VIEWS = ("front", "back", "left", "right")
BACKGROUNDS = ("street", "wall", "grass")

# Low to high resolution, as the cameras of one real network differ.
_NATIVE_SIZES = ((64, 128), (96, 192), (128, 256), (160, 320), (128, 256), (192, 384))
_LARGEST_DRAWN = (128, 256)
_SUPERSAMPLING = 2
_GROUND = 0.72
_RANDOM_STREAM = 2
_POSTURES = ("walking", "standing")
_WALKING_SHARE = 0.65


@dataclass(frozen=True, slots=True)
class Camera:
    """One camera of the synthetic network.

    Attributes:
        number: 1 to ``MAXIMUM_CAMERAS``.
        background: a value of ``BACKGROUNDS``.
        backdrop_seed: decides the details of the background, which all images of the camera share.
        light: brightness factor.
        gains: colour cast, factors of red, green and blue.
        blur_radius: reach of the blur as a share of the image width.
        noise: standard deviation of the grain, in grey levels.
        crop_jitter: how far the box may be off, as a share of the image width.
        size: usual width and height of a crop, pixels.
        viewpoint_weights: chance of each of ``VIEWS``.
        occlusion_probability: chance that something hides a part of the person.
        jpeg_quality: of the files of this camera.
    """

    number: int
    background: str
    backdrop_seed: int
    light: float
    gains: tuple[float, float, float]
    blur_radius: float
    noise: float
    crop_jitter: float
    size: tuple[int, int]
    viewpoint_weights: tuple[float, float, float, float]
    occlusion_probability: float
    jpeg_quality: int


def make_cameras(count: int, seed: int) -> list[Camera]:
    """Return the cameras 1 to ``count`` of the world of this seed.

    Raises:
        ValueError: ``count`` is not 1 to ``MAXIMUM_CAMERAS``.
    """
    if not 1 <= count <= MAXIMUM_CAMERAS:
        raise ValueError(f"The number of cameras must be 1 to {MAXIMUM_CAMERAS}, got {count}.")
    return [_make_camera(number, seed) for number in range(1, count + 1)]


def _make_camera(number: int, seed: int) -> Camera:
    rng = np.random.default_rng((_RANDOM_STREAM, seed, number))
    red, green, blue = (float(gain) for gain in rng.uniform(0.91, 1.09, 3))
    weights = rng.dirichlet((2.0, 2.0, 2.0, 2.0)) * 0.7 + 0.075
    front, back, left, right = (float(weight) for weight in weights / weights.sum())
    return Camera(
        number=number,
        background=BACKGROUNDS[(number - 1 + seed) % len(BACKGROUNDS)],
        backdrop_seed=int(rng.integers(2**31)),
        light=float(rng.uniform(0.8, 1.15)),
        gains=(red, green, blue),
        blur_radius=float(rng.uniform(0.003, 0.008)),
        noise=float(rng.uniform(2.0, 7.0)),
        crop_jitter=float(rng.uniform(0.03, 0.08)),
        size=_NATIVE_SIZES[number - 1],
        viewpoint_weights=(front, back, left, right),
        occlusion_probability=float(rng.uniform(0.08, 0.25)),
        jpeg_quality=int(rng.integers(75, 95)),
    )


def render_person(person: Person, camera: Camera, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Return an RGB crop of the person and the posture: ``walking`` or ``standing``."""
    canvas = make_canvas(camera, rng)
    width, height = canvas.size
    shift_x, shift_y, zoom = (float(value) for value in rng.uniform(-1.0, 1.0, 3) * camera.crop_jitter)
    # A detector's box follows the body, so height hardly shows in the crop; a little of it is kept as a cue.
    scale = height * 0.92 * (0.6 + 0.4 * person.height_scale) * (1.0 + 0.5 * zoom)
    axis, top = width * (0.5 + shift_x), (height - scale) / 2 + shift_y * width
    posture = _draw_figure(canvas, person, camera, (axis, top, scale), rng)
    if rng.random() < camera.occlusion_probability:
        draw_occluder(canvas, rng)
    return develop(canvas, camera, rng), posture


def render_partial(person: Person, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Return a badly cut box, as a failing detector gives it: only legs, only the upper body or half a person."""
    canvas = make_canvas(camera, rng)
    width, height = canvas.size
    scale = height * float(rng.uniform(1.5, 2.2))
    kind = int(rng.integers(3))
    if kind == 0:
        axis, top = width * float(rng.uniform(0.3, 0.7)), height - scale
    elif kind == 1:
        axis, top = width * float(rng.uniform(0.3, 0.7)), height * 0.05
    else:
        scale = height * 0.92
        axis, top = width * float(rng.choice((-0.05, 1.05))), height * 0.04
    _draw_figure(canvas, person, camera, (axis, top, scale), rng)
    return develop(canvas, camera, rng)


def render_background(camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Return a crop without any person, as a false alarm of a detector gives it."""
    return develop(make_canvas(camera, rng), camera, rng)


def _draw_figure(
    canvas: Image.Image,
    person: Person,
    camera: Camera,
    framing: tuple[float, float, float],
    rng: np.random.Generator,
) -> str:
    """Draw the person with axis, top and scale of ``framing`` and return the posture."""
    view = _choose(VIEWS, camera.viewpoint_weights, rng)
    posture = _choose(_POSTURES, (_WALKING_SHARE, 1.0 - _WALKING_SHARE), rng)
    axis, top, scale = framing
    pen = Pen(ImageDraw.Draw(canvas), axis, top, scale, mirrored=view == "left")
    pose = make_pose(person, view, posture, rng)
    draw_figure(pen, pose, person)
    return posture


def _choose(names: Sequence[str], weights: Sequence[float], rng: np.random.Generator) -> str:
    return names[int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))]


def make_canvas(camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Return a drawing canvas filled with a random part of the camera's backdrop and some clutter."""
    width, height = _get_canvas_size(camera)
    backdrop = _make_backdrop(camera.background, camera.backdrop_seed, width, height)
    left = int(rng.integers(backdrop.width - width + 1))
    top = int(rng.integers(backdrop.height - height + 1))
    canvas = backdrop.crop((left, top, left + width, top + height))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 3))):
        _draw_clutter(draw, width, height, rng)
    return canvas


def draw_occluder(canvas: Image.Image, rng: np.random.Generator) -> None:
    """Hide a part of the canvas behind a pole, a box at the bottom or a passer-by at one side."""
    width, height = canvas.size
    draw = ImageDraw.Draw(canvas)
    colour = _draw_dull_colour(rng)
    kind = int(rng.integers(3))
    if kind == 0:
        left = float(rng.uniform(0.05, 0.85)) * width
        draw.rectangle((left, 0, left + 0.09 * width, height), fill=colour)
        draw.rectangle((left, 0, left + 0.025 * width, height), fill=_shift(colour, 35))
    elif kind == 1:
        top = float(rng.uniform(0.72, 0.88)) * height
        draw.rectangle((0, top, width, height), fill=colour)
        draw.rectangle((0, top, width, top + 0.02 * height), fill=_shift(colour, 40))
    else:
        middle = float(rng.choice((-0.06, 1.06))) * width
        reach = float(rng.uniform(0.2, 0.32)) * width
        top = float(rng.uniform(0.1, 0.3)) * height
        draw.rounded_rectangle((middle - reach, top, middle + reach, height), 0.5 * reach, fill=colour)
        draw.ellipse((middle - 0.5 * reach, top - reach, middle + 0.5 * reach, top + 0.2 * reach), fill=(150, 115, 95))


def develop(canvas: Image.Image, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Return the canvas as this camera would deliver it: its size, sharpness, light, colour cast and grain."""
    scale = rng.uniform(0.93, 1.07, 2)
    width, height = (round(side * float(factor)) for side, factor in zip(camera.size, scale, strict=True))
    image = canvas.resize((width, height), Image.Resampling.BOX)
    # A box blur costs a third of a Gaussian one, which would take half of the time of an image.
    image = image.filter(ImageFilter.BoxBlur(camera.blur_radius * width * float(rng.uniform(0.6, 1.4))))
    gains = np.asarray(camera.gains, dtype=np.float32) * camera.light * rng.uniform(0.95, 1.05)
    slope = np.linspace(-1.0, 1.0, width, dtype=np.float32) * rng.uniform(-0.06, 0.06)
    factors = ((1.0 + slope)[:, np.newaxis] * gains).astype(np.float32)
    pixels = np.asarray(image, dtype=np.float32) * factors
    pixels += rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(camera.noise)
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


def _get_canvas_size(camera: Camera) -> tuple[int, int]:
    width, height = (min(side, limit) for side, limit in zip(camera.size, _LARGEST_DRAWN, strict=True))
    return width * _SUPERSAMPLING, height * _SUPERSAMPLING


@lru_cache(maxsize=2 * MAXIMUM_CAMERAS)
def _make_backdrop(background: str, seed: int, width: int, height: int) -> Image.Image:
    """Return a view larger than the canvas, so that two crops of one camera show different parts of one place."""
    rng = np.random.default_rng(seed)
    full_width, full_height = 3 * width, round(1.15 * height)
    image = Image.new("RGB", (full_width, full_height))
    horizon = round(_GROUND * full_height)
    painters: dict[str, Callable[[ImageDraw.ImageDraw, int, int, int, np.random.Generator], None]] = {
        "street": _paint_street,
        "wall": _paint_wall,
        "grass": _paint_grass,
    }
    painters[background](ImageDraw.Draw(image), full_width, full_height, horizon, rng)
    return _add_texture(image, rng)


def _add_texture(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the image with soft patches, fine grain and a light that falls off towards the bottom."""
    width, height = image.size
    patches = Image.fromarray(rng.normal(0.0, 14.0, (height // 24, width // 24)).astype(np.float32))
    smooth: NDArray[np.float32] = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0.0, 6.0, (height, width)).astype(np.float32)
    fall = np.linspace(10.0, -14.0, height, dtype=np.float32)[:, np.newaxis]
    pixels = np.asarray(image, dtype=np.float32) + (smooth + grain + fall)[:, :, np.newaxis]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _paint_street(draw: ImageDraw.ImageDraw, width: int, height: int, horizon: int, rng: np.random.Generator) -> None:
    facade = _vary((158, 150, 140), rng)
    road = _vary((112, 112, 116), rng)
    draw.rectangle((0, 0, width, horizon), fill=facade)
    pitch = height // 6
    for left in range(pitch // 3, width, pitch):
        for top in range(pitch // 4, horizon - pitch // 2, round(pitch * 1.3)):
            tint = int(rng.integers(-12, 13))
            draw.rectangle((left, top, left + pitch // 2, top + round(0.8 * pitch)), fill=_shift((88, 98, 110), tint))
    draw.rectangle((0, horizon, width, height), fill=road)
    draw.rectangle((0, horizon, width, horizon + height // 40), fill=_shift(road, 45))
    for left in range(0, width, width // 6):
        draw.rectangle((left, height - height // 12, left + width // 14, height - height // 16), fill=(195, 195, 188))


def _paint_wall(draw: ImageDraw.ImageDraw, width: int, height: int, horizon: int, rng: np.random.Generator) -> None:
    mortar = _vary((168, 158, 148), rng)
    brick = _vary((150, 118, 104), rng)
    slab = _vary((166, 164, 158), rng)
    draw.rectangle((0, 0, width, horizon), fill=mortar)
    tall, wide = height // 22, height // 9
    for row, top in enumerate(range(0, horizon - tall // 2, tall)):
        for left in range(-(row % 2) * wide // 2, width, wide):
            box = (left, top, left + wide - 3, min(top + tall - 3, horizon))
            draw.rectangle(box, fill=_shift(brick, int(rng.integers(-12, 13))))
    draw.rectangle((0, horizon, width, height), fill=slab)
    for left in range(0, 2 * width, height // 6):
        draw.line((left, horizon, left - height // 6, height), fill=_shift(slab, -35), width=2)
    draw.line((0, (horizon + height) // 2, width, (horizon + height) // 2), fill=_shift(slab, -35), width=2)


def _paint_grass(draw: ImageDraw.ImageDraw, width: int, height: int, horizon: int, rng: np.random.Generator) -> None:
    hedge = _vary((86, 108, 78), rng)
    lawn = _vary((122, 144, 92), rng)
    draw.rectangle((0, 0, width, horizon), fill=hedge)
    for _ in range(220):
        x, y, radius = rng.uniform((0, 0, height / 60), (width, horizon, height / 18))
        box = (float(x - radius), float(y - radius), float(x + radius), float(y + radius))
        draw.ellipse(box, fill=_shift(hedge, int(rng.integers(-22, 23))))
    for _ in range(5):
        left = int(rng.integers(width))
        draw.rectangle((left, 0, left + height // 22, horizon), fill=(96, 82, 68))
    draw.rectangle((0, horizon, width, height), fill=lawn)
    for _ in range(260):
        left, top = int(rng.integers(width)), int(rng.integers(horizon, height))
        colour = _shift(lawn, int(rng.integers(-28, 29)))
        draw.line((left, top, left + int(rng.integers(-3, 4)), top - height // 60), fill=colour, width=2)


def _draw_clutter(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
    """Draw a street thing behind the person: a pole, a bin, a parked car or a far passer-by."""
    colour = _draw_dull_colour(rng)
    left = float(rng.uniform(-0.1, 0.95)) * width
    base = float(rng.uniform(0.7, 0.85)) * height
    kind = int(rng.integers(4))
    if kind == 0:
        draw.rectangle((left, 0, left + 0.05 * width, base), fill=colour)
    elif kind == 1:
        draw.rectangle((left, base - 0.16 * height, left + 0.2 * width, base), fill=colour)
        draw.rectangle((left, base - 0.18 * height, left + 0.2 * width, base - 0.15 * height), fill=_shift(colour, 30))
    elif kind == 2:
        box = (left - 0.5 * width, base - 0.14 * height, left + 0.4 * width, base)
        draw.rounded_rectangle(box, 0.06 * width, fill=colour)
        draw.ellipse((left, base - 0.05 * height, left + 0.16 * width, base + 0.03 * height), fill=(40, 40, 42))
    else:
        top = base - 0.4 * height
        draw.rounded_rectangle((left, top, left + 0.14 * width, base - 0.15 * height), 0.04 * width, fill=colour)
        draw.rectangle((left + 0.03 * width, base - 0.18 * height, left + 0.11 * width, base), fill=(62, 62, 70))
        head = (left + 0.03 * width, top - 0.055 * height, left + 0.11 * width, top + 0.005 * height)
        draw.ellipse(head, fill=(168, 132, 112))


def _draw_dull_colour(rng: np.random.Generator) -> Colour:
    """Return a greyish colour: a bright object would pass for the person's clothes or bag."""
    red, green, blue = (int(value) for value in rng.integers(-18, 19, 3) + rng.integers(70, 160))
    return red, green, blue


def _vary(colour: Colour, rng: np.random.Generator) -> Colour:
    red, green, blue = (int(value) for value in np.asarray(colour) + rng.integers(-16, 17, 3))
    return red, green, blue


def _shift(colour: Colour, amount: int) -> Colour:
    red, green, blue = (min(255, max(0, channel + amount)) for channel in colour)
    return red, green, blue
