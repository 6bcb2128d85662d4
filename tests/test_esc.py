"""Arms, trials and resuming of the study of classifiers, and the lines of its figures."""

import itertools
import json
import re
import signal
import types

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from toy_clips import CLASSES, write_clips

from soundscapes_utils import audio, classifiers, datasets, esc, ldm, stats, store


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


def planned(clips, generated, arms, **options):
    return esc.plan_study(clips, generated, esc.Study(arms, **options))


def quick_run(clips, generated, out_dir, arms=("real", "both:1"), embeddings=None, **options):
    settings = {"epochs": 1, "batch_size": 8, "workers": 1}
    settings |= {name: options.pop(name) for name in vars(esc.Training()) if name in options}
    study = esc.Study(arms, **{"models": ["sbcnn"]} | options)
    return esc.run_study(clips, generated, study, esc.Training(**settings), out_dir, embeddings)


# --- plan ----------------------------------------------------------------------------------------


def test_plan_counts_and_nests(clips, generated):
    arms = ["real", "both:0.5", "both:2", "mixed:1", "mixed:3", "synthetic:1"]
    plan = planned(clips, generated, arms, models=["sbcnn"], runs=2)
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
    plan = planned(clips, generated, ["mixed:2"], models=["crnn"], test_folds=[5, 2])
    for trial in plan.to_dict("records"):
        folds = {name: set(clips["fold"].iloc[trial[f"{name}_rows"]]) for name in
                 ("real", "validation", "test")}  # fmt: skip
        assert folds["test"] == {trial["fold"]}
        assert folds["validation"] == {trial["fold"] % 5 + 1}
        assert not folds["real"] & (folds["test"] | folds["validation"])


def test_few_real_clips_are_spread_over_the_folds(clips, generated):
    plan = planned(clips, generated, ["real"], models=["sbcnn"], real_per_class=3)
    chosen = clips.iloc[plan["real_rows"][0]]
    assert chosen.groupby("label").size().to_dict() == {"hum": 3, "whistle": 3}
    assert (chosen.groupby(["label", "fold"]).size() == 1).all()


def one_trial(clips, generated, arm, **options):
    options = {"models": ["sbcnn"]} | options
    (trial,) = planned(clips, generated, [arm], **options).to_dict("records")
    return trial


def test_arms_are_read():
    arm = esc.Arm.parse("both@a+b/8:0.5")
    assert arm == ("both", 0.5, "a+b", 8) and arm.name == "both@a+b/8"
    assert esc.Arm.parse("real/4") == ("real", 0.0, "", 4)
    for text in ("real", "real/4", "both@a+b/8:0.5", "mixed:3", "mixup:0.2"):
        assert str(esc.Arm.parse(text)) == text
    assert esc.Study([arm, "both@a+b/8:0.5", "real"]).arms == (arm, ("real", 0.0, "", None))


def test_controls_have_as_many_clips_as_their_arms(clips, generated):
    real = one_trial(clips, None, "real")["real_rows"]
    repeat = one_trial(clips, None, "repeat:1.5")
    counts = pd.Series(repeat["real_rows"]).value_counts()
    assert repeat["n_real"] == one_trial(clips, generated, "both:1.5")["n_real"] + 18
    assert set(counts.index) == set(real) and set(counts) == {2, 3}
    assert clips["label"].iloc[repeat["real_rows"]].value_counts().tolist() == [15, 15]
    mixed, dropped = (one_trial(clips, generated, f"{name}:2") for name in ("mixed", "dropped"))
    np.testing.assert_array_equal(dropped["real_rows"], mixed["real_rows"])
    assert dropped["n_synthetic"] == 0
    thinned = one_trial(clips, generated, "thinned:2")
    assert thinned["n_real"] + thinned["n_synthetic"] == len(real)
    assert 0 < thinned["n_real"] < len(real)
    labels = [*clips["label"].iloc[thinned["real_rows"]]]
    labels += [*generated["label"].iloc[thinned["synthetic_rows"]]]
    assert labels.count("hum") == labels.count("whistle")
    for arm in ("steps:2", "specaugment:1", "mixup:0.2"):
        np.testing.assert_array_equal(one_trial(clips, None, arm)["real_rows"], real)


def test_few_real_clips_are_an_axis_of_nested_sets(clips, generated):
    sets = [set(one_trial(clips, None, f"real/{k}")["real_rows"]) for k in (1, 2, 4)]
    assert [len(part) for part in sets] == [2, 4, 8]
    assert sets[0] < sets[1] < sets[2]
    both = one_trial(clips, generated, "both/2:3")
    assert set(both["real_rows"]) == sets[1] and both["n_synthetic"] == 12


