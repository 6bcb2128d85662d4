"""Classifiers of the augmentation study: what they read of a clip, what they are, how they train.

The front end and the two networks are those of Ronchini, Comanducci and Antonacci (arXiv 2403.17864,
below: the paper). ``"sbcnn"`` and ``"crnn"`` are corrected; ``"sbcnn:as_released"`` and
``"crnn:as_released"`` compute what the paper's released code computes, which departs from it:

====================  ==========================================  ================================
Part                  Released code (``:as_released``)            Corrected
====================  ==========================================  ================================
GRU of the CRNN       recurs over the clips of a batch            recurs over time
GLU of the CRNN       x·σ(x): no weights of its own               learned value, (Wx + b)·σ(x)
Frames of 4 s         counted by the window: 63 of 126            counted by the hop: 126
"3 s" training patch  45 frames, 1.44 s, from 15 places           94 frames, 3.0 s, from 33 places
Normalisation         by the variance                             by the standard deviation
Test                  one random patch, here from the seed        mean over patches of the clip
Place of a patch      one for a whole batch (here one per clip)   one per clip and epoch
Validation            shuffled batches of 64 (here in order)      one pass, in order
Stop                  16 epochs without gain (here 15)            15 epochs without gain
====================  ==========================================  ================================

Piczak's k-NN, random forest and SVM (:data:`BASELINES`) and linear probes complete the list.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from soundscapes_utils import audio, stats, store

SAMPLE_RATE = 16_000
CLIP_SECONDS = 4.0
N_MELS = 64
WINDOW = 1024
HOP = 512
LOG_OFFSET = 1e-3
PATCH_FRAMES = round(3.0 * SAMPLE_RATE / HOP)

# what the released code makes of 4 s and of 3 s, counting by the window
RELEASED_FRAMES = 63
RELEASED_PATCH = 45
RELEASED_STARTS = 15

TRANSFORMS = {
    "ps1": ("pitch_shift", (-2.0, -1.0, 1.0, 2.0)),
    "ps2": ("pitch_shift", (-3.5, -2.5, 2.5, 3.5)),
    "ts": ("time_stretch", (0.81, 0.93, 1.07, 1.23)),
}
"""Augmentation by signal processing with the paper's values: semitones, and speeds."""


# --- what they read of a clip --------------------------------------------------------------------


@lru_cache(maxsize=1)
def _mel_basis():
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(
        WINDOW // 2 + 1, 0.0, SAMPLE_RATE / 2, N_MELS, SAMPLE_RATE, norm=None, mel_scale="htk"
    )


def features(y, sample_rate=SAMPLE_RATE):
    """Log-mel spectrogram [126 frames, 64 bands] of a clip, repeated or cut to 4 s, as in the paper.

    16 kHz, window and FFT 1024, hop 512, 0–8 kHz of the power spectrum (HTK scale, no area
    normalisation: torchaudio's defaults), ``log(mel + 0.001)``.
    """
    y = audio.resample(audio.check_audio(y, "signal"), sample_rate, SAMPLE_RATE)
    y = torch.from_numpy(audio.fix_length(y, int(CLIP_SECONDS * SAMPLE_RATE)).copy())
    spectrum = torch.stft(
        y, WINDOW, HOP, window=torch.hann_window(WINDOW), pad_mode="reflect", return_complex=True
    )
    mel = spectrum.abs().square().T @ _mel_basis()
    return torch.log(mel + LOG_OFFSET).numpy()


def _log_mel_of(path):
    return features(*audio.load_audio(path, SAMPLE_RATE, CLIP_SECONDS, silent_ok=False))


def _mfcc_of(path):
    """Mean and SD over frames of MFCC 1 to 12 and of the zero-crossing rate, librosa's defaults."""
    import librosa

    y, rate = audio.load_audio(path, silent_ok=False)
    y = audio.resample(y, rate, 44_100)
    power = librosa.feature.melspectrogram(y=y, sr=44_100, n_fft=2048, hop_length=512)
    # the 0th is the loudness
    mfcc = librosa.feature.mfcc(S=librosa.power_to_db(power), n_mfcc=13)[1:]
    crossings = librosa.feature.zero_crossing_rate(y, frame_length=512, hop_length=512)
    parts = mfcc.mean(axis=1), mfcc.std(axis=1), [crossings.mean(), crossings.std()]
    return np.concatenate(parts).astype(np.float32)


_FRONT_ENDS = {
    "logmel": (_log_mel_of, [SAMPLE_RATE, CLIP_SECONDS, N_MELS, WINDOW, HOP, LOG_OFFSET]),
    "mfcc": (_mfcc_of, ["mfcc statistics"]),
}


