"""Networks and baselines of the augmentation study: architecture, training, prediction.

SB-CNN and CRNN as Ronchini, Comanducci and Antonacci (arXiv 2403.17864, below: the paper) size them,
put right, and as their released code computes them (``":faithful"``); the top of ``esc.py`` lists the
differences. Besides: a fine-tuned transformer, and Piczak's baselines.
"""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from soundscapes_utils import audio
from soundscapes_utils.features import (
    CLIP_SECONDS,
    FAITHFUL_PATCH,
    FAITHFUL_STARTS,
    N_MELS,
    PATCH_FRAMES,
    SAMPLE_RATE,
    load_kept,
)

LEARNING_RATE = 1e-3
ADAM_EPS = 1e-7
WEIGHT_DECAY = 1e-3

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

LOG_COLUMNS = ["epoch", "train_loss", "validation_loss", "validation_accuracy"]


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


def load_transformer_inputs(paths, checkpoint, cache_dir, workers=None):
    """What a checkpoint's own feature extractor makes of clips, without its padding.

    Parameters
    ----------
    paths : sequence of str or Path
        Sound files; 4 s of each are taken, shorter ones are repeated.
    checkpoint : str
        See :class:`PretrainedTransformer`.
    cache_dir, workers
        See :func:`features.load_features`.

    Returns
    -------
    x : np.ndarray of float16, shape (clips, 398, 128)
        Frames of 25 ms every 10 ms by mel bands.
    keys : list of str
        What identifies each clip's content and the checkpoint.

    Raises
    ------
    audio.AudioError
        A clip cannot be read.
    OSError
        The checkpoint cannot be loaded.

    Examples
    --------
    >>> load_transformer_inputs(["dog.wav"], "MIT/ast-finetuned-audioset-10-10-0.4593",
    ...                         "runs/try")[0].shape  # doctest: +SKIP
    (1, 398, 128)
    """
    from transformers import ASTFeatureExtractor

    extractor = _from_hub(ASTFeatureExtractor, checkpoint)
    settings = f"ast:{checkpoint},{_checkpoint_stamp(checkpoint)}"
    compute = partial(_transformer_input_of, extractor)
    rows, keys = load_kept(paths, cache_dir, workers, settings, compute)
    return np.stack(rows), keys


def _transformer_input_of(extractor, path):
    y, rate = audio.load_audio(path, sample_rate=SAMPLE_RATE, duration=CLIP_SECONDS)
    y = audio.fix_length(audio.check_audio(y, path), int(CLIP_SECONDS * SAMPLE_RATE))
    x = extractor(y, sampling_rate=rate, return_tensors="np")["input_values"][0]
    # frames of 25 ms every 10 ms; the rest is padding, which the network adds again
    return x[: 1 + (len(y) - 400) // 160].astype(np.float16)


def _checkpoint_stamp(checkpoint):
    """Content of a local checkpoint; a hub's name stands for itself."""
    weights = sorted(Path(checkpoint).glob("*.safetensors")) if Path(checkpoint).is_dir() else []
    return "".join(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in weights)


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
    where = torch.device(device).type
    other = {} if where == "cpu" else {"devices": [device], "device_type": where}
    with torch.random.fork_rng(**{"devices": []} | other):
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
            probabilities = class_probabilities(
                model, network, validation[0], seed + epoch, batch_size
            )
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
    return network.eval(), pd.DataFrame(rows, columns=LOG_COLUMNS)


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


def class_probabilities(model, network, x, seed=0, batch_size=1):
    """Class probabilities of whole clips, in the way that fits the model.

    Parameters
    ----------
    model : str
        See :func:`train_classifier`.
    network : nn.Module
        Trained as `model`; put into evaluation mode.
    x : np.ndarray, shape (clips, frames, bands)
        What the network was trained on.
    seed, batch_size : int
        Of a faithful network, see :func:`predict_one_patch`; others take no notice.

    Returns
    -------
    np.ndarray of float32, shape (clips, classes)
        Rows sum to 1.

    Examples
    --------
    >>> class_probabilities("sbcnn", SBCNN(3), np.zeros((2, 126, 64), "f4")).shape
    (2, 3)
    """
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
