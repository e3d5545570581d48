"""Every optimizer of the package, and ``torch.optim.AdamW`` as the reference."""

import pytest
from optimizers import CASES, REFERENCE

ALL = {"AdamW": REFERENCE, **CASES}


@pytest.fixture(params=ALL)
def case(request):
    return ALL[request.param]
