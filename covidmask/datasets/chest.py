"""A synthetic chest in Hounsfield units (HU): anatomy by tissue, and lesions as radiology has them.

Lengths are fractions of the image side, so that a patient looks the same at every size; x points
to the right of the image (the patient's left), y to the back, z from apex to base. Every random
number comes from a generator keyed by explicit integers: the same arguments give the same bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator, default_rng
from scipy.ndimage import gaussian_filter

from covidmask.datasets.scanner import Scanner, develop, draw_scanner, scan

GGO, CONSOLIDATION = 2, 3  # mask codes; 0 is background and 1 lung
HEIGHT = 0.75  # of the lungs, in image sides: z = HEIGHT * position
MIN_AREA = 0.001  # of the image: smaller cross-sections are not drawn (16 pixels at 128 x 128)
EDGE = 0.007  # width of an edge: a scanner blurs about as much
AIR, FAT, WATER, BLOOD, MUSCLE, LIVER, MARROW, CORTEX = -1000, -100, 5, 40, 50, 60, 180, 750
VESSEL_SIGMAS = (0.0016, 0.0024, 0.0036, 0.0055, 0.0085)  # radii of tubes and nodules
POSITIONS = np.round(np.arange(0.2, 0.8001, 0.005), 3)
Point = tuple[float, float, float]  # x, y, z


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid whose outline is wavy and rough, cut off by the pleura."""

    code: int  # GGO or CONSOLIDATION
    centre: Point
    radii: tuple[float, float, float]  # along its own two axes in the slice, and along z
    angle: float  # of the first axis, radians
    hu: float  # GGO: above the lung around it; consolidation: absolute
    edge: float  # width over which it fades out
    waves: tuple[tuple[float, float], ...]  # outline: amplitude, phase of 2, 3, 4 waves per turn
    rough: float = 0.0  # how far noise moves the outline
    rind: float = np.inf  # it reaches no deeper below the chest wall than this
    inset: float = 0.0  # the outline lies this far inside: a core in another lesion
    hollow: float = np.inf  # only a ring of this width is drawn: a reversed halo
    mottle: float = 0.3  # relative deviation of its density
    paving: float = 0.0  # HU of the net of thickened septa in it: crazy paving
    bronchogram: float = 0.0  # 1: bronchi in consolidation stay air; 0: they are filled
    lobe: int = 0  # -1: stops at the fissure behind it, 1: at the one in front of it; 0: neither


@dataclass(frozen=True)
class Patient:
    """Anatomy and lesions of one synthetic patient; `draw` gives any slice of it."""

    seed: int
    label: int  # 0 control, 1 common pneumonia, 2 COVID-19
    scale: float  # body size
    rotation: float  # radians
    offset: tuple[float, float]  # of the body centre
    thorax: tuple[float, float]  # half axes of the inner chest wall
    square: float  # 0: its outline is an ellipse; below 0 more pointed, 1: nearly a rectangle
    taper: float  # how much it narrows to the front
    bend: float  # deviation of the shift of all things
    fat: float  # thickness under the skin
    muscle: float  # thickness outside the ribs
    heart: float  # relative size
    shift: tuple[float, float, float]  # of the heart, to the left and back, and its turn
    aorta: tuple[float, float, float]  # how the descending one is shifted, and its radius
    spine: float  # how far back it lies, in parts of the half depth of the chest
    wedge: float  # of fat in front, between the lungs
    narrow: float  # relative width of the mediastinum
    round: float  # width over which the corners of the lungs are rounded
    bones: tuple[float, float]  # phase of the ribs, and how they slope
    dome: float  # position of the top of the diaphragm: low in expiration
    lung_hu: float
    gravity: float  # HU between the front and the back of the lungs
    grain: float  # HU of the finest texture of the lung: lobules and small vessels
    holes: float  # share of the lung that emphysema has thinned
    dependent: float  # HU of the band of dependent density at the back; 0 for none
    fissure: tuple[float, float, float]  # y at mid height, slope, HU of the oblique fissures
    fluid: tuple[float, float]  # height of an effusion in the right and the left chest; 0: none
    vessels: float  # relative weight
    contrast: float  # HU that contrast medium adds to blood; 0: none was given
    thickness: float  # of a slice
    severe: bool  # lesions of any size, up to half a lung
    spare: bool  # masks leave out the vessels in GGO, as in COVID-SemiSeg
    lesions: tuple[Lesion, ...]
    # segments of vessels, scars, nodules: x, y, z of both ends, index of sigma, weight, bronchus
    tubes: np.ndarray = field(repr=False, compare=False)


