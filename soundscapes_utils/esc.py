"""Environmental sound classification: does synthetic audio help a classifier of real recordings?

Two networks, SB-CNN and CRNN, are trained in *arms*: on real clips, on real and synthetic ones, with
some real training folds replaced by synthetic clips, on synthetic clips only. Whatever the arm,
validation and test are real recordings, of the fold after the test fold and of the test fold.

The protocol, features and architectures are those of Ronchini, Comanducci and Antonacci (arXiv
2403.17864, below: the paper). Its released code departs from them in ways that are put right here:

====================  ==========================================  ================================
Part                  Released code                               Here
====================  ==========================================  ================================
GRU of the CRNN       recurs over the clips of a batch            recurs over time
GLU of the CRNN       x·σ(x): no weights of its own               learned value, (Wx + b)·σ(x)
Frames of 4 s         counted by the window: 63 of 126            counted by the hop: 126
"3 s" training patch  45 frames, 1.44 s                           94 frames, 3.0 s
Normalisation         by the variance                             by the standard deviation
Test                  one random patch: not repeatable            mean over patches of the clip
Validation            holds synthetic clips in some arms          real clips in every arm
====================  ==========================================  ================================

A trained classifier is a *unit* (arm, ratio, model, fold, run). Its result is written when it is done,
under a name that holds a hash of all that went into it, so that a run can be stopped and resumed.
"""

import hashlib
import io
import json
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
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

ARMS = ("real", "both", "mixed", "synthetic")
RESULT_COLUMNS = [
    *("arm", "model", "backend", "prompt_family", "ratio", "fold", "run", "seed", "n_real"),
    *("n_synthetic", "accuracy", "macro_f1", "epochs", "seconds"),
]
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
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    # decoding and resampling let go of Python's lock, so threads do here
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = list(pool.map(lambda path: _cached_features(Path(path), cache_dir), paths))
    x = np.stack([item[0] for item in found]) if found else np.zeros((0, CLIP_FRAMES, N_MELS))
    return x.astype(np.float32, copy=False), [item[1] for item in found]


def _cached_features(path, cache_dir):
    if not path.is_file():
        raise audio.AudioError(f"{path}: no such file; run the notebook that makes it again")
    settings = f"{SAMPLE_RATE},{CLIP_SECONDS},{N_MELS},{WINDOW},{HOP},{LOG_OFFSET}"
    key = hashlib.sha256(path.read_bytes() + settings.encode()).hexdigest()[:32]
    kept = cache_dir / f"{key}.npy"
    if kept.is_file():
        return np.load(kept), key
    y, rate = audio.load_audio(path, sample_rate=SAMPLE_RATE, duration=CLIP_SECONDS)
    x = features(audio.check_audio(y, path), rate)
    buffer = io.BytesIO()
    np.save(buffer, x)
    _write_whole(kept, buffer.getvalue())
    return x, key


