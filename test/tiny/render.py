#!/usr/bin/env python3
"""Renders what a telescope sees: the images that the shipped model learns from, with the truth about each.

    render(seed, size=112, cls=None) -> (uint8 [size,size,3], info)      a pure function of its arguments

An image is made in the order in which nature and the photographer make it:
    light      one function per class (they stand under CLASSES' names) adds the object's light and states what is true
    stars      field stars with a power-law flux distribution, conspicuous ones that a human can count
    optics     point spread function (two Gaussians: core and wings), ghosts, satellites, blur
    camera     shot and read noise, sky, bad columns, cosmic rays
    darkroom   asinh/gamma/linear stretch, black point, saturation, tint, fading edges, sharpening, JPEG
    frame      padded to a square with the mean colour and resized, as LLaVA does
Light is linear, float32 [3,h,w], and 1 is about the level that the photographer makes white. Lengths are pixels of the
rendered frame unless a name says otherwise. Only numpy, scipy and Pillow.

    python render.py --sheet OUT.png [--seed0 N] [--per-class K] [--only CLASS]
    python render.py --pool DIR --start A --count N --workers W
    python render.py --time
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
import argparse, functools, io, json, math, time

import numpy as np
import scipy.fft
from PIL import Image, ImageDraw
from scipy import ndimage

CLASSES = ('disturbed', 'merging', 'round_smooth', 'in_between_smooth', 'cigar_smooth', 'barred_spiral',
           'tight_spiral', 'loose_spiral', 'edge_on_no_bulge', 'edge_on_bulge', 'globular_cluster', 'open_cluster',
           'planetary_nebula', 'emission_nebula', 'supernova_remnant', 'dark_nebula', 'ringed_planet', 'banded_planet',
           'cratered_moon', 'comet', 'gravitational_lens', 'star_field')
NATURAL = CLASSES[:12] + ('cratered_moon', 'star_field')   # objects whose own light is never green or pink
TAU = 2 * math.pi
f32 = np.float32


def rgb(*c):
    return np.array(c, f32).reshape(3, 1, 1)


REDDEN = rgb(0.65, 1.0, 1.45)                     # dust absorbs blue more than red
OLD, YOUNG, HII = rgb(1.0, 0.80, 0.55), rgb(0.62, 0.78, 1.0), rgb(1.0, 0.45, 0.55)


# ---------------------------------------------------------------------------------------------------- chance and grids

class Rng:
    """numpy's generator with the few draws used here; plain floats, so that float32 arrays stay float32."""
    def __init__(self, seed):
        self.g = np.random.default_rng(seed)
    def u(self, a=0.0, b=1.0):
        return a + (b - a) * float(self.g.random())
    def lu(self, a, b):                           # uniform in the logarithm
        return math.exp(self.u(math.log(a), math.log(b)))
    def n(self, s=1.0):
        return s * float(self.g.standard_normal())
    def p(self, q):
        return float(self.g.random()) < q
    def i(self, a, b):                            # a..b, both included
        return int(self.g.integers(a, b + 1))
    def pick(self, seq):
        return seq[int(self.g.integers(0, len(seq)))]
    def color(self, *cs):                         # a random mixture of colours
        w = self.g.random(len(cs)) ** 2 + 1e-3
        return sum(c * float(x) for c, x in zip(cs, w / w.sum()))


@functools.lru_cache(maxsize=64)
def grid(h, w):
    y, x = np.mgrid[0:h, 0:w].astype(f32)
    return y, x


@functools.lru_cache(maxsize=64)
def freq2(h, w):
    """k^2 of each rfft2 bin, cycles per pixel squared."""
    ky, kx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    return (ky * ky + kx * kx).astype(f32)


@functools.lru_cache(maxsize=64)
def spectrum(h, w, beta10, outer10):
    """Amplitude k^(-beta/2) of fractal noise, flat beyond the outer scale (fraction of the frame)."""
    k0 = 1.0 / (outer10 / 10 * max(h, w))
    a = (freq2(h, w) + k0 * k0) ** (-beta10 / 40)
    a[0, 0] = 0
    return a.astype(f32)


class Scene:
    """One frame while it is made: light [3,h,w], the object's own light, and what is true about it."""
    def __init__(self, rng, cls):
        R = self.R = rng
        if R.p(0.8):
            self.h = self.w = R.pick((112, 120, 128, 128, 128, 144, 160))
        else:
            self.h, self.w = R.pick(((96, 128), (108, 144), (90, 160), (128, 96), (144, 108), (112, 168), (128, 104)))
        self.s = min(self.h, self.w)
        self.y, self.x = grid(self.h, self.w)
        self.light = np.zeros((3, self.h, self.w), f32)
        self.info = {'class': cls, 'bar': None, 'arms': None, 'orientation': None, 'color': 'gray', 'position': None,
                     'extent': None, 'bright_stars': None, 'odd': None, 'rings': None, 'tail': None,
                     'dust_lane': None, 'n_galaxies': None, 'mono': False}
        self.center, self.radius = None, None     # where the object is, half its width
        self.field = R.lu(15, 260) if R.p(0.9) else R.lu(400, 1500)    # how many field stars
        self.countable = self.field < 300         # may bright stars be counted in this frame?
        self.clear = []                           # (x, y, r): where no bright star may stand
        self.trail = None                         # (dx, dy): stars drawn as trails
        self.fill = False                         # a frame-filling subject: no fading by object
        self.planet, self.sharp = False, 1.0      # black sky around; below 1: sharper than usual
        self.field_hi = 1.6                       # the brightest field stars

    def fractal(self, beta=3.0, outer=1.0):
        """Gaussian random field with power spectrum k^-beta, mean 0, deviation 1."""
        a = spectrum(self.h, self.w, int(beta * 10), int(outer * 10))
        z = self.R.g.standard_normal((2,) + a.shape, dtype=f32)
        f = scipy.fft.irfft2((z[0] + 1j * z[1]) * a, s=(self.h, self.w))
        return (f / (f.std() + 1e-9)).astype(f32)

    def polar(self, cx, cy, q=1.0, pa=0.0):
        """u along the major axis at angle pa, v across it stretched by 1/q, radius and angle."""
        c, s = math.cos(pa), math.sin(pa)
        dx, dy = self.x - cx, self.y - cy
        u, v = dx * c + dy * s, (dy * c - dx * s) / q
        return u, v, np.hypot(u, v)

    def place(self, radius, wander=0.24, cut=0.06):
        """A centre for an object of that radius: mostly wholly inside, sometimes far off-centre and partly cut."""
        R = self.R
        if R.p(cut):
            cx, cy = R.u(0.12, 0.88) * self.w, R.u(0.12, 0.88) * self.h
        elif R.p(0.35):
            cx, cy = self.w / 2 + R.n(0.02) * self.w, self.h / 2 + R.n(0.02) * self.h
        else:
            mx = max(0.0, min(wander * self.w, self.w / 2 - 0.75 * radius))
            my = max(0.0, min(wander * self.h, self.h / 2 - 0.75 * radius))
            cx, cy = self.w / 2 + R.u(-mx, mx), self.h / 2 + R.u(-my, my)
        self.center, self.radius = (cx, cy), radius
        return cx, cy

    def points(self, xs, ys, flux, colors=None, out=None):
        """Adds point sources, their flux shared bilinearly by four pixels. colors [3,n] or None (white)."""
        out = self.light if out is None else out
        h, w = self.h, self.w
        ok = (xs >= 0) & (ys >= 0) & (xs < w - 1) & (ys < h - 1)
        xs, ys, flux = xs[ok], ys[ok], flux[ok]
        ix, iy = xs.astype(np.int64), ys.astype(np.int64)
        fx, fy = xs - ix, ys - iy
        at = np.concatenate([iy * w + ix, iy * w + ix + 1, iy * w + w + ix, iy * w + w + ix + 1])
        wt = np.concatenate([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy]) * np.tile(flux, 4)
        if colors is None:
            out += np.bincount(at, wt, h * w).reshape(h, w).astype(f32)
        else:
            colors = colors[:, ok]
            for c in range(3):
                out[c] += np.bincount(at, wt * np.tile(colors[c], 4), h * w).reshape(h, w).astype(f32)

    def stroke(self, xs, ys, weight, sigma):
        """A soft brush along a curve, its peak about 1: points blurred by a Gaussian."""
        m = np.zeros((1, self.h, self.w), f32)
        self.points(np.asarray(xs), np.asarray(ys), np.broadcast_to(weight, np.shape(xs)).astype(float), out=m)
        m = ndimage.gaussian_filter(m[0], sigma, truncate=3)
        return m / (m.max() + 1e-9)


def sersic(r, re, n):
    """Sersic law, exp(-b (r/re)^(1/n)), b = 2n - 1/3 + ...; the core softened to a pixel, 1 at the centre."""
    b = 2 * n - 1 / 3 + 0.009876 / n
    soft = np.sqrt(r * r + 0.6)
    out = np.exp(-b * (soft / re) ** (1 / n))
    return out / math.exp(-b * (math.sqrt(0.6) / re) ** (1 / n))


def sigmoid(x):
    return 0.5 + 0.5 * np.tanh(0.5 * x)


STAR_T = np.array([[1, .55, .30], [1, .78, .52], [1, .94, .82], [.90, .95, 1], [.70, .82, 1], [.58, .72, 1]], f32).T


def star_colors(t):
    """Black-body-like colours [3,n]: t 0 (cool, orange) .. 1 (hot, blue)."""
    t = np.clip(np.asarray(t, float), 0, 1) * 5
    return np.stack([np.interp(t, np.arange(6), c) for c in STAR_T])


def power_law(g, n, lo, hi, slope):
    """n fluxes between lo and hi with dN/dF ~ F^-slope (slope != 1)."""
    a = 1 - slope
    return (lo ** a + g.random(n) * (hi ** a - lo ** a)) ** (1 / a)


# ------------------------------------------------------------------------------------------------------------ galaxies