def load_features(paths, cache_dir, workers=None, kind="logmel"):
    """Features of many clips, each computed once and kept by the content of its file.

    `kind` is "logmel" (:func:`features`, [clips, 126, 64]) or "mfcc" (Piczak's 26 statistics for his
    baselines, ACM Multimedia 2015: mean, then SD of MFCC 1 to 12, then of the zero-crossing rate).
    Gives the array and what identifies each clip's content; an :class:`audio.AudioError` names all
    files that cannot be used.
    """
    compute, settings = _FRONT_ENDS[kind]
    known = store.Records(cache_dir, "digests")

    def load(path):
        try:
            key = store.content_key(store.known_digest(path, known), settings, length=32)
            file = Path(cache_dir) / f"{key}.npy"
            return store.cached_array(file, lambda: compute(path)), key
        except OSError as error:
            return audio.AudioError(f"{path}: cannot be read ({error.strerror}); make it again")
        except audio.AudioError as error:
            return error

    # decoding and resampling let go of Python's lock
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        rows = list(pool.map(load, paths))
    bad = [f"  {row}" for row in rows if isinstance(row, audio.AudioError)]
    if bad:
        listed = "\n".join(bad[:50] + [f"  and {len(bad) - 50} more"] * (len(bad) > 50))
        raise audio.AudioError(
            f"{len(bad)} of {len(rows)} clips cannot be used; make them again, or leave their rows "
            f"out of the table:\n{listed}"
        )
    return np.stack([x for x, _ in rows]), [key for _, key in rows]


def standardise(x):
    """Bring each clip [frames, bands] to mean 0 and SD 1 over all its frames and bands, as float32."""
    # in double precision: the mean of thousands of equal singles is not quite their value
    mean = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    spread = x.std(axis=(1, 2), keepdims=True, dtype=np.float64)
    return ((x - mean) / np.maximum(spread, 1e-6)).astype(np.float32)


def divide_by_variance(x):
    """Normalise as the released code: by the variance (n − 1), and the first 63 of 126 frames kept."""
    mean = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    variance = x.var(axis=(1, 2), ddof=1, keepdims=True, dtype=np.float64)
    return ((x - mean) / np.maximum(variance, 1e-6))[:, :RELEASED_FRAMES].astype(np.float32)


def transform_clips(clips, effect, out_dir, workers=None):
    """Shift the pitch or the speed of recordings: the augmentation that needs no generator.

    One copy (16 kHz WAV in `out_dir`) is made for each value of a key of :data:`TRANSFORMS`, after
    Salamon and Bello (2017). The table has the column `made_from`: a study uses a copy only where its
    recording is among the real training clips, so that no test clip comes back in disguise. Give it to
    :func:`esc.run_study` as ``{"ps1": table}`` for ``"both@ps1:4"``.
    """
    if effect not in TRANSFORMS:
        raise ValueError(f"unknown effect {effect!r}; choose one of {', '.join(TRANSFORMS)}")
    jobs = [(clip, value) for clip in clips.to_dict("records") for value in TRANSFORMS[effect][1]]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        rows = list(pool.map(lambda job: _transformed(*job, effect, Path(out_dir)), jobs))
    return pd.DataFrame(rows)


def _transformed(clip, value, effect, out_dir):
    import librosa

    content = store.file_digest(clip["path"])[:12]
    path = out_dir / f"{clip['clip_id']}-{effect}{value:+g}-{content}.wav"
    if not path.is_file():
        y, rate = audio.load_audio(clip["path"], sample_rate=SAMPLE_RATE)
        if TRANSFORMS[effect][0] == "pitch_shift":
            y = librosa.effects.pitch_shift(y, sr=rate, n_steps=value)
        else:
            y = librosa.effects.time_stretch(y, rate=value)
        audio.save_audio(path, y / max(1.0, float(np.abs(y).max())), rate)
    row = {"clip_id": path.stem, "path": str(path), "label": clip["label"]}
    row |= {"backend": effect, "prompt_family": "", "checkpoint": "librosa"}
    return row | {"made_from": str(clip["clip_id"])}


# --- what they are -------------------------------------------------------------------------------


