"""Tables of a study: intervals, paired tests and classes, held to closed forms and scikit-learn."""

import numpy as np
import pandas as pd
import pytest

from soundscapes_utils import esc


def test_summary_by_hand():
    # two folds by three runs; the folds differ far more than the runs' means 0.6, 0.7, 0.8
    values = {(4, 0): 0.4, (5, 0): 0.8, (4, 1): 0.5, (5, 1): 0.9, (4, 2): 0.6, (5, 2): 1.0}
    row = dict.fromkeys(esc.RESULT_COLUMNS, 0) | {"arm": "real", "model": "sbcnn", "backend": ""}
    results = pd.DataFrame(
        [row | {"fold": f, "run": r, "accuracy": value} for (f, r), value in values.items()]
    )
    (found,) = esc.summarise(results).to_dict("records")
    assert (found["n"], found["n_runs"]) == (6, 3) and found["accuracy"] == pytest.approx(0.7)
    assert found["half_width"] == pytest.approx(1.96 * 0.1 / np.sqrt(3))
    assert 0.4 <= found["ci_low"] < 0.7 < found["ci_high"] <= 1.0
    one_run = esc.summarise(results.head(2))
    assert np.isnan(one_run["half_width"].item()) and one_run["ci_low"].item() == 0.4
    alone = esc.summarise(results.head(1))
    assert alone[["half_width", "ci_low", "ci_high"]].isna().all(axis=None)


def test_one_run_has_no_error_bar():
    from soundscapes_utils import plots

    row = dict.fromkeys(esc.RESULT_COLUMNS, 0) | {"arm": "real", "model": "sbcnn", "accuracy": 0.5}
    results = pd.DataFrame([row, row | {"arm": "both", "ratio": 1.0}])
    for table, bars in ((results, 0), (pd.concat([results, results.assign(run=1)]), 2)):
        figure = plots.accuracy_curve(table, "both", "ratio")
        figure.canvas.draw()
        (drawn,) = figure.axes[0].containers[0].lines[2]
        seen = [np.isfinite(path).all() for path in drawn.get_segments() if len(path)]
        assert sum(seen) == bars


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


def two_models():
    """In arm real, 8 recordings of which b alone recognises the last 6; in arm both they are equal."""
    clips = pd.DataFrame({"clip_id": [f"c{i}" for i in range(8)], "fold": [4, 5] * 4, "label": "x"})
    parts = []
    for arm, ratio, missed in (("real", 0.0, 6), ("both", 1.0, 0)):
        for model, wrong in (("a", missed), ("b", 0)):
            predicted = np.where(np.arange(8) >= 8 - wrong, "y", "x")
            one = clips.assign(predicted=predicted, arm=arm, ratio=ratio, model=model)
            parts += [one.assign(run=run) for run in (0, 1)]
    return pd.concat(parts, ignore_index=True), clips


@pytest.mark.parametrize("by", ["clip", "source"])
def test_models_meet_in_the_same_arm(by):
    predictions, clips = two_models()
    clips["source_id"] = clips["clip_id"]
    table = esc.compare_models(predictions, [("a", "b")], by=by, clips=clips)
    assert list(table) == list(esc.compare_pairs(predictions, [(("both", 1.0), ("real", 0.0))]))
    assert table[["arm", "ratio", "model", "against"]].to_numpy().tolist() == [
        ["real", 0.0, "a", "b"],
        ["both", 1.0, "a", "b"],
    ]
    # six of eight pairs differ, all to one side: 2 of the 2^6 patterns of their signs
    assert table["difference"].tolist() == [-0.75, 0.0] and table["n"].tolist() == [8, 8]
    assert table["p_value"].tolist() == [2 / 2**6, 1.0]
    assert table["p_holm"].tolist() == [4 / 2**6, 1.0]
    assert table.loc[0, "effect"] == pytest.approx(-0.75 / np.sqrt(8 / 7 * 0.75 * 0.25))
    assert table["verdict"].tolist() == ["no difference shown"] * 2


