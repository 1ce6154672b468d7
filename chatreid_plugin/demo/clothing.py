"""The upper garment, its pattern and the bag of a synthetic pedestrian."""

from dataclasses import dataclass

from .figure import (
    PALETTE,
    Limb,
    Pen,
    Point,
    Pose,
    choose_trim,
    get_cloth_colour,
    get_skin_colour,
    shade,
)
from .people import Person
from .scene import Colour


@dataclass(frozen=True, slots=True)
class Cut:
    """How a type of garment is cut.

    Attributes:
        hem: lower edge below the hips, body units.
        flare: how much wider the hem is than a straight cut, body units.
        puff: factor on the width of body and sleeves.
        has_long_sleeves: down to the hand, or to the middle of the upper arm.
    """

    hem: float
    flare: float
    puff: float
    has_long_sleeves: bool


CUTS: dict[str, Cut] = {
    "t-shirt": Cut(hem=0.015, flare=0.0, puff=0.98, has_long_sleeves=False),
    "shirt": Cut(hem=0.035, flare=0.004, puff=0.98, has_long_sleeves=True),
    "sweater": Cut(hem=0.02, flare=-0.004, puff=1.04, has_long_sleeves=True),
    "hoodie": Cut(hem=0.025, flare=-0.002, puff=1.1, has_long_sleeves=True),
    "jacket": Cut(hem=0.03, flare=0.002, puff=1.1, has_long_sleeves=True),
    "coat": Cut(hem=0.14, flare=0.03, puff=1.1, has_long_sleeves=True),
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


def draw_pelvis(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw what joins the legs: the seat of the trousers, or the skirt."""
    colour = get_cloth_colour(person, person.attributes["lower_colour"])
    half = pose.half_width * (0.9 if pose.is_side else 0.78)
    if person.attributes["lower_type"] != "skirt":
        pen.block((0.0, pose.hip_y - 0.01), half, 0.05, 0.01, colour)
        return
    panel = Panel(pose.hip_y - 0.06, pose.hip_y + 0.23, half * 0.95, half + (0.05 if pose.is_side else 0.06))
    pen.polygon(panel.cut(-1, 1, panel.top, panel.bottom), colour)
    for share in (-0.5, 0.0, 0.5):
        pen.polygon(panel.cut(share, share + 0.07, pose.hip_y + 0.03, panel.bottom), choose_trim(colour))


def draw_upper_body(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw the trunk of the upper garment with its pattern and the details of its type."""
    kind = person.attributes["upper_type"]
    cut = CUTS[kind]
    colour = get_cloth_colour(person, person.attributes["upper_colour"])
    waist = 0.86 if person.attributes["gender"] == "male" else 0.78
    top, top_half = pose.shoulder_y + 0.005, pose.half_width * cut.puff
    straight = top_half if pose.is_side else top_half * waist
    panel = Panel(top, pose.hip_y + cut.hem, top_half, straight + cut.flare)
    slope = pose.shoulder_y - 0.026
    pen.polygon(((-0.036, slope), (0.036, slope), (top_half, top), (-top_half, top)), colour)
    pen.polygon(panel.cut(-1, 1, panel.top, panel.bottom), colour)
    pen.polygon(panel.cut(0.55, 1, panel.top, panel.bottom), shade(colour, 0.88))
    _draw_pattern(pen, pose, person, panel)
    if kind in ("shirt", "jacket", "coat"):
        _draw_opening(pen, pose, panel, kind, colour)
    elif kind == "hoodie":
        _draw_hood(pen, pose, person, panel, colour)
    else:
        pen.polygon(panel.cut(-1, 1, panel.bottom - 0.014, panel.bottom), choose_trim(colour))
        pen.ellipse((pose.head_centre[0] * 0.5, slope), 0.04, 0.014, choose_trim(colour))


def draw_arm(pen: Pen, pose: Pose, person: Person, index: int) -> None:
    """Draw one arm: hand, bare part, sleeve with its pattern; in a side view the far arm (0) is darker."""
    limb = pose.arms[index]
    cut = CUTS[person.attributes["upper_type"]]
    dim = 0.78 if pose.is_side and index == 0 else 0.93
    cloth = shade(get_cloth_colour(person, person.attributes["upper_colour"]), dim)
    skin = shade(get_skin_colour(person), dim)
    broad = person.shoulder_width
    pen.limb(limb, 0.05 * broad, 0.036 * broad, skin)
    pen.ellipse(limb[2], 0.023, 0.027, skin)
    shoulder, elbow, hand = limb
    if cut.has_long_sleeves:
        cuff = (elbow[0] + 0.88 * (hand[0] - elbow[0]), elbow[1] + 0.88 * (hand[1] - elbow[1]))
        pen.limb((shoulder, elbow, cuff), 0.066 * broad * cut.puff, 0.052 * broad * cut.puff, cloth)
        _draw_bands(pen, person, (shoulder, elbow, cuff), 0.05 * broad)
        if person.attributes["upper_type"] in ("sweater", "hoodie"):
            pen.ellipse(cuff, 0.026 * broad, 0.014, choose_trim(cloth))
    else:
        end = (shoulder[0] + 0.62 * (elbow[0] - shoulder[0]), shoulder[1] + 0.62 * (elbow[1] - shoulder[1]))
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
    if pattern == "logo":
        _draw_logo(pen, pose, panel, ink)
        return
    if pattern == "plain":
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


def _draw_logo(pen: Pen, pose: Pose, panel: Panel, ink: Colour) -> None:
    """Draw a disc with a bar below on chest or back; in a side view the sleeve bears it."""
    if pose.is_side:
        return
    middle = panel.top + 0.095
    pen.ellipse((0.0, middle), 0.042, 0.036, ink)
    pen.block((0.0, middle + 0.063), 0.05, 0.012, 0.0, ink)


def _draw_bands(pen: Pen, person: Person, chain: tuple[Point, Point] | Limb, width: float) -> None:
    """Draw the stripes of a patterned sleeve."""
    if person.attributes["upper_pattern"] not in ("striped", "checked"):
        return
    ink = shade(_choose_pattern_colour(person.attributes["upper_colour"]), 0.93)
    thick = 0.018 if person.attributes["upper_pattern"] == "striped" else 0.01
    for start, end in zip(chain[:-1], chain[1:], strict=True):
        for share in (0.3, 0.62, 0.92):
            x, y = start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])
            pen.block((x, y), width / 2, thick / 2, 0.0, ink)


