"""The built-in data set: environmental sounds made by rule, without any download.

Ten events with ESC-10's names and ten scenes with TAU Urban Acoustic Scenes' names, each a physical
sketch: impulses, filtered noise, chirps, formants and modulators. A *source* is one dog, one clock,
one street: it fixes pitch, timbre, room and microphone. A *take* is one recording of it: it draws
rhythm, loudness and background noise. Every draw follows from the seed, the pool, the label, the
source and the take, so a clip never depends on which others are made.
"""

import csv
import hashlib
import io
import json
import math
import zlib
from pathlib import Path

import numpy as np
from scipy import fft

from soundscapes_utils import audio, store

SAMPLE_RATE = 44_100
EVENT_SECONDS = 5.0
SCENE_SECONDS = 10.0
N_FOLDS = 5
POOLS = ("study", "pretraining")
_TAKES_PER_SOURCE = 2
_TAIL_S = 0.4  # room for the reverberation that rings past the end of a clip
_TABLE = 1024  # samples of one period of a voice
# What makes the set hard: a class must be heard through all of this.
_SNR_DB = (10, 45)  # recording over its own background noise
_LEVEL_DB = (-40, -16)  # root mean square of a clip, where its peaks allow
_MICROPHONE_DB = 3.5  # standard deviation of a microphone's response, octave by octave
_SURROUNDINGS_DB = (-30, -10)  # something else going on, against the event
_CUT_SHORT = 0.2  # part of the recordings that end early
CITIES = (
    "barcelona", "helsinki", "lisbon", "london", "lyon",
    "milan", "paris", "prague", "stockholm", "vienna",
)  # fmt: skip


# --------------------------------------------------------------------------- building blocks
# A sound is a list of layers (level in dB, samples at rate / step, spectral curve or None). Layers
# are shaped and summed as spectra, so that a layer costs one transform and a slow one a quarter.


def _uniform(rng, low, high):
    return float(rng.uniform(low, high))


def _log_uniform(rng, low, high):
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _white(rng, n):
    return rng.random(n, dtype=np.float32) - np.float32(0.5)


