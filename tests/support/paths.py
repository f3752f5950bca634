"""Where the project and the shared test data are."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_DATA = Path(os.environ.get("GPT2_SHARED_DATA", ROOT.parent / "shared" / "data"))
