"""What only one of the two stacks has."""

import pytest

from replay import backend

NO_REVERB = "there is no Reverb for this system and Python"
needs_reverb = pytest.mark.skipif(not backend.exists(), reason=NO_REVERB)
