import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundscapes_utils import captions

# the class names as esc50.csv, UrbanSound8K.csv and TAU's meta.csv write them
NAMES = {
    "esc50": """dog rooster pig cow frog cat hen insects sheep crow rain sea_waves crackling_fire
    crickets chirping_birds water_drops wind pouring_water toilet_flush thunderstorm crying_baby
    sneezing clapping breathing coughing footsteps laughing brushing_teeth snoring drinking_sipping
    door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening washing_machine
    vacuum_cleaner clock_alarm clock_tick glass_breaking helicopter chainsaw siren car_horn engine
    train church_bells airplane fireworks hand_saw""",
    "urbansound8k": """air_conditioner car_horn children_playing dog_bark drilling engine_idling
    gun_shot jackhammer siren street_music""",
    "tau": """airport bus metro metro_station park public_square shopping_mall street_pedestrian
    street_traffic tram""",
}
ESC50, URBANSOUND8K, TAU = (NAMES[name].split() for name in ("esc50", "urbansound8k", "tau"))


def test_every_class_and_scene_of_the_data_sets_has_its_own_words():
    assert len(ESC50) == 50
    assert set(ESC50) | set(URBANSOUND8K) == set(captions.EVENTS)
    assert set(TAU) <= set(captions.SCENES)


def test_lexicon_is_grammatical_in_its_slots():
    for label, event in captions.EVENTS.items():
        assert re.search(r" (is|are) \w+ing\b", event.clause), label
        assert not re.search(r"\b(is|are)\b", event.phrase + " " + event.noun), label
    for place in (scene.place for scene in captions.SCENES.values()):
        assert place.split()[0] in {"in", "on", "by", "beside", "near"}


def test_captions_of_two_labels_differ():
    texts = {label: captions.mix_captions(label, "park", 0)[1] for label in ESC50}
    assert len(set(texts.values())) == 50


def test_forms_of_the_report_and_of_the_challenge():
    report, challenge, _ = captions.mix_captions("snoring", "park", 3)
    assert report == "snoring with the sound of park in background"
    assert challenge == "a person is snoring with a park in the background"
    assert captions.mix_captions("dog", "street_traffic", 1)[1] == (
        "a dog is barking with traffic in the background"
    )


def test_paraphrases_follow_the_seed_and_all_occur():
    first = [captions.mix_captions("dog", "bus", s)[2] for s in range(40)]
    assert first == [captions.mix_captions("dog", "bus", s)[2] for s in range(40)]
    assert len(set(first)) == len(captions.PARAPHRASES)


@given(st.text(min_size=1), st.text(min_size=1), st.integers(0, 2**32 - 1))
def test_any_label_is_captioned_or_refused(label, scene, seed):
    try:
        event, place = captions.tidy(label), captions.tidy(scene)
    except ValueError:
        return
    for text in captions.mix_captions(label, scene, seed):
        assert event in text or label in captions.EVENTS
        assert place in text or scene in captions.SCENES


def test_empty_label_is_refused():
    with pytest.raises(ValueError, match="holds no word"):
        captions.tidy("_ -")


def test_study_prompts_are_verbatim():
    simple = captions.prompts(URBANSOUND8K, "simple").set_index("label").prompt
    assert simple["siren"] == (
        "A clear sound of a siren coming from an emergency vehicle in a urban context."
    )
    assert simple["car_horn"] == "A clear sound of a car horning in a urban context."
    gpt = captions.prompts(URBANSOUND8K, "gpt").set_index("label").prompt
    assert gpt["drilling"] == (
        "Generate a realistic audio representation of the sound of drilling in a urban environment."
    )
    assert captions.prompts(["cow"], "gpt").prompt[0].endswith("the sound of a cow mooing.")


def test_prompt_table_has_n_rows_a_class_in_order():
    table = captions.prompts(["dog", "cat"], "varied", n=14, seed=5)
    assert table.label.tolist() == ["dog"] * 14 + ["cat"] * 14
    assert set(table.prompt_family) == {"varied"}
    ten = table.prompt[:10]
    assert ten.nunique() == len(captions.VARIED_TEMPLATES)


def test_varied_prompts_depend_on_seed_and_class_alone():
    both = captions.prompts(["dog", "cat"], "varied", n=3, seed=1)
    alone = captions.prompts(["cat"], "varied", n=3, seed=1)
    assert both[both.label == "cat"].prompt.tolist() == alone.prompt.tolist()
    other = captions.prompts(["cat"], "varied", n=10, seed=2).prompt.tolist()
    assert other != captions.prompts(["cat"], "varied", n=10, seed=1).prompt.tolist()


def test_siren_is_the_vehicle_in_every_family():
    for family in ("simple", "gpt", "varied"):
        for prompt in captions.prompts(["siren"], family, n=10).prompt:
            assert "emergency" in prompt


@pytest.mark.parametrize("bad", [{"family": "poem"}, {"n": 0}])
def test_bad_requests_are_named(bad):
    with pytest.raises(ValueError, match=r"poem|n=0"):
        captions.prompts(["dog"], **bad)
    with pytest.raises(ValueError, match="each label once"):
        captions.prompts(["dog", "dog"])
