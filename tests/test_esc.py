"""Arms, units, resuming and the command line of the study of classifiers."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from toy_clips import CLASSES, RATE, killed_by_its_name, tone, write_clips

from soundscapes_utils import audio, esc, networks, store


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


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    made = write_clips(tmp_path_factory.mktemp("made"), CLASSES, [0], 12, 1000)
    return made.drop(columns="fold").assign(backend="toy", prompt_family="label", checkpoint="c1")


def quick_run(clips, generated, out_dir, arms=("real", "both:1"), **options):
    settings = {"models": ["sbcnn"], "epochs": 1, "batch_size": 8, "workers": 1} | options
    return esc.run_arms(clips, generated, list(arms), out_dir=out_dir, **settings)


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
    np.testing.assert_array_equal(dropped["real_rows"], mixed["real_rows"])
    assert dropped["n_synthetic"] == 0
    thinned = one_unit(clips, generated, "thinned:2")
    assert thinned["n_real"] + thinned["n_synthetic"] == len(real)
    assert 0 < thinned["n_real"] < len(real)
    labels = [*clips["label"].iloc[thinned["real_rows"]]]
    labels += [*generated["label"].iloc[thinned["synthetic_rows"]]]
    assert labels.count("hum") == labels.count("whistle")
    for arm in ("steps:2", "specaugment:1", "mixup:0.2"):
        np.testing.assert_array_equal(one_unit(clips, None, arm)["real_rows"], real)


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
    only = one_unit(clips, {"a": tables["a"]}, "both@a:1")
    np.testing.assert_array_equal(only["synthetic_rows"], alone["synthetic_rows"])
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


def test_stopping_early_by_what_the_generator_learnt_is_noted(clips, generated, tmp_path, capsys):
    tables, seen = {"a": generated, "b": generated}, {"a": [1, 2], "b": [2, 3]}
    options = {"models": ["knn"], "test_folds": [4, 5], "generator_folds": seen}
    # fold 5 validates where fold 4 tests, fold 1 where fold 5 does
    results = quick_run(clips, tables, tmp_path, ["real", "both@a:1", "both@b:1"], **options)
    noted = results[results["note"] != ""]
    assert noted[["arm", "fold"]].to_numpy().tolist() == [["both@a", 5]]
    told = "the generator learnt from the fold that early stopping looks at"
    assert set(noted["note"]) == {told}
    assert f"note: 1 of them (test folds [5]): {told}" in capsys.readouterr().out
    quick_run(clips, tables, tmp_path, ["both@b:1"], **options)
    assert "note:" not in capsys.readouterr().out
    # what validates nothing, or is synthetic, has nothing to be noted
    alone = one_unit(clips, tables, "synthetic@a:1", validation="faithful", generator_folds=seen)
    assert alone["note"] == ""
    none = one_unit(
        clips, tables, "both@a:1", models=["svm"], validation="none", generator_folds={"a": [2]}
    )
    assert none["note"] == ""


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


@pytest.mark.parametrize("lost", ["run0-????????????.csv", ".log.csv", ".json"])
def test_a_unit_that_lost_a_file_is_trained_again(clips, tmp_path, lost):
    quick_run(clips, None, tmp_path, ["real"])
    (file,) = (tmp_path / "units").glob(f"*{lost}")
    whole = pd.read_csv(file) if file.suffix == ".csv" else None
    file.unlink()
    quick_run(clips, None, tmp_path, ["real"])
    assert file.is_file() and (whole is None or whole.equals(pd.read_csv(file)))


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
    # 12 clips in batches of 8
    assert results["steps"].tolist() == [2 * 2, 6 * 2]
    assert esc.summarise(results)["steps"].tolist() == [4, 12]
    few = quick_run(clips, None, tmp_path, ["real"], epochs=2, patches_per_epoch=3)
    assert few["steps"].tolist() == [2]
    with pytest.raises(ValueError, match="equal steps already"):
        quick_run(clips, None, tmp_path, ["steps:2"], patches_per_epoch=8)


class Linear(torch.nn.Module):
    """A classifier of one's own, entered as CONTRIBUTING.md says."""

    def __init__(self, n_classes):
        super().__init__()
        self.head = torch.nn.Linear(esc.PATCH_FRAMES * esc.N_MELS, n_classes)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_a_third_network_joins_the_study(clips, generated, tmp_path, monkeypatch):
    from soundscapes_utils import plots

    before = esc.published()
    monkeypatch.setitem(networks.MODELS, "linear", Linear)
    results = quick_run(clips, generated, tmp_path, models=["linear", "sbcnn"])
    assert results["model"].tolist() == ["linear", "sbcnn"] * 2
    pd.testing.assert_frame_equal(esc.published(), before)
    assert len(plots.beside_published(results).axes) == 6
    with pytest.raises(ValueError, match=r"models are \['sbcnn', 'crnn', 'linear'\]"):
        esc.plan_units(clips, None, ["real"], models=["linear:faithful"])


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