def disc(S, cx, cy, R, incl, pa, m=2, pitch=0.3, bar=0.0, bulge=0.3, contrast=1.0, wobble=0.5, lop=0.0, young=None,
         clumps=0.5, dust=0.6, inner=None):
    """A disc galaxy seen at inclination incl, R its visible radius: exponential disc, m logarithmic arms
    r = r0 exp(theta tan(pitch)), knots of young stars on them, dust on their inner sides, a bar, a Sersic bulge."""
    G = S.R
    cosi = max(math.cos(incl), 0.18)
    u, v, r = S.polar(cx, cy, cosi, pa)
    r = r / R + 0.004
    theta = np.arctan2(v, u)
    n1, n2 = S.fractal(3.0, 0.4), S.fractal(2.4, 0.3)
    thb = G.u(-0.9, 0.9) if incl > 0.6 else G.u(0, TAU)
    r0 = bar if bar else (inner or G.u(0.08, 0.16))
    sense = G.pick((-1.0, 1.0))
    phase = m * (theta - sense * np.log(r / r0) / math.tan(pitch) - thb) + wobble * n1
    kappa = G.u(1.2, 3.0)
    starts = sigmoid((r - r0 * 0.95) / 0.03)
    arm = np.exp(kappa * (np.cos(phase) - 1)) * starts
    edge = sigmoid((1 - r) / 0.07)
    expo = np.exp(-r * G.u(2.0, 3.3)) * edge
    if lop:
        expo = expo * np.clip(1 + lop * np.cos(theta - G.u(0, TAU)) * np.minimum(r * 2, 1), 0.05, 3)
    young = G.color(YOUNG, rgb(0.9, 0.93, 1.0), rgb(1.0, 0.88, 0.7)) if young is None else young
    old = G.color(OLD, rgb(1, 0.9, 0.75), rgb(1, 0.7, 0.4))
    base = G.u(0.14, 0.35) if G.p(0.55) else G.u(0.35, 0.8)
    body = expo * np.maximum(1 + 0.15 * n2, 0.2)
    light = body * base * 0.5 * (old + young) + contrast * expo * arm * np.clip(0.75 + 0.4 * n2, 0.1, 3) * young
    knots = np.maximum(n2 - 1.0, 0) * arm * edge * np.exp(-r * 1.4) * clumps
    light = light + knots * G.color(HII, YOUNG, young)
    if dust:
        lane = np.exp(3.0 * (np.cos(phase + sense * 0.9) - 1)) * starts * edge
        light = light * np.exp(-REDDEN * (dust * lane * np.clip(0.8 + 0.5 * n1, 0, 2)))
    if bar:
        c, s = math.cos(thb), math.sin(thb)
        ub, vb = (u * c + v * s) / R, (v * c - u * s) / R
        rod = np.exp(-(np.abs(ub) / bar) ** G.u(2, 4) - (np.abs(vb) / G.u(0.055, 0.11)) ** G.u(1.3, 2.2))
        light = light + rod * G.u(0.5, 0.8) * old
        if G.p(0.3):
            light = light + np.exp(-((r - bar) / 0.05) ** 2) * 0.2 * young
    _, _, rb = S.polar(cx, cy, max(cosi, 0.6 + 0.4 * cosi), pa)
    light = light + bulge * G.u(1.2, 2.6) * sersic(rb, R * G.u(0.07, 0.17), G.u(0.9, 2.5)) * old
    return (light * (0.55 * G.u(0.7, 1.3))).astype(f32)


def spiral_frame(S, m, pitch, bar, steep=1.08, soft=0.0, **kw):
    """What the three classes of spirals share: size, inclination, labels. Some are soft, as in most photographs: seen
    aslant, faint arms in a smooth disc, a yellow heart in blue surroundings; their arms cannot be counted."""
    G = S.R
    soft = G.p(soft)
    if soft:
        steep = 1.29
        kw.update(contrast=G.u(0.25, 0.55), bulge=G.u(0.6, 1.4), clumps=G.u(0, 0.3), young=G.color(YOUNG, rgb(0.8, 0.85, 1.0), OLD))
    R = S.s * (G.u(0.2, 0.5) if G.p(0.9) else G.u(0.5, 0.62))
    face = G.p(0.25 if soft else 0.5)
    incl = G.u(0, 0.45) if face else G.u(0.72, steep)
    cx, cy = S.place(R * 0.8)
    S.radius = R * 0.9
    S.light += disc(S, cx, cy, R, incl, G.u(0, TAU), m, pitch, bar, **kw)
    S.clear.append((cx, cy, R * 0.55))
    S.info.update(orientation='face-on' if face else 'inclined', n_galaxies=1, bar='yes' if bar else 'no')
    edge = min(cx, S.w - cx, cy, S.h - cy)
    S.sharp_arms = R > 0.24 * S.s and incl < 1.1 and edge > 0.55 * R
    S.sharp_arms = S.sharp_arms and not soft
    S.info['arms'] = m if S.sharp_arms else None
    if G.p(0.3):
        S.field = G.lu(200, 900)
        S.countable = S.field < 400
    distant_galaxies(S)


def barred_spiral(S):
    G = S.R
    strong = G.p(0.8)
    spiral_frame(S, 2, math.radians(G.u(13, 30)), G.u(0.27, 0.42), bulge=G.u(0.2, 0.6), wobble=G.u(0.1, 0.45),
                 contrast=G.u(0.8, 1.5) if strong else G.u(0.3, 0.5), dust=G.u(0, 0.6), clumps=G.u(0, 0.6), soft=0.12)
    if not strong:
        S.info['arms'] = None


def tight_spiral(S):
    G = S.R
    m = 2 if G.p(0.75) else G.i(3, 4)
    spiral_frame(S, m, math.radians(G.u(8, 14)), 0.0, bulge=G.u(0.4, 1.0), wobble=G.u(0.15, 0.6),
                 contrast=G.u(0.6, 1.4), dust=G.u(0.3, 1.3), clumps=G.u(0, 0.5), inner=G.u(0.12, 0.2), steep=1.24, soft=0.35)
    S.info['arms'] = 2 if m == 2 and S.sharp_arms and S.radius > 0.3 * S.s else None


def loose_spiral(S):
    G = S.R
    m = G.pick((2, 2, 2, 3, 3, 4))
    spiral_frame(S, m, math.radians(G.u(20, 38) if m < 4 else G.u(24, 38)), 0.0, bulge=G.u(0.12, 0.5),
                 wobble=G.u(0.1, 0.55), contrast=G.u(1.0, 1.7), dust=G.u(0, 0.6), clumps=G.u(0.2, 1.2), soft=0.1)


def distant_galaxies(S):
    """A few tiny, faint galaxies behind."""
    G = S.R
    for _ in range(G.i(0, 3) if G.p(0.5) else 0):
        _, _, r = S.polar(G.u(0, S.w), G.u(0, S.h), G.u(0.3, 1), G.u(0, TAU))
        S.light += G.u(0.05, 0.2) * sersic(r, G.u(1, 2.2), 1.0) * G.color(OLD, YOUNG, rgb(1, 1, 1))


def smooth_frame(S, q_lo, q_hi, size_lo, size_hi):
    """An elliptical: one Sersic profile of axis ratio q, no structure."""
    G = S.R
    a = S.s * G.lu(size_lo, size_hi)               # the visible semi-major axis
    q, pa = G.u(q_lo, q_hi), G.u(0, TAU)
    cx, cy = S.place(a)
    _, _, r = S.polar(cx, cy, q, pa)
    n = G.u(0.9, 4.0)
    re = a * (0.42 if n < 2 else 0.30)
    body = sersic(np.sqrt(r * r + (G.u(0, 0.12) * a) ** 2), re, n)
    body /= body.max()
    gain = G.lu(0.5, 2.0) * (1.0 if n < 2.5 else 1.8)
    outer = G.color(rgb(1, 0.9, 0.75), rgb(1, 0.75, 0.45), rgb(0.92, 0.95, 1), rgb(1, 0.98, 0.95))
    inner = outer * rgb(1.0, G.u(0.85, 1), G.u(0.7, 1))
    t = np.exp(-r / (0.3 * a))
    S.light += gain * body * (outer * (1 - t) + inner * t)
    if G.p(0.25):                                  # a faint round halo of stars
        S.light += 0.05 * gain * sersic(r, 1.0 * a, 1.0) * outer
    S.clear.append((cx, cy, 0.8 * a))
    S.info.update(bar='no', arms=0, n_galaxies=1)
    distant_galaxies(S)


def round_smooth(S):
    smooth_frame(S, 0.88, 1.0, 0.1, 0.42)


def in_between_smooth(S):
    smooth_frame(S, 0.47, 0.72, 0.13, 0.46)


def cigar_smooth(S):
    smooth_frame(S, 0.20, 0.32, 0.16, 0.5)


def edge_on_frame(S, has_bulge):
    """A disc from the side: exp(-|u|/h) sech^2(v/z), dust lane exp(-tau), perhaps a flattened bulge, a slight warp."""
    G = S.R
    a = S.s * (G.u(0.22, 0.52) if G.p(0.85) else G.u(0.5, 0.75))
    pa = G.u(0, TAU)
    cx, cy = S.place(a * 0.8)
    S.radius = a * max(abs(math.cos(pa)), 0.35)
    u, v, _ = S.polar(cx, cy, 1.0, pa)
    n2 = S.fractal(2.6, 0.25)
    v = v + G.n(0.015) * u * np.abs(u) / a         # warp
    z = a * (G.u(0.03, 0.065) if has_bulge else G.u(0.035, 0.075)) + 0.35
    edge = sigmoid((1 - np.abs(u) / a) / 0.07)
    plane = np.exp(-np.abs(u) / (a * G.u(0.35, 0.7))) / np.cosh(np.clip(v / z, -20, 20)) ** 2 * edge
    young = G.color(YOUNG, rgb(0.95, 0.95, 1.0), rgb(1, 0.85, 0.6))
    old = G.color(OLD, rgb(1, 0.92, 0.8), rgb(1, 0.72, 0.4))
    grain = np.clip(1 + G.u(0, 0.35) * n2, 0.3, 2)
    light = plane * grain * 0.9 * (young if not has_bulge else 0.5 * (old + young))
    if has_bulge:
        b = a * (G.u(0.13, 0.26) if G.p(0.75) else G.u(0.26, 0.42))
        _, _, r = S.polar(cx, cy, G.u(0.62, 0.95), pa)
        core = sersic(r, b * 0.55, G.u(0.8, 1.6))
        light = light + G.u(0.9, 1.8) * core * old
        if b > 0.26 * a:
            light = light + 0.25 * sersic(r, b, 1.5) * old
    lane = G.p(0.55)
    if lane:
        off = G.n(0.15) * z
        shape = np.exp(-((v - off) / (0.33 * z + 0.35)) ** 2) * sigmoid((0.85 - np.abs(u) / a) / 0.06)
        light = light * np.exp(-REDDEN * (G.u(1.4, 2.6) * shape * np.clip(1 + 0.3 * n2, 0.3, 2)))
    S.light += (light * G.lu(0.5, 1.5)).astype(f32)
    S.clear.append((cx, cy, 0.3 * a))
    for t in (-0.6, 0.6):
        S.clear.append((cx + t * a * math.cos(pa), cy + t * a * math.sin(pa), 0.2 * a))
    lane_seen = 'yes' if lane and z > 2.2 else None if lane else 'no' if z > 2.0 else None
    S.info.update(orientation='edge-on', n_galaxies=1, dust_lane=lane_seen)
    distant_galaxies(S)


def edge_on_no_bulge(S):
    edge_on_frame(S, False)


def edge_on_bulge(S):
    edge_on_frame(S, True)


def tidal_tail(S, cx, cy, R, length, curl, start):
    """A tail thrown out by a collision: a curve that leaves the galaxy and bends, fading as it goes."""
    t = np.linspace(0, 1, 160)
    r, a = R * (0.35 + length * t), start + curl * t
    m = S.stroke(cx + r * np.cos(a), cy + r * np.sin(a), (1.1 - t) ** 0.8, S.R.u(0.05, 0.11) * R + 0.8)
    return m * np.clip(0.8 + 0.35 * S.fractal(2.6, 0.3), 0.15, 2)


def ragged(S, cx, cy, R):
    """A galaxy knocked out of shape: a disc or a spheroid seen through warped coordinates."""
    G = S.R
    if G.p(0.6):
        light = disc(S, cx, cy, R, G.u(0.2, 1.1), G.u(0, TAU), G.pick((1, 2, 2)), math.radians(G.u(15, 45)), 0.0,
                     bulge=G.u(0.2, 0.7), contrast=G.u(0.3, 1.1), wobble=G.u(0.8, 1.8), lop=G.u(0.4, 0.9),
                     clumps=G.u(0.2, 1.4), dust=G.u(0, 1.2))
    else:
        _, _, r = S.polar(cx, cy, G.u(0.5, 0.95), G.u(0, TAU))
        light = G.u(0.5, 1.2) * sersic(r, R * 0.3, G.u(1, 3)) * G.color(OLD, rgb(1, 1, 1), YOUNG)
    amp = R * G.u(0.04, 0.12)
    at = [S.y + amp * S.fractal(3.6, 0.4), S.x + amp * S.fractal(3.6, 0.4)]
    return np.stack([ndimage.map_coordinates(c, at, order=1) for c in light.astype(f32)])


