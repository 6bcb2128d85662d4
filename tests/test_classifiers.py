"""Front ends, architectures, training: held to librosa, scipy, published sizes, closed forms."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toy_clips import CLASSES, RATE, tone, write_clips

from soundscapes_utils import audio, classifiers
from soundscapes_utils.classifiers import Training

ESC10 = Path(__file__).parents[2] / "shared/data/ESC-10/audio"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # two torch jobs side by side that each want all cores slow each other a hundredfold
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("real"), CLASSES, range(1, 6), 2, 0)


def librosa_features(y):
    import librosa

    mel = librosa.feature.melspectrogram(
        y=y, sr=RATE, n_fft=1024, hop_length=512, n_mels=64, fmin=0, fmax=8000, power=2.0,
        htk=True, norm=None, pad_mode="reflect",
    )  # fmt: skip
    return np.log(mel + 0.001).T


def test_features_equal_librosas_mel_spectrogram():
    y = tone(700, 1, seconds=4.0)
    assert classifiers.features(y).shape == (126, 64)
    np.testing.assert_allclose(classifiers.features(y), librosa_features(y), atol=2e-4)


@pytest.mark.skipif(not ESC10.is_dir(), reason="the ESC-10 recordings are not on this machine")
def test_features_of_a_recording_equal_librosas(tmp_path):
    path = sorted(ESC10.glob("*.ogg"))[0]
    x, _ = classifiers.load_features([path], tmp_path, workers=1)
    y, _ = audio.load_audio(path, sample_rate=RATE)
    np.testing.assert_allclose(x[0], librosa_features(y[: 4 * RATE]), atol=5e-3)


def test_short_clips_are_repeated_to_four_seconds():
    y = tone(500, 2)
    np.testing.assert_array_equal(classifiers.features(y), classifiers.features(np.tile(y, 4)))


def test_standardise_divides_by_the_standard_deviation():
    x = classifiers.standardise(np.random.default_rng(0).normal(3, 5, size=(4, 126, 64)))
    np.testing.assert_allclose(x.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(1, 2)), 1, atol=1e-5)
    constant = classifiers.standardise(np.full((1, 126, 64), -6.9, np.float32))
    np.testing.assert_allclose(constant, 0, atol=1e-6)


def test_cache_follows_the_content_not_the_name(tmp_path):
    path = audio.save_audio(tmp_path / "a.wav", tone(300, 0), RATE)
    first, key = classifiers.load_features([path], tmp_path / "cache", workers=1)
    again, same_key = classifiers.load_features([path], tmp_path / "cache", workers=1)
    audio.save_audio(path, tone(900, 0), RATE)
    other, new_key = classifiers.load_features([path], tmp_path / "cache", workers=1)
    assert key == same_key != new_key
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


@pytest.mark.parametrize("content", [None, b"", b"not sound", "silence"])
def test_unusable_clips_are_named(tmp_path, content):
    path = tmp_path / "broken.wav"
    if content == "silence":
        audio.save_audio(path, np.zeros(RATE), RATE)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(audio.AudioError, match=r"broken\.wav"):
        classifiers.load_features([path], tmp_path / "cache", workers=1)


def test_released_code_divides_by_the_variance():
    x = np.random.default_rng(0).normal(3, 5, size=(3, 126, 64)).astype(np.float32)
    by_torch = torch.stack([(one - one.mean()) / one.var() for one in torch.from_numpy(x)])
    np.testing.assert_allclose(classifiers.divide_by_variance(x), by_torch[:, :63].numpy(), atol=1e-5)


def test_mfcc_statistics_by_scipy(tmp_path):
    from scipy.fft import dct

    y = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(44_100) / 44_100)
    path = audio.save_audio(tmp_path / "sine.wav", y, 44_100)
    y, _ = audio.load_audio(path)
    (found,), _ = classifiers.load_features([path], tmp_path, kind="mfcc")
    # a sine of f Hz crosses zero 2 f times a second; the padded frames at the ends cross less
    assert found[24] == pytest.approx(2 * 1000 / 44_100, rel=0.02)
    import librosa

    mel = librosa.filters.mel(sr=44_100, n_fft=2048)
    power = np.abs(librosa.stft(y, n_fft=2048, hop_length=512)) ** 2
    decibel = 10 * np.log10(np.maximum(mel @ power, 1e-10))
    decibel = np.maximum(decibel, decibel.max() - 80)
    cepstrum = dct(decibel, axis=0, norm="ortho")[1:13]
    np.testing.assert_allclose(found[:12], cepstrum.mean(axis=1), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(found[12:24], cepstrum.std(axis=1), rtol=1e-3, atol=1e-2)


def test_transformed_copies_sound_as_they_should(clips, tmp_path):
    few = clips[clips["label"] == "whistle"].head(1)
    made = classifiers.transform_clips(few, "ps1", tmp_path, workers=1)
    assert made["made_from"].tolist() == few["clip_id"].tolist() * 4
    assert set(made["label"]) == {"whistle"} and set(made["backend"]) == {"ps1"}
    for path, semitones in zip(made["path"], (-2, -1, 1, 2), strict=True):
        y, rate = audio.load_audio(path)
        peak = np.abs(np.fft.rfft(y * np.hanning(len(y)))).argmax() * rate / len(y)
        assert peak == pytest.approx(3000 * 2 ** (semitones / 12), rel=0.01)
    before = {path: Path(path).stat().st_mtime_ns for path in made["path"]}
    again = classifiers.transform_clips(few, "ps1", tmp_path, workers=1)
    pd.testing.assert_frame_equal(made, again)
    assert before == {path: Path(path).stat().st_mtime_ns for path in again["path"]}


def test_stretched_copies_last_as_long_as_they_should(clips, tmp_path):
    made = classifiers.transform_clips(clips.head(1), "ts", tmp_path, workers=1)
    lengths = [len(audio.load_audio(path)[0]) / RATE for path in made["path"]]
    assert lengths == pytest.approx([1 / speed for speed in (0.81, 0.93, 1.07, 1.23)], rel=0.01)


def test_all_clips_that_cannot_be_used_are_named_at_once(tmp_path):
    paths = [tmp_path / name for name in ("good.wav", "silent.wav", "text.wav", "gone.wav")]
    for path, level in zip(paths, (0.1, 0.0), strict=False):
        audio.save_audio(path, level * np.sin(np.arange(8000) * 0.3), 16_000)
    paths[2].write_text("no sound")
    for kind in ("logmel", "mfcc"):
        with pytest.raises(audio.AudioError, match="3 of 4 clips cannot be used") as caught:
            classifiers.load_features(paths, tmp_path / "cache", kind=kind)
        assert [path.name in str(caught.value) for path in paths] == [False, True, True, True]


# --- architectures --------------------------------------------------------------------------------


def count(network):
    return sum(p.numel() for p in network.parameters())


def conv(kernel, before, after):
    return kernel * kernel * before * after + after


def test_sbcnn_has_the_published_parameters():
    convolutions = conv(5, 1, 24) + conv(5, 24, 48) + conv(5, 48, 48)
    flat = 48 * 5 * 16  # 94 frames / 4 / 4, 64 bands / 2 / 2
    assert count(classifiers.SBCNN(10)) == convolutions + (flat * 64 + 64) + (64 * 10 + 10) == 333_594
    # the released code keeps 45 frames and states 1536 inputs of its first linear layer
    assert classifiers.SBCNN(10, n_frames=45).head[1].in_features == 1536


def test_crnn_has_the_published_parameters():
    filters = [1, 16, 32, 64, 128, 128, 128, 128]
    pairs = list(pairwise(filters))
    # convolution, batch norm (scale, shift) and the 1×1 value of the GLU
    blocks = sum(conv(3, a, b) + 2 * b + conv(1, b, b) for a, b in pairs)
    layer = [2 * 3 * 128 * (width + 128 + 2) for width in (128, 256)]
    head = 23 * 256 * 10 + 10  # 94 frames / 2 / 2
    assert count(classifiers.CRNN(10)) == blocks + sum(layer) + head == 1_166_170
    # the released code keeps 45 frames and states 2816 inputs of its linear layer
    assert classifiers.CRNN(10, n_frames=45).head.in_features == 2816


def test_networks_as_released_have_the_released_codes_parameters():
    pairs = list(pairwise([1, 16, 32, 64, 128, 128, 128, 128]))
    blocks = sum(conv(3, a, b) + 2 * b for a, b in pairs)  # no weights in the gate
    gru = sum(2 * 3 * 128 * (width + 128 + 2) for width in (128, 256))
    assert (
        count(classifiers.MODELS["crnn:as_released"](10)) == blocks + gru + 2816 * 10 + 10 == 1_063_914
    )
    convolutions = conv(5, 1, 24) + conv(5, 24, 48) + conv(5, 48, 48)
    linear = 1536 * 64 + 64 + 64 * 10 + 10
    assert count(classifiers.MODELS["sbcnn:as_released"](10)) == convolutions + linear == 186_138
    patch = torch.zeros(2, 1, 45, 64)
    for name in ("sbcnn", "crnn"):
        assert classifiers.MODELS[f"{name}:as_released"](7)(patch).shape == (2, 7)


def test_the_released_crnn_mixes_the_clips_of_a_batch():
    torch.manual_seed(0)
    network = classifiers.MODELS["crnn:as_released"](4).eval()
    x = torch.randn(5, 1, 45, 64)
    with torch.no_grad():
        assert not torch.allclose(network(x)[:1], network(x[:1]), atol=1e-4)
        # alone, a clip's frames do not see each other: to swap them swaps the GRU's output
        frames = network.convolutions(x[:1]).squeeze(-1).transpose(1, 2)
        forward, backward = network.gru(frames)[0], network.gru(frames.flip(1))[0]
    torch.testing.assert_close(forward, backward.flip(1))


def test_the_released_codes_gate_has_no_weights():
    x = torch.randn(2, 3, 5, 4)
    gate = classifiers.MODELS["crnn:as_released"](4).convolutions[2]
    by_glu = torch.nn.functional.glu(torch.cat([x, x], dim=-1), dim=-1)
    torch.testing.assert_close(gate(x), by_glu)


@pytest.mark.parametrize("name", ["sbcnn", "crnn"])
def test_a_clips_output_does_not_depend_on_its_batch(name):
    torch.manual_seed(0)
    network = classifiers.MODELS[name](4).eval()
    x = torch.randn(5, 1, classifiers.PATCH_FRAMES, 64)
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        torch.testing.assert_close(network(x)[order], network(x[order]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network(x)[:1], network(x[:1]), atol=1e-5, rtol=1e-4)


def test_the_gru_carries_the_past_and_the_future_of_a_clip():
    torch.manual_seed(0)
    gru = classifiers.CRNN(4).gru
    x = torch.zeros(3, 23, 128)
    changed = x.clone()
    changed[1, 11] = 1.0
    with torch.no_grad():
        moved = (gru(changed)[0] - gru(x)[0]).abs().amax(dim=2) > 1e-6
    assert moved[1].all(), "every step of the clip sees the change, before and after"
    assert not moved[[0, 2]].any(), "no other clip of the batch does"


def test_the_glu_has_a_value_of_its_own():
    torch.manual_seed(0)
    glu, x = classifiers.GLU(3), torch.randn(2, 3, 5, 4)
    weight, bias = glu.value.weight[:, :, 0, 0], glu.value.bias
    by_hand = torch.einsum("oc,bcft->boft", weight, x) + bias[:, None, None]
    torch.testing.assert_close(glu(x), by_hand * torch.sigmoid(x))
    assert not torch.allclose(glu(x), x * torch.sigmoid(x), atol=1e-2)
    # very negative input shuts the gate, whatever the value
    assert glu(torch.full((1, 3, 1, 1), -50.0)).abs().max() < 1e-12


# --- training ------------------------------------------------------------------------------------


def toy_set(n, seed):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, 126, 64))
    x[y == 1, :, 20:30] += 1.5
    return classifiers.standardise(x), y


# batch norm's running statistics need a few dozen steps before they serve the test
@pytest.mark.parametrize(("name", "epochs"), [("sbcnn", 5), ("crnn", 12)])
def test_networks_learn_and_keep_their_best_weights(name, epochs):
    train, validation = toy_set(16, 0), toy_set(8, 1)
    training = Training(epochs=epochs, batch_size=4)
    network, log = classifiers.train_classifier(name, train, validation, 2, training, seed=1)
    probabilities = classifiers.predict(name, network, validation[0])
    kept = -np.log(probabilities[np.arange(8), validation[1]]).mean()
    assert kept == pytest.approx(log["validation_loss"].min(), rel=1e-4)
    assert (probabilities.argmax(axis=1) == validation[1]).mean() >= 0.9


def test_training_follows_its_seed_and_leaves_the_callers_alone():
    train, validation = toy_set(12, 0), toy_set(6, 1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    def weights(seed):
        training = Training(epochs=2, batch_size=4)
        network, _ = classifiers.train_classifier("sbcnn", train, validation, 2, training, seed)
        return network.head[1].weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert torch.equal(torch.rand(3), expected)


def test_training_has_the_papers_settings(monkeypatch):
    asked, adam = [], torch.optim.Adam

    def recorded(weights, **options):
        asked.append(options)
        return adam(weights, **options)

    monkeypatch.setattr(torch.optim, "Adam", recorded)
    train = toy_set(4, 0)
    released = classifiers.divide_by_variance(train[0])
    for name, x in (("sbcnn", train[0]), ("crnn:as_released", released)):
        data = (x, train[1])
        classifiers.train_classifier(name, data, data, 2, Training(epochs=1))
    assert asked == [{"lr": 1e-3, "eps": 1e-7, "weight_decay": 1e-3}] * 2
    assert (Training().epochs, Training().batch_size, Training().patience) == (100, 128, 15)


@pytest.mark.parametrize("name", ["epochs", "patience", "batch_size", "patches_per_epoch", "workers"])
def test_training_says_what_it_cannot_take(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Training(**{name: 0})


def test_training_stops_when_validation_no_longer_improves():
    x, y = toy_set(12, 0)
    training = Training(epochs=30, batch_size=4, patience=2)
    _, log = classifiers.train_classifier("sbcnn", (x, y), (x, 1 - y), 2, training)
    assert len(log) == log["validation_loss"].idxmin() + 1 + 2 < 30


def record_targets(monkeypatch):
    """Class numbers of every batch whose loss is taken."""
    targets, loss = [], torch.nn.functional.cross_entropy

    def recorded(logits, y, **options):
        targets.append(y.tolist())
        return loss(logits, y, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    return targets


@pytest.mark.parametrize("model", ["sbcnn", "crnn"])
def test_released_and_corrected_see_the_same_batches(monkeypatch, model):
    targets = record_targets(monkeypatch)
    raw = np.random.default_rng(0).normal(size=(12, 126, 64))
    # every clip is a class of its own, so that the classes tell which clips were drawn
    y, training = np.arange(12), Training(epochs=2, batch_size=4)
    for name, x in (
        (model, classifiers.standardise(raw)),
        (f"{model}:as_released", classifiers.divide_by_variance(raw)),
    ):
        classifiers.train_classifier(name, (x, y), (x[:2], y[:2]), 12, training, seed=5)
    assert len(targets) == 12 and targets[:6] == targets[6:]


def test_one_random_patch_follows_its_seed():
    torch.manual_seed(0)
    network = classifiers.MODELS["sbcnn:as_released"](3)
    x = classifiers.divide_by_variance(toy_set(6, 0)[0])
    found, same, other = (
        classifiers.predict("sbcnn:as_released", network, x, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(found, same)
    assert not np.array_equal(found, other)
    with torch.no_grad():
        places = torch.from_numpy(x[:1]).unfold(1, 45, 1)[0, :15].transpose(1, 2).unsqueeze(1)
        every = network(places).softmax(dim=1).numpy()
    assert np.abs(every - found[0]).max(axis=1).min() < 1e-6


class Recorder(torch.nn.Module):
    """Keeps what it is trained on; its logits are three times the first inputs."""

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes, self.weight = n_classes, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        if self.training:
            Recorder.batch = x
        return 3 * x[:, 0, 0, : self.n_classes] + self.weight


def test_masks_cover_no_more_than_they_may(monkeypatch):
    monkeypatch.setitem(classifiers.MODELS, "recorder", Recorder)
    x = np.random.default_rng(0).random((50, 94, 64)).astype(np.float32) + 1
    data = (x, np.arange(50) % 2)
    classifiers.train_classifier("recorder", data, data, 2, Training(epochs=1), 0, ("specaugment", 2))
    empty = Recorder.batch == 0
    rows = {float(value) for value in x.flatten()}
    assert {float(value) for value in Recorder.batch[~empty]} <= rows
    frames = empty.all(dim=3).sum(dim=2).flatten()
    bands = empty.all(dim=2).sum(dim=2).flatten()
    assert 0 < frames.max() <= 2 * round(0.19 * 94) and 0 < bands.max() <= 2 * round(0.19 * 64)
    assert len(set(frames.tolist())) > 5, "each clip has masks of its own"


def test_mixup_is_the_loss_of_soft_labels(monkeypatch):
    monkeypatch.setitem(classifiers.MODELS, "recorder", Recorder)
    # clip i begins with the i-th unit vector: what the network reads are the soft labels themselves
    x = np.zeros((6, 94, 64), np.float32)
    x[:, 0, :6] = np.eye(6)
    data, training = (x, np.arange(6)), Training(epochs=1)
    _, log = classifiers.train_classifier("recorder", data, data, 6, training, 0, ("mixup", 1.0))
    soft = Recorder.batch[:, 0, 0, :6]
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
    assert ((soft > 0).sum(dim=1) == 2).any()
    expected = torch.nn.functional.cross_entropy(3 * soft, soft).item()
    assert log["train_loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("augment", [("specaugment", 2.0), ("mixup", 0.3)])
def test_augmented_training_learns_and_follows_its_seed(augment):
    train, validation = toy_set(16, 0), toy_set(8, 1)
    logs = [
        classifiers.train_classifier(
            "sbcnn", train, validation, 2, Training(epochs=4, batch_size=4), 1, kind
        )[1]
        for kind in (augment, augment, None)
    ]
    pd.testing.assert_frame_equal(logs[0], logs[1])
    assert not logs[0].equals(logs[2])
    assert logs[0]["validation_loss"].min() < np.log(2)


def test_baselines_tell_clouds_apart():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 5)) + 4 * y[:, None]
    for name in ("knn", "forest", "svm", "probe"):
        fitted = classifiers.fit_baseline(name, x[:40], y[:40], seed=1)
        assert (fitted.predict(x[40:]) == y[40:]).mean() >= 0.9


@pytest.mark.parametrize(("patches", "counts"), [(None, {1}), (13, {2, 3}), (3, {1})])
def test_an_epoch_can_hold_any_number_of_patches(monkeypatch, patches, counts):
    targets = record_targets(monkeypatch)
    x, y = np.zeros((5, 126, 64), np.float32), np.arange(5)
    training = Training(epochs=1, batch_size=20, patches_per_epoch=patches)
    classifiers.train_classifier("sbcnn", (x, y), (x, y), 5, training)
    # as even as possible: nothing a third time before all were drawn twice
    (drawn,) = targets
    assert len(drawn) == (patches or 5) and set(np.unique(drawn, return_counts=True)[1]) == counts


def test_a_clip_is_scored_by_the_mean_over_patches_that_cover_it():
    torch.manual_seed(0)
    network, x = classifiers.SBCNN(3), toy_set(2, 0)[0]
    found = classifiers.predict("sbcnn", network, x)
    np.testing.assert_array_equal(found, classifiers.predict("sbcnn", network, x))
    with torch.no_grad():
        first, last = (
            network(torch.from_numpy(x[:, start : start + 94]).unsqueeze(1)).softmax(dim=1)
            for start in (0, 32)
        )
    np.testing.assert_allclose(found, ((first + last) / 2).numpy(), atol=1e-6)
    # pooling drops the patch's last frames that fill no window of 4
    for frame in (0, 120):
        changed = x.copy()
        changed[:, frame] += 5
        assert np.abs(classifiers.predict("sbcnn", network, changed) - found).max() > 1e-6
