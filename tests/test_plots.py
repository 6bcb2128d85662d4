"""The figures, each drawn once from a small table: their panels, and that they show its numbers."""

import io
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from soundscapes_utils import plots


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


def test_spectrograms_share_time_and_colours():
    figure = plots.aligned_spectrograms({"one": tone(1), "two": tone(1), "three": tone(1)}, 16_000)
    assert panels(figure) == ["one", "two", "three"]
    assert len({image.get_clim() for a in figure.axes[:3] for image in a.images}) == 1
    mels = {"a": np.zeros((50, 32)), "b": [[0.0] * 32] * 50}
    figure = plots.mel_panels(mels, 2, "two", frame_s=0.02, limits=(-2, 2))
    assert panels(figure) == ["a", "b"]
    assert figure.axes[1].images[0].get_extent() == [0, 1, 0, 32]
    assert figure.axes[1].images[0].get_clim() == (-2, 2)


# --- drawings ------------------------------------------------------------------------------------

DRAWINGS = {
    "map": lambda: plots.series_map(),
    "map_with_mark": lambda: plots.series_map("05"),
    "model": plots.model_drawing,
    "folds": plots.folds_drawing,
    "three_folds": lambda: plots.folds_drawing(3, 2),
    "ten_folds": lambda: plots.folds_drawing(10, 4),
}


def numbers(element, *names):
    return [float(element.get(name)) for name in names]


def extents(drawing):
    """Boxes, and texts at 0.6 em a character, as name, left, top, right, bottom."""
    boxes, texts = [], []
    for box in drawing.iterfind(".//{*}rect"):
        x, y, w, h = numbers(box, "x", "y", "width", "height")
        boxes.append((box.get("fill"), x, y, x + w, y + h))
    for text in drawing.iterfind(".//{*}text"):
        x, y, size = numbers(text, "x", "y", "font-size")
        half = 0.3 * size * len(text.text)
        assert size >= 11  # px on a page of 360 px
        texts.append((text.text, x - half, y - 0.75 * size, x + half, y + 0.2 * size))
    return boxes, texts


def apart(a, b):
    return a[3] <= b[1] or b[3] <= a[1] or a[4] <= b[2] or b[4] <= a[2]


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_valid_told_in_words_and_the_same_each_time(name):
    made = DRAWINGS[name]()
    drawing = ElementTree.fromstring(made)
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg" and drawing.get("role") == "img"
    assert len(drawing.findtext("{*}title")) > 5
    assert len(repr(made)) > 80 and "  " not in repr(made)
    assert drawing.findtext("{*}desc") == drawing.get("aria-label") == repr(made)
    assert made._repr_svg_() == (str(made), {"alt": repr(made)}) and made == DRAWINGS[name]()


@pytest.mark.parametrize("name", DRAWINGS)
def test_texts_of_drawings_stand_in_boxes_and_do_not_overlap(name):
    drawing = ElementTree.fromstring(DRAWINGS[name]())
    _, _, width, height = map(float, drawing.get("viewBox").split())
    assert width == 360
    boxes, texts = extents(drawing)
    assert len(boxes) >= 6 and len(texts) >= 7
    for box in boxes:
        assert min(box[1:]) >= 0 and box[3] <= width and box[4] <= height
    for text in texts:
        inside = [
            b
            for b in boxes
            if b[1] <= text[1] and b[2] <= text[2] and text[3] <= b[3] and text[4] <= b[4]
        ]
        assert len(inside) == 1, text
    for listed in (boxes, texts):
        assert all(apart(a, b) for i, a in enumerate(listed) for b in listed[:i])


def test_map_marks_the_notebook_that_the_reader_is_in():
    for here in ["00", "01", "02", "03", "04", "05"]:
        made = plots.series_map(here)
        boxes, texts = extents(ElementTree.fromstring(made))
        (mark,) = [text for text in texts if text[0] == "you are here"]
        (box,) = [box for box in boxes if not apart(box, mark)]
        named = [text[0] for text in texts if not apart(box, text)]
        assert named[0].startswith(f"{here} ") and len(named) == 3
        assert [b[0] for b in boxes].count(box[0]) == 1  # a colour of its own
        assert repr(made).endswith(f"You are here: notebook {here}.")
    assert "you are here" not in plots.series_map().lower()
    with pytest.raises(ValueError, match="here='06' is no notebook"):
        plots.series_map("06")


def test_model_drawing_names_every_part_and_what_it_is_in_the_small_model():
    _, texts = extents(ElementTree.fromstring(plots.model_drawing()))
    shown = " ".join(text[0] for text in texts)
    parts = "text tower, sound tower, condition, noise, U-Net, latent, VAE decoder, VAE encoder, log-mel"
    for said in [*parts.split(", "), "vocoder", "8 × 8 patches", "shaped noise", "clean latent"]:
        assert said in shown, said


@pytest.mark.parametrize(("n", "test", "validation"), [(10, 10, 1), (10, 4, 5), (5, 5, 1), (3, 2, 3)])
def test_the_fold_after_the_test_fold_validates_and_the_others_train(n, test, validation):
    made = plots.folds_drawing(n, test)
    training = sorted({*range(1, n + 1)} - {test, validation})
    listed = ", ".join(map(str, training))
    assert (
        f"fold {test} is for the test, fold {validation} for validation, {listed} for training"
        in repr(made)
    )
    drawing = ElementTree.fromstring(made)
    boxes, texts = extents(drawing)
    colours = {}
    for text in texts:
        if text[0].isdigit():
            (box,) = [box for box in boxes if not apart(box, text)]
            colours.setdefault(box[0], []).append(int(text[0]))
    assert sorted(map(sorted, colours.values())) == sorted([[test], [validation], training])
    # arrows of synthetic clips end below the training folds alone
    arrows = [
        float(p.get("d")[1:].split()[0]) for p in drawing.iterfind(".//{*}path") if "m-4 5" in p.get("d")
    ]
    assert arrows == [round(1 + 358 / n * (fold - 0.5), 1) for fold in training]


def test_folds_that_cannot_be_drawn_are_refused():
    for n, test in [(2, 1), (11, 1), (5, 6), (5, 0)]:
        with pytest.raises(ValueError, match="3 to 10 folds"):
            plots.folds_drawing(n, test)