def disturbed(S):
    """One galaxy with tails, shells, plumes or a lopsided disc."""
    G = S.R
    R = S.s * G.u(0.17, 0.34)
    cx, cy = S.place(R * 1.2)
    S.radius = R * 1.1
    light = ragged(S, cx, cy, R)
    tint = G.color(YOUNG, rgb(1, 0.95, 0.85), OLD)
    start = G.u(0, TAU)
    kind = G.pick(('tail', 'tail', 'tails', 'shells', 'plume'))
    if kind in ('tail', 'tails'):
        for k in range(2 if kind == 'tails' else 1):
            light = light + G.u(0.16, 0.4) * tidal_tail(S, cx, cy, R, G.u(0.9, 1.8), G.u(0.8, 2.4) * G.pick((-1, 1)),
                                                        start + k * G.u(2, 4)) * tint
    elif kind == 'shells':                         # arcs of stars from a swallowed companion
        _, _, r = S.polar(cx, cy, G.u(0.75, 1), G.u(0, TAU))
        th = np.arctan2(S.y - cy, S.x - cx)
        for k in range(G.i(2, 4)):
            rs, w = R * G.u(0.5, 1.4), G.u(0.5, 1.2)
            fade = np.exp(w * 2 * (np.cos(th - start - (k % 2) * math.pi - G.n(0.4)) - 1))
            light = light + G.u(0.1, 0.25) * sigmoid((rs - r) / 0.8) * np.exp(-np.maximum(rs - r, 0) / (0.14 * R)) \
                * fade * tint
    if kind == 'plume' or G.p(0.3):
        px, py = cx + R * G.u(0.5, 0.9) * math.cos(start), cy + R * G.u(0.5, 0.9) * math.sin(start)
        _, _, r = S.polar(px, py, G.u(0.3, 0.6), start + G.n(0.5))
        light = light + G.u(0.08, 0.22) * sersic(r, R * 0.5, 0.7) * np.clip(1 + 0.6 * S.fractal(2.6, 0.3), 0, 3) * tint
    S.light += light.astype(f32)
    S.clear.append((cx, cy, R))
    S.info['n_galaxies'] = 1
    distant_galaxies(S)


def merging(S):
    """Two galaxies with two separate cores, bridged, with tails."""
    G = S.R
    R1 = S.s * G.u(0.13, 0.23)
    R2 = R1 * G.u(0.5, 1.0)
    d, a = (R1 + R2) * G.u(0.6, 1.05), G.u(0, TAU)
    cx, cy = S.place((R1 + R2) * 0.9)
    S.radius = 0.5 * d + 0.8 * R1
    at = [(cx - d / 2 * math.cos(a), cy - d / 2 * math.sin(a)), (cx + d / 2 * math.cos(a), cy + d / 2 * math.sin(a))]
    tint = G.color(YOUNG, rgb(1, 0.95, 0.85), OLD)
    light = ragged(S, *at[0], R1) + ragged(S, *at[1], R2)
    for (x, y), r in zip(at, (R1, R2)):            # the cores are seen
        _, _, rr = S.polar(x, y, G.u(0.6, 1), G.u(0, TAU))
        light = light + G.u(0.4, 0.9) * sersic(rr, max(0.12 * r, 1.2), 1.0) * G.color(OLD, rgb(1, 0.95, 0.9))
    if G.p(0.75):
        t = np.linspace(0, 1, 80)
        bow = G.u(-0.25, 0.25) * d * np.sin(math.pi * t)
        xs = at[0][0] + (at[1][0] - at[0][0]) * t - bow * math.sin(a)
        ys = at[0][1] + (at[1][1] - at[0][1]) * t + bow * math.cos(a)
        light = light + G.u(0.1, 0.3) * S.stroke(xs, ys, 1.0, G.u(0.1, 0.25) * R2 + 0.8) * tint
    sense = G.pick((-1, 1))
    for k in range(G.i(0, 2)):
        light = light + G.u(0.12, 0.35) * tidal_tail(S, *at[k], (R1, R2)[k], G.u(1.0, 2.2), G.u(0.8, 2.4) * sense,
                                                     a + math.pi * (1 - k) + G.n(0.5)) * tint
    S.light += light.astype(f32)
    S.clear += [(x, y, r * 1.1) for (x, y), r in zip(at, (R1, R2))] + [(cx, cy, d * 0.4)]
    S.info['n_galaxies'] = 2
    distant_galaxies(S)


def gravitational_lens(S):
    """Rays from a source behind, bent by an isothermal lens with shear: beta = theta - thetaE theta/|theta|
    - Gamma theta. One massive galaxy gives a ring, a cross or arcs; a cluster gives giant arcs among its yellow
    members."""
    G = S.R
    cluster = G.p(0.4)
    tE = S.s * (G.u(0.18, 0.34) if cluster else G.lu(0.09, 0.30))
    cx, cy = S.place(tE * 1.4)
    S.radius = tE * 1.25
    lens_color = G.color(rgb(1, 0.75, 0.42), rgb(1, 0.85, 0.6), rgb(1, 0.6, 0.35))
    q, pa = G.u(0.7, 0.98), G.u(0, TAU)
    _, _, r = S.polar(cx, cy, q, pa)
    light = G.u(0.6, 1.4) * sersic(r, tE * G.u(0.16, 0.3) * (0.7 if cluster else 1), G.u(1, 3)) * lens_color
    dx, dy = (S.x - cx) / tE, (S.y - cy) / tE
    c, s = math.cos(pa), math.sin(pa)
    eu, ev = dx * c + dy * s, -dx * s + dy * c
    rho = np.sqrt(q * eu * eu + ev * ev / q + 0.003)
    shear = G.u(0.0, 0.14) if not cluster else G.u(0.05, 0.25)
    bu, bv = eu - q * eu / rho - shear * eu, ev - ev / q / rho + shear * ev
    if cluster:                                    # the members' own mass wrinkles the arcs
        bu, bv = bu + 0.05 * S.fractal(4.0, 0.3), bv + 0.05 * S.fractal(4.0, 0.3)
    source_color = G.color(rgb(0.45, 0.7, 1.0), rgb(0.6, 0.85, 1.0), rgb(0.8, 0.7, 1.0), rgb(1, 0.6, 0.5))
    for k in range(G.i(2, 5) if cluster else 1):
        off, ang = G.u(0.05, 0.9) if cluster else G.u(0, 0.3) if G.p(0.5) else G.u(0.3, 0.7), G.u(0, TAU)
        size = G.u(0.05, 0.12) if cluster else G.lu(0.035, 0.16)
        e = G.u(0.5, 1)
        su, sv = bu - off * math.cos(ang), bv - off * math.sin(ang)
        src = np.exp(-np.sqrt((su * su + sv * sv / (e * e)) / (size * size) + 0.02))
        light = light + G.u(0.45, 1.0) * src * G.color(source_color, source_color, rgb(0.6, 0.8, 1.0))
    S.light += light.astype(f32)
    S.clear.append((cx, cy, tE * 1.3))
    if cluster:
        for _ in range(G.i(10, 30)):
            ra, an = S.s * 0.3 * abs(G.n()), G.u(0, TAU)
            if ra < 0.2 * tE:
                continue
            _, _, r = S.polar(cx + ra * math.cos(an), cy + ra * math.sin(an), G.u(0.45, 1), G.u(0, TAU))
            S.light += G.lu(0.15, 0.8) * sersic(r, G.lu(0.7, 2.4), 1.3) * lens_color
    else:
        distant_galaxies(S)
    S.field *= 0.4
    S.countable = S.countable and not cluster


# ---------------------------------------------------------------------------------------------------------- star fields

def add_field(S, n, hi=1.6, slope=2.0, mean_t=0.5, out=None):
    """n field stars anywhere in the frame, fluxes by a power law."""
    n, g = max(int(n), 1), S.R.g
    flux = power_law(g, n, 0.06, hi, slope)
    S.points(g.random(n) * S.w, g.random(n) * S.h, flux, star_colors(mean_t + 0.25 * g.standard_normal(n)), out)


def globular_cluster(S):
    """Plummer profile: the projected fraction inside r is r^2/(r^2+a^2); stars by a power law over unresolved light."""
    G, g = S.R, S.R.g
    R = S.s * G.lu(0.14, 0.68)                     # the visible radius
    a = R * G.u(0.16, 0.36)
    cx, cy = S.place(R * 0.7, 0.2)
    n = int(G.lu(250, 3500) * (0.35 + R / S.s))
    fine = G.p(0.4)                                # resolved into dust-like grains, in a field as rich
    if fine:
        R = S.s * G.lu(0.16, 0.5)
        a, n = R * G.u(0.12, 0.3), int(G.lu(800, 4000))
    fr = g.random(n) * 0.93
    r, th = a * np.sqrt(fr / (1 - fr)), g.random(n) * TAU
    q = G.u(0.88, 1)
    flux = power_law(g, n, 0.1, G.u(1.2, 5.0), G.u(1.6, 2.3)) * (G.lu(0.1, 0.5) if fine else G.lu(0.4, 2.2))
    t = np.where(g.random(n) < 0.2, 0.15, G.u(0.35, 0.62)) + 0.12 * g.standard_normal(n)
    S.points(cx + r * np.cos(th), cy + q * r * np.sin(th), flux, star_colors(t))
    _, _, rr = S.polar(cx, cy, q, 0.0)
    tint = G.color(rgb(1, 0.92, 0.75), rgb(1, 0.98, 0.94), rgb(0.85, 0.92, 1), rgb(1, 0.8, 0.5))
    S.light += G.lu(0.06, 1.2) * (1 + (rr / a) ** 2) ** -2 * tint
    S.sharp = G.u(0.4, 0.6) if fine else G.u(0.4, 1)
    S.field = G.lu(150, 1800) if fine else G.lu(10, 250)
    S.countable = False
    S.radius = min(R, 0.5 * S.w)
    if R > 0.5 * S.s:
        S.radius = 0.5 * S.w


