"""`alpaca-ray lint` finds every seeded mistake, with its file, line, field and the nearest name; Ray finds few."""

import pytest

from alpaca_ray.cluster import aws
from alpaca_ray.lint.files import lint_texts
from tests.lint_seeds import SEEDS, SHIPPED, Seed
from tests.lint_table import counts, needs_botocore, ours, ours_finds, refused_by_ray, render


def test_the_files_that_ship_are_right() -> None:
    assert lint_texts(SHIPPED, {}) == []


def test_there_are_enough_seeds_of_every_sort() -> None:
    assert len(SEEDS) >= 60
    assert len({seed.text for seed in SEEDS}) == len(SEEDS)
    for file in SHIPPED:
        kinds = {seed.kind for seed in SEEDS if seed.file == file}
        assert kinds == {"typo", "value", "type", "contradiction", "safety"}


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_each_mistake_is_found_where_it_is(seed: Seed) -> None:
    if needs_botocore(seed) and not aws.has_botocore():
        pytest.skip("botocore is not installed: pip install 'alpaca-ray[cluster]'")
    assert ours_finds(seed), "\n".join(ours(seed))


def test_ray_finds_few_of_them() -> None:
    assert not any(refused_by_ray(name, text) for name, text in SHIPPED.items())
    table = {row.file: row for row in counts()}
    for row in table.values():
        assert row.ours == row.seeds if aws.has_botocore() else row.ours > 0
        assert row.ray < row.seeds / 2, render(list(table.values()))
    assert table["cluster.yaml"].ray > 0, "Ray's check has to run at all"
    assert table["serve_config.yaml"].ray > 0
    assert table["alpaca_7b.yaml"].ray == 0, "Ray knows no recipes"


def test_no_secret_is_repeated() -> None:
    for seed in SEEDS:
        assert not any(secret in line for line in ours(seed) for secret in ("a1B2c3D4", "Ab3Ab3", "AKIAQ3")), seed