@pytest.mark.parametrize(
    ("patches", "epochs", "told"),
    [(None, 10, "50 s"), (240, 10, "20 s"), (None, 20, "2 min")],
    ids=["a patch a clip", "equal steps", "longer"],
)
def test_the_time_to_come_follows_the_patches(tmp_path, patches, epochs, told):
    # the first unit took 10 s for 20 clips and 10 epochs
    units = []
    for clips, rounds in ((20, 10), (40, epochs), (60, epochs)):
        about = {"model": "sbcnn", "epochs": rounds, "patches_per_epoch": patches}
        units.append({"key": "first", "about": about | {"n_real": clips - 5, "n_synthetic": 5}})
    store.write_atomic(tmp_path / "units/first.json", b'{"seconds": 10.0}')
    line = esc._estimate(units[0], units, tmp_path, 1)
    assert line == f"sbcnn: the first took 10.0 s; about {told} for 2 more"


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


def run_as_accelerate_does(clips, generated, out_dir):
    from accelerate import PartialState

    try:
        quick_run(clips, generated, out_dir, models=["sbcnn", "crnn"], device="accelerate")
    except esc.UnitsFailed as error:
        (out_dir / f"{PartialState().process_index}.txt").write_text(str(error))


def test_processes_of_accelerate_share_the_units_out(clips, generated, tmp_path, monkeypatch):
    from accelerate import PartialState, debug_launcher

    # what this process has found out about itself would be taken over by those that it starts
    PartialState._reset_state()
    here = quick_run(clips, generated, tmp_path / "here")
    train, trained = esc.train_classifier, tmp_path / "trained"

    def no_crnn(model, *args, **options):
        with trained.open("a") as file:
            file.write(f"{model} {os.getpid()}\n")
        if model == "crnn":
            raise RuntimeError("no memory")
        return train(model, *args, **options)

    monkeypatch.setattr(esc, "train_classifier", no_crnn)
    shared = tmp_path / "shared"
    debug_launcher(run_as_accelerate_does, (clips, generated, shared), num_processes=2)
    calls = pd.Series(trained.read_text().splitlines()).str.split(expand=True)
    assert sorted(calls[0]) == ["crnn", "crnn", "sbcnn", "sbcnn"], "no unit is trained twice"
    assert calls[1].nunique() == 2
    there = pd.read_csv(shared / "results.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"))
    for rank in range(2):
        assert "2 of 4 units failed" in (shared / f"{rank}.txt").read_text()


def test_a_lost_worker_is_reported_and_the_rest_goes_on(clips, generated, tmp_path):
    class Flaky(ThreadPoolExecutor):
        def submit(self, function, unit, *args):
            if unit["about"]["arm"] == "both":
                return super().submit(os.stat, tmp_path / "no-such-node")
            return super().submit(function, unit, *args)

    with Flaky(1) as pool, pytest.raises(esc.UnitsFailed, match=r"(?s)1 of 2.*its worker was lost"):
        quick_run(clips, generated, tmp_path / "out", executor=pool)
    assert pd.read_csv(tmp_path / "out/results.csv")["arm"].tolist() == ["real"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no process can be killed so here")
def test_a_killed_process_costs_its_own_unit_only(tmp_path, monkeypatch):
    monkeypatch.setattr(esc, "_work", killed_by_its_name)
    (tmp_path / "units").mkdir()
    # two at once: the killer takes the second with it, the others have not begun
    about = {"model": "sbcnn", "epochs": 1, "patches_per_epoch": 1, "n_real": 1, "n_synthetic": 0}
    names = ["killer", "beside it", "later", "last"]
    units = [{"name": name, "key": name, "about": about} for name in names]
    shared = {"x": {}, "y": [], "classes": [], "clip_ids": [], "n_real": 0}
    found = [(u["name"], why) for u, why in esc._in_processes(units, shared, tmp_path, ["cpu"], 1)]
    assert sorted(found[:2], key=str) == [
        ("beside it", None),
        ("killer", "its process was killed (too little memory?)"),
    ]
    assert sorted(found[2:]) == [("last", None), ("later", None)]


def test_only_so_many_units_wait_with_an_executor(clips, tmp_path, monkeypatch):
    waiting = []

    class Counted(ThreadPoolExecutor):
        def submit(self, *args):
            waiting.append(self._work_queue.qsize())
            return super().submit(*args)

    monkeypatch.setattr(esc, "_AT_ONCE", 3)
    with Counted(1) as pool:
        results = quick_run(clips, None, tmp_path, ["real"], models=["knn"], runs=8, executor=pool)
    assert len(results) == len(waiting) == 8 and max(waiting) <= 2


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
    for name in ("arms", "steps", "intervals", "p_holm", "mcnemar", "odds_ratio"):
        assert name in printed
    assert pd.read_csv(tmp_path / "tests.csv")["n"].tolist() == [40]
    single = pd.read_csv(tmp_path / "mcnemar.csv")
    assert single["n"].tolist() == [40] and single["p_holm"].equals(single["p_value"])
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