def open_cluster(S):
    """A loose group of brighter stars, irregular, on a poorer field; sometimes in reflected or glowing gas."""
    G, g = S.R, S.R.g
    n = int(G.lu(18, 170))
    R = S.s * (G.u(0.13, 0.4) if G.p(0.6) else G.u(0.4, 0.62))
    cx, cy = S.place(R * 0.8)
    S.radius = min(R, 0.5 * S.w)
    S.sharp = G.u(0.4, 1)
    k = G.i(1, 3)                                  # a few overlapping clumps make it irregular
    centers = np.stack([cx + 0.35 * R * g.standard_normal(k), cy + 0.35 * R * g.standard_normal(k)])
    centers += np.array([[cx], [cy]]) - centers.mean(1, keepdims=True)
    which = g.integers(0, k, n)
    spread = R * G.u(0.38, 0.6)
    xs = centers[0, which] + spread * g.standard_normal(n)
    ys = centers[1, which] + spread * g.standard_normal(n)
    flux = power_law(g, n, 0.8, G.u(14, 40), G.u(1.25, 1.9)) * G.lu(0.6, 1.5)
    t = np.where(g.random(n) < G.u(0, 0.25), 0.15, G.u(0.6, 0.95)) + 0.1 * g.standard_normal(n)
    S.points(xs, ys, flux, star_colors(t))
    for i in np.argsort(flux)[-G.i(1, 2 + int(R / S.s * 10)):] if G.p(0.6) else []:
        bright_star(S, float(xs[i]), float(ys[i]), G.u(2, 8), float(np.clip(t[i], 0, 1)), G.p(0.4))
    if G.p(0.16):
        _, _, r = S.polar(cx, cy, G.u(0.7, 1), G.u(0, TAU))
        gas = np.exp(-(r / (0.8 * R)) ** 2) * np.clip(0.6 + 0.6 * S.fractal(3.0, 0.6), 0, 3)
        S.light += G.u(0.03, 0.14) * gas * G.color(rgb(0.35, 0.55, 1.0), rgb(0.5, 0.65, 1.0), rgb(1, 0.3, 0.35))
    S.field = G.lu(15, 300)
    S.field_hi = 0.6
    S.countable = False


def star_field(S):
    """Stars with no concentration: poor, rich, or the Milky Way's clouds."""
    G = S.R
    kind = G.pick(('poor', 'rich', 'rich', 'milky way'))
    n = {'poor': G.lu(25, 90), 'rich': G.lu(80, 900), 'milky way': G.lu(800, 5000)}[kind]
    add_field(S, n, G.u(2, 9) if kind != 'poor' else G.u(0.8, 2), G.u(1.5, 2.3), G.u(0.4, 0.65))
    if kind == 'milky way' or G.p(0.15):
        glow = np.exp(0.35 * S.fractal(3.2, 1.0)) * G.u(0.02, 0.10)
        S.light += glow * G.color(rgb(1, 0.85, 0.65), rgb(0.85, 0.9, 1), rgb(1, 0.95, 0.9))
    S.field, S.fill, S.sharp = 0, True, G.u(0.4, 1)
    S.countable = kind == 'poor'


# -------------------------------------------------------------------------------------------------------------- nebulae

GLOW = dict(red=rgb(1.0, 0.16, 0.14), pink=rgb(1.0, 0.38, 0.52), crimson=rgb(0.85, 0.10, 0.22),
            teal=rgb(0.15, 0.75, 0.75), green=rgb(0.25, 0.85, 0.45), blue=rgb(0.22, 0.5, 1.0),
            sky=rgb(0.3, 0.75, 1.0), gold=rgb(1.0, 0.68, 0.2),
            brown=rgb(0.85, 0.5, 0.28), white=rgb(0.95, 0.95, 1.0), violet=rgb(0.75, 0.4, 0.95))


def glow(S, *names):
    return S.R.color(GLOW[S.R.pick(names)], GLOW[S.R.pick(names)])


def planetary_nebula(S):
    """A star's thrown-off shells. A spherical shell seen from outside has the brightness of the path through it,
    sqrt(Ro^2 - r^2) - sqrt(Ri^2 - r^2): a ring. Bipolar ones are pinched at the waist."""
    G = S.R
    R = S.s * G.lu(0.06, 0.45)
    cx, cy = S.place(R)
    pa, kind = G.u(0, TAU), G.pick(('ring', 'ring', 'disc', 'shells', 'bipolar', 'bipolar', 'dumbbell', 'bubble'))
    q = G.u(0.65, 1.0) if kind != 'bipolar' else 1.0
    u, v, r = S.polar(cx, cy, q, pa)
    n1 = S.fractal(2.8, 0.4)
    rn = r / R * (1 + 0.06 * n1)
    path = lambda ro, ri: np.sqrt(np.maximum(ro * ro - rn * rn, 0)) - np.sqrt(np.maximum(ri * ri - rn * rn, 0))
    if kind == 'ring':
        inner, body = G.u(0.45, 0.8), None
        body = path(1.0, inner) + G.u(0.0, 0.35) * path(1.0, 0)
    elif kind == 'bubble':                         # old and large: an even disc with a brighter rim
        body = 0.4 * sigmoid((1 - rn) / 0.03) * (1 + G.u(0, 1.5) * np.exp(-((rn - 0.9) / 0.08) ** 2))
    elif kind == 'disc':
        body = path(1.0, G.u(0.0, 0.3)) ** 0.6
    elif kind == 'shells':
        body = 0.35 * path(1.0, 0.85) + 0.2 * path(1.0, 0) + 0.9 * path(G.u(0.4, 0.6), 0.25)
    elif kind == 'bipolar':                        # two lobes along u, r_lobe ~ |cos|^k
        th = np.arctan2(v, u)
        lobe = np.abs(np.cos(th)) ** G.u(0.5, 1.6) + G.u(0.12, 0.25)
        x = rn / lobe
        body = sigmoid((1 - x) / 0.06) * (0.35 + 0.8 * np.exp(-((x - 0.8) / 0.2) ** 2))
        body = body + 1.2 * np.exp(-(rn / 0.22) ** 2)
    else:                                          # dumbbell: a bright hourglass inside a faint disc
        th = np.arctan2(v, u)
        body = sigmoid((1 - rn) / 0.05) * (0.2 + 0.9 * np.abs(np.cos(th)) ** G.u(1, 3))
    body = body * np.clip(1 + G.u(0.05, 0.5) * n1, 0.1, 3)
    if G.p(0.25):                                  # one side brighter, as where it runs into the gas between the stars
        body = body * np.clip(1 + G.u(0.4, 1.1) * np.cos(np.arctan2(v, u) - G.u(0, TAU)), 0.03, 3)
    c_in = glow(S, 'teal', 'green', 'blue', 'sky', 'teal', 'sky', 'white', 'violet')
    c_out = glow(S, 'red', 'pink', 'gold', 'crimson', 'teal', 'blue', 'green') if G.p(0.75) else c_in
    t = sigmoid((rn - G.u(0.5, 0.9)) / G.u(0.05, 0.2))
    light = G.lu(0.35, 1.3) * body * (c_in * (1 - t) + c_out * t)
    if G.p(0.35):                                  # faint halo
        light = light + G.u(0.02, 0.08) * sigmoid((G.u(1.3, 2) - rn) / 0.08) * c_out
    S.light += light.astype(f32)
    if G.p(0.75):
        S.points(np.array([cx]), np.array([cy]), np.array([G.u(1.0, 5.0)]), star_colors([G.u(0.6, 1)]))
    S.clear.append((cx, cy, R * 1.15))
    S.field = G.lu(10, 500)
    S.countable = S.field < 300


def clouds(S, beta=3.0, outer=0.8, warp=0.08):
    """Turbulent gas: fractal noise looked up through coordinates that other fractal noise displaces."""
    f = S.fractal(beta, outer)
    amp = warp * S.s
    at = [S.y + amp * S.fractal(3.4, 0.5), S.x + amp * S.fractal(3.4, 0.5)]
    return ndimage.map_coordinates(f, at, order=1, mode='grid-wrap')


def threads(S, scale, width, ragged=0.02):
    """A network of thin filaments of even width (pixels): |f| / |grad f| is the distance to the zero line of a smooth
    random field f, its coordinates stirred a little."""
    f = ndimage.zoom(S.R.g.standard_normal((int(S.h / (scale * S.s)) + 4, int(S.w / (scale * S.s)) + 4), dtype=f32),
                     scale * S.s, order=3)[:S.h, :S.w]
    gy, gx = np.gradient(f)
    d = np.abs(f) / (np.hypot(gx, gy) + 0.02)
    line = np.exp(-(d / width) ** 1.3)
    amp = ragged * S.s
    at = [S.y + amp * S.fractal(3.0, 0.2), S.x + amp * S.fractal(3.0, 0.2)]
    return ndimage.map_coordinates(line.astype(f32), at, order=1, mode='nearest')


def emission_nebula(S):
    """Gas lit by hot stars: turbulent clouds, bright rims, dark lanes and pillars; frame-filling or bounded."""
    G = S.R
    if G.p(0.14):
        return lit_dust(S)
    bounded = G.p(0.55)
    gas, fine, lane = clouds(S, G.u(3.2, 4.4)), S.fractal(2.4, 0.3), clouds(S, 3.1, 0.5)
    dens = np.exp(G.u(0.5, 1.0) * gas + G.u(0.03, 0.2) * fine)
    if G.p(0.5):                                   # ionisation fronts: bright threads where a field crosses zero
        thread = threads(S, G.u(0.15, 0.4), G.u(1, 4), 0.03)
        dens = dens * (0.6 + G.u(0.3, 1.2) * thread)
    if bounded:
        R = S.s * G.u(0.18, 0.48)
        cx, cy = S.place(R * 0.8)
        _, _, r = S.polar(cx, cy, G.u(0.55, 1), G.u(0, TAU))
        edge = sigmoid((1 - r / R + 0.12 * gas + 0.2 * S.fractal(4.0, 0.6)) / G.u(0.06, 0.25))
        if G.p(0.3):                               # a cavity blown by the stars within
            edge = edge * sigmoid((r / R - G.u(0.15, 0.35) + 0.08 * lane) / 0.06)
        core = G.u(0, 5) if G.p(0.5) else 0.0      # the overexposed heart
        dens = dens * edge * (0.4 + np.exp(-(r / R) ** 2) + core * np.exp(-(r / (G.u(0.15, 0.4) * R)) ** 2))
    else:
        S.fill, S.center, S.radius = True, None, None
        if G.p(0.5):                               # the bright side of the frame
            a = G.u(0, TAU)
            dens = dens * sigmoid(((S.x / S.w - 0.5) * math.cos(a) + (S.y / S.h - 0.5) * math.sin(a)) / 0.16 + 0.6)
    dark = np.exp(-REDDEN * (G.u(0, 2.2) * sigmoid((lane - G.u(0.5, 1.3)) / 0.2)))
    rim = np.exp(-((lane - 0.5) / 0.15) ** 2) * G.u(0, 0.5)
    main = glow(S, 'red', 'red', 'pink', 'crimson', 'red', 'pink', 'gold', 'teal', 'blue')
    other = glow(S, 'teal', 'blue', 'pink', 'gold', 'sky', 'brown', 'white', 'red', 'violet') if G.p(0.6) else main
    mix = clouds(S, 3.4, 0.8, 0.05) - G.u(0.2, 1.2) if not bounded or G.p(0.5) else 2 - 4 * r / R + gas
    mix = sigmoid(mix / 0.4)                       # patches, or inner gas of another colour (Hubble's palette)
    light = G.lu(0.09, 0.4) * dens * (1 + rim) * (main * (1 - mix) + other * mix) * dark
    S.light += np.minimum(light, 3.0).astype(f32)
    if bounded and G.p(0.4):                       # the little cluster that lights it
        g, k = G.g, G.i(3, 12)
        S.points(cx + 0.25 * R * g.standard_normal(k), cy + 0.25 * R * g.standard_normal(k),
                 power_law(g, k, 1, 6, 1.5), star_colors(0.85 + 0.1 * g.standard_normal(k)))
    S.field = G.lu(20, 900)
    S.countable = S.field < 400


