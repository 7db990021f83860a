"""Print the requirements of an extra in pyproject.toml: for tools that need not the package."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
print(" ".join(line.replace(" ", "") for line in project["optional-dependencies"][sys.argv[1]]))