def test_merged_generators_take_turns(clips, generated):
    tables = {"a": generated.assign(backend="a"), "b": generated.assign(backend="b")}
    alone = one_trial(clips, tables, "both@a:1")
    merged = one_trial(clips, tables, "both@a+b:1")
    backends = pd.concat(tables.values())["backend"].iloc[merged["synthetic_rows"]]
    assert backends.value_counts().to_dict() == {"a": 6, "b": 6}
    # a table's own order does not depend on the tables beside it
    only = one_trial(clips, {"a": tables["a"]}, "both@a:1")
    np.testing.assert_array_equal(only["synthetic_rows"], alone["synthetic_rows"])
    with pytest.raises(ValueError, match=r"called 'c'.*\['a', 'b'\]"):
        one_trial(clips, tables, "both@c:1")
    with pytest.raises(ValueError, match="both@name:1"):
        one_trial(clips, tables, "both:1")


def test_copies_serve_only_beside_their_recording(clips):
    copies = pd.concat([clips.assign(made_from=clips["clip_id"], copy=i) for i in range(2)])
    for arm in ("both@ps1:2", "both@ps1/2:2"):
        unit = one_trial(clips, {"ps1": copies}, arm)
        origins = copies["made_from"].iloc[unit["synthetic_rows"]]
        assert set(origins) == set(clips["clip_id"].iloc[unit["real_rows"]])
        assert len(origins) == 2 * unit["n_real"]
    with pytest.raises(ValueError, match="needs 18 synthetic clips of 'hum', there are 12"):
        one_trial(clips, {"ps1": copies}, "both@ps1:3")


def test_a_generator_of_each_fold_serves_its_own_fold(clips, generated):
    tables = [generated.assign(held_out_fold=fold) for fold in (4, 5)]
    plan = planned(clips, pd.concat(tables), ["both:1"], models=["sbcnn"], test_folds=[4, 5])
    rows = pd.concat(tables)["held_out_fold"].to_numpy()
    for trial in plan.to_dict("records"):
        assert set(rows[trial["synthetic_rows"]]) == {trial["fold"]}
    with pytest.raises(ValueError, match="there are 0"):
        planned(clips, pd.concat(tables), ["both:1"], test_folds=[1])


def test_leaks_are_looked_for_table_by_table(clips, generated):
    tables = {"a": generated.assign(heard="toy:5"), "b": generated.assign(heard="toy:1,2")}
    planned(clips, tables, ["both@b:1"])
    with pytest.raises(esc.LeakError, match=r"fold \[5\]"):
        planned(clips, tables, ["both@a+b:1"])


def test_early_stopping_by_what_the_generator_learnt_is_noted(clips, generated, tmp_path, capsys):
    tables = {"a": generated.assign(heard="toy:1,2"), "b": generated.assign(heard="toy:2,3")}
    options = {"models": ["knn"], "test_folds": [4, 5]}
    # fold 5 validates where fold 4 tests, fold 1 where fold 5 does
    results = quick_run(clips, tables, tmp_path, ["real", "both@a:1", "both@b:1"], **options)
    noted = results[results["note"] != ""]
    assert noted[["arm", "fold"]].to_numpy().tolist() == [["both@a", 5]]
    note = "the generator was trained on the fold that early stopping looks at"
    assert set(noted["note"]) == {note}
    assert f"note: 1 of them (test folds [5]): {note}" in capsys.readouterr().out
    quick_run(clips, tables, tmp_path, ["both@b:1"], **options)
    assert "note:" not in capsys.readouterr().out
    # what validates nothing, or is synthetic, has nothing to be noted
    alone = one_trial(clips, tables, "synthetic@a:1", validation="as_released")
    assert alone["note"] == ""
    none = one_trial(clips, tables, "both@b:1", models=["svm"], test_folds=[5], validation="none")
    assert none["note"] == ""


def test_validation_as_the_released_code_has_it(clips, generated):
    unit = {
        arm: one_trial(clips, generated, arm, validation="as_released")
        for arm in ("real", "both:1", "mixed:1", "synthetic:1")
    }
    # four real clips validate; both adds as many synthetic ones, synthetic takes only those
    counts = {arm: (len(u["validation_rows"]), u["n_validation"]) for arm, u in unit.items()}
    assert counts == {"real": (4, 4), "both:1": (4, 8), "mixed:1": (4, 4), "synthetic:1": (0, 4)}
    both = unit["both:1"]
    assert not set(both["synthetic_rows"]) & set(both["validation_synthetic_rows"])
    assert not len(one_trial(clips, generated, "both:1")["validation_synthetic_rows"])


