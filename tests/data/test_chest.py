"""Phantoms in Hounsfield units, the scanner that looks at them, and where their lungs are."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from numpy.random import default_rng

from covidmask.datasets import chest
from covidmask.datasets.chest import (
    CONSOLIDATION,
    GGO,
    HEIGHT,
    Lesion,
    draw,
    render,
    visible_lesions,
)
from covidmask.datasets.lungs import crop_box, find_lungs
from covidmask.datasets.patients import make_patient
from covidmask.datasets.scanner import Scanner, develop, draw_scanner, scan
from covidmask.errors import DataError

PLAIN = Scanner(cutoff=80, edge=0, noise=30, streak=0, motion=0, level=-600, width=1500, gamma=1,
                quality=0)  # fmt: skip


def digest(*arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def shown(patient):
    """A position at which the patient has a lesion."""
    return next(p for p in np.linspace(0.3, 0.85, 56) if visible_lesions(patient, float(p)))


@pytest.mark.parametrize(("label", "severe"), [(0, False), (1, False), (2, False), (2, True)])
def test_a_patient_is_the_same_in_every_process(label, severe):
    code = (
        "import hashlib\nfrom covidmask.datasets.chest import render\n"
        "from covidmask.datasets.patients import make_patient\n"
        f"arrays = render(make_patient(5, {label}, {severe}), 0.55, 96)\n"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in arrays)).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == digest(*render(make_patient(5, label, severe), 0.55, 96))


def test_seeds_labels_and_severity_give_different_patients():
    drawn = {
        digest(*render(make_patient(seed, label, severe), 0.5, 64))
        for seed in range(4)
        for label, severe in ((0, False), (1, False), (2, False), (2, True))
    }
    assert len(drawn) == 16


def test_tissues_have_their_hounsfield_units():
    lungs, blood, bone, fat = [], [], [], []
    for seed in range(12):
        patient = make_patient(seed, 0)
        hu, mask = draw(patient, 0.6, 256)
        lungs.append(np.median(hu[mask == 1]))
        grid = chest._Grid(patient, 0.6, 256)
        heart = hu[np.hypot(grid.x - 0.06, grid.y + 0.055) < 0.03]
        blood.append(np.median(heart) - patient.contrast)
        bone.append((hu > 320).mean())
        fat.append((np.abs(hu + 100) < 40).mean())
        assert hu[0, 0] < -950 and hu.max() < 1200
    assert min(lungs) > -900 and max(lungs) < -600
    assert min(blood) > 0 and max(blood) < 80
    assert min(bone) > 0.01 and max(bone) < 0.12
    assert min(fat) > 0.01


def test_contrast_medium_is_in_the_blood_alone():
    plain = next(p for p in map(make_patient, range(20), [0] * 20) if not p.contrast)
    before, after = (draw(replace(plain, contrast=c), 0.55, 128)[0] for c in (0.0, 150.0))
    more = (after - before)[after != before]
    assert more.min() > 0 and 140 < more.max() < 151  # heart, great and small vessels
    assert ((after - before)[before > 300] > 1).mean() < 0.05  # bone


def test_lobar_pneumonia_stops_at_the_fissure():
    patient, t = make_patient(3, 0), 0.5
    places = {"centre": (0.19, patient.fissure[0], HEIGHT * t), "radii": (0.08, 0.08, 0.1)}
    lesion = Lesion(CONSOLIDATION, angle=0, hu=30, edge=0.01, waves=(), **places)
    areas = {}
    for lobe in (0, -1, 1):
        one = replace(patient, lesions=(replace(lesion, lobe=lobe),))
        _, mask = draw(one, t, 256)
        grid = chest._Grid(one, t, 256)
        behind = chest.fissure_level(one, t, grid.x, grid.y)
        shown = mask == CONSOLIDATION
        areas[lobe] = shown.sum()
        if lobe:
            assert (lobe * behind[shown] > -0.06).all() and shown.any()
    assert areas[0] > 1.2 * max(areas[-1], areas[1])


def test_the_trachea_is_air_and_divides():
    for seed in range(8):
        patient = make_patient(seed, 0)
        counts = []
        for position in (0.25, 0.5):
            hu, mask = draw(patient, position, 256)
            grid = chest._Grid(patient, position, 256)
            airway = (hu < -850) & (mask == 0) & (np.hypot(grid.x, grid.y - 0.03) < 0.1)
            left, right = airway & (grid.x < -0.02), airway & (grid.x > 0.02)
            counts.append((int(left.sum()), int(right.sum()), int(airway.sum())))
        assert counts[0][2] > 60 and min(counts[1][:2]) > 3


@pytest.mark.parametrize("seed", range(4))
def test_neighbouring_slices_agree(seed):
    patient = make_patient(seed, 2, severe=True)
    positions = 0.6, 0.605, 0.75
    (near, mask), (other, other_mask), (far, _) = (draw(patient, p, 128) for p in positions)
    both = (mask > 0) & (other_mask > 0)
    assert 2 * both.sum() / ((mask > 0).sum() + (other_mask > 0).sum()) > 0.93
    lungs = mask > 0
    alike = np.corrcoef(near[lungs], other[lungs])[0, 1]
    assert alike > 0.8 and np.corrcoef(near[lungs], far[lungs])[0, 1] < 0.5


def test_lesions_do_not_depend_on_the_size():
    for seed in range(6):
        patient = make_patient(seed, 2, severe=True)
        at = shown(patient)
        shares = [[(draw(patient, at, size)[1] == k).mean() for k in (2, 3)] for size in (128, 256)]
        assert np.abs(np.subtract(*shares)).max() < 0.01


def test_a_lesion_is_drawn_exactly_where_it_is_visible():
    for seed in range(6):
        for label in range(3):
            patient = make_patient(seed, label)
            for position in (0.3, 0.5, 0.7):
                mask = draw(patient, position, 128)[1]
                assert bool(visible_lesions(patient, position)) == bool((mask > 1).any())


def one_lesion(code, **given):
    centre = (-0.2, 0.1, 0.5 * HEIGHT)
    shape = dict(radii=(0.09, 0.08, 0.1), angle=0.3, hu=250.0, edge=0.01, waves=())
    return Lesion(code, centre, **(shape | given))


def test_ground_glass_adds_density_and_leaves_vessels_visible():
    patient = replace(make_patient(3, 0), vessels=1.8)
    before, _ = draw(patient, 0.5, 256)
    after, mask = draw(replace(patient, lesions=(one_lesion(GGO, mottle=0.0),)), 0.5, 256)
    inside = mask == GGO
    lung = inside & (before < -700)
    assert 100 < np.median((after - before)[lung]) < 300
    vessels = inside & (before > -350)
    assert vessels.sum() > 10
    assert np.median(after[vessels]) > np.median(after[lung]) + 150


def test_consolidation_hides_vessels_and_shows_bronchi():
    patient = replace(make_patient(3, 0), vessels=1.8)
    drawn = {}
    for air in (0.0, 1.0):
        lesion = one_lesion(CONSOLIDATION, hu=20.0, mottle=0.0, bronchogram=air)
        hu, mask = draw(replace(patient, lesions=(lesion,)), 0.5, 256)
        drawn[air] = hu[mask == CONSOLIDATION]
    assert np.abs(np.median(drawn[0.0]) - 20) < 30
    assert (drawn[1.0] < -400).mean() > (drawn[0.0] < -400).mean() + 0.01


def test_a_reversed_halo_is_a_ring_and_a_rind_stays_below_the_pleura():
    patient = make_patient(3, 0)
    ring = draw(replace(patient, lesions=(one_lesion(CONSOLIDATION, hollow=0.02),)), 0.5, 256)[1]
    full = draw(replace(patient, lesions=(one_lesion(CONSOLIDATION),)), 0.5, 256)[1]
    grid = chest._Grid(patient, 0.5, 256)
    middle = np.hypot(grid.x + 0.2, grid.y - 0.1) < 0.02
    assert (full[middle] == CONSOLIDATION).all() and not (ring[middle] == CONSOLIDATION).any()
    assert 0.1 < (ring == CONSOLIDATION).sum() / (full == CONSOLIDATION).sum() < 0.7
    wide = one_lesion(GGO, radii=(0.3, 0.3, 0.3), rind=0.03)
    mask = draw(replace(patient, lesions=(wide,)), 0.5, 256)[1]
    depth = chest._wall_level(patient, 0.5, grid.x, grid.y)
    assert (mask == GGO).sum() > 300 and depth[mask == GGO].max() < 0.04


def test_covid_is_more_outer_lower_and_on_both_sides_and_severe_is_larger():
    depth, height, both, number = {}, {}, {}, {}
    for label in (1, 2):
        patients = [make_patient(seed, label) for seed in range(120)]
        lesions = [(patient, lesion) for patient in patients for lesion in patient.lesions]
        number[label] = len(lesions)
        height[label] = np.mean([lesion.centre[2] / HEIGHT for _, lesion in lesions])
        depth[label] = np.mean(
            [
                float(chest._wall_level(patient, z / HEIGHT, np.float64(x), np.float64(y)))
                for patient, lesion in lesions
                for x, y, z in [lesion.centre]
            ]
        )
        sides = [{lesion.centre[0] > 0 for lesion in patient.lesions} for patient in patients]
        both[label] = np.mean([len(side) == 2 for side in sides])
    assert number[2] > 2 * number[1]
    assert depth[2] < depth[1] - 0.005
    assert height[2] > height[1] + 0.05
    assert both[2] > 0.9 and both[1] < 0.6
    share = {}
    for severe in (False, True):
        masks = [draw(make_patient(seed, 2, severe), 0.6, 96)[1] for seed in range(30)]
        share[severe] = [(mask > 1).sum() / (mask > 0).sum() for mask in masks]
    assert np.mean(share[True]) > 1.5 * np.mean(share[False])
    assert np.max(share[True]) > 0.4


@pytest.mark.parametrize(
    "call",
    [
        lambda: make_patient(-1, 0),
        lambda: make_patient(0, 3),
        lambda: draw(make_patient(0, 0), 1.1, 64),
        lambda: draw(make_patient(0, 0), float("nan"), 64),
        lambda: draw(make_patient(0, 0), 0.5, 31),
        lambda: draw(make_patient(0, 0), 0.5, 1025),
    ],
)
def test_what_cannot_be_drawn_is_refused(call):
    with pytest.raises(ValueError, match="must"):
        call()


def test_noise_has_the_spectrum_of_a_scanner_and_the_strength_that_was_asked_for():
    hu = np.full((256, 256), -850, np.float32)
    noise = scan(hu, PLAIN, default_rng(0)) + 850
    power = np.abs(np.fft.fft2(noise)) ** 2
    f = np.hypot(*np.meshgrid(*[np.fft.fftfreq(256) * 256] * 2))
    low, middle, high = (power[(f > a) & (f < b)].mean() for a, b in ((1, 8), (40, 70), (120, 180)))
    assert low < 0.5 * middle and high < 0.2 * middle
    calm = scan(hu, replace(PLAIN, noise=10), default_rng(0)) + 850
    assert 2.9 < noise.std() / calm.std() < 3.1
    dense = hu.copy()
    dense[:, 60:200] = 800  # bone absorbs: more noise in these rows than in air
    assert (scan(dense, PLAIN, default_rng(0)) - dense)[:, 100:150].std() > 1.5 * noise.std()


def test_a_sharp_kernel_keeps_more_of_an_edge():
    hu = np.full((128, 128), -850, np.float32)
    hu[:, 64:] = 40
    silent = replace(PLAIN, noise=1e-6)
    soft, sharp = (scan(hu, replace(silent, cutoff=c), default_rng(0))[64] for c in (25, 60))
    assert np.abs(np.diff(sharp)).max() > 1.3 * np.abs(np.diff(soft)).max()
    over = scan(hu, replace(silent, cutoff=60, edge=0.6), default_rng(0))[64]
    assert over[66:80].max() > sharp[66:80].max() + 10  # it overshoots


def test_pictures_are_windowed_and_jpeg_loses_a_little():
    hu = np.linspace(-1500, 500, 64 * 64, dtype=np.float32).reshape(64, 64)
    grey = develop(hu, PLAIN)
    assert grey.min() == 0 and grey.max() == 1 and grey.dtype == np.float32
    assert abs(grey[np.abs(hu + 600).argmin() // 64].mean() - 0.5) < 0.02
    packed = develop(hu, replace(PLAIN, quality=50))
    assert 0 < np.abs(packed - grey).mean() < 0.05


def test_two_hospitals_differ_and_published_pictures_vary_more():
    def many(**given):
        drawn = [draw_scanner(default_rng(seed), **given) for seed in range(60)]
        return np.array([[s.cutoff, s.noise, s.level, s.width] for s in drawn])

    one, other, published = many(), many(hospital=1), many(published=True)
    assert (other.mean(0)[:2] > 1.15 * one.mean(0)[:2]).all()
    assert other.mean(0)[3] < one.mean(0)[3] - 150
    assert (published.std(0)[1:] > 1.5 * one.std(0)[1:]).all()


def test_lungs_are_found_in_phantoms():
    for seed in range(8):
        patient = replace(make_patient(seed, seed % 3), fluid=(0.0, 0.0))
        hu, mask = draw(patient, 0.55, 256)
        found = find_lungs(scan(hu, PLAIN, default_rng(seed)))
        aerated = np.isin(mask, (1, 2))  # consolidation at the pleura looks like the chest wall
        assert (found & aerated).sum() > 0.9 * aerated.sum()
        assert (found & (mask > 0)).sum() > 0.9 * found.sum()
        rows, columns = crop_box(found)
        assert (mask[rows, columns] > 0).sum() > 0.97 * (mask > 0).sum()
        assert (rows.stop - rows.start) * (columns.stop - columns.start) < 0.75 * mask.size


@pytest.mark.parametrize("value", [-1000.0, 40.0])
def test_no_lungs_are_found_where_there_are_none(value):
    found = find_lungs(np.full((128, 100), value, np.float32))
    assert found.shape == (128, 100) and not found.any()
    assert crop_box(found) == (slice(0, 128), slice(0, 100))


def test_lungs_need_one_slice():
    with pytest.raises(DataError, match=r"one slice \[H, W\]"):
        find_lungs(np.zeros((4, 64, 64)))
