"""Photographs of synthetic pedestrians: one person, one camera, one random draw, one image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .clothing import draw_arm, draw_backpack, draw_pelvis, draw_side_bag, draw_upper_body
from .figure import Pen, Pose, draw_hair, draw_hat, draw_head, draw_leg, draw_shadow, make_pose
from .people import Person
from .scene import VIEWS, Camera, develop, draw_occluder, make_cameras, make_canvas


__all__ = ["Camera", "make_cameras", "render_background", "render_partial", "render_person"]

_POSTURES = ("walking", "standing")
_WALKING_SHARE = 0.65


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
    draw_shadow(pen)
    if pose.is_side:
        _draw_side(pen, pose, person)
    else:
        _draw_frontal(pen, pose, person)
    return posture


def _draw_frontal(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw the parts of a front or back view from the farthest to the nearest."""
    draw_hair(pen, pose, person, "behind")
    draw_backpack(pen, pose, person, is_behind=True)
    for index in (0, 1):
        draw_leg(pen, pose, person, index)
    draw_pelvis(pen, pose, person)
    for index in (0, 1):
        draw_arm(pen, pose, person, index)
    draw_upper_body(pen, pose, person)
    draw_head(pen, pose, person)
    draw_hair(pen, pose, person, "front")
    draw_hat(pen, pose, person)
    draw_backpack(pen, pose, person, is_behind=False)
    draw_side_bag(pen, pose, person)


def _draw_side(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw the parts of a side view from the farthest to the nearest."""
    is_bag_near = pose.view == "right"
    draw_arm(pen, pose, person, 0)
    if not is_bag_near:
        draw_side_bag(pen, pose, person)
    draw_leg(pen, pose, person, 0)
    draw_leg(pen, pose, person, 1)
    draw_pelvis(pen, pose, person)
    draw_backpack(pen, pose, person, is_behind=True)
    draw_upper_body(pen, pose, person)
    draw_head(pen, pose, person)
    draw_hair(pen, pose, person, "front")
    draw_hat(pen, pose, person)
    draw_backpack(pen, pose, person, is_behind=False)
    draw_arm(pen, pose, person, 1)
    if is_bag_near:
        draw_side_bag(pen, pose, person)


def _choose(names: Sequence[str], weights: Sequence[float], rng: np.random.Generator) -> str:
    return names[int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))]
