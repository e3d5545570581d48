"""The classes of docs/extending.md, as the page defines them."""

import re
from typing import Any

from commands import REPOSITORY
from models import PlainLM

PAGE: dict[str, Any] = {"model": PlainLM(), "print": str}
exec("".join(re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "extending.md").read_text(), re.S)), PAGE)

SignMomentum, Float8, SignAdam = (PAGE[name] for name in ("SignMomentum", "Float8", "SignAdam"))
