"""Intervals against closed forms and simulation, tests against scipy and enumeration; and tables of
a study, held to closed forms and scikit-learn."""

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from soundscapes_utils import stats, store

numbers = st.floats(-100, 100).map(lambda v: round(v, 3))


def test_bootstrap_ci_covers_the_true_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = stats.bootstrap_ci(rng.normal(3.0, 1.0, 30), n=400, seed=seed)
        hits += low <= 3.0 <= high
    # 95 % nominal; a binomial of 200 stays above 175 with probability > .999 at 92 %
    assert 175 <= hits <= 199


def test_bootstrap_ci_of_the_mean_is_close_to_students_t():
    values = np.random.default_rng(1).normal(0.0, 2.0, 200)
    low, high = stats.bootstrap_ci(values, n=4000)
    t_low, t_high = reference.t.interval(
        0.95, 199, loc=values.mean(), scale=values.std(ddof=1) / np.sqrt(200)
    )
    assert low == pytest.approx(t_low, abs=0.05)
    assert high == pytest.approx(t_high, abs=0.05)


def test_bootstrap_ci_takes_statistics_without_axis():
    values = np.random.default_rng(2).normal(5.0, 1.0, 60)
    low, high = stats.bootstrap_ci(values, statistic=lambda v: float(sorted(v)[len(v) // 2]), n=300)
    assert low <= np.median(values) + 0.2
    assert high >= np.median(values) - 0.2


def test_bootstrap_ci_is_seeded():
    values = np.random.default_rng(3).normal(size=40)
    assert stats.bootstrap_ci(values, seed=4) == stats.bootstrap_ci(values, seed=4)
    assert stats.bootstrap_ci(values, seed=4) != stats.bootstrap_ci(values, seed=5)


@settings(deadline=None, max_examples=30)
@given(st.lists(numbers, min_size=2, max_size=29), st.sampled_from([0.8, 0.95, 0.99]))
def test_of_few_values_the_interval_of_a_mean_is_students(values, confidence):
    low, high = stats.bootstrap_ci(values, confidence=confidence)
    error = reference.sem(values)
    expected = reference.t.interval(confidence, len(values) - 1, np.mean(values), error or 1e-300)
    assert (low, high) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    paired = stats.paired_test(values, np.zeros(len(values)), n=20)
    assert (paired["ci_low"], paired["ci_high"]) == stats.bootstrap_ci(values)


@pytest.mark.parametrize("n", [3, 5])
def test_interval_of_few_runs_covers_their_mean(n):
    row = dict.fromkeys(RESULT, 0) | {"arm": "real", "model": "sbcnn", "backend": ""}
    values = np.random.default_rng(n).normal(0.5, 0.03, (300, n))
    places = [row | {"model": str(i), "run": run} for i, run in np.ndindex(*values.shape)]
    table = pd.DataFrame(places).assign(accuracy=values.ravel())
    found = stats.summarise(table)
    # 95 % nominal; a binomial of 300 lies within 272 and 296 with probability > .999
    assert 272 <= found["ci_low"].le(0.5).mul(found["ci_high"].ge(0.5)).sum() <= 296


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [0.0, 0.0, 1.0], [1.0, 2.0]])
def test_bootstrap_ci_is_finite_on_degenerate_values(values):
    low, high = stats.bootstrap_ci(values, n=200)
    assert np.isfinite([low, high]).all()
    assert low <= np.mean(values) <= high


@pytest.mark.parametrize(
    ("values", "message"), [([1.0], "at least 2"), ([1.0, np.nan], "not finite"), ([], "at least")]
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        stats.bootstrap_ci(values)


def test_confidence_outside_its_range():
    with pytest.raises(ValueError, match="confidence"):
        stats.bootstrap_ci([1.0, 2.0], confidence=95)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=10))
def test_exact_paired_test_equals_scipy(pairs):
    a, b = np.array(pairs).T
    expected = reference.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
    ).pvalue
    result = stats.paired_test(a, b)
    assert result["exact"]
    assert result["p_value"] == pytest.approx(expected, abs=1e-12)


