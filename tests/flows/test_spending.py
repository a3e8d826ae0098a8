"""A spending limit stops a run, and the next run pays for nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from preferences.errors import ServiceError
from tests.flows.asking import CALL, Models, carry_out, parts, serving, write_recipe

PRICES = {"price_per_million": [1.0, 1.0]}


def test_a_run_at_its_limit_stops_in_one_line_and_a_higher_limit_goes_on(tmp_path: Path) -> None:
    models, free = Models(), Models()
    with serving(models) as endpoint, serving(free) as other:
        # 40 prompts x 2 answers are 80 calls. A call costs 15e-6, and may cost more before it is
        # made: 128 + 16 + the bytes of the message and its role + 10 tokens, under 200e-6.
        limit = 50 * CALL
        engine = {**PRICES, "spending_limit": limit}
        recipe = write_recipe(tmp_path, endpoint.url, engine=engine)
        with pytest.raises(ServiceError, match=r"spending_limit 0\.00075 is reached") as stopped:
            carry_out(recipe, tmp_path / "store")
        assert stopped.value.exit_code == 1
        assert len(str(stopped.value).splitlines()) == 1
        first = sum(models.answered.values())
        assert (limit - 200e-6) / CALL - 1 < first <= 50

        # A limit is one run's: the same one lets the next go on, and is kept again.
        with pytest.raises(ServiceError, match="spending_limit"):
            carry_out(recipe, tmp_path / "store")
        second = sum(models.answered.values())
        assert first < second < 80
        assert second - first <= 50

        # What is on record costs nothing.
        recipe = write_recipe(tmp_path, endpoint.url, engine={**PRICES, "spending_limit": 1.0})
        carry_out(recipe, tmp_path / "store")
        # 80 answers, and of each prompt's one pair both orders.
        assert models.by_model == {"policy": 80, "judge": 80}
        assert models.asked_twice == 0

        carry_out(write_recipe(tmp_path, other.url), tmp_path / "free")
    limited, unlimited = parts(tmp_path / "store"), parts(tmp_path / "free")
    assert limited.keys() == unlimited.keys()
    for name, table in limited.items():
        # Without prices there is no cost, which is all that tells them apart.
        kept = [column for column in table.column_names if column != "cost"]
        assert table.select(kept).equals(unlimited[name].select(kept)), name


def test_what_was_spent_is_on_record_with_every_answer(tmp_path: Path) -> None:
    models = Models()
    with serving(models) as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, prompts=12, engine=PRICES)
        carry_out(recipe, tmp_path / "store")
    for name, table in parts(tmp_path / "store").items():
        if name.startswith(("candidates", "judgments")) and "part-" in name:
            assert table["cost"].to_pylist() == pytest.approx([CALL] * len(table))