def _draw_opening(pen: Pen, pose: Pose, panel: Panel, kind: str, colour: Colour) -> None:
    """Draw collar and front closure: buttons of a shirt, zip of a jacket, lapels and belt of a coat."""
    trim = choose_trim(colour)
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
    trim = choose_trim(colour)
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


def draw_backpack(pen: Pen, pose: Pose, person: Person, is_behind: bool) -> None:
    """Draw a backpack: its edges behind the body and straps before it, or the whole pack on the back."""
    name, *words = person.attributes["bag"].split(" ")
    if words != ["backpack"]:
        return
    colour = PALETTE[name]
    trim = choose_trim(colour)
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


def draw_side_bag(pen: Pen, pose: Pose, person: Person) -> None:
    """Draw a handbag in the right hand or a shoulder bag at the right hip."""
    kind = person.attributes["bag"]
    side = 1.0 if pose.view == "back" else -1.0
    if kind == "brown handbag":
        x, y = pose.arms[1 if pose.view in ("back", "right") else 0][2]
        colour = PALETTE["brown"]
        pen.line(((x - 0.03, y + 0.06), (x, y), (x + 0.03, y + 0.06)), 0.01, choose_trim(colour))
        pen.block((x, y + 0.095), 0.064, 0.046, 0.014, shade(colour, 0.72))
        pen.block((x, y + 0.092), 0.056, 0.038, 0.012, (142, 88, 48))
    elif kind == "blue shoulder bag":
        colour = PALETTE["blue"]
        # On the far side of the body only its front edge peeps out.
        x = {"left": 0.07, "right": 0.0}.get(pose.view, side * pose.half_width * 0.95)
        start = (0.0, pose.shoulder_y - 0.015) if pose.is_side else (-side * 0.06, pose.shoulder_y - 0.015)
        y = pose.hip_y + 0.03
        pen.line((start, (x, y)), 0.02, shade(colour, 0.75))
        pen.block((x, y + 0.01), 0.066, 0.052, 0.014, shade(colour, 0.7))
        pen.block((x, y + 0.012), 0.058, 0.044, 0.012, colour)
