"""Where things lie: this clone, and the collections of real input beside it that not every machine has."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
CONFORMANCE = SHARED / "conformance"
