"""Lay foreground events over acoustic scenes: ``x = λ1·x1 + λ2·x2``.

:func:`plan_mixes` draws the recipes, balanced over labels and scenes and split by fold;
:func:`render_mixes` turns them into files, :class:`MixDataset` into samples as they are asked for.
A recipe is complete: the same table gives the same bytes, whatever the order, the number of
workers, or what was already there.
"""

import collections
import hashlib
import inspect
import io
import itertools
import json
import math
import numbers
import os
import shutil
import threading
import uuid
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import soundfile as sf

from soundscapes_utils import audio, captions, store
from soundscapes_utils.datasets import assign_splits

MIX_COLUMNS = [
    "clip_id",
    "split",
    "foreground",
    "label",
    "source_id",
    "background",
    "scene",
    "background_source",
    "onset_s",
    "duration_s",
    "active_start_s",
    "active_end_s",
    "clip_s",
    "repeats",
    "gap_s",
    "fade_s",
    "foreground_gain_db",
    "background_gain_db",
    "snr_db",
    "level_measure",
    "peak_scale",
    "seed",
    "events",
    "caption",
    "caption_2",
    "caption_3",
    "path",
]
EVENT_COLUMNS = [
    "clip_id",
    "event",
    "repetition",
    "label",
    "source",
    "foreground",
    "onset_s",
    "offset_s",
    "snr_db",
    "foreground_gain_db",
    "fade_s",
]
SPLITS = ("train", "val", "test")
MODES = ("snr", "lambda")
ENGINES = ("numpy", "pydub")
BACKENDS = ("loky", "dask")
FORMATS = ("wav", "flac")
MEASURES = ("rms", "lufs")
# What Gaurav et al. (DCASE 2024 Task 7) report, and what their public code does instead.
PRESETS = {
    "gaurav2024-report": {
        "mode": "lambda",
        "foreground_lambda": 1.0,
        "background_lambda": 1.0,
        "onset": 0.0,
        "duration_s": 10.0,
        "sample_rate": 44_100,
    },
    "gaurav2024-code": {
        "mode": "lambda",
        "foreground_gain_db": 3.0,
        "background_gain_db": -3.0,
        "repeat": 2,
        "onset": 0.0,
        "duration_s": 10.0,
        "sample_rate": 44_100,
    },
}
# Decoded sources that a process keeps, half for each kind. joblib ends workers that grow by 300 MB.
CACHE_BYTES = 240 * 2**20

_STEPS = np.float32(32768)
_FRAME_S = 0.02
_ACTIVE_DB = 30.0
_RECIPE_FIELDS = ("onset_s", "duration_s", "foreground_gain_db", "background_gain_db")
_NEEDED = ("clip_id", "split", "foreground", "background", *_RECIPE_FIELDS)
_PLACEMENT = {"fade_s": 0.0, "repeats": 1, "gap_s": 0.0}
# Recipes pass through CSV, whose readers are exact to about 15 digits only.
_DECIMALS = 4
_RECIPES_FILE = "recipes.csv"
_JOURNALS = ".recipes"
_KINDS = ("foreground", "background")
_MIXES_PER_WORKER = 500
_MIN_CHUNK = 32
# The place of each option in the uniform numbers of an event; what is added comes last.
_DRAWN = (
    "snr_db",
    "onset",
    "foreground_gain_db",
    "background_gain_db",
    "events",
    "repeat",
    "gap_s",
    "fade_s",
    "foreground_lambda",
    "background_lambda",
)
_LEAST = {"events": 1, "repeat": 1, "gap_s": 0.0, "fade_s": 0.0}
_WHOLE = ("events", "repeat")


class Event(NamedTuple):
    """A foreground in a mix: ``signal`` at the mix's rate, and when and how it sounds.

    ``onset_s`` in whole milliseconds, ``gain_db``, ``fade_s`` of raised cosine at both ends of
    every repetition, ``repeats``, and ``gap_s`` of silence between two of them.
    """

    signal: np.ndarray
    onset_s: float = 0.0
    gain_db: float = 0.0
    fade_s: float = 0.0
    repeats: int = 1
    gap_s: float = 0.0


class Mix(NamedTuple):
    """A mix as 16 bit holds it: ``audio``, ``peak_scale``, and its two parts where asked for."""

    audio: np.ndarray
    peak_scale: float
    foreground: np.ndarray | None = None
    background: np.ndarray | None = None


# --- one mix ----------------------------------------------------------------------------------


def active_level(y, sample_rate):
    """Measure the level of a signal where it sounds, and when it does.

    A frame of 20 ms is active if it is within 30 dB of the loudest one: the silence that clips
    are padded with must not make a short event seem soft.

    Parameters
    ----------
    y : np.ndarray, shape (samples,)
        Signal, not silent.
    sample_rate : int
        Hz.

    Returns
    -------
    rms_db : float
        RMS over the active frames, dB relative to full scale.
    start_s, end_s : float
        Begin of the first and end of the last active frame in seconds.

    Raises
    ------
    AudioError
        Empty, silent or not finite.

    Examples
    --------
    >>> y = np.concatenate([np.zeros(8000), np.full(8000, 0.1), np.zeros(8000)])
    >>> [round(value, 2) for value in active_level(y, 8000)]
    [-20.0, 1.0, 2.0]
    """
    y = audio.check_audio(y, "signal").astype(np.float64)
    frame = max(1, round(_FRAME_S * sample_rate))
    starts = np.arange(0, y.size, frame)
    power = np.add.reduceat(y**2, starts) / np.diff(np.append(starts, y.size))
    active = power >= power.max() * 10 ** (-_ACTIVE_DB / 10)
    first, last = np.flatnonzero(active)[[0, -1]].tolist()
    end = min((last + 1) * frame, y.size)
    return _db(math.sqrt(power[active].mean())), first * frame / sample_rate, end / sample_rate


def snr_gain_db(foreground, background, sample_rate, snr_db, measure="rms"):
    """Gain of the foreground that sets a signal-to-noise ratio.

    Parameters
    ----------
    foreground, background : np.ndarray, shape (samples,)
        Signals, not silent; the foreground counts where it sounds (:func:`active_level`), the
        background over its whole length.
    sample_rate : int
        Hz.
    snr_db : float
        Ratio wanted in dB.
    measure : {"rms", "lufs"}
        Level that the ratio compares, see :func:`plan_mixes`.

    Returns
    -------
    float
        dB; the background keeps its level.

    Raises
    ------
    AudioError
        Empty, silent or not finite, or too soft for LUFS.
    ValueError
        Unknown measure.

    Examples
    --------
    >>> round(snr_gain_db(np.full(800, 0.1), np.full(800, 0.01), 8000, snr_db=6.0), 2)
    -14.0
    """
    _check_choice("measure", measure, MEASURES)
    background = audio.check_audio(background, "background")
    level = _event_level(foreground, sample_rate, measure, "foreground")[0]
    return snr_db - (level - _whole_level(background, sample_rate, measure, "background"))


