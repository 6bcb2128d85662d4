"""Making the mini model: its loss, what it learns, what it leaves out."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from soundscapes_utils import captions, datasets, ldm, minimodel, procedural, store

CONFIG = minimodel.MiniConfig(
    unet_steps=2, clap_steps=80, n_mixes=10, segments_per_clip=1, channels=(16, 32, 48)
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    procedural.write_events(root / "events", 5, 0, pool="pretraining")
    procedural.write_scenes(root / "scenes", 5, 0, pool="pretraining")
    return datasets.load_esc50(root / "events"), datasets.load_tau(root / "scenes")


def test_contrastive_loss_is_the_cross_entropy_to_all_positives():
    generator = torch.Generator().manual_seed(0)
    sound, text = F.normalize(torch.randn(2, 6, 4, generator=generator), dim=-1)
    kind = torch.tensor([0, 0, 1, 2, 2, 2])
    positive = kind[:, None] == kind[None]
    logits = (2.0 * sound @ text.T).double().numpy()

    def one_way(scores):
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return -np.mean([log_p[i][positive[i].numpy()].mean() for i in range(6)])

    expected = 0.5 * (one_way(logits) + one_way(logits.T))
    loss = minimodel.ContrastiveLoss(np.log(2.0))(sound, text, positive)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_training_leaves_the_test_fold_out_and_resumes_to_the_same_bytes(pool, tmp_path, monkeypatch):
    events, scenes = pool
    test_paths = set(events.loc[events["fold"] == 5, "path"])
    read, load = [], minimodel.audio.load_audio

    def recording(path, *args, **options):
        read.append(str(path))
        return load(path, *args, **options)

    def planning(*args, **options):
        # levels are measured for the mixes of all splits, of which only those for training are kept
        monkeypatch.setattr(minimodel.audio, "load_audio", load)
        mixes = plan(*args, **options)
        monkeypatch.setattr(minimodel.audio, "load_audio", recording)
        return mixes

    def rendering(mixes, *args):
        held_out = test_paths | set(scenes.loc[scenes["fold"] == 5, "path"])
        assert not held_out & {*mixes["foreground"], *mixes["background"]}
        return render(mixes, *args)

    plan, render = minimodel.mixing.plan_mixes, minimodel.mixing.render_mixes
    monkeypatch.setattr(minimodel.mixing, "plan_mixes", planning)
    monkeypatch.setattr(minimodel.mixing, "render_mixes", rendering)
    monkeypatch.setattr(minimodel.audio, "load_audio", recording)
    options = {"dataset": "pool", "test_fold": 5}
    folder = minimodel.train(events, events, scenes, tmp_path / "mini", CONFIG, **options)
    assert read and not test_paths & set(read)
    assert ldm.checkpoint_info(folder)["heard"] == {"pool": [2, 3, 4]}
    # who wants this model again is sent to what makes it, not to what makes the built-in one
    card = (folder / "README.md").read_text()
    assert "get_checkpoint" in card and "train-mini" not in card
    # nothing is said of the scores of an older model
    assert "Not measured" in card.split("## Scores")[1] and "|" not in card.split("## Scores")[1]
    table = store.read_table(tmp_path / "mini.work" / "events.csv")
    texts = table[captions.caption_columns(table)]
    assert texts.shape[1] >= 8 and (texts.nunique(axis=1) == texts.shape[1]).all()
    clap, n = ldm.load_clap(str(folder)), 0
    labels = sorted(events["label"].unique())
    words = ldm.embed_text(clap, [label.replace("_", " ") for label in labels])
    for row in events[events["fold"].isin([2, 3, 4])].itertuples():
        sound = ldm.embed_audio(clap, [load(row.path, 16_000)[0]], 16_000)
        n += labels[int((sound @ words.T).argmax())] == row.label
    assert n / 30 > 0.3, "one in ten by chance"
    first = _weights(folder)
    read.clear()
    minimodel.train(events, events, scenes, tmp_path / "mini", CONFIG, **options)
    assert _weights(folder) == first
    assert not [path for path in read if "mixes" not in path], "nothing is computed twice"


def test_get_checkpoint_trains_once_for_each_data_and_setting(pool, tmp_path, monkeypatch):
    events, scenes = pool
    made = []

    def fake(events, foregrounds, backgrounds, out_dir, config, *, dataset, test_fold):
        made.append(out_dir)
        out_dir.mkdir(parents=True)
        (out_dir / "model_index.json").write_text("{}")
        return out_dir

    monkeypatch.setattr(minimodel, "train", fake)
    options = {"cache_dir": tmp_path, "dataset": "pool", "test_fold": 5, "config": CONFIG}
    first = minimodel.get_checkpoint("mini", events, events, scenes, **options)
    assert minimodel.get_checkpoint("mini", events, events, scenes, **options) == first
    assert len(made) == 1
    minimodel.get_checkpoint("mini", events, events, scenes, **{**options, "test_fold": 4})
    minimodel.get_checkpoint("mini", events[:-1], events, scenes, **options)
    assert len(set(made)) == 3
    # two notebooks side by side ask for the same model: the second waits for the first
    monkeypatch.setattr(
        minimodel, "train", lambda *given, **named: (time.sleep(0.3), fake(*given, **named))
    )
    asked = (events[1:], events, scenes)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: minimodel.get_checkpoint("mini", *asked, **options), range(2)))
    assert len(made) == 4
    assert minimodel.get_checkpoint("cvssp/audioldm", None, None, None) == "cvssp/audioldm"


def test_clips_under_other_labels_folds_or_sources_make_another_model(pool, tmp_path, monkeypatch):
    events, scenes = pool
    made = []

    def fake(*arguments, **named):
        made.append(arguments[3])

    monkeypatch.setattr(minimodel, "train", fake)
    options = {"cache_dir": tmp_path, "dataset": "pool", "test_fold": 5, "config": CONFIG}
    for changed in (
        events,
        events.assign(label=events["label"].to_numpy()[::-1]),
        events.assign(fold=events["fold"].to_numpy()[::-1]),
        events.assign(source_id=[f"s{i}" for i in range(len(events))]),
        events.assign(fold=events["fold"] % 5 + 1),  # what was trained on is now the test fold
        events.assign(label=np.random.default_rng(0).permutation(events["label"])),
    ):
        minimodel.get_checkpoint("mini", changed, events, scenes, **options)
    for places in (scenes.assign(fold=scenes["fold"] % 5 + 1), scenes[::-1]):
        minimodel.get_checkpoint("mini", events, events, places, **options)
    minimodel.get_checkpoint("mini", events, events[:-1], scenes, **options)
    assert len(set(made)) == 9
    minimodel.get_checkpoint("mini", events.assign(path=list(events["path"])), events, scenes, **options)
    assert len(set(made)) == 9
    for words in (
        {"nobody": ["x", "y"]},
        {events["label"][0]: ["x", "y"]},
        {scenes["label"][0]: ["x", "y"]},
    ):
        monkeypatch.setattr(
            captions, "OWN", words
        )  # words of one's own for what is not here change nothing
        minimodel.get_checkpoint("mini", events, events, scenes, **options)
    assert len(set(made)) == 11


def test_model_of_the_pool_knows_no_fold_of_any_study(tmp_path):
    config = minimodel.MiniConfig(1, 1, 10, 1, (16, 32, 48))
    folder = minimodel.train_builtin(tmp_path / "mini", tmp_path / "data", 5, 5, config)
    assert ldm.checkpoint_info(folder)["heard"] == {}
    assert "train-mini" in (folder / "README.md").read_text()


def _weights(folder):
    files = sorted(Path(folder).rglob("*.safetensors"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