def test_without_early_stopping_the_validation_fold_trains(clips):
    unit = one_trial(clips, None, "real", models=["svm"], validation="none")
    assert unit["n_real"] == 16 and unit["n_validation"] == 0
    assert set(clips["fold"].iloc[unit["real_rows"]]) == {1, 2, 3, 4}


def whole_set(dataset, n_folds, n_classes):
    rows = [(fold, f"c{k}", f"{fold}-{k}") for fold in range(1, n_folds + 1) for k in range(n_classes)]
    table = pd.DataFrame(rows, columns=["fold", "label", "source_id"])
    return table.assign(dataset=dataset, clip_id=table["source_id"])


def test_urbansound8ks_folds_are_the_papers():
    clips = whole_set("urbansound8k", 10, 10)
    plan = planned(clips, None, ["real"], models=["sbcnn"], test_folds=range(1, 11))
    for n, trial in zip(range(1, 11), plan.to_dict("records"), strict=True):
        folds = {name: set(clips["fold"].iloc[trial[f"{name}_rows"]]) for name in
                 ("real", "validation", "test")}  # fmt: skip
        validation = (n + 1) % 11 or 1
        assert folds["test"] == {n} and folds["validation"] == {validation}
        assert folds["real"] == {*range(1, 11)} - {n, validation}
    assert (plan[["n_real", "n_validation", "n_test"]] == [80, 10, 10]).all(axis=None)


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        (["real@a"], {}, "cannot read the arm 'real@a'"),
        (["both/0:1"], {}, "cannot read the arm"),
        (["dropped:0.5"], {}, "cannot read the arm"),
        (["mixup:inf"], {}, "cannot read the arm"),
        (["real"], {"models": ["knn:as_released"]}, "models are"),
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
        planned(clips, generated, arms, **options)


def test_arms_with_synthetic_clips_need_some(clips):
    with pytest.raises(ValueError, match="02_synthetic_generation"):
        planned(clips, None, ["both:1"])


def test_a_generator_that_saw_the_test_fold_is_refused(clips, generated, tmp_path):
    with pytest.raises(esc.LeakError, match=r"c1.*fold \[5\]"):
        quick_run(clips, generated.assign(heard="toy:1,2,3,4,5"), tmp_path)
    # it may have seen what the classifier trains on, and other sounds
    planned(clips, generated.assign(heard="toy:2,3,4;other:5"), ["both:1"])
    # real clips alone cannot leak
    planned(clips, generated.assign(heard="toy:5"), ["real"])
    planned(clips, generated.assign(heard=""), ["both:1"])


@pytest.mark.parametrize(("tested", "heard"), [("esc10", "esc50"), ("esc50", "esc10")])
def test_esc10_is_a_part_of_esc50(clips, generated, tested, heard):
    clips = clips.assign(dataset=tested)
    planned(clips, generated.assign(heard=f"builtin:5;{heard}:4"), ["both:1"])
    with pytest.raises(esc.LeakError, match=r"fold \[5\]"):
        planned(clips, generated.assign(heard=f"builtin:4;{heard}:4,5"), ["both:1"])


def test_a_model_fine_tuned_from_one_that_knew_a_fold_is_refused_on_it(clips, generated, tmp_path):
    # fine-tuned on folds 1 and 3 of the toys from a model that knew folds 2 to 4
    info = {"heard": {"toy": [1, 2, 3, 4]}, "training_dataset": "toy; mixes of toy"}
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "soundscapes.json").write_text(json.dumps(info))
    made = generated.assign(heard=datasets.format_heard(ldm.checkpoint_info(tmp_path)["heard"]))
    with pytest.raises(esc.LeakError, match=r"fold \[4\]"):
        planned(clips, made, ["both:1"], test_folds=[4])
    planned(clips, made, ["both:1"], test_folds=[5])


def test_a_source_in_two_splits_is_refused(clips):
    with pytest.raises(ValueError, match="one-recording"):
        planned(clips.assign(source_id="one-recording"), None, ["real"])


# --- trials ---------------------------------------------------------------------------------------


