"""What the samples talk to when there is no API key: a model of rules that needs no network."""

import inspect
import os
import re
from collections.abc import AsyncGenerator

from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.genai import types

KEYS = ("GOOGLE_API_KEY", "GEMINI_API_KEY")
VERTEX = ("GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_GENAI_USE_ENTERPRISE")
# google-adk logs a warning about every answer that says nothing of tokens.
NO_USAGE = types.GenerateContentResponseUsageMetadata(prompt_token_count=0, total_token_count=0)


def gemini_or_offline() -> str | BaseLlm:
    """Gemini if the environment has credentials for it, the model below if not."""
    key = any(os.environ.get(name) for name in KEYS)
    vertex = any(os.environ.get(name, "").lower() in ("1", "true") for name in VERTEX)
    return "gemini-2.5-flash" if key or vertex else OfflineModel(model="offline")


class OfflineModel(BaseLlm):
    """Calls the agent's one tool when the user names its arguments, else answers what it knows.

    "My name is Ada and my topic is sailing" calls a tool that takes `name` and `topic`. An answer
    is made of the lines `name: Ada` of the agent's instruction and of the messages so far, so it
    shows whether state and events have come back from the database.
    """

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        yield LlmResponse(content=types.ModelContent(_reply(llm_request)), usage_metadata=NO_USAGE)


def _reply(request: LlmRequest) -> types.Part:
    last = request.contents[-1].parts[-1]
    if last.function_response:
        return types.Part(text=last.function_response.response["result"])

    (tool,) = request.tools_dict.values()
    wanted = [name for name in inspect.signature(tool.func).parameters if name != "tool_context"]
    said = {name: re.search(rf"\b{name} is (\w+)", last.text, re.IGNORECASE) for name in wanted}
    if all(said.values()):
        arguments = {name: match[1] for name, match in said.items()}
        return types.Part.from_function_call(name=tool.name, args=arguments)

    known = dict(re.findall(r"^(\w+): (.+)$", request.config.system_instruction, re.MULTILINE))
    if "name" not in known:
        example = ", ".join(f"my {name} is ..." for name in wanted)
        return types.Part(text=f"We have not met yet. Tell me: {example}")
    name = known.pop("name")
    greeting = f"Welcome back, {name}!" if last.text.startswith("Hello") else f"Yes, {name}."
    facts = " and ".join(f"your {fact} is {value}" for fact, value in known.items())
    facts = facts or "no more than that"
    asked = [p.text for c in request.contents if c.role == "user" for p in c.parts if p.text]
    return types.Part(text=f"{greeting} I know {facts}; this is your message {len(asked)} here.")
