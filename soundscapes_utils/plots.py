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
