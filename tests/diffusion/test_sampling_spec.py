"""Default sampling settings, as recipes and checkpoints hold them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, ValidationError

from pixelgrow.diffusion.sampling import MAX_STEPS
from pixelgrow.diffusion.sampling_spec import SamplingSpec, Spec, check_one_step
from pixelgrow.diffusion.solvers import SAMPLERS
from pixelgrow.errors import UserError


def test_what_is_left_out_is_the_librarys_own() -> None:
    assert SamplingSpec().given == {}
    given: dict[str, Any] = {"steps": 8, "guidance": 0.0, "sampler": "heun", "threshold": 1.0, "grid": "native"}
    given["interval"] = (0.0, 2.0)
    assert SamplingSpec(**given).given == given
    for sampler in SAMPLERS:
        assert SamplingSpec(sampler=sampler).given == {"sampler": sampler}
    assert SamplingSpec(steps=1).steps == 1 and SamplingSpec(steps=MAX_STEPS).steps == MAX_STEPS


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 0}, "greater than or equal to 1"),
        ({"steps": MAX_STEPS + 1}, f"less than or equal to {MAX_STEPS}"),
        ({"guidance": -1}, "greater than or equal to 0"),
        ({"sampler": "euler"}, r"got 'euler', expected one of dpm\+\+2m, heun"),
        ({"threshold": 0}, "greater than 0"),
        ({"threshold": 1.5}, "less than or equal to 1"),
        ({"grid": "even"}, "'karras' or 'native'"),
        ({"interval": (2, 1)}, r"expected \[lo, hi\] with 0 <= lo < hi"),
        ({"interval": (1, 1)}, r"expected \[lo, hi\] with 0 <= lo < hi"),
        ({"interval": (-1, 1)}, r"expected \[lo, hi\] with 0 <= lo < hi"),
        ({"interval": (0, float("inf"))}, "both finite"),
        ({"step": 8}, "not permitted"),
    ],
)
def test_invalid_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SamplingSpec(**given)


def test_a_part_of_a_recipe_is_read_by_its_key_and_made_by_its_name() -> None:
    class Part(Spec):
        parent: str = Field(alias="from")

    assert Part.model_validate({"from": "core"}) == Part(parent="core")


def test_settings_stay_as_they_are() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SamplingSpec(steps=8).steps = 9  # type: ignore[misc]


def test_an_interval_grows_with_the_image() -> None:
    """Pooling k x k pixels divides the noise by k: the same noise is k times as large at k times the resolution."""
    grown = SamplingSpec(steps=8, guidance=2.0, interval=(0.25, 3.0)).grown(4)
    assert grown.given == {"steps": 8, "guidance": 2.0, "interval": (1.0, 12.0)}
    assert SamplingSpec(steps=8).grown(4).given == {"steps": 8}


def test_a_one_step_generator_takes_a_guidance_weight_if_it_is_guided_and_nothing_else() -> None:
    check_one_step({}, guided=False)
    check_one_step({}, guided=True)
    check_one_step({"guidance": 0.5}, guided=True)
    for given, guided, words in (
        ({"steps": 4, "sampler": "heun"}, True, "steps, sampler: a one-step generator"),
        ({"guidance": 2.0}, False, "guidance: a one-step generator"),
        ({"guidance": 2.0, "steps": 4}, True, "^steps: a one-step generator"),
        ({"guidance": 0.0}, True, "guidance=0: expected a weight above 0"),
        ({"guidance": float("inf")}, True, "guidance=inf: expected"),
    ):
        with pytest.raises(UserError, match=words):
            check_one_step(given, guided)