def _ramp(t: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, smooth between."""
    t = min(max((t - start) / (end - start), 0.0), 1.0)
    return t * t * (3 - 2 * t)


def _swell(t: float, start: float, end: float) -> float:
    """Relative radius at `t` of something round that begins at `start` and ends at `end`."""
    middle, half = (start + end) / 2, (end - start) / 2
    return max(1 - abs((t - middle) / half) ** 3, 0.0) ** 0.5


def _cover(level: np.ndarray, edge: float = EDGE) -> np.ndarray:
    """Share of a pixel that lies inside (0..1)."""
    return np.clip(0.5 + level / edge, 0, 1)


def _ellipse(x, y, cx, cy, a, b, angle=0.0):
    """Level of an ellipse: about the distance to its edge, positive inside."""
    x, y = x - cx, y - cy
    if angle:
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        x, y = cos * x + sin * y, cos * y - sin * x
    return (1 - np.sqrt((x / a) ** 2 + (y / b) ** 2)) * min(a, b)


class _Grid:
    """Coordinates of the pixels of a slice, and the part of it that holds a thing."""

    def __init__(self, patient: Patient, t: float, size: int):
        self.patient, self.size = patient, size
        axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
        dx, dy = axis[None, :] - patient.offset[0], axis[:, None] - patient.offset[1]
        self.cos = np.float32(np.cos(patient.rotation) / patient.scale)
        self.sin = np.float32(np.sin(patient.rotation) / patient.scale)
        # nobody is made of ellipses: everything is shifted a little, smoothly
        fields = default_rng((patient.seed, patient.label, 3))
        bend = [patient.bend * texture(fields, 6, size, 5 * t) for _ in range(2)]
        self.x = (self.cos * dx + self.sin * dy + bend[0]).astype(np.float32)  # [size, size]
        self.y = (self.cos * dy - self.sin * dx + bend[1]).astype(np.float32)

    def pixel(self, x, y):
        """Column and row of points."""
        zoom = self.patient.scale**2
        column = zoom * (self.cos * x - self.sin * y) + self.patient.offset[0] + 0.5
        row = zoom * (self.sin * x + self.cos * y) + self.patient.offset[1] + 0.5
        return column * self.size - 0.5, row * self.size - 0.5

    def box(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        reach = (reach + 2 * EDGE) * self.patient.scale * self.size
        return tuple(
            slice(int(max(at - reach, 0)), int(max(at + reach, 0)) + 2)
            for at in self.pixel(x, y)[::-1]
        )

    def paint(self, hu, value, cx, cy, a, b, angle=0.0, cortex=0.0, edge=EDGE):
        """Draw an ellipse of that HU; with `cortex` a bone: a shell of that width, then marrow."""
        box = self.box(cx, cy, max(a, b))
        level = _ellipse(self.x[box], self.y[box], cx, cy, a, b, angle)
        if cortex:
            value = CORTEX + (value - CORTEX) * _cover(level - cortex)
        hu[box] += _cover(level, edge) * (value - hu[box])


def texture(rng: Generator, cells: int, size: int, turn: float = 0.0) -> np.ndarray:
    """Smooth random field [size, size] of deviation 1, the same at every size; `turn` changes it
    slowly, so that neighbouring slices agree."""
    at = (np.arange(size) + 0.5) / size * (cells - 1)
    weights = np.exp(-0.5 * ((at[:, None] - np.arange(cells)) / 0.7) ** 2)
    weights = (weights / np.sqrt((weights**2).sum(1, keepdims=True))).astype(np.float32)
    knots = rng.standard_normal((2, cells, cells), dtype=np.float32)
    knots = np.float32(np.cos(turn)) * knots[0] + np.float32(np.sin(turn)) * knots[1]
    # row by row: for so little work BLAS would wake a thread on every core, which takes longer
    return (weights[:, None] @ knots @ weights.T)[:, 0]


def thorax(patient: Patient, t: float) -> tuple[float, float, float]:
    """Centre y and half axes of the inner chest wall: narrow at the apex."""
    grow = 0.5 + 0.5 * _ramp(t, -0.1, 0.45)
    a, b = patient.thorax
    return 0.05 * (1 - grow), a * grow, b * (0.25 + 0.75 * grow)


def _wall_level(patient: Patient, t: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Depth below the inner chest wall (positive inside)."""
    cy, a, b = thorax(patient, t)
    v = (y - cy) / b
    u, v = np.abs(x / (a * (1 + patient.taper * v))), np.abs(v)  # narrower in front
    radius = np.sqrt(u * u + v * v)
    # a superellipse without powers of whole images: the corners are moved outwards
    corner = 2 * u * v / np.maximum(u * u + v * v, 1e-6)
    return (1 - radius * (1 - patient.square * 0.12 * corner * corner)) * b


def _organs(patient: Patient, t: float) -> list[tuple]:
    """(HU, x, y, half axes, angle) of heart, great vessels, oesophagus and spine's muscles."""
    cy, _, b = thorax(patient, t)
    back, wide, blood = cy + patient.spine * b, patient.narrow, BLOOD + patient.contrast
    drawn = [(BLOOD - 10, 0.014, back - 0.085, 0.016, 0.011, 0.0)]  # oesophagus
    if t < 0.34:  # veins and arteries to head and arms
        for x, y, r in (
            (-0.024, -0.03, 0.018),
            (0.030, -0.012, 0.013),
            (0.050, 0.035, 0.014),
            (-0.055, -0.045, 0.019),
            (0.05, -0.065, 0.017),
        ):
            drawn.append((blood, x * wide, y + 0.5 * cy, r * wide, r * 1.05 * wide, 0.0))
    if s := _swell(t, 0.27, 0.42):  # arch of the aorta
        drawn.append((blood + 8, 0.028 * wide, 0.0, 0.11 * s * wide, 0.038 * s * wide, 0.95))
    if s := _swell(t, 0.33, 0.66):
        drawn.append((blood + 8, -0.022, -0.085, 0.044 * s * wide, 0.042 * s * wide, 0.0))
    if t > 0.36:
        x, y, r = patient.aorta  # the descending one, beside the spine
        drawn.append((blood + 8, 0.056 + x, back - 0.05 + y, r, r, 0.0))
    if s := _swell(t, 0.26, 0.62):
        drawn.append((blood, -0.07 * wide, -0.05, 0.024 * s * wide, 0.026 * s * wide, 0.0))
    if s := _swell(t, 0.4, 0.58):  # pulmonary trunk and arteries
        drawn.append((blood + 2, 0.042 * wide, -0.095, 0.04 * s * wide, 0.046 * s * wide, 0.3))
        drawn.append((blood + 2, -0.035, -0.015, 0.085 * s * wide, 0.022 * s * wide, -0.2))
        drawn.append((blood + 2, 0.075 * wide, 0.01, 0.045 * s * wide, 0.026 * s, 0.7))
    h = patient.heart * _ramp(t, 0.4, 0.62)
    if h:
        x, y, turn = patient.shift
        y += 0.13 - 0.45 * b  # it lies on the front wall
        left = 0.05 + 0.105 * h, 0.045 + 0.075 * h
        drawn.append((blood, 0.055 + x, -0.075 + y, *left, 0.45 + turn))
        drawn.append((blood, -0.035 + x, -0.05 + y, 0.045 + 0.05 * h, 0.055 + 0.05 * h, 0.3))
    return drawn


def _domes(patient: Patient, t: float) -> list[tuple]:
    """The section of the two domes of the diaphragm, as (HU, x, y, half axes, angle)."""
    domes = []
    for hu, x, top, wide in (
        (LIVER, -0.185, patient.dome, 0.175),
        (MUSCLE - 5, 0.2, patient.dome + 0.05, 0.155),
    ):
        s = max(t - top, 0.0) / (1.02 - top)
        if s > 0:
            s = min(s, 1.0) ** 0.5
            domes.append((hu, x, -0.05, wide * s, 0.25 * s, 0.0))
    return domes


def _blend(one: np.ndarray, other: np.ndarray, width: float) -> np.ndarray:
    """The lower of two levels, rounded where they meet: pleura has no sharp corners."""
    return np.minimum(one, other) - np.maximum(width - np.abs(one - other), 0) ** 2 / (4 * width)


def lung_level(patient: Patient, t: float, x: np.ndarray, y: np.ndarray, wall=None) -> np.ndarray:
    """Level of both lungs (positive inside): the chest without mediastinum, spine, diaphragm."""
    cy, _, b = thorax(patient, t)
    back = cy + patient.spine * b
    wall = _wall_level(patient, t, x, y) if wall is None else wall
    # half width of the mediastinum: sheets of pleura and fat in front, organs in the middle
    thin = 0.006 + patient.narrow * 0.062 * np.exp(-(((y + 0.005) / 0.1) ** 2))
    thin += 0.055 * np.exp(-(((y - back) / 0.065) ** 2))
    front = np.clip((cy - 0.25 * b - y) / b, 0, 1)
    thin += (patient.wedge + 0.16 * patient.heart * _ramp(t, 0.42, 0.7)) * front
    level = _blend(wall, np.abs(x - 0.01) - thin, patient.round)
    level = _blend(level, -_ellipse(x, y, 0, back + 0.01, 0.066, 0.078), patient.round)
    for _, cx, oy, a, c, angle in [*_organs(patient, t), *_domes(patient, t)]:
        if max(a, c) > 0.012:
            organ = -_ellipse(x, y, cx, oy, a + 0.006, c + 0.006, angle)
            level = _blend(level, organ, 0.6 * patient.round)
    for side, height in zip((-1, 1), patient.fluid, strict=True):
        if height and t > 0.35:
            line = cy + b * (1 - height * _ramp(t, 0.3, 1.0)) - 0.25 * (np.abs(x) - 0.2) ** 2
            level = np.where(x * side > 0, np.minimum(level, line - y), level)
    return level


def fissure_level(patient: Patient, t: float, x, y) -> np.ndarray:
    """How far a point lies behind the oblique fissure; below 0 in front of it."""
    middle, slope, _ = patient.fissure
    return y - middle - slope * (0.5 - t) + 0.5 * (np.abs(x) - 0.2) ** 2


def _lesion_level(lesion: Lesion, z: float, x, y, depth, fissure, noise) -> np.ndarray:
    """Level of the cross-section of a lesion at height `z`, before the pleura cuts it.

    `depth` below the chest wall, and `fissure_level`, of the same points.
    """
    cx, cy, cz = lesion.centre
    a, b, c = lesion.radii
    section = max(1 - ((z - cz) / c) ** 2, 0.0) ** 0.5
    u = (np.cos(lesion.angle) * (x - cx) + np.sin(lesion.angle) * (y - cy)) / a
    v = (np.cos(lesion.angle) * (y - cy) - np.sin(lesion.angle) * (x - cx)) / b
    outline = section
    if lesion.waves:
        turn = np.arctan2(v, u)
        waves = (w * np.cos(k * turn + p) for k, (w, p) in enumerate(lesion.waves, start=2))
        outline = section * (1 + sum(waves))
    level = (outline - np.sqrt(u * u + v * v)) * min(a, b)
    level = np.minimum(level, lesion.rind - depth) if lesion.rind < 1 else level
    level = level + lesion.rough * noise - lesion.inset
    level = np.minimum(level, lesion.lobe * fissure) if lesion.lobe else level
    return np.minimum(level, lesion.hollow - level) if lesion.hollow < 1 else level


def visible_area(patient: Patient, lesion: Lesion, t: float) -> float:
    """Area of a lesion in a slice as a fraction of the image, the same for every image size."""
    if abs(HEIGHT * t - lesion.centre[2]) >= lesion.radii[2]:
        return 0.0
    reach = 1.4 * max(lesion.radii[:2])
    steps = np.linspace(-reach, reach, 40)
    x, y = lesion.centre[0] + steps[None, :], lesion.centre[1] + steps[:, None]
    wall = _wall_level(patient, t, x, y)
    fissure = fissure_level(patient, t, x, y)
    inside = _lesion_level(lesion, HEIGHT * t, x, y, wall, fissure, 0.0) > 0
    inside &= (lung_level(patient, t, x, y, wall) > 0) & (x * lesion.centre[0] > 0)
    return float(inside.sum()) * ((steps[1] - steps[0]) * patient.scale) ** 2


def visible_lesions(patient: Patient, position: float) -> tuple[Lesion, ...]:
    """The lesions that a slice shows: those with at least `MIN_AREA` of the image in it.

    Of a severe patient a fifth of it is enough.
    """
    least = MIN_AREA / 5 if patient.severe else MIN_AREA
    return tuple(x for x in patient.lesions if visible_area(patient, x, position) >= least)


def _draw_tubes(grid: _Grid, z: float, thick: float) -> tuple[np.ndarray, np.ndarray]:
    """Density [2, size, size] of vessels and of the lumen of bronchi near height `z`."""
    rows, size = grid.patient.tubes, grid.size
    density = np.zeros((2, size, size), np.float32)
    low, high = np.minimum(rows[:, 2], rows[:, 5]), np.maximum(rows[:, 2], rows[:, 5])
    sigmas = np.array(VESSEL_SIGMAS, np.float32)[rows[:, 6].astype(int)]
    reach = 2.6 * np.hypot(sigmas, thick)
    near = (low - reach < z) & (high + reach > z)
    rows, sigmas = rows[near], sigmas[near]
    for kind, bronchus in itertools.product(range(len(VESSEL_SIGMAS)), (0, 1)):
        part = rows[(rows[:, 6] == kind) & (rows[:, 8] == bronchus)]
        if not len(part):
            continue
        sigma, deep = VESSEL_SIGMAS[kind], float(np.hypot(VESSEL_SIGMAS[kind], thick))
        step = part[:, 3:6] - part[:, :3]
        length = np.linalg.norm(step, axis=1)
        # points only where the segment runs through the slice
        dz = np.where(np.abs(step[:, 2]) < 1e-6, 1e-6, step[:, 2])
        ends = np.stack([(z - 2.6 * deep - part[:, 2]) / dz, (z + 2.6 * deep - part[:, 2]) / dz])
        first, last = np.clip(ends.min(0), 0, 1), np.clip(ends.max(0), 0, 1)
        count = np.ceil((last - first) * length / (0.8 * sigma)).astype(int) + 1
        owner = np.repeat(np.arange(len(part)), count)
        rank = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        along = first[owner] + (rank + 0.5) / count[owner] * (last - first)[owner]
        points = part[owner, :3] + along[:, None] * step[owner]
        away = (points[:, 2] - z) / deep
        spacing = ((last - first) * length / count)[owner]
        mass = part[owner, 7] * np.exp(-0.5 * away**2) * np.maximum(spacing, 0.8 * sigma)
        mass *= np.sqrt(2 * np.pi) * sigma * (size * grid.patient.scale) ** 2
        mass *= np.sqrt(sigma / deep)  # a thick slice dilutes what is thinner than it
        column, row = grid.pixel(points[:, 0], points[:, 1])
        left, top = np.floor(column).astype(int), np.floor(row).astype(int)
        fx, fy = column - left, row - top
        splat = np.zeros(size * size)
        for i, j in itertools.product((0, 1), (0, 1)):  # each point is shared among four pixels
            share = mass * np.abs(1 - i - fx) * np.abs(1 - j - fy)
            x, y = left + i, top + j
            inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
            splat += np.bincount((y * size + x)[inside], share[inside], size * size)
        image = splat.reshape(size, size).astype(np.float32)
        width = sigma * size * grid.patient.scale
        if bronchus:  # its wall is twice as wide as its lumen
            density[1] += gaussian_filter(image, width, truncate=2.5)
            density[0] += 1.4 * gaussian_filter(image, 1.7 * width, truncate=2.5)
        else:
            density[0] += gaussian_filter(image, width, truncate=2.5)
    return density


def draw(patient: Patient, position: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """HU float32 [size, size] of one slice before any scanner, and its mask uint8 [size, size].

    Args:
        position: 0 (apex) to 1 (base of the lungs).
        size: pixels per side, 32 to 1024. Anatomy and lesions do not depend on it.
    """
    if not 0 <= position <= 1 or not 32 <= size <= 1024:
        raise ValueError(f"position {position} must lie in 0..1 and size {size} in 32..1024")
    t, z = position, HEIGHT * position
    grid = _Grid(patient, t, size)
    x, y = grid.x, grid.y
    fields = default_rng((patient.seed, patient.label, 2))
    coarse, patchy, medium, fine, finest = (
        texture(fields, cells, size, turn * t)
        for cells, turn in ((14, 12), (7, 6), (26, 20), (70, 60), (110, 90))
    )
    wall = _wall_level(patient, t, x, y)
    hu = _body(grid, t, wall)
    hu += (hu > -300) * (9 * medium + 6 * fine)
    level = lung_level(patient, t, x, y, wall)
    cy, _, half = thorax(patient, t)
    air = patient.lung_hu + patient.gravity * (y - cy + half) / (2 * half)
    air += 16 * coarse + 14 * fine + 10 * medium + patient.grain * finest
    if patient.holes:
        air -= 110 * np.clip(3 * (medium + 0.6 * coarse - 2.3 + 6 * patient.holes), 0, 1)
    if patient.dependent:
        band = np.exp(-((np.maximum(level, 0) / 0.02) ** 2)) * np.clip(0.6 + 0.7 * patchy, 0, 1.4)
        air += patient.dependent * band * np.clip((y - cy - 0.45 * half) / 0.06, 0, 1)
    fissure = fissure_level(patient, t, x, y) - 0.012 * coarse
    crack = np.exp(-((fissure / 0.0032) ** 2)) * np.clip(0.5 + patchy, 0, 1)
    air += patient.fissure[2] * crack
    vessel, lumen = _draw_tubes(grid, z, patient.thickness)
    vessel = 1 - np.exp(-1.5 * patient.vessels * vessel)
    vessel *= np.clip(level / 0.012, 0, 1)
    lumen = (1 - np.exp(-2.2 * lumen)) * (level > 0)
    mask = (level > 0).astype(np.uint8)
    solid, filled = np.zeros((2, *air.shape), air.dtype)  # shares: consolidation; its bronchi, too
    for lesion in visible_lesions(patient, position):
        box = grid.box(*lesion.centre[:2], 1.35 * max(lesion.radii[:2]) + 2 * lesion.rough)
        noise = medium[box] + 0.55 * fine[box] + 0.7 * coarse[box]
        shape = _lesion_level(lesion, z, x[box], y[box], wall[box], fissure[box], noise)
        cover = _cover(shape, lesion.edge) * (x[box] * lesion.centre[0] > 0)  # it stays in its lung
        inside = (cover > (0.3 if patient.severe else 0.5)) & (level[box] > 0)  # outlined widely
        mottle = 0.5 * medium[box] + 0.35 * fine[box] + 0.45 * coarse[box]
        net = np.exp(-(((finest[box] + 0.5 * fine[box]) / 0.35) ** 2)) * lesion.paving
        if lesion.code == GGO:
            extra = lesion.hu * np.clip(1 + lesion.mottle * mottle, 0.1, 2.5)
            thin = np.clip((-150 - air[box]) / 500, 0, 1)  # what is dense already gains less
            air[box] += cover * (extra + net) * thin
            if patient.spare:
                inside &= vessel[box] < 0.6
            inside &= mask[box] != CONSOLIDATION
        else:
            tubes = lesion.bronchogram * (vessel[box] > 0.45) * (coarse[box] > -0.3)
            value = np.maximum(lesion.hu + 90 * lesion.mottle * mottle + net, air[box])
            value -= tubes * 700
            air[box] += cover * (value - air[box])
            solid[box] = np.maximum(solid[box], cover)
            filled[box] = np.maximum(filled[box], cover * (1 - lesion.bronchogram))
        mask[box][inside] = lesion.code
    air += vessel * (1 - solid) * np.maximum(BLOOD + patient.contrast - air, 0)
    air += lumen * (0.85 * AIR - air) * (1 - filled)
    hu += _cover(level) * (air - hu)
    _airway(grid, t, hu, mask)
    return hu, mask


def _airway(grid: _Grid, t: float, hu: np.ndarray, mask: np.ndarray) -> None:
    """The trachea, which divides into the two main bronchi, each with its wall."""
    if t > 0.56:
        return
    apart = 0.085 * _ramp(t, 0.4, 0.56)
    radius = 0.024 - 0.01 * _ramp(t, 0.4, 0.46)
    for side in (-1, 1) if t > 0.4 else (1,):
        at = side * apart, 0.02 + 0.2 * apart, radius * (1.1 + 5 * apart), radius
        wider = (at[0], at[1], at[2] + 0.006, at[3] + 0.006)
        grid.paint(hu, MUSCLE - 30, *wider)
        grid.paint(hu, AIR + 15, *at)
        box = grid.box(*at[:2], max(wider[2:]))
        mask[box][_ellipse(grid.x[box], grid.y[box], *wider) > 0] = 0


def _body(grid: _Grid, t: float, wall: np.ndarray) -> np.ndarray:
    """HU of everything but the lungs: table, skin, fat, muscle, bones, mediastinum, abdomen."""
    patient, x, y = grid.patient, grid.x, grid.y
    cy, a, b = thorax(patient, t)
    back = cy + patient.spine * b
    shoulders = 0.06 * _ramp(-t, -0.4, 0.0)
    full_a = patient.thorax[0] + 0.03 + patient.muscle + 0.3 * shoulders
    full_b = patient.thorax[1] + 0.025 + patient.muscle
    rim = patient.fat
    hu = np.full(x.shape, AIR, np.float32)
    body = _ellipse(x, y, 0, -0.1 * rim, full_a + 1.2 * rim, full_b + rim)
    table = np.abs(y - full_b - rim - 0.02 + 0.3 * x * x)
    hu += _cover(0.005 - table) * (np.abs(x) < 0.42) * 700
    hu += _cover(body) * (MUSCLE - 20 - AIR)  # skin
    hu += _cover(body - 0.006) * (FAT - MUSCLE + 20)
    ring = body - rim - 0.02 * np.cos(2 * np.arctan2(y, x)) * _ramp(t, 0.3, 0.7)
    hu += _cover(ring) * (MUSCLE - FAT)
    seam = np.abs(wall + 0.034 + 0.012 * np.cos(5 * x / a))  # fat between the muscles of the wall
    hu += _cover(0.004 - seam) * _cover(ring - 0.01) * (FAT + 40 - MUSCLE) * 0.8
    armpit = _cover(_ellipse(np.abs(x), y, 0.9 * full_a, -0.03, 0.055, 0.11), 0.03)
    hu += armpit * _cover(ring) * _ramp(-t, -0.55, -0.2) * (FAT - MUSCLE)
    # ribs run downwards to the front: a slice cuts each as an arc
    turn = np.arctan2((y - cy) / b, np.abs(x) / a)
    phase, slope = patient.bones
    run = (11 * turn + phase + slope * t + 0.35 * np.sign(x)) / (2 * np.pi)
    run = np.abs(run - np.round(run)) * 2 * np.pi / 11 * b  # length along the wall
    arc = np.minimum(0.0105 - np.abs(wall + 0.017), 0.03 - run)
    arc = np.where(turn < -1.25, -1, arc)  # cartilage in front
    hu += _cover(arc) * (CORTEX + (MARROW - CORTEX) * _cover(arc - 0.005) - hu)
    paint = grid.paint
    for side in (-1, 1):
        if t < 0.62:  # shoulder blade: a plate and its spine
            fade = _ramp(-t, -0.62, -0.45)
            paint(hu, MARROW, side * 0.8 * full_a, 0.55 * full_b, 0.012, 0.085 * fade + 1e-3,
                  side * 0.75, 0.004)  # fmt: skip
            if t < 0.4:
                paint(hu, MARROW, side * 0.83 * full_a, 0.63 * full_b, 0.05, 0.009, side * 0.5,
                      0.004)  # fmt: skip
        if t < 0.16:  # collar bone
            paint(hu, MARROW, side * 0.13, -0.6 * b, 0.07, 0.014, -side * 0.35, 0.005)
        paint(hu, MARROW, side * 0.055, back + 0.03, 0.04, 0.011, side * 0.5, 0.004)
        paint(hu, MUSCLE + 5, side * 0.052, back + 0.075, 0.04, 0.03, side * 0.3)
    paint(hu, MARROW, 0, back + 0.085, 0.009, 0.042, 0.0, 0.004)  # spinous process
    paint(hu, MARROW, 0, cy - b - 0.016, 0.05, 0.013, 0.0, 0.004)  # sternum
    inner = _cover(wall - 0.002) * (hu < 300)
    hu += inner * (FAT + 10 - hu)  # fat of the mediastinum; the lungs are drawn over it
    for value, cx, oy, half_a, half_b, angle in [*_organs(patient, t), *_domes(patient, t)]:
        paint(hu, value, cx, oy, half_a, half_b, angle, edge=2 * EDGE)
    for side, height in zip((-1, 1), patient.fluid, strict=True):
        if height and t > 0.35:
            line = cy + b * (1 - height * _ramp(t, 0.3, 1.0)) - 0.25 * (np.abs(x) - 0.2) ** 2
            hu += (x * side > 0.03) * _cover(y - line) * _cover(wall) * (WATER - hu)
    if t > patient.dome + 0.12:  # gas of the stomach
        paint(hu, AIR + 50, 0.2, -0.12, 0.05, 0.03)
    paint(hu, MARROW, 0, back, 0.052, 0.043, 0.0, 0.005)  # vertebra
    paint(hu, BLOOD - 10, 0, back + 0.052, 0.018, 0.015)  # its canal
    return hu


def render(
    patient: Patient,
    position: float,
    size: int,
    scanner: Scanner | None = None,
    hospital: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """A slice as the scanner shows it: image float32 [size, size] in 0..1, and the mask of `draw`.

    Args:
        position, size: as for `draw`; noise, unlike anatomy, depends on the size.
        scanner: None draws one of the `hospital`, 0 or 1, for the patient; of severe patients one
            whose pictures are published, as in COVID-SemiSeg.
    """
    if scanner is None:
        rng = default_rng((patient.seed, patient.label, 6))
        scanner = draw_scanner(rng, hospital, published=patient.severe)
    hu, mask = draw(patient, position, size)
    noise = default_rng((patient.seed, patient.label, 7, round(position * 1e6), size))
    shoulders = max(0.0, 1 - 3 * position)
    return develop(scan(hu, scanner, noise, shoulders), scanner), mask