def _wander(rng, n, knots, low, high):
    """Random curve of straight pieces through `knots` values between `low` and `high`."""
    values = rng.uniform(low, high, knots + 1).astype(np.float32)
    ramp = np.linspace(0, 1, -(-n // knots), endpoint=False, dtype=np.float32)
    return (values[:-1, None] + np.diff(values)[:, None] * ramp).ravel()[:n]


def _sine(cycles):
    # single precision is fast, and exact enough once whole turns are gone
    return np.sin(np.float32(2 * np.pi) * (cycles - np.floor(cycles)).astype(np.float32))


def _band(low, high, slope=2.0):
    """Curve that falls off below `low` and above `high` Hz by `slope` orders."""

    def curve(f):
        return 1 / np.sqrt((1 + (low / f) ** (2 * slope)) * (1 + (f / high) ** (2 * slope)))

    return curve


def _formants(*peaks):
    """Curve of resonances, each (frequency in Hz, bandwidth in Hz, gain)."""

    def curve(f):
        return sum(g / (1 + ((f - c) / (0.5 * b)) ** 2) for c, b, g in peaks)

    return curve


def _shape(x, rate, curve):
    n = fft.next_fast_len(x.size + 256, real=True)
    f = np.maximum(fft.rfftfreq(n, 1 / rate), 1.0)
    return fft.irfft(fft.rfft(x, n) * curve(f).astype(np.float32), n)[: x.size]


def _swell(n, attack, decay):
    """Envelope of `n` samples: raised-cosine attack, then a fall over `decay` (parts of n)."""
    t = np.arange(n, dtype=np.float32) / n
    rise = 0.5 - 0.5 * np.cos(np.pi * np.minimum(t / attack, 1))
    fall = 0.5 - 0.5 * np.cos(np.pi * np.clip((1 - t) / decay, 0, 1))
    return (rise * fall).astype(np.float32)


def _voice(rng, f0, rate, vowels, slope=1.0, breath=0.1, jitter=0.01):
    """Harmonics of the contour `f0` (Hz), glided through `vowels` (curves) from start to end."""
    n = f0.size
    knots = max(2, int(n / rate * 90))
    f0 = f0 * (1 + jitter * _wander(rng, n, knots, -1, 1))
    k = np.arange(1, max(2, int(0.45 * rate / f0.max())) + 1)[: _TABLE // 2 - 1]
    spectrum = np.zeros(_TABLE // 2 + 1, np.complex64)
    spectrum[k] = k**-slope * np.exp(2j * np.pi * rng.random(k.size) * 0.3)
    table = fft.irfft(spectrum)
    table /= np.sqrt(np.mean(table**2))
    phase = np.cumsum(f0 / rate, dtype=float)
    x = table[((phase - np.floor(phase)) * _TABLE).astype(np.int32)] + breath * 3.5 * _white(rng, n)
    x = x.astype(np.float32)
    if len(vowels) == 1:
        return _shape(x, rate, vowels[0])
    place = np.linspace(0, len(vowels) - 1, n, dtype=np.float32)
    weights = [np.maximum(0, 1 - np.abs(place - i)) for i in range(len(vowels))]
    return sum(_shape(w * x, rate, v) for w, v in zip(weights, vowels, strict=True))


def _add(y, x, start):
    start = int(start)
    x = x[: max(0, y.size - start)]
    y[start : start + x.size] += x


def _scatter(n, starts, grains):
    """Sum of short grains, shape (count, length), placed at `starts`."""
    index = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(grains.shape[1])
    inside = index < n
    return np.bincount(index[inside], weights=grains[inside], minlength=n)[:n].astype(np.float32)


def _rings(rng, count, rate, length_s, pitches, decays, noise=0.0):
    """Grains that ring: decaying sines of the given pitches (Hz) and decay times (s)."""
    t = np.arange(int(length_s * rate), dtype=np.float32) / np.float32(rate)
    pitches, decays = np.broadcast_arrays(np.atleast_1d(pitches), np.atleast_1d(decays))
    fall = (-1 / decays[:, None]).astype(np.float32)
    body = _sine(pitches[:, None] * t.astype(float) + rng.random((count, 1))) * np.exp(fall * t)
    if noise:
        hiss = rng.random(body.shape, dtype=np.float32) * 2 - 1
        body += np.float32(noise) * np.exp(fall / np.float32(0.3) * t) * hiss
    return body


def _times(rng, start, end, gap, spread):
    """Moments from `start` to `end` (s) that are `gap` apart, give or take `spread` of it."""
    steps = gap * rng.uniform(1 - spread, 1 + spread, int((end - start) / gap * 2) + 2)
    times = start + np.concatenate([[0], np.cumsum(steps)])
    return times[times < end]


def _step(rate):
    """Decimation at which a layer keeps everything up to 5 kHz."""
    return max(1, rate // 11_025)


# --------------------------------------------------------------------------- events


def _dog(source, take, rate, n):
    pitch = _log_uniform(source, 330, 1000)
    size = (pitch / 450) ** 0.45
    closed = _formants((480 * size, 300, 1.0), (1300 * size, 500, 0.35), (2700 * size, 900, 0.1))
    wide = _formants((950 * size, 380, 1.0), (1750 * size, 500, 0.7), (3400 * size, 1200, 0.35))
    length, harsh = _uniform(source, 0.11, 0.24), _uniform(source, 0.25, 0.7)
    gap = _uniform(source, 0.32, 0.75)
    y = np.zeros(n, np.float32)
    start, end = _uniform(take, 0.0, 0.5), n / rate - 0.3
    while start < end:
        for at in _times(take, start, min(end, start + gap * take.integers(1, 6)), gap, 0.2):
            m = int(rate * length * _uniform(take, 0.8, 1.25))
            p = np.linspace(0, 1, m)
            f0 = pitch * _uniform(take, 0.9, 1.1) * (0.7 + 0.55 * np.sin(np.pi * p**0.6))
            bark = _voice(take, f0, rate, (closed, wide, closed), 0.6, harsh, 0.06)
            _add(y, bark * _swell(m, 0.08, 0.75) * _uniform(take, 0.5, 1), at * rate)
            start = at + length
        start += _uniform(take, 0.3, 2.0)
    return [(0, y, None)]


def _rooster(source, take, rate, n):
    pitch = _log_uniform(source, 720, 1080)
    throat = _formants(
        (_uniform(source, 1300, 2100), 450, 1.0), (2400, 900, 0.4), (4300, 1500, 0.25)
    )  # fmt: skip
    rasp, rough = _uniform(source, 0.2, 0.6), _uniform(source, 0.03, 0.055)
    last, tempo = _uniform(source, 0.65, 1.4), _uniform(source, 0.85, 1.2)
    syllables = (  # length in s, pause, loudness, pitch at start, middle and end
        (0.18, 0.04, 0.45, 0.70, 0.85, 0.75),
        (0.12, 0.03, 0.6, 0.90, 1.10, 1.00),
        (0.28, 0.01, 0.9, 1.05, 1.20, 1.10),
        (last, 0.00, 1.0, 1.05, 1.00, 0.60),
    )
    y = np.zeros(n, np.float32)
    at = _uniform(take, 0.02, 0.2) * n / rate
    while at < n / rate - 0.8:
        key = pitch * _uniform(take, 0.95, 1.05)
        for length, pause, loud, *turns in syllables:
            m = int(rate * length * tempo * _uniform(take, 0.9, 1.1))
            f0 = key * np.interp(
                np.linspace(0, 1, m), (0, 0.3, 0.75, 1), (turns[0], *turns[1:2] * 2, turns[2])
            )
            sound = _voice(take, f0, rate, (throat,), 1.0, rasp, rough)
            _add(y, loud * sound * _swell(m, min(0.3, 0.03 / length), 0.35), at * rate)
            at += m / rate + pause
        at += _uniform(take, 0.4, 1.8)
    return [(0, y, None)]


def _rain(source, take, rate, n):
    density, hard = _log_uniform(source, 60, 600), _uniform(source, 0, 1)
    count = int(density * n / rate)
    drops = _rings(
        take, 96, rate, 0.005, take.uniform(1500, 7000, 96), take.uniform(0.0004, 0.0015, 96), 3.0
    )
    drips = _rings(
        take, 32, rate, 0.03, take.uniform(500, 2500, 32), take.uniform(0.003, 0.010, 32), 0.2
    )
    wet = count // 12
    loud = take.lognormal(0, 0.8, (count + wet, 1))
    drop = _scatter(
        n, take.integers(0, n, count), drops[take.integers(0, 96, count)] * loud[:count]
    )
    drip = _scatter(n, take.integers(0, n, wet), drips[take.integers(0, 32, wet)] * loud[count:])
    return [
        (0, None, _band(_uniform(source, 200, 900), _uniform(source, 5000, 11000), 0.8)),
        (_uniform(source, -8, 2) + 3 * hard, drop, None),
        (_uniform(source, -28, -12), drip, None),
    ]


def _sea_waves(source, take, rate, n):
    step = _step(rate)
    period, depth = _uniform(source, 3.5, 8.0), _uniform(source, 1.2, 2.6)
    t = np.arange(n) / rate
    breaks = _times(take, -_uniform(take, 0, period), n / rate, period, 0.25)
    rise, fall = _uniform(source, 0.6, 1.4), _uniform(source, 1.2, 2.5)
    swell = np.zeros(n)
    for at in breaks:
        swell += _uniform(take, 0.5, 1) * np.where(
            t < at + rise, np.exp((t - at - rise) / (0.35 * rise)), np.exp((at + rise - t) / fall)
        )
    hiss = _white(take, n) * (0.06 + swell) ** (0.5 * depth)
    roar = _white(take, n // step) * (0.15 + swell[::step][: n // step]) ** 0.6
    return [
        (
            0,
            hiss.astype(np.float32),
            _band(_uniform(source, 350, 900), _uniform(source, 2500, 6000), 0.7),
        ),
        (
            _uniform(source, -4, 4),
            roar.astype(np.float32),
            _band(60, _uniform(source, 250, 600), 1.2),
        ),
    ]


def _crackling_fire(source, take, rate, n):
    density, snap = _log_uniform(source, 25, 100), _uniform(source, 0.8, 1.4)
    count = max(4, take.poisson(density * n / rate))
    kinds = 64
    t = np.arange(int(0.012 * rate)) / rate
    cracks = take.uniform(-1, 1, (kinds, t.size)) * np.exp(
        -t / np.exp(take.uniform(np.log(0.0002), np.log(0.0025), (kinds, 1)))
    )
    starts = take.integers(0, n, count)
    burst = take.integers(0, n, 6)[take.integers(0, 6, count)] + take.exponential(
        0.06 * rate, count
    )
    starts = np.where(take.random(count) < 0.4, burst, starts).astype(np.int64)
    loud = take.lognormal(0, snap, (count, 1))
    crackle = _scatter(n, starts, cracks[take.integers(0, kinds, count)] * loud)
    step = _step(rate)
    roar = _white(take, n // step) * _wander(take, n // step, int(3 * n / rate), 0.3, 1)
    return [
        (0, crackle, None),
        (_uniform(source, -14, -3), roar, _band(40, _uniform(source, 120, 350), 1.0)),
        (_uniform(source, -22, -10), None, _band(800, 6000, 1.0)),
    ]


def _crying_baby(source, take, rate, n):
    pitch = _log_uniform(source, 340, 520)
    tract = _uniform(source, 0.9, 1.15)
    mouth = [
        _formants((a * tract, 350, 1.0), (b * tract, 500, 0.6), (3500 * tract, 900, 0.4),
                  (5200 * tract, 1200, 0.15))
        for a, b in ((750, 1700), (1150, 1900), (900, 1600))
    ]  # fmt: skip
    length, rough = _uniform(source, 0.5, 1.3), _uniform(source, 0.02, 0.25)
    gasp = _formants((1800, 1200, 1.0), (3800, 2000, 0.6))
    y = np.zeros(n, np.float32)
    at = _uniform(take, 0.0, 0.6)
    while at < n / rate - 0.2:
        m = int(rate * length * _uniform(take, 0.6, 1.4))
        p = np.linspace(0, 1, m)
        peak = _uniform(take, 0.1, 0.5)
        arch = np.interp(p, (0, 0.5 * peak, peak, 0.8, 1), (0.75, 1.0, 1.1, 0.95, 0.7))
        quiver = 1 + 0.015 * np.sin(2 * np.pi * _uniform(take, 5, 9) * m / rate * p)
        f0 = pitch * _uniform(take, 0.92, 1.1) * arch * quiver
        cry = _voice(take, f0, rate, mouth, 0.5, rough, 0.02) * _swell(m, 0.12, 0.3)
        _add(y, cry * _uniform(take, 0.6, 1), at * rate)
        at += m / rate + 0.03
        g = int(rate * _uniform(take, 0.12, 0.28))
        _add(y, 0.3 * _shape(_white(take, g), rate, gasp) * _swell(g, 0.5, 0.2), at * rate)
        at += g / rate + _uniform(take, 0.02, 0.25)
    return [(0, y, None)]


def _sneezing(source, take, rate, n):
    pitch = _log_uniform(source, 220, 450)
    tract = (pitch / 220) ** 0.3
    ah = _formants((800 * tract, 250, 1.0), (1300 * tract, 300, 0.6), (2600 * tract, 500, 0.25))
    oo = _formants((450 * tract, 200, 1.0), (1000 * tract, 300, 0.3), (2500 * tract, 600, 0.1))
    hiss = _band(_uniform(source, 1600, 3600), _uniform(source, 6000, 11000), 1.5)
    draw, blast = _uniform(source, 0.3, 0.7), _uniform(source, 0.10, 0.22)
    y = np.zeros(n, np.float32)
    at = _uniform(take, 0.02, 0.25) * n / rate
    while at < n / rate - 1.0:
        m = int(rate * draw * _uniform(take, 0.8, 1.2))
        f0 = pitch * np.linspace(1.0, 1.5, m)
        inhale = _voice(take, f0, rate, (ah,), 1.0, 0.9, 0.03) * _swell(m, 0.8, 0.08)
        _add(y, 0.25 * inhale, at * rate)
        at += m / rate + _uniform(take, 0.02, 0.12)
        m = int(rate * blast * _uniform(take, 0.8, 1.2))
        puff = _shape(_white(take, m), rate, hiss)
        puff *= _swell(m, 0.15, 0.8) / max(1e-9, np.sqrt(np.mean(puff**2)))
        _add(y, 0.8 * puff, at * rate)
        v = int(rate * _uniform(take, 0.14, 0.3))
        f0 = pitch * _uniform(take, 1.3, 1.7) * np.linspace(1.0, 0.6, v)
        shout = _voice(take, f0, rate, (ah, oo), 0.9, 0.5, 0.03) * _swell(v, 0.05, 0.8)
        _add(y, 0.8 * shout, (at + 0.35 * m / rate) * rate)
        at += m / rate + v / rate + _uniform(take, 0.4, 2.0)
    return [(0, y, None)]


def _clock_tick(source, take, rate, n):
    gap = float(source.choice((0.25, 0.4, 0.5, 1.0))) * _uniform(source, 0.95, 1.05)
    modes = 6
    y = np.zeros(n, np.float32)
    sides = []
    for tone in (1.0, _uniform(source, 0.7, 0.95)):
        pitches = tone * np.exp(source.uniform(np.log(2200), np.log(8500), modes))
        decays = source.uniform(0.0005, 0.0025, modes)
        ring = _rings(source, modes, rate, 0.03, pitches, decays, 1.0)
        body = _rings(source, 1, rate, 0.03, tone * _uniform(source, 250, 700), 0.004)[0]
        sides.append(source.uniform(0.3, 1, modes) @ ring + _uniform(source, 0.0, 0.25) * body)
    echo, soft = _uniform(source, 0.006, 0.025), _uniform(source, 0.1, 0.5)
    weak = _uniform(source, 0.3, 1.0)
    for i, at in enumerate(_times(take, _uniform(take, 0, gap), n / rate, gap, 0.004)):
        tick = (weak if i % 2 else 1.0) * _uniform(take, 0.85, 1) * sides[i % 2].astype(np.float32)
        _add(y, soft * tick, at * rate)
        _add(y, tick, (at + echo) * rate)
    return [(0, y, None)]


def _helicopter(source, take, rate, n):
    step = _step(rate)
    m, low = n // step, rate / step
    blades = _log_uniform(source, 14, 28)
    drift = np.cumsum(blades / low * (1 + 0.01 * _wander(take, m, 6, -1, 1)), dtype=float)
    chop = drift % 1
    sharp = _uniform(source, 3, 9)
    slap = np.exp(-sharp * chop) * (1 - np.exp(-60 * chop))
    near = _wander(take, m, 3, 0.6, 1)
    wash = _white(take, m) * (_uniform(source, 0.1, 0.35) + slap) * near
    thump = slap * _sine(_uniform(source, 4, 7) * chop) * near
    whine = _sine(drift * round(_uniform(source, 25, 60))) * near
    return [
        (0, wash, _band(_uniform(source, 60, 150), _uniform(source, 500, 1500), 0.9)),
        (_uniform(source, -6, 2), thump.astype(np.float32), _band(20, 300, 1.5)),
        (_uniform(source, -30, -16), whine.astype(np.float32), None),
        (_uniform(source, -28, -16), None, _band(300, 5000, 0.8)),
    ]


def _chainsaw(source, take, rate, n):
    rev = _log_uniform(source, 100, 190)
    idle = rev * _uniform(source, 0.35, 0.65)
    # the throttle is a lever: what the engine follows is a slow curve between idle and full
    throttle = np.clip(_wander(take, n, max(3, int(0.9 * n / rate)), -0.3, 1.5), 0, 1)
    f0 = (idle + (rev - idle) * throttle) * (
        1 + 0.015 * _wander(take, n, int(25 * n / rate), -1, 1)
    )
    pipe = _formants(
        (_uniform(source, 250, 500), 400, 1.0), (_uniform(source, 800, 1400), 900, 0.8),
        (_uniform(source, 2200, 3500), 2000, 0.5), (6000, 5000, 0.25),
    )  # fmt: skip
    slope, hiss = _uniform(source, 0.15, 0.5), _uniform(source, 0.3, 0.8)
    engine = _voice(take, f0, rate, (pipe,), slope, hiss, _uniform(source, 0.01, 0.04))
    phase = np.cumsum(f0 / rate, dtype=float)
    # no two strokes burn alike
    power = (0.35 + 0.65 * throttle) * take.uniform(0.4, 1, int(phase[-1]) + 1)[phase.astype(int)]
    teeth = _white(take, n) * power * (0.5 + np.exp(-4 * (phase % 1)))
    return [
        (0, engine * power, None),
        (_uniform(source, -4, 4), teeth.astype(np.float32), _band(1500, 7000, 1.0)),
    ]


# --------------------------------------------------------------------------- scenes

_VOWELS = tuple(
    _formants((a, 180, 1.0), (b, 250, 0.5), (2600, 500, 0.2), (3500, 800, 0.08))
    for a, b in ((750, 1250), (300, 2200), (500, 1800), (350, 850))
)


def _babble(source, take, rate, n, talkers, level):
    """Layers of `talkers` voices at once: every vowel is a bus that the talkers fade into."""
    step = _step(rate)
    m, low = n // step, rate / step
    seconds = max(1, round(n / rate))
    buses = np.zeros((len(_VOWELS), m), np.float32)
    for _ in range(talkers):
        pitch = _log_uniform(source, 95, 240)
        f0 = pitch * (1 + 0.2 * _wander(take, m, 3 * seconds, -1, 1))
        phase = np.cumsum(f0 / low, dtype=float)
        saw = (phase - np.floor(phase) - 0.5).astype(np.float32) + 0.25 * _white(take, m)
        phrase = np.clip(_wander(take, m, seconds, -0.6, 1.2), 0, 1)
        saw *= phrase * _wander(take, m, 8 * seconds, 0, 1) ** 2 * _uniform(take, 0.3, 1)
        for bus in buses:
            bus += saw * np.clip(_wander(take, m, 6 * seconds, -1, 1), 0, 1)
    loud = 10 * np.log10(np.mean(buses**2, axis=1) + 1e-12)
    loud += level - 10 * np.log10(np.mean(buses**2) * len(_VOWELS) + 1e-12)
    rows = [(float(db), bus, v) for db, bus, v in zip(loud, buses, _VOWELS, strict=True)]
    # consonants: hiss between the vowels
    hiss = _white(take, m) * np.abs(buses[0] - buses[1])
    return [*rows, (level - 12, hiss, _band(2000, 4500, 1.5))]


def _steps(source, take, rate, n, level, walkers=2):
    """Layer of footsteps: heel, then sole."""
    y = np.zeros(n, np.float32)
    for _ in range(walkers):
        heel = _rings(source, 3, rate, 0.06, source.uniform((90, 250, 800), (160, 600, 1600)),
                      source.uniform(0.003, 0.010, 3), 1.2).sum(0)  # fmt: skip
        sole = 0.4 * _swell(int(0.07 * rate), 0.3, 0.6)
        pace, far = _uniform(source, 0.45, 0.62), _uniform(take, 0.3, 1)
        for at in _times(take, _uniform(take, 0, 1), n / rate, pace, 0.06):
            _add(y, far * _uniform(take, 0.6, 1) * heel.astype(np.float32), at * rate)
            _add(y, far * sole * _white(take, sole.size), (at + 0.05) * rate)
    return (level, y, None)


def _rumble(source, take, rate, n, low, high, level, ripple=0.4):
    m = n // _step(rate)
    x = _white(take, m) * _wander(take, m, max(2, int(1.5 * n / rate)), 1 - ripple, 1)
    return (level, x, _band(low, high * _uniform(source, 0.7, 1.4), 1.0))


def _hum(source, take, rate, n, start, end, level, curve, slope=0.8):
    """Layer of a machine's harmonics whose pitch (Hz) goes from `start` to `end`."""
    m, low = n // _step(rate), rate / _step(rate)
    f0 = np.linspace(start, end, m) * (1 + 0.02 * _wander(take, m, 12, -1, 1))
    return (level, _voice(take, f0, low, (curve,), slope, 0.2, 0.01).astype(np.float32), None)


def _chime(source, take, rate, n, at, pitches, level, decay=0.4, gap=0.35):
    """Layer of bell or loudspeaker tones, one after the other from `at` seconds."""
    low = rate / _step(rate)
    y = np.zeros(n // _step(rate), np.float32)
    for i, pitch in enumerate(pitches):
        partials = pitch * np.array([1, 2, 2.76, 5.4])
        partials = partials[partials < 0.45 * low]
        order = np.arange(1, partials.size + 1)
        tone = _rings(take, order.size, low, 3 * decay, partials, decay / order) / order[:, None]
        _add(y, tone.sum(0), (at + i * gap) * low)
    return (level, y, None)


def _rail_joints(source, take, rate, n, level):
    """Layer of wheels over rail joints: two bogies, two axles each."""
    knock = _rings(source, 4, rate, 0.12, source.uniform((45, 90, 200, 450), (80, 180, 400, 900)),
                   source.uniform(0.008, 0.04, 4), 0.8).sum(0).astype(np.float32)  # fmt: skip
    period, axle = _uniform(source, 0.9, 1.8), _uniform(source, 0.12, 0.2)
    y = np.zeros(n, np.float32)
    for at in _times(take, _uniform(take, 0, period), n / rate, period, 0.03):
        for offset in (0, axle, 2.6 * axle, 3.6 * axle):
            _add(y, knock * _uniform(take, 0.5, 1), (at + offset) * rate)
    return (level, y, None)


def _squeal(source, take, rate, n, level):
    """Layer of a brake or a flange: a few unstable high tones that come and go."""
    t = np.arange(n) / rate
    at, width = _uniform(take, 0, n / rate), _uniform(take, 0.8, 2.5)
    y = np.zeros(n)
    for _ in range(3):
        f0 = _uniform(source, 1800, 5200) * (1 + 0.01 * _wander(take, n, 20, -1, 1))
        y += _sine(np.cumsum(f0 / rate, dtype=float)) * _wander(take, n, 40, 0.1, 1)
    return (level, (y * np.exp(-(((t - at) / width) ** 2))).astype(np.float32), None)


def _cars(source, take, rate, n, level, every):
    """Layers of passing cars: tyre noise that swells and fades, an engine that drops in pitch."""
    m, low = n // _step(rate), rate / _step(rate)
    t = np.arange(m) / low
    tyres, engines = np.zeros(m, np.float32), np.zeros(m, np.float32)
    for at in _times(take, _uniform(take, -1, 1), n / rate + 1, every, 0.5):
        near, speed = _uniform(take, 4, 12), _uniform(take, 9, 18)
        x = speed * (t - at)
        far = np.sqrt(near**2 + x * x)
        gain = near / far * np.sqrt(near / far) * _uniform(take, 0.5, 1)
        tyres += (gain * _white(take, m)).astype(np.float32)
        phase = np.cumsum(_uniform(take, 45, 90) / low * (1 - speed / 343 * x / far))
        saw = phase - np.floor(phase) - 0.5
        engines += (gain * saw * saw * saw).astype(np.float32)
    road = _band(_uniform(source, 150, 400), _uniform(source, 700, 1500), 1.2)
    return [(level, tyres, road), (level + 1, engines, _band(40, 700, 1.0))]


def _birds(source, take, rate, n, level):
    """Layer of a few singers, each with a phrase of chirps that it repeats."""
    y = np.zeros(n, np.float32)
    for _ in range(source.integers(2, 5)):
        notes = source.integers(2, 7)
        pitch = _log_uniform(source, 2200, 4800)
        ends = pitch * source.uniform(0.75, 1.35, (notes, 3))
        lengths = source.uniform(0.03, 0.18, notes)
        far = _uniform(take, 0.2, 1)
        for start in _times(take, _uniform(take, 0, 2), n / rate, _uniform(source, 1.2, 3.0), 0.3):
            at = start
            for turns, length in zip(ends, lengths, strict=True):
                m = int(length * rate)
                f0 = np.interp(np.linspace(0, 1, m), (0, 0.5, 1), turns)
                _add(
                    y,
                    far * _sine(np.cumsum(f0 / rate)) * _swell(m, 0.3, 0.4),
                    at * rate,
                )
                at += length + 0.04
    return (level, y, None)


def _music(source, take, rate, n, level):
    """Layers of background music heard over small loudspeakers: chords, bass and a beat."""
    step = _step(rate)
    m, low = n // step, rate / step
    beat, root = _uniform(source, 0.42, 0.65), _uniform(source, 196, 330)
    y = np.zeros(m, np.float32)
    for i, at in enumerate(_times(take, 0, n / rate, beat, 0.002)):
        degree = (0, 5, 7, 9)[(i // 4) % 4]
        notes = [degree - 12, degree + int(take.choice((0, 4, 7, 12, 16)))]
        notes += [degree, degree + 4, degree + 7] if i % 2 == 0 else []
        pitches = root * 2 ** (np.array(notes) / 12)
        for harmonic, gain in ((1, 1.0), (2, 0.5), (3, 0.3)):
            tone = _rings(
                take, len(notes), low, 2 * beat, harmonic * pitches, 0.5 * beat / harmonic
            )
            _add(y, gain * tone.sum(0).astype(np.float32), at * low)
    tick = _rings(source, 1, rate, 0.05, 7000, 0.01, 3.0)[0].astype(np.float32)
    hats = np.zeros(n, np.float32)
    for at in _times(take, beat / 2, n / rate, beat, 0.01):
        _add(hats, tick, at * rate)
    return [(level, y, _band(150, 5000, 1.5)), (level - 14, hats, None)]


def _airport(source, take, rate, n):
    wheels = _rumble(source, take, rate, n, 150, 900, _uniform(source, -14, -6), 0.9)
    call = _log_uniform(source, 420, 720)
    at = _uniform(take, 0, 0.6) * n / rate
    return [
        *_babble(source, take, rate, n, 6, 0),
        _rumble(source, take, rate, n, 60, 400, _uniform(source, -4, 4)),
        wheels,
        _chime(
            source, take, rate, n, at, call * np.array([1, 1.26, 1.5]), _uniform(source, -14, -4)
        ),
        _steps(source, take, rate, n, _uniform(source, -16, -8)),
    ]


def _bus(source, take, rate, n):
    idle = _uniform(source, 24, 36)
    cabin = _formants((90, 80, 1.0), (180, 150, 0.7), (420, 400, 0.3), (1200, 1500, 0.08))
    end = idle * _uniform(take, 0.9, 2.2)
    return [
        _hum(source, take, rate, n, idle * _uniform(take, 1, 1.8), end, 0, cabin, 0.4),
        _rumble(source, take, rate, n, 30, 250, _uniform(source, -2, 4), 0.5),
        _rumble(source, take, rate, n, 300, 2000, _uniform(source, -18, -10), 0.3),
        *_babble(source, take, rate, n, 2, _uniform(source, -18, -8)),
    ]


def _metro(source, take, rate, n):
    low = _uniform(source, 180, 420)
    motor = _formants((low, 300, 1.0), (3 * low, 600, 0.5), (2200, 1200, 0.2))
    return [
        _rumble(source, take, rate, n, 40, 350, 0, 0.4),
        _hum(source, take, rate, n, low * 0.8, low * _uniform(take, 0.7, 1.5), -6, motor, 0.8),
        _rail_joints(source, take, rate, n, _uniform(source, -14, -6)),
        _squeal(source, take, rate, n, _uniform(source, -26, -14)),
        _rumble(source, take, rate, n, 800, 4000, _uniform(source, -22, -12), 0.4),
    ]


def _metro_station(source, take, rate, n):
    m = n // _step(rate)
    t = np.arange(m) / m
    arrive = 1 / (1 + np.exp(-(t - _uniform(take, 0.2, 0.8)) / 0.08))
    train = (_white(take, m) * (arrive if take.random() < 0.5 else 1 - arrive)).astype(np.float32)
    door = [_log_uniform(source, 700, 1400)] * 4
    return [
        *_babble(source, take, rate, n, 4, _uniform(source, -6, 0)),
        (_uniform(source, -4, 4), train, _band(80, 1200, 1.0)),
        _squeal(source, take, rate, n, _uniform(source, -16, -6)),
        _chime(source, take, rate, n, _uniform(take, 1, 7), door, -14, 0.08, 0.2),
        _steps(source, take, rate, n, _uniform(source, -14, -6)),
    ]


def _park(source, take, rate, n):
    return [
        _birds(source, take, rate, n, 0),
        _rumble(source, take, rate, n, 400, 3000, _uniform(source, -10, 0), 0.7),
        _rumble(source, take, rate, n, 30, 200, _uniform(source, -10, 0), 0.6),
        *_babble(source, take, rate, n, 1, _uniform(source, -24, -12)),
    ]


def _public_square(source, take, rate, n):
    bell = _log_uniform(source, 260, 520)
    return [
        *_babble(source, take, rate, n, 6, 0),
        _steps(source, take, rate, n, _uniform(source, -10, -4), 3),
        *_cars(source, take, rate, n, _uniform(source, -14, -6), 6.0),
        _chime(
            source,
            take,
            rate,
            n,
            _uniform(take, 0, 4),
            [bell] * 3,
            _uniform(source, -26, -14),
            1.0,
            1.6,
        ),
        _birds(source, take, rate, n, _uniform(source, -26, -14)),
    ]


def _shopping_mall(source, take, rate, n):
    beeps = [_log_uniform(source, 1800, 2600)] * int(take.integers(1, 4))
    return [
        *_music(source, take, rate, n, _uniform(source, -4, 4)),
        *_babble(source, take, rate, n, 5, 0),
        _chime(
            source, take, rate, n, _uniform(take, 0, 7), beeps, _uniform(source, -24, -16), 0.1, 0.9
        ),
        _rumble(source, take, rate, n, 60, 500, _uniform(source, -8, 0)),
    ]


def _street_pedestrian(source, take, rate, n):
    return [
        _steps(source, take, rate, n, 0, 4),
        *_babble(source, take, rate, n, 3, _uniform(source, -4, 4)),
        *_cars(source, take, rate, n, _uniform(source, -10, -4), 5.0),
    ]


def _street_traffic(source, take, rate, n):
    horn = _formants((900, 900, 1.0), (2200, 1500, 0.5))
    blow = _swell(n // _step(rate), 0.05, 0.05)
    level, x, _ = _hum(source, take, rate, n, *[_uniform(source, 330, 440)] * 2, -12, horn)
    span = np.abs(np.arange(x.size) / x.size - _uniform(take, 0.1, 0.9)) < 0.03
    return [
        *_cars(source, take, rate, n, 0, _uniform(source, 1.2, 2.5)),
        _rumble(source, take, rate, n, 30, 250, _uniform(source, -6, 2)),
        (level - 6, x * span * blow, None),
    ]


def _tram(source, take, rate, n):
    low = _uniform(source, 90, 220)
    motor = _formants((4 * low, 500, 1.0), (9 * low, 900, 0.6), (200, 200, 0.6))
    gong = [_log_uniform(source, 900, 1500)] * int(take.integers(1, 4))
    return [
        _hum(source, take, rate, n, low, low * _uniform(take, 0.6, 2.0), 0, motor, 0.6),
        _rumble(source, take, rate, n, 40, 350, _uniform(source, -4, 2)),
        _rail_joints(source, take, rate, n, _uniform(source, -14, -6)),
        _chime(
            source, take, rate, n, _uniform(take, 0, 7), gong, _uniform(source, -14, -6), 0.5, 0.4
        ),
        *_babble(source, take, rate, n, 2, _uniform(source, -16, -8)),
    ]


# --------------------------------------------------------------------------- recording


def _room_response(source, rate, n, room):
    """Spectrum of a room (direct sound and tail), rolled off as its microphone hears it."""
    decay, wet = _log_uniform(source, *room[:2]), _log_uniform(source, *room[2:])
    m = int(_TAIL_S * rate)
    tail = _white(source, m) * np.exp(-np.arange(m, dtype=np.float32) / (decay / 3 * rate))
    tail[0] = 0
    tail *= wet / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return fft.rfft(tail, n)


def _microphone(source, f):
    """Response of a microphone, its place and its recorder: an uneven curve over the octaves."""
    octaves = np.arange(-4, 5)  # 62 Hz to 16 kHz around 1 kHz
    uneven = np.clip(source.normal(0, _MICROPHONE_DB, octaves.size), -12, 12)
    band = _band(_uniform(source, 20, 150), _uniform(source, 5000, 15000), 1.0)(f)
    return (band * 10 ** (np.interp(np.log2(f / 1000), octaves, uneven) / 20)).astype(np.float32)


def _surroundings(take, rate, n):
    """Layers of something else that goes on nearby, in two of five recordings."""
    level = _uniform(take, *_SURROUNDINGS_DB)
    kind = take.integers(0, 10)
    if kind == 0:
        return _babble(take, take, rate, n, 1, level)
    if kind == 1:
        return _cars(take, take, rate, n, level, 4.0)
    if kind == 2:
        return [_rumble(take, take, rate, n, 30, 400, level, 0.9)]
    if kind == 3:
        return [_steps(take, take, rate, n, level, 1)]
    return []


def _record(layers, source, take, rate, n, room):
    """Sum the layers in a room, through a microphone, over background noise, at a random level."""
    step = _step(rate)
    size = step * fft.next_fast_len(int(np.ceil((n + _TAIL_S * rate) / step)), real=True)
    f = np.maximum(fft.rfftfreq(size, 1 / rate), 1.0).astype(np.float32)
    total = np.zeros(f.size, np.complex64)
    for layer in layers:
        part = _layer_spectrum(layer, f, n, size, take)
        total[: part.size] += part
    total *= _room_response(source, rate, size, room)
    total *= _microphone(source, f)
    snr, slope = _uniform(take, *_SNR_DB), _uniform(take, 0.2, 0.9)
    hiss = (_energy_db(total) - snr, None, lambda f: f**-slope)
    total += _layer_spectrum(hiss, f, n, size, take)
    y = fft.irfft(total, size)[:n]
    gain = 10 ** (_uniform(take, *_LEVEL_DB) / 20) / max(1e-9, float(np.sqrt(np.mean(y**2))))
    return (y * min(gain, 0.95 / max(1e-9, float(np.abs(y).max())))).astype(np.float32)


def _energy_db(spectrum):
    return 10 * math.log10(float(np.vdot(spectrum, spectrum).real) + 1e-20)


def _layer_spectrum(layer, f, n, size, take):
    """Spectrum of a layer, its energy at the layer's level; a slow layer has the low bins only."""
    level, x, curve = layer
    if x is None:
        part = _white(take, 2 * f.size).view(np.complex64)
    else:
        part = fft.rfft(x, size // round(n / x.size))
    if curve:
        part = part * curve(f[: part.size]).astype(np.float32)
    return part * np.float32(10 ** ((level - _energy_db(part)) / 20))


def _cut_short(y, take, rate):
    """Now and then a recording ends early and zeros fill it up, as in ESC-50."""
    if take.random() < _CUT_SHORT:
        end, fade = int(_uniform(take, 0.45, 0.9) * y.size), int(0.01 * rate)
        y[end:] = 0
        y[end - fade : end] *= np.linspace(1, 0, fade, dtype=np.float32)
    return y


# --------------------------------------------------------------------------- the public part

# label → ESC-50's class number, the sketch, and its room: how long it rings at least and at most
# (s), how strong it is at least and at most (ratio to the direct sound)
_EVENTS = {
    "dog": (0, _dog, (0.05, 0.35, 0.05, 0.5)),
    "rooster": (1, _rooster, (0.05, 0.35, 0.05, 0.5)),
    "rain": (10, _rain, (0.05, 0.3, 0.05, 0.4)),
    "sea_waves": (11, _sea_waves, (0.05, 0.3, 0.05, 0.4)),
    "crackling_fire": (12, _crackling_fire, (0.03, 0.2, 0.01, 0.12)),
    "crying_baby": (20, _crying_baby, (0.1, 0.4, 0.05, 0.5)),
    "sneezing": (21, _sneezing, (0.1, 0.4, 0.1, 0.5)),
    "clock_tick": (38, _clock_tick, (0.04, 0.2, 0.01, 0.08)),
    "helicopter": (40, _helicopter, (0.05, 0.35, 0.05, 0.4)),
    "chainsaw": (41, _chainsaw, (0.05, 0.35, 0.3, 1.2)),
}
# scene → the sketch and its room
_SCENES = {
    "airport": (_airport, (0.3, 0.7, 0.3, 0.9)),
    "bus": (_bus, (0.04, 0.12, 0.1, 0.5)),
    "metro": (_metro, (0.05, 0.15, 0.1, 0.5)),
    "metro_station": (_metro_station, (0.4, 0.9, 0.3, 0.9)),
    "park": (_park, (0.05, 0.2, 0.05, 0.3)),
    "public_square": (_public_square, (0.1, 0.3, 0.1, 0.5)),
    "shopping_mall": (_shopping_mall, (0.3, 0.7, 0.3, 0.9)),
    "street_pedestrian": (_street_pedestrian, (0.08, 0.25, 0.1, 0.5)),
    "street_traffic": (_street_traffic, (0.05, 0.2, 0.05, 0.4)),
    "tram": (_tram, (0.04, 0.12, 0.1, 0.5)),
}
EVENTS = tuple(_EVENTS)
SCENES = tuple(_SCENES)


def synthesize(
    label, seed=0, sample_rate=SAMPLE_RATE, duration_s=None, *, pool="study", source=0, take=0
):
    """Make one clip of an event or a scene.

    Parameters
    ----------
    label : str
        One of :data:`EVENTS` or :data:`SCENES`.
    seed : int, default 0
        Seed of the whole data set, at least 0.
    sample_rate : int, default 44100
        Rate in Hz, at least 8000. Another rate is another performance, not a resampled one.
    duration_s : float, optional
        Length in seconds, at least 2; by default 5 for an event and 10 for a scene.
    pool : {"study", "pretraining"}
        Clips of different pools never share a random draw.
    source : int, default 0
        Which dog, clock or street: pitch, timbre, room and microphone follow from it.
    take : int, default 0
        Which recording of that source: rhythm, level and background noise follow from it.

    Returns
    -------
    np.ndarray of float32, shape (round(duration_s * sample_rate),)
        Within ±0.95, at a random level.

    Raises
    ------
    ValueError
        Unknown label or pool, or a rate or length too small.

    Examples
    --------
    >>> synthesize("dog", seed=0, sample_rate=16000).shape
    (80000,)
    """
    if label not in _EVENTS and label not in _SCENES:
        raise ValueError(f"unknown label {label!r}; known are {', '.join(EVENTS + SCENES)}")
    _check_pool(pool)
    if duration_s is None:
        duration_s = EVENT_SECONDS if label in _EVENTS else SCENE_SECONDS
    if sample_rate < 8000 or duration_s < 2 or min(seed, source, take) < 0:
        raise ValueError(
            f"need a rate of 8000 Hz, 2 s and seeds of 0 or more, "
            f"got {sample_rate} Hz, {duration_s} s, seed {seed}, source {source}, take {take}"
        )
    key = [seed, zlib.crc32(f"{pool}/{label}".encode()), source]
    of_source, of_take = np.random.default_rng([*key, 0]), np.random.default_rng([*key, 1, take])
    sketch, room = _EVENTS[label][1:] if label in _EVENTS else _SCENES[label]
    n = round(duration_s * sample_rate)
    layers = sketch(of_source, of_take, sample_rate, n)
    if label in _SCENES:
        return _record(layers, of_source, of_take, sample_rate, n, room)
    layers += _surroundings(of_take, sample_rate, n)
    y = _record(layers, of_source, of_take, sample_rate, n, room)
    return _cut_short(y, of_take, sample_rate)


def _check_pool(pool):
    if pool not in POOLS:
        raise ValueError(f"unknown pool {pool!r}; known are {', '.join(POOLS)}")


def _plan(per_class):
    """(fold, source, take) of every clip of a class; more clips keep the earlier ones."""
    for i in range(per_class):
        fold, place = i % N_FOLDS, i // N_FOLDS
        source = place // _TAKES_PER_SOURCE * N_FOLDS + fold
        yield fold + 1, source, place % _TAKES_PER_SOURCE


def write_events(root, clips_per_class=40, seed=0, pool="study"):
    """Write the ten events in ESC-50's layout.

    Clips that are there already are kept if the same recipe made them; after an interruption the
    next call makes what is missing.

    Parameters
    ----------
    root : str or Path
        Folder; gets ``meta/esc50.csv`` and ``audio/<fold>-<source>-<take>-<target>.wav``.
    clips_per_class : int, default 40
        Clips of each class, spread evenly over the five folds, two takes a source.
    seed : int, default 0
        Seed of the data set.
    pool : {"study", "pretraining"}
        Which pool; sources of different pools have different numbers.

    Returns
    -------
    Path
        `root`.

    Raises
    ------
    ValueError
        Bad number, seed or pool, or a folder that holds other data.
    audio.AudioError
        The disk refuses.

    Examples
    --------
    >>> import tempfile
    >>> folder = write_events(tempfile.mkdtemp(), clips_per_class=1)
    >>> len(list((folder / "audio").glob("*.wav")))
    10
    """
    _check_pool(pool)
    rows, clips = [], {}
    for label, (target, *_) in _EVENTS.items():
        for fold, source, take in _plan(clips_per_class):
            src_file, letter = _source_number(pool, target, source), "AB"[take]
            name = f"{fold}-{src_file}-{letter}-{target}.wav"
            rows.append((name, fold, target, label, True, src_file, letter))
            clips[f"audio/{name}"] = (label, source, take)
    header = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    tables = {"meta/esc50.csv": _table(header, rows, ",")}
    recipe = {"kind": "events", "seed": seed, "pool": pool}
    return _write(Path(root), recipe, clips_per_class, clips, tables)


def write_scenes(root, scenes_per_class=20, seed=0, pool="study"):
    """Write the ten scenes in the layout of TAU Urban Acoustic Scenes 2020 Mobile.

    A location (the table's ``identifier``) is one source; a city belongs to one fold
    (:func:`city_fold`), so that folds share no location. Kept and resumed as in
    :func:`write_events`.

    Parameters
    ----------
    root : str or Path
        Folder; gets ``meta.csv`` (tab-separated), ``evaluation_setup/fold1_*.csv`` (the last fold
        is the test) and ``audio/<scene>-<city>-<location>-<segment>-a.wav``.
    scenes_per_class : int, default 20
        Recordings of each scene, spread evenly over the five folds, two segments a location.
    seed : int, default 0
        Seed of the data set.
    pool : {"study", "pretraining"}
        Which pool.

    Returns
    -------
    Path
        `root`.

    Raises
    ------
    ValueError
        Bad number, seed or pool, or a folder that holds other data.
    audio.AudioError
        The disk refuses.

    Examples
    --------
    >>> import tempfile
    >>> folder = write_scenes(tempfile.mkdtemp(), scenes_per_class=1)
    >>> (folder / "meta.csv").read_text().splitlines()[0].split()
    ['filename', 'scene_label', 'identifier', 'source_label']
    """
    _check_pool(pool)
    rows, clips = [], {}
    for number, label in enumerate(SCENES):
        for _, source, take in _plan(scenes_per_class):
            city, place = CITIES[source % len(CITIES)], _source_number(pool, number, source)
            name = f"audio/{label}-{city}-{place}-{take}-a.wav"
            rows.append((name, label, f"{city}-{place}", "a"))
            clips[name] = (label, source, take)
    header = ("filename", "scene_label", "identifier", "source_label")
    train = [row for row in rows if city_fold(row[2]) < N_FOLDS]
    test = [row for row in rows if city_fold(row[2]) == N_FOLDS]
    tables = {
        "meta.csv": _table(header, rows, "\t"),
        "evaluation_setup/fold1_train.csv": _table(header[:2], train, "\t"),
        "evaluation_setup/fold1_evaluate.csv": _table(header[:2], test, "\t"),
        "evaluation_setup/fold1_test.csv": _table(header[:1], test, "\t"),
    }
    recipe = {"kind": "scenes", "seed": seed, "pool": pool}
    return _write(Path(root), recipe, scenes_per_class, clips, tables)


def city_fold(identifier):
    """Fold (1 to 5) of a city, or of a location such as ``"lyon-3"``.

    Parameters
    ----------
    identifier : str
        Begins with one of :data:`CITIES`.

    Returns
    -------
    int
        Each fold holds two cities.

    Raises
    ------
    ValueError
        Not one of the ten cities.

    Examples
    --------
    >>> city_fold("barcelona-10300"), city_fold("milan")
    (1, 1)
    """
    city = identifier.split("-")[0]
    if city not in CITIES:
        raise ValueError(f"unknown city {city!r}; known are {', '.join(CITIES)}")
    return CITIES.index(city) % N_FOLDS + 1


def _source_number(pool, number, source):
    return (POOLS.index(pool) + 1) * 1_000_000 + number * 10_000 + source


def _table(header, rows, separator):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator="\n")
    writer.writerows([header, *(row[: len(header)] for row in rows)])
    return buffer.getvalue()


def _write(root, recipe, per_class, clips, tables):
    if per_class < 1 or recipe["seed"] < 0:
        raise ValueError(
            f"need at least 1 clip a class and a seed of 0 or more, "
            f"got {per_class} and seed {recipe['seed']}"
        )
    # a change of the sketches makes new clips: the recipe knows the code that it was made by
    recipe = recipe | {"sketches": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}
    _claim(root, recipe, tables)
    for name, (label, source, take) in clips.items():
        if not _is_whole(root / name, label):
            y = synthesize(label, recipe["seed"], pool=recipe["pool"], source=source, take=take)
            audio.save_audio(root / name, y, SAMPLE_RATE)
    # the tables come last: what they name is there
    for name, text in tables.items():
        _write_text(root / name, text)
    return root


def _claim(root, recipe, tables):
    """Leave in `root` nothing but clips of this recipe, and the marker that says so."""
    marker = root / "procedural.json"
    text = json.dumps(recipe)
    if not marker.exists():
        if any((root / name).exists() for name in ("audio", *tables)):
            raise ValueError(f"{root}: holds data that was not made here; choose another folder")
    elif marker.read_text() != text:
        # if the removal is interrupted, this marker makes the next call go on with it
        _write_text(marker, "stale")
        for path in [*(root / name for name in tables), *(root / "audio").glob("*.wav")]:
            path.unlink(missing_ok=True)
    _write_text(marker, text)


def _is_whole(path, label):
    samples = (EVENT_SECONDS if label in _EVENTS else SCENE_SECONDS) * SAMPLE_RATE
    return path.is_file() and path.stat().st_size == 44 + 2 * samples


def _write_text(path, text):
    # an unchanged file keeps its date, so that nothing downstream is made again
    if not (path.is_file() and path.read_text() == text):
        store.write_atomic(path, text.encode())
