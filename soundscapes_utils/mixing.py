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
import sys
import warnings
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import soundfile as sf

from soundscapes_utils import audio, captions, store
from soundscapes_utils.datasets import assign_splits

# A mix is a clip, and its recipe; the captions follow.
_MIX = """clip_id path label fold source_id dataset duration_s sample_rate split foreground background
    scene background_source onset_s repeats fade_s active_start_s active_end_s clip_s foreground_gain_db
    background_gain_db snr_db level_measure peak_scale seed n_events"""
_EVENT = """clip_id event label source_id foreground onset_s repeats fade_s active_start_s active_end_s
    clip_s gain_db snr_db"""
MIX_COLUMNS, EVENT_COLUMNS = _MIX.split(), _EVENT.split()
ENGINES = ("numpy", "pydub", "pydub-saturate")
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
_LOUD_DB = 40.0  # 16 bit lies 96 dB above its rounding noise, and recordings seldom fill it
# Recipes pass through CSV, whose readers are exact to about 15 digits only.
_DECIMALS = 4
_MIXES_PER_WORKER = 500  # a new process takes about as long as these
_MIN_CHUNK, _MAX_CHUNK = 32, 500
_ROWS_HELD = 2_000  # of a plan as dictionaries, which take five times its table


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
    Gaurav et al. did; at 0 dB both agree to one step; "pydub-saturate" clips where theirs does, byte for
    byte. Stems sum to the mix without any rest: the background is rounded, the foreground is what is
    missing to the mix.

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
    _check_engine(engine, stems)
    placed = [(*_placed(event, n, rate), event.gain_db) for event in events]
    mix = _mix_numpy if engine == "numpy" else partial(_mix_pydub, saturate=engine != "pydub")
    y, background, scale = mix(placed, audio.fix_length(bg, n), rate, bg_gain_db, stems)
    np.rint(y, out=y)
    if not stems:
        return (y, None, None), scale
    np.rint(background, out=background)
    return (y, y - background, background), scale


def _placed(event, n, rate):
    """Return the onset in ms and in samples, and the event's samples, cut at the mix's end."""
    onset_ms = round(event.onset_s * 1000) if 0 <= event.onset_s <= n / rate else math.inf
    # pydub places segments by whole milliseconds, cut down to samples; numpy does likewise
    start = int(min(n, onset_ms * (rate / 1000)))
    if start >= n or not 0 <= event.fade_s < math.inf or event.repeats < 1 or event.repeats % 1:
        when = f"{event.onset_s} s, fade {event.fade_s} s, {event.repeats} repeats"
        raise audio.AudioError(f"an event at {when}: not in a mix of {n / rate} s")
    clip, room = event.signal, n - start
    if event.repeats == 1 and not event.fade_s:
        return onset_ms, start, clip[:room]
    y = np.resize(clip, min(room, int(event.repeats) * clip.size))
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
        # a difference of two rounded parts can add a step for each rounding
        scale = min(scale, _peak_scale(parts, 32766 - len(placed)))
    if scale != 1:
        y *= np.float32(scale)
        background = background * np.float32(scale) if stems else None
    return y, background, scale


def _mix_pydub(placed, bg, rate, bg_gain_db, stems, saturate):
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
    scale = 1.0 if saturate else _peak_scale(peak)
    if stems:
        scale = min(scale, _peak_scale(_peak(total - background), 32766 - len(placed)))
    # pydub rounds lengths to milliseconds; the padding takes that, and is cut off again
    scene = mixed = segment(np.pad(bg, (0, math.ceil(0.01 * rate))), bg_gain_db + _db(scale))
    for onset_ms, _, signal, gain_db in placed:
        mixed = mixed.overlay(segment(signal, gain_db + _db(scale)), position=onset_ms)
    return samples(mixed), samples(scene) if stems else None, scale


def _factor(gain_db):
    if not abs(gain_db) <= 200:
        raise audio.AudioError(f"a gain of {gain_db} dB: give a number from -200 to 200")
    return np.float32(10 ** (gain_db / 20))


