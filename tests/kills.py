"""When tests kill what they have started."""

import os
import random

# Another in each session, so that in time all moments are tried; the session's header and a failure
# name it, and the environment variable repeats it.
KILL_SEED = os.environ["KILL_SEED"]


def moments(name: str) -> random.Random:
    """Random numbers of this test, the same whichever tests run beside it."""
    return random.Random(f"{KILL_SEED} {name}")