def lit_dust(S):
    """One to three bright stars in a dusty cloud, each with a halo of its own scattered, mostly blue light."""
    G = S.R
    gas, haze = clouds(S, 3.6), clouds(S, 3.2, 0.9)
    S.light += G.u(0.01, 0.12) * np.exp(0.7 * haze) * glow(S, 'brown', 'red', 'blue', 'white')
    cx, cy = S.place(S.s * 0.25)
    S.radius = S.s * G.u(0.2, 0.4)
    for _ in range(G.i(1, 3)):
        x, y = cx + G.n(0.4) * S.radius, cy + G.n(0.4) * S.radius
        _, _, r = S.polar(x, y, G.u(0.7, 1), G.u(0, TAU))
        halo = np.exp(-r / (S.radius * G.u(0.2, 0.5))) * np.exp(G.u(0.3, 0.9) * gas)
        S.light += np.minimum(G.u(0.3, 1.0) * halo, 2.0) * glow(S, 'sky', 'blue', 'blue', 'white', 'gold')
        bright_star(S, x, y, G.u(2, 8), G.u(0.6, 1), S.spikes)
    S.field = G.lu(20, 900)
    S.countable = False


def supernova_remnant(S):
    """An old blast wave: thin ragged filaments on a broken shell; or young and filled like the Crab; or a piece."""
    G = S.R
    kind = G.pick(('shell', 'shell', 'arc', 'crab', 'web'))
    R = S.s * (G.u(0.2, 0.46) if kind != 'arc' else G.lu(0.5, 2.2))
    if kind == 'arc':                              # the centre lies outside the frame: a veil crosses it
        a = G.u(0, TAU)
        cx, cy = S.w / 2 + R * math.cos(a), S.h / 2 + R * math.sin(a)
        S.fill = True
    else:
        cx, cy = S.place(R * 0.9)
        if kind == 'crab':
            R *= G.u(0.5, 1.0)
            S.radius = R
    q, pa = G.u(0.6, 1.0), G.u(0, TAU)
    _, _, r = S.polar(cx, cy, q if kind != 'arc' else 1.0, pa)
    th = np.arctan2(S.y - cy, S.x - cx)
    rn = r / R
    c1 = glow(S, 'red', 'red', 'crimson', 'pink', 'gold', 'white')
    c2 = glow(S, 'teal', 'sky', 'blue', 'green', 'white', 'gold') if G.p(0.7) else c1
    light = 0.0
    if kind in ('crab', 'web'):                    # a network: ridges of noise, bright where the field crosses zero
        for k in range(3):
            ridge = threads(S, G.u(0.1, 0.25) * (1.0 if kind == 'web' else 2 * R / S.s), G.u(0.7, 1.5), G.u(0.01, 0.03))
            ridge = ridge * np.clip(0.7 + 0.5 * S.fractal(3, 0.4), 0.05, 2)
            light = light + ridge * (c1 if k % 2 == 0 else c2) * G.u(0.35, 0.8)
        edge = sigmoid((1 - rn + 0.12 * S.fractal(3, 0.4)) / 0.05)
        light = light * edge * (0.5 + 0.5 * rn * rn)
        if kind == 'crab':
            light = light + G.u(0.3, 0.9) * np.exp(-(rn / 0.6) ** 2) * edge * glow(S, 'sky', 'white', 'blue', 'white')
        else:
            light = light + 0.06 * edge * c1
    else:
        big, small = S.fractal(3.6, 0.8), S.fractal(2.8, 0.3)
        lop = 2 if G.p(0.4) else 1                 # one side brighter, or two opposite ones (the Veil)
        turn = G.u(0, TAU)
        for k in range(G.i(4, 9)):                 # ragged arcs, each with its own wiggles and gaps
            off = G.u(-0.2, 0.04) if kind == 'shell' else G.u(-0.14, 0.14) * min(1, 0.7 * S.s / R)
            wig = clouds(S, 3.0, 0.4, 0.03)
            rs = 1 + off + (0.05 * wig + 0.04 * big) * (1 if kind == 'shell' else min(1, 0.5 * S.s / R))
            dist = (rn - rs) * R
            thin = np.exp(-(dist / G.u(0.8, 1.6)) ** 2) + 0.25 * np.exp(-np.abs(dist) / G.u(3, 8)) * (dist < 0)
            gap = np.cos(lop * (th - turn - (G.n(0.25) if lop == 2 else G.u(-2.5, 2.5)))) - G.u(-0.6, 0.5)
            gap = sigmoid(gap / 0.2) if kind == 'shell' else 1.0
            tone = (c1 if G.p(0.55) else c2) * G.u(0.3, 0.9)
            light = light + thin * gap * np.clip(0.55 + 0.6 * small + 0.3 * wig, 0, 2) * tone
        if kind == 'shell':
            inside = sigmoid((1 - rn + 0.05 * big) / 0.04)
            light = light + G.u(0.0, 0.07) * inside * np.clip(0.6 + 0.5 * small, 0, 2) * c1
    S.light += (light * G.lu(0.35, 1.0)).astype(f32)
    if kind == 'arc':
        S.center, S.radius = None, None
    else:
        S.clear.append((cx, cy, 0.3 * R))
    S.field = G.lu(25, 700)
    S.countable = S.field < 300


def dark_nebula(S):
    """Cold dust in front of a crowd of stars or of a glowing cloud: light times exp(-tau)."""
    G = S.R
    glowing = G.p(0.45)
    add_field(S, G.lu(900, 4500) if not glowing else G.lu(80, 900), G.u(0.8, 2.0), 2.0, G.u(0.35, 0.6))
    back = np.exp(0.22 * S.fractal(3.2, 0.9))
    if glowing:
        S.light += G.u(0.15, 0.4) * back * np.clip(1 + 0.15 * S.fractal(2.4, 0.4), 0.3, 2) \
            * G.color(glow(S, 'red', 'red', 'pink', 'gold', 'teal', 'brown', 'blue'), rgb(0.8, 0.7, 0.6))
    else:
        S.light += G.u(0.04, 0.14) * back * G.color(rgb(1, 0.85, 0.6), rgb(0.9, 0.92, 1), rgb(1, 0.7, 0.5))
    gas, fine = clouds(S, G.u(3.2, 4.2), 0.6, 0.06), S.fractal(2.4, 0.4)
    kind = G.pick(('globule', 'lanes', 'lanes', 'snake', 'pillar'))
    S.fill = True
    if kind == 'globule':
        R = S.s * G.u(0.14, 0.36)
        cx, cy = S.place(R)
        _, _, r = S.polar(cx, cy, G.u(0.45, 1), G.u(0, TAU))
        depth = (1 - r / R + 0.3 * gas + 0.08 * fine) / 0.12
    elif kind == 'snake':                          # a winding river of dust across the frame
        t = np.linspace(-0.2, 1.2, 260)
        a, ph, wob = G.u(0, TAU), G.u(0, TAU), G.u(0.08, 0.2) * S.s
        along, across = (t - 0.5) * 1.2 * S.s, wob * np.sin(t * G.u(4, 9) + ph)
        m = S.stroke(S.w / 2 + along * math.cos(a) - across * math.sin(a),
                     S.h / 2 + along * math.sin(a) + across * math.cos(a), 1.0, G.u(0.035, 0.08) * S.s)
        depth = (m - 0.55 + 0.16 * gas + 0.06 * fine) / 0.12
    elif kind == 'pillar':                         # a wall of dust with a finger standing out of it
        a = G.u(0, TAU)
        u = ((S.x - S.w / 2) * math.cos(a) + (S.y - S.h / 2) * math.sin(a)) / S.s
        v = ((S.y - S.h / 2) * math.cos(a) - (S.x - S.w / 2) * math.sin(a)) / S.s
        at, wid, top = G.u(-0.15, 0.15), G.u(0.06, 0.12), G.u(0.12, 0.3)
        wall = -0.18 - u
        head = np.hypot((u - top + wid) / 1.1, v - at - 0.04)
        finger = np.minimum(wid - np.abs(v - at - 0.04 * np.sin(u * 14)), top - u)
        depth = (np.maximum(np.maximum(wall, finger), wid * 1.35 - head) + 0.05 * gas + 0.012 * fine) / 0.02
    else:
        depth = (gas - G.u(0.1, 0.8) + 0.12 * fine) / G.u(0.12, 0.5)
    mask = sigmoid(depth)
    S.light *= np.exp(-(REDDEN ** G.u(0, 1)) * (G.u(1.6, 5.0) * mask))
    if kind != 'globule':
        S.center, S.radius = None, None
    S.field = G.lu(1, 40) if not glowing else G.lu(5, 60)
    S.countable, S.sharp = False, G.u(0.4, 1)


# -------------------------------------------------------------------------------------------------- the solar system

def sphere(S, cx, cy, R, flat=1.0, pa=0.0):
    """Unit-sphere coordinates of a disc seen face-on: X along pa, Y across (the pole), Z towards us, mask 0..1."""
    u, v, r = S.polar(cx, cy, flat, pa)
    z = np.sqrt(np.maximum(1 - (r / R) ** 2, 0))
    return u / R, v / R, z, sigmoid((R - r) / 0.35)


def bands(S, lat, x, colors, k, contrast):
    """Cloud bands: colour as a piecewise function of latitude, its edges stirred by turbulence."""
    G = S.R
    stir = 0.035 * S.fractal(2.6, 0.25) + 0.02 * np.sin(9 * x + 5 * lat)
    steps = np.linspace(-1, 1, k)
    tone = 1 - contrast * G.g.random(k)
    l = np.clip(lat + G.u(0.2, 1) * stir, -1, 1)
    shade = np.interp(l, steps, tone).astype(f32)
    hue = np.interp(l, steps, G.g.random(k)).astype(f32)
    return shade * (colors[0] * hue + colors[1] * (1 - hue))


def sun(S, X, Y, Z, phase):
    """Lambert's law with limb darkening: mu0^k, light from an angle `phase` behind the observer's line."""
    a = S.R.u(0, TAU)
    mu0 = X * math.sin(phase) * math.cos(a) + Y * math.sin(phase) * math.sin(a) + Z * math.cos(phase)
    return np.maximum(mu0, 0)


def planet_sky(S, R, cx, cy, crowded=0.2):
    """Around planets the sky is dark; sometimes moons or a few stars stand near."""
    G = S.R
    S.field = 0
    S.countable = True
    if G.p(crowded):
        n = G.i(1, 4)
        a = G.u(0, TAU)
        d = R * G.g.uniform(1.5, 4, n) * G.g.choice([-1, 1], n)
        S.points(cx + d * math.cos(a), cy + d * math.sin(a), G.g.uniform(0.8, 5, n))
        S.countable = False
    S.planet = True


PLANET_COLORS = dict(saturn=(rgb(1.0, 0.86, 0.58), rgb(0.86, 0.68, 0.42)),
                     jupiter=(rgb(1.0, 0.93, 0.82), rgb(0.72, 0.48, 0.32)),
                     cream=(rgb(1.0, 0.95, 0.85), rgb(0.9, 0.75, 0.55)),
                     blue=(rgb(0.45, 0.65, 1.0), rgb(0.3, 0.5, 0.95)),
                     teal=(rgb(0.6, 0.9, 0.95), rgb(0.5, 0.8, 0.9)), rust=(rgb(1.0, 0.7, 0.45), rgb(0.7, 0.35, 0.2)))


