"""Labels of a session, a flat map of strings: what they may be, and the text that is stored.

The text is JSON whose pairs can be found in it as they are, without reading it as JSON: keys are
sorted, there is no white space, and what separates pairs is escaped where it is part of a string.
So ``{"a":"b"`` or ``,"a":"b"`` is in it if, and only if, the pair is. A search must be by bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import checks, errors

MOST = 64
KEY_LENGTH = 64
VALUE_LENGTH = 256


def check_labels(labels: object, *, removing: bool = False) -> None:
    """Refuses what is not a mapping of at most 64 short strings.

    Args:
        labels: keys of 1 to 64 characters, values of at most 256, no NUL and no lone surrogate.
        removing: None is a value too.

    Raises:
        InvalidInputError: they are not; ``field`` is ``labels``.
    """
    if not isinstance(labels, Mapping):
        raise _refused("must be a mapping of strings")
    if len(labels) > MOST:
        raise _refused(f"are {len(labels)}; at most {MOST} are stored")
    for key, value in labels.items():
        checks.check_key(key, "labels", limit=KEY_LENGTH)
        if not key:
            raise _refused("have an empty key")
        if not (removing and value is None):
            checks.check_key(value, "labels", limit=VALUE_LENGTH)


def labels_text(labels: Mapping[str, str]) -> str:
    """What is stored of labels."""
    return "{" + ",".join(label_pair(key, labels[key]) for key in sorted(labels)) + "}"


def label_pair(key: str, value: str) -> str:
    """How a pair stands in the stored text."""
    return f"{_string(key)}:{_string(value)}"


def load_labels(text: str | None) -> dict[str, str]:
    """Labels of a stored text; what other software has put there and is no label is left out."""
    try:
        found: Any = json.loads(text or "{}")
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _string(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted.replace(",", "\\u002c").replace("{", "\\u007b")


def _refused(why: str) -> errors.InvalidInputError:
    return errors.InvalidInputError(f"labels {why}", field="labels")
