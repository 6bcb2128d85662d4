import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundscapes_utils import generation, selection, stats

SETTINGS = settings(deadline=None, max_examples=30)


def directions(degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


# --- criteria --------------------------------------------------------------------------------------


def test_clap_scores_are_cosines_of_angles():
    # classes at 0 and 90 degrees; lengths must not matter
    audio = directions([10, 30, 80]) * [[1], [5], [0.1]]
    table = selection.clap_scores(audio, ["a", "a", "a"], directions([0, 90]) * 3, ["a", "b"])
    own, other = np.cos(np.deg2rad([10, 30, 80])), np.cos(np.deg2rad([80, 60, 10]))
    assert table.clap_score.tolist() == pytest.approx(own)
    assert table.clap_margin.tolist() == pytest.approx(own - other)
    assert table.clap_predicted.tolist() == ["a", "a", "b"]


def test_several_texts_of_a_class_are_averaged_and_prompts_only_move_the_score():
    audio = directions([20.0])
    text = directions([-10, 30, 90])
    table = selection.clap_scores(audio, ["a"], text, ["a", "a", "b"], directions([20.0]))
    # the mean of −10 and 30 degrees points to 10
    assert table.clap_score[0] == pytest.approx(1)
    assert table.clap_margin[0] == pytest.approx(np.cos(np.deg2rad(10)) - np.cos(np.deg2rad(70)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["c", "a"]}, "not c"),
        ({"labels": ["a", "a"], "classes": ["a", "a"]}, "they name a, not a second one"),
        ({"labels": ["a"]}, "2 rows, but 1 names"),
        ({"audio": np.zeros((2, 2))}, "row 0 of audio is zero"),
        ({"audio": np.full((2, 2), np.nan)}, "audio: 2 of 2 are not finite, the first is row 0"),
        ({"text": np.eye(3)[:2]}, "size 3 is different from 2"),
        ({"prompts": np.eye(3)}, "shapes"),
    ],
)
def test_clap_scores_name_what_does_not_fit(change, message):
    arguments = {"audio": np.eye(2), "labels": ["a", "b"], "text": np.eye(2), "classes": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        selection.clap_scores(**(arguments | change))


def test_the_judge_is_the_one_of_class_consistency():
    rng = np.random.default_rng(3)
    labels = np.array(["a", "b", "c"] * 20)
    shift = np.array([["a", "b", "c"].index(label) for label in labels])[:, None]
    real, made = (rng.normal(size=(60, 4)) + 0.8 * shift for _ in range(2))
    found = selection.class_probability((real, labels), made, labels)
    judged = stats.class_consistency((real, labels), (made, labels), (real, labels))
    assert (found.predicted == labels).mean() == judged.generated.iloc[-1]
    # where the label is the most probable one, its probability is above one in three
    assert (found.class_probability[found.predicted == labels] > 1 / 3).all()
    with pytest.raises(ValueError, match="no real recording of d to learn from"):
        selection.class_probability((real, labels), made[:1], ["d"])


def test_joint_rank_is_the_product_of_ranks():
    labels = ["a", "a", "a", "b", "b"]
    joint = selection.joint_rank(labels, [9, 5, 5, 1, 2], [0.1, 0.9, 0.5, 0.2, 0.1])
    ranks = np.array([[1, 3], [2.5, 1], [2.5, 2], [2, 1], [1, 2]])
    assert joint == pytest.approx(1 / np.sqrt(ranks.prod(axis=1)))


@SETTINGS
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.randoms())
def test_joint_rank_is_blind_to_scale_and_order(values, random):
    labels = [random.choice("ab") for _ in values]
    x = np.array(values, dtype=float)
    joint = selection.joint_rank(labels, x, -x)
    assert joint == pytest.approx(selection.joint_rank(labels, np.exp(x), -3 * x + 7))
    order = np.random.default_rng(random.randrange(99)).permutation(len(x))
    turned = selection.joint_rank(np.array(labels)[order], x[order], -x[order])
    assert turned == pytest.approx(joint[order])