def test_random_paired_test_is_calibrated():
    rng = np.random.default_rng(0)
    zeros = np.zeros(30)
    tests = [stats.paired_test(rng.normal(size=30), zeros, 500, seed) for seed in range(300)]
    p = [test["p_value"] for test in tests]
    assert reference.kstest(p, "uniform").pvalue > 0.01


def test_paired_test_is_antisymmetric_and_seeded():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.3, 1, 25), rng.normal(0, 1, 25)
    forward, backward = stats.paired_test(a, b, seed=1), stats.paired_test(b, a, seed=1)
    assert not forward["exact"]
    assert forward["p_value"] == backward["p_value"]
    assert forward["effect"] == pytest.approx(-backward["effect"])
    assert forward["difference"] == pytest.approx((a - b).mean())
    assert forward["ci_low"] <= forward["difference"] <= forward["ci_high"]


def test_effect_is_cohens_d_of_the_differences():
    # differences 1, 2, 3: mean 2, SD 1
    assert stats.paired_test([2, 4, 6], [1, 2, 3])["effect"] == pytest.approx(2.0)
    # t of the paired test is √n times as large
    a, b = np.random.default_rng(0).normal(size=(2, 9))
    expected = reference.ttest_rel(a, b).statistic / 3
    assert stats.paired_test(a, b)["effect"] == pytest.approx(expected)


def test_effect_of_equal_and_of_constant_differences():
    assert stats.paired_test([1, 2, 3], [1, 2, 3])["effect"] == 0.0
    assert stats.paired_test([1, 2, 3], [1, 2, 3])["p_value"] == 1.0
    assert stats.paired_test([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])["effect"] == np.inf


def test_unpaired_lengths_are_refused():
    with pytest.raises(ValueError, match="3 values against 2"):
        stats.paired_test([1, 2, 3], [1, 2])


def test_nested_bootstrap_of_single_clips_equals_the_plain_one():
    values = np.random.default_rng(0).normal(size=80)
    low, high = stats.nested_bootstrap_ci(values, np.ones(80), np.arange(80), n=4000)
    plain = stats.bootstrap_ci(values, n=4000)
    assert (low, high) == pytest.approx(plain, abs=0.04)


def test_nested_bootstrap_keeps_the_clips_of_a_source_together():
    # eight copies of one clip say no more than the clip: the interval must be that of 20 values
    values = np.random.default_rng(1).normal(size=20)
    copies = np.repeat(values, 8)
    low, high = stats.nested_bootstrap_ci(copies, np.ones(160), np.repeat(np.arange(20), 8))
    alone = stats.nested_bootstrap_ci(values, np.ones(20), np.arange(20))
    naive = stats.nested_bootstrap_ci(copies, np.ones(160), np.arange(160))
    assert high - low == pytest.approx(alone[1] - alone[0], rel=0.1)
    assert naive[1] - naive[0] < 0.5 * (high - low)


def test_nested_bootstrap_counts_the_spread_over_folds():
    rng = np.random.default_rng(2)
    folds = np.repeat(np.arange(5), 40)
    values = np.repeat(rng.normal(0, 1, 5), 40) + rng.normal(0, 0.1, 200)
    low, high = stats.nested_bootstrap_ci(values, folds, np.arange(200), n=4000)
    # closed form: folds are drawn from five means, what happens inside them hardly matters
    means = [values[folds == i].mean() for i in range(5)]
    half = 1.96 * np.std(means) / np.sqrt(5)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert stats.nested_bootstrap_ci(values, folds, np.arange(200), n=4000) == (low, high)


@pytest.mark.parametrize(
    ("folds", "sources", "message"),
    [([1, 1], [1, 2, 3], "3 values, 2 folds"), ([1, 1, 1], [5, 5, 5], "one source")],
)
def test_nested_bootstrap_says_what_is_missing(folds, sources, message):
    with pytest.raises(ValueError, match=message):
        stats.nested_bootstrap_ci([1.0, 2.0, 3.0], folds, sources)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, level):
    adjusted = stats.holm(p_values)
    rejected = np.zeros(len(p_values), bool)
    for step, place in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[place] * (len(p_values) - step) > level:
            break
        rejected[place] = True
    np.testing.assert_array_equal(adjusted <= level, rejected)
    assert (adjusted >= np.array(p_values)).all() and adjusted.max() <= 1
    assert (adjusted <= np.minimum(1, np.array(p_values) * len(p_values)) + 1e-12).all()