class SBCNN(nn.Module):
    """Salamon and Bello's convolutional network (IEEE SPL 24(3), 2017), as the paper sizes it.

    Patches [n, 1, frames, 64] (`n_frames` 94: 3 s at hop 512; at least 16) to logits [n, n_classes].

    Examples
    --------
    >>> SBCNN(10)(torch.zeros(2, 1, 94, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(self, n_classes, n_frames=PATCH_FRAMES):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 5, padding="same"),
            nn.MaxPool2d((4, 2)),  # time × frequency
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
        """Logits of patches."""
        return self.head(self.convolutions(x).flatten(1))


class GLU(nn.Module):
    """Gated linear unit over channels, ``(Wx + b) · σ(x)``: the input decides what gets through.

    As in the DCASE Task 4 baselines from which the paper's CRNN descends (Dauphin et al., ICML 2017).
    The paper's code joins x with itself instead, which leaves x·σ(x).
    """

    def __init__(self, channels):
        super().__init__()
        self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        """Gated values, same shape as `x` (patches, channels, frames, bands)."""
        return self.value(x) * torch.sigmoid(x)


class CRNN(nn.Module):
    """Castorena and Cobos' convolutional recurrent network, as the paper sizes it.

    Seven gated convolutions pool 64 bands down to one; a bidirectional GRU runs over time; one linear
    layer reads all its outputs. Patches [n, 1, frames, 64] (`n_frames` at least 4) to logits. With
    `as_released` the gates are x·σ(x), and the GRU takes the clips of a batch for its time steps, so
    that a clip's output depends on its neighbours. After Castorena, Cobos, Lopez-Ballester and Ferri,
    Applied Acoustics 215, 109719, 2023.
    """

    def __init__(self, n_classes, n_frames=PATCH_FRAMES, as_released=False):
        super().__init__()
        filters = (1, 16, 32, 64, 128, 128, 128, 128)
        pools = ((2, 2), (2, 2), (1, 2), (1, 2), (1, 2), (1, 2), None)
        layers = []
        for before, after, pool in zip(filters, filters[1:], pools, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding="same"), nn.BatchNorm2d(after)]
            layers += [nn.SiLU() if as_released else GLU(after)]  # SiLU is x·σ(x)
            layers += [nn.AvgPool2d(pool)] if pool else []
        self.convolutions = nn.Sequential(*layers)
        self.gru = nn.GRU(128, 128, num_layers=2, bidirectional=True, batch_first=not as_released)
        self.head = nn.Linear((n_frames // 2 // 2) * 2 * 128, n_classes)

    def forward(self, x):
        """Logits of patches."""
        over_time, _ = self.gru(self.convolutions(x).squeeze(-1).transpose(1, 2))
        return self.head(over_time.flatten(1))


MODELS = {
    "sbcnn": SBCNN,
    "crnn": CRNN,
    "sbcnn:as_released": partial(SBCNN, n_frames=RELEASED_PATCH),
    "crnn:as_released": partial(CRNN, n_frames=RELEASED_PATCH, as_released=True),
}
"""Networks by name, each made from a number of classes; your own is named ``module:Class``."""


def network_class(model):
    """What makes a network from a number of classes: of `MODELS`, or one's own, ``module:Class``."""
    return MODELS.get(model) or store.load_class(model)


def _baselines(seed):
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    # distances on MFCC as they are: the low ones, which vary most, count most
    yield "knn", KNeighborsClassifier(5)
    yield "forest", RandomForestClassifier(500, random_state=seed)
    yield "svm", make_pipeline(StandardScaler(), SVC(kernel="linear"))
    yield "probe", stats.linear_probe(seed)


BASELINES = ("knn", "forest", "svm")
"""Piczak's baselines; nothing of them was tuned on test folds."""


def fit_baseline(model, x, y, seed=0):
    """Fit "knn", "forest", "svm" or "probe" on rows `x` (MFCC statistics, or an embedding)."""
    return dict(_baselines(seed))[model].fit(x, y)


# --- how they train ------------------------------------------------------------------------------

ADAM = {"lr": 1e-3, "eps": 1e-7, "weight_decay": 1e-3}
LOG_COLUMNS = ["epoch", "train_loss", "validation_loss", "validation_accuracy"]
# share of the frames and of the bands that one mask may cover
_MASK_SHARE = 0.19


@dataclass(frozen=True)
class Training:
    """How classifiers are trained; the defaults are the paper's.

    - ``epochs``: at most this many passes; ``patience``: stop after this many without a lower
      validation loss. ``batch_size``: patches per step; take less for a few hundred clips, else there
      are few steps.
    - ``patches_per_epoch``, however many clips there are; by default one of each clip, as in the paper.
      With a number, arms of different size take equally many steps.
    - ``device``: where torch trains; a study's classifiers take turns on several. ``workers``: processes
      that train side by side; by default one per CPU core.
    """

    epochs: int = 100
    patience: int = 15
    batch_size: int = 128
    patches_per_epoch: int | None = None
    device: str | tuple = "cpu"
    workers: int | None = None

    def __post_init__(self):
        for name in ("epochs", "patience", "batch_size", "patches_per_epoch", "workers"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"{name} is {value}: give a whole number of at least 1")


