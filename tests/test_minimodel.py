"""Making the mini model: its loss, what it learns, what it leaves out."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from soundscapes_utils import datasets, ldm, minimodel, procedural

CONFIG = minimodel.MiniConfig(
    unet_steps=2, clap_steps=2, n_mixes=10, segments_per_clip=1, channels=(16, 32, 48)
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
    loss = minimodel.contrastive_loss(sound, text, positive, torch.tensor(np.log(2.0)))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_clap_pair_learns_to_tell_two_sounds_apart():
    torch.manual_seed(0)
    texts = [["a low hum"], ["a high hiss"]] * 8
    pipe, tower = ldm.build_small([t for row in texts for t in row], channels=(16, 32, 48))
    mels = torch.full((16, 1, 64, 64), -8.0)
    mels[::2, :, :, :20] += 5
    mels[1::2, :, :, 40:] += 5
    mels += 0.3 * torch.randn(mels.shape)
    loss = minimodel.train_clap(
        pipe, tower, mels, texts, torch.arange(16) % 2, steps=40, batch_size=16
    )
    match = tower(mels[:, 0]) @ ldm.embed_text(pipe, ["a low hum", "a high hiss"]).T
    assert loss < np.log(16)
    assert (match.argmax(1) == torch.arange(16) % 2).all()


def test_training_leaves_the_test_fold_out_and_resumes_to_the_same_bytes(
    pool, tmp_path, monkeypatch
):
    events, scenes = pool
    test_paths = set(events.loc[events["fold"] == 5, "path"])
    read, load = [], minimodel.audio.load_audio

    def recording(path, *args):
        read.append(str(path))
        return load(path, *args)

    def planning(*args):
        # levels are measured for the mixes of all splits, of which only those for training are kept
        monkeypatch.setattr(minimodel.audio, "load_audio", load)
        mixes = plan(*args)
        monkeypatch.setattr(minimodel.audio, "load_audio", recording)
        held_out = test_paths | set(scenes.loc[scenes["fold"] == 5, "path"])
        assert not held_out & {*mixes["foreground"], *mixes["background"]}
        return mixes

    plan = minimodel._scene_mixes
    monkeypatch.setattr(minimodel, "_scene_mixes", planning)
    monkeypatch.setattr(minimodel.audio, "load_audio", recording)
    options = {"dataset": "pool", "test_fold": 5}
    folder = minimodel.train(events, events, scenes, tmp_path / "mini", CONFIG, **options)
    assert read and not test_paths & set(read)
    info = ldm.checkpoint_info(folder)
    assert info["training_folds"] == [2, 3, 4]
    # who wants this model again is sent to what makes it, not to what makes the built-in one
    card = (folder / "README.md").read_text()
    assert "get_checkpoint" in card and "train-mini" not in card
    of_the_pool = info | {"training_dataset": minimodel._POOL}
    assert "train-mini" in minimodel._card(of_the_pool, CONFIG, 1)
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
    assert minimodel.get_checkpoint("cvssp/audioldm", None, None, None) == "cvssp/audioldm"


def test_event_texts_are_distinct_and_name_the_class():
    for label in procedural.EVENTS:
        texts = minimodel.event_texts(label)
        assert len(texts) == len(set(texts)) >= 8


def test_command_line_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        minimodel.main(["--help"])
    assert stop.value.code == 0
    assert "procedural sounds" in capsys.readouterr().out


def _weights(folder):
    files = sorted(Path(folder).rglob("*.safetensors"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_new_card_claims_no_scores_of_an_older_model():
    info = {"training_dataset": "any", "training_folds": [1], **minimodel.SAMPLING}
    scores = minimodel._card(info, CONFIG, 5).split("## Scores")[1]
    assert "Not measured" in scores and "|" not in scores
