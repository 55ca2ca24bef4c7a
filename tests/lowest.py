"""`python tests/lowest.py`: the lowest versions that setup.cfg allows, for `make test-lowest`."""

import configparser
from pathlib import Path

settings = configparser.ConfigParser()
settings.read(Path(__file__).parent.parent / "setup.cfg")
print(*(line.replace(">=", "==") for line in settings["options"]["install_requires"].split()))
