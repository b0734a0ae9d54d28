"""The datasheet: complete by Gebru et al. 2021, true to the record, and nothing invented."""

import re

import pyarrow as pa

from alpaca_ray.config import GenerateConfig
from alpaca_ray.generate.datasheet import datasheet, literal
from tests.record import HOSTILE, make_record

SECTIONS = [
    "Motivation",
    "Composition",
    "Collection process",
    "Preprocessing, cleaning, labeling",
    "Uses",
    "Distribution",
    "Maintenance",
]
MARK = "> **To be filled by the publisher:**"


def answers(text: str) -> dict[str, str]:
    """Question -> answer."""
    parts = re.split(r"^#{2,3} (.+)$", text, flags=re.MULTILINE)[1:]
    return {q: a.strip() for q, a in zip(parts[::2], parts[1::2], strict=True) if q not in SECTIONS}


def test_it_has_all_seven_sections_and_every_question_has_an_answer() -> None:
    text = datasheet(make_record())
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    found = answers(text)
    assert len(found) >= 40
    assert all(question.endswith("?") and answer for question, answer in found.items())


def test_what_only_people_know_is_left_to_them() -> None:
    found = answers(datasheet(make_record()))
    for topic in ("on behalf of which entity", "funded", "ethical review", "licence", "hosts and maintains", "erratum"):
        (answer,) = [answer for question, answer in found.items() if topic in question]
        assert MARK in answer


def test_figures_of_the_record_stand_in_it() -> None:
    record = make_record()
    text = datasheet(record)
    for name, file in record.files.items():
        assert f"`{name}` | {file.size_bytes:,} | `{file.sha256}`" in text
    for reason, count in record.counts["reasons"].items():
        assert f"{reason} ({count})" in text
    assert f"${record.counts['usd']:.2f}" in text
    assert record.config_hash in text


def test_it_warns_of_the_terms_that_apply() -> None:
    found = answers(datasheet(make_record()))
    (licence,) = [answer for question, answer in found.items() if "licence" in question]
    assert "CC BY-NC 4.0" in licence
    assert "provider" in licence
    assert "compete" in " ".join(found.values())


def test_seeds_of_ones_own_are_not_called_ours_and_their_path_stays_private() -> None:
    shipped = datasheet(make_record())
    own = datasheet(make_record(config=GenerateConfig(num_instructions=5, seed_tasks="/home/someone/seeds.jsonl")))
    assert "licence Apache-2.0" in shipped
    assert "They are not those that alpaca-ray ships." in own
    assert "/home/someone" not in own


def test_switched_off_filters_and_similarity_are_named() -> None:
    config = GenerateConfig(num_instructions=5, skip_filters=("too_short",), similarity=False)
    text = datasheet(make_record(config=config))
    assert "switched off: `too_short`" in text
    assert "`most_similar` and `mean_rouge_l` are null" in text


def test_names_that_a_server_gave_cannot_make_markup() -> None:
    record = make_record(20)
    index = record.completions.schema.get_field_index("model")
    hostile = pa.array([f"`a` | [b](c)\n# d {HOSTILE}"] * 20)
    text = datasheet(make_record(20, completions=record.completions.set_column(index, "model", hostile)))
    assert "<script" not in text
    assert "\n# d" not in text
    assert literal("a`b\n|c") == "`a b c`"


def test_a_run_without_rows_has_one_too() -> None:
    assert answers(datasheet(make_record(5, kept_per_request=0)))["How many instances are there?"] == "0."
