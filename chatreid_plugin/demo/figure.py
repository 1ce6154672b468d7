"""The body of a synthetic pedestrian: pen and pose, then legs, shoes, head, hair and hat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ImageDraw

from .people import Person
from .scene import Colour


Point = tuple[float, float]
Limb = tuple[Point, Point, Point]
Layer = Literal["behind", "front"]

PALETTE: dict[str, Colour] = {
    "black": (34, 34, 38),
    "white": (238, 238, 234),
    "grey": (136, 137, 142),
    "red": (200, 32, 38),
    "orange": (238, 122, 24),
    "yellow": (242, 212, 48),
    "green": (36, 142, 66),
    "blue": (38, 82, 190),
    "purple": (122, 52, 160),
    "pink": (242, 146, 186),
    "brown": (116, 72, 42),
    "beige": (216, 192, 150),
    "blond": (222, 186, 104),
}
_LIGHT_SKIN = (236, 196, 170)
_DARK_SKIN = (104, 68, 48)
_HAIR = {"black": (26, 22, 22), "brown": (96, 58, 32), "grey": (168, 168, 170), "blond": PALETTE["blond"]}
_FOOT = 0.03


@dataclass(frozen=True, slots=True)
class Pen:
    """Draws in body units: x from the body's axis, y down from the crown, 1 is the body's height."""

    draw: ImageDraw.ImageDraw
    axis: float
    top: float
    scale: float
    mirrored: bool = False

    def place(self, point: Point) -> Point:
        """Return the canvas position of a point of the body."""
        x = -point[0] if self.mirrored else point[0]
        return self.axis + x * self.scale, self.top + point[1] * self.scale

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon."""
        self.draw.polygon([self.place(point) for point in points], fill=colour)

    def ellipse(self, centre: Point, radius_x: float, radius_y: float, colour: Colour) -> None:
        """Fill an upright ellipse."""
        x, y = self.place(centre)
        reach_x, reach_y = radius_x * self.scale, radius_y * self.scale
        self.draw.ellipse((x - reach_x, y - reach_y, x + reach_x, y + reach_y), fill=colour)

    def dome(self, centre: Point, radius_x: float, radius_y: float, colour: Colour) -> None:
        """Fill the upper half of an ellipse."""
        x, y = self.place(centre)
        reach_x, reach_y = radius_x * self.scale, radius_y * self.scale
        self.draw.pieslice((x - reach_x, y - reach_y, x + reach_x, y + reach_y), 180, 360, fill=colour)

    def block(self, centre: Point, half_width: float, half_height: float, radius: float, colour: Colour) -> None:
        """Fill a rectangle with rounded corners."""
        x, y = self.place(centre)
        reach_x, reach_y = half_width * self.scale, half_height * self.scale
        box = (x - reach_x, y - reach_y, x + reach_x, y + reach_y)
        self.draw.rounded_rectangle(box, radius * self.scale, fill=colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a line of even width."""
        self.draw.line([self.place(point) for point in points], fill=colour, width=max(1, round(width * self.scale)))

    def limb(self, points: Sequence[Point], start_width: float, end_width: float, colour: Colour) -> None:
        """Fill a chain of rounded segments that tapers from its first to its last point."""
        steps = len(points) - 1
        widths = [start_width + (end_width - start_width) * step / steps for step in range(steps + 1)]
        for index, (start, end) in enumerate(zip(points[:-1], points[1:], strict=True)):
            length = max(1e-6, ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5)
            across = ((start[1] - end[1]) / length / 2, (end[0] - start[0]) / length / 2)
            near, far = widths[index], widths[index + 1]
            corners = [
                (start[0] + across[0] * near, start[1] + across[1] * near),
                (end[0] + across[0] * far, end[1] + across[1] * far),
                (end[0] - across[0] * far, end[1] - across[1] * far),
                (start[0] - across[0] * near, start[1] - across[1] * near),
            ]
            self.polygon(corners, colour)
        for point, width in zip(points, widths, strict=True):
            self.ellipse(point, width / 2, width / 2, colour)


@dataclass(frozen=True, slots=True)
class Pose:
    """Where the joints are, in body units; limbs come far (or left in the image) first, near (or right) second."""

    view: str
    is_side: bool
    shoulder_y: float
    hip_y: float
    half_width: float
    head_centre: Point
    legs: tuple[Limb, Limb]
    arms: tuple[Limb, Limb]


def make_pose(person: Person, view: str, posture: str, rng: np.random.Generator) -> Pose:
    """Return a pose of this person; an elderly person stoops and takes shorter steps."""
    is_side = view in ("left", "right")
    is_elderly = person.attributes["age"] == "elderly"
    is_walking = posture == "walking"
    shoulder_y = person.head_size + 0.05
    hip_y = 1.0 - person.leg_ratio - 0.02
    half_width = (0.078 if is_side else 0.118) * person.shoulder_width
    stride = float(rng.uniform(0.075, 0.115)) * (0.7 if is_elderly else 1.0) * (1 if rng.random() < 0.5 else -1)
    stoop = (0.03 if is_side else 0.0, 0.015) if is_elderly else (0.006 if is_side else 0.0, 0.0)
    sway = float(rng.uniform(-0.012, 0.012))
    swing = stride * (1.3 if is_walking else 0.12)
    if is_side:
        legs = _place_side_legs(hip_y, stride, is_walking)
        arms = (_hang_arm(0.0, shoulder_y, -swing, 1.0), _hang_arm(0.0, shoulder_y, swing, 1.0))
    else:
        legs = _place_front_legs(person, hip_y, is_walking, stride)
        reach = half_width - 0.012
        lift = abs(stride) * 0.3 if is_walking else 0.0
        arms = (
            _hang_arm(-reach, shoulder_y, -0.028, 1.0 - (lift if stride > 0 else 0.0)),
            _hang_arm(reach, shoulder_y, 0.028, 1.0 - (lift if stride < 0 else 0.0)),
        )
    head_centre = (stoop[0] + sway * 0.5, person.head_size / 2 + stoop[1])
    return Pose(view, is_side, shoulder_y, hip_y, half_width, head_centre, legs, arms)


def _place_side_legs(hip_y: float, stride: float, is_walking: bool) -> tuple[Limb, Limb]:
    if not is_walking:
        return _make_leg(-0.012, hip_y, -0.018, 1.0, 0.0), _make_leg(0.012, hip_y, 0.014, 1.0, 0.004)
    # The rear heel is up, so its ankle is higher and its knee comes forward.
    far_foot, near_foot = -stride, stride
    far = _make_leg(0.0, hip_y, far_foot, 1.0 if far_foot > 0 else 0.975, 0.012 if far_foot > 0 else 0.035)
    near = _make_leg(0.0, hip_y, near_foot, 1.0 if near_foot > 0 else 0.975, 0.012 if near_foot > 0 else 0.035)
    return far, near


def _place_front_legs(person: Person, hip_y: float, is_walking: bool, stride: float) -> tuple[Limb, Limb]:
    hip_x = 0.046 * person.shoulder_width
    foot_x = hip_x * (0.72 if is_walking else 1.25)
    raised = 1.0 - abs(stride) * 0.5 if is_walking else 1.0
    left = _make_leg(-hip_x, hip_y, -foot_x, raised if stride > 0 else 1.0, 0.0)
    right = _make_leg(hip_x, hip_y, foot_x, raised if stride < 0 else 1.0, 0.0)
    return left, right


def _make_leg(hip_x: float, hip_y: float, foot_x: float, sole_y: float, knee_shift: float) -> Limb:
    ankle_y = sole_y - _FOOT
    return (hip_x, hip_y), ((hip_x + foot_x) / 2 + knee_shift, (hip_y + ankle_y) / 2), (foot_x, ankle_y)


def _hang_arm(shoulder_x: float, shoulder_y: float, hand_shift: float, length: float) -> Limb:
    elbow = (shoulder_x + 0.45 * hand_shift, shoulder_y + 0.015 + 0.165 * length)
    return (shoulder_x, shoulder_y + 0.022), elbow, (shoulder_x + hand_shift, shoulder_y + 0.335 * length)


def shade(colour: Colour, factor: float) -> Colour:
    """Return the colour darker (factor below 1) or lighter."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


def choose_trim(colour: Colour) -> Colour:
    """Return a colour for seams and folds that shows on the given one."""
    if sum(colour) < 180:
        return colour[0] + 46, colour[1] + 46, colour[2] + 46
    return shade(colour, 0.7)


def get_skin_colour(person: Person) -> Colour:
    """Return the skin colour."""
    tone = person.skin_tone
    pairs = zip(_LIGHT_SKIN, _DARK_SKIN, strict=True)
    red, green, blue = (round(light + (dark - light) * tone) for light, dark in pairs)
    return red, green, blue


def get_cloth_colour(person: Person, name: str) -> Colour:
    """Return a palette colour as this person's clothes have it."""
    return shade(PALETTE[name], 1.0 + 0.1 * person.cloth_jitter)


def draw_shadow(pen: Pen) -> None:
    """Draw the dark patch on the ground, which ties the figure to the scene."""
    pen.ellipse((0.02, 0.995), 0.15, 0.022, (72, 72, 72))


def draw_leg(pen: Pen, pose: Pose, person: Person, index: int) -> None:
    """Draw one leg with its shoe; in a side view the far leg (0) is darker."""
    limb = pose.legs[index]
    dim = 0.8 if pose.is_side and index == 0 else 1.0 if index == 1 else 0.94
    kind = person.attributes["lower_type"]
    cloth = shade(get_cloth_colour(person, person.attributes["lower_colour"]), dim)
    skin = shade(get_skin_colour(person), dim)
    broad = person.shoulder_width
    if kind in ("shorts", "skirt"):
        pen.limb(limb, 0.07 * broad, 0.042 * broad, skin)
        if kind == "shorts":
            hip, knee, _ = limb
            end = (hip[0] + 0.9 * (knee[0] - hip[0]), hip[1] + 0.9 * (knee[1] - hip[1]))
            pen.limb((hip, end), 0.095 * broad, 0.098 * broad, cloth)
    elif kind == "trousers":
        pen.limb(limb, 0.09 * broad, 0.074 * broad, cloth)
        pen.line(limb, 0.006, choose_trim(cloth))
    else:
        pen.limb(limb, 0.088 * broad, 0.056 * broad, cloth)
        x, y = limb[2]
        pen.block((x, y - 0.02), 0.036 * broad, 0.014, 0.004, _lighten(cloth))
        pen.line(((limb[0][0] + 0.03, limb[0][1] + 0.05), (limb[1][0] + 0.024, limb[1][1])), 0.006, _lighten(cloth))
    _draw_shoe(pen, pose, person, limb[2], dim)


def _lighten(colour: Colour) -> Colour:
    red, green, blue = (round(channel + 0.4 * (235 - channel)) for channel in colour)
    return red, green, blue


def _draw_shoe(pen: Pen, pose: Pose, person: Person, ankle: Point, dim: float) -> None:
    name, kind = person.attributes["shoes"].split(" ")
    colour = shade(PALETTE[name], dim)
    sole = shade((232, 232, 228), dim) if kind == "sneakers" else shade(colour, 0.6)
    if name == "white":
        sole = shade((150, 150, 155), dim)
    x, y = ankle
    base = y + _FOOT
    forward = 0.026 if pose.is_side else 0.0
    length = 0.058 if pose.is_side else 0.04
    pen.block((x + forward, base - 0.018), length, 0.022, 0.018, colour)
    pen.block((x + forward, base - 0.001), length, 0.006, 0.004, sole)
    if kind == "boots":
        pen.block((x, base - 0.045), 0.036, 0.045, 0.012, colour)


def draw_head(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw neck, head and face."""
    skin = get_skin_colour(person)
    size = person.head_size
    x, y = pose.head_centre
    pen.limb(((x * 0.5, pose.shoulder_y - 0.012), (x, y)), 0.3 * size + 0.014, 0.4 * size, shade(skin, 0.86))
    pen.ellipse((x, y), 0.38 * size, 0.5 * size, skin)
    dark = (48, 36, 34)
    if pose.view == "front":
        for side in (-1, 1):
            pen.ellipse((x + side * 0.15 * size, y + 0.02 * size), 0.045 * size, 0.045 * size, dark)
        pen.line(((x - 0.1 * size, y + 0.27 * size), (x + 0.1 * size, y + 0.27 * size)), 0.05 * size, (150, 70, 70))
    elif pose.is_side:
        nose = (x + 0.44 * size, y + 0.12 * size)
        pen.polygon(((x + 0.33 * size, y - 0.05 * size), nose, (x + 0.32 * size, y + 0.16 * size)), skin)
        pen.ellipse((x + 0.24 * size, y), 0.04 * size, 0.045 * size, dark)


def draw_hair(pen: Pen, pose: Pose, person: Person, layer: Layer) -> None:
    """Draw the hair; the layer ``behind`` is what hangs behind the shoulders in a front view."""
    length, name, *_ = person.attributes["hair"].split(" ")
    if name not in _HAIR:
        return
    colour = shade(_HAIR[name], 1.0 + 0.16 * person.hair_jitter)
    size = person.head_size
    x, y = pose.head_centre
    is_long = length == "long"
    if layer == "behind":
        if is_long and pose.view == "front":
            pen.block((x, y + 0.36 * size), 0.54 * size, 0.86 * size, 0.3 * size, colour)
        return
    if pose.view == "front":
        pen.dome((x, y - 0.1 * size), 0.42 * size, 0.45 * size, colour)
    elif pose.view == "back":
        pen.ellipse((x, y - 0.06 * size), 0.42 * size, 0.5 * size, colour)
    else:
        pen.dome((x, y - 0.1 * size), 0.4 * size, 0.46 * size, colour)
        pen.ellipse((x - 0.17 * size, y - 0.06 * size), 0.26 * size, 0.4 * size, colour)
    if is_long and pose.view == "back":
        pen.block((x, y + 0.5 * size), 0.47 * size, 0.95 * size, 0.3 * size, colour)
        pen.line(((x, y), (x, y + 1.3 * size)), 0.04 * size, choose_trim(colour))
    elif is_long and pose.is_side:
        pen.limb(((x - 0.2 * size, y), (x - 0.32 * size, y + 1.1 * size)), 0.5 * size, 0.42 * size, colour)


def draw_hat(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw a cap with a peak towards the front, or a hat with a brim all round."""
    name, kind = person.attributes["hat"].split(" ")
    if name == "no":
        return
    colour = PALETTE[name]
    size = person.head_size
    x, y = pose.head_centre
    band = y - 0.14 * size
    pen.dome((x, band), 0.46 * size, 0.5 * size, colour)
    if kind == "hat":
        pen.ellipse((x, band), 0.72 * size, 0.1 * size, shade(colour, 0.92))
        pen.line(
            ((x - 0.44 * size, band - 0.1 * size), (x + 0.44 * size, band - 0.1 * size)), 0.09 * size, (70, 70, 78)
        )
    elif pose.view == "front":
        pen.ellipse((x, band), 0.47 * size, 0.12 * size, choose_trim(colour))
    elif pose.is_side:
        pen.block((x + 0.46 * size, band - 0.01 * size), 0.28 * size, 0.05 * size, 0.03 * size, choose_trim(colour))
    else:
        pen.dome((x, band), 0.13 * size, 0.13 * size, choose_trim(colour))
