"""The figures, each drawn once from a small table: their panels, and that they show its numbers."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from soundscapes_utils import audio, plots


@pytest.fixture(autouse=True)
def style_and_closed_figures():
    plots.use_style()
    yield
    plt.close("all")


def panels(figure):
    """Titles of the panels that are drawn in, colour bars left out."""
    figure.canvas.draw()
    drawn = [panel for panel in figure.axes if panel.axison and panel.get_label() != "<colorbar>"]
    return [panel.get_title() for panel in drawn]


def points(panel):
    """What the lines of a panel go through, as a set of rounded points."""
    return {
        (round(float(x), 6), round(float(y), 6))
        for line in panel.lines
        for x, y in zip(*map(np.ravel, line.get_data()), strict=True)
    }


def spans(panel):
    """Ends of the horizontal lines of a panel."""
    return {
        (round(low[0], 6), round(high[0], 6))
        for lines in panel.collections
        if hasattr(lines, "get_segments")
        for low, high in lines.get_segments()
    }


def tone(seconds, hz=440):
    return 0.3 * np.sin(np.arange(round(16_000 * seconds)) * 2 * np.pi * hz / 16_000)


# --- sounds --------------------------------------------------------------------------------------


def test_mel_pictures_have_low_bands_below_and_one_scale():
    with Image.open(io.BytesIO(plots.mel_picture(tone(1, 50), 16_000))) as image:
        low = np.asarray(image.convert("L"), dtype=float)
    with Image.open(io.BytesIO(plots.mel_picture(0.01 * tone(1, 50), 16_000))) as image:
        quiet = np.asarray(image.convert("L"), dtype=float)
    assert low.shape == (64, 100) and low.mean(axis=1).argmax() == 63
    assert quiet.max() < low.max()
    with Image.open(io.BytesIO(plots.mel_picture(tone(20), 16_000))) as image:
        assert image.width <= 512
    assert plots.mel_picture(tone(0.01), 16_000)  # shorter than a window


def test_clip_grid_names_every_clip(tmp_path):
    paths = [audio.save_audio(tmp_path / f"{i}.wav", tone(1), 16_000) for i in range(3)]
    clips = pd.DataFrame({"path": paths, "label": ["dog", "sea_waves", "dog"]})
    figure = plots.clip_grid(clips, n_columns=2, title="Three")
    assert panels(figure) == ["dog", "sea waves", "dog"]
    assert figure.get_suptitle() == "Three"
    assert figure.axes[0].images[0].get_extent() == [0, 1, 0, 64]


def test_spectrograms_share_time_and_colours():
    figure = plots.aligned_spectrograms({"one": tone(1), "two": tone(1), "three": tone(1)}, 16_000)
    assert panels(figure) == ["one", "two", "three"]
    assert len({image.get_clim() for a in figure.axes[:3] for image in a.images}) == 1
    mels = {"a": np.zeros((50, 32)), "b": [[0.0] * 32] * 50}
    figure = plots.mel_panels(mels, 2, "two", frame_s=0.02, limits=(-2, 2))
    assert panels(figure) == ["a", "b"]
    assert figure.axes[1].images[0].get_extent() == [0, 1, 0, 32]
    assert figure.axes[1].images[0].get_clim() == (-2, 2)


# --- mixes and generated clips -------------------------------------------------------------------


def test_mix_grid_counts_mixes_by_split():
    rows = [("train", "dog", "park"), ("train", "dog", "park"), ("train", "rain", "metro")]
    mixes = pd.DataFrame([*rows, ("test", "rain", "park")], columns=["split", "label", "scene"])
    figure = plots.mix_grid(mixes)
    assert panels(figure) == ["train: 3 mixes", "test: 1 mixes"]
    grids = [panel.collections[0].get_array().ravel().tolist() for panel in figure.axes[:2]]
    assert grids == [[0, 2, 1, 0], [0, 0, 0, 1]]  # dog, rain by metro, park


def test_filters_stand_in_front_of_random_choices():
    table = pd.DataFrame({"filter": ["clap_score 75%", "all"], "n_kept": [30, 40]})
    table = table.assign(accuracy=[0.8, 0.7], control=[0.6, 0.7], control_low=[0.5, 0.7])
    table = table.assign(control_high=[0.65, 0.7], n_validation=12)
    (axes,) = plots.filters_beside_random(table, "Filters").axes
    assert {(0.8, 0), (0.7, 1), (0.6, 0)} <= points(axes)
    assert axes.patches[0].get_width() == pytest.approx(0.15)
    assert axes.get_yticklabels()[0].get_text() == "clap_score 75% (30 clips)"


# --- fine-tuning ---------------------------------------------------------------------------------


def test_training_curves_show_the_log_the_scores_and_their_floor():
    log = pd.DataFrame({"step": [0, 10], "train_loss": [1.0, 0.5], "val_loss": [1.0, 0.7]})
    assert len(panels(plots.training_curves(log, 10))) == 7
    scores = pd.DataFrame({"metric": "FAD", "embedding": "logmel", "step": [10, 0]})
    scores = scores.assign(value=[2.0, 3.0], ci_low=[1.5, 2.5], ci_high=[2.5, 3.5], floor=0.4)
    figure = plots.training_curves(log, 10, scores)
    assert panels(figure)[-1] == "FAD of samples, logmel"
    assert {(0, 1.0), (10, 0.7)} <= points(figure.axes[0])
    assert {(0, 3.0), (10, 2.0), (0, 0.4)} <= points(figure.axes[7])


# --- distances -----------------------------------------------------------------------------------


def score_rows(**columns):
    table = pd.DataFrame({"metric": "FAD", "embedding": ["a", "a", "b", "b"], "reference": "real"})
    table["candidate"] = ["before", "after"] * 2
    table = table.assign(value=[3.0, 2.0, 5.0, 4.0], ci_low=[2.5, 1.5, 4.5, 3.5], ci_high=6.0)
    return table.assign(floor=1.0, floor_low=0.5, floor_high=1.25, **columns)


def test_scores_stand_in_front_of_their_floor():
    figure = plots.scores_beside_floor(score_rows())
    assert panels(figure) == ["FAD, a", "FAD, b"]
    first, second = figure.axes
    assert points(first) == {(3.0, 0), (2.0, 1), (1.0, 0), (1.0, 1)}
    assert points(second) >= {(5.0, 0), (4.0, 1)}
    assert spans(first) == {(2.5, 6.0), (1.5, 6.0), (0.5, 1.25)}
    without = plots.scores_beside_floor(score_rows().assign(floor=np.nan, floor_low=np.nan))
    assert points(without.axes[0]) >= {(3.0, 0), (2.0, 1)}


def test_scores_class_by_class_have_a_line_for_each_class():
    rows = pd.concat([score_rows().assign(reference=label) for label in ("dog", "sea_waves")])
    figure = plots.scores_beside_floor(rows, by="reference", title="Classes")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["dog", "sea waves"] and figure.get_suptitle() == "Classes"
    heights = {y for x, y in points(figure.axes[0]) if x == 3.0}
    assert heights == {-0.1, 0.9}


# --- classifiers ---------------------------------------------------------------------------------


def test_accuracy_curve_shows_means_and_trained_classifiers():
    summary = pd.DataFrame({"arm": ["real", "both", "mixed"], "ratio": [0.0, 1.0, 1.0]})
    summary = summary.assign(model="sbcnn", accuracy=[0.5, 0.7, 0.1], half_width=[0.1, np.nan, 0.1])
    results = pd.DataFrame({"arm": "both", "ratio": 1.0, "model": "sbcnn", "accuracy": [0.6, 0.8]})
    (axes,) = plots.accuracy_curve(summary, results, "both", "synthetic clips").axes
    assert points(axes) >= {(0, 0.5), (1, 0.7)} and (1, 0.1) not in points(axes)
    assert axes.collections[0].get_offsets().tolist() == [[1, 0.6], [1, 0.8]]


def test_confusions_are_shares_of_the_true_class():
    counts = pd.DataFrame([[3, 1], [0, 2]], index=["dog", "rain"], columns=["dog", "rain"])
    figure = plots.confusion_matrices({"one": counts, "two": counts}, "Two")
    assert panels(figure) == ["one", "two"]
    assert figure.axes[0].collections[0].get_array().ravel().tolist() == [0.75, 0.25, 0, 1]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.75", "0.25", "", "1.00"]