def _peak(y):
    return max(y.max(), -y.min()) / _STEPS


def _peak_scale(peak, limit=32767):
    return 1.0 if peak <= limit / 32768 else float(limit / 32768 / peak)


def _db(x):
    return 20 * math.log10(x)


# --- levels -----------------------------------------------------------------------------------


def _active_level(y, sample_rate, measure="rms"):
    """Measure the level of a signal where it sounds in dB, and from when to when (s) that is.

    A frame of 20 ms is active if it is within 30 dB of the loudest one: the silence that clips are
    padded with must not make a short event seem soft. `measure` weights what the active ones hold.
    """
    y = audio.check_audio(y, "signal")
    frame = max(1, round(_FRAME_S * sample_rate))
    starts = np.arange(0, y.size, frame)
    lengths = np.diff(np.append(starts, y.size))
    squares = {name: _weighted(y, sample_rate, name) ** 2 for name in {"rms", measure}}
    power = {name: np.add.reduceat(square, starts) / lengths for name, square in squares.items()}
    active = power["rms"] >= power["rms"].max() * 10 ** (-_ACTIVE_DB / 10)
    first, last = np.flatnonzero(active)[[0, -1]].tolist()
    level = _db(math.sqrt(power[measure][active].mean()))
    return level, first * frame / sample_rate, min((last + 1) * frame, y.size) / sample_rate


def snr_gain_db(foreground, background, sample_rate, snr_db, measure="rms"):
    """Gain of the foreground, in dB, that sets a signal-to-noise ratio; the background keeps its own.

    The foreground counts where it sounds, the background over its whole length; `measure` as
    ``snr_measure`` of :class:`MixOptions`.

    >>> round(snr_gain_db(np.full(800, 0.1), np.full(800, 0.01), 8000, snr_db=6.0), 2)
    -14.0
    """
    _check_choice("measure", measure, MEASURES)
    level, _, _ = _active_level(audio.check_audio(foreground, "foreground"), sample_rate, measure)
    return snr_db - (level - _level(audio.check_audio(background, "background"), sample_rate, measure))


def _level(y, rate, measure):
    return _db(math.sqrt(np.mean(_weighted(y, rate, measure) ** 2)))


def _weighted(y, rate, measure):
    """Weight a signal as ears do (measure "lufs"); the constant of LUFS falls out of every ratio."""
    y = y.astype(np.float64)
    if measure == "rms":
        return y
    from pyloudnorm import IIRfilter

    # the two stages of pyloudnorm's own meter
    shelf = IIRfilter(4.0, 1 / math.sqrt(2), 1500.0, rate, "high_shelf")
    return IIRfilter(0.0, 0.5, 38.0, rate, "high_pass").apply_filter(shelf.apply_filter(y))


def _check_engine(engine, stems):  # what saturates is no sum of stems
    _check_choice("engine of stems" if stems else "engine", engine, ENGINES[: 2 if stems else 3])


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
    - ``snr_measure``: "rms", or "lufs" with the K-weighting of ITU-R BS.1770-4. They differ by it alone:
      both take the foreground's active frames and the background's whole length, without a gate.
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
        kinds = {"duration_s": "positive", "test_fold": "whole", "n_captions": "whole"}
        kinds |= {} if self.sample_rate is None else {"sample_rate": "positive"}
        store.check_rows(pd.DataFrame([vars(self)]), "options", **kinds)
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
        other = "lambda" if options.mode == "snr" else "snr"
        raise store.DataError(f"{name} has no effect in mode {options.mode!r}: use mode {other!r}")
    return options