def ringed_planet(S):
    """A planet with rings: annuli from 1.24 to 2.27 planet radii with Cassini's gap near 2, tilted by B (sin B = axis
    ratio); the far half passes behind the globe, the globe's shadow falls on it."""
    G = S.R
    R = S.s * G.lu(0.045, 0.21)
    cx, cy = S.place(R * 2.2)
    pa, B = (G.u(-0.5, 0.5) if G.p(0.7) else G.u(0, TAU)), math.radians(G.u(4, 30))
    S.radius = 2.25 * R * max(abs(math.cos(pa)), math.sin(B))
    flat = G.u(0.9, 0.97)
    X, Y, Z, mask = sphere(S, cx, cy, R, flat, pa)
    lat = Y * math.cos(B) + Z * math.sin(B) * 0.6
    colors = PLANET_COLORS[G.pick(('saturn', 'saturn', 'saturn', 'cream', 'jupiter', 'blue', 'teal'))]
    ball = bands(S, lat, X, colors, G.i(7, 14), G.u(0.1, 0.4)) * sun(S, X, Y, Z, G.u(0, 0.5)) ** G.u(0.4, 0.9)
    u, v, _ = S.polar(cx, cy, 1.0, pa)
    rr = np.hypot(u, v / math.sin(B)) / R
    px = 0.45 / (R * 1.0)                          # edge softness, a fraction of a pixel
    span = lambda a, b: sigmoid((rr - a) / px) * sigmoid((b - rr) / px)
    ring = G.u(0.1, 0.3) * span(1.24, 1.53) + G.u(0.8, 1.1) * span(1.53, 1.95) + G.u(0.5, 0.85) * span(2.03, 2.27)
    if G.p(0.15):
        ring = G.u(0.3, 0.9) * span(G.u(1.5, 1.8), G.u(2.0, 2.4))
    ring = ring * (1 + 0.12 * np.sin(rr * 31))
    front = v * G.pick((-1, 1)) > 0
    shadow = (~front) & (np.abs(u + R * G.u(-0.3, 0.3)) < R * 0.95) & (rr < 2.1)
    ring = ring * np.where(shadow, 0.25, 1)
    ring_color = G.color(colors[0], rgb(1, 0.93, 0.8), rgb(0.9, 0.9, 0.9))
    cover = np.where(front, np.clip(ring, 0, 1) * 0.85, 0)
    light = ball * mask * (1 - cover) + ring * ring_color * 0.8 * np.where(front, 1, 1 - mask)
    S.light += (light * G.u(0.5, 1.1)).astype(f32)
    planet_sky(S, 2.3 * R, cx, cy)
    S.info['rings'] = 'yes'


def banded_planet(S):
    """A giant planet's clouds: bands along latitude, ovals, limb darkening, flattening, sometimes a phase."""
    G = S.R
    R = S.s * (G.lu(0.10, 0.46) if G.p(0.9) else G.u(0.5, 0.8))
    cx, cy = S.place(R)
    pa = G.u(-0.5, 0.5) if G.p(0.7) else G.u(0, TAU)
    X, Y, Z, mask = sphere(S, cx, cy, R, G.u(0.92, 0.98), pa)
    tilt = G.n(0.12)
    lat = Y * math.cos(tilt) + Z * math.sin(tilt)
    kind = G.pick(('jupiter', 'jupiter', 'jupiter', 'cream', 'saturn', 'rust', 'blue', 'teal'))
    ball = bands(S, lat, X, PLANET_COLORS[kind], G.i(8, 18), G.u(0.35, 0.75))
    for _ in range(G.i(0, 2)):                     # ovals, one of them perhaps the great red spot
        ox, oy, w = G.u(-0.6, 0.6), G.u(-0.5, 0.5), G.u(0.07, 0.2)
        spot = np.exp(-(((X - ox) / w) ** 2 + ((lat - oy) / (0.55 * w)) ** 2) ** 2)
        ball = ball * (1 - spot) + spot * G.color(rgb(0.85, 0.35, 0.2), rgb(1, 0.95, 0.9), rgb(0.6, 0.3, 0.2))
    phase = G.u(0, 0.4) if G.p(0.8) else G.u(0.4, 1.6)
    light = ball * sun(S, X, Y, Z, phase) ** G.u(0.35, 0.9) * mask
    S.light += (light * G.u(0.6, 1.15)).astype(f32)
    planet_sky(S, R, cx, cy, 0.25)
    S.info['rings'] = 'no'


def crater_field(S, height, n, lo, hi, x0, x1, y0, y1, squash=None):
    """Adds n craters to a height map: a parabolic bowl inside, a rim at the edge, an apron that falls off outside."""
    g = S.R.g
    for x, y, r in zip(g.uniform(x0, x1, n), g.uniform(y0, y1, n), power_law(g, n, lo, hi, 2.4)):
        m = int(1.9 * r) + 2
        ax, bx, ay, by = max(int(x) - m, 0), min(int(x) + m + 1, S.w), max(int(y) - m, 0), min(int(y) + m + 1, S.h)
        if ax >= bx or ay >= by:
            continue
        dx, dy = S.x[ay:by, ax:bx] - float(x), S.y[ay:by, ax:bx] - float(y)
        if squash is not None:                     # foreshortened towards the limb of a globe
            cx, cy, R = squash
            ex, ey = (x - cx) / R, (y - cy) / R
            e2 = min(ex * ex + ey * ey, 0.9)
            along = (dx * ex + dy * ey) / math.sqrt(e2 + 1e-6)
            d = np.sqrt(dx * dx + dy * dy + along * along * (1 / (1 - e2) - 1)) / r
        else:
            d = np.hypot(dx, dy) / r
        bowl = np.where(d < 1, d * d - 1, 0) * 0.55 + 0.35 * np.exp(-((d - 1) / 0.2) ** 2)
        if r > 6:
            bowl = bowl + 0.3 * np.exp(-(d / 0.16) ** 2)
        height[ay:by, ax:bx] += (bowl * r * 0.5).astype(f32)


def cratered_moon(S):
    """An airless globe, or its ground close up: Lambert shading of a cratered height map, dark seas, a terminator."""
    G = S.R
    height = (0.5 + 0.5 * G.u()) * S.fractal(3.2, 0.3) * 0.45
    a = G.u(0, TAU)
    gray = G.color(rgb(1, 0.97, 0.92), rgb(0.95, 0.97, 1), rgb(1, 0.9, 0.78))
    sea = 1 - G.u(0.2, 0.55) * sigmoid((S.fractal(3.6, 0.6) - G.u(0.2, 0.9)) / 0.15) if G.p(0.65) else 1.0
    if G.p(0.68):                                  # the globe at some phase
        R = S.s * (G.u(0.16, 0.48) if G.p(0.85) else G.u(0.5, 0.8))
        cx, cy = S.place(R)
        X, Y, Z, mask = sphere(S, cx, cy, R)
        crater_field(S, height, int(G.lu(25, 110)), 0.025 * R + 0.6, 0.24 * R,
                     cx - R, cx + R, cy - R, cy + R, (cx, cy, R))
        phase = G.u(0.15, 2.1)
        relief = G.u(0.4, 0.9)
        planet_sky(S, R, cx, cy, 0.05)
    else:                                          # close up
        phase, mask, relief = G.u(0.8, 1.35), 1.0, G.u(0.5, 1.0)
        crater_field(S, height, int(G.lu(20, 120)), 1.5, 0.24 * S.s, 0, S.w, 0, S.h)
        X, Y, Z = 0.0, 0.0, 1.0
        if G.p(0.3):                               # with the terminator in the frame
            X = ((S.x - S.w / 2) * math.cos(a) + (S.y - S.h / 2) * math.sin(a)) / S.s * G.u(0.5, 1.2)
            X, Y, Z = X * math.cos(a), X * math.sin(a), 1.0
        S.fill, S.center, S.radius, S.field = True, None, None, 0
        S.planet, S.countable = True, True
    hy, hx = np.gradient(height)
    nx, ny = X - relief * hx, Y - relief * hy
    norm = np.sqrt(nx * nx + ny * ny + Z * Z + 1e-4)
    mu = (nx * math.sin(phase) * math.cos(a) + ny * math.sin(phase) * math.sin(a) + Z * math.cos(phase)) / norm
    lit = np.maximum(mu, 0) ** G.u(0.5, 0.9) * (1 + 0.06 * S.fractal(2.0, 0.2))
    S.light += (lit * sea * mask * gray * G.u(0.45, 1.1)).astype(f32)


def comet(S):
    """Coma (brightness ~ 1/r, fading), a broad curved dust tail, a thin straight ion tail; the stars often trailed."""
    G = S.R
    L = S.s * G.lu(0.22, 1.0)                      # length of the tail
    a = G.u(0, TAU)
    cx = S.w * (0.5 - 0.28 * math.cos(a) * G.u(0.2, 1.1)) + G.n(0.04) * S.w
    cy = S.h * (0.5 - 0.28 * math.sin(a) * G.u(0.2, 1.1)) + G.n(0.04) * S.h
    S.center = (cx, cy)
    u, v, r = S.polar(cx, cy, 1.0, a)
    rc = S.s * G.lu(0.025, 0.10)
    head = 0.35 * rc / (r + 0.12 * rc) * np.exp(-r / (1.6 * rc)) + 0.8 * np.exp(-(r / (0.25 * rc + 0.6)) ** 2)
    c_coma = G.color(rgb(0.45, 0.95, 0.65), rgb(0.6, 0.95, 0.85), rgb(1, 0.98, 0.92), rgb(0.7, 0.9, 1))
    light = head * G.u(0.8, 1.8) * c_coma
    t = np.maximum(u, 0) / L
    bend = G.u(-0.35, 0.35) * L
    wid = rc * G.u(0.5, 0.9) + G.u(0.06, 0.22) * np.maximum(u, 0)
    streak = np.clip(1 + 0.25 * np.sin((v / (wid + 1)) * G.u(2, 7) + G.u(0, 6)), 0, 2)
    starts = sigmoid(u / (0.35 * rc + 0.5))
    narrow = np.sqrt(0.5 * rc / (0.5 * rc + 0.1 * np.maximum(u, 0)))
    kinds = G.pick(('dust', 'dust', 'ion', 'both', 'both'))
    if kinds != 'ion':
        x = (v - bend * t * t) / wid
        light = light + G.u(0.28, 0.6) * np.exp(-x * x - 1.5 * t) * starts * narrow * streak * \
            G.color(rgb(1, 0.93, 0.8), rgb(1, 0.8, 0.55), rgb(0.95, 0.97, 1))
    if kinds != 'dust':
        tilt = G.n(0.18) if kinds == 'both' else G.n(0.02)
        wi = 0.3 * rc + 0.6 + 0.035 * np.maximum(u, 0)
        x = (v - tilt * u + 0.01 * L * np.sin(u / L * G.u(8, 20)) * t) / wi
        knots = np.clip(1 + 0.3 * S.fractal(2.6, 0.3), 0.2, 2)
        light = light + G.u(0.22, 0.45) * np.exp(-x * x - 1.2 * t) * starts * knots \
            * G.color(rgb(0.45, 0.65, 1), rgb(0.5, 0.85, 1))
    S.light += light.astype(f32)
    S.radius = 0.5 * max(L * abs(math.cos(a)), 3 * rc)
    S.clear += [(cx + k * L * math.cos(a), cy + k * L * math.sin(a), 3 * rc if k == 0 else 0.1 * L + rc)
                for k in (0, 0.2, 0.4, 0.6)]
    S.info['tail'] = 'yes'
    S.field, S.countable = G.lu(10, 300), True
    if G.p(0.3):
        k, b = G.u(4, 12), G.u(0, TAU)
        S.trail, S.countable = (k * math.cos(b), k * math.sin(b)), False


