"""A travel desk: `root_agent` is what `adk run` and `adk web` look for."""

from google.adk.agents import Agent
from google.adk.tools import ToolContext
from offline_model import gemini_or_offline


def plan_trip(name: str, city: str, tool_context: ToolContext) -> str:
    """Notes who travels and the city they want to see."""
    state = tool_context.state
    state.update({"city": city, "user:name": name, "app:latest_city": city})
    return f"A trip to {city} is noted, {name}."


root_agent = Agent(
    name="travel_desk",
    description="Plans trips and remembers travellers.",
    model=gemini_or_offline(),
    instruction="""
You plan trips. As soon as you know a traveller's name and city, note them with `plan_trip`.
Address travellers by name. The notes so far:
name: {user:name?}
city: {city?}
""",
    tools=[plan_trip],
)
