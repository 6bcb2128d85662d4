"""Lay foreground events over acoustic scenes: ``x = λ1·x1 + λ2·x2``.

:func:`plan_mixes` draws the recipes, balanced over labels and scenes and split by fold;
:func:`render_mixes` turns them into files. A recipe is complete: the same table gives the same
bytes, whatever the order, the number of workers, or what was already there.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from soundscapes_utils import audio, captions
from soundscapes_utils.datasets import assign_splits

MIX_COLUMNS = [
    "mix_id",
    "split",
    "foreground",
    "foreground_label",
    "foreground_source",
    "background",
    "scene",
    "background_source",
    "onset_s",
    "duration_s",
    "foreground_gain_db",
    "background_gain_db",
    "snr_db",
    "peak_scale",
    "seed",
    "caption",
    "caption_2",
    "caption_3",
    "path",
]
SPLITS = ("train", "val", "test")
MODES = ("snr", "lambda")
ENGINES = ("numpy", "pydub")

# The loudest value that 16 bit can hold; a mix beyond it is scaled down to it.
_FULL_SCALE = 32767 / 32768
_FRAME_S = 0.02
_ACTIVE_DB = 30.0
_RECIPE_FIELDS = ("onset_s", "duration_s", "foreground_gain_db", "background_gain_db")
# Recipes pass through CSV, whose readers are exact to about 15 digits only.
_DECIMALS = 4
_RECIPES_FILE = "recipes.csv"
_MIXES_PER_WORKER = 500
_MIN_CHUNK = 32


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


def snr_gain_db(foreground, background, sample_rate, snr_db):
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

    Returns
    -------
    float
        dB; the background keeps its level.

    Raises
    ------
    AudioError
        Empty, silent or not finite.

    Examples
    --------
    >>> round(snr_gain_db(np.full(800, 0.1), np.full(800, 0.01), 8000, snr_db=6.0), 2)
    -14.0
    """
    background = audio.check_audio(background, "background")
    return snr_db - (active_level(foreground, sample_rate)[0] - _rms_db(background))


