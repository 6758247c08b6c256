"""Phantoms: synthetic axial chest CT slices with lesion masks, made by formulas and random numbers.

Lesions follow the radiology in outline: COVID-19 gives several small rounded ground-glass opacities
(GGO) near the pleura of both lower lungs, some with consolidation (C); common pneumonia one or two
larger consolidations, often in one lung and often with a GGO rim. Every class has the same
look-alikes: vessels cut across, scars, small nodules, dependent density and motion ghosts.

Lengths are fractions of the image side, so a patient looks the same at every size; x points to the
right of the image (the patient's left), y down (posterior), z from apex to base. Grey values are
Hounsfield units (HU) until the end. Every random number comes from a generator keyed by explicit
integers, so the same arguments give the same bytes in every process.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.random import Generator, default_rng
from scipy.ndimage import gaussian_filter, shift

from covidmask.datasets.medical import hounsfield_to_unit
from covidmask.datasets.scans import LUNG_WINDOW

GGO, CONSOLIDATION = 2, 3  # mask codes; 0 is background and 1 lung
HEIGHT = 0.75  # of the lungs, in image sides: z = HEIGHT * position
MIN_AREA = 0.001  # of the image: cross-sections below it are not drawn (16 pixels at 128 x 128)
AIR, FAT, TISSUE, BONE = -1000.0, -100.0, 40.0, 450.0
VESSEL_SIGMAS = (0.0028, 0.0042, 0.0065, 0.010)  # of the Gaussian tubes and nodules
FRIEND, FRIEND_POSITION = (2051, 2), 0.725  # (seed, label) and position of `old_friend`
POSITIONS = np.round(np.arange(0.1, 0.9001, 0.005), 3)
Point = tuple[float, float, float]  # x, y, z


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid with a wavy outline, cut off by the pleura."""

    code: int  # GGO or CONSOLIDATION
    centre: Point
    radii: tuple[float, float, float]  # along its own two axes in the slice, and along z
    angle: float  # of the first axis, radians
    hu: float  # GGO: above the lung around it; consolidation: absolute
    edge: float  # width over which it fades out
    waves: tuple[tuple[float, float], ...]  # outline: amplitude, phase of 2, 3, 4 waves per turn


@dataclass(frozen=True)
class Patient:
    """Anatomy and lesions of one synthetic patient; `render` draws any slice of it."""

    seed: int
    label: int  # 0 control, 1 common pneumonia, 2 COVID-19
    scale: float  # body size
    rotation: float  # radians
    offset: tuple[float, float]  # of the body centre
    thorax: tuple[float, float]  # half axes of the inner chest wall
    fat: float  # thickness of the fat rim
    heart: float  # relative size
    ribs: float  # phase
    lung_hu: float
    gravity: float  # HU between the front and the back of the lungs
    dependent: float  # HU of the band of dependent density at the back; 0 for none
    window: float  # shift of the grey values, HU
    noise: float  # standard deviation, HU
    lesions: tuple[Lesion, ...]
    # vessels, scars and nodules: rows (x, y, z, index into VESSEL_SIGMAS, weight)
    points: np.ndarray = field(repr=False, compare=False)


def _ellipse(x, y, cx, cy, a, b):
    """Level of an ellipse: about the distance to its edge, positive inside."""
    return (1 - np.sqrt(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2)) * min(a, b)


