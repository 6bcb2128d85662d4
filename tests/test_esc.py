"""Classifiers, arms, units and their reading, held to closed forms and to other libraries."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from soundscapes_utils import audio, esc, networks

ESC10 = Path(__file__).parents[2] / "shared/data/ESC-10/audio"
RATE = 16_000


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # two torch jobs side by side that each want all cores slow each other a hundredfold
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tone(frequency, seed, seconds=1.0):
    t = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=t.size)
    return (0.3 * np.sin(2 * np.pi * frequency * t) + 0.02 * noise).astype(np.float32)


def write_clips(folder, classes, folds, each, first_seed):
    rows = []
    for label, frequency in classes.items():
        for fold in folds:
            for i in range(each):
                name = f"{label}-{fold}-{i}"
                path = audio.save_audio(
                    folder / f"{name}.wav", tone(frequency, first_seed + len(rows)), RATE
                )
                rows.append((name, str(path), label, fold, name))
    return pd.DataFrame(rows, columns=["clip_id", "path", "label", "fold", "source_id"])


CLASSES = {"hum": 200, "whistle": 3000}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("real"), CLASSES, range(1, 6), 2, 0)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    made = write_clips(tmp_path_factory.mktemp("made"), CLASSES, [0], 12, 1000)
    return made.drop(columns="fold").assign(backend="toy", prompt_family="label", checkpoint="c1")


def quick_run(clips, generated, out_dir, arms=("real", "both:1"), **options):
    settings = {"models": ["sbcnn"], "epochs": 1, "batch_size": 8, "workers": 1} | options
    return esc.run_arms(clips, generated, list(arms), out_dir=out_dir, **settings)


# --- features ------------------------------------------------------------------------------------


def librosa_features(y):
    import librosa

    mel = librosa.feature.melspectrogram(
        y=y, sr=RATE, n_fft=1024, hop_length=512, n_mels=64, fmin=0, fmax=8000, power=2.0,
        htk=True, norm=None, pad_mode="reflect",
    )  # fmt: skip
    return np.log(mel + 0.001).T


def test_features_equal_librosas_mel_spectrogram():
    y = tone(700, 1, seconds=4.0)
    assert esc.features(y).shape == (126, 64)
    np.testing.assert_allclose(esc.features(y), librosa_features(y), atol=2e-4)


@pytest.mark.skipif(not ESC10.is_dir(), reason="the ESC-10 recordings are not on this machine")
def test_features_of_a_recording_equal_librosas(tmp_path):
    path = sorted(ESC10.glob("*.ogg"))[0]
    x, _ = esc.load_features([path], tmp_path, workers=1)
    y, _ = audio.load_audio(path, sample_rate=RATE)
    np.testing.assert_allclose(x[0], librosa_features(y[: 4 * RATE]), atol=5e-3)


def test_short_clips_are_repeated_to_four_seconds():
    y = tone(500, 2)
    np.testing.assert_array_equal(esc.features(y), esc.features(np.tile(y, 4)))


def test_standardise_divides_by_the_standard_deviation():
    x = esc.standardise(np.random.default_rng(0).normal(3, 5, size=(4, 126, 64)))
    np.testing.assert_allclose(x.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(1, 2)), 1, atol=1e-5)
    constant = esc.standardise(np.full((1, 126, 64), -6.9, np.float32))
    np.testing.assert_allclose(constant, 0, atol=1e-6)


def test_cache_follows_the_content_not_the_name(tmp_path):
    path = audio.save_audio(tmp_path / "a.wav", tone(300, 0), RATE)
    first, key = esc.load_features([path], tmp_path / "cache", workers=1)
    again, same_key = esc.load_features([path], tmp_path / "cache", workers=1)
    audio.save_audio(path, tone(900, 0), RATE)
    other, new_key = esc.load_features([path], tmp_path / "cache", workers=1)
    assert key == same_key != new_key
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("content", [None, b"", b"not sound", "silence"])
def test_unusable_clips_are_named(tmp_path, content):
    path = tmp_path / "broken.wav"
    if content == "silence":
        audio.save_audio(path, np.zeros(RATE), RATE)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(audio.AudioError, match=r"broken\.wav"):
        esc.load_features([path], tmp_path / "cache", workers=1)


def test_released_code_divides_by_the_variance():
    x = np.random.default_rng(0).normal(3, 5, size=(3, 126, 64)).astype(np.float32)
    by_torch = torch.stack([(one - one.mean()) / one.var() for one in torch.from_numpy(x)])
    np.testing.assert_allclose(esc.divide_by_variance(x), by_torch[:, :63].numpy(), atol=1e-5)


def test_mfcc_statistics_by_scipy():
    from scipy.fft import dct

    y = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(44_100) / 44_100)
    found = esc.mfcc_statistics(y)
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
    made = esc.transform_clips(few, "ps1", tmp_path, workers=1)
    assert made["made_from"].tolist() == few["clip_id"].tolist() * 4
    assert set(made["label"]) == {"whistle"} and set(made["backend"]) == {"ps1"}
    for path, semitones in zip(made["path"], (-2, -1, 1, 2), strict=True):
        y, rate = audio.load_audio(path)
        peak = np.abs(np.fft.rfft(y * np.hanning(len(y)))).argmax() * rate / len(y)
        assert peak == pytest.approx(3000 * 2 ** (semitones / 12), rel=0.01)
    before = {path: Path(path).stat().st_mtime_ns for path in made["path"]}
    again = esc.transform_clips(few, "ps1", tmp_path, workers=1)
    pd.testing.assert_frame_equal(made, again)
    assert before == {path: Path(path).stat().st_mtime_ns for path in again["path"]}


def test_stretched_copies_last_as_long_as_they_should(clips, tmp_path):
    made = esc.transform_clips(clips.head(1), "ts", tmp_path, workers=1)
    lengths = [len(audio.load_audio(path)[0]) / RATE for path in made["path"]]
    assert lengths == pytest.approx([1 / speed for speed in (0.81, 0.93, 1.07, 1.23)], rel=0.01)


# --- networks ------------------------------------------------------------------------------------


def count(network):
    return sum(p.numel() for p in network.parameters())


def conv(kernel, before, after):
    return kernel * kernel * before * after + after


def test_sbcnn_has_the_published_parameters():
    convolutions = conv(5, 1, 24) + conv(5, 24, 48) + conv(5, 48, 48)
    flat = 48 * 5 * 16  # 94 frames / 4 / 4, 64 bands / 2 / 2
    assert count(esc.SBCNN(10)) == convolutions + (flat * 64 + 64) + (64 * 10 + 10) == 333_594
    # the released code keeps 45 frames and states 1536 inputs of its first linear layer
    assert esc.SBCNN(10, n_frames=45).head[1].in_features == 1536


def test_crnn_has_the_published_parameters():
    filters = [1, 16, 32, 64, 128, 128, 128, 128]
    pairs = list(pairwise(filters))
    # convolution, batch norm (scale, shift) and the 1×1 value of the GLU
    blocks = sum(conv(3, a, b) + 2 * b + conv(1, b, b) for a, b in pairs)
    layer = [2 * 3 * 128 * (width + 128 + 2) for width in (128, 256)]
    head = 23 * 256 * 10 + 10  # 94 frames / 2 / 2
    assert count(esc.CRNN(10)) == blocks + sum(layer) + head
    # the released code keeps 45 frames and states 2816 inputs of its linear layer
    assert esc.CRNN(10, n_frames=45).head.in_features == 2816


def test_faithful_networks_have_the_released_codes_parameters():
    pairs = list(pairwise([1, 16, 32, 64, 128, 128, 128, 128]))
    blocks = sum(conv(3, a, b) + 2 * b for a, b in pairs)  # no weights in the gate
    gru = sum(2 * 3 * 128 * (width + 128 + 2) for width in (128, 256))
    assert count(esc.FAITHFUL["crnn"](10)) == blocks + gru + 2816 * 10 + 10
    convolutions = conv(5, 1, 24) + conv(5, 24, 48) + conv(5, 48, 48)
    assert count(esc.FAITHFUL["sbcnn"](10)) == convolutions + 1536 * 64 + 64 + 64 * 10 + 10
    patch = torch.zeros(2, 1, 45, 64)
    assert all(network(7)(patch).shape == (2, 7) for network in esc.FAITHFUL.values())


def test_the_faithful_crnn_mixes_the_clips_of_a_batch():
    torch.manual_seed(0)
    network = esc.FAITHFUL["crnn"](4).eval()
    x = torch.randn(5, 1, 45, 64)
    with torch.no_grad():
        assert not torch.allclose(network(x)[:1], network(x[:1]), atol=1e-4)
        # alone, a clip's frames do not see each other: to swap them swaps the GRU's output
        frames = network.convolutions(x[:1]).squeeze(-1).transpose(1, 2)
        forward, backward = network.gru(frames)[0], network.gru(frames.flip(1))[0]
    torch.testing.assert_close(forward, backward.flip(1))


def test_the_released_codes_gate_has_no_weights():
    x = torch.randn(2, 3, 5, 4)
    gate = esc.FAITHFUL["crnn"](4).convolutions[2]
    by_glu = torch.nn.functional.glu(torch.cat([x, x], dim=-1), dim=-1)
    torch.testing.assert_close(gate(x), by_glu)


@pytest.mark.parametrize("name", esc.MODELS)
def test_a_clips_output_does_not_depend_on_its_batch(name):
    torch.manual_seed(0)
    network = esc.MODELS[name](4).eval()
    x = torch.randn(5, 1, esc.PATCH_FRAMES, 64)
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        torch.testing.assert_close(network(x)[order], network(x[order]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network(x)[:1], network(x[:1]), atol=1e-5, rtol=1e-4)


def test_the_gru_carries_the_past_and_the_future_of_a_clip():
    torch.manual_seed(0)
    gru = esc.CRNN(4).gru
    x = torch.zeros(3, 23, 128)
    changed = x.clone()
    changed[1, 11] = 1.0
    with torch.no_grad():
        moved = (gru(changed)[0] - gru(x)[0]).abs().amax(dim=2) > 1e-6
    assert moved[1].all(), "every step of the clip sees the change, before and after"
    assert not moved[[0, 2]].any(), "no other clip of the batch does"


def test_the_glu_has_a_value_of_its_own():
    torch.manual_seed(0)
    glu, x = esc.GLU(3), torch.randn(2, 3, 5, 4)
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
    return esc.standardise(x), y


# batch norm's running statistics need a few dozen steps before they serve the test
@pytest.mark.parametrize(("name", "epochs"), [("sbcnn", 5), ("crnn", 12)])
def test_networks_learn_and_keep_their_best_weights(name, epochs):
    train, validation = toy_set(16, 0), toy_set(8, 1)
    network, log = esc.train_classifier(
        name, train, validation, 2, epochs=epochs, batch_size=4, seed=1
    )
    probabilities = esc.predict(network, validation[0])
    kept = -np.log(probabilities[np.arange(8), validation[1]]).mean()
    assert kept == pytest.approx(log["validation_loss"].min(), rel=1e-4)
    assert (probabilities.argmax(axis=1) == validation[1]).mean() >= 0.9


def test_training_follows_its_seed_and_leaves_the_callers_alone():
    train, validation = toy_set(12, 0), toy_set(6, 1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    def weights(seed):
        network, _ = esc.train_classifier(
            "sbcnn", train, validation, 2, epochs=2, batch_size=4, seed=seed
        )
        return network.head[1].weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert torch.equal(torch.rand(3), expected)


def test_training_stops_when_validation_no_longer_improves():
    x, y = toy_set(12, 0)
    _, log = esc.train_classifier(
        "sbcnn", (x, y), (x, 1 - y), 2, epochs=30, batch_size=4, patience=2
    )
    assert len(log) == log["validation_loss"].idxmin() + 1 + 2 < 30


def test_faithful_and_corrected_see_the_same_batches(monkeypatch):
    seen, loss = [], networks._loss

    def recorded(network, batch, y, augment):
        seen[-1].append(y.tolist())
        return loss(network, batch, y, augment)

    monkeypatch.setattr(networks, "_loss", recorded)
    raw = np.random.default_rng(0).normal(size=(12, 126, 64))
    # every clip is a class of its own, so that the classes tell which clips were drawn
    y = np.arange(12)
    for name, x in (
        ("sbcnn", esc.standardise(raw)),
        ("sbcnn:faithful", esc.divide_by_variance(raw)),
    ):
        seen.append([])
        esc.train_classifier(name, (x, y), (x[:2], y[:2]), 12, epochs=2, batch_size=4, seed=5)
    assert seen[0] == seen[1] and len(seen[0]) == 6


def test_one_random_patch_follows_its_seed():
    torch.manual_seed(0)
    network = esc.FAITHFUL["sbcnn"](3)
    x = esc.divide_by_variance(toy_set(6, 0)[0])
    found = esc.predict_one_patch(network, x, seed=1)
    np.testing.assert_array_equal(found, esc.predict_one_patch(network, x, seed=1))
    assert not np.array_equal(found, esc.predict_one_patch(network, x, seed=2))
    with torch.no_grad():
        places = torch.from_numpy(x[:1]).unfold(1, 45, 1)[0, :15].transpose(1, 2).unsqueeze(1)
        every = network(places).softmax(dim=1).numpy()
    assert np.abs(every - found[0]).max(axis=1).min() < 1e-6


def test_masks_cover_no_more_than_they_may():
    torch.manual_seed(0)
    batch = torch.rand(50, 1, 94, 64) + 1
    masked = networks._masked(batch, 2)
    empty = masked == 0
    assert torch.equal(masked[~empty], batch[~empty])
    frames = empty.all(dim=3).sum(dim=2).flatten()
    bands = empty.all(dim=2).sum(dim=2).flatten()
    assert 0 < frames.max() <= 2 * round(0.19 * 94) and 0 < bands.max() <= 2 * round(0.19 * 64)
    assert len(set(frames.tolist())) > 5, "each clip has masks of its own"


def test_mixup_is_the_loss_of_soft_labels():
    torch.manual_seed(0)
    heard = []

    class Network(torch.nn.Module):
        def forward(self, x):
            heard.append(x)
            return 3 * x.flatten(1)

    # clip i is the i-th unit vector: what the network hears are the soft labels themselves
    y = torch.arange(6)
    loss = networks._loss(Network(), torch.eye(6).reshape(6, 1, 1, 6), y, ("mixup", 1.0))
    soft = heard[0].flatten(1)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
    assert ((soft > 0).sum(dim=1) == 2).any()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(3 * soft, soft))


@pytest.mark.parametrize("augment", [("specaugment", 2.0), ("mixup", 0.3)])
def test_augmented_training_learns_and_follows_its_seed(augment):
    train, validation = toy_set(16, 0), toy_set(8, 1)
    logs = [
        esc.train_classifier(
            "sbcnn", train, validation, 2, epochs=4, batch_size=4, seed=1, augment=kind
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
        fitted = esc.fit_baseline(name, x[:40], y[:40], seed=1)
        assert (fitted.predict(x[40:]) == y[40:]).mean() >= 0.9
    with pytest.raises(ValueError, match="choose one of knn"):
        esc.fit_baseline("tree", x, y)


def test_an_epoch_can_hold_any_number_of_patches():
    chance = torch.Generator().manual_seed(0)
    once = networks._draw_order(5, None, chance)
    assert sorted(once.tolist()) == list(range(5))
    # as even as possible: nothing a third time before all were drawn twice
    counts = torch.bincount(networks._draw_order(5, 13, chance), minlength=5)
    assert counts.sum() == 13 and set(counts.tolist()) == {2, 3}
    assert len(set(networks._draw_order(5, 3, chance).tolist())) == 3


def test_a_clip_is_scored_by_the_mean_over_patches_that_cover_it():
    torch.manual_seed(0)
    network, x = esc.SBCNN(3), toy_set(2, 0)[0]
    found = esc.predict(network, x)
    np.testing.assert_array_equal(found, esc.predict(network, x))
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
        assert np.abs(esc.predict(network, changed) - found).max() > 1e-6


# --- plan ----------------------------------------------------------------------------------------


def test_plan_counts_and_nests(clips, generated):
    arms = ["real", "both:0.5", "both:2", "mixed:1", "mixed:3", "synthetic:1"]
    plan = esc.plan_units(clips, generated, arms, models=["sbcnn"], runs=2)
    one = plan[plan["run"] == 0].set_index(["arm", "ratio"])
    # 2 classes × 3 training folds × 2 clips
    counts = one[["n_real", "n_synthetic"]].apply(tuple, axis=1).to_dict()
    assert counts == {
        ("real", 0): (12, 0), ("both", 0.5): (12, 6), ("both", 2): (12, 24),
        ("mixed", 1): (8, 4), ("mixed", 3): (0, 12), ("synthetic", 1): (0, 12),
    }  # fmt: skip
    assert set(one.loc["both", 0.5]["synthetic_rows"]) < set(one.loc["both", 2]["synthetic_rows"])
    assert set(one.loc["mixed", 1]["real_rows"]) < set(one.loc["real", 0]["real_rows"])
    assert len(set(one["seed"])) == 1 and len(set(plan["seed"])) == 2


def test_plan_validates_and_tests_on_other_real_folds(clips, generated):
    plan = esc.plan_units(clips, generated, ["mixed:2"], models=["crnn"], test_folds=[5, 2])
    for unit in plan.to_dict("records"):
        folds = {name: set(clips["fold"].iloc[unit[f"{name}_rows"]]) for name in
                 ("real", "validation", "test")}  # fmt: skip
        assert folds["test"] == {unit["fold"]}
        assert folds["validation"] == {unit["fold"] % 5 + 1}
        assert not folds["real"] & (folds["test"] | folds["validation"])


def test_few_real_clips_are_spread_over_the_folds(clips, generated):
    plan = esc.plan_units(clips, generated, ["real"], models=["sbcnn"], real_per_class=3)
    chosen = clips.iloc[plan["real_rows"][0]]
    assert chosen.groupby("label").size().to_dict() == {"hum": 3, "whistle": 3}
    assert (chosen.groupby(["label", "fold"]).size() == 1).all()


def one_unit(clips, generated, arm, **options):
    options = {"models": ["sbcnn"]} | options
    (unit,) = esc.plan_units(clips, generated, [arm], **options).to_dict("records")
    return unit


def test_arms_are_read():
    assert esc.parse_arm("both@a+b/8:0.5") == ("both@a+b/8", 0.5)
    assert esc.arm_parts("both@a+b/8") == ("both", "a+b", 8)
    assert esc.parse_arm("real/4") == ("real/4", 0.0)
    assert esc.arm_parts("mixup") == ("mixup", "", None)


def test_controls_have_as_many_clips_as_their_arms(clips, generated):
    real = one_unit(clips, None, "real")["real_rows"]
    repeat = one_unit(clips, None, "repeat:1.5")
    counts = pd.Series(repeat["real_rows"]).value_counts()
    assert repeat["n_real"] == one_unit(clips, generated, "both:1.5")["n_real"] + 18
    assert set(counts.index) == set(real) and set(counts) == {2, 3}
    assert clips["label"].iloc[repeat["real_rows"]].value_counts().tolist() == [15, 15]
    mixed, dropped = (one_unit(clips, generated, f"{name}:2") for name in ("mixed", "dropped"))
    assert dropped["real_rows"] == mixed["real_rows"] and dropped["n_synthetic"] == 0
    thinned = one_unit(clips, generated, "thinned:2")
    assert thinned["n_real"] + thinned["n_synthetic"] == len(real)
    assert 0 < thinned["n_real"] < len(real)
    labels = [*clips["label"].iloc[thinned["real_rows"]]]
    labels += [*generated["label"].iloc[thinned["synthetic_rows"]]]
    assert labels.count("hum") == labels.count("whistle")
    for arm in ("steps:2", "specaugment:1", "mixup:0.2"):
        assert one_unit(clips, None, arm)["real_rows"] == real


def test_few_real_clips_are_an_axis_of_nested_sets(clips, generated):
    sets = [set(one_unit(clips, None, f"real/{k}")["real_rows"]) for k in (1, 2, 4)]
    assert [len(part) for part in sets] == [2, 4, 8]
    assert sets[0] < sets[1] < sets[2]
    both = one_unit(clips, generated, "both/2:3")
    assert set(both["real_rows"]) == sets[1] and both["n_synthetic"] == 12


def test_merged_generators_take_turns(clips, generated):
    tables = {"a": generated.assign(backend="a"), "b": generated.assign(backend="b")}
    alone = one_unit(clips, tables, "both@a:1")
    merged = one_unit(clips, tables, "both@a+b:1")
    backends = pd.concat(tables.values())["backend"].iloc[merged["synthetic_rows"]]
    assert backends.value_counts().to_dict() == {"a": 6, "b": 6}
    # a table's own order does not depend on the tables beside it
    assert (
        one_unit(clips, {"a": tables["a"]}, "both@a:1")["synthetic_rows"] == alone["synthetic_rows"]
    )
    with pytest.raises(ValueError, match=r"called 'c'.*\['a', 'b'\]"):
        one_unit(clips, tables, "both@c:1")
    with pytest.raises(ValueError, match="both@name:1"):
        one_unit(clips, tables, "both:1")


def test_copies_serve_only_beside_their_recording(clips):
    copies = pd.concat([clips.assign(made_from=clips["clip_id"], copy=i) for i in range(2)])
    for arm in ("both@ps1:2", "both@ps1/2:2"):
        unit = one_unit(clips, {"ps1": copies}, arm)
        origins = copies["made_from"].iloc[unit["synthetic_rows"]]
        assert set(origins) == set(clips["clip_id"].iloc[unit["real_rows"]])
        assert len(origins) == 2 * unit["n_real"]
    with pytest.raises(ValueError, match="needs 18 synthetic clips of 'hum', there are 12"):
        one_unit(clips, {"ps1": copies}, "both@ps1:3")


def test_a_generator_of_each_fold_serves_its_own_fold(clips, generated):
    tables = [generated.assign(held_out_fold=fold) for fold in (4, 5)]
    plan = esc.plan_units(clips, pd.concat(tables), ["both:1"], models=["sbcnn"], test_folds=[4, 5])
    rows = pd.concat(tables)["held_out_fold"].to_numpy()
    for unit in plan.to_dict("records"):
        assert set(rows[unit["synthetic_rows"]]) == {unit["fold"]}
    with pytest.raises(ValueError, match="there are 0"):
        esc.plan_units(clips, pd.concat(tables), ["both:1"], test_folds=[1])


def test_leaks_are_looked_for_table_by_table(clips, generated):
    tables, seen = {"a": generated, "b": generated}, {"a": [5], "b": [1, 2]}
    esc.plan_units(clips, tables, ["both@b:1"], generator_folds=seen)
    with pytest.raises(esc.LeakError, match=r"fold \[5\]"):
        esc.plan_units(clips, tables, ["both@a+b:1"], generator_folds=seen)


def test_validation_as_the_released_code_has_it(clips, generated):
    unit = {
        arm: one_unit(clips, generated, arm, validation="faithful")
        for arm in ("real", "both:1", "mixed:1", "synthetic:1")
    }
    # four real clips validate; both adds as many synthetic ones, synthetic takes only those
    counts = {arm: (len(u["validation_rows"]), u["n_validation"]) for arm, u in unit.items()}
    assert counts == {"real": (4, 4), "both:1": (4, 8), "mixed:1": (4, 4), "synthetic:1": (0, 4)}
    both = unit["both:1"]
    assert not set(both["synthetic_rows"]) & set(both["validation_synthetic_rows"])
    assert "validation_synthetic_rows" not in esc.plan_units(clips, generated, ["both:1"])


def test_without_early_stopping_the_validation_fold_trains(clips):
    unit = one_unit(clips, None, "real", models=["svm"], validation="none")
    assert unit["n_real"] == 16 and unit["n_validation"] == 0
    assert set(clips["fold"].iloc[unit["real_rows"]]) == {1, 2, 3, 4}


def whole_set(dataset, n_folds, n_classes):
    rows = [
        (fold, f"c{k}", f"{fold}-{k}") for fold in range(1, n_folds + 1) for k in range(n_classes)
    ]
    table = pd.DataFrame(rows, columns=["fold", "label", "source_id"])
    return table.assign(dataset=dataset, clip_id=table["source_id"])


def test_urbansound8ks_protocol_is_the_papers():
    found = esc.protocol(whole_set("urbansound8k", 10, 10)).set_index("test_fold")
    for n in range(1, 11):
        validation = (n + 1) % 11 or 1
        assert found.loc[n, "validation_fold"] == validation
        assert found.loc[n, "training_folds"] == sorted({*range(1, 11)} - {n, validation})
    assert (found[["n_train", "n_validation", "n_test"]] == [80, 10, 10]).all(axis=None)
    assert len(esc.protocol(whole_set("esc50", 5, 50))) == 5


def test_half_a_data_set_has_no_protocol():
    with pytest.raises(ValueError, match="10 folds and 10 classes, these clips have 9 and 10"):
        esc.protocol(whole_set("urbansound8k", 9, 10))
    with pytest.raises(ValueError, match="datasets"):
        esc.protocol(whole_set("tau", 5, 10))


def test_random_drop_leaves_as_many_as_the_filter(generated):
    filtered = generated.iloc[[0, 1, 2, 12]]
    left = esc.random_drop(generated, filtered, seed=1)
    assert left["label"].value_counts().to_dict() == {"hum": 3, "whistle": 1}
    assert left.index.is_unique and set(left.index) <= set(generated.index)
    assert not left.equals(esc.random_drop(generated, filtered, seed=2))
    with pytest.raises(ValueError, match="3 clips of 'hum' wanted, there are 1"):
        esc.random_drop(filtered.iloc[2:], filtered)


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        (["real@a"], {}, "cannot read the arm 'real@a'"),
        (["both/0:1"], {}, "cannot read the arm"),
        (["dropped:0.5"], {}, "cannot read the arm"),
        (["mixup:inf"], {}, "cannot read the arm"),
        (["real"], {"models": ["knn:faithful"]}, "models are"),
        (["real"], {"models": ["probe:"]}, "models are"),
        (["real"], {"validation": "none"}, "sbcnn stops early"),
        (["real"], {"validation": "test"}, "validation must be"),
        (["mixup:0.2"], {"models": ["sbcnn", "knn"]}, "leave it or knn out"),
        (["both:3"], {}, "needs 18 synthetic clips of 'hum', there are 12"),
        (["mixed:4"], {}, "more folds than the 3"),
        (["real"], {"real_per_class": 9}, "'hum' has 6 training clips"),
        (["real"], {"models": ["alexnet"]}, "models are"),
        (["real"], {"test_folds": [9]}, "test_fold 9"),
        (["bothh:1"], {}, "cannot read the arm 'bothh:1'"),
        (["both"], {}, "cannot read the arm"),
        (["mixed:0.5"], {}, "cannot read the arm"),
        (["both:-1"], {}, "cannot read the arm"),
        ([], {}, "arms"),
    ],
)
def test_impossible_plans_say_why(clips, generated, arms, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        esc.plan_units(clips, generated, arms, **options)


def test_arms_with_synthetic_clips_need_some(clips):
    with pytest.raises(ValueError, match="02_synthetic_generation"):
        esc.plan_units(clips, None, ["both:1"])


def test_a_generator_that_saw_the_test_fold_is_refused(clips, generated, tmp_path):
    with pytest.raises(esc.LeakError, match=r"c1.*fold \[5\]"):
        quick_run(clips, generated, tmp_path, generator_folds=[1, 2, 3, 4, 5])
    # it may have seen what the classifier trains on, and real clips alone cannot leak
    esc.plan_units(clips, generated, ["both:1"], generator_folds=[2, 3, 4])
    esc.plan_units(clips, None, ["real"], generator_folds=[5])


def test_a_source_in_two_splits_is_refused(clips):
    with pytest.raises(ValueError, match="one-recording"):
        esc.plan_units(clips.assign(source_id="one-recording"), None, ["real"])


# --- units ---------------------------------------------------------------------------------------


def test_results_and_predictions_tables(clips, generated, tmp_path, capsys):
    results = quick_run(clips, generated, tmp_path, ["real", "mixed:1"])
    assert list(results) == esc.RESULT_COLUMNS
    printed = capsys.readouterr().out
    assert "2 classifiers: 2 to train" in printed and "n_synthetic" in printed
    assert results["backend"].tolist() == ["", "toy"]
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert len(predictions) == 2 * 4
    right = predictions["label"] == predictions["predicted"]
    by_arm = right.groupby(predictions["arm"]).mean()
    assert results.set_index("arm")["accuracy"].to_dict() == by_arm.to_dict()
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "results.csv", keep_default_na=False), results
    )


def test_stopping_anywhere_and_resuming_gives_the_same_table(
    clips, generated, tmp_path, monkeypatch
):
    arms = ["real", "both:1", "synthetic:1"]
    whole = quick_run(clips, generated, tmp_path / "whole", arms)
    train, calls = esc.train_classifier, []

    def killed_in_the_second(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(esc, "train_classifier", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        quick_run(clips, generated, tmp_path / "cut", arms)
    resumed = quick_run(clips, generated, tmp_path / "cut", arms)
    assert len(calls) == 4, "the finished unit is not trained again"
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), resumed.drop(columns="seconds"))
    quick_run(clips, generated, tmp_path / "cut", arms)
    assert len(calls) == 4


def test_a_unit_without_its_learning_curve_is_trained_again(clips, tmp_path):
    quick_run(clips, None, tmp_path, ["real"])
    (log,) = (tmp_path / "units").glob("*.log.csv")
    whole = log.read_bytes()
    log.unlink()
    quick_run(clips, None, tmp_path, ["real"])
    assert log.read_bytes() == whole


def test_changed_input_is_trained_again_and_only_that(clips, generated, tmp_path):
    quick_run(clips, generated, tmp_path / "out")
    changed = generated.copy()
    for row, path in enumerate(generated["path"]):
        y, rate = audio.load_audio(path)
        changed.loc[row, "path"] = str(audio.save_audio(tmp_path / f"{row}.wav", y * 0.5, rate))
    quick_run(clips, changed, tmp_path / "out")
    kept = [path.name.rsplit("-", 1)[0] for path in (tmp_path / "out/units").glob("*.json")]
    assert sorted(kept) == ["both-1-sbcnn-fold5-run0"] * 2 + ["real-0-sbcnn-fold5-run0"]


def test_a_failing_unit_is_named_and_the_rest_goes_on(clips, generated, tmp_path, monkeypatch):
    train = esc.train_classifier

    def no_crnn(model, *args, **options):
        if model == "crnn":
            raise RuntimeError("no memory")
        return train(model, *args, **options)

    monkeypatch.setattr(esc, "train_classifier", no_crnn)
    with pytest.raises(esc.UnitsFailed, match=r"(?s)2 of 4.*real-0-crnn-fold5-run0.*no memory"):
        quick_run(clips, generated, tmp_path, models=["crnn", "sbcnn"])
    assert pd.read_csv(tmp_path / "results.csv")["model"].tolist() == ["sbcnn"] * 2


def test_processes_give_the_same_results_as_one(clips, generated, tmp_path):
    here = quick_run(clips, generated, tmp_path / "one")
    there = quick_run(clips, generated, tmp_path / "two", workers=2)
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"))
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left == {"features", "units", "results.csv", "predictions.csv", "curves.csv"}


def constant_rows(paths, silence, cache_dir):
    """An embedding that hears the loudest frequency."""
    rows = []
    for path in paths:
        y, _ = audio.load_audio(path)
        rows.append([np.abs(np.fft.rfft(y)).argmax(), len(y)])
    return np.array(rows, dtype=np.float32)


class Reader:
    embed = staticmethod(constant_rows)


def test_baselines_and_probe_run_as_units(clips, tmp_path):
    results = quick_run(
        clips, None, tmp_path, ["real"], models=["knn", "svm", "probe:pitch"], validation="none",
        embeddings={"pitch": Reader()}, test_folds=[4, 5],
    )  # fmt: skip
    assert results["accuracy"].tolist() == [1.0] * 6
    assert set(results["n_real"]) == {16} and set(results["epochs"]) == {0}
    assert pd.read_csv(tmp_path / "curves.csv").empty
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "units").iterdir()}
    quick_run(
        clips, None, tmp_path, ["real"], models=["knn", "svm", "probe:pitch"], validation="none",
        embeddings={"pitch": Reader()}, test_folds=[4, 5],
    )  # fmt: skip
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "units").iterdir()}


@pytest.fixture(scope="module")
def tiny_transformer(tmp_path_factory):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    folder = tmp_path_factory.mktemp("ast")
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_length=420, frequency_stride=40, time_stride=60, num_labels=5,
    )  # fmt: skip
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=420).save_pretrained(folder)
    return folder


def test_the_transformer_hears_what_its_own_extractor_gives(tiny_transformer, clips):
    from transformers import ASTFeatureExtractor

    path = clips["path"].iloc[0]
    extractor = ASTFeatureExtractor.from_pretrained(tiny_transformer)
    y = np.tile(audio.load_audio(path)[0], 4)
    whole = extractor(y, sampling_rate=RATE, return_tensors="pt")["input_values"]
    torch.manual_seed(0)
    network = esc.PretrainedTransformer(3, str(tiny_transformer)).eval()
    kept = networks._transformer_input_of(extractor, path)
    assert kept.shape == (398, 128)
    with torch.no_grad():
        found = network(torch.from_numpy(kept).float()[None, None])
        torch.testing.assert_close(found, network.network(whole).logits, atol=2e-3, rtol=1e-3)


def test_the_transformer_is_fine_tuned_as_a_unit(tiny_transformer, clips, tmp_path):
    model = f"ast:{tiny_transformer}"
    results = quick_run(clips, None, tmp_path, ["real"], models=[model], epochs=2)
    assert results["model"].tolist() == [model] and results["epochs"].tolist() == [2]
    with pytest.raises(OSError, match=r"gone: no Audio Spectrogram Transformer.*hub"):
        quick_run(clips, None, tmp_path, ["real"], models=[f"ast:{tmp_path / 'gone'}"])


def test_equal_steps_are_more_epochs(clips, tmp_path):
    results = quick_run(clips, None, tmp_path, ["real", "steps:2"], epochs=2)
    assert results["epochs"].tolist() == [2, 6]
    with pytest.raises(ValueError, match="equal steps already"):
        quick_run(clips, None, tmp_path, ["steps:2"], patches_per_epoch=8)


def test_learning_curves_are_kept(clips, generated, tmp_path):
    results = quick_run(clips, generated, tmp_path, epochs=3)
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert curves.groupby("arm")["epoch"].max().to_dict() == {"real": 3, "both": 3}
    assert list(curves)[:4] == ["epoch", "train_loss", "validation_loss", "validation_accuracy"]
    assert results["epochs"].tolist() == [3, 3]


def test_faithful_and_corrected_run_side_by_side(clips, generated, tmp_path):
    models = ["sbcnn", "sbcnn:faithful", "crnn:faithful"]
    results = quick_run(
        clips, generated, tmp_path, ["both:1"], models=models, validation="faithful"
    )
    seeds = results.set_index("model")["seed"]
    assert seeds["sbcnn"] == seeds["sbcnn:faithful"] != seeds["crnn:faithful"]


def test_the_time_to_come_is_told(clips, tmp_path, capsys):
    quick_run(clips, None, tmp_path, ["real"], runs=3)
    printed = capsys.readouterr().out
    assert re.search(r"sbcnn: the first took [0-9.]+ s; about \d+ s for 2 more", printed)


def test_any_executor_gives_the_same_results(clips, generated, tmp_path):
    here = quick_run(clips, generated, tmp_path / "here", models=["sbcnn", "knn"])
    # threads of one process share torch's random state: the hardest case
    with ThreadPoolExecutor(2) as pool:
        there = quick_run(
            clips, generated, tmp_path / "there", models=["sbcnn", "knn"], executor=pool
        )
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"))


def test_a_dask_cluster_gives_the_same_results(clips, generated, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    here = quick_run(clips, generated, tmp_path / "here")
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        there = quick_run(clips, generated, tmp_path / "there", executor=client.get_executor())
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"))


def test_a_lost_worker_is_reported_and_the_rest_goes_on(clips, generated, tmp_path):
    class Flaky(ThreadPoolExecutor):
        def submit(self, function, unit, *args):
            if unit["about"]["arm"] == "both":
                return super().submit(os.stat, tmp_path / "no-such-node")
            return super().submit(function, unit, *args)

    with Flaky(1) as pool, pytest.raises(esc.UnitsFailed, match=r"(?s)1 of 2.*its worker was lost"):
        quick_run(clips, generated, tmp_path / "out", executor=pool)
    assert pd.read_csv(tmp_path / "out/results.csv")["arm"].tolist() == ["real"]


# --- reading -------------------------------------------------------------------------------------


def test_summary_by_hand():
    values = [0.6, 0.7, 0.8]
    row = dict.fromkeys(esc.RESULT_COLUMNS, 0) | {"arm": "real", "model": "sbcnn", "backend": ""}
    results = pd.DataFrame([row | {"accuracy": value} for value in values])
    (found,) = esc.summarise(results).to_dict("records")
    assert found["n"] == 3 and found["accuracy"] == pytest.approx(0.7)
    assert found["half_width"] == pytest.approx(1.96 * 0.1 / np.sqrt(3))
    assert 0.6 <= found["ci_low"] < 0.7 < found["ci_high"] <= 0.8
    alone = esc.summarise(results.head(1))
    assert alone[["half_width", "ci_low", "ci_high"]].isna().all(axis=None)


def some_predictions():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"clip_id": [f"c{i}" for i in range(40)], "fold": 5, "model": "sbcnn"})
    table["label"] = rng.choice(["a", "b", "c"], 40)
    arms = []
    for arm, ratio, wrong in (("real", 0.0, 20), ("both", 1.0, 4)):
        for run in (0, 1):
            one = table.assign(arm=arm, ratio=ratio, run=run, predicted=table["label"])
            one.loc[: wrong - 1, "predicted"] = "a"
            arms.append(one)
    return pd.concat(arms)


def test_arms_are_compared_clip_by_clip():
    predictions = some_predictions()
    (row,) = esc.compare(predictions, "both", 1.0).to_dict("records")
    right = predictions["label"] == predictions["predicted"]
    means = right.groupby(predictions["arm"]).mean()
    assert row["n"] == 40
    assert row["difference"] == pytest.approx(means["both"] - means["real"])
    assert row["p_value"] < 0.05
    with pytest.raises(ValueError, match="share no test clip"):
        esc.compare(predictions, "mixed", 1.0)


def study(n_sources=20, runs=2, seed=0):
    """Two arms on two folds; two clips a recording; the second arm errs on class b alone."""
    rng = np.random.default_rng(seed)
    sources = [f"s{i}" for i in range(n_sources)]
    clips = pd.DataFrame({"source_id": np.repeat(sources, 2)})
    clips["clip_id"] = [f"c{i}" for i in range(len(clips))]
    clips["fold"] = np.where(clips.index < n_sources, 4, 5)
    clips["label"] = np.where(clips.index % 4 < 2, "a", "b")
    parts = []
    for arm, ratio in (("real", 0.0), ("both", 1.0)):
        for run in range(runs):
            one = clips.drop(columns="source_id").assign(arm=arm, ratio=ratio, run=run)
            wrong = rng.random(len(one)) < (0.1 if arm == "real" else 0.8 * (one["label"] == "b"))
            one["predicted"] = np.where(
                wrong, np.where(one["label"] == "a", "b", "a"), one["label"]
            )
            parts.append(one.assign(model="sbcnn"))
    return pd.concat(parts, ignore_index=True), clips


def test_arms_meet_their_own_controls():
    predictions, clips = study(n_sources=40, runs=3)
    pairs = [(("both", 1.0), ("real", 0.0)), (("real", 0.0), ("both", 1.0))]
    table = esc.compare_pairs(predictions, pairs, by="source", clips=clips)
    assert table["against"].tolist() == ["real", "both:1"]
    assert table["verdict"].tolist() == ["worse", "better"]
    assert table["difference"].sum() == pytest.approx(0)
    np.testing.assert_allclose(table["p_holm"], 2 * table["p_value"])
    with pytest.raises(ValueError, match="nothing to compare"):
        esc.compare_pairs(predictions, [])


def test_intervals_by_hand():
    predictions, clips = study(runs=3)
    row = esc.intervals(predictions, clips).set_index("arm").loc["real"]
    part = predictions[predictions["arm"] == "real"]
    right = part["label"] == part["predicted"]
    runs = right.groupby([part["run"], part["fold"]]).mean().groupby("run").mean()
    assert row["accuracy"] == pytest.approx(runs.mean())
    assert row["half_width"] == pytest.approx(1.96 * runs.std() / np.sqrt(3))
    assert (row["n_folds"], row["n_runs"], row["n_clips"], row["n_sources"]) == (2, 3, 40, 20)
    assert row["ci_low"] < row["accuracy"] < row["ci_high"]
    assert np.isnan(esc.intervals(predictions[predictions["run"] == 0])["half_width"]).all()
    with pytest.raises(ValueError, match="not in the table of clips, such as 'c39'"):
        esc.intervals(predictions, clips.iloc[:39])


@pytest.mark.parametrize(("by", "n"), [("clip", 40), ("source", 20), ("fold", 2), ("run", 4)])
def test_pairs_are_what_was_asked_for(by, n):
    predictions, clips = study()
    (row,) = esc.compare(predictions, "both", 1.0, by=by, clips=clips).to_dict("records")
    right = predictions["label"] == predictions["predicted"]
    means = right.groupby(predictions["arm"]).mean()
    assert row["n"] == n
    assert row["difference"] == pytest.approx(means["both"] - means["real"])


def test_sources_need_the_clips():
    with pytest.raises(ValueError, match="'source' needs clips"):
        esc.compare(study()[0], "both", 1.0, by="source")


def test_all_arms_are_corrected_together():
    predictions, _ = study(n_sources=40, runs=3)
    other = predictions[predictions["arm"] == "both"].assign(arm="mixed", ratio=2.0)
    table = esc.compare_all(pd.concat([predictions, other]))
    assert table["arm"].tolist() == ["both", "mixed"]
    np.testing.assert_allclose(table["p_holm"], np.minimum(1, 2 * table["p_value"]))
    assert set(table["verdict"]) == {"worse"}
    with pytest.raises(ValueError, match="nothing to compare"):
        esc.compare_all(predictions[predictions["arm"] == "real"])


def test_mcnemar_goes_run_by_run():
    predictions, _ = study()
    table = esc.mcnemar_runs(predictions, "both", 1.0)
    assert table["run"].tolist() == [0, 1] and set(table["n"]) == {40}
    one = predictions[predictions["run"] == 0].set_index("clip_id")
    right = (one["label"] == one["predicted"]).groupby(one["arm"])
    both, real = (right.get_group(name) for name in ("both", "real"))
    assert table.loc[0, "only_a"] == (both & ~real).sum()
    assert table.loc[0, "only_b"] == (real & ~both).sum()


def test_classes_are_told_apart():
    predictions, clips = study(n_sources=40)
    table = esc.class_deltas(predictions, "both", 1.0, "sbcnn", clips=clips).set_index("label")
    assert table.loc["a", "difference"] > 0 > table.loc["b", "difference"]
    assert table.loc["b", "ci_high"] < 0 and table.loc["b", "p_holm"] < 0.05
    difference = esc.confusion_difference(predictions, "both", 1.0, "sbcnn")
    np.testing.assert_allclose(np.diag(difference), table["difference"])
    np.testing.assert_allclose(difference.sum(axis=1), 0, atol=1e-12)
    alone = predictions[predictions["clip_id"].isin(["c0", "c2", "c4"])]
    table = esc.class_deltas(alone, "both", 1.0, "sbcnn").set_index("label")
    assert np.isnan(table.loc["b", ["ci_low", "p_value", "p_holm"]].astype(float)).all()
    assert table.loc["a", "n"] == 2 and table.loc["b", "n"] == 1


def test_distances_are_held_against_gains():
    names = list("abcdefgh")
    deltas = pd.DataFrame({"label": names, "difference": np.linspace(0.1, -0.1, 8)})
    scores = pd.DataFrame({"reference": names, "value": np.arange(8.0) ** 2, "metric": "FAD"})
    scores = pd.concat([scores.assign(embedding=e, candidate="mini") for e in ("x", "y")])
    table = esc.class_correlation(scores, deltas, n=500)
    assert table["r"].tolist() == [-1.0, -1.0] and (table["p_holm"] < 0.05).all()
    with pytest.raises(ValueError, match="no class in common"):
        esc.class_correlation(scores, deltas.assign(label="z"))


def test_choosing_among_equals_adds_what_the_largest_of_them_has_by_luck():
    rng = np.random.default_rng(0)
    clips = pd.DataFrame({"clip_id": [f"c{i}" for i in range(200)], "fold": 5, "label": "a"})
    parts = []
    for run in range(10):
        predicted = rng.permutation(np.repeat(["a", "b"], 100))
        parts.append(clips.assign(predicted=predicted, arm="real", ratio=0.0, run=run))
    found = esc.choice_on_test(pd.concat(parts).assign(model="sbcnn"), n=4000)
    assert (found["candidates"], found["clips"]) == (10, 200)
    # all are right on half of the clips; a drawn half of them deviates by √(0.25 / 199), the other
    # half by as much the other way, and the largest of 10 normals lies 1.54 SD above their mean
    assert found["bias"] == pytest.approx(2 * 1.54 * np.sqrt(0.25 / 199), rel=0.05)
    assert found["bias"] == pytest.approx(found["chosen_here"] - found["elsewhere"])
    with pytest.raises(ValueError, match="1 classifiers on 200 clips"):
        esc.choice_on_test(parts[0].assign(model="sbcnn"))


def test_distances_of_classes_are_kad():
    from soundscapes_utils import fad

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)), np.repeat(["a", "b"], 20)
    made = x + np.where(y == "b", 3.0, 0.0)[:, None]
    table = esc.class_distances((x, y), (made[::2], y[::2]), "toy", "mini").set_index("reference")
    assert table.loc["b", "value"] == fad.kernel_distance(x[20:], made[20::2])
    assert table["value"].idxmax() == "b" and table["n_candidate"].tolist() == [10, 10]
    with pytest.raises(ValueError, match="'a' has 20 real and 1 synthetic"):
        esc.class_distances((x, y), (made[19:], y[19:]))


# --- command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_esc10(tmp_path_factory):
    """ESC-10's layout with two clips of a fifth of a second for each class and fold."""
    root = tmp_path_factory.mktemp("esc10")
    rows = []
    for fold in range(1, 6):
        for target in range(10):
            for take in "AB":
                name = f"{fold}-{fold}{target}{ord(take)}-{take}-{target}.wav"
                signal = tone(200 * (target + 1), len(rows), seconds=0.2)
                audio.save_audio(root / "audio" / name, signal, RATE)
                source = name.split("-")[1]
                rows.append((name, fold, target, f"c{target}", True, source, take))
    columns = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    (root / "meta").mkdir()
    pd.DataFrame(rows, columns=columns).to_csv(root / "meta/esc50.csv", index=False)
    return root


