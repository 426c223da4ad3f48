"""Perplexity and accuracy from the losses of rows, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from jobs.inference.results import summary, table
from jobs.inference.rows import Row


def test_perplexity_is_over_all_tokens_that_count() -> None:
    rows = [
        Row(tokens=(0, 1, 2, 3), begin=1, item=0, bytes=8),
        Row(tokens=(3, 4), begin=1, item=0),
        Row(tokens=(0, 5, 6), begin=1, item=1, bytes=4),
    ]
    found = summary(rows, {0: 3.0, 1: 2.0, 2: 4.0})
    assert found["choices"] is None
    text = found["text"]
    assert (text["documents"], text["tokens"], text["bytes"]) == (2, 6, 12)
    assert text["loss"] == 1.5
    assert text["perplexity"] == pytest.approx(math.exp(1.5))
    assert text["bits_per_byte"] == pytest.approx(9 / math.log(2) / 12)
    assert "perplexity         4.4817  (6 tokens of 2 documents)" in table(found)


def test_length_normalised_accuracy_differs_where_the_right_choice_is_long() -> None:
    def row(item: int, choice: int, size: int, right: bool) -> Row:
        return Row(tokens=(0, 1), begin=1, item=item, choice=choice, bytes=size, right=right)

    rows = [row(0, 0, 2, False), row(0, 1, 10, True), row(1, 0, 2, True), row(1, 1, 2, False)]
    found = summary(rows, {0: 2.0, 1: 4.0, 2: 1.0, 3: 5.0})["choices"]
    assert found["questions"] == 2
    assert found["accuracy"] == 0.5
    assert found["accuracy_normalised"] == 1.0
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / 1))
    assert found["accuracy_normalised_stderr"] == 0.0
    told = table({"text": None, "choices": found})
    assert "50.00 % +- 50.00 %" in told


def test_one_question_has_no_spread() -> None:
    rows = [Row(tokens=(0, 1), begin=1, item=0, choice=c, bytes=1, right=c == 0) for c in (0, 1)]
    found = summary(rows, {0: 1.0, 1: 2.0})
    assert found["choices"]["accuracy_stderr"] is None
    assert "+-" not in table(found)