def _ramp(t: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, smooth between."""
    t = min(max((t - start) / (end - start), 0.0), 1.0)
    return t * t * (3 - 2 * t)


def _cover(level: np.ndarray, edge: float = 0.008) -> np.ndarray:
    """Share of a pixel that lies inside (0..1), with an edge as wide as a scanner blurs it."""
    return np.clip(0.5 + level / edge, 0, 1)


def _thorax(patient: Patient, position: float) -> tuple[float, float, float]:
    """Centre y and half axes of the inner chest wall: narrow at the apex."""
    grow = 0.5 + 0.5 * _ramp(position, -0.05, 0.45)
    a, b = patient.thorax
    return 0.05 * (1 - grow), a * grow, b * (0.3 + 0.7 * grow)


def _lung_level(patient: Patient, position: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Level of both lungs (positive inside): the chest without mediastinum, heart, spine, liver."""
    cy, a, b = _thorax(patient, position)
    heart, liver = patient.heart * _ramp(position, 0.35, 0.65), _ramp(position, 0.72, 1.0)
    levels = [
        _ellipse(x, y, 0, cy, a, b),
        np.abs(x) - 0.02 - 0.045 * np.exp(-(((y - 0.01) / 0.09) ** 2)),  # mediastinum
        -_ellipse(x, y, 0, cy + 0.78 * b, 0.062, 0.075),  # spine
    ]
    if heart > 0:
        levels.append(-_ellipse(x, y, 0.055, -0.05, 0.05 + 0.085 * heart, 0.04 + 0.07 * heart))
    if liver > 0:  # the dome of the diaphragm rises from the front
        levels.append(-_ellipse(x, y, -0.17, -0.06, 0.02 + 0.19 * liver, 0.02 + 0.21 * liver))
        levels.append(-_ellipse(x, y, 0.20, -0.06, 0.01 + 0.13 * liver, 0.01 + 0.15 * liver))
    return np.minimum.reduce(levels)


def _lesion_level(lesion: Lesion, z: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Level of the cross-section of a lesion at height `z`, before the pleura cuts it."""
    cx, cy, cz = lesion.centre
    a, b, c = lesion.radii
    section = np.sqrt(max(1 - ((z - cz) / c) ** 2, 0.0))
    u = (np.cos(lesion.angle) * (x - cx) + np.sin(lesion.angle) * (y - cy)) / a
    v = (np.cos(lesion.angle) * (y - cy) - np.sin(lesion.angle) * (x - cx)) / b
    turn = np.arctan2(v, u)
    outline = 1 + sum(w * np.cos(k * turn + p) for k, (w, p) in enumerate(lesion.waves, start=2))
    return (section * outline - np.sqrt(u * u + v * v)) * min(a, b)


def _visible_area(patient: Patient, lesion: Lesion, position: float) -> float:
    """Area of a lesion in a slice as a fraction of the image, the same for every image size."""
    if abs(HEIGHT * position - lesion.centre[2]) >= lesion.radii[2]:
        return 0.0
    reach = 1.4 * max(lesion.radii[:2])
    steps = np.linspace(-reach, reach, 40)
    x, y = lesion.centre[0] + steps[None, :], lesion.centre[1] + steps[:, None]
    inside = _lesion_level(lesion, HEIGHT * position, x, y) > 0
    inside &= (_lung_level(patient, position, x, y) > 0) & (x * lesion.centre[0] > 0)
    return float(inside.sum()) * ((steps[1] - steps[0]) * patient.scale) ** 2


def visible_lesions(patient: Patient, position: float) -> tuple[Lesion, ...]:
    """The lesions that a slice shows: those with at least `MIN_AREA` of the image in it."""
    return tuple(x for x in patient.lesions if _visible_area(patient, x, position) >= MIN_AREA)


def _tubes(start: np.ndarray, end: np.ndarray, kind: int, weight: float) -> np.ndarray:
    """Points along the tubes from `start` to `end` [n, 3]: Gaussians that add up to `weight`."""
    sigma = VESSEL_SIGMAS[kind]
    length = np.linalg.norm(end - start, axis=1)  # (n,)
    count = max(int(length.max() / (0.8 * sigma)), 2)
    along = np.linspace(0, 1, count)[:, None, None]
    points = np.empty((count, len(start), 5), np.float32)
    points[..., :3] = start + along * (end - start)
    points[..., 3] = kind
    points[..., 4] = weight * length / ((count - 1) * np.sqrt(2 * np.pi) * sigma)
    return points.reshape(-1, 5)


def _vessels_and_lookalikes(rng: Generator) -> np.ndarray:
    """Vessel trees from both hila, and the scars and nodules that every class has."""
    points = []
    for side in (-1, 1):
        way = rng.normal(0, 1, (20, 3)) * (0.7, 0.9, 1.2)
        way[:, 0] = side * (np.abs(way[:, 0]) + 0.25)
        start = (side * 0.06, 0.01, 0.5 * HEIGHT) + rng.normal(0, 1, (20, 3)) * (0.01, 0.02, 0.07)
        tree = ((3, 0.9, 0.08, 2), (2, 0.9, 0.085, 3), (1, 0.8, 0.08, 3), (0, 0.8, 0.06, 1))
        for kind, weight, length, children in tree:
            way /= np.linalg.norm(way, axis=1, keepdims=True)
            end = start + way * length * rng.uniform(0.7, 1.3, (len(way), 1))
            points.append(_tubes(start, end, kind, weight))
            start, way = np.repeat(end, children, axis=0), np.repeat(way, children, axis=0)
            way = way + 0.55 * rng.normal(0, 1, way.shape)
        for _ in range(rng.poisson(2.0)):  # scars and plate atelectasis: flat lines
            turn = rng.uniform(0, np.pi)
            half = rng.uniform(0.02, 0.06) * np.array([np.cos(turn), np.sin(turn), 0])
            middle = side * rng.uniform(0.12, 0.3), rng.uniform(-0.1, 0.18), rng.uniform(0.15, 0.7)
            lift = np.arange(-0.03, 0.031, 0.004)[:, None] * (0, 0, 1)
            points.append(_tubes(middle + lift - half, middle + lift + half, 0, 0.5))
        shape = rng.poisson(2.0), 3  # small nodules
        nodule = rng.uniform((0.08, -0.18, 0.07), (0.32, 0.2, 0.7), shape) * (side, 1, 1)
        for at in nodule[:, None]:
            points.append(_tubes(at, at + (0, 0, 0.008), 3, rng.uniform(0.5, 1.2)))
    return np.concatenate(points)


def _place(patient: Patient, side: int, turn: float, depth: float, position: float) -> Point:
    """The point at `depth` (0 inner .. 1 pleura) on a ray; turn 0 is lateral, pi/2 posterior."""
    cy, a, _ = _thorax(patient, position)
    x0, y0 = side * 0.52 * a, cy + 0.035
    across, down, steps = side * np.cos(turn), np.sin(turn), np.linspace(0, 0.4, 161)
    outside = _lung_level(patient, position, x0 + across * steps, y0 + down * steps) <= 0
    reach = steps[np.argmax(outside)]  # the first outside, or 0
    return float(x0 + across * depth * reach), float(y0 + down * depth * reach), HEIGHT * position


def _lesion(rng: Generator, code: int, centre: Point, radius: float, **given) -> Lesion:
    """A lesion of that radius with everything else drawn, unless `given`."""
    ggo, radius = code == GGO, float(radius)
    shape = rng.uniform(0.75, 1.3)
    drawn = dict(
        radii=(radius * shape**0.5, radius / shape**0.5, radius * rng.uniform(0.9, 1.4)),
        angle=rng.uniform(0, np.pi),
        hu=rng.uniform(220, 330) if ggo else rng.uniform(-60, 40),
        edge=rng.uniform(0.012, 0.02) if ggo else rng.uniform(0.007, 0.012),
        waves=tuple((rng.normal(0, 0.045), rng.uniform(0, 2 * np.pi)) for _ in range(3)),
    )
    return Lesion(code, centre, **(drawn | given))


def _meet(one: Lesion, other: Lesion) -> bool:
    """Whether two lesions may touch in a slice, or nearly so."""
    reach = max(one.radii[:2]) + max(other.radii[:2]) + 0.012
    apart = np.hypot(*np.subtract(one.centre[:2], other.centre[:2]))
    return apart < reach and abs(one.centre[2] - other.centre[2]) < one.radii[2] + other.radii[2]


def _draw_lesions(patient: Patient, label: int, rng: Generator) -> tuple[Lesion, ...]:
    """Foci of pneumonia (label 1) or COVID-19, apart and large enough to be seen; perhaps none."""
    lesions: list[Lesion] = []
    covid, foci = label == 2, 0
    if covid:
        wanted = rng.choice([8, 20, 30, 40], p=[0.05, 0.15, 0.35, 0.45])  # lesions
    else:
        wanted = rng.choice([1, 2, 3], p=[0.65, 0.28, 0.07])  # foci
        first_side, one_sided = rng.choice([-1, 1]), rng.random() < 0.7
    for number in range(5 * wanted):
        if (len(lesions) if covid else foci) >= wanted:
            break
        position = float(np.clip(rng.normal(0.6 if covid else 0.55, 0.2), 0.15, 0.88))
        if covid:
            side = 1 if (number + rng.integers(2)) % 2 else -1
            centre = _place(patient, side, rng.normal(0.6, 0.65), rng.uniform(0.6, 0.88), position)
            if rng.random() < 0.62:
                new = [_lesion(rng, GGO, centre, np.clip(rng.lognormal(-2.72, 0.22), 0.04, 0.1))]
                if rng.random() < 0.17:  # a core leaves a ring of GGO
                    new.append(_lesion(rng, CONSOLIDATION, centre, 0.55 * min(new[0].radii[:2])))
            else:
                radius = np.clip(rng.lognormal(-2.93, 0.18), 0.036, 0.075)
                new = [_lesion(rng, CONSOLIDATION, centre, radius)]
        else:
            side = int(first_side if one_sided else rng.choice([-1, 1]))
            central = rng.random() < 0.5
            turn = rng.uniform(-np.pi, np.pi) if central else rng.normal(0.3, 0.9)
            depth = rng.uniform(*((0.1, 0.6) if central else (0.6, 0.95)))
            centre = _place(patient, side, turn, depth, position)
            radius = np.clip(rng.lognormal(-2.3, 0.3), 0.05, 0.16)
            new = [_lesion(rng, GGO if rng.random() < 0.15 else CONSOLIDATION, centre, radius)]
            if new[0].code == CONSOLIDATION and rng.random() < 0.3:  # a rim of GGO around it
                rim = rng.uniform(1.25, 1.6)
                radii = tuple(rim * r for r in new[0].radii)
                new.insert(0, _lesion(rng, GGO, centre, radius, radii=radii, angle=new[0].angle))
        free = not any(_meet(new[0], other) for other in lesions)
        if free and _visible_area(patient, new[0], position) > 2 * MIN_AREA:
            lesions += new
            foci += 1
    return tuple(lesions)


def make_patient(seed: int, label: int) -> Patient:
    """Draw the anatomy and the lesions of a synthetic patient.

    Args:
        seed: at least 0. The same seed and label give the same patient everywhere.
        label: 0 control (no lesions), 1 common pneumonia, 2 COVID-19 (both have lesions).
    """
    if seed < 0 or label not in (0, 1, 2):
        raise ValueError(f"seed {seed}, label {label}: seed must be >= 0 and label 0, 1 or 2")
    rng = default_rng((seed, label, 0))
    patient = Patient(
        seed=int(seed),
        label=int(label),
        scale=rng.uniform(0.95, 1.08),
        rotation=rng.normal(0, 0.05),
        offset=(rng.normal(0, 0.012), rng.normal(0, 0.012)),
        thorax=(rng.uniform(0.355, 0.395), rng.uniform(0.27, 0.305)),
        fat=rng.uniform(0.012, 0.04),
        heart=rng.uniform(0.75, 1.15),
        ribs=rng.uniform(0, 2 * np.pi),
        lung_hu=rng.uniform(-880, -810),
        gravity=rng.uniform(30, 110),
        dependent=rng.uniform(100, 260) if rng.random() < 0.55 else 0.0,
        window=rng.normal(0, 30),
        noise=rng.uniform(20, 48),
        lesions=(),
        points=_vessels_and_lookalikes(rng),
    )
    return _with_lesions(patient, label)


def _with_lesions(patient: Patient, label: int) -> Patient:
    """The patient with lesions of class `label`; draws again until there is at least one."""
    for attempt in itertools.count() if label else ():
        if lesions := _draw_lesions(patient, label, default_rng((patient.seed, label, 1, attempt))):
            return replace(patient, lesions=lesions)
    return patient


def _texture(rng: Generator, cells: int, size: int) -> np.ndarray:
    """Smooth random field [size, size], standard deviation near 1, the same at every size."""
    at = (np.arange(size) + 0.5) / size * (cells - 1)
    weights = np.exp(-0.5 * ((at[:, None] - np.arange(cells)) / 0.7) ** 2)
    weights = (weights / np.sqrt((weights**2).sum(1, keepdims=True))).astype(np.float32)
    return weights @ rng.standard_normal((cells, cells), dtype=np.float32) @ weights.T


def _to_image(patient: Patient, x, y):
    """Column and row, 0..1 across the image, of points given in the patient's coordinates."""
    cos, sin = np.cos(patient.rotation) * patient.scale, np.sin(patient.rotation) * patient.scale
    return cos * x - sin * y + patient.offset[0] + 0.5, sin * x + cos * y + patient.offset[1] + 0.5


def _draw_points(patient: Patient, z: float, size: int) -> np.ndarray:
    """Density [size, size] of vessels, scars and nodules near height `z`: 1 is solid tissue."""
    density = np.zeros((size, size), np.float32)
    for kind, sigma in enumerate(VESSEL_SIGMAS):
        away = (patient.points[:, 2] - z) / sigma
        near = patient.points[(patient.points[:, 3] == kind) & (np.abs(away) < 3.5)]
        column, row = (size * at - 0.5 for at in _to_image(patient, near[:, 0], near[:, 1]))
        dz = (near[:, 2] - z) / sigma
        mass = near[:, 4] * np.exp(-0.5 * dz**2) * 2 * np.pi * (sigma * size * patient.scale) ** 2
        left, top = np.floor(column).astype(int), np.floor(row).astype(int)
        splat = np.zeros(size * size)
        for i, j in itertools.product((0, 1), (0, 1)):  # each point is shared among four pixels
            share = mass * (1 - np.abs(column - left - i)) * (1 - np.abs(row - top - j))
            x, y = left + i, top + j
            inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
            np.add.at(splat, (y * size + x)[inside], share[inside])
        width = sigma * size * patient.scale
        density += gaussian_filter(splat.reshape(size, size).astype(np.float32), width, truncate=3)
    return density


def render(patient: Patient, position: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one axial slice.

    Args:
        position: 0 (apex) to 1 (base of the lungs).
        size: pixels per side, 32 to 1024. Anatomy and lesions do not depend on it, noise does.

    Returns:
        image float32 [size, size] in 0..1 (lung window), and mask uint8 [size, size] with codes
        0 background, 1 lung, 2 GGO, 3 consolidation.
    """
    if not 0 <= position <= 1 or not 32 <= size <= 1024:
        raise ValueError(f"position {position} must lie in 0..1 and size {size} in 32..1024")
    rng = default_rng((patient.seed, patient.label, 2, round(position * 1e6)))
    axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    dx, dy = axis[None, :] - patient.offset[0], axis[:, None] - patient.offset[1]
    cos, sin = np.cos(patient.rotation) / patient.scale, np.sin(patient.rotation) / patient.scale
    x = (cos * dx + sin * dy).astype(np.float32)
    y = (cos * dy - sin * dx).astype(np.float32)
    hu = _chest_wall(patient, position, x, y)
    coarse, fine, patchy = _texture(rng, 14, size), _texture(rng, 60, size), _texture(rng, 7, size)
    hu += (hu > -300) * (25 * coarse + 12 * fine)
    level = _lung_level(patient, position, x, y)
    cy, _, half = _thorax(patient, position)
    air = patient.lung_hu + patient.gravity * (y - cy + half) / (2 * half) + 22 * coarse + 22 * fine
    band = np.exp(-((np.maximum(level, 0) / 0.022) ** 2)) * np.clip(0.75 + 0.6 * patchy, 0, 1.4)
    air += patient.dependent * band * np.clip((y - cy - 0.45 * half) / 0.06, 0, 1)
    mask = (level > 0).astype(np.uint8)
    for lesion in visible_lesions(patient, position):
        reach = 1.4 * max(lesion.radii[:2]) * patient.scale  # rows and columns that hold it:
        ends = [(m - reach, m + reach) for m in _to_image(patient, *lesion.centre[:2])[::-1]]
        box = tuple(slice(int(max(a, 0.0) * size), int(max(b, 0.0) * size) + 1) for a, b in ends)
        cover = _cover(_lesion_level(lesion, HEIGHT * position, x[box], y[box]), lesion.edge)
        cover *= x[box] * lesion.centre[0] > 0  # it stays in its lung
        if lesion.code == GGO:
            air[box] += cover * (lesion.hu + 40 * coarse[box] + 25 * fine[box])
        else:
            air[box] += cover * (lesion.hu + 20 * coarse[box] - air[box])
        mask[box][(cover > 0.5) & (level[box] > 0)] = lesion.code
    vessel = 1 - np.exp(-1.4 * _draw_points(patient, HEIGHT * position, size))
    vessel *= np.clip(level / 0.02, 0, 1)  # they thin out towards the pleura
    air += vessel * np.maximum(TISSUE - air, 0)
    hu += _cover(level) * (air - hu)
    if position <= 0.62:  # the trachea, which divides into the two main bronchi
        apart = 0.07 * max(position - 0.4, 0) / 0.2
        radius = 0.024 - 0.009 * _ramp(position, 0.4, 0.48)
        tube = _cover(_ellipse(np.abs(x), y, apart, 0.005 + 0.3 * apart, radius * 1.1, radius))
        hu += tube * (AIR + 20 - hu)
    if rng.random() < 0.25:  # motion: a faint second image
        way = rng.uniform(0, 2 * np.pi)
        by = 0.014 * size * np.array([np.sin(way), np.cos(way)])
        hu += 0.3 * (shift(hu, by, order=1, mode="nearest") - hu)
    noise = default_rng((patient.seed, patient.label, 3, round(position * 1e6), size))
    grain = gaussian_filter(noise.standard_normal((size, size), dtype=np.float32), 0.7)
    hu += patient.noise / 0.405 * grain + patient.window  # the filter leaves 0.405 of the deviation
    return hounsfield_to_unit(hu, LUNG_WINDOW), mask


def _chest_wall(patient: Patient, position: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """HU of everything but the lungs: air, table, fat, muscle, ribs, spine, shoulder blades."""
    cy, a, b = _thorax(patient, position)
    outer_a, outer_b = patient.thorax[0] + 0.055, patient.thorax[1] + 0.05  # of the muscles
    hu = np.full(x.shape, AIR, np.float32)
    table = np.abs(y - outer_b - patient.fat - 0.035 + 0.25 * x**2)
    hu += _cover(0.006 - table) * (np.abs(x) < 0.4) * 650
    body = _ellipse(x, y, 0, 0, outer_a + patient.fat, outer_b + patient.fat)
    hu += _cover(body) * (FAT - AIR)
    hu += _cover(body - patient.fat) * (TISSUE - FAT)
    armpit = _cover(_ellipse(np.abs(x), y, 0.34, 0.0, 0.045, 0.12), 0.03)
    armpit *= _cover(body - patient.fat) * _ramp(-position, -0.5, -0.2)
    hu += armpit * (FAT - TISSUE)
    wall = np.sqrt((x / (a + 0.02)) ** 2 + ((y - cy) / (b + 0.02)) ** 2)
    turn = np.arctan2((y - cy) / b, np.abs(x) / a)
    rib = np.cos(7 * turn + patient.ribs + 14 * position) - 0.25
    bones = [
        np.minimum(0.03 * rib, 0.011 - np.abs(wall - 1) * b),
        _ellipse(x, y, 0, cy + 0.78 * b, 0.045, 0.038),
        _ellipse(x, y, 0, cy + 0.78 * b + 0.075, 0.012, 0.04),  # spinous process
        _ellipse(x, y, 0, cy - b - 0.012, 0.04, 0.013),  # sternum
    ]
    if position < 0.5:
        blade = np.abs(x) * 0.75 + y * 0.66, y * 0.75 - np.abs(x) * 0.66
        bones.append(_ellipse(*blade, 0.335, -0.06, 0.01, 0.07))
    hu += _cover(np.max(bones, axis=0)) * (BONE - hu)
    canal = _cover(_ellipse(x, y, 0, cy + 0.78 * b + 0.045, 0.016, 0.013))
    return hu + canal * (TISSUE - hu)


def draw_positions(patient: Patient, count: int) -> list[float]:
    """Draw `count` different slice positions in 0.1..0.9, in ascending order.

    Every slice shows a lesion, as in COVIDx-CT, where only such slices were kept. A control has
    none; its positions are drawn as if it had pneumonia or COVID-19, so that the position of a
    slice says nothing about its class.
    """
    if patient.label == 0:
        patient = _with_lesions(patient, 1 + patient.seed % 2)
    order = default_rng((patient.seed, patient.label, 4)).permutation(POSITIONS).tolist()
    shown = (position for position in order if visible_lesions(patient, position))
    positions = list(itertools.islice(shown, count))
    if len(positions) < count:
        raise ValueError(f"{count} slices: this patient has only {len(positions)} with lesions")
    return sorted(positions)


def make_slice(
    seed: int, label: int, size: int = 256, position: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`render` a slice of `make_patient(seed, label)`; None: where labels 1 and 2 show a lesion."""
    patient = make_patient(seed, label)
    return render(patient, draw_positions(patient, 1)[0] if position is None else position, size)


def old_friend(size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The slice that the book follows through its chapters; its patient is in no data set."""
    return make_slice(*FRIEND, size=size, position=FRIEND_POSITION)