def test_models_are_compared_on_folds_and_runs_that_both_have():
    predictions, _ = two_models()
    gone = (predictions["model"] == "b") & ((predictions["run"] == 1) | (predictions["fold"] == 4))
    # what b was not trained for, a got all wrong
    alone = (predictions["run"] == 1) | (predictions["fold"] == 4)
    predictions.loc[alone & (predictions["model"] == "a"), "predicted"] = "y"
    table = esc.compare_models(predictions[~gone], [("a", "b")]).set_index("arm")
    assert table["n"].tolist() == [4, 4] and table["difference"].tolist() == [-0.75, 0.0]
    with pytest.raises(ValueError, match="a and c share no test clip"):
        esc.compare_models(predictions, [("a", "c")])
    with pytest.raises(ValueError, match="nothing to compare"):
        esc.compare_models(predictions, [])


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


def test_clips_of_one_recording_are_one_observation():
    # 16 clips that one arm alone recognises, but of 4 recordings, 1, 1, 7 and 7 clips
    sources = ["s0", "s1", *["s2"] * 7, *["s3"] * 7]
    clips = pd.DataFrame({"source_id": sources, "fold": 5, "label": "a"})
    clips["clip_id"] = [f"c{i}" for i in range(16)]
    one = clips.drop(columns="source_id").assign(run=0, model="svm")
    real = one.assign(arm="real", ratio=0.0, predicted=["a", *["b"] * 15])
    both = one.assign(arm="both", ratio=1.0, predicted="a")
    predictions = pd.concat([real, both])
    (row,) = esc.class_deltas(predictions, "both", 1.0, "svm", clips=clips).to_dict("records")
    assert (row["n"], row["n_sources"]) == (16, 4)
    # of the 2^3 patterns of the signs that matter only two lie as far out
    assert row["difference"] == 0.75 and row["p_value"] == 2 / 2**3
    (alone,) = esc.class_deltas(predictions, "both", 1.0, "svm").to_dict("records")
    assert alone["n_sources"] == 16 and alone["p_value"] < 0.01


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
    with pytest.raises(ValueError, match="1 classifiers on 200 recordings"):
        esc.choice_on_test(parts[0].assign(model="sbcnn"))


def test_a_choice_halves_recordings_not_their_clips():
    # ten clips of each of 20 recordings, all right or all wrong: as 20 clips that stand for ten
    rng = np.random.default_rng(0)
    clips = pd.DataFrame({"source_id": np.repeat([f"s{i}" for i in range(20)], 10), "label": "a"})
    clips = clips.assign(clip_id=[f"c{i}" for i in range(200)], fold=5)
    tests = [clips.drop(columns="source_id").assign(arm="real", ratio=0.0, run=i, model="svm",
             predicted=np.repeat(rng.permutation(list("ab" * 10)), 10)) for i in range(6)]  # fmt: skip
    predictions = pd.concat(tests)
    found = esc.choice_on_test(predictions, clips, n=4000)
    one = predictions[predictions["clip_id"].isin(clips["clip_id"][::10])]
    assert (found["clips"], found["sources"]) == (200, 20)
    assert found["bias"] == pytest.approx(esc.choice_on_test(one, n=4000)["bias"], abs=0.01)
    assert found["bias"] > 2 * esc.choice_on_test(predictions, n=4000)["bias"]


def test_distances_of_classes_are_kad_and_fad():
    from soundscapes_utils import fad

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)), np.repeat(["a", "b"], 20)
    made = x + np.where(y == "b", 3.0, 0.0)[:, None]
    both = esc.class_distances((x, y), (made[::2], y[::2]), "toy", "mini")
    for metric, distance in (("KAD", fad.kernel_distance), ("FAD", fad.frechet_distance)):
        table = both[both["metric"] == metric].set_index("reference")
        assert table.loc["b", "value"] == distance(x[20:], made[20::2])
        assert table["value"].idxmax() == "b" and table["n_candidate"].tolist() == [10, 10]
    with pytest.raises(ValueError, match="'a' has 20 real and 1 synthetic"):
        esc.class_distances((x, y), (made[19:], y[19:]))


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