def test_holm_leaves_out_what_was_not_tested():
    np.testing.assert_allclose(stats.holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])
    assert np.isnan(stats.holm([np.nan])).all()


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.holm([0.2, 1.2])


def test_as_many_clips_as_urbansound8k_has_fit_into_memory():
    rng = np.random.default_rng(0)
    a, b = rng.random(8732), rng.random(8732)
    tracemalloc.start()
    result = stats.paired_test(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5e9
    # with so many clips both agree with the normal approximation
    low, high = result["difference"] + np.array([-1.96, 1.96]) * (a - b).std() / np.sqrt(8732)
    assert (result["ci_low"], result["ci_high"]) == pytest.approx((low, high), abs=6e-4)
    z = (a - b).mean() / (a - b).std() * np.sqrt(8732)
    assert result["p_value"] == pytest.approx(2 * reference.norm.sf(abs(z)), abs=0.02)


def test_drawing_in_parts_changes_no_number():
    # too many numbers to be drawn at once
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.02, 1, 3000), rng.normal(size=3000)
    signs = 1 - 2 * np.random.default_rng(1).integers(0, 2, (4000, 3000))
    as_extreme = np.sum(np.abs(signs @ (a - b)) >= abs((a - b).sum()))
    assert stats.paired_test(a, b, n=4000, seed=1)["p_value"] == (as_extreme + 1) / 4001


# --- a study read ---

RESULT = ["arm", "model", "backend", "prompt_family", "ratio", "fold", "run", "n_real"]
RESULT += ["n_synthetic", "accuracy", "macro_f1", "steps"]


def test_summary_by_hand():
    # two folds by three runs; the folds differ far more than the runs' means 0.6, 0.7, 0.8
    values = {(4, 0): 0.4, (5, 0): 0.8, (4, 1): 0.5, (5, 1): 0.9, (4, 2): 0.6, (5, 2): 1.0}
    row = dict.fromkeys(RESULT, 0) | {"arm": "real", "model": "sbcnn", "backend": ""}
    results = pd.DataFrame(
        [row | {"fold": f, "run": r, "accuracy": value} for (f, r), value in values.items()]
    )
    (found,) = stats.summarise(results).to_dict("records")
    assert (found["n"], found["n_runs"]) == (6, 3) and found["accuracy"] == pytest.approx(0.7)
    assert found["half_width"] == pytest.approx(1.96 * 0.1 / np.sqrt(3))
    half = reference.t.ppf(0.975, 5) * np.sqrt(0.28 / 5 / 6)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.7 - half, 0.7 + half))
    # of two classifiers next to nothing is known: all that an accuracy can be
    one_run = stats.summarise(results.head(2))
    assert np.isnan(one_run["half_width"].item())
    assert one_run[["ci_low", "ci_high"]].to_numpy().tolist() == [[0, 1]]
    alone = stats.summarise(results.head(1))
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
    (row,) = stats.compare(predictions).to_dict("records")
    right = predictions["label"] == predictions["predicted"]
    means = right.groupby(predictions["arm"]).mean()
    assert row["n"] == 40
    assert row["difference"] == pytest.approx(means["both"] - means["real"])
    assert row["p_value"] < 0.05
    with pytest.raises(ValueError, match="share no test clip"):
        stats.compare(predictions, [("mixed:1", "real")])


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
            one["predicted"] = np.where(wrong, np.where(one["label"] == "a", "b", "a"), one["label"])
            parts.append(one.assign(model="sbcnn"))
    return pd.concat(parts, ignore_index=True), clips


def told(predictions, clips):
    """Predictions that say which recording each clip is cut from, as those of a study do."""
    return predictions.merge(clips[["clip_id", "source_id"]])


