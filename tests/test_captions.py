import hashlib
import json
import re

import pytest
from hypothesis import given, settings
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
FIXED = ("label", "simple", "gpt", "varied")  # those that the built-in model was trained on
ESC50, URBANSOUND8K, TAU = (NAMES[name].split() for name in ("esc50", "urbansound8k", "tau"))


def test_every_class_and_scene_of_the_data_sets_has_its_own_words():
    assert len(ESC50) == 50
    assert set(ESC50) | set(URBANSOUND8K) == set(captions.EVENTS)
    assert set(TAU) <= set(captions.SCENES)


def test_lexicon_is_grammatical_in_its_slots():
    for label, event in captions.EVENTS.items():
        assert re.search(r" (is|are) \w+ing\b", event["clause"][0]), label
        assert not re.search(r"\b(is|are)\b", event["phrase"] + " " + event["noun"][0]), label
    for scene in captions.SCENES.values():
        assert scene["clause"][0].split()[0] in {"in", "on", "by", "beside", "near"}


def test_ids_of_audioset_name_one_class_each():
    owner = {}
    for label, words in (captions.SCENES | captions.EVENTS).items():
        if words["audioset"]:
            assert re.fullmatch(r"/[mtg]/\w+", words["audioset"]), label
            assert owner.setdefault(words["audioset"], label) == label
    assert owner["/m/0bt9lr"] == "dog" and owner["/m/01bjv"] == "bus"


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
    assert len(set(first)) == len(captions.PHRASES["form", "paraphrase"])


@settings(deadline=None)
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


# --- synonyms, further captions, several events ---------------------------------------------------


def digest(texts):
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def test_texts_that_models_were_trained_on_stay_as_they_were():
    # digests of the texts of the first release: the built-in model's vocabulary
    events, scenes = [*captions.EVENTS], [*captions.SCENES, "wind"]
    mixes = [
        captions.mix_captions(label, scene, seed)
        for label in events
        for scene in scenes
        for seed in range(3)
    ]
    assert digest(mixes) == "3e5e38d5ab6f023d"
    families = [captions.prompts(captions.EVENTS, f, n=10, seed=3).prompt for f in FIXED]
    assert digest([texts.tolist() for texts in families]) == "ea8b213baf765a25"


def test_every_class_and_scene_has_synonyms_that_fit_their_slots():
    for label, event in captions.EVENTS.items():
        assert len(set(event["clause"])) == len(set(event["noun"])) == 3, label
        for clause in filter(None, (*event["clause"], event["several"])):
            assert re.search(r" (is|are) \w+ing\b", clause), clause
        for noun in event["noun"]:
            assert not re.search(r"\b(is|are)\b", noun), noun
        assert not event["several"] or " are " in event["several"]
        for kind in ("setting", "range", "microphone"):
            assert (kind, event[kind]) in captions.PHRASES, label
    for label, scene in captions.SCENES.items():
        assert len(set(scene["noun"])) == len(set(scene["clause"])) == 3, label


def test_no_synonym_serves_two_classes():
    # two names of one class
    twice = {("dog", "dog_bark")}
    owner = {}
    for label, event in captions.EVENTS.items():
        for text in (*event["clause"], *event["noun"]):
            first = owner.setdefault(text, label)
            assert first == label or (first, label) in twice, text


@given(
    st.lists(st.sampled_from(ESC50 + URBANSOUND8K), min_size=1, max_size=3),
    st.sampled_from(TAU),
    st.integers(0, 2**32 - 1),
    st.integers(1, 25),
)
@settings(deadline=None)
def test_captions_of_any_number_differ_and_begin_alike(labels, scene, seed, n):
    texts = captions.mix_captions(labels, scene, seed, n)
    assert len(set(texts)) == len(texts) == n
    assert captions.mix_captions(labels, scene, seed, n + 1)[:n] == texts
    if len(labels) == 1:
        assert captions.mix_captions(labels[0], scene, seed, n) == texts


def test_several_events_are_all_named():
    texts = captions.mix_captions(["dog", "siren"], "street_traffic", 0, n=12)
    assert texts[1] == (
        "a dog is barking and an emergency siren is wailing with traffic in the background"
    )
    for text in texts:
        assert re.search("dog", text) and re.search("siren", text)
    three = captions.mix_captions(["dog", "cat", "dog", "rain"], "bus", 0)
    assert three[0] == ("dog barking, cat meowing and rain falling with the sound of bus in background")