def mix_signals(
    foreground,
    background,
    sample_rate,
    *,
    onset_s=0.0,
    duration_s=None,
    foreground_gain_db=0.0,
    background_gain_db=0.0,
    fade_s=0.0,
    repeats=1,
    gap_s=0.0,
    engine="numpy",
):
    """Mix two signals: ``x = λ1·x1 + λ2·x2`` with ``λ = 10^(gain/20)``.

    The background is repeated or cut to the length of the mix; the foreground begins at its onset
    and is cut where the mix ends. What would pass full scale is scaled down as a whole, never
    clipped.

    Parameters
    ----------
    foreground, background : np.ndarray, shape (samples,)
        Signals at `sample_rate`, ±1 is full scale.
    sample_rate : int
        Hz.
    onset_s : float
        Where the foreground begins, in whole milliseconds, below `duration_s`.
    duration_s : float, optional
        Length of the mix; by default the background's.
    foreground_gain_db, background_gain_db : float
        Gains; 0 dB is λ = 1.
    fade_s : float
        Seconds of raised cosine at both ends of the foreground; at most half of it each.
    repeats : int
        How often the foreground sounds.
    gap_s : float
        Seconds of silence between two repetitions.
    engine : {"numpy", "pydub"}
        "pydub" overlays 16-bit segments, as Gaurav et al. did; at 0 dB both agree to one step of
        16 bit.

    Returns
    -------
    y : np.ndarray of float32, shape (samples,)
        The mix, within ±1.
    peak_scale : float
        Factor that kept it there; 1 if none was needed.

    Raises
    ------
    AudioError
        Empty or non-finite signals, an onset outside the mix, a fade, gap or number of repeats
        that is not one, or an unknown engine.

    Examples
    --------
    >>> y, scale = mix_signals(np.full(2, 0.5), np.full(4, 0.25), 1000, onset_s=0.001)
    >>> y.tolist(), scale
    ([0.25, 0.75, 0.75, 0.25], 1.0)
    """
    fg = audio.check_audio(foreground, "foreground", silent_ok=True)
    bg = audio.check_audio(background, "background", silent_ok=True)
    n = bg.size if duration_s is None else round(duration_s * sample_rate)
    event = Event(fg, onset_s, foreground_gain_db, fade_s, repeats, gap_s)
    y, _, scale = _mixed(*_in_steps([event], bg), n, sample_rate, background_gain_db, engine)
    return y / _STEPS, scale


def mix_events(
    events,
    background,
    sample_rate,
    *,
    duration_s=None,
    background_gain_db=0.0,
    engine="numpy",
    stems=False,
):
    """Lay any number of events over one background, as :func:`render_mixes` does.

    Parameters
    ----------
    events : list of Event
        At least one.
    background : np.ndarray, shape (samples,)
        Repeated or cut to the length of the mix.
    sample_rate : int
        Hz, of all signals.
    duration_s : float, optional
        Length of the mix; by default the background's.
    background_gain_db : float
        Gain; 0 dB is λ2 = 1.
    engine : {"numpy", "pydub"}
        See :func:`mix_signals`.
    stems : bool
        Return the parts too. In 16 bit they sum to the mix without any rest: the background is
        rounded, the foreground is what is missing to the mix (so it is off by one step of 16 bit
        at most). Where a part alone would pass full scale, ``peak_scale`` makes room for it too.

    Returns
    -------
    Mix
        ``audio``, ``foreground`` and ``background`` as float32 of shape (samples,), every sample a
        multiple of 1/32768 as in the file; the last two are None without `stems`.

    Raises
    ------
    AudioError
        As :func:`mix_signals`; or no event.

    Examples
    --------
    >>> dog = Event(np.full(2, 0.5), onset_s=0.001, repeats=2, gap_s=0.001)
    >>> mix = mix_events([dog], np.full(8, 0.25), 1000, stems=True)
    >>> mix.audio.tolist()
    [0.25, 0.75, 0.75, 0.25, 0.75, 0.75, 0.25, 0.25]
    >>> bool((mix.foreground + mix.background == mix.audio).all())
    True
    """
    if not events:
        raise audio.AudioError("a mix needs an event; give at least one")
    events = [
        event._replace(signal=audio.check_audio(event.signal, f"event {i}", silent_ok=True))
        for i, event in enumerate(events)
    ]
    bg = audio.check_audio(background, "background", silent_ok=True)
    n = bg.size if duration_s is None else round(duration_s * sample_rate)
    events, bg = _in_steps(events, bg)
    return _as_mix(*_rounded_mix(events, bg, n, sample_rate, background_gain_db, engine, stems))


def _in_steps(events, bg):
    """Scale to steps of 16 bit: a factor of 2^15, which changes no bit of a float's mantissa."""
    return [event._replace(signal=event.signal * _STEPS) for event in events], bg * _STEPS


def _as_mix(parts, scale):
    y, *stems = (None if part is None else part / _STEPS for part in parts)
    return Mix(y, scale, *stems)


def _rounded_mix(events, bg, n, rate, bg_gain_db, engine, stems):
    """Return mix, foreground and background in whole steps (the last two None without stems)."""
    y, background, scale = _mixed(events, bg, n, rate, bg_gain_db, engine, stems)
    np.rint(y, out=y)
    if not stems:
        return (y, None, None), scale
    np.rint(background, out=background)
    return (y, y - background, background), scale


def _mixed(events, bg, n, rate, bg_gain_db, engine, stems=False):
    """Mix what is in steps of 16 bit; return the mix and its background, both scaled, and the scale."""
    if engine not in ENGINES:
        raise audio.AudioError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    placed = [(*_placed(event, n, rate), event.gain_db) for event in events]
    bg = audio.fix_length(bg, n)
    mix = _mix_pydub if engine == "pydub" else _mix_numpy
    return mix(placed, bg, rate, bg_gain_db, stems)


def _placed(event, n, rate):
    """Return the onset in ms and in samples, and the event's samples, cut at the mix's end."""
    onset_ms = round(event.onset_s * 1000)
    # pydub places segments by whole milliseconds, cut down to samples; numpy does likewise
    start = int(onset_ms * (rate / 1000))
    if not 0 <= start < n:
        raise audio.AudioError(f"onset {event.onset_s} s lies outside the mix of {n / rate} s")
    if event.fade_s < 0 or event.gap_s < 0 or event.repeats < 1:
        raise audio.AudioError(
            f"fade {event.fade_s} s, gap {event.gap_s} s and {event.repeats} repeats: give seconds "
            "from 0 and at least one repeat"
        )
    clip, room = event.signal, n - start
    if event.repeats == 1 and not event.fade_s:
        return onset_ms, start, clip[:room]
    period = clip.size + round(event.gap_s * rate)
    y = np.zeros(min(room, (event.repeats - 1) * period + clip.size), np.float32)
    for begin in range(0, y.size, period):
        piece = clip[: y.size - begin]
        y[begin : begin + piece.size] = _faded(piece, round(event.fade_s * rate))
    return onset_ms, start, y