def test_a_study_from_the_command_line(small_esc10, tmp_path, capsys):
    made = pd.read_csv(small_esc10 / "meta/esc50.csv").query("fold < 4")
    made = made.rename(columns={"category": "label", "filename": "path"})
    made["path"] = "audio/" + made["path"]
    made.assign(backend="toy").to_csv(small_esc10 / "made.csv", index=False)
    command = ["--dataset", "esc10", "--root", str(small_esc10), "--out", str(tmp_path)]
    command += ["--models", "knn", "--validation", "none", "--runs", "1", "--workers", "1"]
    command += ["--arms", "real", "both@toy:0.5", "--generated", f"toy={small_esc10}/made.csv"]
    assert esc.main([*command, "--test-folds", "4", "5", "--plan"]) == 0
    assert "validation_fold" in capsys.readouterr().out and not (tmp_path / "units").exists()
    assert esc.main([*command, "--test-folds", "4", "5"]) == 0
    printed = capsys.readouterr().out
    assert "intervals" in printed and "p_holm" in printed
    assert pd.read_csv(tmp_path / "tests.csv")["n"].tolist() == [40]
    assert esc.main([*command, "--generator-folds", "4"]) == 2
    assert "was trained on fold [4]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(["--root", "gone"], "gone"), (["--arms", "bot:1"], "cannot read the arm")],
)
def test_a_wrong_study_says_so(small_esc10, tmp_path, capsys, wrong, message):
    command = ["--dataset", "esc10", "--root", str(small_esc10), "--out", str(tmp_path), *wrong]
    assert esc.main(command) == 2
    assert message in capsys.readouterr().err


