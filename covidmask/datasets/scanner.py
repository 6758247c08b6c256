"""From Hounsfield units to a published picture: blur, noise, streaks, windows, JPEG and crops."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy.fft import irfft2, rfft2
from scipy.ndimage import gaussian_filter1d, shift, uniform_filter1d


@dataclass(frozen=True)
class Scanner:
    """One patient's examination. Frequencies are in cycles per image side."""

    cutoff: float  # where a kernel without `edge` has fallen to half: soft 100, sharp 200
    edge: float  # gain at half the cutoff: a sharp kernel overshoots
    noise: float  # standard deviation, HU, in rows that absorb as -300 HU do; more in others
    streak: float  # strength of the streaks between the shoulders
    motion: float  # weight of a second image, 0..1
    level: float  # of the window, HU
    width: float
    gamma: float  # of the picture
    quality: int  # of its JPEG; 0: none


def draw_scanner(rng: Generator, hospital: int = 0, published: bool = False) -> Scanner:
    """Draw how a patient is scanned.

    Args:
        hospital: 0 has a middling kernel and dose; 1 a sharp kernel, less dose, another window.
        published: with windows, contrast and JPEG as various as in pictures of papers.
    """
    sharp = rng.random() < (0.85 if hospital else 0.35)
    scanner = dict(
        cutoff=rng.uniform(140, 240) if sharp else rng.uniform(80, 140),
        edge=rng.uniform(0.15, 0.6) if sharp else rng.uniform(0, 0.1),
        noise=rng.uniform(18, 42) * (1.6 if hospital else 1),
        streak=rng.uniform(0, 1) ** 2,
        motion=rng.uniform(0.1, 0.4) if rng.random() < 0.2 else 0.0,
        level=-600 + rng.normal(0, 25) + (60 if hospital else 0),
        width=1500 + rng.normal(0, 60) - (250 if hospital else 0),
        gamma=1.0,
        quality=0,
    )
    if published:
        white, black = rng.uniform(0.72, 1.08), rng.uniform(0.03, 0.28)  # of tissue and of lung
        width = 900 / (white - black)
        scanner |= dict(
            noise=np.exp(rng.uniform(np.log(24), np.log(75))),
            level=40 + (0.5 - white) * width,
            width=width,
            gamma=np.exp(rng.normal(0, 0.15)),
            quality=int(rng.integers(45, 97)),
        )
    return Scanner(**scanner)


def scan(hu: np.ndarray, scanner: Scanner, rng: Generator, shoulders: float = 0.0) -> np.ndarray:
    """HU float32 [size, size] as the scanner gives it: blurred, noisy, with streaks and motion.

    Noise has the spectrum of filtered back projection: little of the lowest frequencies, most in
    the middle, and none beyond the kernel; there is more of it where the body absorbs more.
    """
    size = hu.shape[0]
    fy = np.fft.fftfreq(size)[:, None].astype(np.float32) * size
    fx = np.fft.rfftfreq(size)[None, :].astype(np.float32) * size
    ratio = np.sqrt(fx * fx + fy * fy) / scanner.cutoff
    kernel = np.exp2(-(ratio**2)) * (1 + scanner.edge * 4 * ratio * np.exp(-2 * ratio))
    white = rng.standard_normal(hu.shape, dtype=np.float32)
    power = np.sqrt(np.minimum(ratio, 1.5) + 0.03) * kernel
    grain = irfft2(rfft2(white) * power, s=hu.shape)
    absorbed = uniform_filter1d(np.clip(hu, -1000, 1000) + 1000, size, axis=1, mode="nearest")
    grain *= scanner.noise / grain.std() * np.exp((absorbed - 700) / 700)
    seen = irfft2(rfft2(hu) * kernel, s=hu.shape)
    if scanner.motion:
        way = rng.uniform(0, 2 * np.pi)
        by = 0.012 * size * np.array([np.sin(way), np.cos(way)])
        seen += scanner.motion * (shift(seen, by, order=1, mode="nearest") - seen)
    if shoulders and scanner.streak:
        lines = gaussian_filter1d(white, size / 12, axis=1)
        seen += 160 * shoulders * scanner.streak * lines / lines.std() * 0.25
    return (seen + grain).astype(np.float32)


def develop(hu: np.ndarray, scanner: Scanner) -> np.ndarray:
    """The picture float32 in 0..1: window, contrast, 8 bits, JPEG."""
    low = scanner.level - scanner.width / 2
    grey = np.clip((hu - low) / scanner.width, 0, 1)
    if scanner.gamma != 1:
        grey = grey**scanner.gamma
    if not scanner.quality:
        return grey.astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(np.round(255 * grey).astype(np.uint8)).save(
        file, "JPEG", quality=scanner.quality
    )
    return np.asarray(Image.open(file), np.float32) / 255
