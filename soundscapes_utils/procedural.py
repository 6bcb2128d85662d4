"""The built-in data set: environmental sounds made by rule, without any download.

Ten events with ESC-10's names and ten scenes with TAU Urban Acoustic Scenes' names, each a physical
sketch: impulses, filtered noise, chirps, formants and modulators. A *source* is one dog, one clock,
one street: it fixes pitch, timbre, room and microphone. A *take* is one recording of it: it draws
rhythm, loudness and background noise. Every draw follows from the seed, the pool, the label, the
source and the take, so a clip never depends on which others are made.
"""

import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
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
CITIES = ("barcelona", "helsinki", "lisbon", "london", "lyon",
          "milan", "paris", "prague", "stockholm", "vienna")  # fmt: skip


class _Clip(NamedTuple):
    """What a sketch draws from: generators of the source and of the take, rate, samples."""

    source: np.random.Generator
    take: np.random.Generator
    rate: int
    n: int

    # a slow layer keeps everything up to 5 kHz
    step = property(lambda self: max(1, self.rate // 11_025))
    slow_rate = property(lambda self: self.rate / self.step)
    slow_n = property(lambda self: self.n // self.step)

    def level(self, level):
        """A level in dB, or one drawn by the source from a range."""
        return self.source.uniform(*level) if isinstance(level, tuple) else level


# --- building blocks -----------------------------------------------------------------------------
# A sound is a list of layers (level in dB, samples at rate / step, spectral curve or None). Layers
# are shaped and summed as spectra, so that a layer costs one transform and a slow one a quarter.


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
    k = 2 * slope
    return lambda f: 1 / np.sqrt((1 + (low / f) ** k) * (1 + (f / high) ** k))


def _formants(*peaks):
    """Curve of resonances, each (frequency in Hz, bandwidth in Hz, gain)."""
    return lambda f: sum(g / (1 + ((f - c) / (0.5 * b)) ** 2) for c, b, g in peaks)


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


def _rings(rng, rate, length_s, pitches, decays, noise=0.0):
    """Grains that ring: decaying sines of the given pitches (Hz) and decay times (s)."""
    t = np.arange(int(length_s * rate), dtype=np.float32) / np.float32(rate)
    pitches, decays = np.broadcast_arrays(np.atleast_1d(pitches), np.atleast_1d(decays))
    fall = (-1 / decays[:, None]).astype(np.float32)
    turns = pitches[:, None] * t.astype(float) + rng.random((pitches.size, 1))
    body = _sine(turns) * np.exp(fall * t)
    if noise:
        hiss = rng.random(body.shape, dtype=np.float32) * 2 - 1
        body += np.float32(noise) * np.exp(fall / np.float32(0.3) * t) * hiss
    return body


def _times(rng, start, end, gap, spread):
    """Moments from `start` to `end` (s) that are `gap` apart, give or take `spread` of it."""
    steps = gap * rng.uniform(1 - spread, 1 + spread, int((end - start) / gap * 2) + 2)
    times = start + np.concatenate([[0], np.cumsum(steps)])
    return times[times < end]


# --- events --------------------------------------------------------------------------------------


def _dog(clip):
    source, take, rate, n = clip
    pitch = _log_uniform(source, 330, 1000)
    size = (pitch / 450) ** 0.45
    closed = _formants((480 * size, 300, 1.0), (1300 * size, 500, 0.35), (2700 * size, 900, 0.1))
    wide = _formants((950 * size, 380, 1.0), (1750 * size, 500, 0.7), (3400 * size, 1200, 0.35))
    length, harsh = source.uniform(0.11, 0.24), source.uniform(0.25, 0.7)
    gap = source.uniform(0.32, 0.75)
    y = np.zeros(n, np.float32)
    start, end = take.uniform(0.0, 0.5), n / rate - 0.3
    while start < end:
        for at in _times(take, start, min(end, start + gap * take.integers(1, 6)), gap, 0.2):
            m = int(rate * length * take.uniform(0.8, 1.25))
            p = np.linspace(0, 1, m)
            f0 = pitch * take.uniform(0.9, 1.1) * (0.7 + 0.55 * np.sin(np.pi * p**0.6))
            bark = _voice(take, f0, rate, (closed, wide, closed), 0.6, harsh, 0.06)
            _add(y, bark * _swell(m, 0.08, 0.75) * take.uniform(0.5, 1), at * rate)
            start = at + length
        start += take.uniform(0.3, 2.0)
    return [(0, y, None)]


def _rooster(clip):
    source, take, rate, n = clip
    pitch = _log_uniform(source, 720, 1080)
    throat = _formants((source.uniform(1300, 2100), 450, 1.0), (2400, 900, 0.4), (4300, 1500, 0.25))
    rasp, rough = source.uniform(0.2, 0.6), source.uniform(0.03, 0.055)
    last, tempo = source.uniform(0.65, 1.4), source.uniform(0.85, 1.2)
    syllables = (  # length in s, pause, loudness, pitch at start, middle and end
        (0.18, 0.04, 0.45, 0.70, 0.85, 0.75),
        (0.12, 0.03, 0.6, 0.90, 1.10, 1.00),
        (0.28, 0.01, 0.9, 1.05, 1.20, 1.10),
        (last, 0.00, 1.0, 1.05, 1.00, 0.60),
    )
    y = np.zeros(n, np.float32)
    at = take.uniform(0.02, 0.2) * n / rate
    while at < n / rate - 0.8:
        key = pitch * take.uniform(0.95, 1.05)
        for length, pause, loud, *turns in syllables:
            m = int(rate * length * tempo * take.uniform(0.9, 1.1))
            pitches = (turns[0], turns[1], turns[1], turns[2])
            f0 = key * np.interp(np.linspace(0, 1, m), (0, 0.3, 0.75, 1), pitches)
            sound = _voice(take, f0, rate, (throat,), 1.0, rasp, rough)
            _add(y, loud * sound * _swell(m, min(0.3, 0.03 / length), 0.35), at * rate)
            at += m / rate + pause
        at += take.uniform(0.4, 1.8)
    return [(0, y, None)]


def _rain(clip):
    source, take, rate, n = clip
    density, hard = _log_uniform(source, 60, 600), source.uniform(0, 1)
    count = int(density * n / rate)
    pitches, decays = take.uniform(1500, 7000, 96), take.uniform(0.0004, 0.0015, 96)
    drops = _rings(take, rate, 0.005, pitches, decays, 3.0)
    pitches, decays = take.uniform(500, 2500, 32), take.uniform(0.003, 0.010, 32)
    drips = _rings(take, rate, 0.03, pitches, decays, 0.2)
    wet = count // 12
    loud = take.lognormal(0, 0.8, (count + wet, 1))
    starts = take.integers(0, n, count)
    drop = _scatter(n, starts, drops[take.integers(0, 96, count)] * loud[:count])
    drip = _scatter(n, take.integers(0, n, wet), drips[take.integers(0, 32, wet)] * loud[count:])
    return [
        (0, None, _band(source.uniform(200, 900), source.uniform(5000, 11000), 0.8)),
        (source.uniform(-8, 2) + 3 * hard, drop, None),
        (source.uniform(-28, -12), drip, None),
    ]


def _sea_waves(clip):
    source, take, rate, n = clip
    period, depth = source.uniform(3.5, 8.0), source.uniform(1.2, 2.6)
    t = np.arange(n) / rate
    breaks = _times(take, -take.uniform(0, period), n / rate, period, 0.25)
    rise, fall = source.uniform(0.6, 1.4), source.uniform(1.2, 2.5)
    swell = np.zeros(n)
    for at in breaks:
        before, after = np.exp((t - at - rise) / (0.35 * rise)), np.exp((at + rise - t) / fall)
        swell += take.uniform(0.5, 1) * np.where(t < at + rise, before, after)
    hiss = _white(take, n) * (0.06 + swell) ** (0.5 * depth)
    roar = _white(take, clip.slow_n) * (0.15 + swell[:: clip.step][: clip.slow_n]) ** 0.6
    surf = _band(source.uniform(350, 900), source.uniform(2500, 6000), 0.7)
    return [
        (0, hiss.astype(np.float32), surf),
        (source.uniform(-4, 4), roar.astype(np.float32), _band(60, source.uniform(250, 600), 1.2)),
    ]


def _crackling_fire(clip):
    source, take, rate, n = clip
    density, snap = _log_uniform(source, 25, 100), source.uniform(0.8, 1.4)
    count = max(4, take.poisson(density * n / rate))
    kinds = 64
    t = np.arange(int(0.012 * rate)) / rate
    cracks = take.uniform(-1, 1, (kinds, t.size))
    cracks *= np.exp(-t / np.exp(take.uniform(np.log(0.0002), np.log(0.0025), (kinds, 1))))
    starts = take.integers(0, n, count)
    burst = take.integers(0, n, 6)[take.integers(0, 6, count)]
    burst = burst + take.exponential(0.06 * rate, count)
    starts = np.where(take.random(count) < 0.4, burst, starts).astype(np.int64)
    loud = take.lognormal(0, snap, (count, 1))
    crackle = _scatter(n, starts, cracks[take.integers(0, kinds, count)] * loud)
    roar = _white(take, clip.slow_n) * _wander(take, clip.slow_n, int(3 * n / rate), 0.3, 1)
    return [
        (0, crackle, None),
        (source.uniform(-14, -3), roar, _band(40, source.uniform(120, 350), 1.0)),
        (source.uniform(-22, -10), None, _band(800, 6000, 1.0)),
    ]


def _crying_baby(clip):
    source, take, rate, n = clip
    pitch = _log_uniform(source, 340, 520)
    tract = source.uniform(0.9, 1.15)
    mouth = [
        _formants((a * tract, 350, 1.0), (b * tract, 500, 0.6), (3500 * tract, 900, 0.4),
                  (5200 * tract, 1200, 0.15))
        for a, b in ((750, 1700), (1150, 1900), (900, 1600))
    ]  # fmt: skip
    length, rough = source.uniform(0.5, 1.3), source.uniform(0.02, 0.25)
    gasp = _formants((1800, 1200, 1.0), (3800, 2000, 0.6))
    y = np.zeros(n, np.float32)
    at = take.uniform(0.0, 0.6)
    while at < n / rate - 0.2:
        m = int(rate * length * take.uniform(0.6, 1.4))
        p = np.linspace(0, 1, m)
        peak = take.uniform(0.1, 0.5)
        arch = np.interp(p, (0, 0.5 * peak, peak, 0.8, 1), (0.75, 1.0, 1.1, 0.95, 0.7))
        quiver = 1 + 0.015 * np.sin(2 * np.pi * take.uniform(5, 9) * m / rate * p)
        f0 = pitch * take.uniform(0.92, 1.1) * arch * quiver
        cry = _voice(take, f0, rate, mouth, 0.5, rough, 0.02) * _swell(m, 0.12, 0.3)
        _add(y, cry * take.uniform(0.6, 1), at * rate)
        at += m / rate + 0.03
        g = int(rate * take.uniform(0.12, 0.28))
        _add(y, 0.3 * _shape(_white(take, g), rate, gasp) * _swell(g, 0.5, 0.2), at * rate)
        at += g / rate + take.uniform(0.02, 0.25)
    return [(0, y, None)]


def _sneezing(clip):
    source, take, rate, n = clip
    pitch = _log_uniform(source, 220, 450)
    tract = (pitch / 220) ** 0.3
    ah = _formants((800 * tract, 250, 1.0), (1300 * tract, 300, 0.6), (2600 * tract, 500, 0.25))
    oo = _formants((450 * tract, 200, 1.0), (1000 * tract, 300, 0.3), (2500 * tract, 600, 0.1))
    hiss = _band(source.uniform(1600, 3600), source.uniform(6000, 11000), 1.5)
    draw, blast = source.uniform(0.3, 0.7), source.uniform(0.10, 0.22)
    y = np.zeros(n, np.float32)
    at = take.uniform(0.02, 0.25) * n / rate
    while at < n / rate - 1.0:
        m = int(rate * draw * take.uniform(0.8, 1.2))
        f0 = pitch * np.linspace(1.0, 1.5, m)
        inhale = _voice(take, f0, rate, (ah,), 1.0, 0.9, 0.03) * _swell(m, 0.8, 0.08)
        _add(y, 0.25 * inhale, at * rate)
        at += m / rate + take.uniform(0.02, 0.12)
        m = int(rate * blast * take.uniform(0.8, 1.2))
        puff = _shape(_white(take, m), rate, hiss)
        puff *= _swell(m, 0.15, 0.8) / max(1e-9, np.sqrt(np.mean(puff**2)))
        _add(y, 0.8 * puff, at * rate)
        v = int(rate * take.uniform(0.14, 0.3))
        f0 = pitch * take.uniform(1.3, 1.7) * np.linspace(1.0, 0.6, v)
        shout = _voice(take, f0, rate, (ah, oo), 0.9, 0.5, 0.03) * _swell(v, 0.05, 0.8)
        _add(y, 0.8 * shout, (at + 0.35 * m / rate) * rate)
        at += m / rate + v / rate + take.uniform(0.4, 2.0)
    return [(0, y, None)]


def _clock_tick(clip):
    source, take, rate, n = clip
    gap = float(source.choice((0.25, 0.4, 0.5, 1.0))) * source.uniform(0.95, 1.05)
    modes = 6
    y, sides = np.zeros(n, np.float32), []
    for tone in (1.0, source.uniform(0.7, 0.95)):
        pitches = tone * np.exp(source.uniform(np.log(2200), np.log(8500), modes))
        decays = source.uniform(0.0005, 0.0025, modes)
        ring = _rings(source, rate, 0.03, pitches, decays, 1.0)
        body = _rings(source, rate, 0.03, tone * source.uniform(250, 700), 0.004)[0]
        sides.append(source.uniform(0.3, 1, modes) @ ring + source.uniform(0.0, 0.25) * body)
    echo, soft = source.uniform(0.006, 0.025), source.uniform(0.1, 0.5)
    weak = source.uniform(0.3, 1.0)
    for i, at in enumerate(_times(take, take.uniform(0, gap), n / rate, gap, 0.004)):
        tick = (weak if i % 2 else 1.0) * take.uniform(0.85, 1) * sides[i % 2].astype(np.float32)
        _add(y, soft * tick, at * rate)
        _add(y, tick, (at + echo) * rate)
    return [(0, y, None)]


def _helicopter(clip):
    source, take, *_ = clip
    m, low = clip.slow_n, clip.slow_rate
    blades = _log_uniform(source, 14, 28)
    drift = np.cumsum(blades / low * (1 + 0.01 * _wander(take, m, 6, -1, 1)), dtype=float)
    chop = drift % 1
    sharp = source.uniform(3, 9)
    slap = np.exp(-sharp * chop) * (1 - np.exp(-60 * chop))
    near = _wander(take, m, 3, 0.6, 1)
    wash = _white(take, m) * (source.uniform(0.1, 0.35) + slap) * near
    thump = slap * _sine(source.uniform(4, 7) * chop) * near
    whine = _sine(drift * round(source.uniform(25, 60))) * near
    return [
        (0, wash, _band(source.uniform(60, 150), source.uniform(500, 1500), 0.9)),
        (source.uniform(-6, 2), thump.astype(np.float32), _band(20, 300, 1.5)),
        (source.uniform(-30, -16), whine.astype(np.float32), None),
        (source.uniform(-28, -16), None, _band(300, 5000, 0.8)),
    ]


def _chainsaw(clip):
    source, take, rate, n = clip
    rev = _log_uniform(source, 100, 190)
    idle = rev * source.uniform(0.35, 0.65)
    # the throttle is a lever: what the engine follows is a slow curve between idle and full
    throttle = np.clip(_wander(take, n, max(3, int(0.9 * n / rate)), -0.3, 1.5), 0, 1)
    shake = 1 + 0.015 * _wander(take, n, int(25 * n / rate), -1, 1)
    f0 = (idle + (rev - idle) * throttle) * shake
    pipe = _formants(
        (source.uniform(250, 500), 400, 1.0), (source.uniform(800, 1400), 900, 0.8),
        (source.uniform(2200, 3500), 2000, 0.5), (6000, 5000, 0.25),
    )  # fmt: skip
    slope, hiss = source.uniform(0.15, 0.5), source.uniform(0.3, 0.8)
    engine = _voice(take, f0, rate, (pipe,), slope, hiss, source.uniform(0.01, 0.04))
    phase = np.cumsum(f0 / rate, dtype=float)
    # no two strokes burn alike
    power = (0.35 + 0.65 * throttle) * take.uniform(0.4, 1, int(phase[-1]) + 1)[phase.astype(int)]
    teeth = _white(take, n) * power * (0.5 + np.exp(-4 * (phase % 1)))
    return [
        (0, engine * power, None),
        (source.uniform(-4, 4), teeth.astype(np.float32), _band(1500, 7000, 1.0)),
    ]


# --- layers of scenes ----------------------------------------------------------------------------

_VOWELS = tuple(
    _formants((a, 180, 1.0), (b, 250, 0.5), (2600, 500, 0.2), (3500, 800, 0.08))
    for a, b in ((750, 1250), (300, 2200), (500, 1800), (350, 850))
)


def _babble(clip, talkers, level):
    """Layers of `talkers` voices at once: every vowel is a bus that the talkers fade into."""
    level, take, m = clip.level(level), clip.take, clip.slow_n
    seconds = max(1, round(clip.n / clip.rate))
    buses = np.zeros((len(_VOWELS), m), np.float32)
    for _ in range(talkers):
        pitch = _log_uniform(clip.source, 95, 240)
        f0 = pitch * (1 + 0.2 * _wander(take, m, 3 * seconds, -1, 1))
        phase = np.cumsum(f0 / clip.slow_rate, dtype=float)
        saw = (phase - np.floor(phase) - 0.5).astype(np.float32) + 0.25 * _white(take, m)
        phrase = np.clip(_wander(take, m, seconds, -0.6, 1.2), 0, 1)
        saw *= phrase * _wander(take, m, 8 * seconds, 0, 1) ** 2 * take.uniform(0.3, 1)
        for bus in buses:
            bus += saw * np.clip(_wander(take, m, 6 * seconds, -1, 1), 0, 1)
    loud = 10 * np.log10(np.mean(buses**2, axis=1) + 1e-12)
    loud += level - 10 * np.log10(np.mean(buses**2) * len(_VOWELS) + 1e-12)
    rows = [(float(db), bus, v) for db, bus, v in zip(loud, buses, _VOWELS, strict=True)]
    # consonants: hiss between the vowels
    hiss = _white(take, m) * np.abs(buses[0] - buses[1])
    return [*rows, (level - 12, hiss, _band(2000, 4500, 1.5))]


def _steps(clip, level, walkers=2):
    """Layer of footsteps: heel, then sole."""
    level = clip.level(level)
    source, take, rate, n = clip
    y = np.zeros(n, np.float32)
    for _ in range(walkers):
        pitches = source.uniform((90, 250, 800), (160, 600, 1600))
        heel = _rings(source, rate, 0.06, pitches, source.uniform(0.003, 0.010, 3), 1.2).sum(0)
        sole = 0.4 * _swell(int(0.07 * rate), 0.3, 0.6)
        pace, far = source.uniform(0.45, 0.62), take.uniform(0.3, 1)
        for at in _times(take, take.uniform(0, 1), n / rate, pace, 0.06):
            _add(y, far * take.uniform(0.6, 1) * heel.astype(np.float32), at * rate)
            _add(y, far * sole * _white(take, sole.size), (at + 0.05) * rate)
    return (level, y, None)


def _rumble(clip, low, high, level, ripple=0.4):
    """Layer of noise between `low` and about `high` Hz, louder and softer by `ripple`."""
    level, m = clip.level(level), clip.slow_n
    x = _white(clip.take, m)
    x = x * _wander(clip.take, m, max(2, int(1.5 * clip.n / clip.rate)), 1 - ripple, 1)
    return (level, x, _band(low, high * clip.source.uniform(0.7, 1.4), 1.0))


def _hum(clip, pitches, level, curve, slope=0.8):
    """Layer of a machine's harmonics whose pitch (Hz) goes from the first to the last."""
    f0 = np.linspace(*pitches, clip.slow_n)
    f0 = f0 * (1 + 0.02 * _wander(clip.take, clip.slow_n, 12, -1, 1))
    x = _voice(clip.take, f0, clip.slow_rate, (curve,), slope, 0.2, 0.01)
    return (level, x.astype(np.float32), None)


def _chime(clip, at, pitches, level, decay=0.4, gap=0.35):
    """Layer of bell or loudspeaker tones, one after the other from `at` seconds."""
    level, low = clip.level(level), clip.slow_rate
    y = np.zeros(clip.slow_n, np.float32)
    for i, pitch in enumerate(pitches):
        partials = pitch * np.array([1, 2, 2.76, 5.4])
        partials = partials[partials < 0.45 * low]
        order = np.arange(1, partials.size + 1)
        tone = _rings(clip.take, low, 3 * decay, partials, decay / order) / order[:, None]
        _add(y, tone.sum(0), (at + i * gap) * low)
    return (level, y, None)


def _rail_joints(clip, level):
    """Layer of wheels over rail joints: two bogies, two axles each."""
    level = clip.level(level)
    source, take, rate, n = clip
    pitches = source.uniform((45, 90, 200, 450), (80, 180, 400, 900))
    knock = _rings(source, rate, 0.12, pitches, source.uniform(0.008, 0.04, 4), 0.8)
    knock = knock.sum(0).astype(np.float32)
    period, axle = source.uniform(0.9, 1.8), source.uniform(0.12, 0.2)
    y = np.zeros(n, np.float32)
    for at in _times(take, take.uniform(0, period), n / rate, period, 0.03):
        for offset in (0, axle, 2.6 * axle, 3.6 * axle):
            _add(y, knock * take.uniform(0.5, 1), (at + offset) * rate)
    return (level, y, None)


def _squeal(clip, level):
    """Layer of a brake or a flange: a few unstable high tones that come and go."""
    level = clip.level(level)
    source, take, rate, n = clip
    t = np.arange(n) / rate
    at, width = take.uniform(0, n / rate), take.uniform(0.8, 2.5)
    y = np.zeros(n)
    for _ in range(3):
        f0 = source.uniform(1800, 5200) * (1 + 0.01 * _wander(take, n, 20, -1, 1))
        y += _sine(np.cumsum(f0 / rate, dtype=float)) * _wander(take, n, 40, 0.1, 1)
    return (level, (y * np.exp(-(((t - at) / width) ** 2))).astype(np.float32), None)


def _cars(clip, level, every):
    """Layers of passing cars: tyre noise that swells and fades, an engine that drops in pitch."""
    level, source, take = clip.level(level), clip.source, clip.take
    m, low = clip.slow_n, clip.slow_rate
    t = np.arange(m) / low
    tyres, engines = np.zeros(m, np.float32), np.zeros(m, np.float32)
    for at in _times(take, take.uniform(-1, 1), clip.n / clip.rate + 1, every, 0.5):
        near, speed = take.uniform(4, 12), take.uniform(9, 18)
        x = speed * (t - at)
        far = np.sqrt(near**2 + x * x)
        gain = near / far * np.sqrt(near / far) * take.uniform(0.5, 1)
        tyres += (gain * _white(take, m)).astype(np.float32)
        phase = np.cumsum(take.uniform(45, 90) / low * (1 - speed / 343 * x / far))
        saw = phase - np.floor(phase) - 0.5
        engines += (gain * saw * saw * saw).astype(np.float32)
    road = _band(source.uniform(150, 400), source.uniform(700, 1500), 1.2)
    return [(level, tyres, road), (level + 1, engines, _band(40, 700, 1.0))]


def _birds(clip, level):
    """Layer of a few singers, each with a phrase of chirps that it repeats."""
    level = clip.level(level)
    source, take, rate, n = clip
    y = np.zeros(n, np.float32)
    for _ in range(source.integers(2, 5)):
        notes = source.integers(2, 7)
        pitch = _log_uniform(source, 2200, 4800)
        ends = pitch * source.uniform(0.75, 1.35, (notes, 3))
        lengths = source.uniform(0.03, 0.18, notes)
        far = take.uniform(0.2, 1)
        for start in _times(take, take.uniform(0, 2), n / rate, source.uniform(1.2, 3.0), 0.3):
            at = start
            for turns, length in zip(ends, lengths, strict=True):
                m = int(length * rate)
                f0 = np.interp(np.linspace(0, 1, m), (0, 0.5, 1), turns)
                _add(y, far * _sine(np.cumsum(f0 / rate)) * _swell(m, 0.3, 0.4), at * rate)
                at += length + 0.04
    return (level, y, None)


def _music(clip, level):
    """Layers of background music heard over small loudspeakers: chords, bass and a beat."""
    level, low = clip.level(level), clip.slow_rate
    source, take, rate, n = clip
    beat, root = source.uniform(0.42, 0.65), source.uniform(196, 330)
    y = np.zeros(clip.slow_n, np.float32)
    for i, at in enumerate(_times(take, 0, n / rate, beat, 0.002)):
        degree = (0, 5, 7, 9)[(i // 4) % 4]
        notes = [degree - 12, degree + int(take.choice((0, 4, 7, 12, 16)))]
        notes += [degree, degree + 4, degree + 7] if i % 2 == 0 else []
        pitches = root * 2 ** (np.array(notes) / 12)
        for harmonic, gain in ((1, 1.0), (2, 0.5), (3, 0.3)):
            tone = _rings(take, low, 2 * beat, harmonic * pitches, 0.5 * beat / harmonic)
            _add(y, gain * tone.sum(0).astype(np.float32), at * low)
    tick = _rings(source, rate, 0.05, 7000, 0.01, 3.0)[0].astype(np.float32)
    hats = np.zeros(n, np.float32)
    for at in _times(take, beat / 2, n / rate, beat, 0.01):
        _add(hats, tick, at * rate)
    return [(level, y, _band(150, 5000, 1.5)), (level - 14, hats, None)]


# --- scenes --------------------------------------------------------------------------------------
# a level is a number of dB, or the range that the source draws it from


def _airport(clip):
    wheels = _rumble(clip, 150, 900, (-14, -6), 0.9)
    call = _log_uniform(clip.source, 420, 720) * np.array([1, 1.26, 1.5])
    at = clip.take.uniform(0, 0.6) * clip.n / clip.rate
    return [
        *_babble(clip, 6, 0),
        _rumble(clip, 60, 400, (-4, 4)),
        wheels,
        _chime(clip, at, call, (-14, -4)),
        _steps(clip, (-16, -8)),
    ]


def _bus(clip):
    idle = clip.source.uniform(24, 36)
    cabin = _formants((90, 80, 1.0), (180, 150, 0.7), (420, 400, 0.3), (1200, 1500, 0.08))
    end = idle * clip.take.uniform(0.9, 2.2)
    return [
        _hum(clip, (idle * clip.take.uniform(1, 1.8), end), 0, cabin, 0.4),
        _rumble(clip, 30, 250, (-2, 4), 0.5),
        _rumble(clip, 300, 2000, (-18, -10), 0.3),
        *_babble(clip, 2, (-18, -8)),
    ]


def _metro(clip):
    low = clip.source.uniform(180, 420)
    motor = _formants((low, 300, 1.0), (3 * low, 600, 0.5), (2200, 1200, 0.2))
    return [
        _rumble(clip, 40, 350, 0, 0.4),
        _hum(clip, (low * 0.8, low * clip.take.uniform(0.7, 1.5)), -6, motor, 0.8),
        _rail_joints(clip, (-14, -6)),
        _squeal(clip, (-26, -14)),
        _rumble(clip, 800, 4000, (-22, -12), 0.4),
    ]


def _metro_station(clip):
    source, take, m = clip.source, clip.take, clip.slow_n
    arrive = 1 / (1 + np.exp(-(np.arange(m) / m - take.uniform(0.2, 0.8)) / 0.08))
    train = (_white(take, m) * (arrive if take.random() < 0.5 else 1 - arrive)).astype(np.float32)
    door = [_log_uniform(source, 700, 1400)] * 4
    return [
        *_babble(clip, 4, (-6, 0)),
        (source.uniform(-4, 4), train, _band(80, 1200, 1.0)),
        _squeal(clip, (-16, -6)),
        _chime(clip, take.uniform(1, 7), door, -14, 0.08, 0.2),
        _steps(clip, (-14, -6)),
    ]


def _park(clip):
    return [
        _birds(clip, 0),
        _rumble(clip, 400, 3000, (-10, 0), 0.7),
        _rumble(clip, 30, 200, (-10, 0), 0.6),
        *_babble(clip, 1, (-24, -12)),
    ]


def _public_square(clip):
    bell = [_log_uniform(clip.source, 260, 520)] * 3
    return [
        *_babble(clip, 6, 0),
        _steps(clip, (-10, -4), 3),
        *_cars(clip, (-14, -6), 6.0),
        _chime(clip, clip.take.uniform(0, 4), bell, (-26, -14), 1.0, 1.6),
        _birds(clip, (-26, -14)),
    ]


def _shopping_mall(clip):
    beeps = [_log_uniform(clip.source, 1800, 2600)] * int(clip.take.integers(1, 4))
    return [
        *_music(clip, (-4, 4)),
        *_babble(clip, 5, 0),
        _chime(clip, clip.take.uniform(0, 7), beeps, (-24, -16), 0.1, 0.9),
        _rumble(clip, 60, 500, (-8, 0)),
    ]


def _street_pedestrian(clip):
    return [_steps(clip, 0, 4), *_babble(clip, 3, (-4, 4)), *_cars(clip, (-10, -4), 5.0)]


def _street_traffic(clip):
    horn = _formants((900, 900, 1.0), (2200, 1500, 0.5))
    pitch = clip.source.uniform(330, 440)
    level, x, _ = _hum(clip, (pitch, pitch), -12, horn)
    span = np.abs(np.arange(x.size) / x.size - clip.take.uniform(0.1, 0.9)) < 0.03
    return [
        *_cars(clip, 0, clip.source.uniform(1.2, 2.5)),
        _rumble(clip, 30, 250, (-6, 2)),
        (level - 6, x * span * _swell(clip.slow_n, 0.05, 0.05), None),
    ]


def _tram(clip):
    low = clip.source.uniform(90, 220)
    motor = _formants((4 * low, 500, 1.0), (9 * low, 900, 0.6), (200, 200, 0.6))
    gong = [_log_uniform(clip.source, 900, 1500)] * int(clip.take.integers(1, 4))
    return [
        _hum(clip, (low, low * clip.take.uniform(0.6, 2.0)), 0, motor, 0.6),
        _rumble(clip, 40, 350, (-4, 2)),
        _rail_joints(clip, (-14, -6)),
        _chime(clip, clip.take.uniform(0, 7), gong, (-14, -6), 0.5, 0.4),
        *_babble(clip, 2, (-16, -8)),
    ]


# --- recording -----------------------------------------------------------------------------------


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
    band = _band(source.uniform(20, 150), source.uniform(5000, 15000), 1.0)(f)
    return (band * 10 ** (np.interp(np.log2(f / 1000), octaves, uneven) / 20)).astype(np.float32)


def _surroundings(clip):
    """Layers of something else that goes on nearby, in two of five recordings."""
    level, kind = clip.take.uniform(*_SURROUNDINGS_DB), clip.take.integers(0, 10)
    other = clip._replace(source=clip.take)
    kinds = {
        0: lambda: _babble(other, 1, level),
        1: lambda: _cars(other, level, 4.0),
        2: lambda: [_rumble(other, 30, 400, level, 0.9)],
        3: lambda: [_steps(other, level, 1)],
    }
    return kinds.get(kind, list)()


def _record(clip, layers, room):
    """Sum the layers in a room, through a microphone, over background noise, at a random level."""
    source, take, rate, n = clip
    tail = int(np.ceil((n + _TAIL_S * rate) / clip.step))
    size = clip.step * fft.next_fast_len(tail, real=True)
    f = np.maximum(fft.rfftfreq(size, 1 / rate), 1.0).astype(np.float32)
    total = np.zeros(f.size, np.complex64)
    for layer in layers:
        part = _layer_spectrum(layer, f, n, size, take)
        total[: part.size] += part
    total *= _room_response(source, rate, size, room)
    total *= _microphone(source, f)
    snr, slope = take.uniform(*_SNR_DB), take.uniform(0.2, 0.9)
    hiss = (_energy_db(total) - snr, None, lambda f: f**-slope)
    total += _layer_spectrum(hiss, f, n, size, take)
    y = fft.irfft(total, size)[:n]
    gain = 10 ** (take.uniform(*_LEVEL_DB) / 20) / max(1e-9, float(np.sqrt(np.mean(y**2))))
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


# --- clips and data sets -------------------------------------------------------------------------

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
# scene → its number, the sketch and its room
_SCENES = {
    "airport": (0, _airport, (0.3, 0.7, 0.3, 0.9)),
    "bus": (1, _bus, (0.04, 0.12, 0.1, 0.5)),
    "metro": (2, _metro, (0.05, 0.15, 0.1, 0.5)),
    "metro_station": (3, _metro_station, (0.4, 0.9, 0.3, 0.9)),
    "park": (4, _park, (0.05, 0.2, 0.05, 0.3)),
    "public_square": (5, _public_square, (0.1, 0.3, 0.1, 0.5)),
    "shopping_mall": (6, _shopping_mall, (0.3, 0.7, 0.3, 0.9)),
    "street_pedestrian": (7, _street_pedestrian, (0.08, 0.25, 0.1, 0.5)),
    "street_traffic": (8, _street_traffic, (0.05, 0.2, 0.05, 0.4)),
    "tram": (9, _tram, (0.04, 0.12, 0.1, 0.5)),
}
EVENTS = tuple(_EVENTS)
SCENES = tuple(_SCENES)


def synthesize(
    label, seed=0, sample_rate=SAMPLE_RATE, duration_s=None, *, pool="study", source=0, take=0
):
    """Make one clip of an event or a scene: float32, within ±0.95, at a random level.

    `seed` is that of the whole data set; clips of different pools never share a random draw; `source`
    says which dog, clock or street, `take` which recording of it. Another `sample_rate` (Hz, at least
    8000) is another performance; `duration_s` is at least 2, by default 5 (event) or 10 (scene).
    """
    if label not in _EVENTS and label not in _SCENES:
        raise ValueError(f"unknown label {label!r}; known are {', '.join(EVENTS + SCENES)}")
    if pool not in POOLS:
        raise ValueError(f"unknown pool {pool!r}; known are {', '.join(POOLS)}")
    if duration_s is None:
        duration_s = EVENT_SECONDS if label in _EVENTS else SCENE_SECONDS
    if sample_rate < 8000 or duration_s < 2 or min(seed, source, take) < 0:
        raise ValueError(
            "need a rate of 8000 Hz, 2 s and seeds of 0 or more, "
            f"got {sample_rate} Hz, {duration_s} s, seed {seed}, source {source}, take {take}"
        )
    key = [seed, zlib.crc32(f"{pool}/{label}".encode()), source]
    rngs = np.random.default_rng([*key, 0]), np.random.default_rng([*key, 1, take])
    clip = _Clip(*rngs, sample_rate, round(duration_s * sample_rate))
    _, sketch, room = _EVENTS.get(label) or _SCENES[label]
    layers = sketch(clip)
    if label in _SCENES:
        return _record(clip, layers, room)
    y = _record(clip, layers + _surroundings(clip), room)
    if clip.take.random() < _CUT_SHORT:  # zeros fill it up, as in ESC-50
        end, fade = int(clip.take.uniform(0.45, 0.9) * y.size), int(0.01 * sample_rate)
        y[end:] = 0
        y[end - fade : end] *= np.linspace(1, 0, fade, dtype=np.float32)
    return y


def write_events(root, clips_per_class=40, seed=0, pool="study"):
    """Write the ten events in ESC-50's layout (``meta/esc50.csv``, ``audio/``); return `root`.

    They are spread evenly over five folds, two takes per source; sources of different pools have
    different numbers. Clips that the same recipe made are kept, so that after an interruption the
    next call makes what is missing.
    """
    clips = _plan(_EVENTS, clips_per_class, pool)
    names = [f"{c.fold}-{c.src_file}-{'AB'[c.take]}-{c.target}.wav" for c in clips.itertuples()]
    table = clips.assign(filename=names, esc10=True, take=clips["take"].map("AB".__getitem__))
    columns = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    clips.index = [f"audio/{name}" for name in names]
    return _write(root, clips, {"meta/esc50.csv": table[columns]}, seed, pool)


def write_scenes(root, scenes_per_class=20, seed=0, pool="study"):
    """Write the ten scenes in the layout of TAU Urban Acoustic Scenes 2020 Mobile.

    As :func:`write_events`. A location (the table's ``identifier``) is one source; a city belongs to
    one fold, so that folds share no location.
    """
    clips = _plan(_SCENES, scenes_per_class, pool)
    places = [f"{CITIES[c.source % len(CITIES)]}-{c.src_file}" for c in clips.itertuples()]
    names = "audio/" + clips["category"] + "-" + places + "-" + clips["take"].astype(str) + "-a.wav"
    table = pd.DataFrame({"filename": names, "scene_label": clips["category"]})
    table = table.assign(identifier=places, source_label="a")
    clips.index = names
    return _write(root, clips, {"meta.csv": table}, seed, pool)


def _plan(kinds, per_class, pool):
    """Fold, source and take of every clip of a class; more clips keep the earlier ones."""
    if pool not in POOLS:
        raise ValueError(f"unknown pool {pool!r}; known are {', '.join(POOLS)}")
    rows = []
    for label, (target, *_) in kinds.items():
        for i in range(per_class):
            fold, place = i % N_FOLDS, i // N_FOLDS
            source = place // _TAKES_PER_SOURCE * N_FOLDS + fold
            number = (POOLS.index(pool) + 1) * 1_000_000 + target * 10_000 + source
            rows.append((label, target, fold + 1, source, place % _TAKES_PER_SOURCE, number))
    return pd.DataFrame(rows, columns=["category", "target", "fold", "source", "take", "src_file"])


def _write(root, clips, tables, seed, pool):
    if clips.empty or seed < 0:
        raise ValueError(f"need at least 1 clip per class and a seed of 0 or more, got {seed}")
    root = Path(root)
    # a change of the sketches makes new clips: the recipe knows the code that it was made by
    recipe = store.content_key(seed, pool, store.file_digest(__file__))
    made = store.Records(root, "clips")
    if not made.folder.is_dir() and any((root / name).exists() for name in ("audio", *tables)):
        raise store.DataError(f"{root}: holds data that were not made here; choose another folder")
    made.folder.mkdir(parents=True, exist_ok=True)
    for clip in clips.itertuples():
        path, known = root / clip.Index, made.entries.get(clip.Index, {})
        if known.get("recipe") != recipe or not store.is_unchanged(path, known.get("stamp")):
            y = synthesize(clip.category, seed, pool=pool, source=clip.source, take=clip.take)
            audio.save_audio(path, y, SAMPLE_RATE)
            made.add(clip.Index, {"recipe": recipe, "stamp": store.file_stamp(path)})
    # the tables come last: what they name is there
    for name, table in tables.items():
        text = table.to_csv(index=False, sep="\t" if "meta.csv" in tables else ",")
        # an unchanged file keeps its date, so that nothing downstream is made again
        if not (root / name).is_file() or (root / name).read_text("utf-8") != text:
            store.write_atomic(root / name, text)
    return root
