"""A synthetic pedestrian: pen and pose, then the body from the ground up, its clothes and its bag."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

from .people import Person


Colour = tuple[int, int, int]
Point = tuple[float, float]
Limb = tuple[Point, Point, Point]

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

    def _enclose(self, centre: Point, half_width: float, half_height: float) -> tuple[float, float, float, float]:
        x, y = self.place(centre)
        reach_x, reach_y = half_width * self.scale, half_height * self.scale
        return x - reach_x, y - reach_y, x + reach_x, y + reach_y

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon."""
        self.draw.polygon([self.place(point) for point in points], fill=colour)

    def ellipse(self, centre: Point, radius_x: float, radius_y: float, colour: Colour) -> None:
        """Fill an upright ellipse."""
        self.draw.ellipse(self._enclose(centre, radius_x, radius_y), fill=colour)

    def dome(self, centre: Point, radius_x: float, radius_y: float, colour: Colour) -> None:
        """Fill the upper half of an ellipse."""
        self.draw.pieslice(self._enclose(centre, radius_x, radius_y), 180, 360, fill=colour)

    def block(self, centre: Point, half_width: float, half_height: float, radius: float, colour: Colour) -> None:
        """Fill a rectangle with rounded corners."""
        self.draw.rounded_rectangle(self._enclose(centre, half_width, half_height), radius * self.scale, fill=colour)

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
            ends = ((start, near), (end, far), (end, -far), (start, -near))
            self.polygon([(at[0] + across[0] * width, at[1] + across[1] * width) for at, width in ends], colour)
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
    front, rear = (1.0, 0.012), (0.975, 0.035)
    far, near = (_make_leg(0.0, hip_y, foot, *(front if foot > 0 else rear)) for foot in (-stride, stride))
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


def _go(start: Point, end: Point, share: float) -> Point:
    """Return the point that lies this share of the way from start to end."""
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _shade(colour: Colour, factor: float) -> Colour:
    """Return the colour darker (factor below 1) or lighter."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


def _choose_trim(colour: Colour) -> Colour:
    """Return a colour for seams and folds that shows on the given one."""
    if sum(colour) < 180:
        return colour[0] + 46, colour[1] + 46, colour[2] + 46
    return _shade(colour, 0.7)


def _get_skin_colour(person: Person) -> Colour:
    """Return the skin colour."""
    tone = person.skin_tone
    pairs = zip(_LIGHT_SKIN, _DARK_SKIN, strict=True)
    red, green, blue = (round(light + (dark - light) * tone) for light, dark in pairs)
    return red, green, blue


def _get_cloth_colour(person: Person, name: str) -> Colour:
    """Return a palette colour as this person's clothes have it."""
    return _shade(PALETTE[name], 1.0 + 0.1 * person.cloth_jitter)


def _draw_leg(pen: Pen, pose: Pose, person: Person, index: int) -> None:
    """Draw one leg with its shoe; in a side view the far leg (0) is darker."""
    limb = pose.legs[index]
    dim = 0.8 if pose.is_side and index == 0 else 1.0 if index == 1 else 0.94
    kind = person.attributes["lower_type"]
    cloth = _shade(_get_cloth_colour(person, person.attributes["lower_colour"]), dim)
    skin = _shade(_get_skin_colour(person), dim)
    broad = person.shoulder_width
    if kind in ("shorts", "skirt"):
        pen.limb(limb, 0.07 * broad, 0.042 * broad, skin)
        if kind == "shorts":
            pen.limb((limb[0], _go(limb[0], limb[1], 0.9)), 0.095 * broad, 0.098 * broad, cloth)
    elif kind == "trousers":
        pen.limb(limb, 0.09 * broad, 0.074 * broad, cloth)
        pen.line(limb, 0.006, _choose_trim(cloth))
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
    colour = _shade(PALETTE[name], dim)
    sole = _shade((232, 232, 228), dim) if kind == "sneakers" else _shade(colour, 0.6)
    if name == "white":
        sole = _shade((150, 150, 155), dim)
    x, y = ankle
    base = y + _FOOT
    forward = 0.026 if pose.is_side else 0.0
    length = 0.058 if pose.is_side else 0.04
    pen.block((x + forward, base - 0.018), length, 0.022, 0.018, colour)
    pen.block((x + forward, base - 0.001), length, 0.006, 0.004, sole)
    if kind == "boots":
        pen.block((x, base - 0.045), 0.036, 0.045, 0.012, colour)