def _span(name, value):
    """Smallest and largest value of a range."""
    try:
        values = np.array(value, dtype=float, ndmin=1)
    except (TypeError, ValueError):
        values = np.empty(0)
    fits = values.ndim == 1 and values.size > 0 and np.isfinite(values).all()
    if not fits or (isinstance(value, tuple) and (values.size != 2 or values[0] > values[1])):
        raise store.DataError(f"{name} {value!r}: give a number, (low, high), or a list to choose from")
    if name in _WHOLE and (values % 1).any():
        raise store.DataError(f"{name} {value!r}: give whole numbers")
    return values.min(), values.max()


def _draw(options, mix_seed, event):
    """Draw the options that are ranges, for one event of a mix."""
    u = np.random.default_rng([mix_seed, 1 + event]).random(len(_DRAWN)).tolist()
    drawn = {}
    for name, share in zip(_DRAWN, u, strict=True):
        value = getattr(options, name, 0)
        if isinstance(value, tuple) or value == "uniform":
            low, high = (0.0, 1.0) if value == "uniform" else value
            value = low + (int((high - low + 1) * share) if name in _WHOLE else (high - low) * share)
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
    Clips that are unreadable, or silent for as long as a mix lasts, are left out with a warning.

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
    store.check_rows(pd.DataFrame([{"n": n, "seed": seed}]), "plan", n="whole", seed="whole")
    fg, bg = _checked(foregrounds, "foregrounds"), _checked(backgrounds, "backgrounds")
    n, seed, fold, folds = int(n), int(seed), options.test_fold, sorted(bg["fold"].unique())
    bg_fold = fold if fold in folds else folds[(fold - 1) % len(folds)]
    fg = fg.assign(split=assign_splits(fg, fold), loop=False)
    bg = bg.assign(split=assign_splits(bg, bg_fold), loop=True)
    n_folds = fg["fold"].nunique()
    if n < n_folds:
        raise store.DataError(f"n of {n} mixes leaves a split empty; plan at least {n_folds}")
    held_out = max(1, round(n / n_folds))
    shares = {"train": n - 2 * held_out, "val": held_out, "test": held_out}
    tables, mixes, events, loud, left_out = [], [], [], {}, {}
    texts = ["caption", *(f"caption_{k}" for k in range(2, int(options.n_captions) + 1))]
    table = partial(pd.DataFrame, columns=[*MIX_COLUMNS, *texts])
    measure = lru_cache(maxsize=None)(partial(_clip_level, options=options, left_out=left_out))

    def level(clip):
        return measure(clip.path, clip.loop)

    for number, (split, count) in enumerate(shares.items()):
        of_split = (clips[clips["split"] == split] for clips in (fg, bg))
        for index, chosen in enumerate(_choose_clips(*of_split, count, [seed, number], options, level)):
            name = {"clip_id": f"{split}-{index:05d}", "split": split}
            placed = [name | event for event in _place(*chosen, options, level)]
            if len(mixes) == _ROWS_HELD:
                tables, mixes = [*tables, table(mixes)], []
            mixes.append(_mix(*chosen, placed, options))
            events += placed if len(placed) > 1 else []
            gains = [event[gain] for event in placed for gain in ("gain_db", "background_gain_db")]
            loud |= {name["clip_id"]: max(gains)} if max(gains) > _LOUD_DB else {}
    mixes = pd.concat([*tables, table(mixes)], ignore_index=True)
    _warn("clips that no mix can use are left out", left_out.values())
    _warn(f"mixes amplify by more than {_LOUD_DB:.0f} dB, rounding noise with it", loud)
    return mixes, pd.DataFrame(events, columns=EVENT_COLUMNS)


def _checked(clips, where):
    """A table of clips whose names are text, or an error that names the row."""
    names = [name for name in ("path", "label", "source_id") if name in clips]
    clips = clips.assign(**{name: clips[name].map(str, na_action="ignore") for name in names})
    store.check_rows(clips, where, path="text", label="text", source_id="text", fold="whole")
    return clips


def _warn(what, found):
    if len(found):
        warnings.warn(f"{len(found)} {what}: {', '.join(map(str, [*found][:3]))}", stacklevel=3)


