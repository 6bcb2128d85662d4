"""What a classifier hears of a clip: log-mel spectrograms, MFCC, and a cache by content.

The front end is that of Ronchini, Comanducci and Antonacci (arXiv 2403.17864, below: the paper), and
Piczak's for his baselines. :func:`divide_by_variance` and the constants called ``FAITHFUL_…`` are what
the paper's released code makes of it; the top of ``esc.py`` lists all such differences.
"""

import hashlib
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from soundscapes_utils import audio, store

SAMPLE_RATE = 16_000
CLIP_SECONDS = 4.0
N_MELS = 64
WINDOW = 1024
HOP = 512
LOG_OFFSET = 1e-3
CLIP_FRAMES = 1 + int(CLIP_SECONDS * SAMPLE_RATE) // HOP
PATCH_FRAMES = round(3.0 * SAMPLE_RATE / HOP)

# what the released code makes of 4 s and of 3 s, counting by the window
FAITHFUL_FRAMES = 63
FAITHFUL_PATCH = 45
FAITHFUL_STARTS = 15

TRANSFORMS = {
    "ps1": ("pitch_shift", (-2.0, -1.0, 1.0, 2.0)),
    "ps2": ("pitch_shift", (-3.5, -2.5, 2.5, 3.5)),
    "ts": ("time_stretch", (0.81, 0.93, 1.07, 1.23)),
}
"""Signal-processing augmentation with the paper's values: semitones, and speeds."""

# bad clips that an error names, one a line
_NAMED = 50

# two threads that hold copies of one clip write the same file
_WRITING = threading.Lock()


@lru_cache(maxsize=1)
def _mel_basis():
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(
        WINDOW // 2 + 1, 0.0, SAMPLE_RATE / 2, N_MELS, SAMPLE_RATE, norm=None, mel_scale="htk"
    )


def features(y, sample_rate=SAMPLE_RATE):
    """Log-mel spectrogram of a clip, repeated or cut to 4 s, as the paper takes it.

    16 kHz, window and FFT 1024, hop 512, 64 mel bands over 0–8 kHz of the power spectrum (HTK scale,
    no area normalisation: torchaudio's defaults), ``log(mel + 0.001)``.

    Parameters
    ----------
    y : array_like, shape (samples,)
        Signal, ±1 is full scale.
    sample_rate : int, default 16000
        Rate of `y` in Hz.

    Returns
    -------
    np.ndarray of float32, shape (126, 64)
        Frames by bands; from log(0.001) = −6.9 to about 9.

    Raises
    ------
    audio.AudioError
        Empty, silent or not finite.

    Examples
    --------
    >>> features(np.sin(np.arange(16000) * 0.3)).shape
    (126, 64)
    """
    y = audio.resample(audio.check_audio(y, "signal"), sample_rate, SAMPLE_RATE)
    y = torch.from_numpy(audio.fix_length(y, int(CLIP_SECONDS * SAMPLE_RATE)).copy())
    spectrum = torch.stft(
        y, WINDOW, HOP, window=torch.hann_window(WINDOW), pad_mode="reflect", return_complex=True
    )
    mel = spectrum.abs().square().T @ _mel_basis()
    return torch.log(mel + LOG_OFFSET).numpy()


def load_features(paths, cache_dir, workers=None):
    """Features of many clips, each computed once and kept by the content of its file.

    Parameters
    ----------
    paths : sequence of str or Path
        Sound files.
    cache_dir : str or Path
        Folder of the cache: one small .npy a clip. A changed file has another name there, so
        nothing stale is ever read.
    workers : int, optional
        Threads; by default one a CPU core.

    Returns
    -------
    x : np.ndarray of float32, shape (clips, 126, 64)
        Log-mel spectrograms in the order of `paths`.
    keys : list of str
        What identifies each clip's content.

    Raises
    ------
    audio.AudioError
        A file is missing, unreadable, silent or not finite.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = audio.save_audio(folder / "a.wav", np.sin(np.arange(16000) * 0.3), 16000)
    >>> load_features([folder / "a.wav"], folder)[0].shape
    (1, 126, 64)
    """
    settings = f"{SAMPLE_RATE},{CLIP_SECONDS},{N_MELS},{WINDOW},{HOP},{LOG_OFFSET}"
    rows, keys = load_kept(paths, cache_dir, workers, settings, _features_of)
    x = np.stack(rows) if rows else np.zeros((0, CLIP_FRAMES, N_MELS))
    return x.astype(np.float32, copy=False), keys