def test_captions_use_all_synonyms_and_end_in_a_clear_error():
    texts = captions.mix_captions("rooster", "tram", 7, n=90)
    spoken = " / ".join(texts)
    for row in (captions.EVENTS["rooster"], captions.SCENES["tram"]):
        for words in (*row["clause"], *row["noun"]):
            assert words in spoken
    # 10 forms, each with 3 × 3 fillings; two of them are the second and the third caption
    with pytest.raises(
        ValueError, match=r"rooster with tram: the lexicon has 91 different texts, 92 are"
    ):
        captions.mix_captions("rooster", "tram", 7, n=92)
    with pytest.raises(ValueError, match="at least one label"):
        captions.mix_captions([], "tram", 7)
    with pytest.raises(ValueError, match="n=0"):
        captions.mix_captions("dog", "tram", 7, n=0)


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["dog", "rain", "steam whistle"])
def test_varied_never_repeats_and_knows_its_size(label):
    with pytest.raises(ValueError, match=f"{label}: the lexicon has [0-9]+ different") as caught:
        captions.prompts([label], "varied", n=10**6)
    size = int(re.search("[0-9]+", str(caught.value)).group())
    assert captions.prompts([label], "varied", n=size).prompt.nunique() == size


def test_varied_begins_with_the_sentences_that_the_builtin_model_has_learned():
    first = captions.prompts(["dog"], "varied", n=12).prompt.tolist()
    words = {"clause": "a dog is barking", "noun": "the barks of a dog", "x": "a dog barking"}
    words |= {"close": "close to the microphone", "away": "in the distance", "outside": "outdoors"}
    known = [template.format(**words) for template in captions.VARIED_TEMPLATES]
    assert sorted(first[:10]) == sorted(known)
    assert not set(first[10:]) & set(known)


@pytest.mark.parametrize("label", captions.EVENTS)
def test_varied_is_large_enough_for_four_times_the_largest_class_of_the_study(label):
    assert captions.prompts([label], "varied", n=4001).prompt.is_unique


@pytest.mark.parametrize("family", ["task", "varied"])
def test_seeded_families_depend_on_seed_and_class_alone(family):
    both = captions.prompts(["dog", "cat"], family, n=9, seed=1)
    alone = captions.prompts(["cat"], family, n=5, seed=1)
    assert both[both.label == "cat"].prompt.tolist()[:5] == alone.prompt.tolist()
    assert alone.prompt.nunique() == 5
    assert captions.prompts(["cat"], family, n=5, seed=2).prompt.tolist() != alone.prompt.tolist()


def test_task_prompts_name_number_place_distance_and_microphone():
    table = captions.prompts(["dog"], "task", n=150)
    # 2 numbers × 3 places × 3 distances × 4 microphones, all used before one comes again
    assert table.prompt[:72].nunique() == table.prompt.nunique() == 72
    for text in table.prompt:
        assert re.search("a dog is|several dogs are", text)
        assert any(place in text for place in captions.PHRASES["setting", "street"])
        assert any(distance in text for distance in captions.PHRASES["range", "near"])
        assert any(f"recorded with {m}" in text for m in captions.PHRASES["microphone", "shielded"])


FAR = "airplane helicopter fireworks thunderstorm rain wind train church_bells gun_shot"
SMALL = (
    "water_drops pouring_water breathing brushing_teeth snoring drinking_sipping mouse_click "
    "keyboard_typing can_opening clock_tick"
)
INDOORS = """living room|hallway|small flat|bedroom|small room|dormitory|bathroom|tiled room|washroom
    |kitchen|at a table|dining room|office|study|meeting room|basement|utility room"""
INDOORS = "(" + "".join(INDOORS.split("\n    ")) + ")"
NONSENSE = {  # of all classes
    "a place in which there is no distance": f"{INDOORS}.*, (in the distance|a few metres away)",
    "a window or a door of open country": "in (open country|an open field).*(doorway|window)",
    "a vehicle that passes through a courtyard": "courtyard.*passing",
    "a studio in the open": "(camp site|clearing|yard|garden|forest|beach|street|country).*studio",
    "a wind shield indoors": f"{INDOORS}.*wind shield",
    "a wall of a road": "wall .*road",
    "the same word for the sound and for its place": r"\b(shore|sky|door|yard|street|playground)\b"
    r".* (at|in|on|behind|below) (a|an|the) ([a-z]+ )*\1\b",
}


@pytest.mark.parametrize("family", captions.FAMILIES)
def test_no_class_is_placed_where_it_cannot_be(family):
    for label in captions.EVENTS:
        n = 600 if family in ("varied", "task") else 1
        texts = captions.prompts([label], family, n=n, seed=1).prompt
        patterns = dict(NONSENSE)
        if label in FAR.split():
            patterns["too near"] = "microphone,|close to the microphone|metres away|arm's reach"
        if label in SMALL.split():
            patterns["too far"] = "in the distance|metres away|outdoors"
        if label in ("toilet_flush", "washing_machine", "vacuum_cleaner", "clock_alarm"):
            patterns["outdoors"] = "outdoors"
        for what, pattern in patterns.items():
            wrong = [text for text in texts if re.search(pattern, text)]
            assert not wrong, f"{label}, {what}: {wrong[0]}"


