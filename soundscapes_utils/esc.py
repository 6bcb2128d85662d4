"""Environmental sound classification: does synthetic audio help a classifier of real recordings?

Two networks, SB-CNN and CRNN, are trained in *arms*: on real clips, on real and synthetic ones, with
some real training folds replaced by synthetic clips, on synthetic clips only, and on the controls
that tell more clips from more steps (:func:`parse_arm` lists all). Whatever the arm, test clips are
real recordings of the test fold, and validation clips those of the fold after it.

The protocol, features and architectures are those of Ronchini, Comanducci and Antonacci (arXiv
2403.17864, below: the paper). Its released code departs from them. ``"sbcnn"`` and ``"crnn"`` are put
right; ``"sbcnn:faithful"`` and ``"crnn:faithful"`` compute what the released code computes, with the
same seeds and the same order of clips:

====================  ==========================================  ================================
Part                  Released code (``:faithful``)               Corrected
====================  ==========================================  ================================
GRU of the CRNN       recurs over the clips of a batch            recurs over time
GLU of the CRNN       x·σ(x): no weights of its own               learned value, (Wx + b)·σ(x)
Frames of 4 s         counted by the window: 63 of 126            counted by the hop: 126
"3 s" training patch  45 frames, 1.44 s, from 15 places           94 frames, 3.0 s, from 33 places
Normalisation         by the variance                             by the standard deviation
Test                  one random patch, here from the seed        mean over patches of the clip
Validation            synthetic clips in some arms                real clips in every arm
====================  ==========================================  ================================

(The last row is a matter of the plan: ``validation="faithful"``.) Beside them stand Piczak's k-NN,
random forest and SVM, a linear probe on any embedding, and a fine-tuned transformer, see
:data:`BASELINES` and :func:`run_arms`.

A trained classifier is a *unit* (arm, ratio, model, fold, run). Its result is written when it is done,
under a name that holds a hash of all that went into it, so that a run can be stopped and resumed.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import zlib
from concurrent.futures import (
    BrokenExecutor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from soundscapes_utils import audio, datasets, stats
from soundscapes_utils.metadata import LeakError

SAMPLE_RATE = 16_000
CLIP_SECONDS = 4.0
N_MELS = 64
WINDOW = 1024
HOP = 512
LOG_OFFSET = 1e-3
CLIP_FRAMES = 1 + int(CLIP_SECONDS * SAMPLE_RATE) // HOP
PATCH_FRAMES = round(3.0 * SAMPLE_RATE / HOP)

LEARNING_RATE = 1e-3
ADAM_EPS = 1e-7
WEIGHT_DECAY = 1e-3

# what the released code makes of 4 s and of 3 s, counting by the window
FAITHFUL_FRAMES = 63
FAITHFUL_PATCH = 45
FAITHFUL_STARTS = 15

ARMS = (
    *("real", "both", "mixed", "synthetic", "repeat", "steps", "thinned", "dropped"),
    *("specaugment", "mixup"),
)
# columns of a generated table that say where a row may serve, see plan_units
_BINDING = ("made_from", "held_out_fold")
_NEED_SYNTHETIC = ("both", "mixed", "synthetic", "thinned")
_ON_THE_FLY = ("specaugment", "mixup")
_WHOLE_AMOUNT = ("mixed", "dropped", "specaugment")

PROTOCOLS = pd.DataFrame(
    [("urbansound8k", 10, 10), ("esc50", 5, 50), ("esc10", 5, 10), ("embedded", 5, 10)],
    columns=["dataset", "n_folds", "n_classes"],
).set_index("dataset")
"""Folds and classes of each data set; the fold after the test fold validates, see `protocol`."""

BASELINES = pd.DataFrame(
    [
        ("knn", "k nearest neighbours, k = 5", 0.667, 0.322),
        ("forest", "random forest of 500 trees", 0.727, 0.443),
        ("svm", "support vector machine, linear", 0.675, 0.396),
    ],
    columns=["model", "what", "esc10_published", "esc50_published"],
).set_index("model")
"""Piczak's baselines on MFCC and zero-crossing rate, with the accuracies (0 to 1) that he prints."""

AST_CHECKPOINT = "MIT/ast-finetuned-audioset-10-10-0.4593"
# share of the frames and of the bands that one mask may cover: 24 of 128 bands for AST on ESC-50
_MASK_SHARE = 0.19

TRANSFORMS = {
    "ps1": ("pitch_shift", (-2.0, -1.0, 1.0, 2.0)),
    "ps2": ("pitch_shift", (-3.5, -2.5, 2.5, 3.5)),
    "ts": ("time_stretch", (0.81, 0.93, 1.07, 1.23)),
}
"""Signal-processing augmentation with the paper's values: semitones, and speeds."""

RESULT_COLUMNS = [
    *("arm", "model", "backend", "prompt_family", "ratio", "fold", "run", "seed", "n_real"),
    *("n_synthetic", "accuracy", "macro_f1", "epochs", "seconds"),
]
_LOG_COLUMNS = ["epoch", "train_loss", "validation_loss", "validation_accuracy"]
# part of every unit's key: raise it when training changes in a way that its inputs do not show
_RECIPE = 1


class UnitsFailed(RuntimeError):
    """Some classifiers could not be trained; the others are done and kept."""


# --- features ------------------------------------------------------------------------------------


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
    y = torch.from_numpy(audio.fit_length(y, int(CLIP_SECONDS * SAMPLE_RATE)).copy())
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
    rows, keys = _load_kept(paths, cache_dir, workers, settings, _features_of)
    x = np.stack(rows) if rows else np.zeros((0, CLIP_FRAMES, N_MELS))
    return x.astype(np.float32, copy=False), keys


def _features_of(path):
    y, rate = audio.load_audio(path, sample_rate=SAMPLE_RATE, duration=CLIP_SECONDS)
    return features(audio.check_audio(y, path), rate)


def _load_kept(paths, cache_dir, workers, settings, compute):
    """Compute an array for each file, or read what an earlier call kept; arrays and their keys."""
    # decoding and resampling let go of Python's lock, so threads do here
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = list(pool.map(lambda p: _kept(Path(p), Path(cache_dir), settings, compute), paths))
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
    _write_whole(kept, buffer.getvalue())
    return x, key


def _write_whole(path, content):
    part = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"{path}: cannot be written ({error}); free some space and run again, "
            "what is done is kept"
        ) from error


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


def _mfcc_of(path):
    y, rate = audio.load_audio(path)
    return mfcc_statistics(audio.check_audio(y, path), rate)


