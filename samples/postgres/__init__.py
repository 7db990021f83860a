"""A package of its own, so that an installed one named `postgres` is not taken for the agent."""