def test_every_class_has_the_same_number_of_distances_and_microphones():
    # so that no class has fewer prompts than another on account of it
    for kind, size in (("setting", 3), ("range", 3), ("microphone", 4), ("rest", 3)):
        words = [texts for (of_kind, _), texts in captions.PHRASES.items() if of_kind == kind]
        assert {len(texts) for texts in words} == {len(set(texts)) for texts in words} == {size}


def test_no_clause_of_a_class_contradicts_its_distances():
    # "passing overhead, far off" would be one
    for event in captions.EVENTS.values():
        for clause in event["clause"]:
            assert "overhead" not in clause or event["range"] == "air", clause


@pytest.mark.parametrize("labels", [ESC50, URBANSOUND8K, ESC50[:10]], ids=["50", "US8K", "10"])
@pytest.mark.parametrize("family", captions.FAMILIES)
def test_every_family_serves_every_data_set(labels, family):
    table = captions.prompts(labels, family, n=3)
    assert len(table) == 3 * len(labels) and table.prompt.str.len().gt(2).all()
    # a class is told from every other by its prompts
    assert table.drop_duplicates(["label", "prompt"]).prompt.is_unique


def test_negative_prompts_spare_what_a_class_has():
    assert captions.negative_prompt() == captions.NEGATIVE_PROMPT
    for label in captions.EVENTS:
        text = captions.negative_prompt(label)
        assert text.startswith(captions.NEGATIVE_PROMPT)
        assert label not in ("street_music", "church_bells") or "music" not in text
        assert label not in ("laughing", "children_playing") or "speech" not in text
        assert set(captions.EVENTS[label]["contains"].split()) <= set(captions.UNWANTED)


def test_negative_prompts_can_name_what_a_class_is_taken_for():
    for label, event in captions.EVENTS.items():
        others = event["confused_with"].split()
        text = captions.negative_prompt(label, confusions=True)
        assert text.startswith(captions.negative_prompt(label))
        for other in others:
            assert captions.EVENTS[other]["phrase"] in text
        # it must not forbid the class itself
        assert label not in others and event["phrase"] not in text
    assert len(captions.EVENTS["dog"]["confused_with"]) > 0
    assert captions.negative_prompt("hen", confusions=True) == captions.negative_prompt("hen")


# --- texts from files -----------------------------------------------------------------------------


def test_prompts_of_a_file_are_checked_by_row(tmp_path):
    path = tmp_path / "mine.csv"
    rows = ["label,prompt,note", "siren, a police  siren  nears ,1", "siren,a police siren nears,"]
    path.write_text("\n".join(rows))
    assert captions.prompts(["siren"], path).to_numpy().tolist() == [
        ["siren", "a police siren nears", "mine"]
    ]
    with pytest.raises(ValueError, match="1 prompts for siren, 2 are wanted"):
        captions.prompts(["siren"], path, n=2)
    path.write_text("label,prompt\ndog,one\ndog, \n")
    with pytest.raises(ValueError, match=r"mine\.csv, row 2: prompt ' ' is empty"):
        captions.prompts(["dog"], path)


def test_prompts_of_a_file_are_a_family(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("label,prompt\ndog,one\ncat,purr\ndog,two\ndog,three\n", encoding="utf-8-sig")
    table = captions.prompts(["dog"], path, n=2)
    assert table.to_numpy().tolist() == [["dog", "one", "mine"], ["dog", "two", "mine"]]
    assert captions.prompts(["dog"], str(path), n=2).equals(table)
    with pytest.raises(ValueError, match=r"mine\.csv: 1 prompts for cat, 2 are wanted"):
        captions.prompts(["dog", "cat"], path, n=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("label,text\ndog,x\n", "has no column prompt; there are label, text"),
        (b"label,prompt\ndog,\xff\xfe\n", "utf-8"),
    ],
)
def test_files_that_are_not_tables_of_prompts_are_named(tmp_path, text, message):
    path = tmp_path / "mine.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        captions.prompts(["dog"], path)
    assert "mine.csv" in str(caught.value)


