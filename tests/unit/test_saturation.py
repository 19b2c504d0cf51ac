"""What is said of layers that left their range, and the limit in a recipe."""

from __future__ import annotations

import pytest

from stepquant.errors import SchemeError
from stepquant.quant.recipe import Recipe
from stepquant.quant.saturation import DEFAULT_LIMIT, MOST_LAYERS_NAMED, Switch, describe_run


def test_description_names_the_worst_layers_and_counts_all():
    switches = [Switch((f"layer{index}",), index, index / 100) for index in range(1, MOST_LAYERS_NAMED + 3)]
    text = describe_run([*switches, Switch(("to_q", "to_k", "to_v"), 0, 0.5)])
    assert text.startswith(f"{len(switches) + 3} layers left the calibrated range")
    assert text.index("to_q, to_k, to_v from step 1 (50.0 % clipped)") < text.index("layer6 from step 7 (6.0 % clipped)")
    assert text.endswith("; and 3 more") and "layer1 " not in text


def test_description_of_one_layer_is_in_the_singular():
    assert describe_run([Switch(("a",), 3, 0.02)]).startswith("1 layer left") and "a from step 4" in describe_run([Switch(("a",), 3, 0.02)])


def test_limit_is_kept_in_the_recipe_and_older_files_get_the_usual_one():
    assert Recipe.from_json(Recipe({}, "test", "test", saturation_limit=0.2).to_json(), "file").saturation_limit == 0.2
    data = Recipe({}, "test", "test").to_json()
    del data["saturation_limit"]
    assert Recipe.from_json(data, "file").saturation_limit == DEFAULT_LIMIT


@pytest.mark.parametrize("limit", [-0.1, 1.5, "much", None, float("nan"), True], ids=str)
def test_limit_that_is_no_share_is_refused(limit):
    data = {**Recipe({}, "test", "test").to_json(), "saturation_limit": limit}
    with pytest.raises(SchemeError, match="file: saturation_limit .*; a share from 0 to 1 is needed"):
        Recipe.from_json(data, "file")