def _write_whole(path, content):
    part = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
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

    def __init__(self, n_classes, n_frames=PATCH_FRAMES):
        super().__init__()
        filters = (1, 16, 32, 64, 128, 128, 128, 128)
        pools = ((2, 2), (2, 2), (1, 2), (1, 2), (1, 2), (1, 2), None)
        layers = []
        for before, after, pool in zip(filters, filters[1:], pools, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding="same"), nn.BatchNorm2d(after)]
            layers += [GLU(after)] + ([nn.AvgPool2d(pool)] if pool else [])
        self.convolutions = nn.Sequential(*layers)
        self.gru = nn.GRU(128, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear((n_frames // 2 // 2) * 2 * 128, n_classes)

    def forward(self, x):
        """Logits (patches, classes) of patches (patches, 1, frames, 64)."""
        over_time, _ = self.gru(self.convolutions(x).squeeze(-1).transpose(1, 2))
        return self.head(over_time.flatten(1))


MODELS = {"sbcnn": SBCNN, "crnn": CRNN}


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
):
    """Train one network on random 3 s patches; keep the weights of the lowest validation loss.

    Adam (1e-3, eps 1e-7, weight decay 1e-3) on the cross-entropy.

    Parameters
    ----------
    model : {"sbcnn", "crnn"}
        Which network, see :data:`MODELS`.
    train, validation : tuple of (np.ndarray (clips, 126, 64), np.ndarray of int (clips,))
        Standardised spectrograms and class numbers.
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

    Returns
    -------
    network : nn.Module
        In evaluation mode, with the best weights.
    log : pandas.DataFrame
        `epoch, train_loss, validation_loss, validation_accuracy`, one row an epoch.

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
        network = MODELS[model](n_classes).to(device, memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(
            network.parameters(), LEARNING_RATE, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY
        )
        chance = torch.Generator().manual_seed(seed)
        rows, best, best_loss, waited = [], None, np.inf, 0
        for epoch in range(1, epochs + 1):
            order = _draw_order(len(x), patches_per_epoch, chance)
            train_loss = _train_epoch(network, optimiser, x, y, order.split(batch_size), chance)
            probabilities = predict(network, validation[0])
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
    columns = ["epoch", "train_loss", "validation_loss", "validation_accuracy"]
    return network.eval(), pd.DataFrame(rows, columns=columns)


def _draw_order(n, wanted, chance):
    """Row numbers of an epoch: every clip once before any comes again."""
    wanted = wanted or n
    rounds = [torch.randperm(n, generator=chance) for _ in range(-(-wanted // n))]
    return torch.cat(rounds)[:wanted]


def _train_epoch(network, optimiser, x, y, batches, chance):
    network.train()
    # a view of every patch that a clip holds; a batch copies only those it draws
    patches = x.unfold(1, PATCH_FRAMES, 1)
    losses = []
    for part in batches:
        starts = torch.randint(patches.shape[1], (len(part),), generator=chance)
        batch = patches[part, starts].transpose(1, 2).unsqueeze(1)
        loss = functional.cross_entropy(network(batch), y[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def _score(probabilities, y):
    chosen = np.maximum(probabilities[np.arange(len(y)), y], 1e-12)
    return float(-np.log(chosen).mean()), float((probabilities.argmax(axis=1) == y).mean())


def predict(network, x, patches=2, batch_size=64):
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
    starts = np.linspace(0, x.shape[1] - PATCH_FRAMES, patches).round().astype(int)
    found = []
    with torch.inference_mode():
        for part in torch.from_numpy(x).split(batch_size):
            part = part.to(device).unsqueeze(1)
            each = [network(part[:, :, s : s + PATCH_FRAMES]).softmax(dim=1) for s in starts]
            found.append(torch.stack(each).mean(dim=0).cpu().numpy())
    return np.concatenate(found)


# --- arms and units ------------------------------------------------------------------------------


def parse_arm(text):
    """Read an arm's name and how much of it.

    Parameters
    ----------
    text : str
        ``"real"``; ``"both:R"`` or ``"synthetic:R"``: R synthetic clips for each real training clip;
        ``"mixed:N"``: N of the training folds replaced by as many synthetic clips.

    Returns
    -------
    tuple of (str, float)
        Arm and R or N (0 for real).

    Raises
    ------
    ValueError
        Unknown arm, or a number that it cannot have.

    Examples
    --------
    >>> parse_arm("both:2"), parse_arm("real")
    (('both', 2.0), ('real', 0.0))
    """
    name, _, amount = str(text).partition(":")
    try:
        value = float(amount or 0)
    except ValueError:
        value = -1.0
    fits = value == 0 if name == "real" else value > 0 and (name != "mixed" or value.is_integer())
    if name not in ARMS or not fits:
        raise ValueError(
            f"cannot read the arm {text!r}: use 'real', 'both:1.0', 'synthetic:1.0' (synthetic clips "
            "for each real one) or 'mixed:2' (training folds replaced)"
        )
    return name, value


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
):
    """Say, before anything is trained, which clips each classifier will see.

    All arms of one fold and run draw from the same shuffled lists, so that a larger ratio adds clips
    to a smaller one, and share their seed: their differences are those of the training clips.

    Parameters
    ----------
    clips : pandas.DataFrame
        Real recordings (table *clips*).
    generated : pandas.DataFrame or None
        Synthetic clips (table *generated*); None where no arm needs any.
    arms : list of str
        See :func:`parse_arm`.
    models : sequence of str
        Keys of :data:`MODELS`.
    test_folds : sequence of int
        Folds to test on, one after the other; the next fold, cyclically, validates.
    runs : int, default 1
        Repetitions with other seeds.
    seed : int, default 0
        All choices follow from it.
    real_per_class : int, optional
        Train on so many real clips a class (spread over the training folds) instead of all.
    generator_folds : sequence of int, optional
        Folds that the generator of `generated` was trained on; none if it never met these recordings.

    Returns
    -------
    pandas.DataFrame
        One row a unit: `arm, ratio, model, fold, run, seed, n_real, n_synthetic, n_validation,
        n_test` and the row numbers `real_rows, synthetic_rows, validation_rows, test_rows`. `ratio`
        is the number that the arm carries.

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
    unknown = [model for model in models if model not in MODELS]
    if unknown or not wanted or not models:
        raise ValueError(f"models {list(models)}, arms {list(arms)}: models are {list(MODELS)}")
    synthetic = any(name != "real" for name, _ in wanted)
    if synthetic:
        _refuse_leak(generated, test_folds, generator_folds)
    units = []
    for fold in test_folds:
        rows = _rows_by_split(clips, fold)
        for run in range(runs):
            rng = np.random.default_rng([seed, fold, run])
            real = _spread_choice(clips, rows["train"], real_per_class, rng)
            folds = rng.permutation(sorted(set(clips["fold"].iloc[real])))
            pools = _shuffled_by_class(generated, rng) if synthetic else {}
            for name, amount in wanted:
                chosen, added = _draw(clips, real, folds, pools, name, amount)
                for model in models:
                    unit_seed = _unit_seed(seed, model, fold, run)
                    about = (name, amount, model, int(fold), run, unit_seed)
                    units.append((*about, chosen, added, rows["val"], rows["test"]))
    named = ["arm", "ratio", "model", "fold", "run", "seed"]
    parts = ["real", "synthetic", "validation", "test"]
    plan = pd.DataFrame(units, columns=named + [f"{part}_rows" for part in parts])
    for place, part in enumerate(parts):
        plan.insert(len(named) + place, f"n_{part}", plan[f"{part}_rows"].map(len))
    return plan


def _refuse_leak(generated, test_folds, generator_folds):
    if generated is None or not len(generated):
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


def _shuffled_by_class(generated, rng):
    order = rng.permutation(len(generated))
    labels = generated["label"].to_numpy()
    return {label: order[labels[order] == label].tolist() for label in sorted(set(labels))}


def _draw(clips, real, folds, pools, arm, amount):
    labels, row_folds = clips["label"].to_numpy(), clips["fold"].to_numpy()
    if arm == "mixed" and amount > len(folds):
        raise ValueError(f"mixed:{amount:g} replaces more folds than the {len(folds)} in training")
    gone = set(folds[: int(amount)]) if arm == "mixed" else set()
    replaced = [row for row in real if arm == "mixed" and row_folds[row] in gone]
    base = replaced if arm == "mixed" else real
    times = {"real": 0.0, "mixed": 1.0}.get(arm, amount)
    added = []
    for label, count in sorted(pd.Series(labels[base], dtype=object).value_counts().items()):
        need = int(np.floor(times * count + 0.5))
        pool = pools.get(label, [])
        if need > len(pool):
            raise ValueError(
                f"{arm}:{amount:g} needs {need} synthetic clips of {label!r}, there are {len(pool)}: "
                "generate more in notebook 02_synthetic_generation, or lower the ratio, the folds "
                "replaced or real_per_class"
            )
        added += pool[:need]
    if arm == "synthetic":
        return [], added
    return [row for row in real if row_folds[row] not in gone], added


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
):
    """Train and test every arm, model, fold and run; resume where an earlier call was stopped.

    Each unit trains in one thread; units run side by side in processes of their own. The plan is
    printed first.

    Parameters
    ----------
    clips, generated, arms, models, test_folds, runs, seed, real_per_class, generator_folds
        See :func:`plan_units`.
    epochs, batch_size, patience, patches_per_epoch, device
        See :func:`train_classifier`.
    out_dir : str or Path
        Gets ``features/`` (cache), ``units/`` (result and predictions of each unit),
        ``results.csv`` and ``predictions.csv``: `clip_id, label, predicted, arm, ratio, model,
        fold, run`.
    workers : int, optional
        Processes; by default one a CPU core. With 1 all is done in this process.

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
    UnitsFailed
        Some units failed; the message names them, all others are done and kept.

    Examples
    --------
    >>> results = run_arms(clips, generated, ["real", "both:1"], out_dir="runs/try")  # doctest: +SKIP
    """
    out_dir = Path(out_dir)
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
    )
    synthetic = generated.reset_index(drop=True) if plan["n_synthetic"].any() else clips.iloc[:0]
    training = {"epochs": epochs, "batch_size": batch_size, "patience": patience}
    training |= {"patches_per_epoch": patches_per_epoch}
    shared = _gather(clips, synthetic, out_dir, workers)
    units = [_complete(unit, shared, training) for unit in plan.to_dict("records")]
    missing = [unit for unit in units if not _is_done(out_dir, unit)]
    workers = min(workers or os.cpu_count(), max(1, len(missing)))
    _print_plan(plan, len(missing), workers)
    failed = _train_units(missing, shared, out_dir, workers, device)
    results, predictions = _collect(out_dir, units)
    for name, table in (("results", results), ("predictions", predictions)):
        _write_whole(out_dir / f"{name}.csv", table.to_csv(index=False).encode())
    if failed:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise UnitsFailed(
            f"{len(failed)} of {len(units)} units failed; the others are kept in {out_dir}. "
            f"Run again to repeat only these:\n{listed}"
        )
    return results


