"""The text that labels are stored as: readable JSON in which a pair is found as it stands."""

from __future__ import annotations

import itertools
import json
from types import MappingProxyType
from typing import Any

import pytest

from adk_sessions import InvalidInputError
from adk_sessions.labels import check_labels, label_pair, labels_text, load_labels

ODD = [
    "a",
    "A",
    "b",
    "",
    " ",
    '"',
    "\\",
    ",",
    "{",
    "}",
    ":",
    "é",
    "\n",
    '","',
    '{"a":"b"',
    "😀",
    "%",
]


def has(text: str, key: str, value: str) -> bool:
    return f",{label_pair(key, value)}" in "," + text[1:]


def test_the_text_is_json_of_the_labels() -> None:
    labels = {key + "x": value for key, value in itertools.product(ODD, ODD)}
    assert json.loads(labels_text(labels)) == labels
    assert load_labels(labels_text(labels)) == labels
    assert labels_text({"b": "2", "a": "1"}) == '{"a":"1","b":"2"}'
    assert labels_text({}) == "{}"
    assert load_labels(None) == {}


def test_a_pair_is_in_the_text_only_if_it_is_a_label() -> None:
    pairs = [(key, value) for key, value in itertools.product(ODD, ODD) if key]
    for labels in ({"x{": ":", "y": "z"}, {'x"a': "b"}, {"x": ',"a":"b"'}, {'x,"a': "b"}):
        assert [pair for pair in pairs if has(labels_text(labels), *pair)] == []
    for number, (key, value) in enumerate(pairs):
        other = ODD[number % len(ODD)]
        labels = {key: value, "z" + other: other}
        text = labels_text(labels)
        assert {pair for pair in pairs if has(text, *pair)} == {(key, value)}


def test_what_other_software_has_stored_does_not_break_reading() -> None:
    assert load_labels("no json") == load_labels("[1]") == load_labels("null") == {}
    assert load_labels('{"a": 1, "b": "c", "d": null}') == {"b": "c"}


@pytest.mark.parametrize(
    "labels",
    [
        None,
        ["a"],
        {"": "b"},
        {"a" * 65: "b"},
        {"a": "b" * 257},
        {"a": None},
        {"a": 1},
        {1: "a"},
        {"a\0": "b"},
        {"a": "\ud800"},
        {str(n): "" for n in range(65)},
    ],
)
def test_other_labels_are_refused(labels: Any) -> None:
    with pytest.raises(InvalidInputError) as refused:
        check_labels(labels)
    assert refused.value.field == "labels"


def test_labels_at_the_limits_are_taken() -> None:
    check_labels({str(n).rjust(64, "k"): "v" * 256 for n in range(64)})
    check_labels({"a": None}, removing=True)
    check_labels(MappingProxyType({"a": "b"}))
