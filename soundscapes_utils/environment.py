"""What this machine offers and what the larger profiles would need: one table, no download."""

from __future__ import annotations

from . import pipeline, store

# Of each, one file that a whole download contains.
HUB_CHECKPOINTS = {
    "cvssp/audioldm-s-full-v2": "model_index.json",
    "cvssp/audioldm2": "model_index.json",
    "facebook/audiogen-medium": "state_dict.bin",
}


def check_environment(
    data_dir="data", esc50_root="", urbansound8k_root="", tau_root="", yamnet_path=""
):
    """Look for what the larger profiles need, and say how to get what is missing.

    Nothing is downloaded, and no data set is read: loaders check their folder when they open it.

    Parameters
    ----------
    data_dir : path-like, optional
        Where data sets lie whose own folder is not given.
    esc50_root, urbansound8k_root, tau_root, yamnet_path : path-like, optional
        As the notebooks' parameters of these names.

    Returns
    -------
    pandas.DataFrame
        Columns ``item, found`` (bool), ``detail, needed_for, remedy``.

    Examples
    --------
    >>> check_environment().columns.tolist()
    ['item', 'found', 'detail', 'needed_for', 'remedy']
    """
    import pandas as pd

    data = store.project_path(data_dir)
    rows = [_gpu(), _free_disk(data), _free_memory()]
    for item, given, mark, needed_for in (
        ("ESC-50", esc50_root or data / "ESC-50", "meta/esc50.csv", "esc10, paper"),
        (
            "UrbanSound8K",
            urbansound8k_root or data / "UrbanSound8K",
            "metadata/UrbanSound8K.csv",
            "paper",
        ),
        ("TAU 2020 Mobile", tau_root, "meta.csv", "paper"),
        ("mini-AudioLDM", "data/checkpoints/mini-audioldm", "model_index.json", "quick"),
        ("YAMNet", yamnet_path, "", "a third embedding in 04, any profile"),
    ):
        found = bool(given) and (store.project_path(given) / mark).exists()
        remedy = f"{data_dir}/README.md says how to get it"
        rows.append((item, found, mark and f"looked for {mark}", needed_for, remedy))
    for hub_name, file in HUB_CHECKPOINTS.items():
        rows.append((hub_name, *_in_hub_cache(hub_name, file)))
    table = pd.DataFrame(rows, columns=["item", "found", "detail", "needed_for", "remedy"])
    table.loc[table["found"], "remedy"] = ""
    return table


def _gpu():
    import torch

    found = torch.cuda.is_available()
    detail = torch.cuda.get_device_name() if found else "none that CUDA sees"
    return "GPU", found, detail, "paper", "use a machine with an NVIDIA GPU (24 GB or more)"


def _free_disk(folder):
    free = pipeline._free_gb(folder)
    needed = "paper (quick needs 1 GB)"
    return "disk, 300 GB", free > 300, f"{free:.0f} GB free", needed, "make room, or move the clone"


def _free_memory():
    import psutil

    total = psutil.virtual_memory().total / 1e9
    needed = "paper (quick needs 4 GB)"
    return "memory, 32 GB", total > 32, f"{total:.0f} GB", needed, "use a larger machine"


def _in_hub_cache(name, file):
    from huggingface_hub import try_to_load_from_cache

    found = isinstance(try_to_load_from_cache(name, file), str)
    detail = "in the hub's cache" if found else "not in the hub's cache"
    return found, detail, "paper", f"fetched on first use, or before: hf download {name}"
