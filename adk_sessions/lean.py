"""Reading an event without the validators that never change what a store has written.

An event of google-adk takes some 50 microseconds to validate. Four fifths of that are functions
that warn about arguments of a wrong class, or accept shorthand for them. Stored JSON has neither:
it was written by the model itself. So a copy of the model's core schema without these functions
gives the same objects. How a schema is built, and that nested models are not taken from where they
were compiled before, is pydantic's own business and may change: what is found different, or cannot
be made, falls back to the model's own validation.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import SchemaError, SchemaValidator

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

# Events of a service's first reads that are validated both ways and compared.
_PROOFS = 50
# Made anew each time if the row lacks them: such an event equals no other.
_NEEDED = {"id", "timestamp"}
# Parts of a core schema that are no schemas themselves.
_OPAQUE = {"cls", "config", "function", "metadata", "serialization"}


@dataclass(frozen=True)
class Rules:
    """What may be left out when an event of one framework is read from its own JSON.

    Attributes:
        validators: ``before`` validators, as ``module.Class.function``.
        initialisers: classes, as ``module.Class``, whose ``__init__`` of their own is not called.
        shorthand: keys of an event that one of the validators would rewrite.
    """

    validators: frozenset[str]
    initialisers: frozenset[str] = frozenset()
    shorthand: frozenset[str] = frozenset()


class Lean(Generic[M]):
    """Validates the JSON of stored events, as the model itself would but faster.

    Args:
        model: the events' class.
        rules: what to leave out; None leaves nothing out.
    """

    def __init__(self, model: type[M], rules: Rules | None) -> None:
        self._model = model
        self._shorthand = rules.shorthand if rules else frozenset()
        # Searched one by one, which is much faster than an expression of them all.
        self._suspect = [f'"{key}"' for key in self._shorthand]
        self._proofs = _PROOFS
        self._validator = _build(model, rules) if rules else None

    def __call__(self, text: str, **options: Any) -> M:
        """The event.

        Args:
            text: its JSON.
            options: of ``model_validate_json``.

        Raises:
            pydantic.ValidationError: the text is not such an event.
        """
        if self._validator is None or self._is_suspect(text):
            return self._model.model_validate_json(text, **options)
        try:
            event = cast(M, self._validator.validate_json(text, **options))
        except ValidationError:
            return self._model.model_validate_json(text, **options)
        return self._proved(event, text, options) if self._proofs else event

    def _is_suspect(self, text: str) -> bool:
        if "null" in text:
            return True  # an initialiser drops it, so without one it would count as set
        for key in self._suspect:
            if key in text:
                # the event's own keys alone are shorthand, those inside it are anybody's
                return not self._shorthand.isdisjoint(json.loads(text))
        return False

    def _proved(self, event: M, text: str, options: dict[str, Any]) -> M:
        full = self._model.model_validate_json(text, **options)
        if not full.model_fields_set >= _NEEDED:
            return full
        self._proofs -= 1
        if full != event:
            self._validator = None
            logger.warning(
                "lean validation is off: with these versions of pydantic and %s it reads a stored"
                " event differently",
                self._model.__module__.partition(".")[0],
            )
        return full


def _build(model: type[BaseModel], rules: Rules) -> SchemaValidator | None:
    schema = _without(model.__pydantic_core_schema__, rules)
    try:
        try:
            return SchemaValidator(schema, _use_prebuilt=False)
        except TypeError:  # an older pydantic, which never takes what was compiled before
            return SchemaValidator(schema)
    except (SchemaError, TypeError):
        logger.warning("lean validation is off: this version of pydantic does not allow it")
        return None


def _without(schema: Any, rules: Rules) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(_without(item, rules) for item in schema)
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "function-before":
        function = schema["function"]["function"]
        if f"{function.__module__}.{function.__qualname__}" in rules.validators:
            return _without(schema["schema"], rules)
    copy = {
        key: value if key in _OPAQUE else _without(value, rules) for key, value in schema.items()
    }
    if schema.get("custom_init") and _name(schema["cls"]) in rules.initialisers:
        copy["custom_init"] = False
    return copy


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