def _features_of(path):
    y, rate = audio.load_audio(path, sample_rate=SAMPLE_RATE, duration=CLIP_SECONDS)
    return features(audio.check_audio(y, path), rate)


def load_kept(paths, cache_dir, workers, settings, compute):
    """Compute an array for each file, or read what an earlier call kept.

    Parameters
    ----------
    paths : sequence of str or Path
        Sound files.
    cache_dir : str or Path
        Gets one .npy a file, named by a hash of the file's content and of `settings`.
    workers : int or None
        Threads; None: one a CPU core.
    settings : str
        All that `compute` depends on beside the file.
    compute : callable
        From a path to an array.

    Returns
    -------
    arrays : list of np.ndarray
        In the order of `paths`.
    keys : list of str
        What identifies each array.

    Raises
    ------
    audio.AudioError
        Files are missing, unreadable or silent (all of them are named), or the cache cannot be
        written.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_bytes(b"ab")
    >>> load_kept([folder / "a.txt"], folder, 1, "size", lambda path: np.array(path.stat().st_size))[0]
    [array(2)]
    """
    # decoding and resampling let go of Python's lock, so threads do here
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        jobs = [pool.submit(_kept, Path(p), Path(cache_dir), settings, compute) for p in paths]
    bad = [job.exception() for job in jobs if isinstance(job.exception(), audio.AudioError)]
    if bad:
        named = "\n".join(f"  {error}" for error in bad[:_NAMED])
        more = f"\n  and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise audio.AudioError(
            f"{len(bad)} of {len(jobs)} clips cannot be used; make them again, or leave their rows out "
            f"of the table:\n{named}{more}"
        ) from bad[0]
    found = [job.result() for job in jobs]
    return [item[0] for item in found], [item[1] for item in found]


def _kept(path, cache_dir, settings, compute):
    if not path.is_file():
        raise audio.AudioError(f"{path}: no such file; run the notebook that makes it again")
    key = hashlib.sha256(path.read_bytes() + settings.encode()).hexdigest()[:32]
    kept = cache_dir / f"{key}.npy"
    if kept.is_file():
        return np.load(kept), key
    x = compute(path)
    buffer = io.BytesIO()
    np.save(buffer, x)
    with _WRITING:
        store.write_atomic(kept, buffer.getvalue())
    return x, key


def standardise(x):
    """Bring each clip to mean 0 and standard deviation 1 over all its frames and bands.

    Parameters
    ----------
    x : np.ndarray of float, shape (clips, frames, bands)
        Log-mel spectrograms.

    Returns
    -------
    np.ndarray of float32, same shape
        A clip whose spectrogram is constant becomes zeros.

    Examples
    --------
    >>> standardise(np.array([[[1.0, 3.0]]])).tolist()
    [[[-1.0, 1.0]]]
    """
    # in double precision: the mean of thousands of equal singles is not quite their value
    mean = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    spread = x.std(axis=(1, 2), keepdims=True, dtype=np.float64)
    return ((x - mean) / np.maximum(spread, 1e-6)).astype(np.float32)


def divide_by_variance(x):
    """Normalise as the paper's released code: by the variance, and half of the frames kept.

    Parameters
    ----------
    x : np.ndarray of float, shape (clips, 126, bands)
        Log-mel spectrograms.

    Returns
    -------
    np.ndarray of float32, shape (clips, 63, bands)
        ``(x - mean) / variance`` over all frames and bands (n − 1), then the first 63 frames, 2 s.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(0, 2, size=(1, 126, 64))
    >>> divide_by_variance(x).shape, bool(abs(divide_by_variance(x).std() - 0.5) < 0.02)
    ((1, 63, 64), True)
    """
    mean = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    variance = x.var(axis=(1, 2), ddof=1, keepdims=True, dtype=np.float64)
    return ((x - mean) / np.maximum(variance, 1e-6))[:, :FAITHFUL_FRAMES].astype(np.float32)


