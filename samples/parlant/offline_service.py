"""What the agent talks to when there is no API key: a model service of rules, without a network.

Parlant asks a model for JSON of a given schema, many times a turn. Here every field gets its
default or the least that its type allows, and the agent's reply is made of what the prompt says
about the conversation: whether it has come back from the database can be seen in the answer.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import parlant.sdk as p
from parlant.core.engines.alpha.prompt_builder import BuiltInSection
from parlant.core.nlp.generation_info import GenerationInfo, UsageInfo
from parlant.core.nlp.tokenization import ZeroEstimatingTokenizer
from pydantic import BaseModel

REPLY = "response_body"  # the field of Parlant's schemas that the customer gets to read
DIMENSIONS = 16


class OfflineGenerator(p.SchematicGenerator[p.T]):
    """Fills whatever schema is asked for."""

    id = "offline"
    max_tokens = 1_000_000
    tokenizer = ZeroEstimatingTokenizer()

    async def generate(
        self, prompt: str | p.PromptBuilder, hints: Mapping[str, Any] | None = None
    ) -> p.SchematicGenerationResult[p.T]:
        content = least(self.schema)
        if REPLY in self.schema.model_fields and isinstance(prompt, p.PromptBuilder):
            setattr(content, REPLY, reply(prompt))
        nothing = UsageInfo(input_tokens=0, output_tokens=0)
        info = GenerationInfo(self.schema.__name__, self.id, duration=0, usage=nothing)
        return p.SchematicGenerationResult(content, info)


def least(kind: Any) -> Any:
    """The least that a type allows; a model's fields keep their defaults."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = kind.model_fields.items()
        return kind(**{name: least(f.annotation) for name, f in fields if f.is_required()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(iter(kind))
    origin, arguments = get_origin(kind), get_args(kind)
    if NoneType in arguments:
        return None
    if origin is Literal:
        return arguments[0]
    if origin in (dict, Mapping):
        return {}
    if origin in (list, tuple, Sequence):
        return []
    return least(arguments[0]) if arguments else kind()


def reply(prompt: p.PromptBuilder) -> str:
    """An answer out of what Parlant has read from its stores for this prompt."""
    history = prompt.sections[BuiltInSection.INTERACTION_HISTORY].props["interaction_events"]
    events = [json.loads(text) for text in history]
    said = [e["data"]["message"] for e in events if e["event_source"] == "user"]
    known = dict(re.findall(r"\bmy (\w+) is (\w+)", " ".join(said), re.IGNORECASE))
    variables = prompt.sections.get(BuiltInSection.CONTEXT_VARIABLES)
    values = json.loads(variables.props["context_values"]) if variables else {}
    known |= {name: value["value"] for name, value in values.items()}
    facts = " and ".join(f"your {fact} is {value}" for fact, value in known.items())
    return f"I know {facts or 'nothing yet'}; this is your message {len(said)} here."


class OfflineEmbedder(p.Embedder):
    """Texts are alike when they have words in common."""

    id = "offline"
    max_tokens = 1_000_000
    tokenizer = ZeroEstimatingTokenizer()
    dimensions = DIMENSIONS

    async def embed(
        self, texts: list[str], hints: Mapping[str, Any] | None = None
    ) -> p.EmbeddingResult:
        return p.EmbeddingResult(vectors=[vector(text) for text in texts])


def vector(text: str) -> list[float]:
    counts = [0.1] * DIMENSIONS
    for word in text.lower().split():
        counts[zlib.crc32(word.encode()) % DIMENSIONS] += 1
    return counts


class OfflineService(p.NLPService):
    """`p.Server(nlp_service=OfflineService.create)`."""

    supports_streaming = False

    @classmethod
    def create(cls, container: p.Container) -> p.NLPService:
        return cls()

    async def get_schematic_generator(
        self, t: type[p.T], hints: p.SchematicGeneratorHints | None = None
    ) -> p.SchematicGenerator[p.T]:
        return OfflineGenerator[t]()

    async def get_streaming_text_generator(self, hints: Any = None) -> Any:
        raise NotImplementedError("the offline service does not stream")

    async def get_embedder(self, hints: p.EmbedderHints | None = None) -> p.Embedder:
        return OfflineEmbedder()

    async def get_moderation_service(self) -> p.ModerationService:
        return p.NoModeration()
