"""Embeddings of clips behind one protocol, cached by the content of what they embed.

Every clip becomes one row: the network (or statistic) sees it as mono at its own rate (the mean of
the channels, resampled by soxr's "HQ" recipe), cut into windows from a fixed start, so that the same
clip always gives the same row; what it returns for the windows is averaged over the clip.
"""

import contextlib
import hashlib
import importlib.util
import io
import math
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd

from . import audio, store

SILENT_PEAK = 1e-4  # −80 dB of full scale: no network hears anything there
RESAMPLER = "soxr HQ"  # of every clip that is not at the network's rate; part of the cache's key
SOUND_FILES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")

_WHOLE = math.nan
_PANNS_LICENCE = "MIT (code), CC BY 4.0 (weights)"
_PANNS_POOLING = "mean + maximum over time inside the network"
_PANNS_SOURCE = "Kong et al. 2020, github.com/qiuqiangkong/audioset_tagging_cnn"
_MSCLAP_LICENCE = "MIT (code), MS-PL (weights)"
_MSCLAP_SOURCE = "Elizalde et al. 2023, github.com/microsoft/CLAP through the package msclap"

EMBEDDINGS = pd.DataFrame(
    [
        (
            "logmel-stats", 64, 16_000, 1.0, _WHOLE, "repeat", "nothing",
            "statistics over the whole clip", "MIT", "this project; bands of AudioLDM's log-mel",
        ),
        (
            "mini-clap", 128, 16_000, 1.0, _WHOLE, "repeat",
            "a checkpoint (the built-in one by default)", "mean and maximum inside the network",
            "that of the checkpoint; MIT for the built-in one",
            "audio tower of the checkpoint's CLAP",
        ),
        (
            "yamnet", 1024, 16_000, 0.975, 0.48, "repeat", "yamnet.tflite (4 MB)",
            "mean over patches of 0.96 s, every 0.48 s", "Apache-2.0",
            "github.com/tensorflow/models, research/audioset/yamnet",
        ),
        (
            "vggish", 128, 16_000, 0.975, 0.96, "repeat", "vggish-10086976.pth (0.29 GB)",
            "mean over patches of 0.96 s; values before the last ReLU, no PCA", "Apache-2.0",
            "Hershey et al. 2017, github.com/harritaylor/torchvggish",
        ),
        (
            "panns-cnn14", 2048, 32_000, 1.0, _WHOLE, "repeat", "Cnn14_mAP=0.431.pth (0.33 GB)",
            _PANNS_POOLING, _PANNS_LICENCE, _PANNS_SOURCE,
        ),
        (
            "panns-cnn14-16k", 2048, 16_000, 1.0, _WHOLE, "repeat",
            "Cnn14_16k_mAP=0.438.pth (0.33 GB)", _PANNS_POOLING, _PANNS_LICENCE, _PANNS_SOURCE,
        ),
        (
            "panns-wavegram", 2048, 32_000, 1.0, _WHOLE, "repeat",
            "Wavegram_Logmel_Cnn14_mAP=0.439.pth (0.33 GB)", _PANNS_POOLING, _PANNS_LICENCE,
            _PANNS_SOURCE,
        ),
        (
            "ms-clap", 1024, 44_100, 7.0, 1.0, "repeat", "CLAP_weights_2023.pth (0.69 GB)",
            "mean over windows of 7 s, every 1 s", _MSCLAP_LICENCE, _MSCLAP_SOURCE,
        ),
        (
            "ms-clap-dcase", 1024, 44_100, 7.0, 1.0, "pad", "CLAP_weights_2023.pth (0.69 GB)",
            "as DCASE 2024 Task 7: a window of 7 s starts every second, zeros after the end",
            _MSCLAP_LICENCE, _MSCLAP_SOURCE,
        ),
        (
            "laion-clap", 512, 48_000, 10.0, 1.0, "repeat-pad",
            "laion/clap-htsat-unfused from the hub (0.6 GB), or a .pt of laion-clap",
            "mean over windows of 10 s, every 1 s", "Apache-2.0 (hub), CC0 (.pt)",
            "Wu et al. 2023, github.com/LAION-AI/CLAP",
        ),
    ],
    columns=[
        "name", "dim", "sample_rate", "window_s", "hop_s", "short", "needs", "pooling", "licence",
        "source",
    ],
)  # fmt: skip
"""What can be asked of `get_embedding`: one row an embedding (rates in Hz, windows in seconds).

``hop_s`` is not a number where the network sees the whole clip at once; ``short`` says what happens
to a clip shorter than the window (see `Embedding`).
"""


CHALLENGE = {
    "panns-wavegram-logmel": "panns-wavegram",
    "vggish": "vggish",
    "clap-2023": "ms-clap-dcase",
}
"""The networks of DCASE 2024 Task 7: their names there, and here."""


class _Weights(NamedTuple):
    file: str
    url: str
    checksum: str  # of the published file; the beginning of it where no more was published
    size: str


_ZENODO = "https://zenodo.org/records/3987831/files/"
_WEIGHTS = {
    "vggish": _Weights(
        "vggish-10086976.pth",
        "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
        "sha256:10086976",
        "0.29 GB",
    ),
    "panns-cnn14": _Weights(
        "Cnn14_mAP=0.431.pth",
        f"{_ZENODO}Cnn14_mAP%3D0.431.pth",
        "md5:541141fa2ee191a88f24a3219fff024e",
        "0.33 GB",
    ),
    "panns-cnn14-16k": _Weights(
        "Cnn14_16k_mAP=0.438.pth",
        f"{_ZENODO}Cnn14_16k_mAP%3D0.438.pth",
        "md5:362fc5ff18f1d6ad2f6d464b45893f2c",
        "0.33 GB",
    ),
    "panns-wavegram": _Weights(
        "Wavegram_Logmel_Cnn14_mAP=0.439.pth",
        f"{_ZENODO}Wavegram_Logmel_Cnn14_mAP%3D0.439.pth",
        "md5:17fa9ab65af3c0eb5ffbc5f65552c4e1",
        "0.33 GB",
    ),
    "ms-clap": _Weights(
        "CLAP_weights_2023.pth",
        "https://zenodo.org/records/8378278/files/CLAP_weights_2023.pth",
        "sha256:2cef4016d47d00eb28d153d522f397222057f95000e9bad6b9583c631284a1e6",
        "0.69 GB",
    ),
}
_WEIGHTS["ms-clap-dcase"] = _WEIGHTS["ms-clap"]