def test_arms_meet_their_own_controls():
    predictions = told(*study(n_sources=40, runs=3))
    pairs = [("both:1", "real"), ("real", "both:1")]
    table = stats.compare(predictions, pairs, by="source")
    assert table["against"].tolist() == ["real", "both:1"]
    assert table["verdict"].tolist() == ["worse", "better"]
    assert table["difference"].sum() == pytest.approx(0)
    np.testing.assert_allclose(table["p_holm"], 2 * table["p_value"])
    with pytest.raises(ValueError, match="nothing to compare"):
        stats.compare(predictions, [])


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
    table = stats.compare(told(predictions, clips), [("a", "b")], of="model", by=by)
    assert list(table) == list(stats.compare(predictions))
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
    table = stats.compare(predictions[~gone], [("a", "b")], of="model").set_index("arm")
    assert table["n"].tolist() == [4, 4] and table["difference"].tolist() == [-0.75, 0.0]
    with pytest.raises(ValueError, match="a and c share no test clip"):
        stats.compare(predictions, [("a", "c")], of="model")
    with pytest.raises(ValueError, match="nothing to compare"):
        stats.compare(predictions, [], of="model")


def test_intervals_by_hand():
    predictions = told(*study(runs=3))
    ids = predictions["clip_id"]
    row = stats.intervals(predictions).set_index("arm").loc["real"]
    part = predictions[predictions["arm"] == "real"]
    right = part["label"] == part["predicted"]
    runs = right.groupby([part["run"], part["fold"]]).mean().groupby("run").mean()
    assert row["accuracy"] == pytest.approx(runs.mean())
    assert row["half_width"] == pytest.approx(1.96 * runs.std() / np.sqrt(3))
    assert (row["n_folds"], row["n_runs"], row["n_clips"], row["n_sources"]) == (2, 3, 40, 20)
    assert row["ci_low"] < row["accuracy"] < row["ci_high"]
    assert np.isnan(stats.intervals(predictions[predictions["run"] == 0])["half_width"]).all()
    with pytest.raises(ValueError, match="tested clip 'c39' names no source_id"):
        stats.intervals(predictions.assign(source_id=predictions["source_id"].where(ids != "c39")))


@pytest.mark.parametrize(("by", "n"), [("clip", 40), ("source", 20), ("fold", 2), ("run", 4)])
def test_pairs_are_what_was_asked_for(by, n):
    predictions = told(*study())
    (row,) = stats.compare(predictions, by=by).to_dict("records")
    right = predictions["label"] == predictions["predicted"]
    means = right.groupby(predictions["arm"]).mean()
    assert row["n"] == n
    assert row["difference"] == pytest.approx(means["both"] - means["real"])


def test_sources_must_be_told():
    with pytest.raises(ValueError, match="'source' needs source_id"):
        stats.compare(study()[0], by="source")


def test_recordings_are_the_unit_wherever_they_are_known():
    predictions, clips = study(n_sources=40)
    known = told(predictions, clips)
    by_source = stats.compare(known, by="source")
    assert by_source["by"].item() == "source" and by_source["n"].item() == 40
    pd.testing.assert_frame_equal(stats.compare(known), by_source)
    by_clip = stats.compare(predictions)
    assert by_clip["by"].item() == "clip" and by_clip["n"].item() == 80
    with pytest.raises(ValueError, match="tested clip 'c3' names no source_id"):
        stats.compare(known.assign(source_id=known["source_id"].where(known["clip_id"] != "c3")))