def _gather(clips, synthetic, out_dir, workers):
    """Put features, labels and identities of all clips into one place: real first, then synthetic."""
    paths = [*clips["path"], *synthetic["path"]]
    x, keys = load_features(paths, out_dir / "features", workers)
    classes = sorted(set(clips["label"]))
    labels = [*clips["label"], *synthetic["label"]]
    number = {label: i for i, label in enumerate(classes)}
    return {
        "x": standardise(x),
        "y": np.array([number.get(label, -1) for label in labels], dtype=np.int64),
        "keys": keys,
        "classes": classes,
        "clip_ids": [str(name) for name in clips["clip_id"]],
        "n_real": len(clips),
        "source": {
            name: [str(value) for value in synthetic[name]] if name in synthetic else []
            for name in ("backend", "prompt_family")
        },
    }


def _complete(unit, shared, training):
    """Add to a planned unit its training rows, its source and the key of all that it depends on."""
    offset = shared["n_real"]
    rows = {
        "train": unit["real_rows"] + [offset + row for row in unit["synthetic_rows"]],
        "validation": unit["validation_rows"],
        "test": unit["test_rows"],
    }
    named = ("arm", "ratio", "model", "fold", "run", "seed", "n_real", "n_synthetic")
    source = {
        name: "+".join(sorted({values[row] for row in unit["synthetic_rows"]})) if values else ""
        for name, values in shared["source"].items()
    }
    content = {
        name: [(shared["keys"][row], int(shared["y"][row])) for row in part]
        for name, part in rows.items()
    }
    about = {name: unit[name] for name in named} | source | training
    kept = [about, content, shared["classes"], [shared["clip_ids"][row] for row in rows["test"]]]
    digest = hashlib.sha256(json.dumps([_RECIPE, kept]).encode()).hexdigest()[:12]
    name = "{arm}-{ratio:g}-{model}-fold{fold}-run{run}".format(**unit)
    return {"name": name, "key": f"{name}-{digest}", "about": about, "rows": rows}


