"""Sound files and signals: read, resample, write, measure, listen.

The only module that touches files of sound. A signal is a one-dimensional float32 array in which
±1 is full scale; whatever cannot be such a signal is an :class:`AudioError` that says what to do.
"""

import base64
import contextlib
import html
import io
import math
import re
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from soundscapes_utils import store

LOG_MEL_RATE = 16_000
LOG_MEL_HOP = 160
LOG_MEL_FFT = 1024
LOG_MEL_BANDS = 64
LOG_MEL_FMAX = 8_000.0
LOG_MEL_FLOOR = 1e-5

LISTEN_SECONDS = 5.0
_GATING_BLOCK_S = 0.4
# below this peak a sound holds nothing that is worth amplifying: three steps of 16-bit PCM
SILENT_PEAK = 1e-4
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
# containers that tell whether a file is whole
_READABLE = "WAV WAVEX RF64 W64 AIFF AU CAF FLAC OGG MP3".split()  # noqa: SIM905
_RATES = (1_000, 1_000_000)
_BLOCK = 2**22
# the frames that libsndfile gives where a header knows of none
_UNKNOWN = 2**62
_SEEK_FAILED = 39
# sizes that writers into a pipe, who cannot know them, leave in the header
_STREAMED = (0, 0x7F000000, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# samples that a byte can hold at best: a header that claims more is damaged
_DENSEST = 2**16


class AudioError(store.DataError):
    """Sound that cannot be used: unreadable, empty, cut short, silent, clipping, not finite."""


def check_audio(y, name, silent_ok=False):
    """Return a signal as float32, shape (samples,), or say of `name` why it is not one.

    Not one-dimensional, empty, not finite and (unless `silent_ok`) digital silence is an error.
    """
    y = np.asarray(y)
    if y.ndim != 1:
        raise AudioError(f"{name}: expected one channel, shape (samples,), got shape {y.shape}")
    if y.size == 0:
        raise AudioError(f"{name}: holds no samples; remove it or fetch it again")
    y = y.astype(np.float32, copy=False)
    # min and max of a signal with a NaN are NaN: one pass each, no mask in memory
    low, high = float(y.min()), float(y.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(np.count_nonzero(~np.isfinite(y)))
        raise AudioError(f"{name}: {bad} of {y.size} samples are NaN or infinite; make it again")
    if not silent_ok and max(-low, high) < SILENT_PEAK:
        raise AudioError(f"{name}: is silent; leave it out or replace it")
    return y


def resample(y, from_rate, to_rate):
    """Change the sample rate (Hz) with soxr's "HQ" recipe, which all stages share."""
    if min(from_rate, to_rate) <= 0:
        raise AudioError(f"sample rates must be positive, got {from_rate} and {to_rate} Hz")
    y = np.asarray(y, dtype=np.float32)
    if from_rate == to_rate:
        return y
    return soxr.resample(y, from_rate, to_rate, quality="HQ")


def load_audio(path, sample_rate=None, duration=None, silent_ok=True, whole=False):
    """Read a sound file as mono float32.

    Parameters
    ----------
    path : str or Path
        Any format libsndfile reads: WAV, FLAC, OGG, MP3, AIFF.
    sample_rate : int, optional
        Resample to this rate in Hz; by default keep the file's.
    duration : float, optional
        Read at most this many seconds from the start; a shorter file stays shorter.
    silent_ok : bool, default True
        Whether silence is returned; else it is refused, and so are channels that cancel each other.
    whole : bool, default False
        What is resampled is read whole and cut afterwards, as the filter looks ahead of a cut.

    Returns
    -------
    y : np.ndarray of float32, shape (samples,)
        Mean over the channels.
    sample_rate : int
        Rate of `y` in Hz.

    Raises
    ------
    AudioError
        Missing, empty, cut short, not a sound file, or samples that are not finite.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> path = save_audio(Path(mkdtemp(), "t.wav"), np.zeros(44100), 44100)
    >>> y, rate = load_audio(path, 16000, duration=0.5)
    >>> y.shape, rate
    ((8000,), 16000)
    """
    path = Path(path)
    if duration is not None and not 0 < duration < math.inf:
        raise AudioError(f"{path}: duration must be positive seconds, got {duration}")
    with _opened(path) as file:
        rate = own_rate = file.samplerate
        whole = whole and rate != (sample_rate or rate)
        y, loudest = _mono(path, file, None if whole else duration)
    y = check_audio(y, path, silent_ok=True)
    if not silent_ok and np.abs(y).max() < SILENT_PEAK <= loudest:
        raise AudioError(f"{path}: its channels cancel each other (opposite phase); keep one of them")
    if sample_rate is not None:
        y, rate = resample(y, rate, sample_rate), int(sample_rate)
    if duration is not None:
        y = y[: round(duration * rate)]
    if y.size == 0:
        raise AudioError(f"{path}: holds no samples at {rate} Hz; it is too short, leave it out")
    # a look at all samples is a tenth of the reading
    return y if silent_ok and rate == own_rate else check_audio(y, path, silent_ok), rate


def find_fault(path):
    """Read a sound file whole; say why it cannot be used (damaged, silent …), or nothing if it can."""
    try:
        load_audio(path, silent_ok=False)
    except AudioError as error:
        return str(error)
    return ""


def read_header(path):
    """Read samples per channel and sample rate (Hz) of a sound file, without its samples if it says."""
    path = Path(path)
    with _opened(path) as file:
        known = file.frames < _UNKNOWN
        return file.frames if known else sum(map(len, _blocks(file))), file.samplerate


def _blocks(file, most=math.inf):
    """Yield samples [frames, channels] up to the end, whatever the header claims."""
    size = max(1, _BLOCK // file.channels)
    while most > 0:
        wanted = int(min(size, most))
        if file.frames < _UNKNOWN and file.subtype == "PCM_16":
            # the same values, six times as fast as libsndfile's own conversion
            block = file.read(wanted, dtype="int16", always_2d=True) * np.float32(2**-15)
        elif file.frames < _UNKNOWN:
            block = file.read(wanted, dtype="float32", always_2d=True)
        else:
            block = _unknown_block(file, wanted)
        yield block
        most = most - len(block) if len(block) == wanted else 0


def _unknown_block(file, wanted):
    block = np.full((wanted, file.channels), np.nan, np.float32)
    try:
        return file.read(out=block)
    except sf.LibsndfileError as error:
        if error.code != _SEEK_FAILED:
            raise
        # soundfile seeks to the end of what it has read, which libsndfile cannot at an unknown end
        return block[~np.isnan(block[:, 0])]


def _mono(path, file, duration):
    """Mean of the channels, and the peak of any of several."""
    most = math.inf if duration is None else math.ceil(duration * file.samplerate)
    parts, loudest = [], 0.0
    for block in _blocks(file, most):
        parts.append(block.mean(axis=1) if file.channels > 1 else block[:, 0])
        if file.channels > 1 and block.size:
            loudest = max(loudest, float(np.abs(block).max()))
    y = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if file.frames < _UNKNOWN and y.size < min(file.frames, most):
        raise AudioError(
            f"{path}: {y.size} samples where its header announces {file.frames}: it was cut short or "
            "edited; copy or fetch it again"
        )
    return y, loudest


@contextlib.contextmanager
def _opened(path):
    try:
        if not path.is_file():
            raise AudioError(f"{path}: no such file; check the data folder, or fetch the data again")
        size = path.stat().st_size
        if size == 0:
            raise AudioError(f"{path}: the file is empty (0 bytes); copy or fetch it again")
        with sf.SoundFile(path) as file:
            _check_header(path, file, size)
            yield file
    except AudioError:
        raise
    except Exception as error:  # what soundfile, numpy and the system raise is no short list
        name = str(path).encode(errors="backslashreplace").decode()
        raise AudioError(
            f"{name}: cannot be read as sound ({error or type(error).__name__}); it may be damaged or "
            "cut short, or not be a sound file: replace it with WAV, FLAC, OGG or MP3"
        ) from error


def _check_header(path, file, size):
    if file.format not in _READABLE:
        raise AudioError(f"{path}: {file.format_info} is not read here; convert it to WAV or FLAC")
    # libsndfile reads what is left of a file that was cut short and only notes it in its log
    log = file.extra_info
    sizes = re.findall(r"(?:data|SSND|riff|Data Size) *: (\d+) \(should be (\d+)\)", log)
    cut = [
        int(there) < int(said) and min(abs(int(said) - mark) for mark in _STREAMED) > 128
        for said, there in sizes
    ]
    if any(cut) or re.search("lacks an end-of-stream bit|does not match value from 'ds64'", log):
        raise AudioError(f"{path}: the file was cut short; copy or fetch it again")
    if file.frames == 0:
        raise AudioError(f"{path}: holds no samples; remove it or fetch it again")
    claimed = 0 if file.frames >= _UNKNOWN else file.frames
    if not _RATES[0] <= file.samplerate <= _RATES[1] or claimed > _DENSEST * size:
        raise AudioError(
            f"{path}: its header claims {claimed} samples at {file.samplerate} Hz in {size} bytes: it "
            "is damaged; copy or fetch it again"
        )


def save_audio(path, y, sample_rate):
    """Write a signal as 16-bit PCM; the file is there complete or not at all.

    A sample is stored as ``round(32768 * y)``, so that what was read from 16 bit is written back bit by
    bit. Nothing is scaled and nothing is clipped silently (+1 itself becomes the largest code, 32767).

    Parameters
    ----------
    path : str or Path
        Ends in .wav or .flac; missing folders are made.
    y : array_like, shape (samples,)
        Signal within ±1; beyond it, empty or not finite is an :class:`AudioError`.
    sample_rate : int
        Rate in Hz.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> save_audio(Path(mkdtemp(), "click.wav"), [0.0, 1.0, 0.0], 16000).name
    'click.wav'
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise AudioError(f"{path}: can only write {' and '.join(_FORMATS)}; change the file's end")
    y = check_audio(y, path, silent_ok=True)
    peak = float(np.abs(y).max())
    if peak > 1.0:
        raise AudioError(f"{path}: peak {peak:.3f} would clip; divide the signal by it first")
    pcm = np.clip(np.rint(y * 32768.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    sf.write(buffer, pcm, sample_rate, format=_FORMATS[path.suffix.lower()], subtype="PCM_16")
    return store.write_atomic(path, buffer.getvalue())


def fix_length(y, n, mode="repeat"):
    """Give a signal exactly `n` samples: cut at its end, or filled with itself or (mode "pad") zeros."""
    y = np.asarray(y)
    if mode not in ("repeat", "pad"):
        raise AudioError(f"unknown mode {mode!r}; use 'repeat' or 'pad'")
    if n < 1 or y.ndim != 1 or y.size == 0:
        raise AudioError(f"cannot fit a signal of shape {y.shape} to {n} samples")
    if y.size >= n:
        return y[:n]
    return np.resize(y, n) if mode == "repeat" else np.pad(y, (0, n - y.size))


def loudest_segment(y, n, tries, rng):
    """Cut the loudest of `tries` random segments of `n` samples out of a signal; a shorter one is whole.

    Events are short and recordings long: a segment drawn blindly would often hold none.
    """
    starts = rng.integers(0, max(1, len(y) - n + 1), size=tries)
    return max((y[s : s + n] for s in starts), key=lambda part: float(np.sum(part**2)))


def excerpts(files, seconds, sample_rate=16_000):
    """Cut the same from every file, so that a score compares sounds and not file formats.

    Recordings, mixes and generated clips differ in length and level by how they were made. Each
    is reduced to its loudest stretch of `seconds` (a shorter file is repeated), its mean removed
    and its peak set to −1 dB of full scale; silence stays silence. A list of float32 signals.
    """
    n = round(seconds * sample_rate)
    if n < 1:
        raise ValueError(f"seconds must be positive, got {seconds}")
    return [_excerpt(load_audio(file, sample_rate)[0], n) for file in files]


def _excerpt(y, n):
    y = fix_length(y, max(n, len(y)))
    y = y - y.mean()
    energy = np.cumsum(np.append(0.0, np.square(y, dtype=np.float64)))
    start = int(np.argmax(energy[n:] - energy[:-n]))
    y = y[start : start + n]
    peak = np.abs(y).max()
    return y * np.float32(10 ** (-1 / 20) / peak) if peak >= SILENT_PEAK else y


def loudness(y, sample_rate):
    """Integrated loudness after ITU-R BS.1770-4 (K-weighted, gated), in LUFS.

    A signal shorter than the standard's gating block of 400 ms is one block of its own length. Silence,
    and what stays below the absolute gate of −70 LUFS, is −inf.
    """
    import pyloudnorm

    y = check_audio(y, "signal", silent_ok=True).astype(np.float64)
    block = min(_GATING_BLOCK_S, y.size / sample_rate)
    if block * sample_rate > y.size:  # by rounding, which pyloudnorm takes for a signal too short
        block = math.nextafter(block, 0)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # a clip wholly under the gate has no blocks to average, which is no fault
        warnings.simplefilter("ignore", RuntimeWarning)
        value = pyloudnorm.Meter(sample_rate, block_size=block).integrated_loudness(y)
    return float(value)


@lru_cache(maxsize=1)
def mel_filters():
    """Mel filter bank of `log_mel`, shape (513, 64): Slaney bands and norm over 0–8 kHz."""
    from librosa.filters import mel

    basis = mel(sr=LOG_MEL_RATE, n_fft=LOG_MEL_FFT, n_mels=LOG_MEL_BANDS, fmin=0.0, fmax=LOG_MEL_FMAX)
    return np.ascontiguousarray(basis.T, dtype=np.float32)


@lru_cache(maxsize=1)
def _hann():
    n = np.arange(LOG_MEL_FFT)
    return 0.5 - 0.5 * np.cos(2 * np.pi * n / LOG_MEL_FFT)


def log_mel(y, sample_rate=LOG_MEL_RATE):
    """Log-mel spectrogram of AudioLDM's trainer, value for value.

    16 kHz, reflection padding of 432 samples at each end, periodic Hann window and FFT of 1024,
    hop 160 (10 ms), magnitude, 64 Slaney mel bands over 0–8 kHz, natural logarithm floored at 1e-5;
    all of it in float64. Source: ``mel_spectrogram_train`` of AudioLDM-training-finetuning, which took
    it from HiFi-GAN.

    Parameters
    ----------
    y : array_like, shape (samples,)
        Signal, ±1 is full scale, at least 433 samples at 16 kHz.
    sample_rate : int, default 16000
        Rate of `y` in Hz; other rates are resampled first.

    Returns
    -------
    np.ndarray of float32, shape (samples at 16 kHz // 160, 64)
        Values from log(1e-5) = −11.5 to about 3.

    Examples
    --------
    >>> log_mel(np.zeros(16000)).shape
    (100, 64)
    """
    checked = check_audio(y, "signal", silent_ok=True)
    # in float32 a quiet band is rounded away beneath a loud one of the same frame
    if sample_rate == LOG_MEL_RATE:
        y = np.asarray(y, np.float64)
    else:
        y = resample(checked, sample_rate, LOG_MEL_RATE).astype(np.float64)
    pad = (LOG_MEL_FFT - LOG_MEL_HOP) // 2
    if y.size <= pad:
        raise AudioError(
            f"a signal of {y.size} samples at 16 kHz is too short for a log-mel spectrogram; "
            f"bring it to {pad + 1} or more with fix_length"
        )
    padded = np.pad(y, pad, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, LOG_MEL_FFT)[::LOG_MEL_HOP]
    magnitude = np.abs(np.fft.rfft(frames * _hann(), axis=1))
    return np.log(np.maximum(magnitude @ mel_filters(), LOG_MEL_FLOOR)).astype(np.float32)


def listen(y, sample_rate, title=None):
    """Player for a notebook: at most 5 s, Vorbis inside the page, 10 kB per second; with a caption."""
    from IPython.display import HTML

    y = check_audio(y, title or "signal", silent_ok=True)[: int(LISTEN_SECONDS * sample_rate)]
    buffer = io.BytesIO()
    sf.write(buffer, y / max(1.0, np.abs(y).max()), sample_rate, format="OGG", subtype="VORBIS")
    # IPython's own player labels every stream as WAV, which some browsers then refuse
    source = f"data:audio/ogg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    name = html.escape(title or "")
    caption = f"<figcaption>{name}</figcaption>" if title else ""
    player = f'<audio controls preload="metadata" aria-label="{name or "sound"}" src="{source}"></audio>'
    return HTML(f'<figure style="margin:0.3em 0">{caption}{player}</figure>')


def listen_table(signals, sample_rate):
    """Players side by side, ``signals[column][row]``: heard along the rows and down the columns."""
    from IPython.display import HTML

    rows = list(dict.fromkeys(name for column in signals.values() for name in column))
    # a player's own width of 300 pixels would push the third column off the page
    width = "11em" if len(signals) > 2 else "20em"

    def cell(column, row):
        player = listen(signals[column][row], sample_rate).data if row in signals[column] else ""
        name = html.escape(f"{row}, {column}".strip(", ")) or "sound"
        about = f'aria-label="{name}" style="width:{width}"'
        return "<td>" + player.replace('aria-label="sound"', about, 1) + "</td>"

    head = "".join(f"<th>{html.escape(column)}</th>" for column in signals)
    lines = [
        f"<tr><th>{html.escape(row)}</th>{''.join(cell(column, row) for column in signals)}</tr>"
        for row in rows
    ]
    return HTML(f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>")
