"""The report of a run that never was: whole, safe to open, of bounded size, and true to the record."""

from collections.abc import Iterator
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from alpaca_ray.config import BudgetConfig, GenerateConfig
from alpaca_ray.generate.record import Record, errors, models, nearest_scores, timeline, yield_by_round
from alpaca_ray.generate.report import MAX_COLUMNS, SAMPLE_ROWS, SAMPLES_PER_REASON, render_report
from tests.record import HOSTILE, REQUESTS_PER_ROUND, make_record

VOID = {"meta", "br", "hr", "img", "input", "link"}
# What would fetch something or run a script; ids in the page are no addresses.
ADDRESSES = {"src", "href", "srcset", "action", "data", "xlink:href", "poster", "style"}


class Page(HTMLParser):
    """Which elements a page has, and whether each is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def emptied(table: pa.Table, column: str) -> pa.Table:
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(index), pa.nulls(len(table), table.schema.field(index).type))


def unusual_records() -> Iterator[tuple[str, Record]]:
    plain = make_record(60)
    yield "one request", make_record(1)
    yield "nothing kept", make_record(40, kept_per_request=0)
    yield "no requests", make_record(0)
    similarity_off = GenerateConfig(num_instructions=10, similarity=False)
    yield "no similarity", make_record(60, config=similarity_off, dataset=emptied(plain.dataset, "most_similar"))
    yield "no model named", make_record(60, completions=emptied(plain.completions, "model"))
    when = plain.completions.schema.get_field_index("finished_at")
    never = plain.completions.set_column(when, "finished_at", pa.array(np.zeros(60)))
    yield "no times", make_record(60, completions=never)
    yield "budget", make_record(60, config=GenerateConfig(num_instructions=10, budget=BudgetConfig(max_usd=0.2)))
    yield "many rounds", make_record(60 * REQUESTS_PER_ROUND, kept_per_request=1)


@pytest.mark.parametrize("record", [pytest.param(record, id=name) for name, record in unusual_records()])
def test_every_run_has_a_whole_page(record: Record) -> None:
    page = Page(render_report(record))
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert "nan" not in " ".join(str(value) for _, value in page.attributes).lower().split()


def test_the_page_stands_alone_and_generated_text_cannot_act_in_it() -> None:
    html = render_report(make_record())
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "img", "foreignobject"} & set(page.elements)
    assert not [key for key, _ in page.attributes if key in ADDRESSES or key.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html
    assert any("<script>" in text for text in page.texts)  # it is shown, as text
    assert "\x00" not in html
    assert "\u202e" not in html


def test_the_same_record_gives_the_same_page() -> None:
    assert render_report(make_record()) == render_report(make_record())


def test_numbers_of_the_record_stand_in_the_page() -> None:
    record = make_record()
    html = render_report(record)
    for text in (f"<b>{record.counts['kept']}</b>", "threshold 0.7", record.config_hash, "teacher-0125"):
        assert text in html
    for reason, count in record.counts["reasons"].items():
        assert f"{reason} · {count}" in html


def test_samples_are_few_and_from_all_over_the_dataset() -> None:
    record = make_record()
    page = Page(render_report(record))
    ids = record.dataset["id"].to_pylist()
    shown = [value for key, value in page.attributes if key == "id" and value in set(ids)]
    assert len(shown) == SAMPLE_ROWS
    assert [shown[0], shown[-1]] == [ids[0], ids[-1]]
    reasons = len(record.counts["reasons"])
    assert page.elements.count("details") <= SAMPLE_ROWS + reasons + 1
    assert page.texts.count("Output") == SAMPLE_ROWS
    assert sum("Write the story again" in text for text in page.texts) <= SAMPLES_PER_REASON * reasons


def test_the_page_does_not_grow_with_long_texts_and_many_rows() -> None:
    assert len(render_report(make_record(2000, kept_per_request=5))) < 300_000
    long = make_record(20)
    texts = pa.array(["x" * 100_000] * len(long.dataset))
    grown = make_record(20, dataset=long.dataset.set_column(3, "output", texts))
    assert len(render_report(grown)) < 300_000


def test_yield_counts_every_task_and_request_once() -> None:
    record = make_record()
    found = yield_by_round(record)
    assert found.kept.sum() == record.counts["kept"]
    assert found.rejected.sum() == record.counts["rejected"]
    assert found.failed.sum() == record.counts["failed"]
    assert (found.answered + found.failed).tolist() == [REQUESTS_PER_ROUND] * len(found.kept)
    for number in range(len(found.kept)):
        requests = range(number * REQUESTS_PER_ROUND, (number + 1) * REQUESTS_PER_ROUND)
        assert found.kept[number] == sum(request in requests for request in record.dataset["request"].to_pylist())


def test_the_nearest_score_of_a_row_is_its_highest() -> None:
    dataset = make_record(10).dataset
    expected = [max(near["rouge_l"] for near in row) for row in dataset["most_similar"].to_pylist()]
    assert nearest_scores(dataset).tolist() == expected
    assert not len(nearest_scores(emptied(dataset, "most_similar")))


def test_the_timeline_holds_every_request_token_and_dollar() -> None:
    record = make_record()
    found = timeline(record.completions, MAX_COLUMNS)
    assert found is not None
    minutes = np.diff(found.edges_s) / 60
    assert len(minutes) <= MAX_COLUMNS
    assert (found.requests_per_minute * minutes).sum() == pytest.approx(record.counts["requests"])
    tokens = record.counts["prompt_tokens"] + record.counts["completion_tokens"]
    assert (found.tokens_per_minute * minutes).sum() == pytest.approx(tokens)
    assert found.usd[-1] == pytest.approx(record.counts["usd"])
    assert (np.diff(found.usd) >= 0).all()


def test_models_are_of_answers_and_errors_of_failures() -> None:
    record = make_record()
    assert sum(models(record).values()) == record.counts["requests"] - record.counts["failed"]
    assert sum(errors(record).values()) == record.counts["failed"]
    assert HOSTILE in record.rejects["text"].to_pylist()