def _unit_file(out_dir, unit, ending):
    return out_dir / "units" / f"{unit['key']}.{ending}"


def _is_done(out_dir, unit):
    # the JSON is written last, so its presence means that the pair is complete
    return _unit_file(out_dir, unit, "json").is_file()


def _print_plan(plan, missing, workers):
    counts = ["arm", "ratio", "n_real", "n_synthetic", "n_validation", "n_test"]
    table = plan.groupby(counts, sort=False).size().rename("classifiers").reset_index()
    print(table.to_string(index=False))
    kept = len(plan) - missing
    print(f"{len(plan)} classifiers: {missing} to train in {workers} processes, {kept} kept")


_SHARED = {}


def _start_worker(shared_dir):
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    shared_dir = Path(shared_dir)
    _SHARED.update(json.loads((shared_dir / "shared.json").read_text()))
    _SHARED["y"] = np.load(shared_dir / "y.npy")
    # mapped, not read: all workers look at one copy
    _SHARED["x"] = np.load(shared_dir / "x.npy", mmap_mode="r")


def _end_with_parent():
    # a worker whose parent was killed would otherwise wait, and hold its memory, for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(unit, out_dir, device):
    return _attempt(unit, _SHARED, out_dir, device)


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
    parts = {
        name: (np.array(shared["x"][rows]), shared["y"][rows])
        for name, rows in unit["rows"].items()
    }
    network, log = train_classifier(
        about["model"],
        parts["train"],
        parts["validation"],
        len(shared["classes"]),
        epochs=about["epochs"],
        batch_size=about["batch_size"],
        patience=about["patience"],
        patches_per_epoch=about["patches_per_epoch"],
        seed=about["seed"],
        device=device,
    )
    chosen = predict(network, parts["test"][0]).argmax(axis=1)
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
    _write_whole(_unit_file(out_dir, unit, "csv"), predictions.to_csv(index=False).encode())
    _write_whole(_unit_file(out_dir, unit, "json"), json.dumps(result, indent=1).encode())