def _transformer_input_of(extractor, path):
    y, rate = audio.load_audio(path, sample_rate=SAMPLE_RATE, duration=CLIP_SECONDS)
    y = audio.fit_length(audio.check_audio(y, path), int(CLIP_SECONDS * SAMPLE_RATE))
    x = extractor(y, sampling_rate=rate, return_tensors="np")["input_values"][0]
    # frames of 25 ms every 10 ms; the rest is padding, which the network adds again
    return x[: 1 + (len(y) - 400) // 160].astype(np.float16)


def _checkpoint_stamp(checkpoint):
    """Content of a local checkpoint; a hub's name stands for itself."""
    weights = sorted(Path(checkpoint).glob("*.safetensors")) if Path(checkpoint).is_dir() else []
    return "".join(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in weights)


def _input_kind(model):
    name, _, detail = model.partition(":")
    if name in ("probe", "ast"):
        return model
    if name in BASELINES.index:
        return "mfcc"
    return "logmel-faithful" if detail == "faithful" else "logmel"


def _inputs(kind, paths, cache_dir, workers, embedded):
    """What classifiers of one kind read of each clip, and what identifies it."""
    name, _, detail = kind.partition(":")
    if name == "probe":
        from soundscapes_utils import embeddings

        reader = (embedded or {}).get(detail) or embeddings.get_embedding(detail)
        x = reader.embed(paths, silence="allow", cache_dir=cache_dir)
        return x, [hashlib.sha256(row.tobytes()).hexdigest()[:32] for row in x]
    if name == "ast":
        from transformers import ASTFeatureExtractor

        extractor = _from_hub(ASTFeatureExtractor, detail)
        settings = f"{kind},{_checkpoint_stamp(detail)}"
        compute = partial(_transformer_input_of, extractor)
        rows, keys = _load_kept(paths, cache_dir, workers, settings, compute)
        return np.stack(rows), keys
    if name == "mfcc":
        rows, keys = _load_kept(paths, cache_dir, workers, "mfcc-statistics", _mfcc_of)
        return np.stack(rows), keys
    x, keys = load_features(paths, cache_dir, workers)
    return standardise(x) if kind == "logmel" else divide_by_variance(x), keys


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
        disguise. Give it to :func:`run_arms` as ``{"ps1": table}`` and ask for ``"both@ps1:4"``.

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


# --- networks ------------------------------------------------------------------------------------


class SBCNN(nn.Module):
    """Salamon and Bello's convolutional network, as the paper sizes it.

    Conv 5×5 1→24, max-pool 4×2, ReLU; conv 24→48, max-pool 4×2, ReLU; conv 48→48, ReLU; dropout 0.5,
    64 units, ReLU; dropout 0.5, one unit a class. Pools are time × frequency.

    Parameters
    ----------
    n_classes : int
        Classes to tell apart.
    n_frames : int, default 94
        Frames of a patch (3 s at hop 512), at least 16.

    Notes
    -----
    Input: float32 (patches, 1, frames, 64); output: logits (patches, classes).

    References
    ----------
    Salamon and Bello, "Deep Convolutional Neural Networks and Data Augmentation for Environmental
    Sound Classification", IEEE Signal Processing Letters 24(3), 2017.

    Examples
    --------
    >>> SBCNN(10)(torch.zeros(2, 1, 94, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(self, n_classes, n_frames=PATCH_FRAMES):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 5, padding="same"),
            nn.MaxPool2d((4, 2)),
            nn.ReLU(),
            nn.Conv2d(24, 48, 5, padding="same"),
            nn.MaxPool2d((4, 2)),
            nn.ReLU(),
            nn.Conv2d(48, 48, 5, padding="same"),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(48 * (n_frames // 4 // 4) * (N_MELS // 2 // 2), 64),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(64, n_classes),
        )

    def forward(self, x):
        """Logits (patches, classes) of patches (patches, 1, frames, 64)."""
        return self.head(self.convolutions(x).flatten(1))


class GLU(nn.Module):
    """Gated linear unit over channels: a learned value, let through by the sigmoid of the input.

    Parameters
    ----------
    channels : int
        Channels in and out.

    Notes
    -----
    ``(Wx + b) · σ(x)`` at each time and frequency, as in the DCASE Task 4 baselines from which the
    paper's CRNN descends. The paper's code joins x with itself instead, which leaves x·σ(x).

    References
    ----------
    Dauphin et al., "Language Modeling with Gated Convolutional Networks", ICML 2017.

    Examples
    --------
    >>> GLU(16)(torch.zeros(2, 16, 5, 4)).shape
    torch.Size([2, 16, 5, 4])
    """

    def __init__(self, channels):
        super().__init__()
        self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        """Gated values, same shape as `x` (patches, channels, frames, bands)."""
        return self.value(x) * torch.sigmoid(x)


class CRNN(nn.Module):
    """Castorena and Cobos' convolutional recurrent network, as the paper sizes it.

    Seven blocks of conv 3×3, batch norm, GLU and average pool (filters 16 32 64 128 128 128 128; pools
    2×2 2×2, then 1×2; none after the last, where one band is left), a two-layer bidirectional GRU of
    128 over time, and one linear layer over all its outputs.

    Parameters
    ----------
    n_classes : int
        Classes to tell apart.
    n_frames : int, default 94
        Frames of a patch (3 s at hop 512), at least 4.
    faithful : bool, default False
        As the released code computes: x·σ(x) in place of the GLU, and a GRU that takes the clips of
        a batch for its time steps, so that a clip's output depends on its neighbours.

    Notes
    -----
    Input: float32 (patches, 1, frames, 64); output: logits (patches, classes).

    References
    ----------
    Castorena, Cobos, Lopez-Ballester and Ferri, "A safety-oriented framework for sound event
    detection in driving scenarios", Applied Acoustics 215, 109719, 2023.

    Examples
    --------
    >>> CRNN(10)(torch.zeros(2, 1, 94, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(self, n_classes, n_frames=PATCH_FRAMES, faithful=False):
        super().__init__()
        filters = (1, 16, 32, 64, 128, 128, 128, 128)
        pools = ((2, 2), (2, 2), (1, 2), (1, 2), (1, 2), (1, 2), None)
        layers = []
        for before, after, pool in zip(filters, filters[1:], pools, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding="same"), nn.BatchNorm2d(after)]
            # SiLU is x·σ(x)
            layers += [nn.SiLU() if faithful else GLU(after)]
            layers += [nn.AvgPool2d(pool)] if pool else []
        self.convolutions = nn.Sequential(*layers)
        self.gru = nn.GRU(128, 128, num_layers=2, bidirectional=True, batch_first=not faithful)
        self.head = nn.Linear((n_frames // 2 // 2) * 2 * 128, n_classes)

    def forward(self, x):
        """Logits (patches, classes) of patches (patches, 1, frames, 64)."""
        over_time, _ = self.gru(self.convolutions(x).squeeze(-1).transpose(1, 2))
        return self.head(over_time.flatten(1))


MODELS = {"sbcnn": SBCNN, "crnn": CRNN}
FAITHFUL = {
    "sbcnn": partial(SBCNN, n_frames=FAITHFUL_PATCH),
    "crnn": partial(CRNN, n_frames=FAITHFUL_PATCH, faithful=True),
}


class PretrainedTransformer(nn.Module):
    """Audio Spectrogram Transformer with a new head, ready to be fine-tuned.

    Parameters
    ----------
    n_classes : int
        Classes to tell apart.
    checkpoint : str, optional
        Name on the hub, or a folder written by ``save_pretrained`` (model and feature extractor).

    Notes
    -----
    Input: (patches, 1, frames, bands) as the checkpoint's feature extractor gives it, without its
    padding; output: logits (patches, classes).

    References
    ----------
    Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021.

    Examples
    --------
    >>> PretrainedTransformer(10)(torch.zeros(1, 1, 398, 128)).shape  # doctest: +SKIP
    torch.Size([1, 10])
    """

    def __init__(self, n_classes, checkpoint=AST_CHECKPOINT):
        super().__init__()
        from transformers import ASTFeatureExtractor, ASTForAudioClassification

        self.network = _from_hub(
            ASTForAudioClassification,
            checkpoint,
            num_labels=n_classes,
            ignore_mismatched_sizes=True,
        )
        extractor = _from_hub(ASTFeatureExtractor, checkpoint)
        # the extractor pads before it normalises
        self.silence = -extractor.mean / (2 * extractor.std) if extractor.do_normalize else 0.0

    def forward(self, x):
        """Logits (patches, classes) of patches (patches, 1, frames, bands)."""
        missing = self.network.config.max_length - x.shape[2]
        return self.network(
            functional.pad(x.squeeze(1), (0, 0, 0, missing), value=self.silence)
        ).logits


def _from_hub(maker, checkpoint, **options):
    try:
        return maker.from_pretrained(checkpoint, **options)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{checkpoint}: no Audio Spectrogram Transformer can be loaded from it "
            f"({str(error).splitlines()[0]}); connect to the hub once, or give a folder written by "
            "save_pretrained (model and feature extractor)"
        ) from error


def _build(model, n_classes):
    """A network by name, the frames and places of its patches (None: all), Adam's settings."""
    name, _, detail = model.partition(":")
    adam = {"lr": LEARNING_RATE, "eps": ADAM_EPS, "weight_decay": WEIGHT_DECAY}
    if name == "ast":
        # as Gong et al. fine-tune on ESC-50
        return (
            PretrainedTransformer(n_classes, detail),
            None,
            None,
            {"lr": 1e-5, "weight_decay": 5e-7},
        )
    if detail == "faithful":
        return FAITHFUL[name](n_classes), FAITHFUL_PATCH, FAITHFUL_STARTS, adam
    return MODELS[name](n_classes), PATCH_FRAMES, None, adam


# --- training and scoring ------------------------------------------------------------------------


def train_classifier(
    model,
    train,
    validation,
    n_classes,
    *,
    epochs=100,
    batch_size=128,
    patience=15,
    patches_per_epoch=None,
    seed=0,
    device="cpu",
    augment=None,
):
    """Train one network on random 3 s patches; keep the weights of the lowest validation loss.

    Adam (1e-3, eps 1e-7, weight decay 1e-3) on the cross-entropy.

    Parameters
    ----------
    model : str
        ``"sbcnn"``, ``"crnn"`` (see :data:`MODELS`), either with ``":faithful"``, or
        ``"ast:<checkpoint>"``, which takes whole clips and Adam at 1e-5.
    train, validation : tuple of (np.ndarray (clips, frames, bands), np.ndarray of int (clips,))
        Spectrograms and class numbers: 126 × 64 of :func:`standardise`; for a faithful network
        63 × 64 of :func:`divide_by_variance`.
    n_classes : int
        Classes to tell apart.
    epochs : int, default 100
        At most so many passes over the training clips.
    batch_size : int, default 128
        Patches a step; take less for a few hundred clips, else there are few steps.
    patience : int, default 15
        Stop after so many epochs without a lower validation loss.
    patches_per_epoch : int, optional
        Patches an epoch, however many clips there are; by default one of each clip, as in the paper.
        With a number, arms of different size take equally many steps.
    seed : int, default 0
        Initial weights, order, patches and dropout follow from it.
    device : str, default "cpu"
        Where torch trains.
    augment : tuple of (str, float), optional
        ``("specaugment", k)``: k masks over time and k over frequency, each of at most 19 % of the
        axis; ``("mixup", α)``: pairs of clips added with a share drawn from Beta(α, α).

    Returns
    -------
    network : nn.Module
        In evaluation mode, with the best weights.
    log : pandas.DataFrame
        `epoch, train_loss, validation_loss, validation_accuracy`, one row an epoch.

    Notes
    -----
    A faithful network sees the same clips in the same batches as the corrected one of the same seed.
    Its validation is one random patch a clip, in batches of `batch_size`.

    References
    ----------
    Park et al., "SpecAugment", Interspeech 2019; Zhang et al., "mixup", ICLR 2018.

    Examples
    --------
    >>> x, y = np.random.default_rng(0).normal(size=(8, 126, 64)).astype("f4"), np.arange(8) % 2
    >>> network, log = train_classifier("sbcnn", (x, y), (x, y), 2, epochs=1)
    >>> list(log)
    ['epoch', 'train_loss', 'validation_loss', 'validation_accuracy']
    """
    x, y = torch.from_numpy(train[0]).to(device), torch.from_numpy(train[1]).to(device)
    # the caller's own random state is none of our business
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        torch.manual_seed(seed)
        # twice as fast on a CPU as torch's default layout
        network, frames, starts, adam = _build(model, n_classes)
        network = network.to(device, memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(network.parameters(), **adam)
        # a view of every patch that a clip holds; a batch copies only those it draws
        patches = x.unfold(1, frames or x.shape[1], 1)[:, :starts]
        chance = torch.Generator().manual_seed(seed)
        rows, best, best_loss, waited = [], None, np.inf, 0
        for epoch in range(1, epochs + 1):
            order = _draw_order(len(x), patches_per_epoch, chance)
            batches = order.split(batch_size)
            train_loss = _train_epoch(network, optimiser, patches, y, batches, chance, augment)
            probabilities = _probabilities(model, network, validation[0], seed + epoch, batch_size)
            loss, accuracy = _score(probabilities, validation[1])
            rows.append((epoch, train_loss, loss, accuracy))
            waited += 1
            if loss < best_loss:
                best_loss, waited = loss, 0
                best = {name: value.clone() for name, value in network.state_dict().items()}
            if waited >= patience or not np.isfinite(train_loss):
                break
    if best is None:
        raise FloatingPointError(f"{model}: the validation loss was never finite; check the clips")
    network.load_state_dict(best)
    return network.eval(), pd.DataFrame(rows, columns=_LOG_COLUMNS)


def _draw_order(n, wanted, chance):
    """Row numbers of an epoch: every clip once before any comes again."""
    wanted = wanted or n
    rounds = [torch.randperm(n, generator=chance) for _ in range(-(-wanted // n))]
    return torch.cat(rounds)[:wanted]


def _train_epoch(network, optimiser, patches, y, batches, chance, augment):
    network.train()
    losses = []
    for part in batches:
        starts = torch.randint(patches.shape[1], (len(part),), generator=chance)
        batch = patches[part, starts].transpose(1, 2).unsqueeze(1).float()
        loss = _loss(network, batch, y[part], augment)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def _loss(network, batch, y, augment):
    name, amount = augment or ("", 0.0)
    if name == "mixup":
        share = torch.distributions.Beta(amount, amount).sample().item()
        other = torch.randperm(len(batch))
        logits = network(share * batch + (1 - share) * batch[other])
        first, second = (functional.cross_entropy(logits, target) for target in (y, y[other]))
        return share * first + (1 - share) * second
    if name == "specaugment":
        batch = _masked(batch, int(amount))
    return functional.cross_entropy(network(batch), y)


def _masked(batch, n_masks):
    from torchaudio.functional import mask_along_axis_iid

    for axis in (2, 3):
        widest = round(_MASK_SHARE * batch.shape[axis])
        for _ in range(n_masks):
            # 0 is the mean of a standardised clip
            batch = mask_along_axis_iid(batch, widest, 0.0, axis)
    return batch


def _probabilities(model, network, x, seed, batch_size):
    if model.endswith(":faithful"):
        return predict_one_patch(network, x, seed, batch_size)
    if model.startswith("ast:"):
        return predict(network, x, patches=1, batch_size=16, patch_frames=x.shape[1])
    return predict(network, x)


def _score(probabilities, y):
    chosen = np.maximum(probabilities[np.arange(len(y)), y], 1e-12)
    return float(-np.log(chosen).mean()), float((probabilities.argmax(axis=1) == y).mean())


def predict(network, x, patches=2, batch_size=64, patch_frames=PATCH_FRAMES):
    """Class probabilities of whole clips: the mean over patches that together cover the clip.

    Parameters
    ----------
    network : nn.Module
        A trained :class:`SBCNN` or :class:`CRNN`; put into evaluation mode.
    x : np.ndarray of float32, shape (clips, 126, 64)
        Standardised spectrograms.
    patches : int, default 2
        Patches of 3 s, evenly spaced from the clip's beginning to its end; two cover all of it.
    batch_size : int, default 64
        Clips at a time.
    patch_frames : int, default 94
        Frames that the network takes.

    Returns
    -------
    np.ndarray of float32, shape (clips, classes)
        Rows sum to 1.

    Examples
    --------
    >>> predict(SBCNN(3), np.zeros((2, 126, 64), "f4")).sum(axis=1).round(3).tolist()
    [1.0, 1.0]
    """
    network.eval()
    device = next(network.parameters()).device
    starts = np.linspace(0, x.shape[1] - patch_frames, patches).round().astype(int)
    found = []
    with torch.inference_mode():
        for part in torch.from_numpy(x).split(batch_size):
            part = part.to(device).unsqueeze(1).float()
            each = [network(part[:, :, s : s + patch_frames]).softmax(dim=1) for s in starts]
            found.append(torch.stack(each).mean(dim=0).cpu().numpy())
    return np.concatenate(found)


def predict_one_patch(network, x, seed=0, batch_size=1):
    """Class probabilities as the paper's released code tests: from one random patch of each clip.

    Parameters
    ----------
    network : nn.Module
        A network of 45 frames, see :data:`FAITHFUL`; put into evaluation mode.
    x : np.ndarray of float32, shape (clips, 63, 64)
        Spectrograms of :func:`divide_by_variance`.
    seed : int, default 0
        Of the patches' places; the released code draws them anew each time.
    batch_size : int, default 1
        Clips at a time. The faithful CRNN recurs over them: this changes its output.

    Returns
    -------
    np.ndarray of float32, shape (clips, classes)
        Rows sum to 1.

    Examples
    --------
    >>> predict_one_patch(FAITHFUL["crnn"](3), np.zeros((2, 63, 64), "f4")).shape
    (2, 3)
    """
    network.eval()
    device = next(network.parameters()).device
    chance = torch.Generator().manual_seed(seed)
    starts = torch.randint(FAITHFUL_STARTS, (len(x),), generator=chance)
    patches = torch.from_numpy(x).unfold(1, FAITHFUL_PATCH, 1)
    found = []
    with torch.inference_mode():
        for part in torch.arange(len(x)).split(batch_size):
            batch = patches[part, starts[part]].transpose(1, 2).unsqueeze(1).to(device)
            found.append(network(batch).softmax(dim=1).cpu().numpy())
    return np.concatenate(found)


def fit_baseline(model, x, y, seed=0):
    """Fit a classifier that needs no validation clips: Piczak's baselines, or a linear probe.

    Parameters
    ----------
    model : {"knn", "forest", "svm", "probe"}
        Row of :data:`BASELINES`, or logistic regression.
    x : np.ndarray of float, shape (clips, dims)
        Rows of :func:`mfcc_statistics`, or of an embedding.
    y : array_like, shape (clips,)
        Classes.
    seed : int, default 0
        Of the forest; the others do not draw.

    Returns
    -------
    scikit-learn classifier
        Fitted; ``predict`` gives classes. SVM and probe standardise the features on `x`.

    Raises
    ------
    ValueError
        Unknown model, or fewer than two classes.

    Notes
    -----
    scikit-learn's defaults but for the linear kernel and 500 trees: nothing was tuned on test folds.

    Examples
    --------
    >>> fit_baseline("svm", np.array([[0.0], [1.0]]), ["a", "b"]).predict([[0.9]]).tolist()
    ['b']
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    made = {
        # distances on MFCC as they are: the low ones, which vary most, count most
        "knn": lambda: KNeighborsClassifier(5),
        "forest": lambda: RandomForestClassifier(500, random_state=seed),
        "svm": lambda: make_pipeline(StandardScaler(), SVC(kernel="linear")),
        "probe": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    if model not in made:
        raise ValueError(f"unknown baseline {model!r}; choose one of {', '.join(made)}")
    return made[model]().fit(x, y)


# --- arms and units ------------------------------------------------------------------------------


_ARM = re.compile(
    r"(?P<kind>[a-z]+)(@(?P<source>[^@/:]+))?(/(?P<per_class>[1-9][0-9]*))?(:(?P<amount>[^:]*))?"
)


def parse_arm(text):
    """Read an arm's name and how much of it.

    Parameters
    ----------
    text : str
        ``name@source/k:amount``; source, k and, for real, amount are left out. The names:

        ``real``; ``both:R`` or ``synthetic:R``, R synthetic clips for each real training clip;
        ``mixed:N``, N of the training folds replaced by as many synthetic clips.

        Controls, of real clips only: ``repeat:R``, each clip R times more (equal n and steps as
        both:R); ``steps:R``, 1 + R times the epochs and the patience (equal steps); ``dropped:N``,
        N training folds left out and nothing in their place. ``thinned:R`` is both:R, thinned at
        random to as many clips of each class as there are real ones (equal n as real).

        Other augmentation of the real clips: ``specaugment:K``, ``mixup:A``, see
        :func:`train_classifier`; pitch and speed are a source, see :func:`transform_clips`.

        ``@source`` says which of several tables of synthetic clips; ``@a+b`` takes them in turn.
        ``/k`` trains on k real clips a class; R counts from them.

    Returns
    -------
    tuple of (str, float)
        What precedes the colon, and R, N, K or A (0 for real).

    Raises
    ------
    ValueError
        Unknown arm, or a number or source that it cannot have.

    Examples
    --------
    >>> parse_arm("both:2"), parse_arm("real"), parse_arm("both@ps1/8:4")
    (('both', 2.0), ('real', 0.0), ('both@ps1/8', 4.0))
    """
    found = _ARM.fullmatch(str(text))
    kind = found["kind"] if found else ""
    try:
        value = float((found and found["amount"]) or 0)
    except ValueError:
        value = -1.0
    fits = value == 0 if kind == "real" else 0 < value < np.inf
    fits &= kind not in _WHOLE_AMOUNT or value.is_integer()
    fits &= kind in _NEED_SYNTHETIC or not (found and found["source"])
    if kind not in ARMS or not fits:
        raise ValueError(
            f"cannot read the arm {text!r}: use 'real', 'both:1.0', 'synthetic:1.0' (synthetic clips "
            "for each real one), 'mixed:2' (training folds replaced), or a control, see parse_arm"
        )
    return str(text).partition(":")[0], value


def arm_parts(arm):
    """Take an arm's name apart, for tables and figures.

    Parameters
    ----------
    arm : str
        First part of what :func:`parse_arm` returns, as in the column `arm` of results.

    Returns
    -------
    tuple of (str, str, int or None)
        Kind, source (empty where there is one table only), real clips a class (None: all).

    Examples
    --------
    >>> arm_parts("both@ps1/8"), arm_parts("real")
    (('both', 'ps1', 8), ('real', '', None))
    """
    found = _ARM.fullmatch(arm)
    per_class = found["per_class"]
    return found["kind"], found["source"] or "", int(per_class) if per_class else None


def protocol(clips):
    """Say which fold tests, validates and trains, and refuse an incomplete data set.

    Parameters
    ----------
    clips : pandas.DataFrame
        Real recordings (table *clips*), of one data set of :data:`PROTOCOLS`.

    Returns
    -------
    pandas.DataFrame
        One row a fold: `test_fold, validation_fold, training_folds, n_train, n_validation, n_test`.
        Fold n tests, fold n + 1 validates (the first after the last, so that the paper's
        ``(n + 1) mod 11`` with 1 for 0 comes out), the others train.

    Raises
    ------
    ValueError
        Unknown data set, several at once, or folds or classes missing: the fold after a missing
        one would validate in its place, and no figure would be comparable.

    Examples
    --------
    >>> clips = pd.DataFrame({"fold": [1, 2], "label": ["dog", "rain"], "dataset": "esc10"})
    >>> protocol(clips)
    Traceback (most recent call last):
    ValueError: esc10 has 5 folds and 10 classes, these clips have 2 and 2; load the whole data set
    """
    names = sorted(set(clips["dataset"]))
    if len(names) != 1 or names[0] not in PROTOCOLS.index:
        raise ValueError(f"datasets {names}: give one of {', '.join(PROTOCOLS.index)}")
    wanted = PROTOCOLS.loc[names[0]]
    folds = sorted(set(clips["fold"]))
    classes = clips["label"].nunique()
    if folds != list(range(1, wanted.n_folds + 1)) or classes != wanted.n_classes:
        raise ValueError(
            f"{names[0]} has {wanted.n_folds} folds and {wanted.n_classes} classes, these clips have "
            f"{len(folds)} and {classes}; load the whole data set"
        )
    rows = []
    for fold in folds:
        split = datasets.assign_splits(clips, fold)
        counts = {f"n_{n}": int((split == key).sum()) for n, key in _SPLITS.items()}
        held = {key: clips["fold"][split == key].unique().tolist() for key in ("train", "val")}
        rows.append(
            {"test_fold": fold, "validation_fold": held["val"][0]}
            | {"training_folds": sorted(held["train"])}
            | counts
        )
    return pd.DataFrame(rows)


_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def random_drop(generated, like, seed=0):
    """Drop synthetic clips at random until as many are left as a filter left: its control.

    Parameters
    ----------
    generated : pandas.DataFrame
        Table *generated* before the filter.
    like : pandas.DataFrame
        The filtered table.
    seed : int, default 0
        Of the choice.

    Returns
    -------
    pandas.DataFrame
        Rows of `generated`, of each class as many as `like` holds.

    Raises
    ------
    ValueError
        `like` holds more clips of a class than `generated`.

    Examples
    --------
    >>> made = pd.DataFrame({"label": ["dog", "dog", "rain", "rain"]})
    >>> random_drop(made, made.iloc[[0, 2, 3]])["label"].value_counts().to_dict()
    {'rain': 2, 'dog': 1}
    """
    wanted = like["label"].value_counts()
    have = generated["label"].value_counts().reindex(wanted.index, fill_value=0)
    if (wanted > have).any():
        label = (wanted - have).idxmax()
        raise ValueError(f"{wanted[label]} clips of {label!r} wanted, there are {have[label]}")
    shuffled = generated.sample(frac=1, random_state=seed)
    place = shuffled.groupby("label").cumcount()
    kept = shuffled[place < shuffled["label"].map(wanted).fillna(0)]
    return kept.sort_index()


def plan_units(
    clips,
    generated,
    arms,
    *,
    models=("sbcnn", "crnn"),
    test_folds=(5,),
    runs=1,
    seed=0,
    real_per_class=None,
    generator_folds=None,
    validation="real",
):
    """Say, before anything is trained, which clips each classifier will see.

    All arms of one fold and run draw from the same shuffled lists, so that a larger ratio adds clips
    to a smaller one, and share their seed: their differences are those of the training clips.

    Parameters
    ----------
    clips : pandas.DataFrame
        Real recordings (table *clips*).
    generated : pandas.DataFrame, dict of str to pandas.DataFrame, or None
        Synthetic clips (table *generated*), several tables by the names that arms call for with
        ``@``; None where no arm needs any. Two optional columns bind a row: it is used only for the
        test fold `held_out_fold` (of a generator trained without that fold), or only where the
        recording `made_from` is among the real training clips.
    arms : list of str
        See :func:`parse_arm`.
    models : sequence of str
        Keys of :data:`MODELS`, also with ``":faithful"``; rows of :data:`BASELINES`;
        ``"probe:<embedding>"``; ``"ast:<checkpoint>"``.
    test_folds : sequence of int
        Folds to test on, one after the other; the next fold, cyclically, validates.
    runs : int, default 1
        Repetitions with other seeds.
    seed : int, default 0
        All choices follow from it.
    real_per_class : int, optional
        Train on so many real clips a class (spread over the training folds) instead of all.
    generator_folds : sequence of int, or dict of str to sequence of int, optional
        Folds that the generator of `generated` (of each table) was trained on; none if it never met
        these recordings.
    validation : {"real", "faithful", "none"}
        What early stopping looks at: real clips of the fold after the test fold; these and synthetic
        ones in the arms both, thinned and synthetic (there, synthetic ones only), as in the released
        code; nothing: that fold trains too, which only classifiers without early stopping allow.

    Returns
    -------
    pandas.DataFrame
        One row a unit: `arm, ratio, model, fold, run, seed, n_real, n_synthetic, n_validation,
        n_test` and the row numbers `real_rows, synthetic_rows, validation_rows, test_rows`; with
        faithful validation also `validation_synthetic_rows`. `ratio` is the number that the arm
        carries. Synthetic rows count through all tables, one after the other.

    Raises
    ------
    LeakError
        The generator saw a test fold.
    ValueError
        Unknown arm, model or fold; a source recording that spans splits; too few real or synthetic
        clips of a class; more folds to replace than there are.

    Examples
    --------
    >>> clips = pd.DataFrame({"label": ["dog", "rain"] * 3, "fold": [1, 1, 2, 2, 3, 3]})
    >>> clips["source_id"] = clips["clip_id"] = clips.index.astype(str)
    >>> plan_units(clips, None, ["real"], models=["sbcnn"], test_folds=[3])[["n_real", "n_test"]]
       n_real  n_test
    0       2       2
    """
    wanted = list(dict.fromkeys(parse_arm(arm) for arm in arms))
    _check_design(wanted, arms, models, validation)
    tables = _tables(generated, wanted)
    for name in _sources(wanted):
        _refuse_leak(tables[name], test_folds, _folds_of(generator_folds, name))
    synthetic = pd.concat(tables.values(), ignore_index=True) if tables else None
    units = []
    for fold in test_folds:
        rows = _rows_by_split(clips, fold)
        if validation == "none":
            rows |= {"train": sorted(rows["train"] + rows["val"]), "val": []}
        for run in range(runs):
            rng = np.random.default_rng([seed, fold, run])
            real = _spread_choice(clips, rows["train"], real_per_class, rng)
            folds = rng.permutation(sorted(set(clips["fold"].iloc[real])))
            pools = _pools(tables, fold, rng, [seed, fold, run])
            for arm, amount in wanted:
                few = arm_parts(arm)[2]
                # the same seed for every k: the smaller sets lie within the larger
                chance = np.random.default_rng([seed, fold, run, 1])
                base = _spread_choice(clips, rows["train"], few, chance) if few else real
                kind = arm_parts(arm)[0]
                beside = rows["val"] if validation == "faithful" and kind != "mixed" else []
                usable = _usable(pools, synthetic, clips, base)
                drawn = _draw(clips, base, beside, folds, usable, arm, amount, chance)
                chosen, added, made_beside = drawn
                held = [] if beside and kind == "synthetic" else rows["val"]
                for model in models:
                    unit_seed = _unit_seed(seed, model.partition(":")[0], fold, run)
                    about = (arm, amount, model, int(fold), run, unit_seed)
                    units.append((*about, chosen, added, held, rows["test"], made_beside))
    named = ["arm", "ratio", "model", "fold", "run", "seed"]
    parts = ["real", "synthetic", "validation", "test"]
    columns = [*named, *(f"{part}_rows" for part in parts), "validation_synthetic_rows"]
    plan = pd.DataFrame(units, columns=columns)
    for place, part in enumerate(parts):
        plan.insert(len(named) + place, f"n_{part}", plan[f"{part}_rows"].map(len))
    if validation != "faithful":
        return plan.drop(columns="validation_synthetic_rows")
    plan["n_validation"] += plan["validation_synthetic_rows"].map(len)
    return plan


def _check_design(wanted, arms, models, validation):
    known = {*MODELS, *(f"{name}:faithful" for name in MODELS), *BASELINES.index}
    unknown = [m for m in models if m not in known and not re.match(r"(probe|ast):.", m)]
    if unknown or not wanted or not models:
        raise ValueError(
            f"models {list(models)}, arms {list(arms)}: models are {list(MODELS)}, each also with "
            f"':faithful', {list(BASELINES.index)}, 'probe:<embedding>' and 'ast:<checkpoint>'"
        )
    if validation not in ("real", "faithful", "none"):
        raise ValueError(f"validation must be 'real', 'faithful' or 'none', got {validation!r}")
    networks = [model for model in models if not _is_baseline(model)]
    if validation == "none" and networks:
        raise ValueError(f"{networks[0]} stops early and needs validation clips: use 'real'")
    for arm, _ in wanted:
        kind = arm_parts(arm)[0]
        if kind in (*_ON_THE_FLY, "steps") and len(networks) < len(models):
            other = next(model for model in models if _is_baseline(model))
            raise ValueError(f"the arm {kind} is a way to train networks; leave it or {other} out")


def _is_baseline(model):
    return model in BASELINES.index or model.startswith("probe:")


def _sources(wanted):
    """Names of the tables of synthetic clips that the arms call for."""
    parts = [arm_parts(arm) for arm, _ in wanted]
    named = [source.split("+") for kind, source, _ in parts if kind in _NEED_SYNTHETIC]
    return list(dict.fromkeys(name for names in named for name in names))


def _tables(generated, wanted):
    """Tables of synthetic clips by name; those that the arms need are there, or an error."""
    sources = _sources(wanted)
    if not sources:
        return {}
    if generated is None or not len(generated):
        raise ValueError("these arms need synthetic clips: run notebook 02_synthetic_generation")
    tables = generated if isinstance(generated, dict) else {"": generated}
    missing = [name for name in sources if name not in tables]
    if missing:
        raise ValueError(
            f"no table of synthetic clips is called {missing[0]!r}; there are {list(tables)}: ask "
            "for one as in 'both@name:1'"
        )
    return tables


def _folds_of(generator_folds, name):
    if isinstance(generator_folds, dict):
        return generator_folds.get(name)
    return generator_folds


def _refuse_leak(generated, test_folds, generator_folds):
    if not len(generated):
        raise ValueError("these arms need synthetic clips: run notebook 02_synthetic_generation")
    seen = sorted(set(test_folds) & {int(fold) for fold in generator_folds or ()})
    if seen:
        makers = ", ".join(sorted(set(generated.get("checkpoint", pd.Series(["?"])).astype(str))))
        raise LeakError(
            f"the generator of these clips ({makers}) was trained on fold {seen}, which is also a "
            "test fold: the test would reward copies of its own recordings. Test on a fold that the "
            "generator never saw, or generate with a checkpoint trained without it"
        )


def _rows_by_split(clips, fold):
    split = np.asarray(datasets.assign_splits(clips, fold))
    return {name: np.flatnonzero(split == name).tolist() for name in ("train", "val", "test")}


def _unit_seed(seed, model, fold, run):
    digest = hashlib.sha256(f"{seed}/{model}/{fold}/{run}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _spread_choice(clips, rows, per_class, rng):
    if per_class is None:
        return rows
    part = clips.iloc[rows].assign(row=rows, draw=rng.permutation(len(rows))).sort_values("draw")
    # first every fold's first clip of a class, then every fold's second, ...
    part["turn"] = part.groupby(["label", "fold"]).cumcount()
    chosen = part.sort_values(["turn", "draw"]).groupby("label").head(per_class)
    few = chosen["label"].value_counts()
    if (few < per_class).any():
        raise ValueError(
            f"real_per_class is {per_class}, but {few.idxmin()!r} has {few.min()} training clips: "
            "lower it, or leave it out to take all"
        )
    return sorted(chosen["row"].tolist())


def _pools(tables, fold, rng, seed):
    """Shuffled rows of each table and class, numbered through all tables."""
    pools, offset = {}, 0
    for name, table in tables.items():
        # each table has its own order, which no other table beside it changes
        chance = np.random.default_rng([*seed, zlib.crc32(name.encode())]) if name else rng
        order = chance.permutation(len(table))
        if "held_out_fold" in table:
            bound = table["held_out_fold"].to_numpy(dtype=float)[order]
            order = order[np.isnan(bound) | (bound == fold)]
        labels = table["label"].to_numpy()
        pools[name] = {
            label: (offset + order[labels[order] == label]).tolist()
            for label in sorted(set(labels))
        }
        offset += len(table)
    return pools


def _pool(pools, source, label):
    """Rows of one class; those of several tables in turn."""
    parts = [pools[name].get(label, []) for name in source.split("+")]
    if len(parts) == 1:
        return parts[0]
    turns = [(place, i, row) for i, part in enumerate(parts) for place, row in enumerate(part)]
    return [row for _, _, row in sorted(turns)]


def _usable(pools, synthetic, clips, real):
    """Pools without what was made from recordings that are not among these real clips."""
    if synthetic is None or "made_from" not in synthetic:
        return pools
    here = set(clips["clip_id"].astype(str).iloc[real])
    serves = [pd.isna(name) or str(name) in here for name in synthetic["made_from"]]
    return {
        source: {label: [row for row in rows if serves[row]] for label, rows in by_class.items()}
        for source, by_class in pools.items()
    }


def _draw(clips, real, beside, folds, pools, arm, amount, chance):
    """Rows of an arm's real and synthetic training clips, and of synthetic validation clips."""
    kind, source, _ = arm_parts(arm)
    labels, row_folds = clips["label"].to_numpy(), clips["fold"].to_numpy()
    leaves_out = kind in ("mixed", "dropped")
    if leaves_out and amount > len(folds):
        raise ValueError(f"{arm}:{amount:g} replaces more folds than the {len(folds)} in training")
    gone = set(folds[: int(amount)]) if leaves_out else set()
    kept = [row for row in real if row_folds[row] not in gone]
    if kind == "repeat":
        kept = sorted(kept + _repeated(labels, kept, amount, chance))
    if kind not in _NEED_SYNTHETIC:
        return kept, [], []
    base = [row for row in real if row_folds[row] in gone] if kind == "mixed" else real
    needed = _wanted(labels[base], 1.0 if kind == "mixed" else amount)
    further = _wanted(labels[beside], amount)
    added, held = {}, {}
    for label in sorted({*needed, *further}):
        n, m, pool = needed.get(label, 0), further.get(label, 0), _pool(pools, source, label)
        if n + m > len(pool):
            raise ValueError(
                f"{arm}:{amount:g} needs {n + m} synthetic clips of {label!r}, there are "
                f"{len(pool)}: generate more in notebook 02_synthetic_generation, or lower the "
                "ratio, the folds replaced or real_per_class"
            )
        added[label], held[label] = pool[:n], pool[n : n + m]
    if kind == "thinned":
        kept, added = _thinned(labels, kept, added, chance)
    made, made_beside = (list(chain.from_iterable(part.values())) for part in (added, held))
    return ([] if kind == "synthetic" else kept), made, made_beside


def _wanted(labels, times):
    counts = pd.Series(labels, dtype=object).value_counts()
    return {label: int(np.floor(times * count + 0.5)) for label, count in counts.items()}


def _repeated(labels, rows, times, chance):
    """`times` further copies of each row; of a fraction, as many of each class, drawn at random."""
    copies = []
    shuffled = chance.permutation(rows)
    for label, need in sorted(_wanted(labels[rows], times).items()):
        mine = [int(row) for row in shuffled if labels[row] == label]
        copies += (mine * -(-need // len(mine)))[:need]
    return copies


def _thinned(labels, real, added, chance):
    """Of each class as many clips as there are real ones, drawn from real and synthetic alike."""
    kept, kept_added = [], {}
    for label, made in added.items():
        mine = [row for row in real if labels[row] == label]
        drawn = sorted(chance.permutation(len(mine) + len(made))[: len(mine)])
        kept += [mine[i] for i in drawn if i < len(mine)]
        kept_added[label] = [made[i - len(mine)] for i in drawn if i >= len(mine)]
    return sorted(kept), kept_added


def run_arms(
    clips,
    generated,
    arms,
    *,
    models=("sbcnn", "crnn"),
    test_folds=(5,),
    runs=1,
    seed=0,
    epochs=100,
    batch_size=128,
    patience=15,
    patches_per_epoch=None,
    real_per_class=None,
    out_dir,
    generator_folds=None,
    workers=None,
    device="cpu",
    validation="real",
    embeddings=None,
    executor=None,
):
    """Train and test every arm, model, fold and run; resume where an earlier call was stopped.

    Each unit trains in one thread; units run side by side in processes of their own. The plan is
    printed first, and the time that it will take as soon as the first unit of a model is done.

    Parameters
    ----------
    clips, generated, arms, models, test_folds, runs, seed, real_per_class, generator_folds, validation
        See :func:`plan_units`.
    epochs, batch_size, patience, patches_per_epoch
        See :func:`train_classifier`. Models without epochs take no notice.
    out_dir : str or Path
        Gets ``features/`` (cache), ``units/`` (result, predictions and learning curve of each unit),
        ``results.csv``; ``predictions.csv``: `clip_id, label, predicted, arm, ratio, model, fold,
        run`; ``curves.csv``: `epoch, train_loss, validation_loss, validation_accuracy` and the same.
    workers : int, optional
        Processes; by default one a CPU core. With 1 all is done in this process.
    device : str or sequence of str, default "cpu"
        Where torch trains; units take turns on several, such as ``["cuda:0", "cuda:1"]``.
    embeddings : dict of str to Embedding, optional
        What ``"probe:<name>"`` reads, where :func:`embeddings.get_embedding` needs more than a name.
    executor : concurrent.futures.Executor, optional
        Runs the units in place of own processes: any that sees `out_dir` under the same path, such
        as that of a Dask cluster, ``distributed.Client(address).get_executor()``. Results do not
        depend on who computes them.

    Returns
    -------
    pandas.DataFrame
        Table *results*: `arm, model, backend, prompt_family, ratio, fold, run, seed, n_real,
        n_synthetic, accuracy, macro_f1, epochs, seconds`; accuracy and macro F1 from 0 to 1 on the
        real clips of the test fold.

    Raises
    ------
    LeakError, ValueError
        See :func:`plan_units`.
    audio.AudioError
        A clip cannot be read.
    OSError
        A transformer's checkpoint cannot be loaded.
    UnitsFailed
        Some units failed; the message names them, all others are done and kept.

    Examples
    --------
    >>> results = run_arms(clips, generated, ["real", "both:1"], out_dir="runs/try")  # doctest: +SKIP
    """
    out_dir = Path(out_dir).resolve()
    (out_dir / "units").mkdir(parents=True, exist_ok=True)
    clips = clips.reset_index(drop=True)
    plan = plan_units(
        clips,
        generated,
        arms,
        models=models,
        test_folds=test_folds,
        runs=runs,
        seed=seed,
        real_per_class=real_per_class,
        generator_folds=generator_folds,
        validation=validation,
    )
    if patches_per_epoch and plan["arm"].map(lambda arm: arm_parts(arm)[0] == "steps").any():
        raise ValueError(
            "patches_per_epoch gives every arm equal steps already; leave it or the arm 'steps' out"
        )
    tables = generated.values() if isinstance(generated, dict) else [generated]
    needed = plan["n_synthetic"].any()
    synthetic = pd.concat(tables, ignore_index=True) if needed else clips.iloc[:0]
    training = {"epochs": epochs, "batch_size": batch_size, "patience": patience}
    training |= {"patches_per_epoch": patches_per_epoch}
    kinds = list(dict.fromkeys(_input_kind(model) for model in models))
    shared = _gather(clips, synthetic, out_dir, workers, kinds, embeddings)
    units = [_complete(unit, shared, training) for unit in plan.to_dict("records")]
    missing = [unit for unit in units if not _is_done(out_dir, unit)]
    workers = min(workers or os.cpu_count(), max(1, len(missing)))
    _print_plan(plan, len(missing), "an executor" if executor else f"{workers} processes")
    places = [device] if isinstance(device, str) else list(device)
    failed = _train_units(missing, shared, out_dir, workers, places, executor)
    collected = _collect(out_dir, units)
    for name, table in collected.items():
        _write_whole(out_dir / f"{name}.csv", table.to_csv(index=False).encode())
    if failed:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise UnitsFailed(
            f"{len(failed)} of {len(units)} units failed; the others are kept in {out_dir}. "
            f"Run again to repeat only these:\n{listed}"
        )
    return collected["results"]


def _gather(clips, synthetic, out_dir, workers, kinds, embedded):
    """Put features, labels and identities of all clips into one place: real first, then synthetic."""
    paths = [*clips["path"], *synthetic["path"]]
    read = {kind: _inputs(kind, paths, out_dir / "features", workers, embedded) for kind in kinds}
    classes = sorted(set(clips["label"]))
    labels = [*clips["label"], *synthetic["label"]]
    number = {label: i for i, label in enumerate(classes)}
    return {
        "x": {kind: x for kind, (x, _) in read.items()},
        "y": np.array([number.get(label, -1) for label in labels], dtype=np.int64),
        "keys": {kind: keys for kind, (_, keys) in read.items()},
        "classes": classes,
        "clip_ids": [str(name) for name in clips["clip_id"]],
        "n_real": len(clips),
        "source": {
            name: ["" if pd.isna(value) else str(value) for value in synthetic[name]]
            if name in synthetic
            else []
            for name in ("backend", "prompt_family")
        },
    }


def _complete(unit, shared, training):
    """Add to a planned unit its training rows, its source and the key of all that it depends on."""
    offset = shared["n_real"]
    beside = unit.get("validation_synthetic_rows", [])
    rows = {
        "train": unit["real_rows"] + [offset + row for row in unit["synthetic_rows"]],
        "validation": unit["validation_rows"] + [offset + row for row in beside],
        "test": unit["test_rows"],
    }
    named = ("arm", "ratio", "model", "fold", "run", "seed", "n_real", "n_synthetic")
    source = {
        name: "+".join(sorted({values[row] for row in unit["synthetic_rows"]})) if values else ""
        for name, values in shared["source"].items()
    }
    keys = shared["keys"][_input_kind(unit["model"])]
    content = {
        name: [(keys[row], int(shared["y"][row])) for row in part] for name, part in rows.items()
    }
    if arm_parts(unit["arm"])[0] == "steps":
        longer = {
            name: round(training[name] * (1 + unit["ratio"])) for name in ("epochs", "patience")
        }
        training = training | longer
    about = {name: unit[name] for name in named} | source | training
    kept = [about, content, shared["classes"], [shared["clip_ids"][row] for row in rows["test"]]]
    digest = hashlib.sha256(json.dumps([_RECIPE, kept]).encode()).hexdigest()[:12]
    name = "{arm}-{ratio:g}-{model}-fold{fold}-run{run}".format(**unit)
    # a checkpoint's path can be long, and file names end at 255 bytes
    file = re.sub(r"[^\w.@+-]", "_", name)[:150]
    return {"name": name, "key": f"{file}-{digest}", "about": about, "rows": rows}


def _unit_file(out_dir, unit, ending):
    return out_dir / "units" / f"{unit['key']}.{ending}"


def _is_done(out_dir, unit):
    # the JSON is written last, so its presence means that the pair is complete
    return _unit_file(out_dir, unit, "json").is_file()


def _print_plan(plan, missing, where):
    counts = ["arm", "ratio", "n_real", "n_synthetic", "n_validation", "n_test"]
    table = plan.groupby(counts, sort=False).size().rename("classifiers").reset_index()
    print(table.to_string(index=False))
    kept = len(plan) - missing
    print(f"{len(plan)} classifiers: {missing} to train in {where}, {kept} kept")


# torch's random state belongs to the process: two units at once would draw from each other's
_ONE_UNIT = threading.Lock()


def _work(unit, shared_dir, out_dir, device):
    with _ONE_UNIT, _one_thread():
        return _attempt(unit, _open_shared(shared_dir), out_dir, device)


@contextlib.contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _open_shared(folder):
    shared = json.loads((folder / "shared.json").read_text())
    # mapped, not read: all workers of a machine look at one copy
    x = {
        kind: np.load(folder / f"x{i}.npy", mmap_mode="r") for i, kind in enumerate(shared["kinds"])
    }
    return shared | {"x": x, "y": np.load(folder / "y.npy")}


def _share(shared, folder):
    for i, x in enumerate(shared["x"].values()):
        np.save(folder / f"x{i}.npy", x)
    np.save(folder / "y.npy", shared["y"])
    small = {name: shared[name] for name in ("classes", "clip_ids")} | {"kinds": list(shared["x"])}
    (folder / "shared.json").write_text(json.dumps(small))


def _start_worker():
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # a worker whose parent was killed would otherwise wait, and hold its memory, for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def _attempt(unit, shared, out_dir, device):
    """Train, test and write one unit; give back what went wrong, or None."""
    try:
        _run_unit(unit, shared, out_dir, device)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return None


def _run_unit(unit, shared, out_dir, device):
    started = time.perf_counter()
    about = unit["about"]
    x = shared["x"][_input_kind(about["model"])]
    parts = {name: (np.array(x[rows]), shared["y"][rows]) for name, rows in unit["rows"].items()}
    classify = _fit_and_classify if _is_baseline(about["model"]) else _train_and_classify
    chosen, log = classify(about, parts, len(shared["classes"]), device)
    names = np.array(shared["classes"])
    predictions = pd.DataFrame(
        {
            "clip_id": [shared["clip_ids"][row] for row in unit["rows"]["test"]],
            "label": names[parts["test"][1]],
            "predicted": names[chosen],
        }
    )
    result = about | _accuracies(parts["test"][1], chosen, len(names))
    result |= {"epochs": len(log), "seconds": round(time.perf_counter() - started, 3)}
    for ending, table in (("log.csv", log), ("csv", predictions)):
        _write_whole(_unit_file(out_dir, unit, ending), table.to_csv(index=False).encode())
    _write_whole(_unit_file(out_dir, unit, "json"), json.dumps(result, indent=1).encode())


def _train_and_classify(about, parts, n_classes, device):
    kind = arm_parts(about["arm"])[0]
    network, log = train_classifier(
        about["model"],
        parts["train"],
        parts["validation"],
        n_classes,
        epochs=about["epochs"],
        batch_size=about["batch_size"],
        patience=about["patience"],
        patches_per_epoch=about["patches_per_epoch"],
        seed=about["seed"],
        device=device,
        augment=(kind, about["ratio"]) if kind in _ON_THE_FLY else None,
    )
    # the released code tests clip by clip
    found = _probabilities(about["model"], network, parts["test"][0], about["seed"], 1)
    return found.argmax(axis=1), log


def _fit_and_classify(about, parts, n_classes, device):
    fitted = fit_baseline(about["model"].partition(":")[0], *parts["train"], about["seed"])
    return fitted.predict(parts["test"][0]), pd.DataFrame(columns=_LOG_COLUMNS)


def _accuracies(truth, chosen, n_classes):
    from sklearn.metrics import f1_score

    f1 = f1_score(truth, chosen, labels=range(n_classes), average="macro", zero_division=0)
    return {"accuracy": float((truth == chosen).mean()), "macro_f1": float(f1)}


def _train_units(units, shared, out_dir, workers, devices, executor):
    from tqdm import tqdm

    if executor is not None:
        outcomes = partial(_in_executor, executor=executor)
    else:
        outcomes = _here if workers == 1 else partial(_in_processes, workers=workers)
    failed, timed = {}, set()
    # disable=None: a bar on a terminal, nothing in a notebook or a log
    with tqdm(total=len(units), unit="classifier", disable=None, leave=False) as bar:
        for unit, reason in outcomes(units, shared, out_dir, devices):
            bar.update()
            model = unit["about"]["model"]
            if reason:
                failed[unit["name"]] = reason
                tqdm.write(f"failed, going on: {unit['name']}: {reason}")
            elif model not in timed:
                timed.add(model)
                same = [other for other in units if other["about"]["model"] == model]
                tqdm.write(_estimate(unit, same, out_dir, 1 if executor else workers))
    return failed


def _estimate(unit, units, out_dir, workers):
    """Time of a model's other units, from its first: so much for each training clip and epoch."""
    took = json.loads(_unit_file(out_dir, unit, "json").read_text())["seconds"]
    clips = {other["name"]: max(1, len(other["rows"]["train"])) for other in units}
    rest = took * (sum(clips.values()) / clips[unit["name"]] - 1) / min(workers, len(units))
    about = f"{rest / 60:.0f} min" if rest > 90 else f"{rest:.0f} s"
    side = f", {workers} side by side" if workers > 1 else ""
    model = unit["about"]["model"]
    return f"{model}: the first took {took:.1f} s; about {about} for {len(units) - 1} more{side}"


def _here(units, shared, out_dir, devices):
    with _one_thread():
        for i, unit in enumerate(units):
            yield unit, _attempt(unit, shared, out_dir, devices[i % len(devices)])


def _in_processes(units, shared, out_dir, devices, workers):
    # spawn: a process forked from one that has run torch can hang
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield from _in_executor(units, shared, out_dir, devices, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_executor(units, shared, out_dir, devices, executor):
    # the longest first, so that no core waits for another at the end
    units = sorted(units, key=lambda u: (u["about"]["model"] != "crnn", -len(u["rows"]["train"])))
    with tempfile.TemporaryDirectory(dir=out_dir, prefix="shared-") as folder:
        _share(shared, Path(folder))
        waiting = {
            executor.submit(_work, unit, Path(folder), out_dir, devices[i % len(devices)]): unit
            for i, unit in enumerate(units)
        }
        try:
            for future in as_completed(waiting):
                try:
                    yield waiting[future], future.result()
                except BrokenExecutor:
                    yield waiting[future], "its process was killed (too little memory?)"
                except Exception as error:
                    yield waiting[future], f"its worker was lost ({type(error).__name__}: {error})"
        finally:
            for future in waiting:
                future.cancel()


def _collect(out_dir, units):
    """Results, predictions and learning curves of all units that are done."""
    results, predictions, curves = [], [], []
    for unit in (unit for unit in units if _is_done(out_dir, unit)):
        result = json.loads(_unit_file(out_dir, unit, "json").read_text())
        results.append(result)
        where = {name: result[name] for name in ("arm", "ratio", "model", "fold", "run")}
        # a class may be called "None" or "NA"
        one = pd.read_csv(_unit_file(out_dir, unit, "csv"), dtype=str, keep_default_na=False)
        predictions.append(one.assign(**where))
        log = _unit_file(out_dir, unit, "log.csv")
        if log.is_file() and result["epochs"]:
            curves.append(pd.read_csv(log).assign(**where))
    where = ["arm", "ratio", "model", "fold", "run"]
    return {
        "results": pd.DataFrame(results, columns=RESULT_COLUMNS),
        "predictions": _stacked(predictions, ["clip_id", "label", "predicted", *where]),
        "curves": _stacked(curves, [*_LOG_COLUMNS, *where]),
    }


def _stacked(tables, columns):
    together = pd.concat(tables) if tables else pd.DataFrame(columns=columns)
    return together.reset_index(drop=True)


# --- reading the results -------------------------------------------------------------------------


def summarise(results):
    """Mean accuracy of each arm and model with two intervals.

    Parameters
    ----------
    results : pandas.DataFrame
        Table *results* of :func:`run_arms`.

    Returns
    -------
    pandas.DataFrame
        `arm, ratio, model, backend, prompt_family, n, accuracy, half_width, ci_low, ci_high, macro_f1,
        n_real, n_synthetic`. `n` counts trained classifiers (folds × runs); `half_width` is
        1.96·SD/√n, as the paper draws its error bars over runs; `ci_low` and `ci_high` are a 95 %
        bootstrap interval of the mean. With one classifier there is no interval (NaN).

    Notes
    -----
    With few folds, both intervals tell how results scatter over seeds and these folds, not over
    all recordings that could have been tested.

    Examples
    --------
    >>> one = dict.fromkeys(RESULT_COLUMNS, 0) | {"accuracy": 0.5}
    >>> summarise(pd.DataFrame([one, one]))[["n", "accuracy", "half_width"]].values.tolist()
    [[2.0, 0.5, 0.0]]
    """
    rows = []
    keys = ["arm", "ratio", "model", "backend", "prompt_family"]
    for group, part in results.fillna({"backend": "", "prompt_family": ""}).groupby(
        keys, sort=False
    ):
        values = part["accuracy"].to_numpy()
        half, low, high = np.nan, np.nan, np.nan
        if len(values) > 1:
            half, (low, high) = stats.mean_interval(values)[1], stats.bootstrap_ci(values)
        rows.append(
            dict(zip(keys, group, strict=True))
            | {"n": len(values), "accuracy": values.mean(), "half_width": half}
            | {"ci_low": low, "ci_high": high, "macro_f1": part["macro_f1"].mean()}
            | {name: round(part[name].mean()) for name in ("n_real", "n_synthetic")}
        )
    return pd.DataFrame(rows)


def intervals(predictions, clips=None):
    """Accuracy of each arm and model with the paper's interval and with one for other recordings.

    Parameters
    ----------
    predictions : pandas.DataFrame
        ``predictions.csv`` of :func:`run_arms`.
    clips : pandas.DataFrame, optional
        Table *clips*: clips of one `source_id` are then drawn together. Without it each clip counts
        as a recording of its own.

    Returns
    -------
    pandas.DataFrame
        `arm, ratio, model, n_folds, n_runs, n_clips, n_sources, accuracy` (mean over folds, then
        runs); `half_width`, 1.96·SD/√runs of the runs' means, as the paper has it: how training
        scatters (NaN of one run); `ci_low, ci_high`, 95 % bootstrap over folds and, within them,
        sources: what other recordings could give.

    Raises
    ------
    ValueError
        A clip of `predictions` is not in `clips`.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": [4, 4, 5, 5], "label": "dog"})
    >>> one = one.assign(predicted=["dog", "rain", "dog", "dog"], arm="real", ratio=0.0, model="svm")
    >>> intervals(one.assign(run=0))[["n_folds", "n_runs", "accuracy"]].values.tolist()
    [[2.0, 1.0, 0.75]]
    """
    table = _recognised(predictions, clips)
    rows = []
    keys = ["arm", "ratio", "model"]
    for group, part in table.groupby(keys, sort=False):
        runs = part.groupby(["run", "fold"])["right"].mean().groupby("run").mean()
        each = part.groupby(["fold", "source_id", "clip_id"], sort=False)["right"].mean()
        each = each.reset_index()
        low, high = stats.nested_bootstrap_ci(each["right"], each["fold"], each["source_id"])
        half = stats.mean_interval(runs)[1] if len(runs) > 1 else np.nan
        rows.append(
            dict(zip(keys, group, strict=True))
            | {"n_folds": each["fold"].nunique(), "n_runs": len(runs), "n_clips": len(each)}
            | {"n_sources": each["source_id"].nunique(), "accuracy": runs.mean()}
            | {"half_width": half, "ci_low": low, "ci_high": high}
        )
    return pd.DataFrame(rows)


def _recognised(predictions, clips):
    """Predictions with `right` (1.0 or 0.0) and the recording that each clip was cut from."""
    names = predictions["clip_id"].astype(str)
    right = (predictions["label"] == predictions["predicted"]).astype(float)
    source = names
    if clips is not None:
        source = names.map(dict(zip(clips["clip_id"].astype(str), clips["source_id"], strict=True)))
        if source.isna().any():
            raise ValueError(
                f"{source.isna().sum()} tested clips are not in the table of clips, such as "
                f"{names[source.isna()].iloc[0]!r}; give the table that the arms were run on"
            )
    return predictions.assign(clip_id=names, right=right, source_id=source)


_PAIRS = {
    "clip": ["fold", "clip_id"],
    "source": ["fold", "source_id"],
    "fold": ["fold"],
    "run": ["fold", "run"],
}


def compare(predictions, arm, ratio, against=("real", 0.0), by="clip", clips=None):
    """Test one arm against another on the same recordings, model by model.

    Each test clip gives one pair: how often it was recognised, over the runs, in either arm.

    Parameters
    ----------
    predictions : pandas.DataFrame
        ``predictions.csv`` of :func:`run_arms`.
    arm : str
        Arm to test.
    ratio : float
        Its ratio or number of folds.
    against : tuple of (str, float), default ("real", 0.0)
        The arm to compare with.
    by : {"clip", "source", "fold", "run"}
        What makes a pair: a test clip; a recording with all clips cut from it (needs `clips`); a
        fold; each training of a fold.
    clips : pandas.DataFrame, optional
        Table *clips*, for its `source_id`.

    Returns
    -------
    pandas.DataFrame
        One row a model: `arm, ratio, model` and what :func:`stats.paired_test` says: `n` pairs,
        `difference` of the accuracies (`arm` minus `against`), its interval, `effect`, `p_value`, …

    Raises
    ------
    ValueError
        The two arms share no test clip; unknown `by`; sources wanted without `clips`.

    Notes
    -----
    Clips and sources answer for other recordings and these trained classifiers; folds answer for
    other recordings and trainings, but five of them reach no p-value below 0.06; runs answer for
    other seeds on these recordings. Several comparisons at once need a correction, see
    :func:`compare_all`.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "dog"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> compare(pd.concat([real, both]), "both", 1.0)["difference"].tolist()
    [0.0]
    """
    if by not in _PAIRS or (by == "source" and clips is None):
        raise ValueError(f"by is one of {', '.join(_PAIRS)}, got {by!r}; 'source' needs clips")
    table = _recognised(predictions, clips)
    pairs = _paired(table, (arm, ratio), against, ["model", *_PAIRS[by]])
    return pd.DataFrame(
        {"arm": arm, "ratio": ratio, "model": model} | stats.paired_test(part["a"], part["b"])
        for model, part in pairs.groupby("model", sort=False)
    )


def _paired(table, arm, against, keys):
    """Mean of `right` of two arms, side by side on what both have; columns a and b."""
    sides = []
    for name, amount in (arm, against):
        found = table[(table["arm"] == name) & (table["ratio"] == amount)]
        sides.append(found.groupby(keys, sort=False)["right"].mean())
    pairs = pd.concat(sides, axis=1, join="inner", keys=["a", "b"])
    if pairs.empty:
        raise ValueError(f"{arm[0]}:{arm[1]:g} and {against[0]} share no test clip; were both run?")
    return pairs


def compare_all(predictions, against=("real", 0.0), by="clip", clips=None):
    """Test every arm against one, and correct for their number.

    Parameters
    ----------
    predictions, against, by, clips
        See :func:`compare`.

    Returns
    -------
    pandas.DataFrame
        Rows of :func:`compare` for all other arms, with `p_holm`, the p-value after Holm's
        correction over all rows (:func:`stats.holm`), and `verdict`: "better", "worse" or
        "no difference shown" at 5 %.

    Raises
    ------
    ValueError
        See :func:`compare`; there is no other arm.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "dog"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> compare_all(pd.concat([real, both]))["verdict"].tolist()
    ['no difference shown']
    """
    arms = predictions[["arm", "ratio"]].drop_duplicates().itertuples(index=False, name=None)
    others = [arm for arm in arms if arm != tuple(against)]
    if not others:
        raise ValueError(f"there is no arm but {against[0]}; nothing to compare")
    table = [compare(predictions, *arm, against=against, by=by, clips=clips) for arm in others]
    table = pd.concat(table, ignore_index=True)
    table["p_holm"] = stats.holm(table["p_value"])
    direction = np.where(table["difference"] > 0, "better", "worse")
    table["verdict"] = np.where(table["p_holm"] < 0.05, direction, "no difference shown")
    return table


def mcnemar_runs(predictions, arm, ratio, against=("real", 0.0)):
    """McNemar's test of two arms for each model and run: pairs of single classifiers.

    Parameters
    ----------
    predictions, arm, ratio, against
        See :func:`compare`.

    Returns
    -------
    pandas.DataFrame
        One row a model and run, over all folds: `arm, ratio, model, run`, what
        :func:`stats.mcnemar` says (clips that one arm alone recognises, `odds_ratio` with its
        interval, `p_value`), and `p_holm` over all rows.

    Raises
    ------
    ValueError
        The two arms share no test clip.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "rain"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> both = both.assign(predicted="dog")
    >>> mcnemar_runs(pd.concat([real, both]), "both", 1.0)[["only_a", "only_b"]].values.tolist()
    [[2, 0]]
    """
    table = _recognised(predictions, None)
    pairs = _paired(table, (arm, ratio), against, ["model", "run", "fold", "clip_id"])
    tests = pd.DataFrame(
        {"arm": arm, "ratio": ratio, "model": model, "run": run}
        | stats.mcnemar(part["a"], part["b"])
        for (model, run), part in pairs.groupby(["model", "run"], sort=False)
    )
    return tests.assign(p_holm=stats.holm(tests["p_value"]))


def class_deltas(predictions, arm, ratio, model, against=("real", 0.0), clips=None):
    """How much each class gains or loses from one arm to another.

    Parameters
    ----------
    predictions, arm, ratio, against, clips
        See :func:`compare`.
    model : str
        Which classifiers.

    Returns
    -------
    pandas.DataFrame
        `label, n` clips, `accuracy` in `arm` and `accuracy_against`, their `difference` with a 95 %
        bootstrap interval `ci_low, ci_high` over folds and sources (NaN of a single recording),
        `p_value` over clips (NaN of a single one), and `p_holm` over the classes.

    Raises
    ------
    ValueError
        The two arms share no test clip of `model`.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "rain"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> both = both.assign(predicted="dog")
    >>> class_deltas(pd.concat([real, both]), "both", 1.0, "sbcnn")["difference"].tolist()
    [0.5]
    """
    table = _recognised(predictions[predictions["model"] == model], clips)
    keys = ["label", "fold", "source_id", "clip_id"]
    pairs = _paired(table, (arm, ratio), against, keys).reset_index()
    rows = []
    for label, part in pairs.groupby("label"):
        change = part["a"] - part["b"]
        low = high = p_value = np.nan
        if len(part) > 1:
            p_value = stats.paired_test(part["a"], part["b"])["p_value"]
        if len(part["source_id"].unique()) > 1:
            low, high = stats.nested_bootstrap_ci(change, part["fold"], part["source_id"])
        rows.append(
            {"label": label, "n": len(part), "accuracy": part["a"].mean()}
            | {"accuracy_against": part["b"].mean(), "difference": change.mean()}
            | {"ci_low": low, "ci_high": high, "p_value": p_value}
        )
    return _with_holm(pd.DataFrame(rows))


def _with_holm(table):
    tested = table["p_value"].notna()
    table = table.assign(p_holm=np.nan)
    if tested.any():
        table.loc[tested, "p_holm"] = stats.holm(table.loc[tested, "p_value"])
    return table


def confusion_difference(predictions, arm, ratio, model, against=("real", 0.0)):
    """What one arm takes each class for more often than another: difference of the shares.

    Parameters
    ----------
    predictions, arm, ratio, against
        See :func:`compare`.
    model : str
        Which classifiers.

    Returns
    -------
    pandas.DataFrame of float
        Rows: true class; columns: predicted class; −1 to 1. Rows sum to 0; a gain stands on the
        diagonal.

    Raises
    ------
    ValueError
        There are no such predictions.

    Examples
    --------
    >>> one = {"label": ["a", "b"], "arm": ["real", "both"], "ratio": [0.0, 1.0], "model": "svm"}
    >>> table = pd.DataFrame(one | {"predicted": ["a", "a"]})
    >>> confusion_difference(table, "both", 1.0, "svm").loc["b"].tolist()
    [1.0, 0.0]
    """
    shares = []
    for name, amount in ((arm, ratio), against):
        counts = confusion(predictions, name, amount, model)
        shares.append(counts.div(counts.sum(axis=1).clip(lower=1), axis=0))
    return shares[0] - shares[1]


def class_correlation(scores, deltas, method="spearman", n=10_000, seed=0):
    """Does a distance of the synthetic clips, class by class, foretell what they are worth?

    Parameters
    ----------
    scores : pandas.DataFrame
        Table *scores* with one row a class: `reference` is the class; `metric, embedding, candidate,
        value` (such as FAD or KAD of the class).
    deltas : pandas.DataFrame
        Of :func:`class_deltas`: `label, difference`.
    method, n, seed
        See :func:`stats.correlation`.

    Returns
    -------
    pandas.DataFrame
        `metric, embedding, candidate`, number of classes `n`, `r` with its 95 % interval `ci_low,
        ci_high`, `p_value` and `p_holm` over the rows. A useful distance has r below 0.

    Raises
    ------
    ValueError
        Fewer than four classes in common, or a column that does not vary.

    Examples
    --------
    >>> scores = pd.DataFrame({"reference": list("abcd"), "value": [4.0, 3.0, 2.0, 1.0]})
    >>> scores = scores.assign(metric="FAD", embedding="yamnet", candidate="mini")
    >>> deltas = pd.DataFrame({"label": list("abcd"), "difference": [0.0, 0.1, 0.2, 0.3]})
    >>> class_correlation(scores, deltas)["r"].tolist()
    [-1.0]
    """
    both = scores.merge(deltas, left_on="reference", right_on="label", suffixes=("_score", ""))
    keys = ["metric", "embedding", "candidate"]
    if both.empty:
        raise ValueError("scores and deltas have no class in common; scores need one row a class")
    rows = [
        dict(zip(keys, group, strict=True))
        | stats.correlation(part["value"], part["difference"], method, n, seed)
        for group, part in both.groupby(keys, sort=False)
    ]
    return _with_holm(pd.DataFrame(rows))


def confusion(predictions, arm, ratio, model):
    """Count what each class was taken for, over all folds and runs of one arm and model.

    Parameters
    ----------
    predictions : pandas.DataFrame
        ``predictions.csv`` of :func:`run_arms`.
    arm, ratio, model
        Which classifiers.

    Returns
    -------
    pandas.DataFrame of int
        Rows: true class; columns: predicted class; same order.

    Raises
    ------
    ValueError
        There are no such predictions.

    Examples
    --------
    >>> one = {"label": ["a", "b"], "predicted": ["a", "a"], "arm": "real", "ratio": 0.0}
    >>> confusion(pd.DataFrame(one | {"model": "sbcnn"}), "real", 0.0, "sbcnn").values.tolist()
    [[1, 0], [1, 0]]
    """
    names = sorted(set(predictions["label"]))
    part = predictions[
        (predictions["arm"] == arm)
        & (predictions["ratio"] == ratio)
        & (predictions["model"] == model)
    ]
    if part.empty:
        raise ValueError(f"no predictions of arm {arm}:{ratio:g} with {model}; was it run?")
    counts = pd.crosstab(part["label"], part["predicted"])
    return counts.reindex(index=names, columns=names, fill_value=0)


def class_consistency(train, generated, held_out, seed=0):
    """Ask a judge trained on real clips which class the generated clips belong to.

    The judge is a logistic regression on standardised features. Its accuracy on held-out real clips
    is the ceiling against which its agreement with the generated clips' labels is read.

    Parameters
    ----------
    train, generated, held_out : tuple of (np.ndarray (clips, dims), sequence of str (clips,))
        Features (any embedding) and labels: real training clips, generated clips, real clips of a
        fold that neither judge nor generator saw.
    seed : int, default 0
        Of the solver.

    Returns
    -------
    pandas.DataFrame
        Columns `label, held_out, generated, n_held_out, n_generated`: accuracy from 0 to 1 of each
        class, then of all clips (label ``"all"``).

    Raises
    ------
    ValueError
        A set is empty, or the features differ in width.

    Examples
    --------
    >>> x, y = np.eye(4), ["a", "a", "b", "b"]
    >>> class_consistency((x, y), (x, y), (x, y))["generated"].tolist()
    [1.0, 1.0, 1.0]
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    widths = {np.shape(part[0])[1:] for part in (train, generated, held_out)}
    if len(widths) > 1 or min(len(part[1]) for part in (train, generated, held_out)) == 0:
        raise ValueError(f"the three sets need clips and equally wide features, got {widths}")
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed))
    judge.fit(train[0], np.asarray(train[1], dtype=str))
    columns = {}
    for name, (x, labels) in (("held_out", held_out), ("generated", generated)):
        labels = np.asarray(labels, dtype=str)
        right = pd.Series(judge.predict(x) == labels)
        by_class = right.groupby(labels).agg(["mean", "size"])
        by_class.loc["all"] = right.mean(), len(right)
        columns |= {name: by_class["mean"], f"n_{name}": by_class["size"]}
    table = pd.DataFrame(columns).rename_axis("label").drop("all")
    table.loc["all"] = {name: column["all"] for name, column in columns.items()}
    counts = {name: "Int64" for name in table if name.startswith("n_")}
    order = ["label", "held_out", "generated", "n_held_out", "n_generated"]
    return table.astype(counts).reset_index()[order]


# Accuracy in per cent. Columns: SB-CNN at 1 2 3 4 (or 1 … 8 folds replaced), then CRNN.
_PUBLISHED = """
both AudioGen simple: 68.42 69.79 69.73 70.06 / 65.18 66.00 66.66 67.49
both AudioGen gpt: 68.88 68.36 68.16 68.74 / 65.39 66.16 66.54 66.86
both AudioLDM2 simple: 68.04 68.70 68.61 68.89 / 63.41 63.73 64.74 64.34
both AudioLDM2 gpt: 69.64 70.68 71.10 70.66 / 64.69 63.72 62.80 64.12
synthetic AudioGen simple: 40.32 48.14 49.28 49.72 / 38.79 45.02 45.31 47.32
synthetic AudioGen gpt: 46.04 48.13 49.62 49.33 / 43.96 44.66 46.24 46.89
synthetic AudioLDM2 simple: 38.81 41.34 42.60 42.98 / 36.11 38.58 38.97 39.27
synthetic AudioLDM2 gpt: 38.49 40.46 41.48 42.09 / 32.86 35.08 35.10 35.21
mixed AudioGen simple: 64.52 63.05 60.68 59.86 56.45 49.69 43.81 30.50 / \
62.34 61.04 58.93 56.98 55.49 51.82 47.90 39.85
mixed AudioGen gpt: 63.41 63.53 62.61 61.27 57.95 54.46 49.18 39.74 / \
62.39 61.57 59.94 59.58 56.34 53.92 51.31 44.92
mixed AudioLDM2 simple: 64.56 63.00 61.67 59.55 58.10 53.00 45.51 29.96 / \
60.22 59.62 58.23 57.13 53.69 50.47 46.58 35.69
mixed AudioLDM2 gpt: 64.34 63.38 63.46 61.87 59.85 58.05 51.05 36.91 / \
61.80 60.11 59.03 57.78 55.68 52.61 46.02 33.62
"""


def published():
    """Accuracies that the paper prints for UrbanSound8K (10 folds, mean of 5 runs).

    Returns
    -------
    pandas.DataFrame
        `arm, ratio, model, backend, prompt_family, accuracy` (0 to 1), as in the table of
        :func:`summarise`, and `half_width`, the margin (95 %), which the tables used here give for
        real clips only.

    Notes
    -----
    Source: Ronchini, Comanducci and Antonacci, arXiv 2403.17864. They were measured with the
    released code, see the top of this module.

    Examples
    --------
    >>> published().query("arm == 'real'").accuracy.tolist()
    [0.6468, 0.627]
    """
    rows = [("real", 0.0, "sbcnn", "", "", 0.6468, 0.0082)]
    rows += [("real", 0.0, "crnn", "", "", 0.6270, 0.0065)]
    for line in _PUBLISHED.strip().splitlines():
        about, values = line.split(":")
        arm, backend, family = about.split()
        for model, series in zip(MODELS, values.split("/"), strict=True):
            for amount, value in enumerate(series.split(), start=1):
                accuracy = round(float(value) / 100, 4)
                rows.append((arm, float(amount), model, backend, family, accuracy, np.nan))
    columns = ["arm", "ratio", "model", "backend", "prompt_family", "accuracy", "half_width"]
    return pd.DataFrame(rows, columns=columns)


# --- command line --------------------------------------------------------------------------------


def main(argv):
    """Run a study from the command line: plan, train, intervals, tests.

    Parameters
    ----------
    argv : list of str
        Arguments; see ``--help``.

    Returns
    -------
    int
        Exit status: 0, 1 where units failed, 2 for a study that cannot be run.
    """
    options = _parser().parse_args(argv)
    try:
        return _study(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UnitsFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m soundscapes_utils esc",
        description="Train classifiers of real recordings on arms of real and synthetic clips, "
        "with intervals and tests. The same command again resumes.",
    )
    say = parser.add_argument
    say("--dataset", default="embedded", choices=list(PROTOCOLS.index))
    say("--root", default="", help="folder of ESC-50, ESC-10 or UrbanSound8K")
    say("--data-dir", default="data", help="where the embedded sounds are kept")
    say("--out", default="runs/esc", help="folder of units and tables")
    say("--arms", nargs="+", default=["real"], help="such as real both:1 repeat:1 both@ps1:4")
    say("--models", nargs="+", default=["sbcnn", "crnn"])
    say("--test-folds", nargs="+", type=int, help="all by default")
    say("--runs", type=int, default=5)
    say("--seed", type=int, default=0)
    say("--epochs", type=int, default=100)
    say("--patience", type=int, default=15)
    say("--batch-size", type=int, default=128)
    say("--patches-per-epoch", type=int)
    say("--real-per-class", type=int)
    say("--validation", default="real", choices=["real", "faithful", "none"])
    say("--generated", nargs="+", default=[], metavar="[NAME=]CSV", help="synthetic clips")
    say("--generator-folds", nargs="+", type=int, help="folds that their generator learnt from")
    say("--transforms", nargs="+", default=[], choices=list(TRANSFORMS), help="sources to make")
    say("--yamnet", default="", help="YAMNet's TFLite file, for probe:yamnet")
    say("--workers", type=int)
    say("--device", nargs="+", default=["cpu"])
    say("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster that runs the units")
    say("--plan", action="store_true", help="print protocol and plan, train nothing")
    return parser


def _study(options):
    place = {"urbansound8k": "urbansound8k_root"}.get(options.dataset, "esc50_root")
    clips = datasets.load_clips(options.dataset, data_dir=options.data_dir, **{place: options.root})
    folds = protocol(clips)
    print(folds.to_string(index=False))
    generated = _read_generated(options.generated)
    for effect in options.transforms:
        folder = Path(options.out) / "transforms" / effect
        generated[effect] = transform_clips(clips, effect, folder, options.workers)
    makers = {name: options.generator_folds for name in generated if name not in options.transforms}
    design = {
        "models": options.models,
        "test_folds": options.test_folds or folds["test_fold"].tolist(),
        "generator_folds": makers,
    }
    shared = ("runs", "seed", "real_per_class", "validation")
    design |= {name: getattr(options, name) for name in shared}
    if options.plan:
        plan = plan_units(clips, generated, options.arms, **design)
        _print_plan(plan, len(plan), "as many processes as are given")
        return 0
    trained = ("epochs", "patience", "batch_size", "patches_per_epoch", "workers", "device")
    with _executor(options.dask) as executor:
        run_arms(
            clips,
            generated,
            options.arms,
            **design,
            **{name: getattr(options, name) for name in trained},
            embeddings=_yamnet(options.yamnet),
            executor=executor,
            out_dir=options.out,
        )
    _print_tables(Path(options.out), clips)
    return 0


def _read_generated(named):
    tables = {}
    for text in named:
        name, _, path = text.rpartition("=")
        table = pd.read_csv(
            path, keep_default_na=False, na_values={name: [""] for name in _BINDING}
        )
        folder = Path(path).parent
        # a table may name its clips relative to itself
        table["path"] = [str(p if Path(p).is_file() else folder / p) for p in table["path"]]
        tables[name] = table
    return tables


def _yamnet(path):
    from soundscapes_utils import embeddings

    return {"yamnet": embeddings.get_embedding("yamnet", path)} if path else None


@contextlib.contextmanager
def _executor(address):
    if not address:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError("a Dask cluster needs the package distributed: pip install it") from error
    with Client(address) as client:
        yield client.get_executor()


def _print_tables(out_dir, clips):
    text = {"clip_id": str, "label": str, "predicted": str}
    predictions = pd.read_csv(out_dir / "predictions.csv", dtype=text, keep_default_na=False)
    tables = {"intervals": intervals(predictions, clips)}
    if (
        len(tables["intervals"][["arm", "ratio"]].drop_duplicates()) > 1
        and (predictions["arm"] == "real").any()
    ):
        tables["tests"] = compare_all(predictions, by="source", clips=clips)
    for name, table in tables.items():
        print(f"\n{name}")
        print(table.round(4).to_string(index=False))
        _write_whole(out_dir / f"{name}.csv", table.to_csv(index=False).encode())
