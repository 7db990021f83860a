"""An agent whose one tool writes state at all three scopes."""

from google.adk.agents import Agent
from google.adk.tools import ToolContext
from offline_model import gemini_or_offline


def remember(name: str, topic: str, tool_context: ToolContext) -> str:
    """Remembers the user's name and what they want to talk about."""
    tool_context.state["topic"] = topic  # for this session
    tool_context.state["user:name"] = name  # for every session of this user
    tool_context.state["app:latest_topic"] = topic  # for every user of this app
    return f"Nice to meet you, {name}. Let us talk about {topic}."


root_agent = Agent(
    name="assistant",
    model=gemini_or_offline(),
    instruction="""
You are a friendly assistant. Call the tool `remember` when users say their name and a topic.
Greet them by name. What you know of them (nothing, if the lines are empty):
name: {user:name?}
topic: {topic?}
""",
    tools=[remember],
)
