"""The demo's training scenes: held-out combinations never occur, and captions say what is placed."""

import random

import pytest

from stepquant.demo.prompts import heldout_prompts, seen_prompts
from stepquant.demo.recipe.data import read_subjects
from stepquant.demo.recipe.scenes import (
    BACKGROUNDS,
    NUMBER_WORDS,
    STYLES,
    Avatar,
    SceneSampler,
    Sprite,
    full_caption,
    is_heldout_avatar,
    is_heldout_background,
    is_heldout_style,
    plural,
    training_caption,
    with_article,
)

SUBJECTS = [f"thing {index}" for index in range(60)]


@pytest.fixture
def sprites():
    pairs = [(style, subject) for style in STYLES for subject in SUBJECTS]
    return [Sprite(row, subject, style) for row, (style, subject) in enumerate(pairs)]


@pytest.fixture
def avatars():
    made = []
    for row in range(200):
        attributes = {"hair": f"hair {row % 20}", "background": list(BACKGROUNDS)[row % 11], "clothes_color": "red"}
        caption = f"sketch avatar of a person with hair, {attributes['background']} background"
        made.append(Avatar(row, caption, attributes))
    return made


def test_scenes_train_never_shows_a_heldout_combination(sprites, avatars):
    sampler, rng = SceneSampler(sprites, avatars, train=True), random.Random(3)
    by_row = {sprite.row: sprite for sprite in sprites}
    for _ in range(3000):
        scene = sampler.draw(rng)
        if scene.kind == "avatar":
            assert not is_heldout_avatar(avatars[scene.placements[0].row].attributes)
            continue
        for placement in scene.placements:
            sprite = by_row[placement.row]
            assert not is_heldout_style(sprite.style, sprite.subject)
            assert not is_heldout_background(scene.background, sprite.subject)


def test_scenes_hold_out_about_the_stated_shares():
    styles = [is_heldout_style(style, subject) for style in STYLES for subject in SUBJECTS]
    backgrounds = [is_heldout_background(word, subject) for word in BACKGROUNDS for subject in SUBJECTS]
    assert 0 < sum(styles) / len(styles) < 0.12
    assert 0.05 < sum(backgrounds) / len(backgrounds) < 0.16


def test_scenes_sampler_without_split_reaches_heldout_combinations(sprites):
    sampler, rng = SceneSampler(sprites, [], train=False), random.Random(4)
    scenes = [sampler.draw(rng, "single") for _ in range(2000)]
    assert any(is_heldout_background(scene.background, scene.subjects[0]) for scene in scenes)
    assert any(is_heldout_style(scene.style, scene.subjects[0]) for scene in scenes)


def test_scenes_captions_say_style_number_subject_and_background(sprites):
    sampler, rng = SceneSampler(sprites, [], train=True), random.Random(5)
    for _ in range(300):
        scene = sampler.draw(rng, "count")
        word = NUMBER_WORDS[len(scene.placements)]
        assert full_caption(scene) == (f"{STYLES[scene.style]} of {word} {plural(scene.subjects[0])}, {scene.background} background")


def test_scenes_pair_words_match_the_layout(sprites):
    sampler, rng = SceneSampler(sprites, [], train=True), random.Random(6)
    for _ in range(300):
        scene = sampler.draw(rng, "pair")
        first, second = scene.placements
        assert scene.caption.index(scene.subjects[0]) < len(scene.caption)
        if " above " in scene.caption:
            assert first.y < second.y and first.x == second.x
        else:
            assert first.x < second.x


def test_scenes_training_captions_never_name_a_wrong_colour(sprites):
    sampler, rng = SceneSampler(sprites, [], train=True), random.Random(7)
    unnamed = 0
    for _ in range(500):
        scene = sampler.draw(rng, "single")
        text = training_caption(rng, scene)
        if text.endswith(" background"):
            assert text.endswith(f", {scene.background} background")
        else:
            unnamed += 1
    assert 50 < unnamed < 250


def test_scenes_are_the_same_for_the_same_seed(sprites, avatars):
    sampler = SceneSampler(sprites, avatars)
    first, second = random.Random(9), random.Random(9)
    assert [sampler.draw(first) for _ in range(50)] == [sampler.draw(second) for _ in range(50)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "red apples"),
        ("fox", "foxes"),
        ("butterfly", "butterflies"),
        ("mouse", "mice"),
        ("heart with arrow", "hearts with arrow"),
        ("jeans", "jeans"),
        ("cactus", "cactuses"),
        ("snowman", "snowmen"),
    ],
)
def test_scenes_plural_of(name, expected):
    assert plural(name) == expected


@pytest.mark.parametrize(("name", "expected"), [("owl", "an owl"), ("cat", "a cat"), ("glasses", "glasses")])
def test_scenes_article_of(name, expected):
    assert with_article(name) == expected


def test_demo_prompts_are_in_fixed_order_and_the_lists_share_nothing():
    seen, heldout = seen_prompts(512), heldout_prompts(512)
    assert len(set(seen)) == len(set(heldout)) == 512
    assert not set(seen) & set(heldout)
    assert seen_prompts(8) == seen[:8]


def test_demo_heldout_prompts_break_exactly_one_rule():
    by_phrase = {phrase: style for style, phrase in STYLES.items()}
    names = {with_article(name): name for name in read_subjects()}
    for prompt in heldout_prompts(512):
        words, _, clause = prompt.rpartition(", ")
        phrase, _, thing = words.partition(" of ")
        style_rule = is_heldout_style(by_phrase[phrase], names[thing])
        assert style_rule != is_heldout_background(clause.removesuffix(" background"), names[thing])


def test_demo_prompts_name_the_limit_when_too_many_are_asked():
    with pytest.raises(ValueError, match="0 to 512"):
        seen_prompts(513)