def test_results_and_predictions_tables(clips, generated, tmp_path, capsys):
    results = quick_run(clips, generated, tmp_path, ["real", "mixed:1"])
    assert list(results) == esc.RESULT_COLUMNS
    printed = capsys.readouterr().out
    assert "2 classifiers: 2 to train" in printed and "n_synthetic" in printed
    assert results["backend"].tolist() == ["", "toy"]
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert len(predictions) == 2 * 4
    recording = clips.set_index("clip_id")["source_id"]
    assert predictions["source_id"].tolist() == recording[predictions["clip_id"]].tolist()
    right = predictions["label"] == predictions["predicted"]
    by_arm = right.groupby(predictions["arm"]).mean()
    assert results.set_index("arm")["accuracy"].to_dict() == by_arm.to_dict()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv", keep_default_na=False), results)


def test_stopping_anywhere_and_resuming_gives_the_same_table(clips, generated, tmp_path, monkeypatch):
    arms = ["real", "both:1", "synthetic:1"]
    whole = quick_run(clips, generated, tmp_path / "whole", arms)
    train, calls = classifiers.train_classifier, []

    def killed_in_the_second(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(classifiers, "train_classifier", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        quick_run(clips, generated, tmp_path / "cut", arms)
    resumed = quick_run(clips, generated, tmp_path / "cut", arms)
    assert len(calls) == 4, "the finished trial is not trained again"
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), resumed.drop(columns="seconds"))
    quick_run(clips, generated, tmp_path / "cut", arms)
    assert len(calls) == 4


def test_changed_input_is_trained_again_and_only_that(clips, generated, tmp_path, monkeypatch):
    train, calls = classifiers.train_classifier, []

    def counted(*args, **options):
        calls.append(1)
        return train(*args, **options)

    monkeypatch.setattr(classifiers, "train_classifier", counted)
    quick_run(clips, generated, tmp_path / "out")
    changed = generated.copy()
    for row, path in enumerate(generated["path"]):
        y, rate = audio.load_audio(path)
        changed.loc[row, "path"] = str(audio.save_audio(tmp_path / f"{row}.wav", y * 0.5, rate))
    assert len(calls) == 2
    quick_run(clips, changed, tmp_path / "out")
    assert len(calls) == 3, "the arm of real clips is kept"


def test_a_failing_trial_is_named_and_the_rest_goes_on(clips, generated, tmp_path, monkeypatch):
    train = classifiers.train_classifier

    def no_crnn(model, *args, **options):
        if model == "crnn":
            raise RuntimeError("no memory")
        return train(model, *args, **options)

    monkeypatch.setattr(classifiers, "train_classifier", no_crnn)
    with pytest.raises(esc.TrialsFailed, match=r"(?s)2 of 4.*real crnn fold 5 run 0.*no memory"):
        quick_run(clips, generated, tmp_path, models=["crnn", "sbcnn"])
    assert pd.read_csv(tmp_path / "results.csv")["model"].tolist() == ["sbcnn"] * 2


def test_processes_give_the_same_results_as_one(clips, generated, tmp_path):
    here = quick_run(clips, generated, tmp_path / "one")
    there = quick_run(clips, generated, tmp_path / "two", workers=2)
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"))
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left == {"features", ".records", "results.csv", "predictions.csv", "curves.csv"}


def constant_rows(paths, silence, cache_dir):
    """An embedding that hears the loudest frequency."""
    rows = []
    for path in paths:
        y, _ = audio.load_audio(path)
        rows.append([np.abs(np.fft.rfft(y)).argmax(), len(y)])
    return np.array(rows, dtype=np.float32)


class Reader:
    embed = staticmethod(constant_rows)


def test_baselines_and_probe_are_trials(clips, tmp_path, capsys):
    results = quick_run(
        clips, None, tmp_path, ["real"], models=["knn", "svm", "probe:pitch"], validation="none",
        embeddings={"pitch": Reader()}, test_folds=[4, 5],
    )  # fmt: skip
    assert results["accuracy"].tolist() == [1.0] * 6
    assert set(results["n_real"]) == {16} and set(results["epochs"]) == {0}
    assert pd.read_csv(tmp_path / "curves.csv").empty
    capsys.readouterr()
    again = quick_run(
        clips, None, tmp_path, ["real"], models=["knn", "svm", "probe:pitch"], validation="none",
        embeddings={"pitch": Reader()}, test_folds=[4, 5],
    )  # fmt: skip
    assert "6 classifiers: 0 to train, 6 kept" in capsys.readouterr().out
    pd.testing.assert_frame_equal(results, again)


