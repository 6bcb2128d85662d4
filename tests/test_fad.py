"""Distances against closed forms, reference implementations and published embeddings."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from soundscapes_utils import fad

DCASE = Path(__file__).parents[2] / "shared" / "data" / "dcase2024_task7_dev" / "embeddings"
needs_dcase = pytest.mark.skipif(
    not DCASE.is_dir(), reason="the DCASE 2024 Task 7 development embeddings are not at hand"
)


def gaussian(n, d, seed=0, mean=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(mean, scale, (n, d))


def whitened(n, d, seed=0):
    """Rows whose sample mean is 0 and whose sample covariance is exactly the identity."""
    x = gaussian(n, d, seed)
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


def frechet_by_sqrtm(x, y):
    cx, cy = np.cov(x.T), np.cov(y.T)
    shift = x.mean(0) - y.mean(0)
    return shift @ shift + np.trace(cx) + np.trace(cy) - 2 * np.trace(sqrtm(cx @ cy)).real


# --- Fréchet --------------------------------------------------------------------------------------


def test_frechet_of_shifted_and_scaled_gaussians():
    x = whitened(200, 6)
    scales, shift = np.array([0.5, 1, 2, 3, 4, 5.0]), np.arange(6.0)
    expected = (shift**2).sum() + ((scales - 1) ** 2).sum()
    assert fad.frechet_distance(x, x * scales + shift) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 20), (60, 80, 40), (41, 500, 40)])
def test_frechet_equals_sqrtm(n, m, d):
    mixing = gaussian(d, d, 7)
    x, y = gaussian(n, d, 1) @ mixing, gaussian(m, d, 2, 0.3, 1.4)
    assert fad.frechet_distance(x, y) == pytest.approx(frechet_by_sqrtm(x, y), rel=1e-8)


def test_few_rows_in_many_dimensions_are_no_approximation():
    # rows in a 5-dimensional subspace, rotated into 300 dimensions: the distance is theirs
    x, y = gaussian(12, 5, 1), gaussian(9, 5, 2, 1.0)
    basis = np.linalg.qr(gaussian(300, 5, 3))[0]
    expected = frechet_by_sqrtm(x, y)
    assert fad.frechet_distance(x @ basis.T, y @ basis.T) == pytest.approx(expected, rel=1e-8)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 12), st.integers(0, 10_000))
def test_frechet_is_symmetric_non_negative_and_blind_to_rotation_order_shift(n, m, d, seed):
    x, y = gaussian(n, d, seed), gaussian(m, d, seed + 1, 0.5, 2.0)
    rotation = np.linalg.qr(gaussian(d, d, seed + 2))[0]
    value = fad.frechet_distance(x, y)
    assert value >= 0
    close = pytest.approx(value, rel=1e-7, abs=1e-9)
    assert fad.frechet_distance(y, x) == close
    assert fad.frechet_distance(x @ rotation + 3, y @ rotation + 3) == close
    assert fad.frechet_distance(x[::-1], y) == close
    assert fad.frechet_distance(10 * x, 10 * y) == pytest.approx(100 * value, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("n", [2, 5, 100])
def test_frechet_of_a_set_with_itself_is_zero(n, scale):
    x = scale * gaussian(n, 30, 1)
    assert 0 <= fad.frechet_distance(x, x) <= 1e-10 * (x**2).sum()


def test_frechet_of_constant_sets():
    constant = np.full((4, 3), 2.0)
    assert fad.frechet_distance(constant, constant) == 0.0
    assert fad.frechet_distance(constant, constant + np.array([0, 0, 3])) == pytest.approx(9.0)
    x = whitened(50, 3)
    assert fad.frechet_distance(x, np.zeros((5, 3))) == pytest.approx(3.0)


def test_float16_rows_are_computed_in_float64():
    x = gaussian(50, 20, 1).astype(np.float16)
    y = gaussian(50, 20, 2).astype(np.float16)
    expected = fad.frechet_distance(x.astype(np.float64), y.astype(np.float64))
    assert fad.frechet_distance(x, y) == expected


@pytest.mark.parametrize("metric", list(fad.METRICS.values()))
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((1, 3)), np.zeros((19, 3)), "reference: needs at least"),
        (np.eye(19), np.full((19, 19), np.nan), "candidate: 19 of 19 rows hold NaN"),
        (np.eye(19), np.eye(18), "19 dimensions, candidate 18"),
        (np.zeros(19), np.zeros((19, 1)), "shape"),
        (np.zeros((19, 0)), np.zeros((19, 0)), "shape"),
    ],
)
def test_bad_input_is_named(metric, x, y, message):
    with pytest.raises(ValueError, match=message):
        metric(x, y)


# --- KAD and manifolds ----------------------------------------------------------------------------


def brute_kad(x, y):
    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * sigma**2))

    pairs = [np.sqrt(((a - b) ** 2).sum()) for i, a in enumerate(x) for b in x[:i]]
    sigma = np.median(pairs)
    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return 100 * (within_x + within_y - 2 * np.mean([kernel(a, b) for a in x for b in y]))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_kad_equals_its_definition(offset):
    x, y = gaussian(25, 7, 1) + offset, gaussian(31, 7, 2, 0.4) + offset
    assert fad.kernel_distance(x, y) == pytest.approx(brute_kad(x, y), abs=1e-8)


def test_kad_takes_the_bandwidth_of_the_reference():
    x, y = gaussian(40, 5, 1), gaussian(40, 5, 2, 0, 4)
    sigma = fad.median_distance(x)
    assert fad.kernel_distance(x, y) == fad.kernel_distance(x, y, bandwidth=sigma)
    assert fad.kernel_distance(x, y) != pytest.approx(fad.kernel_distance(y, x), rel=0.01)


def test_kad_is_the_same_in_blocks(monkeypatch):
    x, y = gaussian(50, 5, 1), gaussian(33, 5, 2)
    whole = fad.kernel_distance(x, y)
    monkeypatch.setattr(fad, "_BLOCK", 7)
    assert fad.kernel_distance(x, y) == pytest.approx(whole, abs=1e-10)


def test_kad_is_unbiased():
    values = [
        fad.kernel_distance(gaussian(10, 4, 2 * s), gaussian(10, 4, 2 * s + 1), bandwidth=2.8)
        for s in range(400)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(400)
    assert min(values) < 0


def test_kad_of_a_reference_without_width():
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        fad.kernel_distance(np.zeros((5, 2)), gaussian(5, 2))


def brute_manifold(x, y, k):
    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    rx = np.sort(distances(x, x), axis=1)[:, k]
    ry = np.sort(distances(y, y), axis=1)[:, k]
    between = distances(x, y)
    inside = between < rx[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (between < ry).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": (between.min(1) < rx).mean(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifolds_equal_their_definition(k, monkeypatch):
    monkeypatch.setattr(fad, "_BLOCK", 16)
    x, y = gaussian(40, 3, 1), gaussian(50, 3, 2, 0.8, 0.7)
    found = fad.precision_recall_density_coverage(x, y, k)
    assert found == pytest.approx(brute_manifold(x, y, k))


def test_manifolds_tell_collapse_from_noise():
    x = gaussian(100, 4, 1)
    collapsed = fad.precision_recall_density_coverage(x, 0.01 * gaussian(100, 4, 2))
    spread = fad.precision_recall_density_coverage(x, gaussian(100, 4, 2, 0, 5))
    assert collapsed["precision"] > 0.9 > 0.2 > collapsed["recall"]
    assert spread["recall"] > 0.9 > 0.3 > spread["precision"]


# --- intervals and floors -------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [fad.frechet_distance, fad.kernel_distance])
def test_interval_covers_the_mean_score_of_other_samples(metric):
    def draw(seed):
        return gaussian(40, 6, 2 * seed), gaussian(40, 6, 2 * seed + 1, 0.6)

    expected = np.mean([metric(*draw(1000 + s)) for s in range(300)])
    intervals = [fad.bootstrap_distance(*draw(s), metric, repeats=80) for s in range(60)]
    hits = sum(low <= expected <= high for _, low, high in intervals)
    # 95 % nominal: of 60, fewer than 51 has probability < .001
    assert hits >= 51
    # and it is no catch-all: as wide as the spread over samples, not much wider
    width = np.mean([high - low for _, low, high in intervals]) / 3.92
    assert width < 1.6 * np.std([metric(*draw(s)) for s in range(60)])


def test_interval_of_repeated_rows_is_wider_by_group():
    # 20 recordings, 5 nearly equal rows each: rows are no independent clips
    x = np.repeat(gaussian(20, 4, 1), 5, axis=0) + gaussian(100, 4, 2, 0, 0.01)
    y, recording = gaussian(100, 4, 3, 0.5), np.repeat(np.arange(20), 5)
    _, low, high = fad.bootstrap_distance(x, y)
    _, low_g, high_g = fad.bootstrap_distance(x, y, groups_x=recording)
    assert high_g - low_g > 1.5 * (high - low)


def test_interval_needs_four_recordings():
    with pytest.raises(ValueError, match="candidate: an interval needs"):
        fad.bootstrap_distance(gaussian(20, 2), gaussian(20, 2), groups_y=np.arange(20) % 3)


def test_results_are_seeded():
    x, y = gaussian(30, 3, 1), gaussian(30, 3, 2)
    assert fad.bootstrap_distance(x, y, seed=3) == fad.bootstrap_distance(x, y, seed=3)
    assert fad.bootstrap_distance(x, y, seed=3) != fad.bootstrap_distance(x, y, seed=4)
    assert (fad.noise_floor(x, seed=3) == fad.noise_floor(x, seed=3)).all()
    first, again = (fad.fad_infinity(x, y, seed=3, repeats=5) for _ in range(2))
    pd.testing.assert_frame_equal(first.pop("curve"), again.pop("curve"))
    assert first == again


def test_floor_of_many_rows_approaches_zero_like_one_over_n():
    x = gaussian(4000, 6)
    small, large = (fad.noise_floor(x, n, 20).mean() for n in (100, 1000))
    assert small / large == pytest.approx(10, rel=0.25)


def test_floor_keeps_recordings_on_one_side():
    seen = []

    def record(x, y):
        seen.append((set(x[:, 0]), set(y[:, 0])))
        return 0.0

    recording = np.repeat([1.0, 2, 3, 4, 5, 6, 7], [1, 5, 2, 3, 1, 4, 3])
    fad.noise_floor(np.c_[recording, gaussian(19, 1)], metric=record, groups=recording)
    assert len(seen) == 30
    assert all(not (left & right) for left, right in seen)


def test_floor_of_near_duplicates_is_too_low_without_groups():
    x = np.repeat(gaussian(30, 8, 1), 4, axis=0) + gaussian(120, 8, 2, 0, 0.01)
    blind = fad.noise_floor(x, 60).mean()
    honest = fad.noise_floor(x, 60, groups=np.repeat(np.arange(30), 4)).mean()
    assert honest > 1.5 * blind


def test_floor_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="disjoint sets of 6"):
        fad.noise_floor(gaussian(10, 2), 6)
    with pytest.raises(ValueError, match="expected 10 labels"):
        fad.noise_floor(gaussian(10, 2), groups=[1, 2])


def test_fad_infinity_removes_the_bias_of_n():
    found = [
        fad.fad_infinity(gaussian(200, 8, 2 * s), gaussian(200, 8, 2 * s + 1), draws=2, repeats=2)
        for s in range(30)
    ]
    values = np.array([f["value"] for f in found])
    raw = np.mean([f["curve"]["fad"].iloc[-1] for f in found])
    # equal distributions: the truth is 0, the plain FAD is mostly bias
    assert raw == pytest.approx(0.265, rel=0.1)
    assert abs(values.mean()) < 0.2 * raw


def test_fad_infinity_of_a_known_distance():
    found = fad.fad_infinity(gaussian(300, 8, 1), gaussian(300, 8, 2, 0.5))
    assert found["ci_low"] < 8 * 0.25 < found["ci_high"]
    assert found["slope"] > 0
    assert found["r2"] > 0.9
    assert found["trusted"]
    assert found["curve"]["n"].agg(["min", "max"]).tolist() == [75, 300]


def test_fad_infinity_says_when_it_is_not_to_be_trusted():
    found = fad.fad_infinity(gaussian(100, 64, 1), gaussian(100, 64, 2), repeats=5)
    assert found["r2"] > 0.9
    assert found["value"] > 5
    assert not found["trusted"]


def test_fad_infinity_refuses_tiny_sets():
    with pytest.raises(ValueError, match="at least 8 independent"):
        fad.fad_infinity(gaussian(7, 2), gaussian(50, 2))
    with pytest.raises(ValueError, match="at least 8 independent"):
        fad.fad_infinity(gaussian(30, 2), gaussian(30, 2), groups_x=np.arange(30) % 7)
    with pytest.raises(ValueError, match="at least 3 sizes"):
        fad.fad_infinity(gaussian(30, 2), gaussian(30, 2), sizes=2)


# --- published embeddings -------------------------------------------------------------------------


def dcase(network):
    clips = [np.load(file) for file in sorted((DCASE / network).glob("*.npy"))]
    frames = [clip.reshape(-1, clip.shape[-1]) for clip in clips]
    return np.concatenate(frames), np.repeat(np.arange(len(frames)), [len(f) for f in frames])


@needs_dcase
@pytest.mark.parametrize(
    ("network", "floor", "spread"),
    [
        ("panns-wavegram-logmel", 62.9, 4.1),
        ("vggish", 7.0, 0.7),
        ("clap-2023", 310.0, 18.0),
    ],
)
def test_floor_of_the_dcase_development_set(network, floor, spread):
    # frames are rows and a clip's frames stay together: 30 clips against the other 30
    frames, clips = dcase(network)
    values = fad.noise_floor(frames, len(frames) // 2, 30, groups=clips)
    # the published figures are rounded means over splits of their own
    assert values.mean() == pytest.approx(floor, abs=0.5 * spread)
    assert 0.5 * spread < values.std(ddof=1) < 1.6 * spread


@needs_dcase
def test_size_dependence_on_the_dcase_development_set():
    frames, clips = dcase("panns-wavegram-logmel")
    means = [fad.noise_floor(frames, n, 20, groups=clips).mean() for n in (10, 15, 20, 30)]
    assert means == pytest.approx([96.6, 83.4, 74.1, 62.6], rel=0.05)
    kad = fad.noise_floor(frames, 30, 30, groups=clips, metric=fad.kernel_distance)
    assert abs(kad.mean()) < 0.4


@needs_dcase
def test_frames_drawn_singly_flatter_the_floor_on_the_dcase_set():
    frames, clips = dcase("clap-2023")
    honest = fad.noise_floor(frames, 120, 10, groups=clips).mean()
    assert fad.noise_floor(frames, 120, 10).mean() < 0.5 * honest


# --- tables ---------------------------------------------------------------------------------------


def test_score_table_has_the_columns_and_a_floor_for_every_n():
    candidates = {
        "good": gaussian(20, 4, 2),
        "bad": gaussian(30, 4, 3, 3),
        "few": gaussian(3, 4, 4),
    }
    table = fad.score_table(
        gaussian(40, 4, 1), candidates, embedding="toy", floor=gaussian(25, 4, 5), repeats=20
    )
    assert list(table.columns) == fad.SCORE_COLUMNS
    floors = table[table.candidate == fad.FLOOR_NAME]
    assert floors.groupby("metric")["n_candidate"].agg(list).tolist() == [[3, 20, 25]] * 2
    good, bad = (table[(table.metric == "FAD") & (table.candidate == c)] for c in ("good", "bad"))
    assert good["ci_high"].item() < bad["ci_low"].item()
    few = table[table.candidate == "few"]
    assert few["value"].notna().all()
    assert few["ci_low"].isna().all()
    assert few["note"].str.contains("no interval").all()


def test_score_table_extrapolates():
    x, y = gaussian(80, 4, 1), gaussian(60, 4, 2, 1)
    table = fad.score_table(
        x, {"y": y}, embedding="toy", metrics=("FAD-inf",), floor=gaussian(60, 4, 3), seed=5
    )
    expected = fad.fad_infinity(x, y, seed=5)
    row = table[table.candidate == "y"].iloc[0]
    assert [row.value, row.ci_low, row.ci_high] == [
        expected[key] for key in ("value", "ci_low", "ci_high")
    ]
    wide = fad.score_table(
        gaussian(40, 90), {"y": gaussian(40, 90)}, embedding="toy", metrics=("FAD-inf",)
    )
    assert wide["note"].str.contains("fewer clips than dimensions").all()


def test_intervals_stay_within_what_a_metric_can_be():
    table = fad.score_table(
        gaussian(30, 3, 1), {"y": gaussian(30, 3, 2, 1.5)}, embedding="toy", repeats=60,
        metrics=("precision", "recall", "coverage", "density", "FAD"), floor=gaussian(30, 3, 3),
    )  # fmt: skip
    assert (table["ci_low"] >= 0).all()
    shares = table[table["metric"].isin(["precision", "recall", "coverage"])]
    assert (shares["ci_high"] <= 1).all()
    assert (table["ci_low"] < table["ci_high"]).all()


def test_score_table_gives_every_candidate_the_bandwidth_of_the_reference():
    x, y = gaussian(40, 4, 1), gaussian(30, 4, 2, 1)
    table = fad.score_table(x, {"y": y}, embedding="toy", metrics=("KAD",), repeats=10)
    assert table.loc[table.candidate == "y", "value"].item() == fad.kernel_distance(x, y)


def test_score_table_draws_by_recording():
    x, recording = np.repeat(gaussian(20, 4, 1), 4, axis=0), np.repeat(np.arange(20), 4)
    arguments = ({"y": gaussian(80, 4, 2)},)
    blind = fad.score_table(x, *arguments, embedding="toy", metrics=("FAD",))
    honest = fad.score_table(
        x, *arguments, embedding="toy", metrics=("FAD",), groups={"real": recording}
    )
    assert honest["value"][0] > 1.5 * blind["value"][0]
    assert honest["value"][1] == blind["value"][1]


def test_score_table_refuses():
    with pytest.raises(ValueError, match="no candidates"):
        fad.score_table(gaussian(9, 2), {}, embedding="toy")
    with pytest.raises(ValueError, match=r"unknown metrics \['FDA'\]; known: FAD"):
        fad.score_table(gaussian(9, 2), {"y": gaussian(9, 2)}, embedding="toy", metrics=["FDA"])


def test_beside_floor_takes_the_floor_of_the_nearest_n():
    candidates = {"a": gaussian(10, 3, 2), "b": gaussian(20, 3, 3)}
    table = fad.score_table(
        gaussian(40, 3, 1), candidates, embedding="toy", floor=gaussian(30, 3, 4), metrics=["FAD"]
    )
    table.index = [0] * len(table)  # what concatenating tables without care gives
    view = fad.beside_floor(table)
    assert view["floor_n"].tolist() == ["40 / 10", "40 / 20"]
    assert view["n"].tolist() == ["40 / 10", "40 / 20"]
    with pytest.raises(ValueError, match="no floor for FAD"):
        fad.beside_floor(table[table.candidate != fad.FLOOR_NAME])
