"""Lay foreground events over acoustic scenes: ``x = λ1·x1 + λ2·x2``.

:func:`mix_signals` is the equation. :func:`plan_mixes` draws recipes, balanced over labels and scenes
and split by fold; :func:`render_mixes` turns them into files, :class:`MixDataset` into samples as they
are asked for. A recipe is complete: the same table gives the same bytes, whatever the order, the number
of workers, or what was already there.
"""

import io
import itertools
import math
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import soundfile as sf

from soundscapes_utils import audio, captions, store
from soundscapes_utils.datasets import assign_splits

# A mix is a clip, and its recipe; the captions follow.
MIX_COLUMNS = [
    *("clip_id", "path", "label", "fold", "source_id", "dataset", "duration_s", "sample_rate"),
    *("split", "foreground", "background", "scene", "background_source", "onset_s", "repeats"),
    *("fade_s", "active_start_s", "active_end_s", "clip_s", "foreground_gain_db"),
    *("background_gain_db", "snr_db", "level_measure", "peak_scale", "seed", "n_events"),
]
EVENT_COLUMNS = [
    *("clip_id", "event", "label", "source_id", "foreground", "onset_s", "repeats", "fade_s"),
    *("active_start_s", "active_end_s", "clip_s", "gain_db", "snr_db"),
]
ENGINES = ("numpy", "pydub")
MEASURES = ("rms", "lufs")
# What Gaurav et al. (DCASE 2024 Task 7) report, and what their public code does instead:
# ``foreground * 2 + 3`` on a pydub segment *plays the clip twice* and adds 3 dB.
_GAURAV = {"mode": "lambda", "onset": 0.0, "duration_s": 10.0, "sample_rate": 44_100}
_AS_CODED = {"foreground_gain_db": 3.0, "background_gain_db": -3.0, "repeat": 2}
PRESETS = {
    "gaurav2024-report": _GAURAV | {"foreground_lambda": 1.0, "background_lambda": 1.0},
    "gaurav2024-code": _GAURAV | _AS_CODED,
}
# Decoded sources that a process keeps, half for each kind. joblib ends workers that grow by 300 MB.
CACHE_BYTES = 240 * 2**20

_STEPS = np.float32(32768)
_FRAME_S = 0.02
_ACTIVE_DB = 30.0
# Recipes pass through CSV, whose readers are exact to about 15 digits only.
_DECIMALS = 4
_MIXES_PER_WORKER = 500  # a new process takes about as long as these
_MIN_CHUNK = 32


class Event(NamedTuple):
    """A foreground in a mix: ``signal`` at the mix's rate; ``onset_s`` counts in whole milliseconds,
    and ``fade_s`` of raised cosine stand at both ends of each of its ``repeats``.
    """

    signal: np.ndarray
    onset_s: float = 0.0
    gain_db: float = 0.0
    fade_s: float = 0.0
    repeats: int = 1


class Mix(NamedTuple):
    """A mix as 16 bit holds it: ``audio``, ``peak_scale``, and its two parts where asked for."""

    audio: np.ndarray
    peak_scale: float
    foreground: np.ndarray | None = None
    background: np.ndarray | None = None


# --- one mix ----------------------------------------------------------------------------------


def mix_signals(
    foreground,
    background,
    sample_rate,
    duration_s=None,
    background_gain_db=0.0,
    engine="numpy",
    stems=False,
):
    """Mix signals: ``x = λ1·x1 + λ2·x2`` with ``λ = 10^(gain/20)``, in steps of 16 bit, as a `Mix`.

    `foreground` is an array (±1 is full scale), an `Event` or a list of them; an event is cut where the
    mix ends. The background is repeated or cut to `duration_s`, by default its own. What would pass
    full scale is scaled down as a whole, never clipped. Engine "pydub" overlays 16-bit segments, as
    Gaurav et al. did; at 0 dB both agree to one step. Stems sum to the mix without any rest: the
    background is rounded, the foreground is what is missing to the mix.

    >>> mix = mix_signals(Event(np.full(2, 0.5), onset_s=0.001), np.full(4, 0.25), 1000, stems=True)
    >>> mix.audio.tolist(), mix.peak_scale
    ([0.25, 0.75, 0.75, 0.25], 1.0)
    >>> bool((mix.foreground + mix.background == mix.audio).all())
    True
    """
    events = foreground if isinstance(foreground, list) else [foreground]
    if not events:
        raise audio.AudioError("a mix needs an event; give at least one")
    events = [event if isinstance(event, Event) else Event(event) for event in events]
    for i, event in enumerate(events):
        signal = audio.check_audio(event.signal, f"event {i}", silent_ok=True)
        events[i] = event._replace(signal=signal * _STEPS)
    bg = audio.check_audio(background, "background", silent_ok=True) * _STEPS
    n = bg.size if duration_s is None else round(duration_s * sample_rate)
    return _as_mix(*_mixed(events, bg, n, sample_rate, background_gain_db, engine, stems))