class SilenceWarning(UserWarning):
    """Clips without sound were embedded: some networks rate silence well, so look at the score."""


class LeftOutWarning(UserWarning):
    """Files could not be embedded and have no row: a score would speak of the others alone."""


class EmbeddingError(audio.AudioError):
    """Files of a set could not be embedded; what was made is kept.

    Attributes
    ----------
    rows : np.ndarray, float32 [files without an error, dim]
        As `embed_files` would have returned.
    report : pandas.DataFrame
        One row a file, as `embed_files` returns it.
    """

    def __init__(self, message, rows, report):
        super().__init__(message)
        self.rows, self.report = rows, report


@dataclass
class _Clip:
    """One clip on its way to its rows."""

    place: int
    name: str
    cache: Path | None = None
    signal: np.ndarray | None = None
    starts: range = range(0)
    length: int = 0
    rows: np.ndarray | None = None
    peak: float = math.nan
    cached: bool = False
    error: str = ""


@dataclass(frozen=True)
class Embedding:
    """One way to turn clips into rows; made by `get_embedding`.

    Attributes
    ----------
    name : str
        As in `EMBEDDINGS`.
    sample_rate : int
        Hz; what `network` wants. Other rates are resampled (soxr "HQ").
    dim : int
        Width of a row.
    window_s : float
        Seconds that the network sees at once; at least these, if `hop_s` is not a number.
    version : str
        Changes whenever the same sound could give another row; part of the cache's key.
    network : callable
        Maps mono float32 [samples] at `sample_rate` to float32 [dim]; where `batched`, maps
        [windows, samples] to [windows, dim].
    hop_s : float
        Seconds from one window to the next, the first at the start of the clip; what is left after
        the last whole window is not seen. Not a number: the network sees the whole clip.
    short : {"repeat", "repeat-pad", "pad"}
        What fills a clip shorter than the window: itself again, the last repetition cut; itself
        again as often as it fits, then zeros; or zeros. With "pad" a window starts every `hop_s` to
        the end of any clip, so that nothing of it goes unseen.
    batched : bool
        Whether `network` takes many windows at once.
    pooling, licence, source : str
        As in `EMBEDDINGS`.
    path : str
        The file, folder or hub name that it was loaded from; "" where it needs none.

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
    hop_s: float = _WHOLE
    short: str = "repeat"
    batched: bool = False
    pooling: str = ""
    licence: str = ""
    source: str = ""
    path: str = ""

    def embed(self, clips, sample_rate=None, cache_dir=None, silence="warn", batch_size=16):
        """Embed clips, one row each: the mean over the clip's windows.

        Parameters
        ----------
        clips : sequence of path or np.ndarray [samples]
            Sound files (the mean of their channels is embedded), or mono signals (±1 is full scale).
        sample_rate : int, optional
            Of the signals among `clips`, Hz; the embedding's own by default.
        cache_dir : path, optional
            Folder for rows already computed, keyed by the clip's content, the embedding and its
            version: a file that changed is noticed, one that moved is not embedded again.
        silence : {"warn", "allow"}
            Whether clips that peak below −80 dB of full scale raise a `SilenceWarning`.
        batch_size : int, default 16
            Windows that the network sees at once, where it can see many. Rows may differ in their
            last digits from one size to another.

        Returns
        -------
        np.ndarray, float32 [clips, dim]

        Raises
        ------
        audio.AudioError
            A clip that cannot be read or embedded, by name; no row is ever left out silently.
        ValueError
            Another word for `silence`.

        See Also
        --------
        embed_files : Many files: parallel reading, processes, a report of what failed.
        """
        _check_silence(silence)
        clips, silent = list(clips), {}
        rows = np.empty((len(clips), self.dim), np.float32)
        for clip in self._each(clips, sample_rate, cache_dir, batch_size):
            if clip.error:
                raise audio.AudioError(clip.error)
            rows[clip.place] = clip.rows.mean(axis=0)
            if clip.peak < SILENT_PEAK:
                silent[clip.place] = clip.name
        if silent and silence == "warn":
            _warn_of_silence([silent[place] for place in sorted(silent)], len(clips))
        return rows

    def embed_windows(self, clips, sample_rate=None, cache_dir=None, batch_size=16):
        """Embed clips, one row a window: the form in which some challenges publish embeddings.

        Parameters
        ----------
        clips, sample_rate, cache_dir, batch_size
            As for `embed`, with which it shares the cache.

        Returns
        -------
        list of np.ndarray, float32 [windows, dim]
            One array a clip; ``np.concatenate`` makes the set of points of it.

        Raises
        ------
        audio.AudioError
            A clip that cannot be read or embedded, by name.

        Examples
        --------
        >>> get_embedding("logmel-stats").embed_windows([np.full(64_000, 0.1)])[0].shape
        (1, 64)
        """
        clips = list(clips)
        rows = [None] * len(clips)
        for clip in self._each(clips, sample_rate, cache_dir, batch_size):
            if clip.error:
                raise audio.AudioError(clip.error)
            rows[clip.place] = clip.rows
        return rows

    def __reduce__(self):
        # a loaded network does not travel to another process: it is loaded again there, once
        if self.network is not None and self.name in _MAKERS:
            framing = self.window_s, self.hop_s, self.short
            return _reopened, (self.name, self.path, self.version, framing)
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def _each(self, clips, sample_rate, cache_dir, batch_size, workers=0):
        """Yield every clip with its rows or its error, the cached ones ahead of the others."""
        waiting, held = [], 0
        for clip in self._prepared(clips, sample_rate, cache_dir, workers):
            if clip.signal is None:
                yield clip
                continue
            full = held >= batch_size or not self.batched
            # a batch is one block of memory: only windows of one length share it
            if waiting and (full or clip.length != waiting[0].length):
                yield from self._finished(waiting, batch_size)
                waiting, held = [], 0
            waiting.append(clip)
            held += len(clip.starts)
        if waiting:
            yield from self._finished(waiting, batch_size)

    def _prepared(self, clips, sample_rate, cache_dir, workers):
        if not workers:
            yield from (self._prepare(c, i, sample_rate, cache_dir) for i, c in enumerate(clips))
            return
        from torch.utils.data import DataLoader

        reader = _Reader(replace(self, network=None), clips, sample_rate, cache_dir)
        yield from DataLoader(reader, batch_size=None, num_workers=workers, collate_fn=_unchanged)

    def _prepare(self, clip, place, sample_rate, cache_dir):
        found = _Clip(place, _name(clip, place))
        try:
            if cache_dir:
                found.cache = self._cache_path(clip, found.name, sample_rate, cache_dir)
                stored = _stored(found.cache, self.dim)
                if stored is not None:
                    found.rows, found.peak = stored[:, :-1], float(stored[0, -1])
                    found.cached = True
                    return found
            y = self._signal(clip, found.name, sample_rate)
            found.peak = float(np.abs(y).max())
            found.signal, found.starts, found.length = self._framed(y)
        except audio.AudioError as error:
            found.error = str(error)
        return found

    def _signal(self, clip, name, sample_rate):
        if isinstance(clip, (str, os.PathLike)):
            return audio.load_audio(clip, self.sample_rate)[0]
        y = audio.check_audio(clip, name, silent_ok=True)
        return audio.resample(y, sample_rate or self.sample_rate, self.sample_rate)

    def _framed(self, y):
        """Return a signal with what fills it, where windows start in it, and how long they are."""
        n = round(self.window_s * self.sample_rate)
        if math.isnan(self.hop_s):
            y = self._filled(y, n)
            return y, range(1), len(y)
        hop = round(self.hop_s * self.sample_rate)
        if self.short == "pad":
            return np.pad(y, (0, n)), range(0, len(y), hop), n
        y = self._filled(y, n)
        return y, range(0, len(y) - n + 1, hop), n

    def _filled(self, y, n):
        if len(y) >= n:
            return y
        repeated = {"repeat": n, "repeat-pad": n // len(y) * len(y), "pad": len(y)}[self.short]
        return audio.fix_length(audio.fix_length(y, repeated), n, "pad")

    def _finished(self, clips, batch_size):
        try:
            rows = self._rows(clips, batch_size)
        except (RuntimeError, MemoryError) as error:
            # a clip that the memory cannot hold must not take its neighbours along
            yield from self._one_by_one(clips, batch_size, error)
            return
        for clip in clips:
            own, rows = rows[: len(clip.starts)], rows[len(clip.starts) :]
            clip.signal = None
            self._finish(clip, [np.asarray(row, dtype=np.float32) for row in own])
            yield clip

    def _one_by_one(self, clips, batch_size, error):
        if len(clips) > 1:
            for clip in clips:
                yield from self._finished([clip], batch_size)
            return
        (clip,) = clips
        seconds, clip.signal = len(clip.signal) / self.sample_rate, None
        clip.error = (
            f"{clip.name}: {self.name} failed on its {seconds:.1f} s ({_first_line(error)}); where "
            "that is memory, cut the clip or take a smaller batch_size"
        )
        yield clip

    def _rows(self, clips, batch_size):
        windows = [clip.signal[s : s + clip.length] for clip in clips for s in clip.starts]
        if not self.batched:
            return [self.network(window) for window in windows]
        blocks = range(0, len(windows), batch_size)
        return [r for b in blocks for r in self.network(np.stack(windows[b : b + batch_size]))]

    def _finish(self, clip, rows):
        wrong = [r for r in rows if r.shape != (self.dim,) or not np.isfinite(r).all()]
        if wrong:
            clip.error = (
                f"{clip.name}: {self.name} gave no finite row of {self.dim} numbers (shape "
                f"{wrong[0].shape}); check the clip, and the file that the embedding was loaded from"
            )
            return
        clip.rows = np.stack(rows)
        if clip.cache:
            _store(clip.cache, clip.rows, clip.peak)

    def _cache_path(self, clip, name, sample_rate, cache_dir):
        framing = f"{self.window_s} {self.hop_s} {self.short} {RESAMPLER}"
        digest = hashlib.sha256(f"{self.name} {self.version} {framing} ".encode())
        if isinstance(clip, (str, os.PathLike)):
            digest.update(_file_bytes(clip))
        else:
            y = audio.check_audio(clip, name, silent_ok=True)
            digest.update(f"{sample_rate or self.sample_rate} ".encode() + y.tobytes())
        key = digest.hexdigest()
        return Path(cache_dir) / self.name / key[:2] / f"{key}.npy"


class _Reader:
    """The clips as torch's DataLoader takes them: read, resampled and cut in its workers."""

    def __init__(self, embedding, clips, sample_rate, cache_dir):
        self._embedding, self._clips = embedding, clips
        self._options = sample_rate, cache_dir

    def __len__(self):
        return len(self._clips)

    def __getitem__(self, place):
        return self._embedding._prepare(self._clips[place], place, *self._options)