def mix_signals(
    foreground,
    background,
    sample_rate,
    *,
    onset_s=0.0,
    duration_s=None,
    foreground_gain_db=0.0,
    background_gain_db=0.0,
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
        Empty or non-finite signals, an onset outside the mix, or an unknown engine.

    Examples
    --------
    >>> y, scale = mix_signals(np.full(2, 0.5), np.full(4, 0.25), 1000, onset_s=0.001)
    >>> y.tolist(), scale
    ([0.25, 0.75, 0.75, 0.25], 1.0)
    """
    if engine not in ENGINES:
        raise audio.AudioError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    fg = audio.check_audio(foreground, "foreground", silent_ok=True)
    bg = audio.check_audio(background, "background", silent_ok=True)
    n = bg.size if duration_s is None else round(duration_s * sample_rate)
    onset_ms = round(onset_s * 1000)
    # pydub places segments by whole milliseconds, cut down to samples; numpy does likewise
    start = int(onset_ms * (sample_rate / 1000))
    if not 0 <= start < n:
        raise audio.AudioError(f"onset {onset_s} s lies outside the mix of {n / sample_rate} s")
    fg, bg = fg[: n - start], audio.fit_length(bg, n)
    gains = foreground_gain_db, background_gain_db
    if engine == "pydub":
        return _mix_pydub(fg, bg, sample_rate, onset_ms, gains)
    y = bg * np.float32(10 ** (gains[1] / 20))
    y[start : start + fg.size] += fg * np.float32(10 ** (gains[0] / 20))
    scale = _peak_scale(np.abs(y).max())
    return (y if scale == 1 else y * np.float32(scale)), scale


def _mix_pydub(fg, bg, rate, onset_ms, gains):
    with warnings.catch_warnings():
        # pydub warns on import where ffmpeg is missing, which raw samples do not need
        warnings.simplefilter("ignore")
        from pydub import AudioSegment

    def segment(y, gain_db):
        raw = np.clip(np.rint(y * 32768.0), -32768, 32767).astype("<i2").tobytes()
        whole = AudioSegment(raw, sample_width=2, frame_rate=rate, channels=1)
        return whole.apply_gain(gain_db) if gain_db else whole

    # pydub saturates silently, so the peak must be known before it mixes
    start = int(onset_ms * (rate / 1000))
    parts = np.zeros((2, bg.size), np.float32)
    parts[0, start : start + fg.size] = fg * np.float32(10 ** (gains[0] / 20))
    parts[1] = bg * np.float32(10 ** (gains[1] / 20))
    scale = _peak_scale(max(np.abs(parts).max(), np.abs(parts.sum(axis=0)).max()))
    fg_gain, bg_gain = (gain + (0 if scale == 1 else _db(scale)) for gain in gains)
    # pydub rounds lengths to milliseconds; the padding takes that, and is cut off again
    padded = np.pad(bg, (0, math.ceil(0.01 * rate)))
    mixed = segment(padded, bg_gain).overlay(segment(fg, fg_gain), position=onset_ms)
    pcm = np.frombuffer(mixed.raw_data, dtype="<i2")[: bg.size]
    return pcm.astype(np.float32) / np.float32(32768), scale


def _peak_scale(peak):
    return 1.0 if peak <= _FULL_SCALE else float(_FULL_SCALE / peak)


def _db(x):
    return 20 * math.log10(x)


def _rms_db(y):
    return _db(math.sqrt(np.mean(y.astype(np.float64) ** 2)))


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
):
    """Draw the recipes of a set of mixes.

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
    test_fold : int
        Fold of the test mixes; the next one validates. Backgrounds that have fewer folds count
        round.
    mode : {"snr", "lambda"}
        "snr" draws the ratio of the foreground (RMS of its active part) to the background (RMS
        over the mix) and sets the foreground's gain to it; "lambda" takes the two factors, and
        records the ratio that results.
    snr_db : float or (float, float)
        Ratio in dB, fixed or drawn uniformly from a range.
    foreground_lambda, background_lambda : float
        λ1 and λ2 of mode "lambda", above 0; 1 and 1 is the equation of Gaurav et al.
    onset : "uniform", float or str
        Seconds (a number or its text), or anywhere such that the foreground's active part ends
        within the mix.
    duration_s : float
        Length of the mixes.
    sample_rate : int, optional
        Rate at which levels are measured: that of the rendering, for a ratio that holds there. By
        default each file's own.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`MIX_COLUMNS`, split after split; ``peak_scale`` is empty and ``path``
        relative until :func:`render_mixes` has made the file.

    Raises
    ------
    ValueError
        Options out of range, too few mixes, folds that do not split (see
        :func:`~soundscapes_utils.datasets.assign_splits`).
    AudioError
        A clip that cannot be read, or is silent.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> names = [f"{label}-{fold}" for label in ("dog", "park") for fold in (1, 2, 3)]
    >>> paths = [audio.save_audio(folder / f"{n}.wav", [0.1] * 800, 8000) for n in names]
    >>> clips = pd.DataFrame({"path": paths, "source_id": names, "fold": [1, 2, 3] * 2})
    >>> clips["label"] = [name.split("-")[0] for name in names]
    >>> mixes = plan_mixes(clips[:3], clips[3:], n=3, test_fold=3, duration_s=0.1)
    >>> mixes[["split", "foreground_source", "background_source"]].to_numpy().tolist()
    [['train', 'dog-2', 'park-2'], ['val', 'dog-1', 'park-1'], ['test', 'dog-3', 'park-3']]
    """
    low, high = (snr_db, snr_db) if np.isscalar(snr_db) else snr_db
    lambdas = foreground_lambda, background_lambda
    _check_options(mode, low, high, lambdas)
    onset_s = _fixed_onset(onset, duration_s)
    fg = foregrounds.assign(split=assign_splits(foregrounds, test_fold))
    bg_fold = _matching_fold(backgrounds, test_fold)
    bg = backgrounds.assign(split=assign_splits(backgrounds, bg_fold))
    level = lru_cache(maxsize=None)(lambda path, loop: _level(path, loop, sample_rate, duration_s))
    rows = []
    for number, (split, count) in enumerate(_shares(n, foregrounds.fold.nunique()).items()):
        rng_key = [seed, number]
        pairs = _pairs(fg[fg.split == split], bg[bg.split == split], rng_key)
        for index, (f, b) in enumerate(itertools.islice(pairs, count)):
            mix_seed = int(np.random.SeedSequence([*rng_key, index]).generate_state(1)[0])
            draw = np.random.default_rng([mix_seed, 1]).random(2)
            wanted = low + (high - low) * draw[0] if mode == "snr" else None
            levels = _gains(level(f.path, False), level(b.path, True), wanted, lambdas)
            end = level(f.path, False)[2]
            begin = max(0.0, duration_s - end) * draw[1] if onset_s is None else onset_s
            rows.append(_recipe_row(split, index, f, b, mix_seed, begin, duration_s, levels))
    return pd.DataFrame(rows, columns=MIX_COLUMNS)


def _check_options(mode, low, high, lambdas):
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"snr_db from {low} to {high}: give finite dB, the smaller one first")
    if not all(math.isfinite(x) and x > 0 for x in lambdas):
        raise ValueError(f"λ of {lambdas}: both must be above 0")


def _fixed_onset(onset, duration_s):
    """Onset in seconds, None where it is to be drawn."""
    try:
        onset_s = None if onset == "uniform" else float(onset)
    except ValueError as error:
        raise ValueError(f"onset {onset!r}: give 'uniform' or seconds") from error
    if not 0 <= (onset_s or 0.0) < duration_s:
        raise ValueError(f"onset {onset!r} does not lie in a mix of {duration_s} s")
    return onset_s


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


def _level(path, loop, sample_rate, duration_s):
    """Level in dB, active begin and end in seconds, of the part of a clip that a mix can use."""
    y, rate = audio.load_audio(path, sample_rate, duration_s)
    if not loop:
        return active_level(audio.check_audio(y, path), rate)
    y = audio.fit_length(audio.check_audio(y, path), round(duration_s * rate))
    return _rms_db(y), 0.0, duration_s


def _gains(fg_level, bg_level, wanted_snr, lambdas):
    apart = fg_level[0] - bg_level[0]
    if wanted_snr is not None:
        return wanted_snr - apart, 0.0, wanted_snr
    fg_gain, bg_gain = (_db(x) for x in lambdas)
    return fg_gain, bg_gain, apart + fg_gain - bg_gain


def _recipe_row(split, index, f, b, seed, onset_s, duration_s, levels):
    mix_id = f"{split}-{index:05d}"
    three = captions.mix_captions(f.label, b.label, seed)
    fg_gain, bg_gain, snr = (round(x, _DECIMALS) for x in levels)
    # fmt: off
    return (
        mix_id, split, f.path, f.label, f.source_id, b.path, b.label, b.source_id,
        math.floor(onset_s * 1000) / 1000, duration_s, fg_gain, bg_gain, snr, np.nan, seed,
        *three, f"{split}/{mix_id}.wav",
    )
    # fmt: on


# --- rendering --------------------------------------------------------------------------------


def render_mixes(mixes, out_dir, sample_rate, workers=None, engine="numpy"):
    """Make the files of a table of recipes, each as ``out_dir/<split>/<mix_id>.wav``.

    Files are written whole or not at all. What an earlier call has made from the same recipe and
    the same sources is kept; ``recipes.csv`` in `out_dir` remembers what each file came from.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`plan_mixes`, or its columns read back from CSV.
    out_dir : str or Path
        Made if need be.
    sample_rate : int
        Rate of the files in Hz.
    workers : int, optional
        Processes; by default as many as there are cores, fewer for a small set.
    engine : {"numpy", "pydub"}
        See :func:`mix_signals`.

    Returns
    -------
    pandas.DataFrame
        `mixes` with ``path`` (the file) and ``peak_scale`` filled in.

    Raises
    ------
    AudioError
        A source that cannot be read or a file that cannot be written, naming the mix. Mixes made
        before it stay; calling again goes on from there.
    ValueError
        Unknown engine, a rate or number of workers below 1, or a mix_id twice.

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
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if sample_rate < 1 or (workers is not None and workers < 1):
        raise ValueError(f"sample_rate {sample_rate} and workers {workers} must be at least 1")
    if mixes.mix_id.duplicated().any():
        twice = mixes.mix_id[mixes.mix_id.duplicated()].iloc[0]
        raise ValueError(f"mix_id {twice} occurs twice; give every mix an id of its own")
    out_dir = Path(out_dir)
    jobs = [_job(row, out_dir, sample_rate, engine) for row in mixes.itertuples(index=False)]
    done = _read_recipes(out_dir)
    pending = [job for job in jobs if not _is_made(job, done)]
    # neighbours that share a scene decode it once
    pending.sort(key=lambda job: job["background"])
    for made in _render_all(pending, workers):
        done.update(made)
        _write_recipes(out_dir, done)
    return mixes.assign(
        path=[job["path"] for job in jobs],
        peak_scale=[done[job["mix_id"]][1] for job in jobs],
    )


def _is_made(job, done):
    recipe, _ = done.get(job["mix_id"], (None, None))
    return recipe == job["recipe"] and Path(job["path"]).is_file()


def _job(row, out_dir, sample_rate, engine):
    job = {name: round(float(getattr(row, name)), _DECIMALS) for name in _RECIPE_FIELDS}
    job |= {"sample_rate": int(sample_rate), "engine": engine}
    for name in ("foreground", "background"):
        job[name] = str(getattr(row, name))
        job[f"{name}_stamp"] = _stamp(job[name], row.mix_id)
    recipe = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    path = out_dir / row.split / f"{row.mix_id}.wav"
    return job | {"recipe": recipe, "mix_id": row.mix_id, "path": str(path)}


def _stamp(path, mix_id):
    try:
        found = Path(path).stat()
    except OSError as error:
        raise audio.AudioError(
            f"mix {mix_id}: its source {path} is not there; restore it or plan the mixes again"
        ) from error
    return [found.st_size, found.st_mtime_ns]


def _render_all(pending, workers):
    """Render in chunks, here or in other processes; yield what each chunk has made."""
    from tqdm.auto import tqdm

    size = max(_MIN_CHUNK, math.ceil(len(pending) / 100))
    chunks = [pending[i : i + size] for i in range(0, len(pending), size)]
    # a new process takes about as long as some hundred mixes
    few = 1 + len(pending) // _MIXES_PER_WORKER
    workers = min(workers or min(os.cpu_count() or 1, few), max(1, len(chunks)))
    with tqdm(total=len(pending), desc="mixes", unit="mix", disable=None, leave=False) as bar:
        for made in _results(chunks, workers):
            bar.update(len(made))
            yield made


def _results(chunks, workers):
    if workers == 1:
        yield from map(_render_chunk, chunks)
        return
    # forking a process that holds torch's threads can hang it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_render_chunk, chunk) for chunk in chunks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _render_chunk(jobs):
    return {job["mix_id"]: (job["recipe"], _render_one(job)) for job in jobs}


def _render_one(job):
    rate = job["sample_rate"]
    try:
        fg, bg = (
            _source(job[name], rate, tuple(job[f"{name}_stamp"]))
            for name in ("foreground", "background")
        )
        options = {name: job[name] for name in _RECIPE_FIELDS}
        y, peak_scale = mix_signals(fg, bg, rate, **options, engine=job["engine"])
        audio.save_audio(job["path"], y, rate)
    except audio.AudioError as error:
        raise audio.AudioError(f"mix {job['mix_id']}: {error}") from error
    return peak_scale


@lru_cache(maxsize=64)
def _source(path, sample_rate, stamp):
    # the stamp keeps a file that was replaced from being taken out of the cache
    return audio.load_audio(path, sample_rate)[0]


def _read_recipes(out_dir):
    path = out_dir / _RECIPES_FILE
    if not path.is_file():
        return {}
    types = {"mix_id": str, "recipe": str}
    table = pd.read_csv(path, dtype=types, float_precision="round_trip")
    return {
        row.mix_id: (row.recipe, float(row.peak_scale)) for row in table.itertuples(index=False)
    }


def _write_recipes(out_dir, done):
    rows = [(mix_id, *made) for mix_id, made in sorted(done.items())]
    path = out_dir / _RECIPES_FILE
    part = path.with_name(f".{path.name}.part")
    pd.DataFrame(rows, columns=["mix_id", "recipe", "peak_scale"]).to_csv(part, index=False)
    part.replace(path)