def runs_of(right, clips_each=1):
    """Predictions of two arms from `right` [runs, recordings, arms], each recording some clips."""
    rows = [
        {"clip_id": f"{s}-{c}", "source_id": f"s{s}", "fold": 5, "run": run, "model": "cnn",
         "label": "a", "arm": ["both", "real"][arm], "ratio": 1.0 - arm,
         "predicted": "a" if right[run][s][arm] else "b"}
        for run, s, arm in np.ndindex(*np.shape(right)) for c in range(clips_each)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_where_only_training_scatters_a_test_is_one_of_trainings():
    # each training of "both" gets either all recordings right or none; "real" always half of them
    right = np.zeros((3, 20, 2), bool)
    right[:, ::2, 1] = True
    right[:2, :, 0] = True
    # what a recording gains differs, but on average over recordings the trainings give 0.5, 0.5, −0.5
    found = stats.compare(runs_of(right)).iloc[0]
    level = right[..., 0] * 1.0 - right[..., 1]
    of_runs, of_recordings = level.mean(axis=1), level.mean(axis=0)
    squares = np.array([of_recordings.var(ddof=1) / 20, of_runs.var(ddof=1) / 3])
    freedom = squares.sum() ** 2 / (squares**2 / [19, 2]).sum()
    low, high = reference.t.interval(0.95, freedom, level.mean(), np.sqrt(squares.sum()))
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((low, high))
    expected = 2 * reference.t.sf(level.mean() / np.sqrt(squares.sum()), freedom)
    assert found["p_value"] == pytest.approx(expected) and expected > 0.5
    assert found["given"] == "" and not found["exact"]
    # all of three trainings better, but one more than the others: few recordings do not matter
    same = np.zeros((3, 20, 2), bool)
    for run, better in enumerate((4, 8, 20)):
        same[run, :better, 0] = True
    assert stats.paired_test(same[..., 0].mean(0), np.zeros(20))["p_value"] < 0.001
    assert stats.compare(runs_of(same))["p_value"].item() > 0.05


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 5), st.integers(4, 12), st.integers(1, 3), st.integers(0, 10_000))
def test_repeated_trainings_never_make_a_test_bolder(runs, recordings, each, seed):
    rng = np.random.default_rng(seed)
    right = rng.random((runs, recordings, 2)) < rng.random((runs, 1, 2))
    found = stats.compare(runs_of(right, each)).iloc[0]
    sides = right.mean(axis=0)
    given = stats.paired_test(sides[:, 0], sides[:, 1])
    assert found["p_value"] >= given["p_value"] - 1e-12
    assert (found["n"], found["difference"]) == (recordings, pytest.approx(given["difference"]))
    # in another order, with the arms exchanged
    turned = stats.compare(runs_of(right[::-1, ::-1, ::-1], each)).iloc[0]
    assert turned["p_value"] == pytest.approx(found["p_value"])
    assert (turned["ci_low"], -turned["ci_high"]) == pytest.approx((-found["ci_high"], found["ci_low"]))
    alone = stats.compare(runs_of(right[:1], each)).iloc[0]
    assert alone["given"] == "these trainings"
    first = stats.paired_test(right[0, :, 0], right[0, :, 1])
    assert (alone["p_value"], alone["ci_low"]) == (first["p_value"], first["ci_low"])


def test_what_was_not_repeated_everywhere_is_given_these_trainings():
    right = np.random.default_rng(0).random((3, 10, 2)) < 0.5
    whole = runs_of(right)
    # the second and third training of one recording are missing: only the first is of all
    part = whole[(whole["run"] == 0) | (whole["source_id"] != "s4")]
    assert stats.compare(part)["given"].item() == "these trainings"
    assert stats.compare(whole, by="run")["given"].item() == "these recordings"
    deltas = stats.class_deltas(whole, "both:1", "cnn")
    row = stats.compare(whole).iloc[0]
    for name in ("ci_low", "ci_high", "p_value", "given"):
        assert deltas[name].item() == row[name]