def _unchanged(clip):
    return clip


def _name(clip, index):
    return str(clip) if isinstance(clip, (str, os.PathLike)) else f"clip {index}"


def _file_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise audio.AudioError(f"{path}: cannot be read ({error}); check the path") from error


def _stored(path, dim):
    try:
        stored = np.load(path)
    except (OSError, ValueError, EOFError):
        # not there yet, or cut short: it is made (anew)
        return None
    return stored if stored.ndim == 2 and stored.shape[1] == dim + 1 else None


def _store(path, rows, peak):
    content = io.BytesIO()
    np.save(content, np.column_stack([rows, np.full(len(rows), peak, np.float32)]))
    store.write_atomic(path, content.getvalue())


def _check_silence(silence):
    if silence not in ("warn", "allow"):
        raise ValueError(f"silence must be 'warn' or 'allow', got {silence!r}")


def _warn_of_silence(names, n):
    message = f"{len(names)} of {n} clips are silent: {', '.join(names[:5])}"
    warnings.warn(SilenceWarning(message), stacklevel=3)


def get_embedding(name, path=""):
    """Make an embedding ready for use, on the GPU where there is one.

    Parameters
    ----------
    name : str
        A row of `EMBEDDINGS`.
    path : str or Path, default ""
        Its weights. For yamnet the TFLite file; for mini-clap a checkpoint as `ldm.load_pipeline`
        takes it (the built-in one by default); for laion-clap an un-fused checkpoint of transformers
        (a folder or a hub name; ``laion/clap-htsat-unfused`` by default) or of laion-clap (a .pt
        file). For the others the published file; by default where `fetch_weights` puts it.

    Returns
    -------
    Embedding

    Raises
    ------
    ValueError
        Unknown name, or a file that is not what it should be.
    FileNotFoundError
        The embedding's file is not there; the message says how large it is and where to get it.
    ImportError
        The package that defines the network is not installed (ms-clap).

    Examples
    --------
    >>> get_embedding("logmel-stats").dim
    64
    """
    if name not in _MAKERS:
        raise ValueError(f"unknown embedding {name!r}; known: {', '.join(_MAKERS)}")
    if path and Path(path).exists():
        # processes that load it again may be elsewhere
        path = Path(path).resolve()
    card = EMBEDDINGS.set_index("name").loc[name]
    declared = card[["window_s", "hop_s", "short", "pooling", "licence", "source"]].to_dict()
    made = _MAKERS[name](str(path))
    return Embedding(
        name=name, sample_rate=int(card.sample_rate), path=str(path), **declared, **made
    )