def test_summary_of_a_set_is_counted_and_averaged_by_class():
    scores = pd.DataFrame({"label": ["a", "a", "b", "b"], "predicted": ["a", "a", "b", "a"]})
    scores = scores.assign(clap_score=[1, 2, 3, 4], clap_margin=[0, 0, 0, 1])
    found = selection.summarise(scores, [[0.0], [1.0], [5.0], [8.0]])
    assert (found["n"], found["judge_agrees"], found["clap_score"]) == (4, 0.75, 2.5)
    # pairs across classes do not count
    assert found["spread"] == (1 + 3) / 2 and found["clap_margin"] == 0.25
    assert found["ci_low"] <= 0.75 <= found["ci_high"]
    # Wilson's interval of four right out of four, 1 / (1 + z² / n) to 1: no certainty
    sure = selection.summarise(scores.assign(predicted=scores.label), [[0.0]] * 4)
    assert (sure["ci_low"], sure["ci_high"]) == pytest.approx((1 / (1 + 1.959964**2 / 4), 1))
    with pytest.raises(ValueError, match="1 rows, but 4 names"):
        selection.summarise(scores, [[0.0]])


# --- filters ---------------------------------------------------------------------------------------


def test_best_of_a_class_and_the_earlier_of_equals():
    kept = selection.keep_best(["a", "b", "a", "b", "a"], [1, 0, 3, 0, 3], {"a": 2, "b": 1})
    assert kept.tolist() == [False, True, True, False, True]


@SETTINGS
@given(st.integers(1, 5), st.integers(0, 99))
def test_every_filter_keeps_the_stated_number(n, seed):
    labels = ["a"] * 5 + ["b"] * 10
    values = np.random.default_rng(seed).normal(size=(2, 15))
    counts = selection.counts_per_class(labels, n / 5)
    masks = [selection.keep_best(labels, part, counts) for part in values]
    masks.append(selection.keep_best(labels, selection.joint_rank(labels, *values), counts))
    masks.append(selection.keep_random(labels, counts, seed))
    for kept in masks:
        assert kept[:5].sum() == n and kept[5:].sum() == 2 * n


def test_random_drop_follows_seed_and_class_alone_and_takes_everyone_in_turn():
    labels = ["a"] * 8 + ["b"] * 8
    kept = selection.keep_random(labels, 3, seed=1)
    assert selection.keep_random(labels[:8], 3, seed=1).tolist() == kept[:8].tolist()
    share = np.mean([selection.keep_random(labels, 3, seed=s) for s in range(400)], axis=0)
    # a binomial share of 400 draws: five standard deviations are 0.12
    assert np.abs(share - 3 / 8).max() < 0.12


def test_too_few_clips_and_bad_values_are_named():
    with pytest.raises(ValueError, match="3 clips of b are to be kept, there are 1"):
        selection.keep_random(["a", "a", "a", "b"], 3)
    with pytest.raises(ValueError, match="values: 1 of 2 are not finite"):
        selection.keep_best(["a", "a"], [1, np.nan], 1)


def test_complex_values_are_refused_and_tensors_taken():
    import torch

    with pytest.raises(ValueError, match="values: expected real numbers: they are complex"):
        selection.keep_best(["a", "a"], np.array([1j, 2]), 1)
    for rows in (np.eye(2) * 1j, [["x", "y"], ["y", "x"]]):
        with pytest.raises(ValueError, match="audio: expected real numbers"):
            selection.clap_scores(rows, ["a", "b"], np.eye(2), ["a", "b"])
    graded = torch.eye(2, requires_grad=True)
    found = selection.clap_scores(graded, ["a", "b"], np.eye(2), ["a", "b"])
    assert found.clap_score.tolist() == [1, 1]


def test_shares_are_rounded_down_but_leave_one():
    labels = ["dog"] * 7 + ["rain"]
    assert selection.counts_per_class(labels, 0.5) == {"dog": 3, "rain": 1}
    with pytest.raises(ValueError, match="share is 0"):
        selection.counts_per_class(labels, 0)


