"""Classifiers, arms, units and their reading, held to closed forms and to other libraries."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from soundscapes_utils import audio, esc

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


def test_an_epoch_can_hold_any_number_of_patches():
    chance = torch.Generator().manual_seed(0)
    once = esc._draw_order(5, None, chance)
    assert sorted(once.tolist()) == list(range(5))
    # as even as possible: nothing a third time before all were drawn twice
    counts = torch.bincount(esc._draw_order(5, 13, chance), minlength=5)
    assert counts.sum() == 13 and set(counts.tolist()) == {2, 3}
    assert len(set(esc._draw_order(5, 3, chance).tolist())) == 3


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


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
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
    best = table.loc[table["accuracy"].idxmax()]
    assert (best["backend"], best["prompt_family"], best["ratio"]) == ("AudioLDM2", "gpt", 3)
    assert table["accuracy"].between(0.29, 0.72).all()
