"""Every figure of the notebooks and of the report: seaborn on matplotlib, one style."""


def use_style():
    """Set the look that all figures share (colour-blind palette, white grid), and that of tables.

    Returns
    -------
    None

    Examples
    --------
    >>> use_style()
    """
    import pandas as pd
    import seaborn as sns

    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook")
    # notes and captions are longer than the 50 characters after which pandas cuts a cell
    pd.set_option("display.max_colwidth", 120)


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
        rows, columns, figsize=(6.5, 1.2 * max(rows, 2) + 0.6), sharex=True, squeeze=False,
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
    from matplotlib.ticker import MaxNLocator

    from . import captions

    splits = list(mixes.split.unique())
    named = mixes[["split", "label", "scene"]].map(captions.tidy)
    whole = pd.crosstab(named.label, named.scene)
    grids = [
        pd.crosstab(part.label, part.scene).reindex_like(whole).fillna(0)
        for part in (named[named.split == split] for split in splits)
    ]
    highest = max(grid.to_numpy().max() for grid in grids)
    figure, axes = plt.subplots(
        1, len(splits), figsize=(3.6 * len(splits) + 1, 4.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, split, grid in zip(axes.flat, splits, grids, strict=True):
        sns.heatmap(
            grid,
            ax=panel,
            vmin=0,
            vmax=highest,
            cmap="viridis",
            cbar=panel is axes.flat[-1],
            cbar_kws={"ticks": MaxNLocator(integer=True)},
        )
        panel.set(title=f"{split}: {int(grid.to_numpy().sum())} mixes", xlabel="", ylabel="")
    figure.suptitle("Mixes of each event over each scene")
    return figure


def mix_levels(mixes):
    """Show the levels of a set: ratios, loudness, and how often a mix had to be scaled down.

    Parameters
    ----------
    mixes : pandas.DataFrame
        Table of rendered mixes; with a column ``lufs`` (loudness, may be empty in some rows) the
        middle panel is drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Histograms of ``snr_db``, of ``lufs``, and of the scaling in dB where one was needed.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns

    levels = {"snr_db": ("Signal-to-noise ratio", "foreground over background, dB")}
    if "lufs" in mixes:
        levels["lufs"] = (f"Loudness of {mixes.lufs.notna().sum()} mixes", "LUFS")
    width = 5 * (len(levels) + 1)
    figure, axes = plt.subplots(1, len(levels) + 1, figsize=(width, 3.2), layout="constrained")
    for panel, (column, (title, unit)) in zip(axes, levels.items(), strict=False):
        sns.histplot(mixes, x=column, hue="split", multiple="stack", bins=20, ax=panel)
        panel.set(xlabel=unit, ylabel="mixes", title=title)
    sns.move_legend(axes[0], "upper left")
    for panel in axes[1 : len(levels)]:
        panel.get_legend().remove()
    scaled = mixes.peak_scale[mixes.peak_scale < 1]
    sns.histplot(x=20 * np.log10(scaled), bins=20, ax=axes[-1])
    axes[-1].set(
        xlabel="scaled by, dB",
        ylabel="mixes",
        title=f"{len(scaled)} of {len(mixes)} mixes scaled to fit",
    )
    return figure


def gaussian_pair(x, y, labels=("reference", "candidate")):
    """Draw two clouds of points and the Gaussians fitted to them.

    Parameters
    ----------
    x, y : np.ndarray, shape (n, 2)
        Points.
    labels : (str, str)
        Their names.

    Returns
    -------
    matplotlib.figure.Figure
        Points with ellipses at one and two standard deviations.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns

    figure, panel = plt.subplots(figsize=(5.5, 4.2), layout="constrained")
    circle = np.linspace(0, 2 * np.pi, 200)
    for points, label, colour in zip((x, y), labels, sns.color_palette(), strict=False):
        sns.scatterplot(x=points[:, 0], y=points[:, 1], color=colour, s=14, alpha=0.5, label=label)
        spread = np.linalg.cholesky(np.cov(points.T)) @ [np.cos(circle), np.sin(circle)]
        for radius in (1, 2):
            panel.plot(*(points.mean(axis=0)[:, None] + radius * spread), color=colour)
    panel.set(xlabel="dimension 1", ylabel="dimension 2", aspect="equal")
    panel.set_title("Two clouds and the Gaussians fitted to them")
    return figure


def floor_by_size(floors):
    """Draw what "real against real" scores, over the number of clips.

    Parameters
    ----------
    floors : pandas.DataFrame
        One row a split: ``embedding``, ``metric``, ``n`` clips in each half, ``value``.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a metric and embedding: mean, and a band of one standard deviation.
    """
    import seaborn as sns

    grid = sns.relplot(
        floors,
        x="n",
        y="value",
        col="embedding",
        row="metric",
        kind="line",
        errorbar="sd",
        marker="o",
        height=2.6,
        aspect=1.3,
        facet_kws={"sharey": False, "margin_titles": True},
    )
    grid.set_titles(row_template="{row_name}", col_template="{col_name}")
    grid.set_axis_labels("clips in each half", "distance")
    grid.refline(y=0, linestyle=":")
    grid.figure.suptitle("Real against real: what a perfect model scores", y=1.03)
    return grid.figure


def scores_beside_floor(scores, floor_name, title=""):
    """Draw scores with their intervals, and the floor of real clips as a band.

    Parameters
    ----------
    scores : pandas.DataFrame
        Table of scores of one reference.
    floor_name : str
        The ``candidate`` of floor rows.
    title : str, optional
        Above all panels.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a metric (row) and embedding (column), one line a candidate.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    metrics, networks = (list(scores[key].unique()) for key in ("metric", "embedding"))
    is_floor = scores.candidate == floor_name
    names = list(scores.candidate[~is_floor].unique())
    palette = dict(zip(names, sns.color_palette(n_colors=len(names)), strict=True))
    figure, axes = plt.subplots(
        len(metrics), len(networks), squeeze=False, layout="constrained",
        figsize=(4.2 * len(networks) + 1, (0.4 * len(names) + 1.1) * len(metrics)),
    )  # fmt: skip
    for panel, (metric, network) in zip(
        axes.flat, [(m, e) for m in metrics for e in networks], strict=True
    ):
        here = (scores.metric == metric) & (scores.embedding == network)
        for floor in scores[here & is_floor].itertuples():
            panel.axvspan(floor.ci_low, floor.ci_high, color="0.85", zorder=0)
            panel.axvline(floor.value, color="0.5", zorder=1)
        for row in scores[here & ~is_floor].itertuples():
            panel.plot([row.ci_low, row.ci_high], [row.candidate] * 2, color=palette[row.candidate])
            panel.plot(row.value, row.candidate, "o", color=palette[row.candidate])
        panel.margins(y=0.3)
        panel.invert_yaxis()
        panel.set(title=f"{metric}, {network}")
        panel.tick_params(axis="y", labelleft=network == networks[0])
    figure.suptitle(title or "Distance to held-out recordings; grey: real against real")
    return figure


def fad_against_size(curves):
    """Draw FAD over 1/n, and the line that leads to infinitely many clips.

    Parameters
    ----------
    curves : pandas.DataFrame
        ``embedding``, ``candidate``, ``n`` and ``fad``, from :func:`fad.fad_infinity`.

    Returns
    -------
    matplotlib.figure.Figure
        One panel an embedding; where a line meets the left edge is its FAD-inf.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns

    networks, names = (list(curves[key].unique()) for key in ("embedding", "candidate"))
    palette = dict(zip(names, sns.color_palette(n_colors=len(names)), strict=True))
    figure, axes = plt.subplots(
        1, len(networks), figsize=(4.2 * len(networks), 3.4), squeeze=False, layout="constrained"
    )
    for panel, network in zip(axes.flat, networks, strict=True):
        for name, part in curves[curves.embedding == network].groupby("candidate", sort=False):
            inverse, ends = 1 / part.n, np.array([0, 1 / part.n.min()])
            panel.plot(inverse, part.fad, "o", color=palette[name], label=name)
            line = np.polyval(np.polyfit(inverse, part.fad, 1), ends)
            panel.plot(ends, line, color=palette[name])
        panel.axhline(0, color="0.5", linestyle=":")
        panel.set(title=network, xlabel="1 / clips", ylabel="FAD", xlim=(0, None))
    axes.flat[0].legend()
    figure.suptitle("FAD falls with the number of clips: the left edge is FAD-inf")
    return figure


def sensitivity_map(moved):
    """Draw how far known changes of the sounds move a distance.

    Parameters
    ----------
    moved : pandas.DataFrame
        From :func:`fad.sensitivity`, of one or more embeddings.

    Returns
    -------
    matplotlib.figure.Figure
        One row a change, one column a metric and embedding: how many standard deviations of the
        floor the score lies above the floor. Pale: not seen.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.colors import SymLogNorm

    columns = moved.assign(ruler=moved.metric + "\n" + moved.embedding)
    cells = columns.pivot_table(index="change", columns="ruler", values="spreads", sort=False)
    figure, panel = plt.subplots(
        figsize=(1.5 * cells.shape[1] + 2.5, 0.45 * len(cells) + 1.4), layout="constrained"
    )
    most = max(10.0, cells.max(axis=None))
    sns.heatmap(
        cells, annot=True, fmt=".0f", cmap="rocket_r", norm=SymLogNorm(2.0, vmin=0.0, vmax=most),
        cbar_kws={"label": "floor spreads above the floor"}, ax=panel,
    )  # fmt: skip
    panel.set(xlabel="", ylabel="", title="What each ruler notices")
    panel.tick_params(axis="y", rotation=0)
    return figure


def class_distances(scores, floor_name):
    """Draw one distance a class, with its interval and the floor of that class.

    Parameters
    ----------
    scores : pandas.DataFrame
        Table of scores of one metric; ``reference`` is the class.
    floor_name : str
        The ``candidate`` of floor rows.

    Returns
    -------
    matplotlib.figure.Figure
        One panel an embedding: candidate (coloured) and real (grey) for every class.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    from . import captions

    networks = list(scores.embedding.unique())
    names = [name for name in scores.candidate.unique() if name != floor_name]
    colours = {floor_name: "0.6", **dict(zip(names, sns.color_palette(), strict=False))}
    figure, axes = plt.subplots(
        1, len(networks), figsize=(3.8 * len(networks) + 1.6, 4.4), squeeze=False,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for panel, network in zip(axes.flat, networks, strict=True):
        for i, (name, colour) in enumerate(colours.items()):
            rows = scores[(scores.embedding == network) & (scores.candidate == name)]
            place = rows.reference.map({c: k for k, c in enumerate(scores.reference.unique())})
            panel.hlines(place + 0.2 * i - 0.1, rows.ci_low, rows.ci_high, color=colour)
            panel.plot(rows.value, place + 0.2 * i - 0.1, "o", color=colour, label=name)
        panel.set(title=network, xlabel=rows.metric.iloc[0])
    classes = [captions.tidy(label) for label in scores.reference.unique()]
    axes.flat[0].set_yticks(range(len(classes)), classes)
    axes.flat[0].invert_yaxis()
    axes.flat[-1].legend(loc="best")
    figure.suptitle("Distance to the held-out recordings of every class")
    return figure


def mel_panels(mels, n_columns=4, title="", frame_s=0.01, limits=(-8, 2)):
    """Log-mel spectrograms that are at hand as arrays, side by side on one scale.

    Parameters
    ----------
    mels : dict of str to array_like, shape (frames, 64)
        Name and log-mel of each panel.
    n_columns : int, optional
        Panels in a row.
    title : str, optional
        Above all panels.
    frame_s : float, optional
        Seconds from one frame to the next.
    limits : tuple of float, optional
        Values of the darkest and of the brightest colour.

    Returns
    -------
    matplotlib.figure.Figure
        Time in seconds to the right, 64 mel bands from 0 to 8 kHz upwards.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    n_rows = -(-len(mels) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(2.4 * n_columns, 1.5 * n_rows + 0.6), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for panel in axes.flat[len(mels) :]:
        panel.set_axis_off()
    # 32 shades look like 256, and halve the picture's bytes in a notebook
    shades = plt.get_cmap("magma", 32)
    for panel, (name, mel) in zip(axes.flat, mels.items(), strict=False):
        extent = (0, len(mel) * frame_s, 0, len(mel[0]))
        # two frames a column: a panel this small cannot show more
        mel = np.asarray(mel)[: len(mel) // 2 * 2].reshape(len(mel) // 2, 2, -1).mean(1)
        panel.imshow(
            mel.T, origin="lower", aspect="auto", extent=extent, cmap=shades, vmin=limits[0],
            vmax=limits[1], interpolation="nearest",
        )  # fmt: skip
        panel.set_title(name, fontsize="small")
        panel.set_yticks([])
        panel.grid(False)
    figure.supxlabel("time, s", fontsize="small")
    figure.supylabel("mel band, 0 to 8 kHz", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def judged_as(labels, judged, title=""):
    """Which class a judge hears in clips of each class, as shares of the row.

    Parameters
    ----------
    labels, judged : sequence of str, shape (clips,)
        What each clip should be, and what the judge says.
    title : str, optional
        Above the matrix.

    Returns
    -------
    matplotlib.figure.Figure
        One row a class; a perfect set is a diagonal of ones.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    import seaborn as sns

    from . import captions

    asked = pd.Series([captions.tidy(label) for label in labels], name="asked for")
    heard = pd.Series([captions.tidy(label) for label in judged], name="judged as")
    names = sorted(set(asked) | set(heard))
    shares = pd.crosstab(asked, heard, normalize="index")
    shares = shares.reindex(index=sorted(set(asked)), columns=names, fill_value=0.0)
    size = 0.55 * len(names) + 2.2
    figure, axes = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    # empty cells stay empty: the eye should find the confusions
    numbers = np.where(shares > 0, shares.map("{:.2f}".format), "")
    few = numbers if len(names) <= 12 else False
    sns.heatmap(shares, vmin=0, vmax=1, cmap="viridis", annot=few, fmt="", ax=axes)
    axes.set(title=title)
    return figure


def model_parts(parts, steps=None):
    """Draw a text-to-audio model as the chain that a prompt passes through.

    Parameters
    ----------
    parts : pandas.DataFrame
        From `soundscapes_utils.listening.model_parts`.
    steps : int, optional
        Passes through the network that removes noise, written at its loop.

    Returns
    -------
    matplotlib.figure.Figure
        One box a network, its area grown with the logarithm of its size; arrows carry the names of
        what passes.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns

    figure, axes = plt.subplots(figsize=(1.9 * len(parts) + 2.6, 2.9), layout="constrained")
    colours = sns.color_palette("colorblind", len(parts))
    heights = 0.45 + 0.5 * np.log1p(parts.millions) / np.log1p(max(parts.millions, default=1))
    for x, (part, height, colour) in enumerate(
        zip(parts.itertuples(), heights, colours, strict=True), 1
    ):
        box = {"xy": (x - 0.36, -height / 2), "width": 0.72, "height": height}
        axes.add_patch(plt.Rectangle(**box, facecolor=colour, alpha=0.3, edgecolor=colour))
        axes.text(x, 0.06, part.part, ha="center", va="center", weight="bold", fontsize="small")
        size = f"{part.millions:.3g} M" if part.millions else "nothing trained"
        axes.text(x, -0.09, size, ha="center", va="center", fontsize="small")
        says = part.does.replace(", ", ",\n").replace(" to ", "\nto ", 1)
        axes.text(x, -0.56, says, ha="center", va="top", fontsize="small")
        if "noise" in part.does and steps:
            arc = {"arrowstyle": "->", "connectionstyle": "arc3,rad=-1.4", "color": "0.3"}
            ends = {"xytext": (x - 0.15, height / 2), "xy": (x + 0.15, height / 2)}
            axes.annotate("", **ends, arrowprops=arc)
            axes.text(x, height / 2 + 0.33, f"{steps} times", ha="center", fontsize="small")
    for x in range(len(parts) + 1):
        arrow = {"arrowstyle": "->", "color": "0.3"}
        axes.annotate("", xy=(x + 0.63, 0), xytext=(x + 0.37, 0), arrowprops=arrow)
    axes.text(0.33, 0, "prompt", ha="right", va="center")
    axes.text(len(parts) + 0.67, 0, "sound", ha="left", va="center")
    axes.set(xlim=(-0.15, len(parts) + 1.1), ylim=(-0.95, 1.0))
    axes.set_axis_off()
    return figure


def sets_compared(table, by, title=""):
    """Compare sets of clips made in several ways: does the judge agree, and how alike are they?

    Parameters
    ----------
    table : pandas.DataFrame
        One row a set: the column `by`, and those of `soundscapes_utils.selection.summarise`.
    by : str
        What tells the sets apart.
    title : str, optional
        Above all panels.

    Returns
    -------
    matplotlib.figure.Figure
        Agreement of the judge with its 95 % interval, CLAP score, and, where there are several
        clips of a class, the spread within it.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns

    panels = {
        "judge_agrees": "judge agrees (95 % interval)",
        "clap_score": "CLAP score, cosine",
        "spread": "spread within a class",
    }
    # one clip a class has no spread
    panels = {column: name for column, name in panels.items() if table[column].notna().any()}
    size = (3.4 * len(panels), 0.36 * len(table) + 1.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    place, colour = np.arange(len(table))[::-1], sns.color_palette("colorblind")[0]
    for panel, (column, name) in zip(axes, panels.items(), strict=True):
        panel.plot(table[column], place, "o", color=colour)
        panel.set(xlabel=name, yticks=place, yticklabels=table[by].astype(str))
        panel.set_ylim(-0.6, len(table) - 0.4)
    axes[0].hlines(place, table.ci_low, table.ci_high, color=colour)
    axes[0].set(ylabel=by, xlim=(-0.03, 1.03))
    figure.suptitle(f"{title} (n = {', '.join(map(str, sorted(set(table.n))))} a set)")
    return figure


def filters_beside_random(table, title=""):
    """Show what filters do for a classifier, each before the random drops of as many clips.

    Parameters
    ----------
    table : pandas.DataFrame
        From `soundscapes_utils.selection.choose_filter`.
    title : str, optional
        Above the panel.

    Returns
    -------
    matplotlib.figure.Figure
        Accuracy on the validation folds; behind it, as a bar, the middle 95 % of the random drops
        and their mean.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(table) + 1.6), layout="constrained")
    place, colours = np.arange(len(table))[::-1], sns.color_palette("colorblind")
    widths = table.control_high - table.control_low
    bar = {"height": 0.55, "color": colours[1], "alpha": 0.35}
    axes.barh(place, widths, left=table.control_low, **bar, label="random drops, middle 95 %")
    axes.plot(table.control, place, "|", ms=14, color=colours[1], label="random drops, mean")
    axes.plot(table.accuracy, place, "o", color=colours[0], label="filter")
    names = [f"{row.filter} ({row.n_kept:.0f} clips)" for row in table.itertuples()]
    axes.set(yticks=place, yticklabels=names, ylim=(-0.6, len(table) - 0.4), title=title)
    axes.set_xlabel(
        f"accuracy on {table.n_validation.iloc[0]} real sources of the validation folds"
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def noise_schedule(alphas_cumprod):
    """Draw how much of a latent is signal and how much is noise at every step of diffusion.

    Parameters
    ----------
    alphas_cumprod : array_like, shape (steps,)
        Share of the variance that is still signal.

    Returns
    -------
    matplotlib.figure.Figure
        The two factors of the noisy latent (left), and their ratio in dB (right).
    """
    import matplotlib.pyplot as plt
    import numpy as np

    signal = np.asarray(alphas_cumprod, dtype=np.float64)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(np.sqrt(signal), label="of the sound")
    left.plot(np.sqrt(1 - signal), label="of the noise", linestyle="--")
    left.set(xlabel="t", ylabel="factor")
    left.legend()
    right.plot(10 * np.log10(signal / (1 - signal)))
    right.axhline(0, color="0.5", linestyle=":")
    right.set(xlabel="t", ylabel="sound over noise, dB")
    figure.suptitle("From a sound (t = 0) to noise")
    return figure


def caption_similarity(similarity, names):
    """Draw how near each sound is to each caption in the space that both share.

    Parameters
    ----------
    similarity : array_like, shape (sounds, captions)
        Cosines of the embeddings; sound and caption of one index belong together.
    names : sequence of str
        The captions.

    Returns
    -------
    matplotlib.figure.Figure
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    figure, axes = plt.subplots(figsize=(0.8 * len(names) + 1.5, 0.5 * len(names) + 1))
    numbers = range(1, len(names) + 1)
    sns.heatmap(
        similarity, annot=True, fmt=".2f", cmap="viridis", ax=axes, xticklabels=numbers,
        yticklabels=[f"{name}  {i}" for i, name in zip(numbers, names, strict=True)],
    )  # fmt: skip
    axes.set(xlabel="caption", ylabel="sound", title="Cosine of sound and caption (CLAP)")
    axes.tick_params(axis="y", rotation=0)
    return figure


_LINES = (":", "--", "-", "-.")
_WATCHED = {
    "loss": {
        "train_loss": "training",
        "val_loss": "validation",
        "val_loss_ema": "validation, averaged",
        "test_loss_ema": "test, averaged",
    },
    "validation, by condition": {"val_audio_ema": "sound", "val_loss_ema": "caption"},
    "validation, by noise": {
        "val_loss_t1": "cleanest quarter",
        "val_loss_t2": "second",
        "val_loss_t3": "third",
        "val_loss_t4": "noisiest",
    },
    "variational bound, nats": {"train_vlb": "training", "val_vlb_ema": "validation, averaged"},
    "gradient norm": {"grad_norm": ""},
    "learning rate": {"learning_rate": ""},
    "samples a second": {"samples_per_s": ""},
}


def training_curves(log, best_step, scores=None, floor_name=""):
    """Draw what is watched in a training run, a panel each.

    Parameters
    ----------
    log : pandas.DataFrame
        Of `finetuning.FinetuneResult`.
    best_step : int
        Marked by a line.
    scores : pandas.DataFrame, optional
        Of the samples made on the way, likewise; a panel for each distance, if there are any.
    floor_name : str
        `fad.FLOOR_NAME`: its rows become a dashed line, their mean.

    Returns
    -------
    matplotlib.figure.Figure
    """
    import matplotlib.pyplot as plt

    drawn = [] if scores is None or scores.empty else list(scores.groupby(["metric", "embedding"]))
    n_rows = -(-(len(_WATCHED) + len(drawn)) // 3)
    figure, axes = plt.subplots(
        n_rows, 3, figsize=(9.5, 2.5 * n_rows), squeeze=False, layout="constrained"
    )
    axes = iter(axes.flat)
    for (title, curves), panel in zip(_WATCHED.items(), axes, strict=False):
        for (column, name), style in zip(curves.items(), _LINES, strict=False):
            if column in log:
                panel.plot(log["step"], log[column], style, marker="o", markersize=3, label=name)
        panel.set_title(title, fontsize="small")
        if len(curves) > 1:
            panel.legend(fontsize="x-small")
        panel.axvline(best_step, color="0.6", linewidth=1)
    for ((metric, embedding), rows), panel in zip(drawn, axes, strict=False):
        _distance_over_steps(panel, rows, rows["candidate"] == floor_name)
        panel.set_title(f"{metric} of samples, {embedding}", fontsize="small")
        panel.axvline(best_step, color="0.6", linewidth=1)
    for panel in axes:
        panel.set_axis_off()
    figure.supxlabel("step (grey: the best one)", fontsize="small")
    return figure


def _distance_over_steps(axes, rows, is_floor):
    columns = ["step", "value", "ci_low", "ci_high"]
    ours = rows.loc[~is_floor, columns].astype(float).sort_values("step")
    axes.plot(ours["step"], ours["value"], marker="o", markersize=3)
    axes.fill_between(ours["step"], ours["ci_low"], ours["ci_high"], alpha=0.2, linewidth=0)
    floor = rows.loc[is_floor, "value"].astype(float).mean()
    axes.axhline(floor, color="0.4", linestyle="--", label="real against real")
    axes.legend(fontsize="x-small")


def loss_by_time(losses, reference="right"):
    """Draw what conditions cost in denoising, against the strength of the noise.

    Parameters
    ----------
    losses : pandas.DataFrame
        ``t`` in [0, 1), ``error`` and ``condition``, the same segments in the same order under
        each; from `finetuning.fixed_losses`.
    reference : str
        Condition whose error is subtracted, segment by segment.

    Returns
    -------
    matplotlib.figure.Figure
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    segment = losses.groupby("condition", sort=False).cumcount()
    table = losses.assign(segment=segment).pivot_table(["t", "error"], "segment", "condition")
    extra = table["error"].sub(table["error"][reference], axis=0).drop(columns=reference)
    quarter = (table["t"][reference] * 4).astype(int) * 0.25 + 0.125
    extra = extra.assign(t=quarter).melt("t", var_name="condition", value_name="error")
    figure, axes = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    sns.lineplot(
        extra, x="t", y="error", hue="condition", style="condition", markers=True, ax=axes,
        err_style="bars", seed=0,
    )  # fmt: skip
    axes.axhline(0, color="0.5", linewidth=1)
    axes.set(
        xlabel="timestep / 1000 (clean to noisy)", ylabel=f"error above the {reference} one's",
        title="What a condition costs, with 95 % intervals",
    )  # fmt: skip
    return figure


def losses_over_steps(log):
    """Draw training, validation and test loss over the steps, each seed a line.

    Parameters
    ----------
    log : pandas.DataFrame
        ``seed, step, train_loss, val_loss_ema, test_loss_ema``; from `finetuning.FinetuneResult`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    import seaborn as sns

    names = {"train_loss": "training", "val_loss_ema": "validation", "test_loss_ema": "test"}
    table = log.rename(columns=names).melt(["seed", "step"], list(names.values()), "split", "loss")
    grid = sns.relplot(
        table, x="step", y="loss", col="split", hue="seed", style="seed", kind="line",
        markers=True, palette="colorblind", height=3.0, aspect=1.1,
    )  # fmt: skip
    grid.set_titles("{col_name}")
    return grid.figure


def scores_over_steps(scores, floor_name):
    """Draw distances of samples over the steps of training, each seed a line, beside the floor.

    Parameters
    ----------
    scores : pandas.DataFrame
        ``seed, step, metric, embedding, candidate, value``; from `finetuning.FinetuneResult`.
    floor_name : str
        `fad.FLOOR_NAME`: its rows become a dashed line, their mean.

    Returns
    -------
    matplotlib.figure.Figure
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    panels = scores.groupby(["metric", "embedding"], sort=False)
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axes, ((metric, embedding), rows) in zip(all_axes[0], panels, strict=True):
        is_floor = rows["candidate"] == floor_name
        sns.lineplot(
            rows[~is_floor], x="step", y="value", hue="seed", style="seed", markers=True,
            palette="colorblind", ax=axes,
        )  # fmt: skip
        floor = rows.loc[is_floor, "value"].astype(float).mean()
        axes.axhline(floor, color="0.4", linestyle="--", label="real against real")
        axes.set(xlabel="step", ylabel=metric, title=f"{metric} in {embedding}")
        handles, labels = axes.get_legend_handles_labels()
        axes.get_legend().remove()
    labels = [f"seed {label}" if label.isdigit() else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def arm_counts(plan):
    """How many real and synthetic clips each arm trains on.

    Parameters
    ----------
    plan : pandas.DataFrame
        Of `esc.plan_units`; ``arm, ratio, n_real, n_synthetic`` are used.

    Returns
    -------
    matplotlib.figure.Figure
        One bar an arm, in the order of the plan.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    counts = plan.drop_duplicates(["arm", "ratio"])
    names = [
        f"{arm} {ratio:g}" if ratio else arm
        for arm, ratio in zip(counts.arm, counts.ratio, strict=True)
    ]
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(counts) + 1.2), layout="constrained")
    real, synthetic = sns.color_palette("colorblind", 2)
    axes.barh(names, counts.n_real, color=real, label="real")
    axes.barh(names, counts.n_synthetic, left=counts.n_real, color=synthetic, label="synthetic")
    axes.invert_yaxis()
    axes.set(xlabel="training clips", title="What each arm is trained on")
    axes.legend(loc="lower right")
    axes.grid(False, axis="y")
    return figure


def accuracy_curve(results, arm, xlabel, title=""):
    """Accuracy on real test clips against how much synthetic sound an arm holds.

    Parameters
    ----------
    results : pandas.DataFrame
        Table *results* of `esc.run_arms`; the arm "real" stands at 0.
    arm : str
        "both", "mixed" or "synthetic".
    xlabel : str
        What the arm's ratio means.
    title : str, optional
        Above the axes.

    Returns
    -------
    matplotlib.figure.Figure
        Small points: trained classifiers; lines: their means; bars: 1.96·SD/√runs of the runs' means,
        none of one run.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    from . import esc

    part = results[results.arm.isin(["real", arm])]
    summary = esc.summarise(part).sort_values("ratio")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    models = list(summary.model.unique())
    for color, (place, model) in zip(
        sns.color_palette("colorblind"), enumerate(models), strict=False
    ):
        # side by side, so that bars of two models do not hide each other
        shift = 0.02 * (place - (len(models) - 1) / 2) * max(1.0, summary.ratio.max())
        one, each = summary[summary.model == model], part[part.model == model]
        axes.scatter(each.ratio + shift, each.accuracy, s=14, color=color, alpha=0.45)
        axes.errorbar(
            one.ratio + shift, one.accuracy, one.half_width, color=color, marker="o",
            capsize=3, label=model,
        )  # fmt: skip
    axes.set(xlabel=xlabel, ylabel="accuracy on real test clips", ylim=(0, 1.02), title=title)
    axes.set_xticks(sorted(summary.ratio.unique()))
    axes.legend(loc="lower left")
    return figure


def confusion_matrices(tables, title=""):
    """Confusion matrices side by side, each row as shares of its true class.

    Parameters
    ----------
    tables : dict of str to pandas.DataFrame
        Heading and counts (rows: true class, columns: predicted), as `esc.confusion` gives them.
    title : str, optional
        Above all matrices.

    Returns
    -------
    matplotlib.figure.Figure
        One colour scale from 0 to 1; perfect classifiers have a diagonal of ones.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    from . import captions

    classes = max(len(table) for table in tables.values())
    side = 0.36 * classes + 0.9
    figure, axes = plt.subplots(
        1, len(tables), figsize=(side * len(tables) + 1.8, side + 1.3), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, (name, table) in zip(axes.flat, tables.items(), strict=True):
        shares = table.div(table.sum(axis=1).clip(lower=1), axis=0)
        shares = shares.rename(index=captions.tidy, columns=captions.tidy)
        sns.heatmap(shares, vmin=0, vmax=1, cmap="viridis", ax=panel, cbar=panel is axes.flat[-1])
        panel.set(title=name, xlabel="predicted", ylabel="")
    axes.flat[0].set_ylabel("true class")
    figure.suptitle(title)
    return figure


def beside_published(results, title=""):
    """The paper's three figures with its numbers and one's own in the same axes.

    Parameters
    ----------
    results : pandas.DataFrame
        Table *results* of `esc.run_arms`; arms on few real clips a class, and models that the paper
        does not have, are left out.
    title : str, optional
        Above all panels.

    Returns
    -------
    matplotlib.figure.Figure
        One row a network, one column an arm. Dashed: `esc.published`, UrbanSound8K, with its margins
        where it prints them; solid: own, one colour and marker for each source and variant, bars
        1.96·SD/√runs. They compare only where the recordings are the same, and `:faithful` ones best.
    """
    import matplotlib.pyplot as plt

    from . import esc

    theirs, own = esc.published(), _own_lines(results, esc)
    xlabels = {
        "both": "synthetic clips for each real one",
        "mixed": "training folds replaced",
        "synthetic": "synthetic clips only, for each real one",
    }
    figure, axes = plt.subplots(
        2, 3, figsize=(13, 6.4), sharey=True, sharex="col", layout="constrained"
    )
    legend = {}
    for row, network in zip(axes, theirs.model.unique(), strict=True):
        for panel, kind in zip(row, xlabels, strict=True):
            kinds = [kind] if kind == "synthetic" else ["real", kind]
            shown = [table[(table.model == network) & table.kind.isin(kinds)]
                     for table in (theirs.assign(kind=theirs.arm), own)]  # fmt: skip
            _draw_published(panel, shown[0], kind)
            _draw_own(panel, shown[1], kind, list(own.label[own.kind != "real"].unique()))
            handles, labels = panel.get_legend_handles_labels()
            legend |= dict(zip(labels, handles, strict=True))
            panel.set(title=f"{network}, {kind}")
    for panel, xlabel in zip(axes[-1], xlabels.values(), strict=True):
        panel.set(xlabel=xlabel)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for row in axes:
        row[0].set(ylabel="accuracy", ylim=(0, 1))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title)
    return figure


def _own_lines(results, esc):
    """Own means by network, kind of arm and what the legend calls their line."""
    parts = [esc.arm_parts(arm) for arm in results.arm]
    own = esc.summarise(results[[few is None for _, _, few in parts]])
    own[["kind", "source"]] = [esc.arm_parts(arm)[:2] for arm in own.arm]
    own[["model", "variant"]] = [model.partition(":")[::2] for model in own.model]
    own["label"] = [
        ": ".join(filter(None, ["own", ", ".join(filter(None, names))]))
        for names in zip(own.source, own.variant, strict=True)
    ]
    return own


def _draw_published(panel, paper, kind):
    import pandas as pd
    import seaborn as sns

    lines = paper[paper.kind == kind].groupby(["backend", "prompt_family"])
    colours = sns.color_palette("colorblind", len(lines))
    for ((backend, family), line), colour in zip(lines, colours, strict=True):
        line = pd.concat([paper[paper.kind == "real"], line])
        label = f"paper: {backend}, {family} prompt"
        panel.plot(line.ratio, line.accuracy, "--o", ms=3, color=colour, label=label)
    sure = paper.dropna(subset="half_width")
    if len(sure):
        panel.errorbar(sure.ratio, sure.accuracy, sure.half_width, fmt="none", ecolor="0.3",
                       capsize=4, label="paper: 95 % margin")  # fmt: skip


def _draw_own(panel, own, kind, labels):
    import pandas as pd
    import seaborn as sns

    colours = ["black", *sns.color_palette("dark")[1:]]
    for place, label in enumerate(labels):
        line = own[(own.label == label) & (own.kind == kind)]
        if line.empty:
            continue
        same = own[(own.kind == "real") & (own.variant == line.variant.iloc[0])]
        line = pd.concat([same, line]).sort_values("ratio")
        panel.errorbar(
            line.ratio, line.accuracy, line.half_width, marker="sD^vPX*"[place % 7], capsize=3,
            color=colours[place % len(colours)], label=label,
        )  # fmt: skip


def learning_curves(curves, title=""):
    """Losses over the epochs of a study's classifiers, arm by arm.

    Parameters
    ----------
    curves : pandas.DataFrame
        ``curves.csv`` of `esc.run_arms`.
    title : str, optional
        Above all panels.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a network: mean loss of the classifiers still training at that epoch, on training
        (dashed) and on validation clips (solid).
    """
    import seaborn as sns

    named = curves.assign(
        arm=[
            f"{arm} {ratio:g}" if ratio else arm
            for arm, ratio in zip(curves.arm, curves.ratio, strict=True)
        ]
    )
    long = named.melt(
        ["epoch", "arm", "model"], ["validation_loss", "train_loss"], "clips", "loss"
    ).replace({"validation_loss": "validation", "train_loss": "training"})
    grid = sns.relplot(
        long, x="epoch", y="loss", hue="arm", style="clips", col="model", kind="line", errorbar=None,
        height=3.4, aspect=1.3,
    )  # fmt: skip
    grid.set_titles("{col_name}")
    grid.figure.suptitle(title, y=1.03)
    return grid.figure


def class_gains(deltas, title=""):
    """What each class gains or loses, with its interval; corrected tests mark the firm ones.

    Parameters
    ----------
    deltas : pandas.DataFrame
        Of `esc.class_deltas`.
    title : str, optional
        Above the axes.

    Returns
    -------
    matplotlib.figure.Figure
        Classes from the largest loss to the largest gain; filled: p below 0.05 after Holm.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    from . import captions

    table = deltas.sort_values("difference")
    names = [captions.tidy(label) for label in table.label]
    colour = sns.color_palette("colorblind")[0]
    figure, axes = plt.subplots(figsize=(7, 0.34 * len(table) + 1.2), layout="constrained")
    axes.hlines(names, table.ci_low, table.ci_high, color=colour)
    fills = [colour if p < 0.05 else "white" for p in table.p_holm]
    axes.scatter(table.difference, names, c=fills, edgecolors=[colour], zorder=3)
    axes.axvline(0, color="0.5", linestyle=":")
    axes.set(xlabel="change of accuracy", title=title)
    return figure


def confusion_change(table, title=""):
    """Draw what one arm takes each class for more (red) or less (blue) often than another.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `esc.confusion_difference`.
    title : str, optional
        Above the matrix.

    Returns
    -------
    matplotlib.figure.Figure
        Shares of the true class, on a scale that is even around 0.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    from . import captions

    side = 0.4 * len(table) + 1.6
    figure, axes = plt.subplots(figsize=(side + 1.2, side), layout="constrained")
    largest = max(table.abs().to_numpy().max(), 0.01)
    shown = table.rename(index=captions.tidy, columns=captions.tidy)
    sns.heatmap(shown, vmin=-largest, vmax=largest, cmap="vlag", ax=axes, square=True)
    axes.set(title=title, xlabel="predicted", ylabel="true class")
    return figure


def few_real_clips(table, title=""):
    """Accuracy over the number of real training clips a class, one line for each ratio.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `esc.intervals`; arms such as "real/4" and "both/4" are drawn.
    title : str, optional
        Above all panels.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a model, real clips on a logarithmic axis, bars: the 95 % bootstrap interval.
    """
    import matplotlib.pyplot as plt

    from . import esc

    parts = [esc.arm_parts(arm) for arm in table.arm]
    kinds = [f"{kind}@{source}" if source else kind for kind, source, _ in parts]
    named = table.assign(
        name=[f"{k} {r:g}" if r else k for k, r in zip(kinds, table.ratio, strict=True)],
        per_class=[few for _, _, few in parts],
    ).dropna(subset="per_class")
    models = list(named.model.unique())
    figure, axes = plt.subplots(
        1, len(models), figsize=(4.6 * len(models) + 1, 3.8), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, model in zip(axes.flat, models, strict=True):
        for name, line in named[named.model == model].groupby("name", sort=False):
            line = line.sort_values("per_class")
            below, above = line.accuracy - line.ci_low, line.ci_high - line.accuracy
            bars = [side.clip(lower=0).to_numpy() for side in (below, above)]
            panel.errorbar(line.per_class, line.accuracy, bars, marker="o", capsize=3, label=name)
        panel.set_xscale("log", base=2)
        ticks = sorted(named.per_class.unique())
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set(title=model, xlabel="real clips a class")
    axes.flat[0].set(ylabel="accuracy on real test clips")
    axes.flat[0].legend(loc="best")
    figure.suptitle(title)
    return figure