def _as_mix(parts, scale):
    y, *stems = (None if part is None else part / _STEPS for part in parts)
    return Mix(y, scale, *stems)


def _mixed(events, bg, n, rate, bg_gain_db, engine, stems):
    """Return mix, foreground and background in whole steps (the last two None without stems)."""
    # signals come in steps too: a factor of 2^15 changes no bit of a float's mantissa
    _check_choice("engine", engine, ENGINES)
    placed = [(*_placed(event, n, rate), event.gain_db) for event in events]
    mix = _mix_pydub if engine == "pydub" else _mix_numpy
    y, background, scale = mix(placed, audio.fix_length(bg, n), rate, bg_gain_db, stems)
    np.rint(y, out=y)
    if not stems:
        return (y, None, None), scale
    np.rint(background, out=background)
    return (y, y - background, background), scale


def _placed(event, n, rate):
    """Return the onset in ms and in samples, and the event's samples, cut at the mix's end."""
    onset_ms = round(event.onset_s * 1000)
    # pydub places segments by whole milliseconds, cut down to samples; numpy does likewise
    start = int(onset_ms * (rate / 1000))
    if not 0 <= start < n or event.fade_s < 0 or event.repeats < 1:
        when = f"{event.onset_s} s, fade {event.fade_s} s, {event.repeats} repeats"
        raise audio.AudioError(f"an event at {when}: not in a mix of {n / rate} s")
    clip, room = event.signal, n - start
    if event.repeats == 1 and not event.fade_s:
        return onset_ms, start, clip[:room]
    y = np.resize(clip, min(room, event.repeats * clip.size))
    for begin in range(0, y.size, clip.size):
        piece = y[begin : begin + clip.size]
        ramp = min(round(event.fade_s * rate), piece.size // 2)
        if ramp:
            rise = (0.5 - 0.5 * np.cos(np.pi * (np.arange(ramp) + 0.5) / ramp)).astype(np.float32)
            piece[:ramp] *= rise
            piece[-ramp:] *= rise[::-1]
    return onset_ms, start, y


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


# --- levels -----------------------------------------------------------------------------------


def active_level(y, sample_rate):
    """Measure the RMS of a signal where it sounds in dB, and from when to when (s) that is.

    A frame of 20 ms is active if it is within 30 dB of the loudest one: the silence that clips
    are padded with must not make a short event seem soft.
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
    """Gain of the foreground, in dB, that sets a signal-to-noise ratio; the background keeps its own.

    The foreground counts where it sounds, the background over its whole length; `measure` as
    ``snr_measure`` of :class:`MixOptions`.

    >>> round(snr_gain_db(np.full(800, 0.1), np.full(800, 0.01), 8000, snr_db=6.0), 2)
    -14.0
    """
    _check_choice("measure", measure, MEASURES)
    level, _, _ = _event_level(foreground, sample_rate, measure, "foreground")
    background = audio.check_audio(background, "background")
    return snr_db - (level - _level(background, sample_rate, measure, "background"))


def _event_level(y, rate, measure, name):
    """Return an event's level where it sounds, and begin and end of that in seconds."""
    y = audio.check_audio(y, name)
    level, start, end = active_level(y, rate)
    if measure == "lufs":
        level = _level(y[round(start * rate) : round(end * rate)], rate, measure, name)
    return level, start, end


def _level(y, rate, measure, name):
    if measure == "rms":
        return _db(math.sqrt(np.mean(y.astype(np.float64) ** 2)))
    level = audio.loudness(y, rate)
    if level == -math.inf:
        raise audio.AudioError(f"{name}: stays below the gate of -70 LUFS; leave it out, or use rms")
    return level


def _check_choice(name, value, choices):
    if value not in choices:
        raise store.DataError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


# --- options ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixOptions:
    """Options of :func:`plan_mixes` and :func:`plan_scenes`.

    A *range* is a number, a tuple ``(low, high)`` to draw from evenly, or a list to choose from. Every
    option draws from numbers of its own: changing one leaves what the others draw as it was.

    - ``test_fold`` tests, the next one validates. Backgrounds with fewer folds count round.
    - ``mode``: "snr" sets the foreground's gain to a ratio ``snr_db`` (range) of the foreground (where
      it sounds) to the background; "lambda" takes factors and gains, and records the ratio.
    - ``snr_measure``: "rms" over the foreground's active frames, or "lufs", the integrated loudness of
      ITU-R BS.1770-4 from the first to the last of them.
    - ``foreground_lambda, background_lambda``: ranges above 0, of mode "lambda"; 1 and 1 is the equation
      of Gaurav et al. On top of them ``foreground_gain_db, background_gain_db`` (ranges); in mode
      "snr" only that of the background, which moves the whole mix.
    - ``onset``: a range in seconds, or "uniform": such that the last repetition ends within the mix.
    - ``duration_s`` of a mix. ``sample_rate`` (Hz) at which levels are measured: that of the rendering.
    - ``events, repeat``: ranges; foregrounds of a mix, each of a label of its own, and how often each
      sounds, with ``fade_s`` (range) of raised cosine at both ends. Levels are measured before it.
    - ``n_captions``, and ``format`` of the files, "wav" or "flac".
    """

    test_fold: int = 5
    mode: str = "snr"
    snr_db: object = (-5.0, 15.0)
    snr_measure: str = "rms"
    foreground_lambda: object = 1.0
    background_lambda: object = 1.0
    foreground_gain_db: object = 0.0
    background_gain_db: object = 0.0
    onset: object = "uniform"
    duration_s: float = 10.0
    sample_rate: int | None = None
    events: object = 1
    repeat: object = 1
    fade_s: object = 0.0
    n_captions: int = 3
    format: str = "wav"

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        if not self.duration_s > 0:
            raise store.DataError(f"duration_s {self.duration_s}: give seconds above 0")
        for name in filter(None, _DRAWN):
            value = getattr(self, name)
            low, high = (0, 0) if (name, value) == ("onset", "uniform") else _span(name, value)
            if low < _LEAST.get(name, low):
                raise store.DataError(f"{name} {value!r}: give values from {_LEAST[name]} on")
            if name == "onset" and high >= self.duration_s:
                raise store.DataError(f"onset {value!r} does not lie in {self.duration_s} s")


_CHOICES = {"mode": ("snr", "lambda"), "snr_measure": MEASURES, "format": ("wav", "flac")}
# The place of each option in the uniform numbers of an event; what is added comes last. Nothing
# draws from the empty place any more.
_DRAWN = ("snr_db", "onset", "foreground_gain_db", "background_gain_db", "events", "repeat")
_DRAWN += ("", "fade_s", "foreground_lambda", "background_lambda")
_LEAST = {"events": 1, "repeat": 1, "fade_s": 0.0, "onset": 0.0}
_LEAST |= {"foreground_lambda": 1e-6, "background_lambda": 1e-6}
_WHOLE = ("events", "repeat")
# what has no effect in a mode
_IDLE = {"snr": ("foreground_lambda", "background_lambda", "foreground_gain_db"), "lambda": ("snr_db",)}


def _options(given):
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        _check_choice("option", name, [field.name for field in fields(MixOptions)])
    options = MixOptions(**given)
    for name in set(_IDLE[options.mode]) & given.keys():
        other = {"snr": "lambda", "lambda": "snr"}[options.mode]
        raise store.DataError(f"{name} has no effect in mode {options.mode!r}: use mode {other!r}")
    return options


def _span(name, value):
    """Smallest and largest value of a range."""
    try:
        values = np.array(value, dtype=float, ndmin=1)
    except (TypeError, ValueError):
        values = np.empty(0)
    low, high = values[[0, -1]] if values.size == 2 else (0, 0)
    fits = low <= high and values.size == 2 if isinstance(value, tuple) else values.size > 0
    if not fits or values.ndim != 1 or not np.isfinite(values).all():
        wanted = "give a number, (low, high), or a list to choose from"
        raise store.DataError(f"{name} {value!r}: {wanted}")
    if name in _WHOLE and (values % 1).any():
        raise store.DataError(f"{name} {value!r}: give whole numbers")
    return values.min(), values.max()


def _draw(options, mix_seed, event):
    """Draw the options that are ranges, for one event of a mix."""
    u = np.random.default_rng([mix_seed, 1 + event]).random(len(_DRAWN)).tolist()
    drawn = {}
    for name, share in zip(_DRAWN, u, strict=True):
        value = getattr(options, name, 0)
        if value == "uniform":
            value = (0.0, 1.0)
        if isinstance(value, tuple):
            low, high = value
            whole = name in _WHOLE
            value = low + (int((high - low + 1) * share) if whole else (high - low) * share)
        elif isinstance(value, list):
            value = value[int(share * len(value))]
        drawn[name] = float(value)
    return drawn


# --- planning ---------------------------------------------------------------------------------


def plan_mixes(foregrounds, backgrounds, n, seed=0, **options):
    """Draw the recipes of a set of mixes of one event each.

    Every split takes its foregrounds and its backgrounds from its own folds. Within a split every
    label and every scene occurs equally often, give or take one, in every combination; so does
    every clip of a label. A larger `n` only adds mixes: those of a smaller one stay as they were.

    Parameters
    ----------
    foregrounds, backgrounds : pandas.DataFrame
        Clip tables; the label of a background is its scene.
    n : int
        Mixes in all, shared out as the folds are (with five folds 60, 20 and 20 %).
    seed : int
        Everything that is drawn follows from it.
    **options
        Fields of :class:`MixOptions`, such as ``**PRESETS["gaurav2024-report"]``; None is as good as
        not given. What is unknown, out of range or without effect is refused.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`MIX_COLUMNS` and the captions, split after split. A mix is a clip: its label,
        source, fold and data set are those of its foreground. ``peak_scale`` is empty and ``path``
        relative until :func:`render_mixes` has made the file.

    Examples
    --------
    >>> names = [f"{label}-{fold}" for label in ("dog", "park") for fold in (1, 2, 3)]
    >>> clips = pd.DataFrame({"source_id": names, "fold": [1, 2, 3] * 2})
    >>> from tempfile import mkdtemp
    >>> folder = mkdtemp()
    >>> clips["path"] = [audio.save_audio(f"{folder}/{n}.wav", [0.1] * 800, 8000) for n in names]
    >>> clips["label"] = [name.split("-")[0] for name in names]
    >>> mixes = plan_mixes(clips[:3], clips[3:], n=3, test_fold=3, duration_s=0.1)
    >>> mixes[["split", "source_id", "background_source"]].to_numpy().tolist()
    [['train', 'dog-2', 'park-2'], ['val', 'dog-1', 'park-1'], ['test', 'dog-3', 'park-3']]
    """
    if _span("events", _options(options).events)[1] > 1:
        raise store.DataError("one event per mix; plan_scenes lays several, and lists them too")
    return plan_scenes(foregrounds, backgrounds, n, seed, **options)[0]


def plan_scenes(foregrounds, backgrounds, n, seed=0, **options):
    """Draw mixes that may hold several events, as :func:`plan_mixes` does, and the table of events.

    In `mixes` ``label``, ``onset_s`` and so on are those of the first event, ``n_events`` is how many
    there are. The second table has one row per event of the mixes with more than one
    (:data:`EVENT_COLUMNS`), the first (``event`` 0) included; whatever takes such mixes takes it, too.
    """
    options = _options(options)
    fold, folds = options.test_fold, sorted(backgrounds["fold"].unique())
    bg_fold = fold if fold in folds else folds[(fold - 1) % len(folds)]
    fg = foregrounds.assign(split=assign_splits(foregrounds, fold))
    bg = backgrounds.assign(split=assign_splits(backgrounds, bg_fold))
    n_folds = fg["fold"].nunique()
    if n < n_folds:
        raise store.DataError(f"n of {n} mixes leaves a split empty; plan at least {n_folds}")
    held_out = max(1, round(n / n_folds))
    shares = {"train": n - 2 * held_out, "val": held_out, "test": held_out}
    level = lru_cache(maxsize=None)(lambda path, loop: _clip_level(path, loop, options))
    mixes, events = [], []
    for number, (split, count) in enumerate(shares.items()):
        of_split = (table[table["split"] == split] for table in (fg, bg))
        for index, chosen in enumerate(_choose_clips(*of_split, count, [seed, number], options)):
            name = {"clip_id": f"{split}-{index:05d}", "split": split}
            placed = [name | event for event in _place(*chosen, options, level)]
            mixes.append(_mix(*chosen, placed, options))
            events += placed if len(placed) > 1 else []
    texts = [name for name in mixes[0] if name.startswith("caption")]
    mixes = pd.DataFrame(mixes, columns=[*MIX_COLUMNS, *texts])
    return mixes, pd.DataFrame(events, columns=EVENT_COLUMNS)


def _choose_clips(fg, bg, count, key, options):
    """Yield seed, background and foregrounds of every mix of a split."""
    most, labels = _span("events", options.events)[1], fg["label"].nunique()
    if most > labels:
        raise store.DataError(f"events up to {most:.0f}: a split has {labels} labels, each used once")
    further = _further_clips(fg, key)
    for index, (first, background) in enumerate(itertools.islice(_pairs(fg, bg, key), count)):
        seed = int(np.random.SeedSequence([*key, index]).generate_state(1)[0])
        clips = [first]
        for _ in range(int(_draw(options, seed, 0)["events"]) - 1):
            clips.append(further({clip.label for clip in clips}))
        yield seed, background, clips


def _pairs(foregrounds, backgrounds, key):
    """Yield (foreground, background) rows without end, balanced over labels × scenes."""
    rng = np.random.default_rng(key)
    by_label, by_scene = _endless_clips(foregrounds, rng), _endless_clips(backgrounds, rng)
    labels, scenes = rng.permutation(list(by_label)), rng.permutation(list(by_scene))
    # stepping through both at once meets every combination only if they share no factor; moving
    # on by one scene after each common period meets the rest
    period = math.lcm(len(labels), len(scenes))
    for i in itertools.count():
        label, scene = labels[i % len(labels)], scenes[(i + i // period) % len(scenes)]
        yield next(by_label[label]), next(by_scene[scene])


def _further_clips(foregrounds, key):
    """Return a function that draws a clip of a label not yet used, of that longest not drawn."""
    rng = np.random.default_rng([*key, 0, 1])
    by_label = _endless_clips(foregrounds, rng)
    waiting = rng.permutation(list(by_label)).tolist()

    def draw(used):
        label = next(label for label in waiting if label not in used)
        waiting.remove(label)
        waiting.append(label)
        return next(by_label[label])

    return draw


def _endless_clips(clips, rng):
    """Label → its clips without end, each as often as the others."""

    def forever(rows, own):
        while True:
            yield from (rows[i] for i in own.permutation(len(rows)))

    return {
        label: forever(list(rows.itertuples(index=False)), np.random.default_rng(own))
        for label, rows in clips.groupby("label")
        for own in [rng.integers(2**63)]
    }


def _clip_level(path, loop, options):
    """Level, active begin and end, and length in seconds, of what a mix can use of a clip."""
    seconds, measure = options.duration_s, options.snr_measure
    y, rate = audio.load_audio(path, options.sample_rate, seconds)
    if not loop:
        return (*_event_level(y, rate, measure, path), y.size / rate)
    y = audio.fix_length(audio.check_audio(y, path), round(seconds * rate))
    return _level(y, rate, measure, path), 0.0, seconds, seconds


def _place(seed, background, clips, options, level):
    """Yield when and how loud each event of a mix sounds, as columns of the table of events."""
    bg_level, *_ = level(background.path, True)
    for number, clip in enumerate(clips):
        drawn = _draw(options, seed, number)
        fg_level, start, end, length = level(clip.path, False)
        if number == 0:  # what belongs to the background is drawn once per mix
            bg_gain = drawn["background_gain_db"]
            bg_gain += 0 if options.mode == "snr" else _db(drawn["background_lambda"])
        if options.mode == "snr":
            snr = drawn["snr_db"]
            gain = snr - (fg_level - bg_level) + bg_gain
        else:
            gain = _db(drawn["foreground_lambda"]) + drawn["foreground_gain_db"]
            snr = fg_level - bg_level + gain - bg_gain
        repeats, onset = int(drawn["repeat"]), drawn["onset"]
        if options.onset == "uniform":
            onset *= max(0.0, options.duration_s - ((repeats - 1) * length + end))
        event = {"active_start_s": start, "active_end_s": end, "clip_s": length, "snr_db": snr}
        event |= {"fade_s": drawn["fade_s"], "gain_db": gain, "background_gain_db": bg_gain}
        event = {name: round(value, _DECIMALS) for name, value in event.items()}
        event |= {"event": number, "onset_s": math.floor(onset * 1000) / 1000, "repeats": repeats}
        event |= {"label": clip.label, "source_id": clip.source_id, "foreground": str(clip.path)}
        yield event


def _mix(seed, background, clips, placed, options):
    """One row of the table of mixes."""
    labels = [clip.label for clip in clips]
    texts = captions.mix_captions(labels, background.label, seed, options.n_captions)
    mix = placed[0] | {"foreground_gain_db": placed[0]["gain_db"], "n_events": len(placed)}
    mix |= {"fold": clips[0].fold, "dataset": getattr(clips[0], "dataset", "")}
    mix |= {"background": str(background.path), "background_source": background.source_id}
    mix |= {"scene": background.label, "level_measure": options.snr_measure, "seed": seed}
    mix |= {"duration_s": options.duration_s, "sample_rate": options.sample_rate or math.nan}
    mix |= {"peak_scale": math.nan, "path": f"{mix['split']}/{mix['clip_id']}.{options.format}"}
    return mix | {f"caption_{k}" if k > 1 else "caption": text for k, text in enumerate(texts, 1)}


# --- events -----------------------------------------------------------------------------------


def events_of(mixes, events=None):
    """List the events of each mix, as dictionaries with the columns of the table of events.

    The first event of each mix is taken from `mixes`; events that are not listed are missed.
    """
    further = defaultdict(list)
    for row in [] if events is None else events[events["event"] > 0].to_dict("records"):
        further[row["clip_id"]].append(row)
    first = mixes.rename(columns={"foreground_gain_db": "gain_db"}).assign(event=0)
    known = first[[name for name in (*EVENT_COLUMNS, "n_events") if name in first]]
    found = [[row, *further[row.get("clip_id")]] for row in known.to_dict("records")]
    for row, *more in found:
        if row.get("n_events", 1 + len(more)) != 1 + len(more):
            which = f"mix {row['clip_id']}: {1 + len(more)} of {row['n_events']} events are listed"
            raise store.DataError(f"{which}; give events=, the second table of plan_scenes")
    return found


def occurrences(mixes, events=None):
    """List what sounds when: the table of events, one row per ``repetition``, with ``offset_s``.

    ``onset_s`` and ``offset_s`` are seconds in the mix between which the event sounds, cut at its end;
    what would begin after the end is left out.
    """
    rows = []
    for seconds, sounding in zip(mixes["duration_s"], events_of(mixes, events), strict=True):
        for event, repetition in ((e, r) for e in sounding for r in range(int(e["repeats"]))):
            begin = event["onset_s"] + repetition * event["clip_s"]
            # rendering counts whole samples, far finer than these decimals
            onset = round(begin + event["active_start_s"], _DECIMALS)
            offset = round(min(begin + event["active_end_s"], seconds), _DECIMALS)
            if onset < seconds:
                when = {"repetition": repetition, "onset_s": onset, "offset_s": offset}
                rows.append(event | when)
    return pd.DataFrame(rows, columns=[*EVENT_COLUMNS, "repetition", "offset_s"])


# --- rendering --------------------------------------------------------------------------------


def render_mixes(
    mixes, out_dir, sample_rate, workers=None, engine="numpy", stems=False, shard=None, events=None
):
    """Make the files of a table of recipes, each as ``out_dir/<split>/<clip_id>.wav``.

    Files are written whole or not at all. What an earlier call has made from the same recipe and
    the same sources is kept, even if that call was killed.

    Parameters
    ----------
    mixes, events : pandas.DataFrame
        From :func:`plan_mixes` or :func:`plan_scenes`, or read back; the end of ``path`` says in which
        format.
    sample_rate : int
        Rate of the files in Hz.
    workers : int, optional
        Processes; by default as many as pay off. In ``joblib.parallel_config("dask")`` the
        cluster's, which must see the sources and `out_dir` under the same paths.
    engine, stems
        As of :func:`mix_signals`; stems end in ``_foreground`` and ``_background``.
    shard : str, optional
        "i/n": make the mixes of every n-th foreground only. All n together, in any order and on any
        machines, make the same files as one call without.

    Returns
    -------
    pandas.DataFrame `mixes` (of a shard: its rows) with ``path``, ``sample_rate`` and ``peak_scale``
        filled in, which is below 1 where the mix would have clipped and was scaled down.
    """
    if sample_rate < 1 or (workers is not None and workers < 1):
        raise store.DataError(f"sample_rate {sample_rate} and workers {workers} must be at least 1")
    _check_table(mixes)
    share = store.shard(sorted(mixes["foreground"].unique()), shard)
    mixes = mixes[mixes["foreground"].isin(share)]
    jobs = _jobs(mixes, events, out_dir, sample_rate, engine, stems)
    records = store.Records(out_dir, "mixes")
    made, pending = records.entries, []
    for job in jobs:
        known = made.get(job.clip_id, {}).get("recipe") == job.key
        if not known or not all(map(os.path.isfile, job.files)):
            pending.append(job)
    _render_all(pending, workers, records)
    made = store.Records(out_dir, "mixes").entries
    scales = [made[job.clip_id]["peak_scale"] for job in jobs]
    paths = [job.path for job in jobs]
    return mixes.assign(path=paths, sample_rate=int(sample_rate), peak_scale=scales)


_NEEDED = ["clip_id", "path", "split", "foreground", "background", "duration_s", "onset_s"]
_NEEDED += ["foreground_gain_db", "background_gain_db"]


def _check_table(mixes):
    missing = [name for name in _NEEDED if name not in mixes]
    if missing:
        raise store.DataError(f"not a table of mixes: it lacks {', '.join(missing)}")
    twice = mixes["clip_id"][mixes["clip_id"].duplicated()]
    if len(twice):
        raise store.DataError(f"clip_id {twice.iloc[0]} occurs twice; give every mix its own")
    for suffix in {Path(path).suffix for path in mixes["path"]}:
        _check_choice("format", suffix, (".wav", ".flac"))


class _Job(NamedTuple):
    clip_id: str
    path: str
    recipe: dict  # all that the file comes from

    @property
    def files(self):
        stem, dot, suffix = self.path.rpartition(".")
        parts = ("", "_foreground", "_background") if self.recipe["stems"] else ("",)
        return [f"{stem}{part}{dot}{suffix}" for part in parts]

    @property
    def key(self):
        return store.content_key(self.path[-4:], self.recipe)


def _jobs(mixes, events, out_dir, sample_rate, engine, stems):
    """Turn a table of recipes into what workers need."""
    _check_choice("engine", engine, ENGINES)
    stamp, exact = lru_cache(maxsize=None)(_stamp), mixes.round(_DECIMALS)
    sounding = events_of(exact, None if events is None else events.round(_DECIMALS))
    jobs = []
    for mix, placed in zip(exact[_NEEDED].to_dict("records"), sounding, strict=True):
        recipe = {"background": stamp(mix["background"]), "gain_db": mix["background_gain_db"]}
        recipe |= {"rate": int(sample_rate), "samples": round(mix["duration_s"] * sample_rate)}
        recipe |= {"engine": engine, "stems": stems, "events": []}
        for event in placed:
            # a table by hand may lack the last two
            how = event["onset_s"], event["gain_db"], event.get("fade_s", 0.0)
            how = *how, int(event.get("repeats", 1))
            recipe["events"].append((stamp(event["foreground"]), *how))
        name = mix["clip_id"] + Path(mix["path"]).suffix
        jobs.append(_Job(mix["clip_id"], str(Path(out_dir) / mix["split"] / name), recipe))
    return jobs


def _stamp(path):
    try:
        info = Path(path).stat()
    except OSError as error:
        raise audio.AudioError(
            f"{path}: this source of a mix is not there; restore it or plan the mixes again"
        ) from error
    return str(path), info.st_size, info.st_mtime_ns


def _render_all(jobs, workers, records):
    import joblib
    from tqdm.auto import tqdm

    jobs, room = _by_source(jobs)
    size = max(_MIN_CHUNK, math.ceil(len(jobs) / 100))
    chunks = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    few = 1 + len(jobs) // _MIXES_PER_WORKER
    workers = min(workers or min(os.cpu_count() or 1, few), max(1, len(chunks)))
    tasks = (joblib.delayed(_render_chunk)(chunk, room, records) for chunk in chunks)
    run = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1)
    with tqdm(total=len(jobs), desc="mixes", unit="mix", disable=None, leave=False) as bar:
        for made in run(tasks):
            bar.update(made)


def _by_source(jobs):
    """Order mixes such that few sources are decoded twice; say how many of them fit into memory."""
    # one kind is taken in blocks that fit; against each block, the other kind comes one by one
    room = _room(jobs, CACHE_BYTES // 2)
    names = [(job.recipe["events"][0][0], job.recipe["background"]) for job in jobs]
    kinds = [sorted(set(kind)) for kind in zip(*names, strict=True)] or [[], []]

    def decoded(kept, passing):
        return math.ceil(len(kinds[kept]) / room) * len(kinds[passing]) + len(kinds[kept])

    kept, passing = min([(0, 1), (1, 0)], key=lambda pair: decoded(*pair))
    rank = [{name: i for i, name in enumerate(kind)} for kind in kinds]

    def place(item):
        pair, job = item
        inner = rank[kept][pair[kept]]
        return inner // room, rank[passing][pair[passing]], inner, job.clip_id

    return [job for _, job in sorted(zip(names, jobs, strict=True), key=place)], room


def _room(jobs, limit):
    """How many decoded sources of full length fit into a number of bytes."""
    return max(1, limit // (4 * max((job.recipe["samples"] for job in jobs), default=1)))


def _render_chunk(jobs, room, records):
    # two caches, so that the kind that passes by does not push out the one that is kept
    decoders = [_decoder(kind, room) for kind in ("foreground", "background")]
    for job in jobs:
        parts, scale = _render(job, *decoders)
        # the mix comes last: where it is, its parts are
        for path, part in list(zip(job.files, parts, strict=False))[::-1]:
            store.write_atomic(path, _encoded(part, job.recipe["rate"], path.endswith(".flac")))
        records.add(job.clip_id, {"recipe": job.key, "peak_scale": scale})
    return len(jobs)


def _render(job, foregrounds, backgrounds):
    recipe = job.recipe
    rate, n = recipe["rate"], recipe["samples"]
    try:
        events = [Event(foregrounds(source, rate, n), *how) for source, *how in recipe["events"]]
        bg = backgrounds(recipe["background"], rate, n)
        return _mixed(events, bg, n, rate, recipe["gain_db"], recipe["engine"], recipe["stems"])
    except audio.AudioError as error:
        raise audio.AudioError(f"mix {job.clip_id}: {error}") from error


@lru_cache(maxsize=2)
def _decoder(kind, room):
    """Decode sources; those used last are kept, from one chunk of a process to the next."""
    return lru_cache(room)(_decode)


def _decode(source, rate, n):
    # the size and time in it keep a file that was replaced from being taken out of the cache
    path, _, _ = source
    # what is resampled is read whole, as the filter looks ahead of a cut
    seconds = n / rate if audio.read_header(path)[1] == rate else None
    return audio.load_audio(path, rate, seconds)[0][:n] * _STEPS


def _encoded(steps, rate, flac):
    if flac:
        buffer = io.BytesIO()
        sf.write(buffer, steps.astype(np.int16), rate, format="FLAC", subtype="PCM_16")
        return buffer.getvalue()
    # a header made once: "plain equation" of benchmarks/mixing.py stands against ready bytes
    header = _wav_header(steps.size, rate)
    file = np.empty(header.size + steps.size, "<i2")
    file[: header.size], file[header.size :] = header, steps
    return file.data.cast("B")


@lru_cache(maxsize=16)
def _wav_header(n, rate):
    buffer = io.BytesIO()
    sf.write(buffer, np.zeros(n, np.int16), rate, format="WAV", subtype="PCM_16")
    return np.frombuffer(buffer.getvalue()[: -2 * n], "<i2")


# --- on the fly -------------------------------------------------------------------------------


class MixDataset:
    """Mixes rendered as they are asked for: the samples of the files, without the files.

    For ``torch.utils.data.DataLoader`` (which needs no base class): 51,000 mixes of 10 s are trained
    on without 45 GB of disk. An item holds ``audio`` (float32), ``peak_scale``, ``clip_id`` and the
    captions; with `stems` ``foreground`` and ``background``, too. Parameters are as of
    :func:`render_mixes`; `cache_mb` MiB of decoded sources are kept by every process.
    """

    def __init__(self, mixes, sample_rate, engine="numpy", stems=False, cache_mb=512, events=None):
        _check_table(mixes)
        self._jobs = _jobs(mixes, events, "", sample_rate, engine, stems)
        self._texts = mixes[captions.caption_columns(mixes)].to_dict("records")
        self._room = _room(self._jobs, cache_mb * 2**20)

    def __len__(self):
        return len(self._jobs)

    def __getitem__(self, index):
        job = self._jobs[index]
        mix = _as_mix(*_render(job, self._decoded, self._decoded))._asdict()
        item = {name: value for name, value in mix.items() if value is not None}
        return item | {"clip_id": job.clip_id} | self._texts[index]

    @cached_property
    def _decoded(self):
        return lru_cache(self._room)(_decode)

    def __getstate__(self):
        # a data loader's process decodes for itself: sending a full cache would take longer
        return {name: value for name, value in self.__dict__.items() if name != "_decoded"}
