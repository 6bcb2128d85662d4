"""What the environment table says about folders that are there, half there, or not there."""

from soundscapes_utils import environment


def row(table, item):
    return table.set_index("item").loc[item]


def test_folders_count_only_with_their_table_in_them(tmp_path):
    (tmp_path / "ESC-50" / "meta").mkdir(parents=True)
    assert not row(environment.check_environment(tmp_path), "ESC-50").found
    (tmp_path / "ESC-50" / "meta" / "esc50.csv").write_text("")
    there = row(environment.check_environment(tmp_path), "ESC-50")
    assert there.found and there.remedy == ""


def test_what_is_missing_comes_with_a_remedy(tmp_path):
    table = environment.check_environment(tmp_path)
    assert not row(table, "YAMNet").found and not row(table, "TAU 2020 Mobile").found
    assert (table.loc[~table.found, "remedy"] != "").all()
    assert table.needed_for.str.len().min() > 0


def test_yamnet_is_the_file_itself(tmp_path):
    (tmp_path / "yamnet.tflite").write_bytes(b"x")
    table = environment.check_environment(tmp_path, yamnet_path=tmp_path / "yamnet.tflite")
    assert row(table, "YAMNet").found


def test_cached_checkpoint_is_found_without_a_network(tmp_path, monkeypatch):
    commit = "0" * 40
    folder = tmp_path / "models--cvssp--audioldm2"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "model_index.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    table = environment.check_environment(tmp_path)
    assert row(table, "cvssp/audioldm2").found
    assert not row(table, "facebook/audiogen-medium").found