@lru_cache(maxsize=2)
def _opened(name, path):
    return get_embedding(name, path)


def _reopened(name, path, version, framing):
    window_s, hop_s, short = framing
    embedding = replace(_opened(name, path), window_s=window_s, hop_s=hop_s, short=short)
    if embedding.version != version:
        raise ValueError(f"{name}: its weights differ between processes; give all the same file")
    return embedding


# --- sets of files ---------------------------------------------------------------------------------


def embed_files(
    embedding,
    files,
    cache_dir=None,
    batch_size=16,
    workers=0,
    processes=1,
    executor=None,
    on_error="raise",
    silence="warn",
):
    """Embed a folder or a list of files, one row each, and report on every file.

    With `cache_dir` a run that was stopped goes on where it stopped. A progress bar shows on a
    terminal.

    Parameters
    ----------
    embedding : Embedding
        From `get_embedding`.
    files : path, or sequence of path
        A folder (every sound file below it, by name; hidden ones are left out), or the files.
    cache_dir : path, optional
        As for `Embedding.embed`. It must lie outside the folder: nothing is written among data.
    batch_size : int, default 16
        Windows that the network sees at once.
    workers : int, default 0
        Processes that read, resample and cut files while the network runs (torch's DataLoader).
    processes : int, default 1
        Processes that share the files, each with its own network and its share of the cores.
    executor : concurrent.futures.Executor or dask.distributed.Client, optional
        Shares the files out instead: an executor of processes, or a cluster whose nodes see the
        same paths.
    on_error : {"raise", "report"}
        Whether files that cannot be embedded are an error once all others are done, or are left out
        with a `LeftOutWarning`.
    silence : {"warn", "allow"}
        As for `Embedding.embed`.

    Returns
    -------
    rows : np.ndarray, float32 [files without an error, dim]
        In the order of the report.
    report : pandas.DataFrame
        One row a file: ``file``; ``windows`` (0 where it failed); ``peak`` (1 is full scale);
        ``silent``; ``cached`` (answered without the network); ``error`` ("" where it has a row).

    Raises
    ------
    EmbeddingError
        Files that cannot be embedded, by name, if `on_error` is "raise" or none is left.
    audio.AudioError
        The folder is not there or holds no sound files; `files` is empty.
    ValueError
        Unknown words for the options, or a cache inside the data folder.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("a.wav", "b.wav"):
    ...     _ = audio.save_audio(folder / name, np.full(16_000, 0.5), 16_000)
    >>> rows, report = embed_files(get_embedding("logmel-stats"), folder)
    >>> rows.shape, report["error"].tolist()
    ((2, 64), ['', ''])
    """
    _check_silence(silence)
    if on_error not in ("raise", "report"):
        raise ValueError(f"on_error must be 'raise' or 'report', got {on_error!r}")
    files = _sound_files(files, cache_dir)
    options = cache_dir, batch_size, workers
    with contextlib.ExitStack() as stack:
        if executor is None and processes > 1:
            executor = stack.enter_context(_process_pool(min(processes, len(files))))
        clips = _embedded(embedding, files, executor, options)
        rows, report = _collect(embedding, files, clips)
    failed = report[report["error"] != ""]
    if len(failed):
        _tell_left_out(failed, rows, report, on_error, cache_dir)
    if silence == "warn" and report["silent"].any():
        _warn_of_silence(report.loc[report["silent"], "file"].tolist(), len(report))
    return rows, report


def _sound_files(files, cache_dir):
    if not isinstance(files, (str, os.PathLike)):
        found = [Path(file) for file in files]
        if not found:
            raise audio.AudioError("no files to embed; check the table or folder they come from")
        return found
    folder = Path(files)
    if not folder.is_dir():
        raise audio.AudioError(f"{folder}: no such folder; give a folder, or a list of files")
    if cache_dir and Path(cache_dir).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"cache_dir {cache_dir} lies among the data in {folder}; choose another")
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SOUND_FILES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise audio.AudioError(f"{folder}: holds no sound files ({' '.join(SOUND_FILES)})")
    return found


