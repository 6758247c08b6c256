"""Synthetic patients: what each class of them has, drawn at random.

COVID-19 gives many lesions on both sides, rather near the pleura, half of them ground glass; common
pneumonia two or three foci that lie together, or the patchy kind; controls have none. All have
what looks like lesions: vessels, scars, nodules, dependent density.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.random import Generator, default_rng

from covidmask.datasets import chest
from covidmask.datasets.chest import (
    CONSOLIDATION,
    GGO,
    HEIGHT,
    MIN_AREA,
    POSITIONS,
    VESSEL_SIGMAS,
    Lesion,
    Patient,
    Point,
    render,
    visible_area,
)

FRIEND, FRIEND_POSITION = (2110, 2), 0.5  # (seed, label) and position of `old_friend`


def make_patient(seed: int, label: int, severe: bool = False) -> Patient:
    """Draw the anatomy and the lesions of a synthetic patient.

    Args:
        seed: at least 0. The same arguments give the same patient everywhere.
        label: 0 control (no lesions), 1 common pneumonia, 2 COVID-19 (both have lesions).
        severe: with lesions of up to half a lung, as in COVID-SemiSeg; else small and few, as in
            the paper's Figure 1.
    """
    if seed < 0 or label not in (0, 1, 2):
        raise ValueError(f"seed {seed}, label {label}: seed must be >= 0 and label 0, 1 or 2")
    rng = default_rng((seed, label, 0))
    breath = rng.uniform(0, 1) ** 1.5  # 0 inspiration, 1 expiration: denser, higher diaphragm
    fluid = rng.uniform(0.08, 0.3, 2) * (rng.random(2) < 0.07)
    patient = Patient(
        seed=int(seed),
        label=int(label),
        scale=rng.uniform(1.0, 1.16),
        rotation=rng.normal(0, 0.05),
        offset=(rng.normal(0, 0.012), rng.normal(0, 0.012)),
        thorax=(rng.uniform(0.325, 0.38), rng.uniform(0.275, 0.34)),
        square=rng.uniform(-0.2, 0.9),
        taper=rng.uniform(-0.15, 0.12),
        bend=rng.uniform(0.004, 0.013),
        fat=rng.uniform(0.008, 0.045),
        muscle=rng.uniform(0.02, 0.04),
        heart=rng.uniform(0.6, 1.25),
        shift=(rng.normal(0, 0.015), rng.normal(0, 0.02), rng.normal(0, 0.25)),
        aorta=(rng.normal(0, 0.012), rng.normal(0, 0.014), rng.uniform(0.021, 0.042)),
        spine=rng.uniform(0.68, 0.86),
        wedge=rng.uniform(0, 0.22) * (rng.random() < 0.8),
        narrow=rng.uniform(0.95, 1.5),
        round=rng.uniform(0.01, 0.05),
        bones=(rng.uniform(0, 2 * np.pi), rng.uniform(8, 14)),
        dome=0.78 - 0.16 * breath + rng.normal(0, 0.02),
        lung_hu=-890 + 190 * breath + rng.normal(0, 15),
        gravity=rng.uniform(20, 60) + 60 * breath,
        grain=5 + rng.exponential(16),
        holes=rng.uniform(0.02, 0.25) if rng.random() < 0.15 else 0.0,
        dependent=rng.uniform(60, 240) if rng.random() < 0.5 else 0.0,
        fissure=(rng.normal(0.02, 0.02), rng.uniform(0.25, 0.5), rng.uniform(0, 130)),
        fluid=(float(fluid[0]), float(fluid[1])),
        vessels=rng.uniform(1.0, 2.6),
        contrast=rng.uniform(60, 260) if rng.random() < 0.3 else 0.0,
        thickness=rng.choice([0.001, 0.003, 0.008]),
        severe=severe and label == 2,
        spare=bool(severe and label == 2 and rng.random() < 0.6),
        lesions=(),
        tubes=_grow_tubes(rng),
    )
    if severe and label == 2:
        patient = replace(patient, lesions=_severe(patient, default_rng((seed, label, 1))))
    else:
        patient = _with_lesions(patient, label)
    signs = _signs(patient, default_rng((seed, label, 8)))
    return replace(patient, tubes=np.concatenate([patient.tubes, *signs]))


def _with_lesions(patient: Patient, label: int) -> Patient:
    """The patient with lesions of class `label`; draws again until there is at least one."""
    for attempt in itertools.count() if label else ():
        if lesions := _draw_lesions(patient, label, default_rng((patient.seed, label, 1, attempt))):
            return replace(patient, lesions=lesions)
    return patient


def _grow_tubes(rng: Generator) -> np.ndarray:
    """Vessel trees from both hila with bronchi beside the first branches; scars and nodules."""
    rows = []
    for side in (-1, 1):
        roots = rng.integers(13, 19)
        way = rng.normal(0, 1, (roots, 3)) * (0.7, 0.9, 1.1)
        way[:, 0] = side * (np.abs(way[:, 0]) + 0.2)
        start = (side * 0.075, 0.012, 0.49 * HEIGHT) + rng.normal(0, 1, (roots, 3)) * (
            (0.008, 0.02, 0.06)
        )
        radius = rng.uniform(0.005, 0.0095, roots)
        for generation in range(6):
            way /= np.linalg.norm(way, axis=1, keepdims=True)
            length = (0.075, 0.062, 0.052, 0.042, 0.032, 0.024)[generation]
            end = start + way * length * rng.uniform(0.6, 1.4, (len(way), 1))
            kind = np.abs(np.log(radius[:, None] / VESSEL_SIGMAS)).argmin(1)
            rows.append(_tubes(start, end, kind, rng.uniform(0.75, 1.1, len(way))))
            if generation < 3:  # a bronchus runs beside every second artery
                off = np.cross(way, rng.normal(0, 1, 3))
                off *= 2.1 * radius[:, None] / (np.linalg.norm(off, axis=1, keepdims=True) + 1e-6)
                pair = slice(0, None, 2)
                inner = np.maximum(kind - 1, 0)
                rows.append(
                    _tubes(start[pair] + off[pair], end[pair] + off[pair], inner[pair], 1.0, 1.0)
                )
            # each branch goes on nearly straight and gives off a smaller one
            bend = rng.normal(0, 1, (2, *way.shape)) * np.array([0.28, 0.75])[:, None, None]
            way = (way[None] + bend).reshape(-1, 3)
            start = np.concatenate(
                [end, start + rng.uniform(0.3, 0.9, (len(end), 1)) * (end - start)]
            )
            radius = np.concatenate([radius * 0.8, radius * rng.uniform(0.45, 0.75, len(radius))])
            keep = radius > 0.0009
            way, start, radius = way[keep], start[keep], radius[keep]
        count = int(rng.integers(200, 900))  # small vessels, that reach everywhere
        middle = rng.uniform((0.03, -0.27, 0.05), (0.36, 0.3, 0.75), (count, 3)) * (side, 1, 1)
        way = middle - (side * 0.075, 0.012, 0.49 * HEIGHT) + rng.normal(0, 0.05, (count, 3))
        way *= rng.uniform(0.008, 0.022, (count, 1)) / np.linalg.norm(way, axis=1, keepdims=True)
        kind = rng.choice(4, count, p=[0.45, 0.35, 0.15, 0.05])
        rows.append(_tubes(middle - way, middle + way, kind, rng.uniform(0.5, 1.0, count)))
        for _ in range(rng.poisson(1.5)):  # scars and plate atelectasis: flat lines
            turn = rng.uniform(0, np.pi)
            half = rng.uniform(0.02, 0.06) * np.array([np.cos(turn), np.sin(turn), 0])
            middle = side * rng.uniform(0.12, 0.3), rng.uniform(-0.1, 0.18), rng.uniform(0.15, 0.7)
            lift = np.arange(-0.03, 0.031, 0.004)[:, None] * (0, 0, 1)
            rows.append(_tubes(middle + lift - half, middle + lift + half, 0, 0.35))
        count = rng.poisson(2.0)  # small nodules
        at = rng.uniform((0.08, -0.18, 0.07), (0.32, 0.2, 0.7), (count, 3)) * (side, 1, 1)
        rows.append(
            _tubes(at, at + (0, 0, 0.006), rng.integers(2, 5, count), rng.uniform(0.5, 1.2))
        )
    return np.concatenate(rows)


def _tubes(start, end, kind, weight, bronchus=0.0) -> np.ndarray:
    """Rows of `Patient.tubes` for segments from `start` to `end` [n, 3]."""
    rows = np.empty((len(start), 9), np.float32)
    rows[:, :3], rows[:, 3:6] = start, end
    rows[:, 6], rows[:, 7], rows[:, 8] = kind, weight, bronchus
    return rows


def _draw_lesions(patient: Patient, label: int, rng: Generator) -> tuple[Lesion, ...]:
    """Foci of pneumonia (label 1) or COVID-19, apart and large enough to be seen; perhaps none."""
    lesions: list[Lesion] = []
    covid, foci = label == 2, 0
    if covid:
        wanted = rng.choice([40, 70], p=[0.05, 0.95])  # lesions
    else:
        wanted = rng.choice([1, 2, 3, 6], p=[0.1, 0.55, 0.25, 0.1])  # foci; 6: viral, patchy
        first_side, one_sided = rng.choice([-1, 1]), rng.random() < 0.85 and wanted < 6
        level = rng.uniform(0.25, 0.65)  # foci lie together
    for number in range(2 * wanted if covid else 20):
        if (len(lesions) if covid else foci) >= wanted:
            break
        t = float(np.clip(rng.normal(*((0.68, 0.18) if covid else (level, 0.07))), 0.12, 0.9))
        if covid:
            side = 1 if (number + rng.integers(2)) % 2 else -1
            centre = _place(patient, side, rng.normal(0.5, 1.2), rng.uniform(0.5, 0.85), t)
            if rng.random() < 0.55:
                new = [_lesion(rng, GGO, centre, np.clip(rng.lognormal(-2.9, 0.25), 0.038, 0.1))]
                if rng.random() < 0.1:  # a core leaves a ring of GGO: halo
                    radius = 0.55 * min(new[0].radii[:2])
                    new.append(_lesion(rng, CONSOLIDATION, centre, radius, bronchogram=0.0))
                elif rng.random() < 0.08:  # reversed halo: a ring of consolidation
                    new.append(replace(new[0], code=CONSOLIDATION, hu=-60.0, hollow=0.014))
            else:
                radius = np.clip(rng.lognormal(-2.98, 0.2), 0.038, 0.08)
                new = [_lesion(rng, CONSOLIDATION, centre, radius)]
        else:
            side = int(first_side if one_sided else rng.choice([-1, 1]))
            central = rng.random() < 0.65
            turn = rng.uniform(-np.pi, np.pi) if central else rng.normal(0.3, 0.9)
            depth = rng.uniform(*((0.1, 0.6) if central else (0.6, 0.95)))
            centre = _place(patient, side, turn, depth, t)
            radius = np.clip(rng.lognormal(-2.75, 0.3), 0.04, 0.13)
            code = GGO if rng.random() < (0.35 if wanted < 6 else 0.5) else CONSOLIDATION
            behind = chest.fissure_level(patient, t, *centre[:2]) > 0
            lobe = int(behind or -1) * (radius > 0.09 and rng.random() < 0.6)  # lobar pneumonia
            new = [_lesion(rng, code, centre, radius, lobe=lobe)]
            if code == CONSOLIDATION and rng.random() < 0.15:  # a rim of GGO around it
                rim = rng.uniform(1.25, 1.6)
                radii = tuple(rim * r for r in new[0].radii)
                new.insert(0, _lesion(rng, GGO, centre, radius, radii=radii, angle=new[0].angle,
                                      lobe=lobe))  # fmt: skip
        free = not any(_meet(new[0], other) for other in lesions)
        if free and _sure_area(patient, new[0], t) > 3 * MIN_AREA:
            lesions += new
            foci += 1
    return tuple(lesions)


def _severe(patient: Patient, rng: Generator) -> tuple[Lesion, ...]:
    """COVID-19 of up to half a lung: foci that grow and merge, rinds below the pleura, patches."""
    lesions: list[Lesion] = []
    kind = rng.choice(["spots", "foci", "rind", "patches"], p=[0.2, 0.25, 0.25, 0.3])
    ggo_hu, dense = np.exp(rng.uniform(np.log(60), np.log(280))), rng.random()
    edge = np.exp(rng.uniform(np.log(0.008), np.log(0.07)))
    paving, net = rng.uniform(0, 200) * (rng.random() < 0.4), rng.uniform(100, 450)
    mottle = rng.uniform(0.2, 1.3)
    sides = (-1, 1) if rng.random() < 0.75 else (int(rng.choice([-1, 1])),)
    spread = 0.9 * rng.random() + 0.1
    for side in sides:
        many = {"spots": (3, 40), "foci": (4, 30)}.get(kind, (1, 4))
        for _ in range(rng.integers(*many)):
            t = float(np.clip(rng.normal(0.55, 0.22), 0.1, 0.9))
            if kind in ("spots", "foci"):
                centre = _place(patient, side, rng.normal(0.7, 0.9), rng.uniform(0.3, 0.97), t)
                largest = 0.05 if kind == "spots" else 0.06 + 0.12 * spread
                radius = float(np.exp(rng.uniform(np.log(0.01), np.log(largest))))
                rind, rough = np.inf, rng.uniform(0.15, 0.7) * radius
                radii = (radius * rng.uniform(0.6, 1.6), radius, radius * rng.uniform(0.8, 1.6))
            elif kind == "rind":
                centre = _place(patient, side, rng.normal(0.8, 0.7), 0.9, t)
                radii = (rng.uniform(0.1, 0.34), rng.uniform(0.08, 0.25), rng.uniform(0.1, 0.35))
                rind, rough = rng.uniform(0.02, 0.05 + 0.08 * spread), rng.uniform(0.01, 0.04)
            else:
                centre = _place(patient, side, rng.normal(0.4, 1.2), rng.uniform(0, 0.6), t)
                radii = tuple(rng.uniform(0.1, 0.2 + 0.28 * spread, 3))
                rind, rough = np.inf, rng.uniform(0.02, 0.07)
            angle = rng.uniform(0, np.pi)
            shape = dict(radii=radii, angle=angle, waves=(), rind=rind, rough=rough)
            ggo = _lesion(rng, GGO, centre, 0.05, hu=ggo_hu * rng.uniform(0.8, 1.2), edge=edge,
                          paving=paving, mottle=mottle, **shape)  # fmt: skip
            all_dense = dense > 0.8 and rng.random() < 0.7
            if not all_dense:
                lesions.append(ggo)
            if all_dense or (dense > 0.3 and rng.random() < 0.7):
                inset = 0.0 if all_dense else rng.uniform(0.004, 0.5) * min(min(radii), rind)
                # dense, or a net of thickened septa in what is hardly denser than ground glass
                netted = rng.random() < 0.45
                low = patient.lung_hu + ggo_hu
                hu = low + rng.uniform(0, 150) if netted else rng.uniform(min(low + 90, 0), 50)
                core = dict(hu=hu, paving=net * netted, edge=min(edge, 0.03), mottle=2.5 * mottle)
                core |= {"inset": inset} | shape
                lesions.append(_lesion(rng, CONSOLIDATION, centre, 0.05, **core))
    return tuple(sorted(lesions, key=lambda lesion: lesion.code))


def _signs(patient: Patient, rng: Generator) -> list[np.ndarray]:
    """Tubes that go with lesions and are in no mask: tree-in-bud, curves below the pleura."""
    rows = []
    for lesion in patient.lesions[:2] if patient.label == 1 and rng.random() < 0.4 else ():
        count = int(rng.integers(8, 20))  # twigs of small airways, each with a bud at its end
        around = rng.normal(0, 1, (2, count, 3)) * np.array([0.6, 0.012])[:, None, None]
        start = np.array(lesion.centre) + around[0] * max(lesion.radii)
        end = start + around[1]
        rows.append(_tubes(start, end, rng.integers(1, 3, count), 1.0))
        rows.append(_tubes(end, end + (0, 0, 0.004), 3, 0.9))
    for _ in range(rng.integers(1, 3) if patient.label == 2 and rng.random() < 0.3 else 0):
        side, first, t = rng.choice([-1, 1]), rng.uniform(0.2, 1.1), rng.uniform(0.35, 0.85)
        turns = first + np.linspace(0, rng.uniform(0.3, 0.7), 8)
        curve = np.array([_place(patient, side, turn, 0.86, t) for turn in turns])
        for lift in np.arange(-0.02, 0.021, 0.004):  # a sheet, cut as a line
            rows.append(_tubes(curve[:-1] + (0, 0, lift), curve[1:] + (0, 0, lift), 0, 0.5))
    return rows


def _lesion(rng: Generator, code: int, centre: Point, radius: float, **given) -> Lesion:
    """A lesion of that radius with everything else drawn, unless `given`."""
    ggo, radius = code == GGO, float(radius)
    shape = rng.uniform(0.65, 1.5)
    drawn = dict(
        radii=(radius * shape**0.5, radius / shape**0.5, radius * rng.uniform(1.2, 1.8)),
        angle=rng.uniform(0, np.pi),
        hu=rng.uniform(200, 400) if ggo else rng.uniform(-80, 50),
        edge=rng.uniform(0.01, 0.026) if ggo else rng.uniform(0.007, 0.014),
        waves=tuple((rng.normal(0, 0.06), rng.uniform(0, 2 * np.pi)) for _ in range(3)),
        rough=rng.uniform(0.03, 0.12) * radius,
        paving=rng.uniform(60, 220) if ggo and rng.random() < 0.3 else 0.0,
        mottle=rng.uniform(0.1, 0.5),
        bronchogram=float(rng.random() < 0.5),
    )
    return Lesion(code, centre, **(drawn | given))


def _meet(one: Lesion, other: Lesion) -> bool:
    """Whether two lesions may touch in a slice, or nearly so."""
    reach = sum(one.radii[:2] + other.radii[:2]) / 2 + 0.01
    apart = np.hypot(*np.subtract(one.centre[:2], other.centre[:2]))
    return apart < reach and abs(one.centre[2] - other.centre[2]) < one.radii[2] + other.radii[2]


def _sure_area(patient: Patient, lesion: Lesion, t: float) -> float:
    """What a rough outline leaves at least, as good as always, of `visible_area`."""
    inset = lesion.inset + (0.4 if patient.severe else 2) * lesion.rough
    return visible_area(patient, replace(lesion, inset=inset), t)


def _place(patient: Patient, side: int, turn: float, depth: float, t: float) -> Point:
    """The point at `depth` (0 inner .. 1 pleura) on a ray; turn 0 is lateral, pi/2 posterior."""
    cy, a, _ = chest.thorax(patient, t)
    x0, y0 = side * 0.55 * a, cy + 0.035
    across, down, steps = side * np.cos(turn), np.sin(turn), np.linspace(0, 0.4, 161)
    outside = chest.lung_level(patient, t, x0 + across * steps, y0 + down * steps) <= 0
    reach = steps[np.argmax(outside)]  # the first outside, or 0
    return float(x0 + across * depth * reach), float(y0 + down * depth * reach), HEIGHT * t


def draw_positions(patient: Patient, count: int) -> list[float]:
    """Draw `count` different slice positions of `POSITIONS`, in ascending order.

    Every slice shows a lesion of at least `MIN_AREA`, as in COVIDx-CT, where only such slices were
    kept. A control has none; its positions are drawn as if it had pneumonia or COVID-19, so that
    the position of a slice says nothing about its class.
    """
    if patient.label == 0:
        patient = _with_lesions(patient, 1 + patient.seed % 2)
    order = default_rng((patient.seed, patient.label, 4)).permutation(POSITIONS).tolist()
    shown = (t for t in order if any(_sure_area(patient, x, t) > MIN_AREA for x in patient.lesions))
    positions = list(itertools.islice(shown, count))
    if len(positions) < count:
        raise ValueError(f"{count} slices: this patient has only {len(positions)} with lesions")
    return sorted(positions)


def make_slice(
    seed: int, label: int, size: int = 256, position: float | None = None, hospital: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`render` a slice of `make_patient(seed, label)`; None: where labels 1 and 2 show a lesion."""
    patient = make_patient(seed, label)
    position = draw_positions(patient, 1)[0] if position is None else position
    return render(patient, position, size, hospital=hospital)


def old_friend(size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The slice that the book follows through its chapters; its patient is in no data set."""
    return make_slice(*FRIEND, size=size, position=FRIEND_POSITION)