def test_the_best_by_clap_is_nearest_to_its_own_prompt(monkeypatch):
    from soundscapes_utils import embeddings

    texts = {"a dog": [1.0, 0.0], "rain": [0.0, 1.0]}
    sounds = {"1": [0.0, 2.0], "2": [3.0, 0.1], "3": [1.0, 2.0], "4": [1.0, 1.0]}

    class Ear:
        def embed(self, paths, silence):
            return np.array([sounds[path] for path in paths])

    monkeypatch.setattr(selection, "text_embedder", lambda *_: lambda t: [texts[one] for one in t])
    monkeypatch.setattr(embeddings, "get_embedding", lambda *_: Ear())
    names = pd.DataFrame({"clip_id": ["a", "a-c2", "b", "b-c2"], "candidate_of": list("aabb")})
    made = names[["clip_id"]].assign(
        path=list("1234"), prompt=["a dog"] * 2 + ["rain"] * 2, score=np.nan
    )
    best = selection.best_by_clap(names, made)
    assert best.path.tolist() == ["2", "3"]
    np.testing.assert_allclose(best.score, [3 / 9.01**0.5, 2 / 5**0.5])


# --- probe -----------------------------------------------------------------------------------------


def test_probe_finds_a_shift_and_nothing_where_there_is_none():
    rng = np.random.default_rng(1)
    x, same = rng.normal(size=(150, 3)), rng.normal(size=(150, 3))
    names = [f"r{i}" for i in range(150)], [f"s{i}" for i in range(150)]
    none = selection.two_sample_auc(x, same, *names, repeats=200, floors=6)
    shifted = selection.two_sample_auc(x, same + np.array([1.5, 0, 0]), *names, repeats=200, floors=6)
    assert none.comparison.tolist() == ["synthetic", "real against real"]
    assert none.ci_low[0] < 0.5 < none.ci_high[0]
    # two normal distributions 1.5 standard deviations apart: Φ(1.5 / √2) = 0.856
    assert shifted.auc[0] == pytest.approx(0.856, abs=0.04)
    assert shifted.ci_low[0] < 0.856 < shifted.ci_high[0]
    assert shifted.ci_low[0] > shifted.ci_high[1]
    assert abs(shifted.auc[1] - 0.5) < 0.1
    assert shifted.loc[0, ["n_reference", "n_candidate", "sources"]].tolist() == [150, 150, 300]
    assert shifted.loc[1, ["n_reference", "n_candidate", "sources"]].tolist() == [75, 75, 150]


def test_area_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    rng = np.random.default_rng(3)
    # few different values: scores are tied
    x, y = rng.integers(0, 3, (60, 1)), rng.integers(1, 4, (60, 1))
    table = selection.two_sample_auc(x, y, range(60), range(60, 120), floors=1, repeats=2)
    points, synthetic = np.concatenate([x, y]).astype(float), np.repeat([0, 1], 60)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    # one dimension: any linear probe orders clips as the dimension does
    areas = [
        roc_auc_score(synthetic[test], points[test, 0])
        for _, test in folds.split(points, synthetic, np.arange(120).astype(str))
    ]
    assert table.auc[0] == pytest.approx(np.mean(areas))


def test_probe_does_not_recognise_a_source_by_its_twin():
    # every source is a random point, heard five times: with twins on both sides of the cut, a
    # flexible probe would know them; within one kind there is nothing else to know
    rng = np.random.default_rng(2)
    sources = np.repeat(np.arange(40), 5)
    x = rng.normal(size=(40, 60))[sources] + 0.01 * rng.normal(size=(200, 60))
    real, fake = sources < 20, sources >= 20
    table = selection.two_sample_auc(
        x[real], x[fake], sources[real], sources[fake], folds=5, floors=2, repeats=200
    )
    # with leaking twins the area is 1
    assert table.ci_low[0] < 0.6 and table.auc[0] < 0.8