def _process_pool(processes):
    cores = max(1, (os.cpu_count() or 1) // processes)
    # forking a process that holds threads or a GPU can hang
    context = get_context("spawn")
    return futures.ProcessPoolExecutor(processes, context, _limit_cores, (cores,))


def _limit_cores(cores):
    # read when torch is imported, which no new process has done yet
    os.environ["OMP_NUM_THREADS"] = str(cores)


def _embedded(embedding, files, executor, options):
    if executor is None:
        yield from _embed_shard(embedding, files, 0, *options)
        return
    if hasattr(executor, "get_executor"):
        executor = executor.get_executor()
    size = 4 * options[1]
    jobs = [
        executor.submit(_listed_shard, embedding, files[start : start + size], start, *options)
        for start in range(0, len(files), size)
    ]
    try:
        for job in futures.as_completed(jobs):
            yield from job.result()
    finally:
        for job in jobs:
            job.cancel()


def _embed_shard(embedding, files, start, cache_dir, batch_size, workers):
    """Yield for each file: place, mean row or None, windows, peak, cached, error."""
    for clip in embedding._each(files, None, cache_dir, batch_size, workers):
        row = None if clip.error else clip.rows.mean(axis=0)
        windows = 0 if clip.error else len(clip.rows)
        yield start + clip.place, row, windows, clip.peak, clip.cached, clip.error


def _listed_shard(*shard):
    return list(_embed_shard(*shard))


def _collect(embedding, files, clips):
    from tqdm import tqdm

    found = [None] * len(files)
    # disable=None: no bar where nobody watches a terminal
    for place, *clip in tqdm(clips, embedding.name, len(files), disable=None, unit="file"):
        found[place] = clip
    report = pd.DataFrame(
        [(str(file), *clip[1:]) for file, clip in zip(files, found, strict=True)],
        columns=["file", "windows", "peak", "cached", "error"],
    )
    report.insert(3, "silent", report["peak"] < SILENT_PEAK)
    rows = [clip[0] for clip in found if clip[0] is not None]
    return np.array(rows, dtype=np.float32).reshape(-1, embedding.dim), report


def _tell_left_out(failed, rows, report, on_error, cache_dir):
    named = "; ".join(failed["error"].head(5))
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    message = f"{len(failed)} of {len(report)} files cannot be embedded: {named}{more}"
    if on_error == "raise" or not len(rows):
        kept = f"in {cache_dir}" if cache_dir else "in this error's rows"
        raise EmbeddingError(
            f"{message}. The rows of the others are {kept}; on_error='report' leaves these out",
            rows,
            report,
        )
    warnings.warn(LeftOutWarning(message), stacklevel=3)


# --- changes whose effect a distance should show --------------------------------------------------


def _noisy(y, rng, snr_db):
    noise = rng.standard_normal(len(y)).astype(np.float32)
    return y + noise * np.sqrt(np.mean(np.square(y)) * np.float32(10 ** (-snr_db / 10)))


def _low_passed(y, rng, share):
    from scipy.signal import butter, sosfiltfilt

    # forwards and backwards: no delay
    return sosfiltfilt(butter(8, share, output="sos"), y)


def _amplified(y, rng, gain_db):
    return y * np.float32(10 ** (gain_db / 20))


def _cut_short(y, rng, share):
    kept = y.copy()
    kept[round(share * len(y)) :] = 0.0
    return kept


CHANGES = {
    "noise, SNR 20 dB": partial(_noisy, snr_db=20.0),
    "noise, SNR 0 dB": partial(_noisy, snr_db=0.0),
    "low-pass at 1/2 of the band": partial(_low_passed, share=0.5),
    "low-pass at 1/8 of the band": partial(_low_passed, share=0.125),
    "gain of -12 dB": partial(_amplified, gain_db=-12.0),
    "silent after 1/2": partial(_cut_short, share=0.5),
}
"""Changes that `changed` knows: white noise at a ratio to the clip's power, a low-pass (Butterworth,
order 16, zero phase) at a part of the band, a gain, and silence after a part of the clip."""


def changed(clips, change, seed=0):
    """Change every clip in a known way, to see whether an embedding notices.

    Parameters
    ----------
    clips : sequence of np.ndarray, float32 [samples]
        Mono signals.
    change : str
        A key of `CHANGES`.
    seed : int, default 0
        Of the noise; clip i has the same noise in every call.

    Returns
    -------
    list of np.ndarray, float32 [samples]
        Of the same lengths; they may exceed full scale, which no embedding minds.

    Raises
    ------
    ValueError
        Another word for `change`.
    audio.AudioError
        A signal that is empty or not finite.

    Examples
    --------
    >>> (quiet,) = changed([np.ones(4, np.float32)], "gain of -12 dB")
    >>> round(float(quiet[0]), 3)
    0.251
    """
    if change not in CHANGES:
        raise ValueError(f"unknown change {change!r}; known: {'; '.join(CHANGES)}")
    made = []
    for i, y in enumerate(clips):
        y = audio.check_audio(y, _name(y, i), silent_ok=True)
        made.append(CHANGES[change](y, np.random.default_rng([seed, i])).astype(np.float32))
    return made


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
    return {"dim": 64, "version": "1", "network": logmel_statistics}


# --- mini-clap -------------------------------------------------------------------------------------


def _make_clap(path):
    from . import ldm

    checkpoint = path or "builtin"
    model, rate = ldm.load_audio_tower(checkpoint)

    def network(y):
        return ldm.embed_audio([y], audio.LOG_MEL_RATE, checkpoint)[0]

    dim = len(network(np.zeros(audio.LOG_MEL_RATE, np.float32)))
    return {"dim": dim, "version": f"{rate} {_digest(model)}", "network": network}


def _digest(model):
    digest = hashlib.sha256()
    for key, weights in sorted(model.state_dict().items()):
        digest.update(key.encode() + weights.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- yamnet ----------------------------------------------------------------------------------------

_POOLED = "global_average_pooling2d/Mean"
_YAMNET_HELP = (
    "YAMNet's TFLite file (4 MB, Apache-2.0) is on kaggle.com/models/google/yamnet (variation "
    "'classification-tflite'); give its place as yamnet_path"
)


def _make_yamnet(path):
    run = _open_yamnet(path)
    version = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return {"dim": 1024, "version": version, "network": partial(_heard, run, 0)}


def _heard(run, output, patch):
    return run(patch)[output]


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
    scores_of = partial(_heard, run, 1)
    tagger = Embedding("yamnet", 16_000, len(names), 0.975, "", scores_of, hop_s=0.48)
    rows = []
    for clip, scores in enumerate(tagger.embed(clips, sample_rate, silence="allow")):
        best = np.argsort(-scores, kind="stable")[:top]
        rows += [(clip, rank, names[i], float(scores[i])) for rank, i in enumerate(best, 1)]
    return pd.DataFrame(rows, columns=["clip", "rank", "tag", "score"])


# --- weights of the networks in torch --------------------------------------------------------------


def fetch_weights(name, folder=None):
    """Download the published weights of an embedding and check them.

    Parameters
    ----------
    name : str
        ``"vggish"``, ``"panns-cnn14"``, ``"panns-cnn14-16k"``, ``"panns-wavegram"`` or ``"ms-clap"``
        (laion-clap comes from the hub by itself, YAMNet's file wants an account).
    folder : path, optional
        Where to put the file; by default the user's cache, where `get_embedding` looks.

    Returns
    -------
    Path
        The file; one that is there already and has the right checksum is not fetched again.

    Raises
    ------
    ValueError
        Another name, or a file whose checksum is wrong.
    FileNotFoundError
        The source cannot be reached.
    """
    import pooch

    if name not in _WEIGHTS:
        raise ValueError(f"no weights to fetch for {name!r}; there are: {', '.join(_WEIGHTS)}")
    weights = _WEIGHTS[name]
    target = _weights_folder(folder) / weights.file
    if target.is_file() and _has_checksum(target, weights.checksum):
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty())
        with part.open("wb") as file:
            fetch(weights.url, file, None)
        if not _has_checksum(part, weights.checksum):
            raise ValueError(
                f"{weights.url}: not the published file (its checksum is not {weights.checksum}); it "
                "was cut short or changed, try again"
            )
        return part.replace(target)
    except OSError as error:
        raise FileNotFoundError(
            f"{weights.url} ({weights.size}) cannot be fetched into {target.parent} ({error}); bring "
            "the file there from another machine, or give its place as path"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _weights_folder(folder):
    if folder is not None:
        return Path(folder)
    import pooch

    return Path(pooch.os_cache("soundscapes_utils"))


def _has_checksum(path, checksum):
    algorithm, _, digest = checksum.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest().startswith(digest)


def _read_weights(name, path):
    """Return the content of an embedding's checkpoint, which may hold tensors and arrays only."""
    weights = _WEIGHTS[name]
    file = Path(path) if path else _weights_folder(None) / weights.file
    if not file.is_file():
        licence = EMBEDDINGS.set_index("name").loc[name, "licence"]
        raise FileNotFoundError(
            f"no weights of {name} at {file}: they are {weights.file} ({weights.size}, {licence}) at "
            f"{weights.url}; embeddings.fetch_weights({name!r}) gets them, or give the file as path"
        )
    return _read_checkpoint(file)


def _read_checkpoint(file):
    import torch

    try:
        with torch.serialization.safe_globals(_array_globals()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file}: cannot be loaded as a checkpoint of tensors ({_first_line(error)}); fetch it "
            "again from its source"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not weights by name")
    return content


def _array_globals():
    # published checkpoints keep the state of the trainer's sampler beside the weights: plain arrays
    from numpy._core.multiarray import _reconstruct, scalar

    parts = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        parts += [(_reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return parts


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _load_strictly(net, state, source, **options):
    try:
        net.load_state_dict(state, strict=True, **options)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        raise ValueError(f"{source}: not the weights of this network ({reason})") from error
    return net.eval()


def _part(state, prefix):
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _made(net, forward, dim):
    """Describe a torch network that maps a batch of windows to a batch of rows."""
    import torch

    version = _digest(net)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device).eval()

    def network(windows):
        with torch.inference_mode():
            rows = forward(net, torch.from_numpy(windows).to(device))
        return rows.float().cpu().numpy()

    return {"dim": dim, "version": version, "network": network, "batched": True}


def build_network(name, width=64):
    """Build VGGish or one of the PANNs with random weights, as they are before loading.

    For trying things and measuring speed without the published file:
    ``torch.save({"model": build_network(name).state_dict()}, file)`` makes a file that
    `get_embedding` takes.

    Parameters
    ----------
    name : str
        ``"vggish"``, ``"panns-cnn14"``, ``"panns-cnn14-16k"`` or ``"panns-wavegram"``.
    width : int, default 64
        Channels of the first block of a PANN; 64 is the published one, whose row is 32 times as
        wide. VGGish has but one width.

    Returns
    -------
    torch.nn.ModuleDict
        Its ``state_dict`` has the names and shapes of the published checkpoint.

    Raises
    ------
    ValueError
        Another name.

    Notes
    -----
    PANNs: Table 1 of Kong et al. (IEEE/ACM TASLP 28, 2020) and their released models; VGGish:
    Hershey et al. (ICASSP 2017) and its port torchvggish.

    Examples
    --------
    >>> import torch
    >>> with torch.device("meta"):
    ...     net = build_network("panns-cnn14")
    >>> net["fc1"].weight.shape
    torch.Size([2048, 2048])
    """
    if name == "vggish":
        return _vggish_network()
    if name in _PANNS:
        return _panns_network(*_PANNS[name], width)
    raise ValueError(f"no definition of {name!r} here; there are: vggish, {', '.join(_PANNS)}")


# --- VGGish ----------------------------------------------------------------------------------------


def _vggish_network():
    from torch import nn

    layers, channels = [], 1
    for step in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"):
        if step == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, step, 3, padding=1), nn.ReLU()]
        channels = step
    # 96 frames and 64 bands, halved four times; the last ReLU of the published network is left out,
    # as the Fréchet audio distance does
    head = nn.Linear(512 * 6 * 4, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()
    return nn.ModuleDict(
        {
            "features": nn.Sequential(*layers),
            "embeddings": nn.Sequential(*head, nn.Linear(4096, 128)),
        }
    )


def _vggish_forward(net, y):
    x = net["features"](_vggish_mel(y)[:, None])
    # TensorFlow, in which it was trained, has the channels last
    return net["embeddings"](x.permute(0, 2, 3, 1).flatten(1))


def _vggish_mel(y):
    """Log-mel of windows [batch, 15600] as VGGish was trained on it: [batch, 96, 64]."""
    import torch

    frames = y.double().unfold(1, 400, 160)
    window = torch.hann_window(400, dtype=torch.float64, device=y.device)
    magnitude = torch.fft.rfft(frames * window, 512).abs()
    filters = torch.from_numpy(_vggish_filters()).to(y.device)
    return torch.log(magnitude @ filters + 0.01).float()


@lru_cache(maxsize=1)
def _vggish_filters():
    """64 triangles from 125 to 7,500 Hz, straight in mel (librosa's are straight in Hz)."""
    edges = np.linspace(_mel(125.0), _mel(7500.0), 66)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bins = _mel(np.linspace(0.0, 8000.0, 257))[:, None]
    rise, fall = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return np.maximum(0.0, np.minimum(rise, fall))


def _mel(hz):
    return 1127.0 * np.log1p(hz / 700.0)


def _make_vggish(path):
    import torch

    content = _read_weights("vggish", path)
    state = content.get("model", content)
    with torch.device("meta"):
        net = _vggish_network()
    source = path or _WEIGHTS["vggish"].file
    return _made(_load_strictly(net, state, source, assign=True), _vggish_forward, 128)


# --- PANNs -----------------------------------------------------------------------------------------

# sample rate, FFT and window, hop, highest frequency, and whether a wavegram goes beside the log-mel
_PANNS = {
    "panns-cnn14": (32_000, 1024, 320, 14_000, False),
    "panns-cnn14-16k": (16_000, 512, 160, 8_000, False),
    "panns-wavegram": (32_000, 1024, 320, 14_000, True),
}


def _panns_network(sample_rate, n_fft, hop, fmax, wavegram, width):
    import torch
    from torch import nn
    from torchlibrosa.stft import LogmelFilterBank, Spectrogram

    # torchlibrosa computes its weights when it is built, which the meta device cannot
    with torch.device("cpu"):
        parts = {
            "spectrogram_extractor": Spectrogram(n_fft, hop, n_fft),
            "logmel_extractor": LogmelFilterBank(
                sample_rate, n_fft, 64, 50, fmax, ref=1.0, amin=1e-10, top_db=None
            ),
        }
    parts["bn0"] = nn.BatchNorm2d(64)
    if wavegram:
        parts |= {
            "pre_conv0": nn.Conv1d(1, 64, 11, stride=5, padding=5, bias=False),
            "pre_bn0": nn.BatchNorm1d(64),
            "pre_block1": _wave_block(64, 64),
            "pre_block2": _wave_block(64, 128),
            "pre_block3": _wave_block(128, 128),
            "pre_block4": _mel_block(4, width),
        }
    widths = [width * 2**k for k in range(6)]
    # the wavegram joins the log-mel after the first block
    entries = [1, (2 if wavegram else 1) * width, *widths[1:-1]]
    for k, (entry, exit_) in enumerate(zip(entries, widths, strict=True), 1):
        parts[f"conv_block{k}"] = _mel_block(entry, exit_)
    parts["fc1"] = nn.Linear(widths[-1], widths[-1])
    parts["fc_audioset"] = nn.Linear(widths[-1], 527)
    return nn.ModuleDict(parts)


def _mel_block(entry, exit_):
    from torch import nn

    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(entry, exit_, 3, padding=1, bias=False),
            "conv2": nn.Conv2d(exit_, exit_, 3, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(exit_),
            "bn2": nn.BatchNorm2d(exit_),
        }
    )


def _wave_block(entry, exit_):
    from torch import nn

    return nn.ModuleDict(
        {
            "conv1": nn.Conv1d(entry, exit_, 3, padding=1, bias=False),
            "conv2": nn.Conv1d(exit_, exit_, 3, padding=2, dilation=2, bias=False),
            "bn1": nn.BatchNorm1d(exit_),
            "bn2": nn.BatchNorm1d(exit_),
        }
    )


def _convolved(block, x):
    x = block["bn1"](block["conv1"](x)).relu_()
    return block["bn2"](block["conv2"](x)).relu_()


def _fold_norms(net):
    """Put the normalisations of the mel blocks into their convolutions: the same sums, read once."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for name, block in net.eval().items():
        if name.startswith("conv_block"):
            for k in "12":
                block[f"conv{k}"] = fuse_conv_bn_eval(block[f"conv{k}"], block[f"bn{k}"])
                block[f"bn{k}"] = nn.Identity()
    return net


def _panns_forward(net, y):
    """Map waveforms [batch, samples] to the values before the tagger: [batch, 32 * width]."""
    import torch
    import torch.nn.functional as F

    mel = net["logmel_extractor"](net["spectrogram_extractor"](y))
    mel = net["bn0"](mel.transpose(1, 3)).transpose(1, 3)
    x = F.avg_pool2d(_convolved(net["conv_block1"], mel), 2)
    if "pre_conv0" in net:
        wave = _wavegram(net, y)
        # the published code runs only where both have as many frames; elsewhere the log-mel has
        # one (20 ms) more
        frames = min(x.shape[2], wave.shape[2])
        x = torch.cat([x[:, :, :frames], wave[:, :, :frames]], dim=1)
    for k in range(2, 6):
        x = F.avg_pool2d(_convolved(net[f"conv_block{k}"], x), 2)
    x = _convolved(net["conv_block6"], x).mean(dim=3)
    return net["fc1"](x.amax(dim=2) + x.mean(dim=2)).relu()


def _wavegram(net, y):
    import torch.nn.functional as F

    x = net["pre_bn0"](net["pre_conv0"](y[:, None])).relu()
    for k in (1, 2, 3):
        x = F.max_pool1d(_convolved(net[f"pre_block{k}"], x), 4)
    # 128 channels become 4 pictures of 32 "bands" over time
    x = x.unflatten(1, (-1, 32)).transpose(2, 3)
    return F.avg_pool2d(_convolved(net["pre_block4"], x), (2, 1))


def _make_panns(name, path):
    import torch

    source = path or _WEIGHTS[name].file
    content = _read_weights(name, path)
    state = content.get("model", content)
    first = state.get("conv_block1.conv1.weight")
    if first is None:
        raise ValueError(f"{source}: not a checkpoint of PANNs (it has no conv_block1)")
    with torch.device("meta"):
        net = build_network(name, len(first))
    net = _fold_norms(_load_strictly(net, state, source, assign=True))
    return _made(net, _panns_forward, net["fc1"].out_features)


# --- MS-CLAP ---------------------------------------------------------------------------------------


def _make_msclap(path):
    state = _read_weights("ms-clap", path)
    source = path or _WEIGHTS["ms-clap"].file
    # the package silences all warnings of the process as it is imported, and has some of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from msclap.models.clap import AudioEncoder
        except ImportError as error:
            raise ImportError(
                f"ms-clap needs the package msclap ({error}): pip install --no-deps msclap==1.3.4"
            ) from error
        # the audio half of the package's config_2023.yml; the text half would come from the hub
        encoder = AudioEncoder("HTSAT", 768, 1024, 44_100, 1024, 320, 64, 50, 8_000, 527)
    _load_strictly(encoder, _part(state.get("model", state), "audio_encoder."), source)
    return _made(encoder, _msclap_forward, 1024)


def _msclap_forward(encoder, y):
    return encoder(y)[0]


# --- LAION-CLAP ------------------------------------------------------------------------------------

_LAION_HUB = "laion/clap-htsat-unfused"
_FUSED = (
    "is a fused checkpoint, which sees random crops of a clip and gives another row each time; "
    f"take an un-fused one such as {_LAION_HUB}"
)


def _make_laion(path):
    return _laion_checkpoint(path) if Path(path).is_file() else _laion_transformers(path)


def _laion_transformers(path):
    from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor

    from . import ldm

    name = path or _LAION_HUB
    try:
        with ldm.quiet():
            model, info = ClapAudioModelWithProjection.from_pretrained(
                name, output_loading_info=True
            )
            extractor = ClapFeatureExtractor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no CLAP of transformers at {name} ({_first_line(error)}): give a folder, or a name on "
            f"the Hugging Face hub ({_LAION_HUB}: 0.6 GB, Apache-2.0) while there is network"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{name}: not a whole CLAP; it lacks {missing} and more")
    if model.config.enable_fusion:
        raise ValueError(f"{name} {_FUSED}")
    return _made(model, partial(_laion_forward, extractor), model.config.projection_dim)


def _laion_forward(extractor, model, y):
    import torch.nn.functional as F

    # each window is as long as the network's own, so that neither option has anything to do; the
    # default of un-fused checkpoints' files, fusion, would make four pictures of it
    features = extractor(
        list(y.cpu().numpy()),
        sampling_rate=48_000,
        truncation="rand_trunc",
        padding="repeatpad",
        return_tensors="pt",
    )["input_features"]
    return F.normalize(model(input_features=features.to(y.device, y.dtype)).audio_embeds, dim=-1)


def _laion_checkpoint(path):
    from torch import nn

    content = _read_checkpoint(Path(path))
    state = content.get("state_dict", content)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    patches = state.get("audio_branch.patch_embed.proj.weight")
    projection = state.get("audio_projection.0.weight")
    sizes = {96: "tiny", 128: "base", 256: "large"}
    if patches is None or projection is None or len(patches) not in sizes:
        raise ValueError(f"{path}: not a checkpoint of laion-clap with an HTSAT audio tower")
    if any("fusion_model" in key or "mel_conv2d" in key for key in state):
        raise ValueError(f"{path} {_FUSED}")
    joint, wide = projection.shape
    net = nn.ModuleDict(
        {
            "audio_branch": _laion_htsat(sizes[len(patches)]),
            "audio_projection": nn.Sequential(
                nn.Linear(wide, joint), nn.ReLU(), nn.Linear(joint, joint)
            ),
        }
    )
    own = {k: v for k, v in state.items() if k.startswith(("audio_branch.", "audio_projection."))}
    return _made(_load_strictly(net, own, path), _laion_checkpoint_forward, joint)


def _laion_htsat(size):
    package = importlib.util.find_spec("laion_clap")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "a .pt file of laion-clap needs its package: pip install --no-deps laion-clap==1.1.7"
        )
    # importing the package itself fetches three tokenizers; its networks lie in a folder that it
    # puts on the path under this name
    folder = package.submodule_search_locations[0]
    config = SimpleNamespace(
        model_name=size, class_num=527, mel_bins=64, sample_rate=48_000, window_size=1024,
        hop_size=480, fmin=50, fmax=14_000,
    )  # fmt: skip
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from clap_module.htsat import create_htsat_model

            return create_htsat_model(config)
    finally:
        sys.path.remove(folder)


def _laion_checkpoint_forward(net, y):
    import torch.nn.functional as F

    seen = net["audio_branch"]({"waveform": y}, device=y.device)["embedding"]
    return F.normalize(net["audio_projection"](seen), dim=-1)


_MAKERS = {
    "logmel-stats": _make_logmel,
    "mini-clap": _make_clap,
    "yamnet": _make_yamnet,
    "vggish": _make_vggish,
    "panns-cnn14": partial(_make_panns, "panns-cnn14"),
    "panns-cnn14-16k": partial(_make_panns, "panns-cnn14-16k"),
    "panns-wavegram": partial(_make_panns, "panns-wavegram"),
    "ms-clap": _make_msclap,
    "ms-clap-dcase": _make_msclap,
    "laion-clap": _make_laion,
}
