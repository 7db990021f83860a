"""State of three scopes: split by prefix, merge, temp keys."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from adk_sessions.state import Scopes, merge, only_temp, split, without_temp

KEYS = st.builds(
    str.__add__,
    st.sampled_from(["", "app:", "user:", "temp:", "app", "User:"]),
    st.text(max_size=3),
)
STATES = st.dictionaries(KEYS, st.integers(), max_size=6)


def test_each_prefix_has_its_scope() -> None:
    state = {"a": 1, "app:b": 2, "user:c": 3, "temp:d": 4, "other:e": 5, "": 6, "app:": 7}
    assert split(state) == Scopes({"b": 2, "": 7}, {"c": 3}, {"a": 1, "other:e": 5, "": 6})


def test_only_the_first_prefix_counts() -> None:
    state = {"app:user:a": 1, "user:app:b": 2, "app:temp:c": 3, "x app:d": 4, "APP:e": 5}
    expected = Scopes({"user:a": 1, "temp:c": 3}, {"app:b": 2}, {"x app:d": 4, "APP:e": 5})
    assert split(state) == expected


def test_a_session_key_never_shadows_a_wider_scope() -> None:
    stored = Scopes({"k": "app"}, {"k": "user"}, {"app:k": "no", "user:k": "no", "k": "session"})
    assert merge(stored) == {"app:k": "app", "user:k": "user", "k": "session"}


@given(STATES)
def test_merge_undoes_split(state: dict[str, Any]) -> None:
    assert merge(split(state)) == without_temp(state)


@given(STATES)
def test_temp_and_the_rest_are_the_whole(state: dict[str, Any]) -> None:
    assert only_temp(state) | without_temp(state) == state
    assert not only_temp(state).keys() & without_temp(state).keys()
    assert all(key.startswith("temp:") for key in only_temp(state))


def test_nothing_is_changed_in_place() -> None:
    state = {"a": [1], "app:b": 2, "temp:c": 3}
    scopes = split(state)
    merge(scopes)["a"] = "other"
    without_temp(state)["a"] = only_temp(state)["temp:c"] = "other"
    assert state == {"a": [1], "app:b": 2, "temp:c": 3}
    assert scopes == Scopes({"b": 2}, {}, {"a": [1]})