def _faded(y, ramp):
    ramp = min(ramp, y.size // 2)
    if not ramp:
        return y
    y = y.copy()
    rise = (0.5 - 0.5 * np.cos(np.pi * (np.arange(ramp) + 0.5) / ramp)).astype(np.float32)
    y[:ramp] *= rise
    y[-ramp:] *= rise[::-1]
    return y


def _mix_numpy(placed, bg, rate, bg_gain_db, stems):
    y = bg * _factor(bg_gain_db) if bg_gain_db else bg.copy()
    background = y.copy() if stems else None
    for _, start, signal, gain_db in placed:
        y[start : start + signal.size] += signal * _factor(gain_db) if gain_db else signal
    scale = _peak_scale(_peak(y))
    if stems:
        parts = max(_peak(background), _peak(y - background))
        scale = min(scale, _peak_scale(parts, _stem_limit(placed)))
    if scale != 1:
        y *= np.float32(scale)
        background = background * np.float32(scale) if stems else None
    return y, background, scale


def _mix_pydub(placed, bg, rate, bg_gain_db, stems):
    with warnings.catch_warnings():
        # pydub warns on import where ffmpeg is missing, which raw samples do not need
        warnings.simplefilter("ignore")
        from pydub import AudioSegment

    def segment(y, gain_db):
        raw = np.clip(np.rint(y), -32768, 32767).astype("<i2").tobytes()
        whole = AudioSegment(raw, sample_width=2, frame_rate=rate, channels=1)
        return whole.apply_gain(gain_db) if gain_db else whole

    def samples(segment):
        return np.frombuffer(segment.raw_data, dtype="<i2")[: bg.size].astype(np.float32)

    # pydub saturates silently, so the peak of every step must be known before it mixes
    background = bg * _factor(bg_gain_db)
    total = background.copy()
    peak = _peak(total)
    for _, start, signal, gain_db in placed:
        part = signal * _factor(gain_db)
        total[start : start + part.size] += part
        peak = max(peak, _peak(part), _peak(total))
    scale = _peak_scale(peak)
    if stems:
        scale = min(scale, _peak_scale(_peak(total - background), _stem_limit(placed)))
    more = 0 if scale == 1 else _db(scale)
    # pydub rounds lengths to milliseconds; the padding takes that, and is cut off again
    scene = mixed = segment(np.pad(bg, (0, math.ceil(0.01 * rate))), bg_gain_db + more)
    for onset_ms, _, signal, gain_db in placed:
        mixed = mixed.overlay(segment(signal, gain_db + more), position=onset_ms)
    return samples(mixed), samples(scene) if stems else None, scale


def _stem_limit(placed):
    # the foreground is a difference of two rounded parts, which can add a step for each rounding
    return 32766 - len(placed)


def _factor(gain_db):
    return np.float32(10 ** (gain_db / 20))


def _peak(y):
    return max(y.max(), -y.min()) / _STEPS


def _peak_scale(peak, limit=32767):
    return 1.0 if peak <= limit / 32768 else float(limit / 32768 / peak)


def _db(x):
    return 20 * math.log10(x)


def _rms_db(y):
    return _db(math.sqrt(np.mean(y.astype(np.float64) ** 2)))


def _event_level(y, rate, measure, name):
    """Return an event's level where it sounds, and begin and end of that in seconds."""
    level, start, end = active_level(audio.check_audio(y, name), rate)
    if measure == "lufs":
        level = _lufs(y[round(start * rate) : round(end * rate)], rate, name)
    return level, start, end


def _whole_level(y, rate, measure, name):
    return _lufs(y, rate, name) if measure == "lufs" else _rms_db(y)


def _lufs(y, rate, name):
    level = audio.loudness(y, rate)
    if level == -math.inf:
        raise audio.AudioError(
            f"{name}: stays below the gate of -70 LUFS; leave it out, or measure by 'rms'"
        )
    return level


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


# --- planning ---------------------------------------------------------------------------------


def plan_mixes(
    foregrounds,
    backgrounds,
    n,
    seed=0,
    *,
    test_fold=5,
    mode="snr",
    snr_db=(-5.0, 15.0),
    foreground_lambda=1.0,
    background_lambda=1.0,
    onset="uniform",
    duration_s=10.0,
    sample_rate=None,
    preset=None,
    snr_measure="rms",
    foreground_gain_db=0.0,
    background_gain_db=0.0,
    events=1,
    repeat=1,
    gap_s=0.0,
    fade_s=0.0,
    n_captions=3,
):
    """Draw the recipes of a set of mixes.

    Every split takes its foregrounds and its backgrounds from its own folds. Within a split every
    label and every scene occurs equally often, give or take one, in every combination; so does
    every clip of a label. A larger `n` only adds mixes: those of a smaller one stay as they were.

    Where an option says *distribution*, it may be a constant; ``(low, high)`` or ``("uniform", low,
    high)``; ``("choice", [a, b, …])``; or ``("normal", mean, sd, low, high)``, cut at both ends.
    Lists do as well as tuples. Every option draws from numbers of its own, so that changing one
    leaves what the others draw as it was.

    Parameters
    ----------
    foregrounds, backgrounds : pandas.DataFrame
        Clip tables; the label of a background is its scene.
    n : int
        Mixes in all, shared out as the folds are (with five folds 60, 20 and 20 %).
    seed : int
        Everything that is drawn follows from it.
    test_fold : int
        Fold of the test mixes; the next one validates. Backgrounds that have fewer folds count
        round.
    mode : {"snr", "lambda"}
        "snr" draws the ratio of the foreground (where it sounds) to the background (over the mix)
        and sets the foreground's gain to it; "lambda" takes factors and gains, and records the
        ratio that results.
    snr_db : distribution
        Ratio in dB of mode "snr".
    foreground_lambda, background_lambda : distribution
        λ1 and λ2 of mode "lambda", above 0; 1 and 1 is the equation of Gaurav et al.
    onset : "uniform", str or distribution
        Seconds (a number or its text), or "uniform": anywhere such that the active part of the
        last repetition ends within the mix, if it can.
    duration_s : float
        Length of the mixes.
    sample_rate : int, optional
        Rate at which levels are measured: that of the rendering, for a ratio that holds there. By
        default each file's own.
    preset : {"gaurav2024-report", "gaurav2024-code"}, optional
        Values of :data:`PRESETS` for the options that are left at their defaults.
    snr_measure : {"rms", "lufs"}
        Level that the ratio compares. "rms" is taken over the foreground's active frames; "lufs" is
        the integrated loudness of ITU-R BS.1770-4 from the first to the last of them. A foreground
        shorter than that standard's block of 0.4 s is one block of its own length.
    foreground_gain_db, background_gain_db : distribution
        Gains on top of λ1 and λ2. In mode "snr" only that of the background, which then moves the
        level of the whole mix.
    events : distribution
        Foregrounds of a mix, whole numbers from 1. Further ones have labels of their own, and SNR,
        onset and so on are drawn for each; ``events`` in the table holds them.
    repeat : distribution
        How often each foreground sounds, whole numbers from 1.
    gap_s : distribution
        Seconds of silence between two repetitions.
    fade_s : distribution
        Seconds of raised cosine at both ends of each repetition; levels are measured before it.
    n_captions : int
        Captions of a mix, see :func:`~soundscapes_utils.captions.mix_captions`.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`MIX_COLUMNS` (with `n_captions` captions), split after split; ``peak_scale``
        is empty and ``path`` relative until :func:`render_mixes` has made the file. ``clip_s`` is
        the length of the foreground as far as a mix can use it, ``active_start_s`` and
        ``active_end_s`` where in it it sounds; :func:`events_table` reads them.

    Raises
    ------
    ValueError
        Options out of range, too few mixes, more events than labels, folds that do not split (see
        :func:`~soundscapes_utils.datasets.assign_splits`).
    AudioError
        A clip that cannot be read, is silent, or too soft for LUFS.

    Notes
    -----
    The 51,000 mixes of Gaurav et al. (DCASE 2024 Task 7), 2,000 events over 25 or 26 scenes each,
    are ``plan_mixes(events, scenes, 51_000, preset="gaurav2024-report")`` with ESC-50 and TAU 2020 Mobile.
    "gaurav2024-code" is what their public code does, ``foreground * 2 + 3`` over ``background - 3``: on a
    pydub segment ``* 2`` *plays the clip twice* and ``+ 3`` adds 3 dB. A factor of 2 would be 6 dB.

    Distributions for every parameter are scaper's idea (Salamon et al., WASPAA 2017).

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> names = [f"{label}-{fold}" for label in ("dog", "park") for fold in (1, 2, 3)]
    >>> paths = [audio.save_audio(folder / f"{n}.wav", [0.1] * 800, 8000) for n in names]
    >>> clips = pd.DataFrame({"path": paths, "source_id": names, "fold": [1, 2, 3] * 2})
    >>> clips["label"] = [name.split("-")[0] for name in names]
    >>> mixes = plan_mixes(clips[:3], clips[3:], n=3, test_fold=3, duration_s=0.1)
    >>> mixes[["split", "source_id", "background_source"]].to_numpy().tolist()
    [['train', 'dog-2', 'park-2'], ['val', 'dog-1', 'park-1'], ['test', 'dog-3', 'park-3']]
    >>> mixes = plan_mixes(clips[:3], clips[3:], n=3, test_fold=3, preset="gaurav2024-code")
    >>> mixes[["repeats", "foreground_gain_db", "background_gain_db"]].iloc[0].tolist()
    [2.0, 3.0, -3.0]
    """
    options = _with_preset(
        preset,
        {
            "mode": mode,
            "snr_db": snr_db,
            "foreground_lambda": foreground_lambda,
            "background_lambda": background_lambda,
            "onset": onset,
            "duration_s": duration_s,
            "sample_rate": sample_rate,
            "foreground_gain_db": foreground_gain_db,
            "background_gain_db": background_gain_db,
            "events": events,
            "repeat": repeat,
            "gap_s": gap_s,
            "fade_s": fade_s,
        },
    )
    mode, duration_s = options["mode"], options["duration_s"]
    _check_choice("mode", mode, MODES)
    _check_choice("snr_measure", snr_measure, MEASURES)
    samplers = _samplers(options)
    fg = foregrounds.assign(split=assign_splits(foregrounds, test_fold))
    bg_fold = _matching_fold(backgrounds, test_fold)
    bg = backgrounds.assign(split=assign_splits(backgrounds, bg_fold))
    shares = _shares(n, foregrounds.fold.nunique())
    drawn = _draw_clips(fg, bg, shares, seed, samplers["events"])
    placed = _place(drawn, samplers, options, snr_measure)
    return _plan_table(drawn, placed, duration_s, snr_measure, n_captions)


def _with_preset(preset, options):
    if preset is None:
        return options
    _check_choice("preset", preset, PRESETS)
    usual = inspect.signature(plan_mixes).parameters
    left = {name for name, value in options.items() if value == usual[name].default}
    return options | {k: value for k, value in PRESETS[preset].items() if k in left}


class _Sampler(NamedTuple):
    draw: object
    low: float
    high: float


def _samplers(options):
    """Turn the options that may be distributions into functions of uniform numbers."""
    mode, duration_s = options["mode"], options["duration_s"]
    texts = {"onset": _onset(options["onset"], duration_s)}
    samplers = {name: _sampler(name, texts.get(name, options[name])) for name in _DRAWN}
    for name in ("foreground_lambda", "background_lambda"):
        if samplers[name].low <= 0:
            raise ValueError(f"{name} {options[name]!r}: λ must be above 0")
    for name, least in _LEAST.items():
        if samplers[name].low < least:
            raise ValueError(f"{name} {options[name]!r}: give values from {least} on")
    onset = samplers["onset"]
    if options["onset"] != "uniform" and not 0 <= onset.low <= onset.high < duration_s:
        raise ValueError(f"onset {options['onset']!r} does not lie in a mix of {duration_s} s")
    gain = samplers["foreground_gain_db"]
    if mode == "snr" and (gain.low, gain.high) != (0, 0):
        raise ValueError(
            "mode 'snr' sets the foreground's gain by itself; leave foreground_gain_db at 0, or "
            "use mode 'lambda'"
        )
    return samplers


def _onset(onset, duration_s):
    """Return a distribution of onsets; of shares of the free time where it is "uniform"."""
    if not duration_s > 0:
        raise ValueError(f"onset {onset!r} does not lie in a mix of {duration_s} s")
    if not isinstance(onset, str):
        return onset
    try:
        return (0.0, 1.0) if onset == "uniform" else float(onset)
    except ValueError as error:
        raise ValueError(f"onset {onset!r}: give 'uniform' or seconds") from error


def _sampler(name, spec):
    kind, *values = _spelled_out(spec)
    try:
        values = np.array(values[0] if kind == "choice" else values, dtype=float)
        good = values.size == {"choice": max(1, values.size), "uniform": 2, "normal": 4}[kind]
    except (KeyError, IndexError, TypeError, ValueError):
        good = False
    if not good or values.ndim != 1:
        raise ValueError(
            f"{name} {spec!r}: give a number, [low, high], ['choice', [a, b]], "
            "['uniform', low, high] or ['normal', mean, sd, low, high]"
        )
    low, high = (values.min(), values.max()) if kind == "choice" else values[-2:]
    if not np.isfinite(values).all() or low > high:
        raise ValueError(f"{name} from {low} to {high}: give finite numbers, the smaller one first")
    if name in _WHOLE and ((values if kind == "choice" else values[-2:]) % 1).any():
        raise ValueError(f"{name} {spec!r}: give whole numbers")
    if kind == "choice":
        return _Sampler(lambda u: values[(u * values.size).astype(int)], low, high)
    if kind == "uniform":
        if name in _WHOLE:
            return _Sampler(lambda u: low + np.floor((high - low + 1) * u), low, high)
        return _Sampler(lambda u: low + (high - low) * u, low, high)
    return _Sampler(_truncated_normal(name, spec, *values), low, high)


def _spelled_out(spec):
    if isinstance(spec, numbers.Real):
        return "choice", [spec]
    if not isinstance(spec, (list, tuple)) or not spec:
        return (None,)
    return spec if isinstance(spec[0], str) else ("uniform", *spec)


def _truncated_normal(name, spec, mean, sd, low, high):
    from scipy.stats import truncnorm

    if not (sd > 0 and low < high):
        raise ValueError(f"{name} {spec!r}: the deviation and the range must be above 0")
    law = truncnorm((low - mean) / sd, (high - mean) / sd, mean, sd)
    whole = name in _WHOLE
    return lambda u: np.rint(law.ppf(u)) if whole else law.ppf(u)


def _matching_fold(backgrounds, test_fold):
    folds = sorted(backgrounds.fold.unique())
    return test_fold if test_fold in folds else folds[(test_fold - 1) % len(folds)]


def _shares(n, n_folds):
    if n < n_folds:
        raise ValueError(f"n of {n} mixes leaves a split empty; plan at least {n_folds}")
    held_out = max(1, round(n / n_folds))
    return {"train": n - 2 * held_out, "val": held_out, "test": held_out}


def _pairs(foregrounds, backgrounds, rng_key):
    """Yield (foreground, background) rows without end, balanced over labels × scenes."""
    rng = np.random.default_rng(rng_key)
    by_label = {label: _endless(rows, rng) for label, rows in foregrounds.groupby("label")}
    by_scene = {scene: _endless(rows, rng) for scene, rows in backgrounds.groupby("label")}
    labels, scenes = rng.permutation(list(by_label)), rng.permutation(list(by_scene))
    # stepping through both at once meets every combination only if they share no factor; moving
    # on by one scene after each common period meets the rest
    period = math.lcm(len(labels), len(scenes))
    for i in itertools.count():
        label, scene = labels[i % len(labels)], scenes[(i + i // period) % len(scenes)]
        yield next(by_label[label]), next(by_scene[scene])


def _endless(rows, rng):
    rows = list(rows.itertuples(index=False))
    own = np.random.default_rng(rng.integers(2**63))

    def forever():
        while True:
            yield from (rows[i] for i in own.permutation(len(rows)))

    return forever()


class _Drawn(NamedTuple):
    split: str
    index: int
    seed: int
    background: tuple
    foregrounds: list


def _draw_clips(fg, bg, shares, seed, n_events):
    """Choose background and foregrounds of every mix."""
    drawn = []
    for number, (split, count) in enumerate(shares.items()):
        key, own = [seed, number], fg[fg.split == split]
        if n_events.high > own.label.nunique():
            raise ValueError(
                f"events up to {n_events.high:.0f}: split {split} has {own.label.nunique()} "
                "labels, and no label comes twice in a mix; ask for fewer"
            )
        pairs = _pairs(own, bg[bg.split == split], key)
        further = _further_clips(own, key)
        seeds = [
            int(np.random.SeedSequence([*key, index]).generate_state(1)[0])
            for index in range(count)
        ]
        u = np.array([_uniform(mix_seed, 0) for mix_seed in seeds])
        counts = n_events.draw(u[:, _DRAWN.index("events")]).astype(int)
        for index, (f, b) in enumerate(itertools.islice(pairs, count)):
            clips = [f]
            for _ in range(counts[index] - 1):
                clips.append(further({clip.label for clip in clips}))
            drawn.append(_Drawn(split, index, seeds[index], b, clips))
    return drawn


def _uniform(mix_seed, event):
    return np.random.default_rng([mix_seed, 1 + event]).random(len(_DRAWN))


def _further_clips(foregrounds, rng_key):
    """Return a function that draws a clip of a label not yet used, of that longest not drawn."""
    rng = np.random.default_rng([*rng_key, 0, 1])
    by_label = {label: _endless(rows, rng) for label, rows in foregrounds.groupby("label")}
    waiting = rng.permutation(list(by_label)).tolist()

    def draw(used):
        label = next(label for label in waiting if label not in used)
        waiting.remove(label)
        waiting.append(label)
        return next(by_label[label])

    return draw


def _level(path, loop, sample_rate, duration_s, measure):
    """Level, active begin and end, and length in seconds, of what a mix can use of a clip."""
    y, rate = audio.load_audio(path, sample_rate, duration_s)
    if not loop:
        return (*_event_level(y, rate, measure, path), y.size / rate)
    y = audio.fix_length(audio.check_audio(y, path), round(duration_s * rate))
    return _whole_level(y, rate, measure, path), 0.0, duration_s, duration_s


def _place(drawn, samplers, options, measure):
    """Return one row an event, first and further ones, with everything that is drawn for it."""
    rate, duration_s = options["sample_rate"], options["duration_s"]
    level = lru_cache(maxsize=None)(
        lambda path, loop: _level(path, loop, rate, duration_s, measure)
    )
    events = [
        (mix, number, clip, level(clip.path, False), level(row.background.path, True)[0])
        for mix, row in enumerate(drawn)
        for number, clip in enumerate(row.foregrounds)
    ]
    mixes, event, clips, levels, bg_level = zip(*events, strict=True)
    fg_level, start, end, length = np.array(levels).T
    u = np.array([_uniform(drawn[mix].seed, k) for mix, k in zip(mixes, event, strict=True)])
    value = {name: samplers[name].draw(u[:, i]) for i, name in enumerate(_DRAWN)}
    first = np.searchsorted(mixes, mixes)  # what belongs to the background is drawn once a mix
    bg_gain = value["background_gain_db"][first]
    if options["mode"] == "snr":
        snr = value["snr_db"]
        fg_gain = snr - (fg_level - bg_level) + bg_gain
    else:
        fg_gain, bg_gain = (
            np.array([_db(x) for x in factor]) + gain
            for factor, gain in (
                (value["foreground_lambda"], value["foreground_gain_db"]),
                (value["background_lambda"][first], bg_gain),
            )
        )
        snr = fg_level - bg_level + fg_gain - bg_gain
    repeats, onset = value["repeat"].astype(int), value["onset"]
    if options["onset"] == "uniform":
        last = (repeats - 1) * (length + value["gap_s"]) + end
        onset = np.maximum(0.0, duration_s - last) * onset
    return pd.DataFrame(
        {
            "mix": mixes,
            "event": event,
            "foreground": [clip.path for clip in clips],
            "label": [clip.label for clip in clips],
            "source_id": [clip.source_id for clip in clips],
            "onset_s": np.floor(onset * 1000) / 1000,
            "active_start_s": _rounded(start),
            "active_end_s": _rounded(end),
            "clip_s": _rounded(length),
            "repeats": repeats,
            "gap_s": _rounded(value["gap_s"]),
            "fade_s": _rounded(value["fade_s"]),
            "foreground_gain_db": _rounded(fg_gain),
            "background_gain_db": _rounded(bg_gain),
            "snr_db": _rounded(snr),
        }
    )


def _rounded(values):
    # numpy's own rounding multiplies and divides, and so misses the nearest decimal at times
    return [round(value, _DECIMALS) for value in values.tolist()]


def _plan_table(drawn, placed, duration_s, measure, n_captions):
    names = [f"{row.split}-{row.index:05d}" for row in drawn]
    table = placed[placed.event == 0].reset_index(drop=True)
    table = table.assign(
        clip_id=names,
        split=[row.split for row in drawn],
        background=[row.background.path for row in drawn],
        scene=[row.background.label for row in drawn],
        background_source=[row.background.source_id for row in drawn],
        duration_s=duration_s,
        level_measure=measure,
        peak_scale=np.nan,
        seed=[row.seed for row in drawn],
        events=_further_cells(placed, len(drawn)),
        path=[f"{row.split}/{name}.wav" for row, name in zip(drawn, names, strict=True)],
    )
    spoken = [
        captions.mix_captions(
            [clip.label for clip in row.foregrounds], row.background.label, row.seed, n_captions
        )
        for row in drawn
    ]
    forms = ["caption", *(f"caption_{k}" for k in range(2, n_captions + 1))]
    table[forms] = pd.DataFrame(spoken, columns=forms)
    plain = [name for name in MIX_COLUMNS if not name.startswith("caption")]
    return table[[*plain[:-1], *forms, plain[-1]]]


def _further_cells(placed, n_mixes):
    further = [[] for _ in range(n_mixes)]
    rows = placed[placed.event > 0].drop(columns=["event", "background_gain_db"])
    for row in rows.astype({"foreground": str}).to_dict("records"):
        further[row.pop("mix")].append(row)
    compact = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    return [json.dumps(events, **compact) if events else "" for events in further]


# --- rendering --------------------------------------------------------------------------------


def render_mixes(
    mixes,
    out_dir,
    sample_rate,
    workers=None,
    engine="numpy",
    *,
    backend="loky",
    stems=False,
    format="wav",
    shard=None,
):
    """Make the files of a table of recipes, each as ``out_dir/<split>/<clip_id>.wav``.

    Files are written whole or not at all. What an earlier call has made from the same recipe and
    the same sources is kept, even if that call was killed; ``recipes.csv`` in `out_dir` remembers
    what each file came from. Mixes are rendered in an order in which each source is decoded and
    resampled as rarely as a bounded memory (:data:`CACHE_BYTES` a process) allows.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`plan_mixes`, or its columns read back from CSV. Tables of older versions, which
        lack fades, repeats and further events, render as they always did.
    out_dir : str or Path
        Made if need be.
    sample_rate : int
        Rate of the files in Hz.
    workers : int, optional
        Processes; by default as many as there are cores, fewer for a small set. A Dask cluster
        uses all of its own.
    engine : {"numpy", "pydub"}
        See :func:`mix_signals`.
    backend : {"loky", "dask"}
        Who runs the workers, through joblib: processes of this machine, or the Dask cluster of the
        ``distributed.Client`` that exists. Its workers must see the sources and `out_dir` under the
        same paths.
    stems : bool
        Write ``<clip_id>_foreground`` and ``<clip_id>_background`` beside each mix; in 16 bit they
        sum to it exactly (see :func:`mix_events`).
    format : {"wav", "flac"}
        Both hold the same 16-bit samples.
    shard : str, optional
        "i/n", i from 1 to n: make this part only. All n together, in one or in many machines and
        in any order, make the same files and the same ``recipes.csv`` as one call without.

    Returns
    -------
    pandas.DataFrame
        `mixes` (of a shard: its rows) with ``path`` (the file) and ``peak_scale`` filled in.
        ``peak_scale`` below 1 says that the mix would have clipped and was scaled down by it.

    Raises
    ------
    AudioError
        A source that cannot be read or a file that cannot be written, naming the mix. Mixes made
        before it stay; calling again goes on from there.
    ValueError
        Unknown engine, backend, format or shard, a rate or number of workers below 1, a missing
        column, a clip_id twice, or no Dask client.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> names = [f"{label}-{fold}" for label in ("dog", "park") for fold in (1, 2, 3)]
    >>> paths = [audio.save_audio(folder / f"{n}.wav", [0.1] * 800, 8000) for n in names]
    >>> clips = pd.DataFrame({"path": paths, "source_id": names, "fold": [1, 2, 3] * 2})
    >>> clips["label"] = [name.split("-")[0] for name in names]
    >>> mixes = plan_mixes(clips[:3], clips[3:], n=3, test_fold=3, duration_s=0.1)
    >>> done = render_mixes(mixes, folder / "mixes", 8000)
    >>> sorted(path.name for path in (folder / "mixes").rglob("*.wav"))
    ['test-00000.wav', 'train-00000.wav', 'val-00000.wav']
    """
    _check_choice("engine", engine, ENGINES)
    _check_choice("backend", backend, BACKENDS)
    _check_choice("format", format, FORMATS)
    if sample_rate < 1 or (workers is not None and workers < 1):
        raise ValueError(f"sample_rate {sample_rate} and workers {workers} must be at least 1")
    _check_columns(mixes)
    if mixes.clip_id.duplicated().any():
        twice = mixes.clip_id[mixes.clip_id.duplicated()].iloc[0]
        raise ValueError(f"clip_id {twice} occurs twice; give every mix an id of its own")
    if backend == "dask":
        _require_dask_client()
    out_dir = Path(out_dir)
    jobs = _jobs(mixes, out_dir, sample_rate, engine, stems, format)
    part = _shard(_by_source(jobs), shard)
    journals = out_dir / _JOURNALS / (f"shard-{shard.replace('/', '-of-')}" if shard else "")
    done = _settle(out_dir, journals)
    pending = [job for job in part if not _is_made(job, done)]
    _remove_halves(pending, out_dir)
    try:
        _render_all(pending, workers, backend, journals)
    finally:
        done = _settle(out_dir, journals)
    if shard:
        mine = {job["clip_id"] for job in part}
        mixes = mixes[mixes.clip_id.isin(mine)]
    paths = {job["clip_id"]: job["path"] for job in part}
    return mixes.assign(
        path=[paths[clip_id] for clip_id in mixes.clip_id],
        peak_scale=[done[clip_id][1] for clip_id in mixes.clip_id],
    )


def _check_columns(mixes):
    missing = [name for name in _NEEDED if name not in mixes.columns]
    if missing:
        raise ValueError(f"no table of mixes: it lacks {', '.join(missing)}; see plan_mixes")


def _require_dask_client():
    try:
        from distributed import get_client
    except ImportError as error:
        raise ValueError(
            "backend 'dask' needs the package distributed: pip install 'soundscapes-utils[cluster]'"
        ) from error
    try:
        get_client()
    except ValueError as error:
        raise ValueError(
            "backend 'dask' finds no client; make one first, such as distributed.Client(address)"
        ) from error


def _jobs(mixes, out_dir, sample_rate, engine, stems=False, format="wav"):
    """Turn recipes into what a worker needs, and the key by which a file is known again."""
    stamp = lru_cache(maxsize=None)(_stamp)
    used = mixes[[name for name in (*_NEEDED, *_PLACEMENT, "events") if name in mixes.columns]]
    return [
        _job(row, out_dir, int(sample_rate), engine, stems, format, stamp)
        for row in used.to_dict("records")
    ]


def _job(row, out_dir, sample_rate, engine, stems, format, stamp):
    def source(path, kind):
        try:
            return {kind: str(path), f"{kind}_stamp": stamp(str(path))}
        except OSError as error:
            raise audio.AudioError(
                f"mix {row['clip_id']}: its source {path} is not there; restore it or plan the "
                "mixes again"
            ) from error

    job = {name: round(float(row[name]), _DECIMALS) for name in _RECIPE_FIELDS}
    job |= {"sample_rate": sample_rate, "engine": engine}
    job |= source(row["foreground"], "foreground") | source(row["background"], "background")
    # what is as it always was stays out of the key, so that files of older versions are known
    job |= _placement(row)
    further = [
        {name: round(float(event[name]), _DECIMALS) for name in ("onset_s", "foreground_gain_db")}
        | source(event["foreground"], "foreground")
        | _placement(event)
        for event in further_events(row.get("events"))
    ]
    job |= {"events": further} if further else {}
    job |= {"stems": True} if stems else {}
    job |= {"format": format} if format != "wav" else {}
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    path = out_dir / row["split"] / f"{row['clip_id']}.{format}"
    return job | {"recipe": key, "clip_id": row["clip_id"], "path": str(path)}


def _placement(event):
    given = {name: event.get(name, usual) for name, usual in _PLACEMENT.items()}
    return {
        name: round(type(_PLACEMENT[name])(value), _DECIMALS)
        for name, value in given.items()
        if value == value and value != _PLACEMENT[name]
    }


def _stamp(path):
    found = Path(path).stat()
    return [found.st_size, found.st_mtime_ns]


def _is_made(job, done):
    recipe, _ = done.get(job["clip_id"], (None, None))
    return recipe == job["recipe"] and all(Path(path).is_file() for path in _files(job))


def _files(job):
    if not job.get("stems"):
        return [job["path"]]
    stem, dot, suffix = job["path"].rpartition(".")
    return [f"{stem}{name}{dot}{suffix}" for name in ("", "_foreground", "_background")]


def _by_source(jobs):
    """Order mixes such that few sources are decoded twice.

    One kind of source is taken in blocks that fit into the cache; against each block, the other
    kind comes one by one.
    """
    rank = {
        kind: {name: i for i, name in enumerate(sorted({job[kind] for job in jobs}))}
        for kind in _KINDS
    }
    longest = max((round(job["duration_s"] * job["sample_rate"]) for job in jobs), default=1)
    room = max(1, CACHE_BYTES // 2 // (4 * longest))

    def decoded(kept, passing):
        return math.ceil(len(rank[kept]) / room) * len(rank[passing]) + len(rank[kept])

    kept, passing = min(_KINDS, _KINDS[::-1], key=lambda kinds: decoded(*kinds))

    def place(job):
        inner = rank[kept][job[kept]]
        return inner // room, rank[passing][job[passing]], inner, job["clip_id"]

    return sorted(jobs, key=place)


def _shard(jobs, shard):
    if shard is None:
        return jobs
    number, _, total = str(shard).partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ValueError(f"shard {shard!r}: give 'i/n' with i from 1 to n, such as '1/4'")
    begin, end = (len(jobs) * i // int(total) for i in (int(number) - 1, int(number)))
    return jobs[begin:end]


def _render_all(pending, workers, backend, journals):
    import joblib
    from tqdm.auto import tqdm

    size = max(_MIN_CHUNK, math.ceil(len(pending) / 100))
    chunks = [pending[i : i + size] for i in range(0, len(pending), size)]
    # a new process takes about as long as some hundred mixes
    few = 1 + len(pending) // _MIXES_PER_WORKER
    workers = min(workers or min(os.cpu_count() or 1, few), max(1, len(chunks)))
    run = uuid.uuid4().hex[:8]
    tasks = (
        joblib.delayed(_render_chunk)(chunk, journals / f"{run}-{number:05d}.jsonl")
        for number, chunk in enumerate(chunks)
    )
    bar = tqdm(total=len(pending), desc="mixes", unit="mix", disable=None, leave=False)
    with bar, joblib.parallel_config(backend=backend):
        results = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1)(tasks)
        try:
            for made, problem in results:
                bar.update(made)
                if problem:
                    raise audio.AudioError(problem)
        finally:
            with warnings.catch_warnings():
                # joblib warns of chunks that nobody waits for any more; their journals tell
                warnings.simplefilter("ignore")
                results.close()


def _render_chunk(jobs, journal):
    """Render mixes, each noted as soon as it is there; return how many, and what went wrong."""
    made = 0
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a", encoding="utf-8", buffering=1) as lines:
            for job in jobs:
                lines.write(json.dumps([job["clip_id"], job["recipe"], _render_files(job)]) + "\n")
                made += 1
    except audio.AudioError as error:
        return made, str(error)
    except OSError as error:
        return made, f"{journal}: cannot be written ({error}); free some space"
    return made, None


def _render_files(job):
    parts, peak_scale = _render(job, _SOURCES)
    # the mix comes last: where it is, its parts are
    for path, part in list(zip(_files(job), parts, strict=False))[::-1]:
        store.write_atomic(path, _encoded(part, job["sample_rate"], job.get("format", "wav")))
    return peak_scale


def _render(job, sources):
    """Return mix, foreground and background in whole steps of 16 bit, and the peak scale."""
    rate = job["sample_rate"]
    n = round(job["duration_s"] * rate)
    try:
        events = [
            Event(
                sources["foreground"].get(event["foreground"], event["foreground_stamp"], rate, n),
                event["onset_s"],
                event["foreground_gain_db"],
                *(event.get(name, usual) for name, usual in _PLACEMENT.items()),
            )
            for event in (job, *job.get("events", ()))
        ]
        bg = sources["background"].get(job["background"], job["background_stamp"], rate, n)
        stems = job.get("stems", False)
        gain = job["background_gain_db"]
        return _rounded_mix(events, bg, n, rate, gain, job["engine"], stems)
    except audio.AudioError as error:
        raise audio.AudioError(f"mix {job['clip_id']}: {error}") from error


def _encoded(steps, rate, format):
    if format == "wav":
        header = _wav_header(steps.size, rate)
        file = np.empty(header.size + steps.size, "<i2")
        file[: header.size], file[header.size :] = header, steps
        return file.data.cast("B")
    buffer = io.BytesIO()
    sf.write(buffer, steps.astype(np.int16), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


@lru_cache(maxsize=16)
def _wav_header(n, rate):
    buffer = io.BytesIO()
    sf.write(buffer, np.zeros(n, np.int16), rate, format="WAV", subtype="PCM_16")
    return np.frombuffer(buffer.getvalue()[: -2 * n], "<i2")


class _Sources:
    """Decoded sources in steps of 16 bit, those used last up to a number of bytes."""

    def __init__(self, limit):
        self.limit, self.bytes = limit, 0
        self.kept, self.lock = collections.OrderedDict(), threading.Lock()

    def get(self, path, stamp, rate, n):
        # the stamp keeps a file that was replaced from being taken out of the cache
        key = path, *stamp, rate, n
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        # what is resampled is read whole, as the filter looks ahead of a cut
        own_rate = audio.read_header(path)[1]
        y = audio.load_audio(path, rate, n / rate if own_rate == rate else None)[0]
        y = y[:n] * _STEPS
        with self.lock:
            self.bytes += 0 if key in self.kept else y.nbytes
            self.kept[key] = y
            while self.bytes > self.limit and len(self.kept) > 1:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return y


# apart, so that the kind that passes by does not push out the one that is kept
_SOURCES = {kind: _Sources(CACHE_BYTES // 2) for kind in _KINDS}


# --- what is made -----------------------------------------------------------------------------


def _settle(out_dir, journals):
    """Enter into ``recipes.csv`` what the journals of this run and of killed ones say.

    Workers write one journal a chunk, a line a mix, so that nobody waits for anybody and a kill
    costs one mix at most. Those of another shard are read but left to it.
    """
    from filelock import FileLock

    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise audio.AudioError(f"{out_dir}: cannot be made ({error}); choose another") from error
    with FileLock(out_dir / f"{_JOURNALS}.lock"):
        known = _read_recipes(out_dir)
        done = known | _read_journals(out_dir / _JOURNALS)
        if done != known:
            _write_recipes(out_dir, done)
        shutil.rmtree(journals, ignore_errors=True)
        if not any((out_dir / _JOURNALS).glob("*")):
            shutil.rmtree(out_dir / _JOURNALS, ignore_errors=True)
    return done


def _read_journals(folder):
    done = {}
    files = [(path.stat().st_mtime_ns, path) for path in folder.rglob("*.jsonl")]
    for _, path in sorted(files):
        # a line without an end was cut off by a kill
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                clip_id, recipe, peak_scale = json.loads(line)
                done[clip_id] = (recipe, peak_scale)
    return done


def _read_recipes(out_dir):
    path = out_dir / _RECIPES_FILE
    if not path.is_file():
        return {}
    types = {"clip_id": str, "recipe": str}
    table = pd.read_csv(path, dtype=types, float_precision="round_trip")
    return {
        row.clip_id: (row.recipe, float(row.peak_scale)) for row in table.itertuples(index=False)
    }


def _write_recipes(out_dir, done):
    rows = [(clip_id, *made) for clip_id, made in sorted(done.items())]
    table = pd.DataFrame(rows, columns=["clip_id", "recipe", "peak_scale"])
    store.write_atomic(out_dir / _RECIPES_FILE, table.to_csv(index=False).encode())


def _remove_halves(pending, out_dir):
    # .<name>.<process>.part is what write_whole calls a file that is not finished
    halves = {part: part.name[1:].rsplit(".", 2)[0] for part in out_dir.glob("*/.*.part")}
    own = {Path(path).name for job in pending for path in _files(job)} if halves else ()
    for part, name in halves.items():
        if name in own:
            part.unlink(missing_ok=True)


# --- on the fly -------------------------------------------------------------------------------


class MixDataset:
    """Mixes rendered as they are asked for: the samples of the files, without the files.

    A map-style data set for ``torch.utils.data.DataLoader`` (which needs no base class): 51,000
    mixes of 10 s are trained on without 45 GB of disk. Every process keeps the sources that it used
    last, decoded and resampled.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`plan_mixes`.
    sample_rate : int
        Rate of the samples in Hz.
    engine : {"numpy", "pydub"}
        See :func:`mix_signals`.
    stems : bool
        Add ``foreground`` and ``background``, which sum to ``audio``.
    cache_mb : int
        Decoded sources kept in memory, in MiB; 10 s at 44.1 kHz take 1.7.

    Raises
    ------
    AudioError
        A source that is not there, or (of an item) that cannot be read.
    ValueError
        Unknown engine, a missing column, or a rate or cache below 1.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> names = [f"{label}-{fold}" for label in ("dog", "park") for fold in (1, 2, 3)]
    >>> paths = [audio.save_audio(folder / f"{n}.wav", [0.1] * 800, 8000) for n in names]
    >>> clips = pd.DataFrame({"path": paths, "source_id": names, "fold": [1, 2, 3] * 2})
    >>> clips["label"] = [name.split("-")[0] for name in names]
    >>> mixes = plan_mixes(clips[:3], clips[3:], n=3, test_fold=3, duration_s=0.1)
    >>> items = MixDataset(mixes, 8000)
    >>> len(items), items[0]["audio"].shape, items[0]["caption"]
    (3, (800,), 'dog barking with the sound of park in background')
    """

    def __init__(self, mixes, sample_rate, engine="numpy", stems=False, cache_mb=512):
        _check_choice("engine", engine, ENGINES)
        if sample_rate < 1 or cache_mb < 1:
            raise ValueError(f"sample_rate {sample_rate} and cache_mb {cache_mb} must be 1 or more")
        _check_columns(mixes)
        self._jobs = _jobs(mixes, Path(), sample_rate, engine, stems)
        forms = [name for name in mixes.columns if name.startswith("caption")]
        self._texts = mixes[["clip_id", *forms]].to_dict("records")
        self._limit = cache_mb * 2**20
        self._sources = dict.fromkeys(_KINDS, _Sources(self._limit))

    def __len__(self):
        return len(self._jobs)

    def __getitem__(self, index):
        """Return ``audio`` (float32), ``peak_scale``, ``clip_id`` and the captions of a mix."""
        parts, scale = _render(self._jobs[index], self._sources)
        mix = _as_mix(parts, scale)._asdict()
        return {k: value for k, value in mix.items() if value is not None} | self._texts[index]

    def __getstate__(self):
        # a data loader's process decodes for itself: sending a full cache would take longer
        return {k: value for k, value in self.__dict__.items() if k != "_sources"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._sources = dict.fromkeys(_KINDS, _Sources(self._limit))


# --- events -----------------------------------------------------------------------------------


def further_events(events):
    """Read the cell that holds the second and further foreground events of a mix.

    Parameters
    ----------
    events : str
        A cell of the column ``events``: a JSON list, or nothing (also NaN, as CSV gives it back).

    Returns
    -------
    list of dict
        Per event ``foreground, label, source_id, onset_s, foreground_gain_db,
        snr_db, fade_s`` and where in its clip it sounds, named as the columns of the table.

    Raises
    ------
    ValueError
        No JSON list.

    Examples
    --------
    >>> further_events("")
    []
    >>> further_events('[{"label":"dog","onset_s":1.5}]')[0]["onset_s"]
    1.5
    """
    if not isinstance(events, str) or not events:
        return []
    try:
        found = json.loads(events)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"events {events[:60]!r} is no JSON ({error}); plan the mixes again"
        ) from error
    if not isinstance(found, list):
        raise ValueError(f"events {events[:60]!r} is no JSON list; plan the mixes again")
    return found


def events_table(mixes):
    """List what sounds when: one row an event, and one a repetition of it.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`plan_mixes` or :func:`render_mixes`, or read back from CSV. In tables without
        the columns ``active_start_s`` and ``active_end_s`` the clips are measured again.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`EVENT_COLUMNS`, mix after mix; ``event`` and ``repetition`` count from 0.
        ``onset_s`` and ``offset_s`` are seconds in the mix between which the event sounds
        (:func:`active_level`), cut at its end; what would begin after the end is left out.

    Raises
    ------
    ValueError
        A cell of ``events`` that cannot be read.
    AudioError
        A clip that must be measured and cannot be read.

    Examples
    --------
    >>> mix = {"clip_id": "test-00000", "foreground": "dog.wav", "label": "dog"}
    >>> mix |= {"source_id": "12", "onset_s": 1.0, "duration_s": 4.0, "repeats": 2}
    >>> mix |= {"active_start_s": 0.5, "active_end_s": 1.5, "clip_s": 2.0, "snr_db": 6.0}
    >>> table = events_table(pd.DataFrame([mix | {"foreground_gain_db": 3.0}]))
    >>> table[["event", "repetition", "label", "onset_s", "offset_s"]].to_numpy().tolist()
    [[0, 0, 'dog', 1.5, 2.5], [0, 1, 'dog', 3.5, 4.0]]
    """
    rows = []
    for mix in mixes.to_dict("records"):
        for number, event in enumerate([mix, *further_events(mix.get("events"))]):
            rows += _occurrences(mix, number, event)
    return pd.DataFrame(rows, columns=EVENT_COLUMNS)


def _occurrences(mix, number, event):
    start, end, length = (event.get(k) for k in ("active_start_s", "active_end_s", "clip_s"))
    if start is None or end is None:
        _, start, end, length = _measured(event["foreground"], mix["duration_s"])
    rows = []
    for repetition in range(int(event.get("repeats", 1))):
        # rendering counts whole samples, far finer than these decimals
        begin = event["onset_s"] + repetition * ((length or 0.0) + event.get("gap_s", 0.0))
        onset = round(begin + start, _DECIMALS)
        offset = round(min(begin + end, mix["duration_s"]), _DECIMALS)
        if onset < mix["duration_s"]:
            rows.append(
                (mix["clip_id"], number, repetition, event["label"],
                 event["source_id"], event["foreground"], onset, offset, event["snr_db"],
                 event["foreground_gain_db"], event.get("fade_s", 0.0))
            )  # fmt: skip
    return rows


@lru_cache(maxsize=4096)
def _measured(path, duration_s):
    y, rate = audio.load_audio(path, None, duration_s)
    return (*active_level(audio.check_audio(y, path), rate), y.size / rate)
