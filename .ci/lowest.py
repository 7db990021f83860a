"""Print `name==floor` for each runtime dependency in pyproject.toml, and for the mysql extra."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for line in project["dependencies"] + project["optional-dependencies"]["mysql"]:
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        continue
    floors = [part.version for part in requirement.specifier if part.operator == ">="]
    if len(floors) != 1:
        raise SystemExit(f"{line}: needs exactly one lower bound")
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    print(f"{requirement.name}{extras}=={floors[0]}")