def test_probe_needs_sources():
    x = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(ValueError, match="4 real and 20 synthetic sources are too few"):
        selection.two_sample_auc(x, x, np.arange(20) // 5, np.arange(20))
    with pytest.raises(ValueError, match="must match exactly"):
        selection.two_sample_auc(x, x[:, :1], np.arange(20), np.arange(20))


# --- candidates ------------------------------------------------------------------------------------


def test_more_candidates_only_add_and_one_changes_nothing():
    plan = generation.plan_clips(["dog", "rain"], 2, duration_s=1)
    one, two, four = (selection.plan_candidates(plan, n) for n in (1, 2, 4))
    assert one[plan.columns].equals(plan)
    assert two[~two.clip_id.isin(plan.clip_id)].clip_id.str.endswith("-c2").all()
    both = four.merge(two, on=["clip_id", "seed", "candidate_of"])
    assert len(both) == len(two) == 8 and four.seed.nunique() == 16
    other = selection.plan_candidates(generation.plan_clips(["dog"], 1, duration_s=1, seed=1), 2)
    assert not set(other.seed) & set(four.seed)
    with pytest.raises(ValueError, match="at least 1"):
        selection.plan_candidates(plan, 0)


def test_the_best_candidate_takes_its_clips_place():
    plan = generation.plan_clips(["dog", "rain"], 2, duration_s=1)
    candidates = selection.plan_candidates(plan, 3)
    # all of the third clip failed, and one of the first
    made = candidates[
        ~candidates.candidate_of.eq("rain-simple-0000") & candidates.clip_id.ne("dog-simple-0000")
    ]
    made = made.assign(score=np.nan)[["clip_id", "label", "seed", "score"]]
    scores = [0.2, 0.7, 0.5, 0.9, 0.9, -0.1, -0.2, -0.3]
    best = selection.best_candidates(candidates, made, scores)
    assert best.clip_id.tolist() == ["dog-simple-0000", "dog-simple-0001", "rain-simple-0001"]
    assert best.score.tolist() == [0.7, 0.9, -0.1]
    assert best.seed.tolist() == [made.seed.iloc[1], made.seed.iloc[3], made.seed.iloc[5]]
    assert best.columns.tolist() == made.columns.tolist()
    with pytest.raises(ValueError, match="is not a candidate"):
        selection.best_candidates(candidates.iloc[1:], candidates.iloc[:1].assign(score=0), [0])


def test_a_clip_without_rivals_keeps_its_row():
    candidates = selection.plan_candidates(generation.plan_clips(["dog"], 3, duration_s=1), 1)
    made = pd.DataFrame({"clip_id": candidates.clip_id, "score": np.nan, "path": ["a", "b", "c"]})
    assert selection.best_candidates(candidates, made, [3, 2, 1]).equals(made)


# --- text towers -----------------------------------------------------------------------------------


def test_text_tower_of_a_checkpoint_is_the_pipelines():
    from soundscapes_utils import ldm

    texts = ["a dog barking", "the sound of rain and nothing else"]
    pipe = ldm.load_pipeline("builtin", device="cpu")
    expected = ldm.embed_text(pipe, texts).numpy()
    assert selection.text_embedder()(texts) == pytest.approx(expected, abs=1e-6)


def test_text_tower_of_a_whole_clap_is_that_of_transformers(tmp_path):
    import torch
    from tiny_checkpoints import clap

    model, tokenizer = clap(tmp_path)
    rows = selection.text_embedder("laion-clap", tmp_path)(["a dog barking"])
    with torch.no_grad():
        expected = model.text_projection(
            model.text_model(**tokenizer(["a dog barking"], return_tensors="pt")).pooler_output
        )[0]
    assert rows[0] == pytest.approx((expected / expected.norm()).numpy(), abs=1e-5)


def test_unknown_and_absent_towers_are_named(tmp_path):
    from soundscapes_utils import ldm

    with pytest.raises(ValueError, match="yamnet has no text tower here"):
        selection.text_embedder("yamnet")
    with pytest.raises(ldm.CheckpointError, match=r"no model_index\.json"):
        selection.text_embedder("laion-clap", tmp_path)