def _draw_head(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw neck, head and face."""
    skin = _get_skin_colour(person)
    size = person.head_size
    x, y = pose.head_centre
    pen.limb(((x * 0.5, pose.shoulder_y - 0.012), (x, y)), 0.3 * size + 0.014, 0.4 * size, _shade(skin, 0.86))
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


def _draw_hair(pen: Pen, pose: Pose, person: Person, is_behind: bool) -> None:
    """Draw the hair, or what of it hangs behind the shoulders in a front view."""
    length, name, *_ = person.attributes["hair"].split(" ")
    if name not in _HAIR:
        return
    colour = _shade(_HAIR[name], 1.0 + 0.16 * person.hair_jitter)
    size = person.head_size
    x, y = pose.head_centre
    is_long = length == "long"
    if is_behind:
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
        pen.line(((x, y), (x, y + 1.3 * size)), 0.04 * size, _choose_trim(colour))
    elif is_long and pose.is_side:
        pen.limb(((x - 0.2 * size, y), (x - 0.32 * size, y + 1.1 * size)), 0.5 * size, 0.42 * size, colour)


def _draw_hat(pen: Pen, pose: Pose, person: Person) -> None:
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
        pen.ellipse((x, band), 0.72 * size, 0.1 * size, _shade(colour, 0.92))
        ribbon = band - 0.1 * size
        pen.line(((x - 0.44 * size, ribbon), (x + 0.44 * size, ribbon)), 0.09 * size, (70, 70, 78))
    elif pose.view == "front":
        pen.ellipse((x, band), 0.47 * size, 0.12 * size, _choose_trim(colour))
    elif pose.is_side:
        pen.block((x + 0.46 * size, band - 0.01 * size), 0.28 * size, 0.05 * size, 0.03 * size, _choose_trim(colour))
    else:
        pen.dome((x, band), 0.13 * size, 0.13 * size, _choose_trim(colour))


@dataclass(frozen=True, slots=True)
class Cut:
    """How a type of garment is cut; lengths in body units."""

    hem: float  # lower edge, below the hips
    flare: float  # how much wider the hem is than a straight cut
    puff: float  # factor on the width of body and sleeves
    has_long_sleeves: bool = True  # else to the middle of the upper arm


CUTS = {
    "t-shirt": Cut(hem=0.015, flare=0.0, puff=0.98, has_long_sleeves=False),
    "shirt": Cut(hem=0.035, flare=0.004, puff=0.98),
    "sweater": Cut(hem=0.02, flare=-0.004, puff=1.04),
    "hoodie": Cut(hem=0.025, flare=-0.002, puff=1.1),
    "jacket": Cut(hem=0.03, flare=0.002, puff=1.1),
    "coat": Cut(hem=0.14, flare=0.03, puff=1.1),
}


@dataclass(frozen=True, slots=True)
class Panel:
    """A trapezoid of cloth, symmetric about the body's axis, in body units."""

    top: float
    bottom: float
    top_half: float
    bottom_half: float

    def half_width(self, y: float) -> float:
        """Return the half width at this height."""
        return self.top_half + (self.bottom_half - self.top_half) * (y - self.top) / (self.bottom - self.top)

    def cut(self, left: float, right: float, top: float, bottom: float) -> list[Point]:
        """Return the corners of a part: left and right as shares of the half width, top and bottom as heights."""
        upper, lower = self.half_width(top), self.half_width(bottom)
        return [(left * upper, top), (right * upper, top), (right * lower, bottom), (left * lower, bottom)]


def _draw_pelvis(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw what joins the legs: the seat of the trousers, or the skirt."""
    colour = _get_cloth_colour(person, person.attributes["lower_colour"])
    half = pose.half_width * (0.9 if pose.is_side else 0.78)
    if person.attributes["lower_type"] != "skirt":
        pen.block((0.0, pose.hip_y - 0.01), half, 0.05, 0.01, colour)
        return
    panel = Panel(pose.hip_y - 0.06, pose.hip_y + 0.23, half * 0.95, half + (0.05 if pose.is_side else 0.06))
    pen.polygon(panel.cut(-1, 1, panel.top, panel.bottom), colour)
    for share in (-0.5, 0.0, 0.5):
        pen.polygon(panel.cut(share, share + 0.07, pose.hip_y + 0.03, panel.bottom), _choose_trim(colour))


def _draw_upper_body(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw the trunk of the upper garment with its pattern and the details of its type."""
    kind = person.attributes["upper_type"]
    cut = CUTS[kind]
    colour = _get_cloth_colour(person, person.attributes["upper_colour"])
    waist = 0.86 if person.attributes["gender"] == "male" else 0.78
    top, top_half = pose.shoulder_y + 0.005, pose.half_width * cut.puff
    straight = top_half if pose.is_side else top_half * waist
    panel = Panel(top, pose.hip_y + cut.hem, top_half, straight + cut.flare)
    slope = pose.shoulder_y - 0.026
    pen.polygon(((-0.036, slope), (0.036, slope), (top_half, top), (-top_half, top)), colour)
    pen.polygon(panel.cut(-1, 1, panel.top, panel.bottom), colour)
    pen.polygon(panel.cut(0.55, 1, panel.top, panel.bottom), _shade(colour, 0.88))
    _draw_pattern(pen, pose, person, panel)
    if kind in ("shirt", "jacket", "coat"):
        _draw_opening(pen, pose, panel, kind, colour)
    elif kind == "hoodie":
        _draw_hood(pen, pose, person, panel, colour)
    else:
        pen.polygon(panel.cut(-1, 1, panel.bottom - 0.014, panel.bottom), _choose_trim(colour))
        pen.ellipse((pose.head_centre[0] * 0.5, slope), 0.04, 0.014, _choose_trim(colour))


def _draw_arm(pen: Pen, pose: Pose, person: Person, index: int) -> None:
    """Draw one arm: hand, bare part, sleeve with its pattern; in a side view the far arm (0) is darker."""
    limb = pose.arms[index]
    cut = CUTS[person.attributes["upper_type"]]
    dim = 0.78 if pose.is_side and index == 0 else 0.93
    cloth = _shade(_get_cloth_colour(person, person.attributes["upper_colour"]), dim)
    skin = _shade(_get_skin_colour(person), dim)
    broad = person.shoulder_width
    pen.limb(limb, 0.05 * broad, 0.036 * broad, skin)
    pen.ellipse(limb[2], 0.023, 0.027, skin)
    shoulder, elbow, hand = limb
    if cut.has_long_sleeves:
        cuff = _go(elbow, hand, 0.88)
        pen.limb((shoulder, elbow, cuff), 0.066 * broad * cut.puff, 0.052 * broad * cut.puff, cloth)
        _draw_bands(pen, person, (shoulder, elbow, cuff), 0.05 * broad)
        if person.attributes["upper_type"] in ("sweater", "hoodie"):
            pen.ellipse(cuff, 0.026 * broad, 0.014, _choose_trim(cloth))
    else:
        end = _go(shoulder, elbow, 0.62)
        pen.limb((shoulder, end), 0.066 * broad, 0.068 * broad, cloth)
        _draw_bands(pen, person, (shoulder, end), 0.058 * broad)
    if pose.is_side and index == 1 and person.attributes["upper_pattern"] == "logo":
        ink = _choose_pattern_colour(person.attributes["upper_colour"])
        pen.ellipse((shoulder[0] + 0.2 * (elbow[0] - shoulder[0]), shoulder[1] + 0.05), 0.026, 0.022, ink)


def _choose_pattern_colour(colour_name: str) -> Colour:
    """Return white on dark or strong colours and navy on light ones."""
    return (40, 46, 92) if colour_name in ("white", "yellow", "pink", "grey", "orange") else (234, 234, 230)


def _draw_pattern(pen: Pen, pose: Pose, person: Person, panel: Panel) -> None:
    pattern = person.attributes["upper_pattern"]
    ink = _choose_pattern_colour(person.attributes["upper_colour"])
    if pattern == "logo" and not pose.is_side:  # in a side view the sleeve bears it
        middle = panel.top + 0.095
        pen.ellipse((0.0, middle), 0.042, 0.036, ink)
        pen.block((0.0, middle + 0.063), 0.05, 0.012, 0.0, ink)
    if pattern in ("logo", "plain"):
        return
    is_striped = pattern == "striped"
    step, height = (0.05, 0.019) if is_striped else (0.062, 0.01)
    y = panel.top + 0.03
    while y + height < panel.bottom:
        pen.polygon(panel.cut(-1, 1, y, y + height), ink)
        y += step
    if not is_striped:
        thin = 0.011 / panel.top_half
        count = 2 if pose.is_side else 4
        for position in range(1, count + 1):
            share = -1 + 2 * position / (count + 1)
            pen.polygon(panel.cut(share - thin / 2, share + thin / 2, panel.top, panel.bottom), ink)


def _draw_bands(pen: Pen, person: Person, chain: tuple[Point, Point] | Limb, width: float) -> None:
    """Draw the stripes of a patterned sleeve."""
    if person.attributes["upper_pattern"] not in ("striped", "checked"):
        return
    ink = _shade(_choose_pattern_colour(person.attributes["upper_colour"]), 0.93)
    thick = 0.018 if person.attributes["upper_pattern"] == "striped" else 0.01
    for start, end in zip(chain[:-1], chain[1:], strict=True):
        for share in (0.3, 0.62, 0.92):
            pen.block(_go(start, end, share), width / 2, thick / 2, 0.0, ink)


def _draw_opening(pen: Pen, pose: Pose, panel: Panel, kind: str, colour: Colour) -> None:
    """Draw collar and front closure: buttons of a shirt, zip of a jacket, lapels and belt of a coat."""
    trim = _choose_trim(colour)
    collar_y = pose.shoulder_y - 0.022
    pen.block((pose.head_centre[0] * 0.5, collar_y), 0.045, 0.013, 0.008, trim)
    if kind == "coat":
        belt = pose.hip_y - 0.07
        pen.polygon(panel.cut(-1, 1, belt, belt + 0.022), trim)
    if kind == "jacket":
        pen.polygon(panel.cut(-1, 1, panel.bottom - 0.025, panel.bottom), trim)
    if pose.view != "front":
        return
    if kind == "shirt":
        pen.polygon(((-0.04, collar_y - 0.01), (0.0, collar_y + 0.035), (0.04, collar_y - 0.01)), trim)
        pen.line(((0.0, panel.top), (0.0, panel.bottom)), 0.007, trim)
        return
    deep = 0.1 if kind == "coat" else 0.06
    pen.polygon(((-0.036, collar_y), (0.036, collar_y), (0.0, collar_y + deep)), (222, 222, 218))
    for side in (-1, 1):
        pen.line(((side * 0.04, collar_y), (0.0, collar_y + deep)), 0.018, trim)
    pen.line(((0.0, collar_y + deep), (0.0, panel.bottom)), 0.012, trim)


def _draw_hood(pen: Pen, pose: Pose, person: Person, panel: Panel, colour: Colour) -> None:
    """Draw the hood that lies on the shoulders, the cords and the pouch of a hoodie."""
    trim = _choose_trim(colour)
    neck = pose.shoulder_y - 0.012
    size = person.head_size
    if pose.view == "back":
        pen.ellipse((0.0, neck + 0.035), 0.074, 0.058, trim)
        pen.ellipse((0.0, neck + 0.024), 0.062, 0.044, colour)
    elif pose.is_side:
        pen.ellipse((-0.045, neck + 0.012), 0.05, 0.042, trim)
    else:
        pen.ellipse((0.0, neck), 0.46 * size + 0.012, 0.03, trim)
        for side in (-1, 1):
            pen.line(((side * 0.022, neck + 0.02), (side * 0.024, neck + 0.09)), 0.008, (225, 225, 222))
        pen.polygon(panel.cut(-0.6, 0.6, panel.bottom - 0.085, panel.bottom - 0.025), trim)
    pen.polygon(panel.cut(-1, 1, panel.bottom - 0.016, panel.bottom), trim)


def _draw_backpack(pen: Pen, pose: Pose, person: Person, is_behind: bool) -> None:
    """Draw a backpack: its edges behind the body and straps before it, or the whole pack on the back."""
    name, *words = person.attributes["bag"].split(" ")
    if words != ["backpack"]:
        return
    colour = PALETTE[name]
    trim = _choose_trim(colour)
    middle = pose.shoulder_y + 0.125
    if pose.view == "back" and not is_behind:
        pen.block((0.0, middle), 0.098, 0.13, 0.04, trim)
        pen.block((0.0, middle), 0.09, 0.122, 0.036, colour)
        pen.block((0.0, middle + 0.06), 0.066, 0.044, 0.016, trim)
        pen.line(((-0.07, middle - 0.05), (0.07, middle - 0.05)), 0.008, trim)
    elif pose.is_side and is_behind:
        pen.block((-pose.half_width - 0.045, middle), 0.072, 0.13, 0.04, trim)
        pen.block((-pose.half_width - 0.045, middle), 0.064, 0.122, 0.036, colour)
        pen.block((-pose.half_width - 0.088, middle + 0.05), 0.024, 0.05, 0.016, trim)
    elif pose.is_side:
        pen.line(((-0.05, pose.shoulder_y - 0.01), (0.03, middle - 0.06), (-0.06, middle + 0.06)), 0.026, trim)
    elif pose.view == "front" and is_behind:
        pen.block((0.0, middle), pose.half_width + 0.04, 0.12, 0.04, colour)
    elif pose.view == "front":
        for side in (-1, 1):
            strap = ((side * 0.062, pose.shoulder_y - 0.014), (side * 0.07, middle + 0.04))
            pen.line(strap, 0.034, trim)
            pen.line(strap, 0.026, colour)


def _draw_side_bag(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw a handbag in the right hand or a shoulder bag at the right hip."""
    kind = person.attributes["bag"]
    side = 1.0 if pose.view == "back" else -1.0
    if kind == "brown handbag":
        x, y = pose.arms[1 if pose.view in ("back", "right") else 0][2]
        colour = PALETTE["brown"]
        pen.line(((x - 0.03, y + 0.06), (x, y), (x + 0.03, y + 0.06)), 0.01, _choose_trim(colour))
        pen.block((x, y + 0.095), 0.064, 0.046, 0.014, _shade(colour, 0.72))
        pen.block((x, y + 0.092), 0.056, 0.038, 0.012, (142, 88, 48))
    elif kind == "blue shoulder bag":
        colour = PALETTE["blue"]
        # On the far side of the body only its front edge peeps out.
        x = {"left": 0.07, "right": 0.0}.get(pose.view, side * pose.half_width * 0.95)
        start = (0.0, pose.shoulder_y - 0.015) if pose.is_side else (-side * 0.06, pose.shoulder_y - 0.015)
        y = pose.hip_y + 0.03
        pen.line((start, (x, y)), 0.02, _shade(colour, 0.75))
        pen.block((x, y + 0.01), 0.066, 0.052, 0.014, _shade(colour, 0.7))
        pen.block((x, y + 0.012), 0.058, 0.044, 0.012, colour)


def draw_figure(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw a person with their shadow, from the farthest part to the nearest."""
    # The dark patch on the ground ties the figure to the scene.
    pen.ellipse((0.02, 0.995), 0.15, 0.022, (72, 72, 72))
    if pose.is_side:
        _draw_arm(pen, pose, person, 0)
        if pose.view == "left":
            _draw_side_bag(pen, pose, person)
    else:
        _draw_hair(pen, pose, person, is_behind=True)
        _draw_backpack(pen, pose, person, is_behind=True)
    for index in (0, 1):
        _draw_leg(pen, pose, person, index)
    _draw_pelvis(pen, pose, person)
    if pose.is_side:
        _draw_backpack(pen, pose, person, is_behind=True)
    else:
        for index in (0, 1):
            _draw_arm(pen, pose, person, index)
    _draw_upper_body(pen, pose, person)
    _draw_head(pen, pose, person)
    _draw_hair(pen, pose, person, is_behind=False)
    _draw_hat(pen, pose, person)
    _draw_backpack(pen, pose, person, is_behind=False)
    if pose.is_side:
        _draw_arm(pen, pose, person, 1)
    if pose.view != "left":
        _draw_side_bag(pen, pose, person)