# --------------------------------------------------------------------------------------------------- stars and optics

def bright_star(S, x, y, peak, t, spikes, out=None):
    """A conspicuous star: saturated Moffat core (1 + (r/a)^2)^-2.5, a halo, diffraction spikes."""
    G = S.R
    out = S.light if out is None else out
    color = star_colors([t]).astype(f32).reshape(3, 1, 1) ** G.u(0.8, 1.8)
    u, v, r = S.polar(x, y, 1.0, S.spike_angle)
    a = S.core
    m = peak * (1 + (r / a) ** 2) ** -2.6
    if S.halo:
        m = m + S.halo * peak * 0.02 * np.exp(-r / (3 * a))
    if spikes:
        L = a * (1.6 + 1.1 * math.log1p(peak))
        arm = lambda p, q: np.exp(-np.abs(p) / L - (q / 0.75) ** 2)
        m = m + 0.3 * peak ** 0.6 * (arm(u, v) + arm(v, u))
    out += m * color


def place_bright_stars(S, n, fade):
    """n stars apart from each other, from the object and from the frame's edge; fewer where there is no room."""
    G, spots = S.R, []
    for _ in range(150):
        if len(spots) == n:
            break
        x, y = G.u(7, S.w - 8), G.u(7, S.h - 8)
        if fade is not None and fade[int(y), int(x)] < 0.8:
            continue
        if any((x - a) ** 2 + (y - b) ** 2 < (13 * S.scale) ** 2 for a, b in spots):
            continue
        if any((x - a) ** 2 + (y - b) ** 2 < (c + 6) ** 2 for a, b, c in S.clear):
            continue
        spots.append((x, y))
    out = np.zeros_like(S.light)
    for x, y in spots:
        bright_star(S, x, y, G.lu(3.0, 12.0) * S.star_gain, G.u(0.05, 1), S.spikes, out)
    return out, len(spots)


def psf_blur(S, light, sigma, wings):
    """Convolves with core and wings: (1-w) Gauss(sigma) + w Gauss(3.5 sigma), in Fourier space on a padded frame."""
    p = 12
    big = np.pad(light, ((0, 0), (p, p), (p, p)))
    k2 = freq2(S.h + 2 * p, S.w + 2 * p)
    gauss = lambda sig: np.exp(k2 * (-2 * (math.pi * sig) ** 2))
    mtf = (1 - wings) * gauss(sigma) + wings * gauss(3.5 * sigma)
    f = scipy.fft.irfft2(scipy.fft.rfft2(big) * mtf, s=big.shape[1:])
    return np.maximum(f[:, p:-p, p:-p], 0).astype(f32)


def motion_blur(S, light, dx, dy):
    """Averages the frame along a straight drift of (dx, dy) pixels: the transfer function is sinc(k . d)."""
    ky, kx = np.fft.fftfreq(S.h)[:, None], np.fft.rfftfreq(S.w)[None]
    f = scipy.fft.rfft2(light) * np.sinc(kx * dx + ky * dy).astype(f32)
    return np.maximum(scipy.fft.irfft2(f, s=(S.h, S.w)), 0).astype(f32)


def satellite_trail(S):
    """A straight streak across the frame."""
    G = S.R
    a = G.u(0, TAU)
    d = (S.x - S.w / 2) * math.cos(a) + (S.y - S.h / 2) * math.sin(a) - G.u(-0.3, 0.3) * S.s
    return np.exp(-(d / G.u(0.6, 1.1)) ** 2) * G.u(0.5, 1.4) * star_colors([G.u(0.3, 0.8)]).astype(f32).reshape(3, 1, 1)


def ghost_reflection(S):
    """Out-of-focus reflections of a bright star inside the optics: soft discs or doughnuts, tinted."""
    G, out = S.R, 0.0
    a, c = G.u(0, TAU), G.color(rgb(0.5, 1, 0.7), rgb(1, 0.7, 0.9), rgb(0.6, 0.75, 1), rgb(1, 0.95, 0.8))
    for k in range(G.i(1, 3)):
        d, R = S.s * G.u(0.15, 0.42), S.s * G.u(0.07, 0.17)
        r = np.hypot(S.x - S.w / 2 - d * math.cos(a + 2.2 * k), S.y - S.h / 2 - d * math.sin(a + 2.2 * k))
        disc_ = sigmoid((R - r) / 0.8)
        if G.p(0.5):
            disc_ = disc_ * (1 - 0.85 * sigmoid((R * G.u(0.35, 0.6) - r) / 0.8))
        out = out + disc_ * G.u(0.05, 0.16) * c
    return out


def cosmic_rays(S, img):
    """Particle hits on the sensor: sharp short worms, unblurred by the optics; img is the developed frame, 0..1."""
    G, k = S.R, S.scale
    for _ in range(G.i(3, 8)):
        x, y, a, n = G.u(4, S.w - 4), G.u(4, S.h - 4), G.u(0, TAU), G.i(4, 12) * k
        bend = G.n(0.04)
        for j in np.arange(0, n, 0.7):
            a += bend
            x, y = x + 0.7 * math.cos(a), y + 0.7 * math.sin(a)
            if 0 <= x < S.w - 1 and 0 <= y < S.h - 1:
                img[:, int(y), int(x)] = 1.0
    return img


# ------------------------------------------------------------------------------------------------------------- darkroom

def stretch_of(G):
    """The photographer's curve f, f(0) = 0, f(1) = 1, and the exposure that goes with it."""
    kind = G.pick(('asinh', 'asinh', 'asinh', 'gamma', 'gamma', 'linear'))
    if kind == 'asinh':
        a = G.lu(4, 40)
        k = 1 / math.asinh(a)
        return (lambda x: np.arcsinh(a * x) * k), G.lu(0.7, 1.8)
    if kind == 'gamma':
        g = 1 / G.u(1.5, 2.4)
        return (lambda x: np.maximum(x, 1e-6) ** g), G.lu(0.7, 1.8)
    return (lambda x: x), G.lu(1.6, 3.5)


def fade_mask(S):
    """Edges fading to black, as in the textures of planetarium programs: a rectangle, an ellipse, a blob. A star field
    never ends in a round patch: that would be a cluster."""
    G = S.R
    if not G.p(0.36):
        return None
    w = G.u(0.03, 0.14)
    if G.p(0.45) and S.info['class'] != 'star_field':
        r = np.hypot((S.x - S.w / 2) / S.w, (S.y - S.h / 2) / S.h)
        r = r + (G.u(0, 0.03) * S.fractal(3.6, 0.8) if G.p(0.5) else 0.0)
        m = sigmoid((0.5 - 1.2 * w - r) / (0.3 * w))
    else:
        ex, ey = np.minimum(S.x, S.w - 1 - S.x) / S.s, np.minimum(S.y, S.h - 1 - S.y) / S.s
        m = np.clip(ex / w, 0, 1) * np.clip(ey / w, 0, 1)
        m = m * m * (3 - 2 * m)
    return m


LUMA = rgb(0.30, 0.59, 0.11)


def saturate(img, k):
    """Moves colours from (k > 1) or towards (k < 1) the gray of the same luminance."""
    g = (img * LUMA).sum(0)
    return np.clip(g + (img - g) * k, 0, 1)


def color_name(c):
    """What an observer calls the mean colour c of the object (displayed RGB, 0..1)."""
    r, g, b = (float(x) for x in c)
    top, low = max(r, g, b), min(r, g, b)
    sat = (top - low) / (top + 1e-6)
    if sat < 0.14:
        return 'white' if top > 0.42 else 'gray'
    if top == r:
        hue = 60 * (g - b) / (top - low)
    elif top == g:
        hue = 60 * (2 + (b - r) / (top - low))
    else:
        hue = 60 * (4 + (r - g) / (top - low))
    if hue < -100 or hue >= 178:
        return 'blue' if not 265 < hue % 360 <= 345 else 'pink'
    if hue < -14:
        return 'pink' if sat < 0.72 or hue < -35 else 'red'
    if hue < 15:
        return 'red' if sat > 0.48 else 'pink' if top > 0.5 else 'brown' if hue > 5 else 'red'
    if hue < 70:
        if top < 0.42 and hue < 52 or top < 0.58 and hue < 42 and sat < 0.6:
            return 'brown'
        return 'orange' if hue < 37 and sat > 0.35 else 'yellow'
    return 'green'


def object_color(img, weight):
    """Mean displayed colour of the object, each pixel weighted by how much the object adds there."""
    w = np.minimum(weight, 0.5 * weight.max()) * (weight > 0.25 * weight.max())
    return (img * w).sum((1, 2)) / (w.sum() + 1e-6)


def settle_color(S, img, weight):
    """Reads the object's colour off the frame. Where it stands between white and a colour, the object's saturation is
    moved to one side, as a photographer would, so that the name is plain to see. Galaxies, clusters and moons that
    came out green or pink by chance become white: the sky has none."""
    c = object_color(img, weight)
    sat = float((c.max() - c.min()) / (c.max() + 1e-6))
    k = 1.0
    if 0.08 < sat < 0.24:
        k = 2.0 if sat > 0.14 else 0.4
    if S.info['class'] in NATURAL and sat > 0.08 and S.R.p(0.9):
        if color_name(np.clip(c.mean() + (c - c.mean()) * max(0.26 / sat, 1), 0, 1)) in ('green', 'pink'):
            k = min(k, 0.07 / sat)
    if k != 1:
        img = saturate(img, k) if k > 1 else saturate(img, 1 - (1 - k) * np.minimum(weight / weight.max() * 3, 1))
        c = object_color(img, weight)
    return img, color_name(c)


def visible(S, light, curve, gain):
    """The factor by which the object is brightened if it would be lost: the brightest 2 % of it is to reach 0.4 on
    the screen, and the brightest 20 % 0.16 unless it is made of stars."""
    lum = (light * LUMA).sum(0)
    area = min(2.5 * (S.radius or S.s) ** 2 / (S.w * S.h), 0.3)
    k = 1.0
    for top, want in ((0.02, 0.4), (0.2, 0.16 if S.sharp == 1 else 0.0)):
        v = float(np.quantile(lum, 1 - top * area)) * gain
        while v * k < 1 and float(curve(np.float64(v * k))) < want and k < 20:
            k *= 1.25
    return k


def draw_odd(S):
    """Which artefact, if any, this frame has; blur only where stars or structure show it."""
    G = S.R
    if not G.p(0.27):
        return None
    kinds = ['satellite trail', 'bad column', 'cosmic ray', 'ghost reflection', 'blurred']
    if S.planet:
        kinds = ['bad column', 'satellite trail', 'cosmic ray'][:2 if S.fill else 3]
    if S.trail is not None or S.info['orientation'] in ('face-on', 'inclined') and S.radius < 0.3 * S.s:
        kinds.remove('blurred')
    return G.pick(kinds)