def _choose_clips(fg, bg, count, key, options, level):
    """Yield seed, background and foregrounds of every mix of a split."""
    most, labels = _span("events", options.events)[1], fg["label"].nunique()
    if most > labels:
        raise store.DataError(f"events up to {most:.0f}: a split has {labels} labels, each used once")
    further = _further_clips(fg, key, level)
    for index, (first, background) in zip(range(count), _pairs(fg, bg, key, level), strict=False):
        seed = int(np.random.SeedSequence([*key, index]).generate_state(1)[0])
        clips = [first]
        for _ in range(int(_draw(options, seed, 0)["events"]) - 1 if most > 1 else 0):
            clips.append(further({clip.label for clip in clips}))
        yield seed, background, clips


def _pairs(foregrounds, backgrounds, key, level):
    """Yield (foreground, background) rows without end, balanced over labels × scenes."""
    rng = np.random.default_rng(key)
    by_label, by_scene = (_endless_clips(clips, rng, level) for clips in (foregrounds, backgrounds))
    labels, scenes = rng.permutation(list(by_label)), rng.permutation(list(by_scene))
    # stepping through both at once meets every combination only if they share no factor; moving
    # on by one scene after each common period meets the rest
    period = math.lcm(len(labels), len(scenes))
    for i in itertools.count():
        label, scene = labels[i % len(labels)], scenes[(i + i // period) % len(scenes)]
        yield next(by_label[label]), next(by_scene[scene])


def _further_clips(foregrounds, key, level):
    """Return a function that draws a clip of a label not yet used, of that longest not drawn."""
    rng = np.random.default_rng([*key, 0, 1])
    by_label = _endless_clips(foregrounds, rng, level)
    waiting = rng.permutation(list(by_label)).tolist()

    def draw(used):
        label = next(label for label in waiting if label not in used)
        waiting.remove(label)
        waiting.append(label)
        return next(by_label[label])

    return draw


def _endless_clips(clips, rng, level):
    """Label → its clips without end, each that has a level as often as the others."""

    def forever(label, rows, own):
        while True:
            order = [rows[i] for i in own.permutation(len(rows))]
            if not any(map(level, order)):
                where = f"{rows[0].split} clips of label {label!r}"
                raise audio.AudioError(f"all {where} are silent or unreadable, such as {rows[0].path}")
            yield from filter(level, order)

    return {
        label: forever(label, list(rows.itertuples(index=False)), np.random.default_rng(own))
        for label, rows in clips.groupby("label")
        for own in [rng.integers(2**63)]
    }


def _clip_level(path, loop, options, left_out):
    """Level, active begin and end, and length in seconds, of what a mix can use of a clip; or None."""
    seconds, measure = options.duration_s, options.snr_measure
    try:
        y, rate = audio.load_audio(path, options.sample_rate, seconds, silent_ok=False)
    except audio.AudioError as error:
        left_out[path] = error
        return None
    if not loop:
        return (*_active_level(y, rate, measure), y.size / rate)
    return _level(audio.fix_length(y, round(seconds * rate)), rate, measure), 0.0, seconds, seconds


def _place(seed, background, clips, options, level):
    """Yield when and how loud each event of a mix sounds, as columns of the table of events."""
    bg_level, *_ = level(background)
    for number, clip in enumerate(clips):
        drawn = _draw(options, seed, number)
        fg_level, start, end, length = level(clip)
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
    texts = captions.mix_captions([c.label for c in clips], background.label, seed, options.n_captions)
    mix = placed[0] | {"foreground_gain_db": placed[0]["gain_db"], "n_events": len(placed)}
    mix |= {"fold": clips[0].fold, "dataset": getattr(clips[0], "dataset", "")}
    mix |= {"background": str(background.path), "background_source": background.source_id}
    mix |= {"scene": background.label, "level_measure": options.snr_measure, "seed": seed}
    mix |= {"duration_s": options.duration_s, "sample_rate": options.sample_rate or math.nan}
    mix |= {"peak_scale": math.nan, "path": f"{mix['split']}/{mix['clip_id']}.{options.format}"}
    return mix | {f"caption_{k}" if k > 1 else "caption": sys.intern(t) for k, t in enumerate(texts, 1)}


# --- events -----------------------------------------------------------------------------------


def events_of(mixes, events=None):
    """Yield the events of each mix, a list of dictionaries with the columns of the table of events.

    The first event of each mix is taken from `mixes`; events that are not listed are missed.
    """
    further = _further_events(mixes, events)
    first = mixes.rename(columns={"foreground_gain_db": "gain_db"}, copy=False).filter(EVENT_COLUMNS)
    for values in first.itertuples(index=False, name=None):
        row = dict(zip(first, values, strict=True)) | {"event": 0}
        yield [row, *further.get(row.get("clip_id"), [])]


def _further_events(mixes, events):
    further = {}
    for row in [] if events is None else events[events["event"] > 0].to_dict("records"):
        further.setdefault(row["clip_id"], []).append(row)
    for name, n in zip(mixes.get("clip_id", ()), mixes.get("n_events", ()), strict=False):
        if n != (listed := 1 + len(further.get(name, []))):
            which = f"mix {name}: {listed} of {n} events are listed"
            raise store.DataError(f"{which}; give events=, the second table of plan_scenes")
    return further


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
                rows.append(event | {"repetition": repetition, "onset_s": onset, "offset_s": offset})
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
    if not 1 <= sample_rate < math.inf or (workers is not None and workers < 1):
        raise store.DataError(f"sample_rate {sample_rate} and workers {workers} must be at least 1")
    _check_table(mixes, events)
    if shard:
        share = store.shard(sorted(mixes["foreground"].unique()), shard)
        mixes = mixes[mixes["foreground"].isin(share)]
        events = None if events is None else events[events["clip_id"].isin(mixes["clip_id"])]
    records, known = (store.Records(out_dir, name) for name in ("mixes", "sources"))
    jobs = _Jobs(mixes, events, out_dir, sample_rate, engine, stems, known)
    scales = np.full(len(mixes), np.nan)
    for place in range(len(mixes) if records.entries else 0):
        scales[place] = _made_scale(jobs[place], records.entries)
    for place, scale in _render_all(jobs, np.flatnonzero(np.isnan(scales)), workers, records):
        scales[place] = scale
    places = zip(*(jobs.columns[name] for name in ("split", "clip_id", "path")), strict=True)
    paths = [f"{out_dir}/{split}/{name}.{path.rpartition('.')[2]}" for split, name, path in places]
    return mixes.assign(path=paths, sample_rate=int(sample_rate), peak_scale=scales)


_EACH = {"clip_id": "a name", "foreground": "text", "onset_s": "not negative"}
_MIX_VALUES = _EACH | {"split": "a name", "path": "text", "background": "text", "duration_s": "positive"}
_MIX_VALUES |= {"foreground_gain_db": "a number", "background_gain_db": "a number"}
_EVENT_VALUES = _EACH | {"event": "whole", "gain_db": "a number"}
# a table by hand may lack them
_MORE_VALUES = ({"fade_s": "not negative", "repeats": "whole"}, {"repeats": "positive"})


def _check_table(mixes, events):
    for table, where, values in [(mixes, "mixes", _MIX_VALUES), (events, "events", _EVENT_VALUES)]:
        for kinds in (values, *_MORE_VALUES) if table is not None else ():
            store.check_rows(table, where, **{n: kinds[n] for n in kinds if n in table or n in values})
    twice = mixes["clip_id"][mixes["clip_id"].duplicated()]
    if len(twice):
        raise store.DataError(f"clip_id {twice.iloc[0]} occurs twice; give every mix its own")
    for suffix in {f".{path.rpartition('.')[2]}" for path in mixes["path"]}:
        _check_choice("format", suffix, (".wav", ".flac"))


class _Job(NamedTuple):
    clip_id: str
    path: str
    recipe: dict  # all that the file comes from
    key: str

    @property
    def files(self):
        stem, dot, suffix = self.path.rpartition(".")
        parts = ("", "_foreground", "_background") if self.recipe["stems"] else ("",)
        return [f"{stem}{part}{dot}{suffix}" for part in parts]


def _arrays(table, names):
    return {name: table[name].to_numpy() for name in names if name in table}


def _row(arrays, place):
    return {name: column.item(place) for name, column in arrays.items()}


class _Jobs:
    """What workers need of each mix, made as it is asked for: held, it would take 4 kB a mix."""

    def __init__(self, mixes, events, out_dir, sample_rate, engine, stems, known=None):
        _check_engine(engine, stems)
        exact = mixes.filter([*_MIX_VALUES, "fade_s", "repeats", "n_events"]).round(_DECIMALS)
        self._further = _further_events(exact, None if events is None else events.round(_DECIMALS))
        self.columns = _arrays(exact, [*_MIX_VALUES, "fade_s", "repeats"])
        sources = {*exact["foreground"], *exact["background"]}
        sources |= {row["foreground"] for row in itertools.chain(*self._further.values())}
        self._sources = {path: _source(path, known) for path in sorted(sources)}
        self._out_dir, self._keyed, self.rate = out_dir, known is not None, sample_rate
        self._how = {"rate": int(sample_rate), "engine": engine, "stems": stems}

    def __len__(self):
        return len(self.columns["clip_id"])

    def __getitem__(self, place):
        mix = _row(self.columns, place)
        recipe = {"background": self._sources[mix["background"]], "gain_db": mix["background_gain_db"]}
        recipe |= self._how | {"samples": round(mix["duration_s"] * self.rate), "events": []}
        first = mix | {"gain_db": mix["foreground_gain_db"]}
        for event in (first, *self._further.get(mix["clip_id"], [])):
            how = event["onset_s"], event["gain_db"], event.get("fade_s", 0.0)
            source = self._sources[event["foreground"]]
            recipe["events"].append((source, *how, int(event.get("repeats", 1))))
        name = f"{mix['clip_id']}.{mix['path'].rpartition('.')[2]}"
        # what the sources hold counts, not where they lie
        held = [(digest, *how) for (_, digest), *how in recipe["events"]]
        held = recipe | {"background": recipe["background"][1], "events": held}
        key = store.content_key(name[-4:], held) if self._keyed else ""
        return _Job(mix["clip_id"], f"{self._out_dir}/{mix['split']}/{name}", recipe, key)


def recipe_keys(mixes, sample_rate, known):
    """Tell what each planned mix comes from, by content; `known` remembers sources: `store.Records`."""
    return [job.key for job in _Jobs(mixes, None, "", sample_rate, "numpy", False, known)]


def _source(path, known):
    """A source and what tells its content: without records of `known` ones, size and time only."""
    try:
        if known is None:
            info = Path(path).stat()
            return path, f"{info.st_size} {info.st_mtime_ns}"
        return path, store.known_digest(path, known)
    except OSError as error:
        raise audio.AudioError(f"{path}: this source is not there ({error}); plan again") from error


def _made_scale(job, made):
    """The peak scale of a mix that is there, noted as made by this recipe; else NaN."""
    entry = made.get(job.clip_id, {})
    known = entry.get("recipe") == job.key and all(map(store.is_unchanged, job.files, entry["stamps"]))
    return entry["peak_scale"] if known else math.nan


def _render_all(jobs, pending, workers, records):
    """Render some of the jobs; yield the place of each and its peak scale."""
    import joblib
    from tqdm.auto import tqdm

    order, room = _by_source(jobs, pending)
    size = min(max(_MIN_CHUNK, math.ceil(len(order) / 100)), _MAX_CHUNK)
    chunks = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    few = 1 + len(order) // _MIXES_PER_WORKER
    workers = min(workers or min(os.cpu_count() or 1, few), max(1, len(chunks)))
    work = joblib.delayed(_render_chunk)
    tasks = (work([(place, jobs[place]) for place in chunk], room, records) for chunk in chunks)
    run = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1)
    with tqdm(total=len(order), desc="mixes", unit="mix", disable=None, leave=False) as bar:
        for scales in run(tasks):
            yield from scales
            bar.update(len(scales))


def _by_source(jobs, places):
    """Order mixes such that few sources are decoded twice; say how many of them fit into memory."""
    # one kind is taken in blocks that fit; against each block, the other kind comes one by one
    room = _room(jobs, CACHE_BYTES // 2)
    sources = (jobs.columns[name][places] for name in ("foreground", "background"))
    kinds = [pd.factorize(names, sort=True) for names in sources]
    n, m = (len(names) for _, names in kinds)
    kept = int(math.ceil(m / room) * n + m < math.ceil(n / room) * m + n)
    inner, passing = kinds[kept][0], kinds[1 - kept][0]
    return places[np.lexsort((inner, passing, inner // room))], room


def _room(jobs, limit):
    """How many decoded sources of full length fit into a number of bytes."""
    longest = max(jobs.columns["duration_s"], default=0) * jobs.rate
    return max(1, limit // (4 * max(1, round(longest))))


def _render_chunk(jobs, room, records):
    # two caches, so that the kind that passes by does not push out the one that is kept
    decoders = [_decoder(kind, room) for kind in ("foreground", "background")]
    return [(place, _render_files(job, records, *decoders)) for place, job in jobs]


def _render_files(job, records, *decoders):
    parts, scale = _render(job, *decoders)
    stamps = []
    for path, part in zip(job.files, parts, strict=False):
        content = _encoded(part, job.recipe["rate"], path.endswith(".flac"))
        store.write_atomic(path, content, flush=False)
        stamps.append(store.file_stamp(path, content))
    records.add(job.clip_id, {"recipe": job.key, "stamps": stamps, "peak_scale": scale})
    return scale


def _render(job, foregrounds, backgrounds):
    recipe = job.recipe
    rate, n = recipe["rate"], recipe["samples"]
    try:
        events = [Event(foregrounds(source, rate, n), *how) for source, *how in recipe["events"]]
        bg = backgrounds(recipe["background"], rate, n)
        return _mixed(events, bg, n, rate, recipe["gain_db"], recipe["engine"], recipe["stems"])
    except audio.AudioError as error:
        raise audio.AudioError(f"mix {job.clip_id}: {error}") from error


@lru_cache(maxsize=4)
def _decoder(kind, room):
    """Decode sources; those used last are kept, from one chunk of a process to the next."""
    return lru_cache(room)(_decode)


def _decode(source, rate, n):
    path, _ = source  # the digest keeps what was replaced from being taken out of the cache
    return audio.load_audio(path, rate, n / rate, whole=True)[0] * _STEPS


def _encoded(steps, rate, flac):
    if flac:
        buffer = io.BytesIO()
        sf.write(buffer, steps.astype(np.int16), rate, format="FLAC", subtype="PCM_16")
        return buffer.getvalue()
    # a header made once: row P1b of benchmarks/all.py stands against ready bytes
    file = np.concatenate([_wav_header(steps.size, rate), steps], dtype="<i2", casting="unsafe")
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
        _check_table(mixes, events)
        self._jobs = _Jobs(mixes, events, "", sample_rate, engine, stems)
        self._texts = _arrays(mixes, captions.caption_columns(mixes))
        self._room = _room(self._jobs, cache_mb * 2**20)

    def __len__(self):
        return len(self._jobs)

    def __getitem__(self, index):
        job = self._jobs[index]
        decode = _decoder("items", self._room)  # a data loader's process decodes for itself
        mix = _as_mix(*_render(job, decode, decode))._asdict()
        item = {name: value for name, value in mix.items() if value is not None}
        return item | {"clip_id": job.clip_id} | _row(self._texts, index)