def test_simulated_rates_keep_the_limits():
    file = Path(__file__).parents[1] / "benchmarks" / "calibration.py"
    spec = importlib.util.spec_from_file_location("benchmark_calibration", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    # some seconds for the few simulations of each setting that show what lies far outside
    table = benchmark.calibrate(benchmark.SECTIONS, 6)
    assert set(table["what"]) == {"null KAD", "coverage", "false positives", "power"}
    assert "no" not in set(table["keeps"]), table[table["keeps"] == "no"].to_string()


def complex_or_graded(x):
    import torch

    return {
        "complex": np.asarray(x) * 1j,
        "tensor": torch.tensor(x, dtype=torch.double, requires_grad=True),
    }


def test_complex_numbers_are_refused_and_tensors_taken():
    a, b = [0.1, 0.5, 0.7, 0.9], [0.2, 0.1, 0.9, 0.4]
    for function in (
        stats.bootstrap_ci,
        lambda v: stats.paired_test(v, b),
        lambda v: stats.nested_bootstrap_ci(v, [1, 1, 2, 2], [1, 2, 3, 4]),
    ):
        strange = complex_or_graded(a)
        assert function(strange["tensor"]) == function(a)
        with pytest.raises(ValueError, match="expected real numbers: they are complex"):
            function(strange["complex"])
    with pytest.raises(ValueError, match="expected real numbers"):
        stats.bootstrap_ci(["one", "two"])


def test_all_arms_are_corrected_together():
    predictions, _ = study(n_sources=40, runs=3)
    other = predictions[predictions["arm"] == "both"].assign(arm="mixed", ratio=2.0)
    table = stats.compare(pd.concat([predictions, other]))
    assert table["arm"].tolist() == ["both", "mixed"]
    np.testing.assert_allclose(table["p_holm"], np.minimum(1, 2 * table["p_value"]))
    assert set(table["verdict"]) == {"worse"}
    with pytest.raises(ValueError, match="nothing to compare"):
        stats.compare(predictions[predictions["arm"] == "real"])


def test_classes_are_told_apart():
    predictions = told(*study(n_sources=40))
    table = stats.class_deltas(predictions, "both:1", "sbcnn").set_index("label")
    assert table.loc["a", "difference"] > 0 > table.loc["b", "difference"]
    assert table.loc["b", "ci_high"] < 0 and table.loc["b", "p_holm"] < 0.05
    alone = predictions[predictions["clip_id"].isin(["c0", "c2", "c4"])]
    table = stats.class_deltas(alone, "both:1", "sbcnn").set_index("label")
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
    (row,) = stats.class_deltas(told(predictions, clips), "both:1", "svm").to_dict("records")
    assert (row["n"], row["n_sources"]) == (16, 4)
    # of the 2^3 patterns of the signs that matter only two lie as far out
    assert row["difference"] == 0.75 and row["p_value"] == 2 / 2**3
    (alone,) = stats.class_deltas(predictions, "both:1", "svm").to_dict("records")
    assert alone["n_sources"] == 16 and alone["p_value"] < 0.01


def test_the_judge_finds_clips_that_are_not_what_they_are_called():
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"] * 20)
    centres = {"a": (0, 0), "b": (9, 0), "c": (0, 9)}

    def near(names):
        return np.array([centres[name] for name in names]) + rng.normal(size=(len(names), 2))

    swapped = np.where(labels == "c", "a", labels)
    table = stats.class_consistency(
        (near(labels), labels), (near(swapped), labels), (near(labels), labels)
    )
    table = table.set_index("label")
    assert table["held_out"].min() > 0.9
    assert table.loc["c", "generated"] == 0 and table.loc["all", "generated"] == pytest.approx(2 / 3)
    assert table.loc["all", "n_generated"] == 60
    with pytest.raises(ValueError, match="5 features"):
        stats.class_consistency(
            (near(labels), labels), (np.zeros((3, 5)), labels[:3]), (near(labels), labels)
        )


def test_published_table_is_complete():
    table = store.read_table(store.project_root(__file__) / "notebooks/appendix/ronchini2024.csv")
    assert table.groupby("arm").size().to_dict() == {
        "both": 32, "mixed": 64, "real": 2, "synthetic": 32
    }  # fmt: skip
    assert table.groupby("arm")["half_width"].count().to_dict() == {
        "both": 0, "mixed": 0, "real": 2, "synthetic": 0
    }  # fmt: skip
    best = table.loc[table["accuracy"].idxmax()]
    assert (best["backend"], best["prompt_family"], best["ratio"]) == ("AudioLDM2", "gpt", 3)
    assert table["accuracy"].between(0.29, 0.72).all()