def _accuracies(truth, chosen, n_classes):
    from sklearn.metrics import f1_score

    f1 = f1_score(truth, chosen, labels=range(n_classes), average="macro", zero_division=0)
    return {"accuracy": float((truth == chosen).mean()), "macro_f1": float(f1)}


def _train_units(units, shared, out_dir, workers, device):
    from tqdm import tqdm

    failed = {}
    # disable=None: a bar on a terminal, nothing in a notebook or a log
    with tqdm(total=len(units), unit="classifier", disable=None, leave=False) as bar:
        outcomes = _here if workers == 1 else _in_processes
        for unit, reason in outcomes(units, shared, out_dir, workers, device):
            bar.update()
            if reason:
                failed[unit["name"]] = reason
                tqdm.write(f"failed, going on: {unit['name']}: {reason}")
    return failed


def _here(units, shared, out_dir, workers, device):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for unit in units:
            yield unit, _attempt(unit, shared, out_dir, device)
    finally:
        torch.set_num_threads(threads)


def _in_processes(units, shared, out_dir, workers, device):
    # the longest first, so that no core waits for another at the end
    units = sorted(units, key=lambda u: (u["about"]["model"] != "crnn", -len(u["rows"]["train"])))
    with tempfile.TemporaryDirectory(dir=out_dir, prefix="shared-") as shared_dir:
        _share(shared, Path(shared_dir))
        # spawn: a process forked from one that has run torch can hang
        pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(shared_dir,),
        )
        try:
            waiting = {pool.submit(_work, unit, out_dir, device): unit for unit in units}
            for future in as_completed(waiting):
                try:
                    yield waiting[future], future.result()
                except BrokenProcessPool:
                    yield waiting[future], "its process was killed (too little memory?)"
        finally:
            pool.shutdown(cancel_futures=True)


