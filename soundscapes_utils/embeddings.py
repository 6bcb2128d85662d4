"""Embeddings of clips behind one protocol, cached by the content of what they embed.

Every clip becomes one row: the network (or statistic) sees it as mono at its own rate, resampled by
soxr's "HQ" recipe, and what it returns for windows is averaged over the clip.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from . import audio

SILENT_PEAK = 1e-4  # −80 dB of full scale: no network hears anything there

EMBEDDINGS = pd.DataFrame(
    [
        {
            "name": "logmel-stats",
            "dim": 64,
            "sample_rate": 16_000,
            "window_s": 1.0,
            "needs": "nothing",
            "pooling": "statistics over the whole clip",
            "licence": "MIT",
            "source": "this project; bands of AudioLDM's log-mel",
        },
        {
            "name": "mini-clap",
            "dim": 128,
            "sample_rate": 16_000,
            "window_s": 1.0,
            "needs": "a checkpoint (the embedded one by default)",
            "pooling": "mean and maximum inside the network",
            "licence": "that of the checkpoint; MIT for the embedded one",
            "source": "audio tower of the checkpoint's CLAP",
        },
        {
            "name": "yamnet",
            "dim": 1024,
            "sample_rate": 16_000,
            "window_s": 0.975,
            "needs": "yamnet.tflite (4 MB)",
            "pooling": "mean over patches of 0.96 s, every 0.48 s",
            "licence": "Apache-2.0",
            "source": "github.com/tensorflow/models, research/audioset/yamnet",
        },
    ]
)
"""What can be asked of `get_embedding`: one row an embedding (rates in Hz, windows in seconds)."""


class SilenceWarning(UserWarning):
    """Clips without sound were embedded: some networks rate silence well, so look at the score."""


@dataclass(frozen=True)
class Embedding:
    """One way to turn clips into rows; made by `get_embedding`.

    Attributes
    ----------
    name : str
        As in `EMBEDDINGS`.
    sample_rate : int
        Hz; what `network` wants. Other rates are resampled.
    dim : int
        Width of a row.
    window_s : float
        Seconds; shorter clips are repeated until they are as long.
    version : str
        Changes whenever the same sound could give another row; part of the cache's key.
    network : callable
        Maps mono float32 [samples] at `sample_rate` to float32 [dim].

    Examples
    --------
    >>> tone = np.sin(np.arange(16_000) * 0.1).astype(np.float32)
    >>> get_embedding("logmel-stats").embed([tone]).shape
    (1, 64)
    """

    name: str
    sample_rate: int
    dim: int
    window_s: float
    version: str
    network: Callable

    def embed(self, clips, sample_rate=None, cache_dir=None, silence="warn"):
        """Embed clips, one row each.

        Parameters
        ----------
        clips : sequence of path or np.ndarray [samples]
            Sound files, or mono signals (±1 is full scale).
        sample_rate : int, optional
            Of the signals among `clips`, Hz; the embedding's own by default.
        cache_dir : path, optional
            Folder for rows already computed, keyed by the clip's content, the embedding and its
            version: a file that changed is noticed, one that moved is not embedded again.
        silence : {"warn", "allow"}
            Whether clips that peak below −80 dB of full scale raise a `SilenceWarning`.

        Returns
        -------
        np.ndarray, float32 [clips, dim]

        Raises
        ------
        audio.AudioError
            A clip that cannot be read or embedded, by name; no row is ever left out silently.
        ValueError
            Another word for `silence`.
        """
        if silence not in ("warn", "allow"):
            raise ValueError(f"silence must be 'warn' or 'allow', got {silence!r}")
        rows, silent = np.empty((len(clips), self.dim), np.float32), []
        for i, clip in enumerate(clips):
            rows[i], peak = self._row(clip, _name(clip, i), sample_rate, cache_dir)
            if peak < SILENT_PEAK:
                silent.append(_name(clip, i))
        if silent and silence == "warn":
            message = f"{len(silent)} of {len(clips)} clips are silent: {', '.join(silent[:5])}"
            warnings.warn(SilenceWarning(message), stacklevel=2)
        return rows

    def _row(self, clip, name, sample_rate, cache_dir):
        cached = cache_dir and self._cache_path(clip, name, sample_rate, cache_dir)
        if cached and cached.is_file() and cached.stat().st_size == _row_bytes(self.dim):
            stored = np.load(cached)
            return stored[:-1], stored[-1]
        y = self._signal(clip, name, sample_rate)
        row = np.asarray(self.network(y), dtype=np.float32)
        if row.shape != (self.dim,) or not np.isfinite(row).all():
            raise audio.AudioError(
                f"{name}: {self.name} gave no finite row of {self.dim} numbers (shape {row.shape}); "
                "check the clip, and the file that the embedding was loaded from"
            )
        peak = np.float32(np.abs(y).max())
        if cached:
            _store(cached, np.append(row, peak))
        return row, peak

    def _signal(self, clip, name, sample_rate):
        if isinstance(clip, (str, os.PathLike)):
            y, _ = audio.load_audio(clip, self.sample_rate)
        else:
            y = audio.check_audio(clip, name, silent_ok=True)
            y = audio.resample(y, sample_rate or self.sample_rate, self.sample_rate)
        least = int(np.ceil(self.window_s * self.sample_rate))
        return y if len(y) >= least else audio.fit_length(y, least)

    def _cache_path(self, clip, name, sample_rate, cache_dir):
        digest = hashlib.sha256(f"{self.name} {self.version} ".encode())
        if isinstance(clip, (str, os.PathLike)):
            digest.update(_file_bytes(clip))
        else:
            y = audio.check_audio(clip, name, silent_ok=True)
            digest.update(f"{sample_rate or self.sample_rate} ".encode() + y.tobytes())
        key = digest.hexdigest()
        return Path(cache_dir) / self.name / key[:2] / f"{key}.npy"


def _name(clip, index):
    return str(clip) if isinstance(clip, (str, os.PathLike)) else f"clip {index}"


def _file_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise audio.AudioError(f"{path}: cannot be read ({error}); check the path") from error


def _row_bytes(dim):
    # numpy pads the header of a small array to 128 bytes; any other size is a file cut short
    return 128 + 4 * (dim + 1)


def _store(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    try:
        np.save(part, row.astype(np.float32))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def get_embedding(name, path=""):
    """Make an embedding ready for use.

    Parameters
    ----------
    name : str
        A row of `EMBEDDINGS`: ``"logmel-stats"``, ``"mini-clap"`` or ``"yamnet"``.
    path : str or Path, default ""
        For yamnet the TFLite file; for mini-clap a checkpoint as `ldm.load_pipeline` takes it
        (the embedded one by default).

    Returns
    -------
    Embedding

    Raises
    ------
    ValueError
        Unknown name.
    FileNotFoundError
        The embedding's file is not there; the message says where to get it.

    Examples
    --------
    >>> get_embedding("logmel-stats").dim
    64
    """
    if name not in _MAKERS:
        raise ValueError(f"unknown embedding {name!r}; known: {', '.join(_MAKERS)}")
    dim, version, network = _MAKERS[name](path)
    card = EMBEDDINGS.set_index("name").loc[name]
    return Embedding(name, int(card.sample_rate), dim, float(card.window_s), version, network)


def excerpts(files, seconds, sample_rate=16_000):
    """Cut the same from every file, so that a score compares sounds and not file formats.

    Recordings, mixes and generated clips differ in length and level by how they were made. Each
    is reduced to its loudest stretch of `seconds` (a shorter file is repeated), its mean removed
    and its peak set to −1 dB of full scale; silence stays silence.

    Parameters
    ----------
    files : sequence of path
        Sound files.
    seconds : float
        Length of every excerpt.
    sample_rate : int, default 16000
        Hz; other rates are resampled.

    Returns
    -------
    list of np.ndarray, float32 [round(seconds * sample_rate)]

    Raises
    ------
    audio.AudioError
        A file that cannot be read.
    ValueError
        `seconds` is not positive.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "late.wav"
    >>> _ = audio.save_audio(file, np.r_[np.zeros(16_000), np.full(8_000, 0.5), -0.5], 16_000)
    >>> excerpts([file], 0.5)[0].shape
    (8000,)
    """
    n = round(seconds * sample_rate)
    if n < 1:
        raise ValueError(f"seconds must be positive, got {seconds}")
    return [_excerpt(audio.load_audio(file, sample_rate)[0], n) for file in files]


def _excerpt(y, n):
    y = audio.fit_length(y, max(n, len(y)))
    y = y - y.mean()
    energy = np.cumsum(np.append(0.0, np.square(y, dtype=np.float64)))
    start = int(np.argmax(energy[n:] - energy[:-n]))
    y = y[start : start + n]
    peak = np.abs(y).max()
    return y * np.float32(10 ** (-1 / 20) / peak) if peak >= SILENT_PEAK else y


# --- logmel-stats ----------------------------------------------------------------------------------


def logmel_statistics(y):
    """Describe a clip by statistics of its log-mel spectrogram: no training, no download.

    Parameters
    ----------
    y : np.ndarray, float32 [samples]
        Mono at 16 kHz, at least 1 s.

    Returns
    -------
    np.ndarray, float32 [64]
        All in nats. 16 bands (four mel bands each, low to high): their mean over time (0–15), their
        standard deviation (16–31), and that of their change from frame to frame, 10 ms (32–47).
        Then, for each quarter of the mel bands, the RMS modulation at 1–2, 2–4, 4–8 and 8–16 Hz
        (48–63; the analysis window of 64 ms weakens the last octave). The first 16 follow the
        level: a gain of 6 dB adds 0.69.

    Notes
    -----
    A short form of McDermott and Simoncelli's texture statistics (Neuron 71, 2011) on the log-mel
    that AudioLDM is trained on.

    Examples
    --------
    >>> hiss = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    >>> bool(logmel_statistics(hiss)[15] > logmel_statistics(hiss / 2)[15])
    True
    """
    mel = audio.log_mel(y).astype(np.float64)
    bands = mel.reshape(len(mel), 16, 4).mean(axis=2)
    modulation = _modulation(bands.reshape(len(bands), 4, 4).mean(axis=2))
    parts = bands.mean(axis=0), bands.std(axis=0), np.diff(bands, axis=0).std(axis=0), modulation
    return np.concatenate(parts).astype(np.float32)


def _modulation(contours):
    """RMS of each contour in octaves of modulation rate, 1 to 16 Hz."""
    n = len(contours)
    window = np.hanning(n + 1)[:n, None]
    spectrum = np.fft.rfft((contours - contours.mean(axis=0)) * window, axis=0)
    power = 2.0 * np.abs(spectrum) ** 2 / (n * (window**2).sum())
    rates = np.fft.rfftfreq(n, audio.LOG_MEL_HOP / audio.LOG_MEL_RATE)
    octaves = [(rates >= low) & (rates < 2 * low) for low in (1, 2, 4, 8)]
    return np.concatenate([np.sqrt(power[octave].sum(axis=0)) for octave in octaves])


def _make_logmel(path):
    if path:
        raise ValueError("logmel-stats takes no file; leave path empty")
    return 64, "1", logmel_statistics


# --- mini-clap -------------------------------------------------------------------------------------


def _make_clap(path):
    from . import ldm

    checkpoint = str(path or "embedded")
    model, rate = ldm.load_audio_tower(checkpoint)
    digest = hashlib.sha256()
    for key, weights in sorted(model.state_dict().items()):
        digest.update(key.encode() + weights.cpu().contiguous().numpy().tobytes())

    def network(y):
        return ldm.embed_audio([y], audio.LOG_MEL_RATE, checkpoint)[0]

    dim = len(network(np.zeros(audio.LOG_MEL_RATE, np.float32)))
    return dim, f"{rate} {digest.hexdigest()[:16]}", network


# --- yamnet ----------------------------------------------------------------------------------------

_PATCH = 15_600
_HOP = 7_680
_POOLED = "global_average_pooling2d/Mean"
_YAMNET_HELP = (
    "YAMNet's TFLite file (4 MB, Apache-2.0) is on kaggle.com/models/google/yamnet (variation "
    "'classification-tflite'); give its place as yamnet_path"
)


def _make_yamnet(path):
    run = _open_yamnet(str(path))
    version = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return 1024, version, partial(_mean_over_patches, run, 0)


@lru_cache(maxsize=2)
def _open_yamnet(path):
    """Return a function from one patch [15600] to (embedding [1024], scores [521])."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no YAMNet file at {path!r}: {_YAMNET_HELP}")
    from ai_edge_litert.interpreter import Interpreter

    try:
        with _quiet():
            net = Interpreter(path, num_threads=1, experimental_preserve_all_tensors=True)
            net.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be opened as a TFLite model: {_YAMNET_HELP}") from error
    entry = net.get_input_details()[0]["index"]
    pooled = [t["index"] for t in net.get_tensor_details() if t["name"].endswith(_POOLED)]
    outputs = [o["index"] for o in net.get_output_details() if o["shape"][-1] == 521]
    if len(pooled) != 1 or len(outputs) != 1:
        raise ValueError(f"{path} is a TFLite model, but not YAMNet's: {_YAMNET_HELP}")

    def run(patch):
        net.set_tensor(entry, patch.reshape(net.get_input_details()[0]["shape"]))
        net.invoke()
        return net.get_tensor(pooled[0])[0].copy(), net.get_tensor(outputs[0])[0].copy()

    return run