# --- words for own labels -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("forkliftBeep", "a forklift beep"),
        ("pump", "a pump"),
        ("HVACUnit", "a hvac unit"),
        ("air-raid_siren", "an air raid siren"),
        ("unit", "a unit"),
        ("uninvitedGuest", "an uninvited guest"),
        ("hour_bell", "an hour bell"),
        ("europeanRobin", "a european robin"),
        ("ÖlpumpeLäuft", "a ölpumpe läuft"),
        ("glass", "a glass"),
        ("school bus", "a school bus"),
        ("gas", "a gas"),
        ("string", "a string"),
        ("oldBuilding", "an old building"),
        ("wheels", "wheels"),
        ("shop_doors", "shop doors"),
        ("people", "people"),
        ("white noise", "white noise"),
        ("heavyRain", "heavy rain"),
        ("sawing", "sawing"),
        ("dogBarking", "a dog barking"),
        ("water-dripping", "water dripping"),
        ("gatesClosing", "gates closing"),
        ("a whistle", "a whistle"),
        ("the_gate", "the gate"),
        ("3 knocks", "3 knocks"),
    ],
)
def test_an_unknown_label_gets_its_words_and_article(label, words):
    assert captions.prompts([label], "simple").prompt[0] == f"A clear sound of {words}."
    report, challenge = captions.mix_captions(label, label, 0, n=2)
    assert report == f"{words} with the sound of {words} in background"
    assert challenge == f"{words} can be heard with {words} in the background"


def test_labels_that_differ_in_spelling_only_are_worded_alike():
    for label in ("forklift_beep", "Forklift-Beep", "forklift  beep", "forkliftBeep"):
        assert captions.tidy(label) == "forklift beep"
    assert [captions.tidy(label) for label in ESC50] == [label.replace("_", " ") for label in ESC50]


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "EVENTS", captions.EVENTS.copy())
    monkeypatch.setattr(captions, "SCENES", captions.SCENES.copy())
    monkeypatch.setattr(captions, "OWN", {})
    path = tmp_path / "words.csv"
    rows = ["label,noun,clause,note", "forkliftBeep,the  beep of a forklift,a forklift is beeping,"]
    rows += ["hall_2,a warehouse,in a warehouse,", "siren,a fire alarm,a fire alarm is howling,mine"]
    path.write_text("\n".join(rows), encoding="utf-8-sig")
    return path


def test_words_of_ones_own_are_used_everywhere(words):
    known = {label: captions.mix_captions(label, "park", 0) for label in ("dog", "pump")}
    captions.add_words("")
    assert captions.mix_captions("hall_2", "park", 0)[0].startswith("a hall 2 with")
    captions.add_words(words)
    report, challenge = captions.mix_captions("forkliftBeep", "hall_2", 0, n=2)
    assert report == "a forklift beeping with the sound of a warehouse in background"
    assert challenge == "a forklift is beeping with a warehouse in the background"
    texts = captions.mix_captions("forkliftBeep", "hall_2", 0, n=9)
    assert len(set(texts)) == 9 and any("the beep of a forklift" in text for text in texts)
    assert any("in a warehouse" in text for text in texts)
    prompts = captions.prompts(["forkliftBeep", "siren", "hall_2"]).prompt.tolist()
    sounds = ["a forklift beeping", "a fire alarm howling", "a warehouse"]
    assert prompts == [f"A clear sound of {sound}." for sound in sounds]
    for family in captions.FAMILIES:
        assert captions.prompts(["forkliftBeep", "siren"], family, n=5).prompt.str.len().min() > 4
    assert "vehicle" not in " ".join(captions.prompts(["siren"], "varied", n=40).prompt)
    beside = captions.mix_captions("dog", "forkliftBeep", 3, n=15)  # an event as a scene
    assert any("with the beep of a forklift around" in text for text in beside)
    assert captions.mix_captions("dog", "park", 0) == known["dog"]
    assert captions.mix_captions("pump", "park", 0) == known["pump"]
    assert captions.EVENTS["siren"]["audioset"] == "/m/03kmc9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("label,noun\npump,a pump\n", "has no column clause; there are label, noun"),
        ("label,noun,clause\npump,a pump,a pump is running\nsaw,,a saw\n", "row 2: noun '' is empty"),
        ("label,noun,clause\n ,a pump,a pump is running\n", "row 1: label '' is empty"),
    ],
)
def test_files_that_are_no_tables_of_words_are_named(words, text, message):
    words.unlink()
    if text is not None:
        words.write_text(text)
    known = dict(captions.EVENTS)
    with pytest.raises(ValueError, match=message) as caught:
        captions.add_words(words)
    assert "words.csv" in str(caught.value) and known == captions.EVENTS


def test_own_words_leave_the_counts_of_a_study_alone(words):
    from soundscapes_utils import generation

    before = generation.class_counts("ronchini2024", ["siren"])
    captions.add_words(words)
    assert generation.class_counts("ronchini2024", ["siren"]) == before