def _share(shared, folder):
    np.save(folder / "x.npy", shared["x"])
    np.save(folder / "y.npy", shared["y"])
    small = {name: shared[name] for name in ("classes", "clip_ids")}
    (folder / "shared.json").write_text(json.dumps(small))


def _collect(out_dir, units):
    results, predictions = [], []
    for unit in (unit for unit in units if _is_done(out_dir, unit)):
        result = json.loads(_unit_file(out_dir, unit, "json").read_text())
        results.append(result)
        where = {name: result[name] for name in ("arm", "ratio", "model", "fold", "run")}
        # a class may be called "None" or "NA"
        one = pd.read_csv(_unit_file(out_dir, unit, "csv"), dtype=str, keep_default_na=False)
        predictions.append(one.assign(**where))
    columns = ["clip_id", "label", "predicted", "arm", "ratio", "model", "fold", "run"]
    together = pd.concat(predictions) if predictions else pd.DataFrame(columns=columns)
    return pd.DataFrame(results, columns=RESULT_COLUMNS), together.reset_index(drop=True)


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


def compare(predictions, arm, ratio, against=("real", 0.0)):
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

    Returns
    -------
    pandas.DataFrame
        One row a model: `arm, ratio, model` and what :func:`stats.paired_test` says: `n` clips,
        `difference` of the accuracies (`arm` minus `against`), its interval, `p_value`, …

    Raises
    ------
    ValueError
        The two arms share no test clip.

    Notes
    -----
    It answers for other recordings and these trained classifiers. Several comparisons at once need
    a correction of the p-values.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "dog"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> compare(pd.concat([real, both]), "both", 1.0)["difference"].tolist()
    [0.0]
    """
    right = predictions.assign(right=predictions["label"] == predictions["predicted"])

    def recognised(name, amount):
        found = right[(right["arm"] == name) & (right["ratio"] == amount)]
        return found.groupby(["model", "fold", "clip_id"], sort=False)["right"].mean()

    arms = [recognised(arm, ratio), recognised(*against)]
    pairs = pd.concat(arms, axis=1, join="inner", keys=["a", "b"])
    if pairs.empty:
        raise ValueError(f"{arm}:{ratio:g} and {against[0]} share no test clip; were both run?")
    return pd.DataFrame(
        {"arm": arm, "ratio": ratio, "model": model} | stats.paired_test(part["a"], part["b"])
        for model, part in pairs.groupby("model", sort=False)
    )


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
        :func:`summarise`. Its margins (95 %, given for real clips only in the tables used here) are
        ± 0.0082 for SB-CNN and ± 0.0065 for CRNN.

    Notes
    -----
    Source: Ronchini, Comanducci and Antonacci, arXiv 2403.17864. They were measured with the
    released code, see the top of this module.

    Examples
    --------
    >>> published().query("arm == 'real'").accuracy.tolist()
    [0.6468, 0.627]
    """
    rows = [("real", 0.0, "sbcnn", "", "", 0.6468), ("real", 0.0, "crnn", "", "", 0.6270)]
    for line in _PUBLISHED.strip().splitlines():
        about, values = line.split(":")
        arm, backend, family = about.split()
        for model, series in zip(MODELS, values.split("/"), strict=True):
            for amount, value in enumerate(series.split(), start=1):
                accuracy = round(float(value) / 100, 4)
                rows.append((arm, float(amount), model, backend, family, accuracy))
    columns = ["arm", "ratio", "model", "backend", "prompt_family", "accuracy"]
    return pd.DataFrame(rows, columns=columns)