def test_confusion_equals_scikit_learns():
    from sklearn.metrics import confusion_matrix

    predictions = some_predictions()
    part = predictions[predictions["arm"] == "real"]
    found = esc.confusion(predictions, "real", 0.0, "sbcnn")
    np.testing.assert_array_equal(found, confusion_matrix(part["label"], part["predicted"]))
    with pytest.raises(ValueError, match="was it run"):
        esc.confusion(predictions, "real", 0.0, "crnn")


def test_the_judge_finds_clips_that_are_not_what_they_are_called():
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"] * 20)
    centres = {"a": (0, 0), "b": (9, 0), "c": (0, 9)}

    def near(names):
        return np.array([centres[name] for name in names]) + rng.normal(size=(len(names), 2))

    swapped = np.where(labels == "c", "a", labels)
    table = esc.class_consistency(
        (near(labels), labels), (near(swapped), labels), (near(labels), labels)
    )
    table = table.set_index("label")
    assert table["held_out"].min() > 0.9
    assert table.loc["c", "generated"] == 0 and table.loc["all", "generated"] == pytest.approx(
        2 / 3
    )
    assert table.loc["all", "n_generated"] == 60
    with pytest.raises(ValueError, match="equally wide"):
        esc.class_consistency(
            (near(labels), labels), (np.zeros((3, 5)), labels[:3]), (near(labels), labels)
        )


def test_published_table_is_complete():
    table = esc.published()
    assert table.groupby("arm").size().to_dict() == {
        "both": 32, "mixed": 64, "real": 2, "synthetic": 32
    }  # fmt: skip
    assert table.groupby("arm")["half_width"].count().to_dict() == {
        "both": 0, "mixed": 0, "real": 2, "synthetic": 0
    }  # fmt: skip
    best = table.loc[table["accuracy"].idxmax()]
    assert (best["backend"], best["prompt_family"], best["ratio"]) == ("AudioLDM2", "gpt", 3)
    assert table["accuracy"].between(0.29, 0.72).all()