def mfcc_statistics(y, sample_rate=44_100):
    """Piczak's description of a clip: statistics of MFCC and of the zero-crossing rate.

    Parameters
    ----------
    y : array_like, shape (samples,)
        Signal, ±1 is full scale; the whole clip is taken.
    sample_rate : int, default 44100
        Rate of `y` in Hz; other rates are resampled to 44.1 kHz.

    Returns
    -------
    np.ndarray of float32, shape (26,)
        Mean, then standard deviation over frames of MFCC 1 to 12 (the 0th, loudness, is left out),
        then mean and standard deviation of the zero-crossing rate (0 to 1, frames of 512).

    Raises
    ------
    audio.AudioError
        Empty, silent or not finite.

    Notes
    -----
    Piczak, "ESC: Dataset for Environmental Sound Classification", ACM Multimedia 2015: librosa's
    defaults (FFT 2048, hop 512, 128 mel bands, decibels of the power).

    Examples
    --------
    >>> mfcc_statistics(np.sin(np.arange(44_100) * 0.1)).shape
    (26,)
    """
    import librosa

    y = audio.resample(audio.check_audio(y, "signal"), sample_rate, 44_100)
    power = librosa.feature.melspectrogram(y=y, sr=44_100, n_fft=2048, hop_length=512)
    mfcc = librosa.feature.mfcc(S=librosa.power_to_db(power), n_mfcc=13)[1:]
    crossings = librosa.feature.zero_crossing_rate(y, frame_length=512, hop_length=512)
    parts = mfcc.mean(axis=1), mfcc.std(axis=1), [crossings.mean(), crossings.std()]
    return np.concatenate(parts).astype(np.float32)


def load_mfcc_statistics(paths, cache_dir, workers=None):
    """Piczak's description of many clips, each computed once and kept by the content of its file.

    Parameters
    ----------
    paths, cache_dir, workers
        See :func:`load_features`.

    Returns
    -------
    x : np.ndarray of float32, shape (clips, 26)
        Rows of :func:`mfcc_statistics`.
    keys : list of str
        What identifies each clip's content.

    Raises
    ------
    audio.AudioError
        A file is missing, unreadable, silent or not finite.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = audio.save_audio(folder / "a.wav", np.sin(np.arange(16000) * 0.3), 16000)
    >>> load_mfcc_statistics([folder / "a.wav"], folder)[0].shape
    (1, 26)
    """
    rows, keys = load_kept(paths, cache_dir, workers, "mfcc-statistics", _mfcc_of)
    return np.stack(rows), keys


def _mfcc_of(path):
    y, rate = audio.load_audio(path)
    return mfcc_statistics(audio.check_audio(y, path), rate)


def transform_clips(clips, effect, out_dir, workers=None):
    """Shift the pitch or the speed of recordings: the augmentation that needs no generator.

    Parameters
    ----------
    clips : pandas.DataFrame
        Real recordings (table *clips*).
    effect : {"ps1", "ps2", "ts"}
        A key of :data:`TRANSFORMS`; one copy is made for each of its four values.
    out_dir : str or Path
        Gets the copies (16 kHz WAV). Those that are there already are kept.
    workers : int, optional
        Threads; by default one a CPU core.

    Returns
    -------
    pandas.DataFrame
        Table *generated* with the column `made_from`: the recording's `clip_id`. An arm uses a copy
        only where its recording is among the real training clips, so that no test clip comes back in
        disguise. Give it to :func:`esc.run_arms` as ``{"ps1": table}`` and ask for ``"both@ps1:4"``.

    Raises
    ------
    ValueError
        Unknown effect.
    audio.AudioError
        A clip that cannot be read.

    Notes
    -----
    Values: Salamon and Bello (2017), as in the paper; phase vocoder of librosa.

    Examples
    --------
    >>> transform_clips(pd.DataFrame(), "echo", "runs/try")
    Traceback (most recent call last):
    ValueError: unknown effect 'echo'; choose one of ps1, ps2, ts
    """
    if effect not in TRANSFORMS:
        raise ValueError(f"unknown effect {effect!r}; choose one of {', '.join(TRANSFORMS)}")
    jobs = [(clip, value) for clip in clips.to_dict("records") for value in TRANSFORMS[effect][1]]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        rows = list(pool.map(lambda job: _transformed(*job, effect, Path(out_dir)), jobs))
    return pd.DataFrame(rows)


def _transformed(clip, value, effect, out_dir):
    import librosa

    content = hashlib.sha256(Path(clip["path"]).read_bytes()).hexdigest()[:12]
    path = out_dir / f"{clip['clip_id']}-{effect}{value:+g}-{content}.wav"
    if not path.is_file():
        y, rate = audio.load_audio(clip["path"], sample_rate=SAMPLE_RATE)
        if TRANSFORMS[effect][0] == "pitch_shift":
            y = librosa.effects.pitch_shift(y, sr=rate, n_steps=value)
        else:
            y = librosa.effects.time_stretch(y, rate=value)
        audio.save_audio(path, y / max(1.0, float(np.abs(y).max())), rate)
    return {
        "clip_id": path.stem,
        "label": clip["label"],
        "prompt_family": "",
        "backend": effect,
        "checkpoint": "librosa",
        "path": str(path),
        "made_from": str(clip["clip_id"]),
    }
