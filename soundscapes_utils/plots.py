"""Every figure of the notebooks and of the report: seaborn on matplotlib, one style."""


def use_style():
    """Set the look that all figures share (colour-blind palette, white grid).

    Returns
    -------
    None

    Examples
    --------
    >>> use_style()
    """
    import seaborn as sns

    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook")


def clip_grid(clips, n_columns=5, title=""):
    """Log-mel spectrograms of clips, side by side on one scale.

    Parameters
    ----------
    clips : pandas.DataFrame
        Clip table; ``path`` and ``label`` are used, one panel a row.
    n_columns : int, optional
        Panels in a row.
    title : str, optional
        Above all panels.

    Returns
    -------
    matplotlib.figure.Figure
        Time in seconds to the right, 64 mel bands from 0 to 8 kHz upwards.
    """
    import matplotlib.pyplot as plt

    from . import audio, captions

    n_rows = -(-len(clips) // n_columns)
    figure, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=(1.9 * n_columns, 1.5 * n_rows + 0.6),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, clip in zip(axes.flat, clips.itertuples(), strict=False):
        y, sample_rate = audio.load_audio(clip.path, 16_000)
        # 40 ms a column: a panel this small cannot show more
        mel = audio.log_mel(y, sample_rate)
        mel = mel[: len(mel) // 4 * 4].reshape(-1, 4, mel.shape[1]).mean(1)
        extent = (0, len(y) / sample_rate, 0, 64)
        panel.imshow(
            mel.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-8, vmax=2
        )
        panel.set_axis_on()
        panel.set(title=captions.tidy(clip.label), yticks=[])
        panel.grid(False)
    figure.supxlabel("time, s")
    figure.supylabel("mel band, 0 to 8 kHz")
    figure.suptitle(title)
    return figure


def aligned_spectrograms(signals, sample_rate, title=""):
    """Log-mel spectrograms of several signals below each other on one time axis.

    Parameters
    ----------
    signals : dict of str to np.ndarray, shape (samples,)
        Name and signal of each row, all at `sample_rate`.
    sample_rate : int
        Hz.
    title : str, optional
        Above all rows.

    Returns
    -------
    matplotlib.figure.Figure
        One colour scale for all rows, so that levels can be compared.
    """
    import matplotlib.pyplot as plt

    from . import audio

    rows, columns = -(-len(signals) // 2), 2
    figure, axes = plt.subplots(
        rows, columns, figsize=(10, 1.7 * rows + 0.6), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, (name, y) in zip(axes.flat, signals.items(), strict=False):
        mel = audio.log_mel(audio.resample(y, sample_rate, audio.LOG_MEL_RATE))
        extent = (0, len(y) / sample_rate, 0, 64)
        image = panel.imshow(
            mel.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-8, vmax=2
        )
        panel.set(title=name, yticks=[])
        panel.grid(False)
    for panel in axes.flat[len(signals) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=axes, label="log mel", shrink=0.8)
    figure.supxlabel("time, s")
    figure.supylabel("mel band, 0 to 8 kHz")
    figure.suptitle(title)
    return figure


def mix_grid(mixes):
    """Count the mixes of every label over every scene, split by split.

    Parameters
    ----------
    mixes : pandas.DataFrame
        Table of mixes.

    Returns
    -------
    matplotlib.figure.Figure
        One heat map a split, on one colour scale.
    """
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns

    from . import captions

    splits = list(mixes.split.unique())
    grids = [
        pd.crosstab(part.foreground_label.map(captions.tidy), part.scene.map(captions.tidy))
        for part in (mixes[mixes.split == split] for split in splits)
    ]
    highest = max(grid.to_numpy().max() for grid in grids)
    figure, axes = plt.subplots(
        1, len(splits), figsize=(3.6 * len(splits) + 1, 4.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, split, grid in zip(axes.flat, splits, grids, strict=True):
        sns.heatmap(
            grid, ax=panel, vmin=0, vmax=highest, cmap="viridis", cbar=panel is axes.flat[-1]
        )
        panel.set(title=f"{split}: {int(grid.to_numpy().sum())} mixes", xlabel="", ylabel="")
    figure.suptitle("Mixes of each event over each scene")
    return figure


def mix_levels(mixes):
    """Show what was drawn: signal-to-noise ratios, and how often a mix had to be scaled down.

    Parameters
    ----------
    mixes : pandas.DataFrame
        Table of rendered mixes.

    Returns
    -------
    matplotlib.figure.Figure
        Histogram of ``snr_db`` (left) and of the scaling in dB where one was needed (right).
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    sns.histplot(mixes, x="snr_db", hue="split", multiple="stack", bins=20, ax=left)
    left.set(xlabel="foreground over background, dB", ylabel="mixes", title="Signal-to-noise ratio")
    scaled = mixes.peak_scale[mixes.peak_scale < 1]
    sns.histplot(x=20 * np.log10(scaled), bins=20, ax=right)
    right.set(
        xlabel="scaled by, dB",
        ylabel="mixes",
        title=f"{len(scaled)} of {len(mixes)} mixes scaled to fit",
    )
    return figure