def study_results(models, arms, runs=(0,)):
    """Results of which each arm, model and run has an accuracy of its own."""
    row = dict.fromkeys(esc.RESULT_COLUMNS, 0) | {"backend": "", "prompt_family": ""}
    return pd.DataFrame(
        [
            row
            | {"model": model, "arm": arm, "ratio": ratio, "run": run}
            | {"accuracy": 0.5 + 0.1 * i + 0.02 * j + 0.01 * run}
            for i, model in enumerate(models)
            for j, (arm, ratio) in enumerate(arms)
            for run in runs
        ]
    )


def test_the_papers_figures_hold_all_its_numbers():
    from soundscapes_utils import plots

    results = study_results(["sbcnn"], [("real", 0.0), ("both", 1.0)])
    drawn, margins = [], []
    for panel in plots.beside_published(results).axes:
        model, kind = panel.get_title().split(", ")
        for line in panel.lines:
            if line.get_label().startswith("paper: ") and line.get_linestyle() == "--":
                backend, family = line.get_label()[len("paper: ") : -len(" prompt")].split(", ")
                for ratio, accuracy in line.get_xydata():
                    about = (kind, backend, family) if ratio else ("real", "", "")
                    drawn.append((about[0], ratio, model, *about[1:], accuracy))
        for container in panel.containers:
            if container.get_label() == "paper: 95 % margin":
                (ends,) = container.lines[2][0].get_segments()
                margins.append((model, kind, *np.round(ends[:, 1], 4)))
    table = esc.published().drop(columns="half_width")
    assert set(drawn) == set(table.itertuples(index=False, name=None)) and len(set(drawn)) == 130
    # 64.68 ± 0.82 and 62.70 ± 0.65 %
    assert margins == [("sbcnn", "both", 0.6386, 0.655), ("sbcnn", "mixed", 0.6386, 0.655),
                       ("crnn", "both", 0.6205, 0.6335), ("crnn", "mixed", 0.6205, 0.6335)]  # fmt: skip


def test_own_sources_and_variants_can_be_told_apart_in_the_papers_figures():
    from soundscapes_utils import plots

    arms = [("real", 0.0), ("both@mini", 1.0), ("both@ps1", 1.0), ("synthetic@mini", 2.0)]
    models = ["sbcnn", "sbcnn:faithful", "knn"]
    figure = plots.beside_published(study_results(models, [*arms, ("real/2", 0.0)], runs=(0, 1)))
    figure.canvas.draw()
    own = {
        (panel.get_title(), line.get_label()): line.lines[0]
        for panel in figure.axes
        for line in panel.containers
        if line.get_label().startswith("own")
    }
    both = [f"own: {name}" for name in ("mini", "ps1", "mini, faithful", "ps1, faithful")]
    assert set(own) == {("sbcnn, both", label) for label in both} | {
        ("sbcnn, synthetic", label) for label in both[::2]
    }
    faithful = own["sbcnn, both", "own: mini, faithful"].get_xydata()
    np.testing.assert_allclose(faithful, [[0, 0.605], [1, 0.625]])
    looks = {label: {(line.get_marker(), str(line.get_color())) for (_, name), line in own.items()
                     if name == label} for label in both}  # fmt: skip
    assert all(len(look) == 1 for look in looks.values()) and len(set.union(*looks.values())) == 4
    assert {*both, "paper: AudioLDM2, gpt prompt"} < {
        text.get_text() for text in figure.legends[0].get_texts()
    }
    assert [axis.get_xlabel() != "" for axis in figure.axes] == [False] * 3 + [True] * 3