def starlight(S, curve, gain, fade):
    """Adds field stars behind the seeing and conspicuous ones in front; returns the frame's light and the object's."""
    G = S.R
    sigma = G.lu(0.4, 1.5) * S.scale if S.planet else G.u(0.4, 1.05) * S.sharp * S.scale
    S.light *= visible(S, psf_blur(S, S.light, sigma, 0.0) if S.sharp < 1 else S.light, curve, gain)
    own = S.light.copy()
    if S.field >= 1:
        stars = np.zeros_like(S.light)
        hi = S.field_hi * max(sigma, 0.6) ** 2 * G.lu(0.7, 2.0)
        add_field(S, S.field, max(hi, 0.2), G.u(1.6, 2.3), G.u(0.4, 0.65), stars)
        if S.trail is not None:
            stars = motion_blur(S, stars * math.hypot(*S.trail) * 0.6, *S.trail)
        S.light += stars
    light = psf_blur(S, S.light, sigma, G.u(0.02, 0.2))
    if S.countable:
        extra, S.info['bright_stars'] = place_bright_stars(S, 0 if S.planet else G.i(0, 5), fade)
        light += extra
    return light, own


def optics(S, light, odd):
    """What goes wrong in front of the sensor."""
    G = S.R
    if odd == 'blurred' and G.p(0.5):
        d, a = G.u(7, 13) * S.scale, G.u(0, TAU)
        return motion_blur(S, light, d * math.cos(a), d * math.sin(a)) * 1.5
    if odd == 'blurred':
        return psf_blur(S, light, G.u(1.9, 2.7 if S.info['arms'] is None else 2.1) * S.scale, 0.05) * 1.6
    if odd == 'satellite trail':
        light += satellite_trail(S)
    elif odd == 'ghost reflection':
        light += ghost_reflection(S)
    return light


def camera(S, light, curve):
    """Noise whose size on the screen is chosen, a pedestal of sky, the curve, the black point. Shot noise grows as
    sqrt(1 + light / pedestal). Returns the image, 0..1."""
    G = S.R
    b = G.lu(0.004, 0.05)
    level = float(curve(np.float64(b)))
    slope = (float(curve(np.float64(b * 1.01))) - level) / (0.01 * b)
    z = G.g.standard_normal(light.shape, dtype=f32)
    if G.p(0.35):                                  # resampled frames: noise with a grain wider than a pixel
        z = ndimage.gaussian_filter(z, (0, 0.7, 0.7), truncate=2) * 2.2
    if G.p(0.4):                                   # much of it common to the three channels
        z = z * 0.5 + z.mean(0) * 1.2
    light = light + z * (G.lu(0.004, 0.05) / slope * np.sqrt(1 + light / G.lu(0.05, 0.5)))
    sky, fx, fy = b, S.x / S.w - 0.5, S.y / S.h - 0.5
    if G.p(0.3):                                   # gradient of the sky
        a, k = G.u(0, TAU), G.u(0.5, 2.5)
        sky = b * (1 + k * (fx * math.cos(a) + fy * math.sin(a) + 0.5)) * (1 + 0.4 * (rgb(G.u(), G.u(), G.u()) - 0.5))
    if G.p(0.2):                                   # vignetting
        sky = sky * (1 - G.u(0.6, 1.6) * (fx * fx + fy * fy))
    black = level * (G.u(0.85, 1.08) if G.p(0.7) or S.planet else G.u(0.0, 0.9))
    light = np.maximum(light + sky, 0)
    if G.p(0.4):                                   # Lupton: the curve on the luminance only, colours kept
        lum = (light * LUMA).sum(0)
        img = light * ((curve(lum) - black) / (1 - black) / np.maximum(lum, 1e-4))
    else:
        img = (curve(light) - black) / (1 - black)
    return np.clip(img, 0, 1).astype(f32)


def darkroom(S, img, odd, fade):
    """Monochrome, or saturation and colour balance; sensor defects; sharpening, washed-out prints, faded edges."""
    G = S.R
    S.info['mono'] = G.p(0.13)
    if S.info['mono']:
        w = rgb(G.u(0.1, 1), G.u(0.3, 1), G.u(0.05, 1))
        img = np.repeat((img * (w / w.sum())).sum(0)[None], 3, 0)
    else:
        img = saturate(img, G.lu(0.6, 2.0))
        img = np.clip(img * np.exp(rgb(G.n(0.07), G.n(0.05), G.n(0.08))), 0, 1)
    if odd == 'bad column':
        for _ in range(G.i(1, 2)):
            x, wd = G.i(4, S.w - 6), 1 if S.w < 128 else 2
            img[:, :, x:x + wd] = 1.0 if G.p(0.75) or S.planet or float(img[:, :, x].mean()) < 0.25 else 0.0
    if G.p(0.25):                                  # over-sharpened
        img = np.clip(img + G.u(0.4, 1.6) * (img - ndimage.gaussian_filter(img, (0, 1.2, 1.2), truncate=2)), 0, 1)
    if odd == 'cosmic ray':
        img = cosmic_rays(S, img)
    if G.p(0.1):                                   # washed out
        img = np.minimum(img * G.u(0.7, 0.95) + G.u(0.0, 0.12), 1)
    return img if fade is None else img * fade


def develop(S):
    """From light to the finished frame, float32 [3,h,w] in 0..1, and the labels that depend on how it came out."""
    G, info = S.R, S.info
    S.scale = max(S.h, S.w) / 112                  # frame pixels per final pixel
    odd = info['odd'] = draw_odd(S)
    fade = None if S.planet else fade_mask(S)
    curve, gain = stretch_of(G)
    if S.planet:
        g = 1 / G.u(1.0, 1.8)
        curve, gain = (lambda x: np.maximum(x, 1e-6) ** g), G.lu(0.8, 1.5)
    light, own = starlight(S, curve, gain, fade)
    img = camera(S, optics(S, light, odd) * gain, curve)
    img = darkroom(S, img, odd, fade)
    if odd == 'blurred':                           # what the blur hides is not to be told
        info['dust_lane'] = None
        if info['arms']:
            info['arms'] = None
    own = curve((own * LUMA).sum(0) * gain)        # how much the object adds to each pixel of the screen
    if info['mono']:
        info['color'] = 'gray'
    else:
        img, info['color'] = settle_color(S, img, own if fade is None else own * fade)
        if info['class'] == 'star_field' and info['color'] == 'gray':
            info['color'] = 'white'
    return img


def frame(S, img, size):
    """8 bits, JPEG or not, padded to a square with CLIP's mean colour, resized as LLaVA does; labels in its units."""
    G, info = S.R, S.info
    im = Image.fromarray((img.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8))
    if G.p(0.5):
        buf = io.BytesIO()
        im.save(buf, 'JPEG', quality=G.i(40, 95))
        im = Image.open(buf).convert('RGB')
    side = max(S.h, S.w)
    ox, oy = (side - S.w) // 2, (side - S.h) // 2
    if S.h != S.w:
        square = Image.new('RGB', (side, side), (122, 116, 104))
        square.paste(im, (ox, oy))
        im = square
    if side != size:
        im = im.resize((size, size), Image.BICUBIC)
    if S.center is not None:
        clamp = lambda v: round(min(max(v, 0.0), 1.0), 3)
        info['position'] = [clamp((S.center[0] + ox) / side), clamp((S.center[1] + oy) / side)]
    if S.radius is not None:
        info['extent'] = round(min(2 * S.radius / S.w, 1.0), 3)
    return np.array(im), info


def render(seed, size=112, cls=None):
    """One image and the truth about it; see the top of this file."""
    G = Rng(seed)
    drawn = CLASSES[G.i(0, len(CLASSES) - 1)]
    cls = cls or drawn
    S = Scene(G, cls)
    S.spike_angle = G.pick((0.0, 0.785, G.u(0, TAU)))
    S.core = G.u(1.0, 1.7) * max(S.h, S.w) / 112
    S.halo = G.u(0.3, 1.5) if G.p(0.4) else 0.0
    S.spikes, S.star_gain = G.p(0.4), 1.0
    globals()[cls](S)
    return frame(S, develop(S), size)


# ------------------------------------------------------------------------------------------------------------ programs

def caption_of(info):
    keys = ('color', 'bar', 'arms', 'orientation', 'bright_stars', 'odd', 'dust_lane')
    return ' '.join(f'{k[:3]}:{info[k]}' for k in keys if info[k] is not None)


def sheet(path, seed0, per, only=None, size=112):
    """A contact sheet: one row per class (or rows of one class), labels below each image."""
    rows = [only] * 8 if only else list(CLASSES)
    W = Image.new('RGB', (per * (size + 4), len(rows) * (size + 26)), (40, 40, 40))
    d = ImageDraw.Draw(W)
    for j, cls in enumerate(rows):
        for i in range(per):
            img, info = render(seed0 + (j * per + i if only else i * 1000 + j), size, cls)
            x, y = i * (size + 4), j * (size + 26)
            W.paste(Image.fromarray(img), (x, y))
            text = caption_of(info)
            d.text((x + 1, y + size), (cls + ' ' if i == 0 and not only else '') + text[:20], fill=(255, 255, 160))
            d.text((x + 1, y + size + 11), text[20:40] if i or only else text[8:26], fill=(160, 255, 255))
    W.save(path)


def write_shard(job):
    """Renders seeds [start, start+n) to shard_%05d.npy and .jsonl, by way of temporary names."""
    folder, index, start, n, size = job
    base = os.path.join(folder, f'shard_{index:05d}')
    if os.path.exists(base + '.npy') and os.path.exists(base + '.jsonl'):
        return index
    imgs, lines = np.zeros((n, size, size, 3), np.uint8), []
    for k in range(n):
        imgs[k], info = render(start + k, size)
        lines.append(json.dumps(info))
    with open(base + '.jsonl.tmp', 'w') as f:
        f.write('\n'.join(lines) + '\n')
    with open(base + '.npy.tmp', 'wb') as f:
        np.save(f, imgs)
    os.rename(base + '.jsonl.tmp', base + '.jsonl')
    os.rename(base + '.npy.tmp', base + '.npy')
    return index


def pool(folder, start, count, workers, shard=2000, size=112):
    """Shard k holds seeds start + k*shard ...; finished shards are skipped, so that a cut-off run resumes."""
    import multiprocessing
    os.makedirs(folder, exist_ok=True)
    jobs = [(folder, k, start + k * shard, min(shard, count - k * shard), size) for k in range(-(-count // shard))]
    t0 = time.time()
    with multiprocessing.Pool(workers) as p:
        for done, k in enumerate(p.imap_unordered(write_shard, jobs)):
            print(f'shard {k} written, {done + 1}/{len(jobs)}, {time.time() - t0:.0f} s', flush=True)


def timing(n=24):
    total = 0.0
    for cls in CLASSES:
        render(0, cls=cls)
        t = time.time()
        for s in range(n):
            render(s, cls=cls)
        ms = (time.time() - t) / n * 1e3
        total += ms
        print(f'{cls:20s} {ms:6.2f} ms')
    print(f'{"mean":20s} {total / len(CLASSES):6.2f} ms')


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--sheet'), ap.add_argument('--pool'), ap.add_argument('--only')
    ap.add_argument('--seed0', type=int, default=1), ap.add_argument('--per-class', type=int, default=12)
    ap.add_argument('--start', type=int, default=0), ap.add_argument('--count', type=int, default=2000)
    ap.add_argument('--workers', type=int, default=2), ap.add_argument('--time', action='store_true')
    a = ap.parse_args()
    if a.sheet:
        sheet(a.sheet, a.seed0, a.per_class, a.only)
    elif a.pool:
        pool(a.pool, a.start, a.count, a.workers)
    elif a.time:
        timing()
    else:
        ap.print_usage()


if __name__ == '__main__':
    main()