@contextlib.contextmanager
def _quiet():
    # the runtime greets on the process's own stderr, which ends up in notebooks
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as void, warnings.catch_warnings():
            os.dup2(void.fileno(), 2)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _mean_over_patches(run, output, y):
    starts = range(0, len(y) - _PATCH + 1, _HOP)
    return np.mean([run(y[s : s + _PATCH])[output] for s in starts], axis=0)


def yamnet_tags(clips, path, top=5, sample_rate=None):
    """Ask the YAMNet tagger what it hears.

    Parameters
    ----------
    clips : sequence of path or np.ndarray [samples]
        Sound files, or mono signals.
    path : str or Path
        YAMNet's TFLite file; ``yamnet_class_map.csv`` lies beside it.
    top : int, default 5
        Tags for each clip.
    sample_rate : int, optional
        Of the signals among `clips`, Hz; 16,000 by default.

    Returns
    -------
    pandas.DataFrame
        ``clip`` (place in `clips`), ``rank`` (from 1), ``tag`` (AudioSet name), ``score`` (0 to 1,
        mean over patches), best first.

    Raises
    ------
    FileNotFoundError
        The model or its class map is not there.
    audio.AudioError
        A clip that cannot be read.
    """
    run = _open_yamnet(str(path))
    class_map = Path(path).with_name("yamnet_class_map.csv")
    if not class_map.is_file():
        raise FileNotFoundError(f"no {class_map.name} beside {path}: {_YAMNET_HELP}")
    names = pd.read_csv(class_map)["display_name"].to_numpy()
    tagger = Embedding("yamnet", 16_000, len(names), 0.975, "", partial(_mean_over_patches, run, 1))
    rows = []
    for clip, scores in enumerate(tagger.embed(clips, sample_rate, silence="allow")):
        best = np.argsort(-scores, kind="stable")[:top]
        rows += [(clip, rank, names[i], float(scores[i])) for rank, i in enumerate(best, 1)]
    return pd.DataFrame(rows, columns=["clip", "rank", "tag", "score"])


_MAKERS = {"logmel-stats": _make_logmel, "mini-clap": _make_clap, "yamnet": _make_yamnet}