def train_classifier(model, train, validation, n_classes, training, seed=0, augment=None):
    """Train one network on random 3 s patches; keep the weights of the lowest validation loss.

    `train` and `validation` are spectrograms (clips, frames, bands) and class numbers: 126 × 64 of
    :func:`standardise`; for a network as released 63 × 64 of :func:`divide_by_variance`. Initial
    weights, order, patches and dropout follow from `seed`, and are the same for a network as released
    and its corrected form; torch's own random state stays as it was. `augment` is ``("specaugment",
    k)``: k masks over time and k over frequency, each of at most 19 % of the axis (Park et al.,
    Interspeech 2019); or ``("mixup", α)``: pairs of clips added with a share drawn from Beta(α, α)
    (Zhang et al., ICLR 2018).

    Returns the network in evaluation mode and a log, `epoch, train_loss, validation_loss,
    validation_accuracy`.
    """
    device = torch.device(training.device)
    x, y = (torch.from_numpy(part).to(device) for part in train)
    kept = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng([] if device.type == "cpu" else [device], **kept):
        torch.manual_seed(seed)
        # twice as fast on a CPU as torch's default layout
        network = network_class(model)(n_classes).to(device, memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(network.parameters(), **ADAM)
        # a view of every patch that a clip holds; a batch copies only those it draws
        frames, starts = _patches(model)
        patches = x.unfold(1, frames, 1)[:, :starts]
        chance = torch.Generator().manual_seed(seed)
        rows, best, best_loss, waited = [], None, np.inf, 0
        for epoch in range(1, training.epochs + 1):
            order = _draw_order(len(x), training.patches_per_epoch or len(x), chance)
            batches = order.split(training.batch_size)
            train_loss = _train_epoch(network, optimiser, patches, y, batches, chance, augment)
            found = predict(model, network, validation[0], seed + epoch, training.batch_size)
            chosen = np.maximum(found[np.arange(len(found)), validation[1]], 1e-12)
            loss = float(-np.log(chosen).mean())
            accuracy = float((found.argmax(axis=1) == validation[1]).mean())
            rows.append((epoch, train_loss, loss, accuracy))
            waited += 1
            if loss < best_loss:
                best_loss, waited = loss, 0
                best = {name: value.clone() for name, value in network.state_dict().items()}
            if waited >= training.patience or not np.isfinite(train_loss):
                break
    if best is None:
        raise FloatingPointError(f"{model}: the validation loss was never finite; check the clips")
    network.load_state_dict(best)
    return network.eval(), pd.DataFrame(rows, columns=LOG_COLUMNS)


def _patches(model):
    """Frames of a network's patches, and how many places they are drawn from (None: all)."""
    released = model.endswith(":as_released")
    return (RELEASED_PATCH, RELEASED_STARTS) if released else (PATCH_FRAMES, None)


def _draw_order(n, wanted, chance):
    """Row numbers of an epoch: every clip once before any comes again."""
    rounds = [torch.randperm(n, generator=chance) for _ in range(-(-wanted // n))]
    return torch.cat(rounds)[:wanted]


def _train_epoch(network, optimiser, patches, y, batches, chance, augment):
    network.train()
    losses = []
    for part in batches:
        starts = torch.randint(patches.shape[1], (len(part),), generator=chance)
        batch = patches[part, starts].transpose(1, 2).unsqueeze(1)
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
        from torchaudio.functional import mask_along_axis_iid

        for axis in (2, 3):
            widest = round(_MASK_SHARE * batch.shape[axis])
            for _ in range(int(amount)):
                # 0 is the mean of a standardised clip
                batch = mask_along_axis_iid(batch, widest, 0.0, axis)
    return functional.cross_entropy(network(batch), y)


def predict(model, network, x, seed=0, batch_size=1):
    """Class probabilities [clips, classes] of whole clips, in the way that fits the model.

    Corrected networks: the mean over two patches that together cover the clip. As released: one
    random patch per clip, `batch_size` clips at a time (its GRU recurs over them).
    """
    device = next(network.eval().parameters()).device
    x = torch.from_numpy(x)
    frames, places = _patches(model)
    if places:
        chance = torch.Generator().manual_seed(seed)
        starts = torch.randint(places, (len(x),), generator=chance)
        patches = x.unfold(1, frames, 1)
        batches = (
            [patches[part, starts[part]].transpose(1, 2)]
            for part in torch.arange(len(x)).split(batch_size)
        )
    else:
        last = x.shape[1] - frames
        batches = ([part[:, :frames], part[:, last:]] for part in x.split(64))
    with torch.inference_mode():
        means = [
            torch.stack([network(y.unsqueeze(1).to(device)).softmax(dim=1) for y in batch]).mean(0)
            for batch in batches
        ]
    return torch.cat(means).cpu().numpy()
