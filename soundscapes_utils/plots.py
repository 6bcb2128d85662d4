"""What several notebooks and the report draw: nothing is computed here.

Log-mel pictures, and three drawings that explain the series (:func:`series_map`,
:func:`model_drawing`, :func:`folds_drawing`); other figures stand in the notebook that shows them.
"""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from . import audio, store

MEL_LIMITS = (-8, 2)  # darkest and brightest log-mel: one scale, so that pictures can be compared


def use_style():
    """Set the look that all figures and tables share: colour-blind palette, white grid."""
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook")
    # notes and captions are longer than the 50 characters after which pandas cuts a cell
    pd.set_option("display.max_colwidth", 120)


# --- what figures are made of --------------------------------------------------------------------


def _narrowed(mel, width):
    """Means of neighbouring frames: a small picture cannot show more columns than `width`."""
    n = max(1, len(mel) // width)
    return mel[: len(mel) // n * n].reshape(-1, n, mel.shape[1]).mean(axis=1)


_KHZ = (0.5, 1, 2, 4)
# the band whose peak is there: 64 bands from 0 to 8 kHz are 64 of 65 steps of Slaney's scale, which
# is linear up to 1 kHz. By its formula, as librosa brings tqdm along, which warns in notebooks
_MEL = [15 * khz if khz < 1 else 15 + 27 * np.log(khz) / np.log(6.4) for khz in (*_KHZ, 8)]
_KHZ_BANDS = np.array(_MEL[:-1]) / _MEL[-1] * 65 - 0.5


def _mel_grid(named, columns, size, title, frame_s=0.01, limits=MEL_LIMITS):
    """Draw pairs of name and log-mel [frames, bands] on one scale."""
    rows = -(-len(named) // columns)
    size = (size[0] * columns, size[1] * rows + 0.4)
    options = {"squeeze": False, "layout": "constrained", "sharex": True, "sharey": True}
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    # 32 shades look like 256, and halve the picture's bytes in a notebook
    look = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    look |= {"cmap": plt.get_cmap("magma", 32), "vmin": limits[0], "vmax": limits[1]}
    for panel in axes.flat[len(named) :]:
        panel.set_axis_off()
    for panel, (name, mel) in zip(axes.flat, named, strict=False):
        mel = np.asarray(mel)
        extent = (0, len(mel) * frame_s, 0, mel.shape[1])
        panel.imshow(_narrowed(mel, 256).T, extent=extent, **look)
        panel.set_title(name, fontsize="small")
        panel.set_yticks(_KHZ_BANDS, _KHZ, fontsize="x-small")
        panel.grid(False)
    figure.suptitle(title, fontsize="medium")
    figure.supxlabel("time, s", fontsize="small")
    figure.supylabel("frequency, kHz", fontsize="small")
    return figure


# --- sounds --------------------------------------------------------------------------------------


def mel_picture(y, sample_rate):
    """Log-mel picture of a sound as the bytes of a PNG: 64 rows, low bands below, on one scale."""
    mel = audio.log_mel(audio.fix_length(y, max(len(y), 1024), "pad"), sample_rate)
    buffer, (low, high) = io.BytesIO(), MEL_LIMITS
    look = {"cmap": plt.get_cmap("magma", 32), "vmin": low, "vmax": high, "metadata": {"Software": None}}
    plt.imsave(buffer, _narrowed(mel, 256).T[::-1], format="png", **look)
    return buffer.getvalue()


def aligned_spectrograms(signals, sample_rate, title=""):
    """Log-mel spectrograms of several signals (a dict) on one time axis and one scale of levels."""
    named = [(name, audio.log_mel(y, sample_rate)) for name, y in signals.items()]
    figure = _mel_grid(named, 2, (3.2, 1.2), title)
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label="log mel", shrink=0.8)
    return figure


def mel_panels(mels, n_columns=4, title="", frame_s=0.01, limits=MEL_LIMITS):
    """Log-mel spectrograms at hand as arrays [frames, bands] (a dict), side by side on one scale.

    `frame_s` is seconds from one frame to the next, `limits` the darkest and the brightest value.
    """
    return _mel_grid(list(mels.items()), n_columns, (2.4, 1.5), title, frame_s, limits)


# --- drawings ------------------------------------------------------------------------------------


class Drawing(str):
    """An SVG that a notebook shows as a picture; its ``repr``, the alt text, says it in words."""

    def __repr__(self):
        return self.partition("<desc>")[2].partition("</desc>")[0]

    def _repr_svg_(self):
        return str(self), {"alt": repr(self)}


def _drawing(name, **content):
    return Drawing(store.filled("drawings.svg.j2", drawing=name, **content).strip())


def series_map(here=""):
    """Draw what becomes of the sounds, notebook by notebook; `here`, such as "03", is marked.

    >>> repr(series_map("03"))[-26:]
    'You are here: notebook 03.'
    """
    if here not in ("", "00", "01", "02", "03", "04", "05"):
        raise ValueError(f"here={here!r} is no notebook of the series, '00' to '05'")
    return _drawing("series", here=here)


def model_drawing():
    """Draw AudioLDM, from noise and a text to a sound, and what its parts are in the built-in model.

    >>> model_drawing()[:4]
    '<svg'
    """
    return _drawing("model")


def folds_drawing(n_folds=5, test=5):
    """Draw which fold tests, which validates (the next one), and which train, synthetic clips with them.

    >>> repr(folds_drawing(n_folds=5, test=5))[:79]
    'Of 5 folds, fold 5 is for the test, fold 1 for validation, 2, 3, 4 for training'
    """
    if not 3 <= n_folds <= 10 or test not in range(1, n_folds + 1):
        raise ValueError(f"n_folds={n_folds}, test={test}: can draw 3 to 10 folds, one of which tests")
    validation = test % n_folds + 1
    training = [fold for fold in range(1, n_folds + 1) if fold not in (test, validation)]
    return _drawing("folds", n_folds=n_folds, test=test, validation=validation, training=training)
