"""``python -m adk_sessions`` is the command ``adk-sessions``."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="adk-sessions")