def test_equal_steps_are_more_epochs(clips, tmp_path):
    results = quick_run(clips, None, tmp_path, ["real", "steps:2"], epochs=2)
    assert results["epochs"].tolist() == [2, 6]
    # 12 clips in batches of 8
    assert results["steps"].tolist() == [2 * 2, 6 * 2]
    assert stats.summarise(results)["steps"].tolist() == [4, 12]
    few = quick_run(clips, None, tmp_path, ["real"], epochs=2, patches_per_epoch=3)
    assert few["steps"].tolist() == [2]
    with pytest.raises(ValueError, match="equal steps already"):
        quick_run(clips, None, tmp_path, ["steps:2"], patches_per_epoch=8)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_network_of_ones_own_joins_the_study(clips, generated, tmp_path, monkeypatch, workers):
    # a module in the working folder, which the processes that train must find too
    (tmp_path / "of_mine.py").write_text("from toy_clips import Linear as Mine")
    monkeypatch.chdir(tmp_path)
    models = ["of_mine:Mine", "sbcnn"]
    results = quick_run(clips, generated, tmp_path, models=models, workers=workers)
    assert results["model"].tolist() == models * 2


def test_only_an_edited_network_of_ones_own_is_trained_again(clips, tmp_path, monkeypatch, capsys):
    own = tmp_path / "edited_net.py"
    own.write_text("from toy_clips import Linear as Mine")
    monkeypatch.chdir(tmp_path)
    for edit, missing in (("", 2), ("", 0), ("\n# edited", 1)):
        own.write_text(own.read_text() + edit)
        quick_run(clips, None, tmp_path, ["real"], models=["edited_net:Mine", "sbcnn"])
        assert f"2 classifiers: {missing} to train" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["sbcnnn:as_released", "no_such_module:Net", "toy_clips:Nothing"])
def test_networks_that_cannot_be_imported_are_named_before_anything_runs(model):
    with pytest.raises(store.DataError, match=f"{model}: cannot be imported .*module:Class"):
        esc.Study(["real"], [model])


def test_learning_curves_are_kept(clips, generated, tmp_path):
    results = quick_run(clips, generated, tmp_path, epochs=3)
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert curves.groupby("arm")["epoch"].max().to_dict() == {"real": 3, "both": 3}
    assert list(curves)[:4] == ["epoch", "train_loss", "validation_loss", "validation_accuracy"]
    assert results["epochs"].tolist() == [3, 3]


def test_released_and_corrected_run_side_by_side(clips, generated, tmp_path):
    models = ["sbcnn", "sbcnn:as_released", "crnn:as_released"]
    results = quick_run(clips, generated, tmp_path, ["both:1"], models=models, validation="as_released")
    seeds = results.set_index("model")["seed"]
    assert seeds["sbcnn"] == seeds["sbcnn:as_released"] != seeds["crnn:as_released"]


def test_the_time_to_come_is_told(clips, tmp_path, capsys):
    quick_run(clips, None, tmp_path, ["real"], runs=3)
    printed = capsys.readouterr().out
    assert re.search(r"sbcnn: the first took [0-9.]+ s; about \d+ s for 2 more", printed)


@pytest.mark.parametrize(
    ("arms", "patches", "expected"),
    [
        # 36 clips first, then 24 and 12
        (["both:1", "real", "both:2"], None, "about 10 s for 2"),
        (["both:1", "real", "both:2"], 240, "about 20 s for 2"),
        (["steps:11", "real"], None, "about 1 s for 1"),
    ],
    ids=["a patch per clip", "equal steps", "longer"],
)
def test_the_time_to_come_follows_the_patches(
    clips, generated, tmp_path, monkeypatch, capsys, arms, patches, expected
):
    # every trial takes 10 s; the longest comes first
    clock = types.SimpleNamespace(perf_counter=itertools.count(0, 10).__next__)
    monkeypatch.setattr(esc, "time", clock)
    quick_run(clips, generated, tmp_path, arms, patches_per_epoch=patches, patience=1)
    assert f"sbcnn: the first took 10.0 s; {expected} more" in capsys.readouterr().out


def test_a_dask_cluster_gives_the_same_results(clips, generated, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    here = quick_run(clips, generated, tmp_path / "here")
    # threads of one process share torch's random state: the hardest case
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        there = quick_run(clips, generated, tmp_path / "there", workers=None)
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no process can be killed so here")
def test_a_killed_process_costs_its_own_trial_only(clips, tmp_path):
    models = ["knn", "toy_clips:Killed", "svm"]
    with pytest.raises(
        esc.TrialsFailed, match=r"(?s)1 of 3.*real toy_clips:Killed fold 5 run 0.*killed \("
    ):
        quick_run(clips, None, tmp_path, ["real"], models=models, workers=2)
    assert pd.read_csv(tmp_path / "results.csv")["model"].tolist() == ["knn", "svm"]
