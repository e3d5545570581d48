"""Optimizers that write down how they were built, to be named on a command line: ``reporting.ReportingAdaPM``."""

import json
import os
from pathlib import Path

from lightning_adapm import AdaPM
from lightning_adapm.roles.context import normalize

REPORT = "OPTIMIZER_REPORT"
"""The environment variable with the file to write."""


def describe(optimizer):
    """What an AdaPM does with every parameter that trains: its pieces with their moments, by normalized name."""
    found = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if param.requires_grad:
                found[normalize(name)] = [
                    [str(part.piece), list(part.shape), str(part.first), str(part.second)]
                    for part in optimizer.parts(param)
                ]
    return found


class ReportingAdaPM(AdaPM):
    """AdaPM that writes itself, and the rate of every step, into a file of each process."""

    def step(self, closure=None):
        file = Path(os.environ[REPORT] + os.environ.get("LOCAL_RANK", "0").replace("0", ""))
        report = json.loads(file.read_text()) if file.exists() else {"roles": describe(self), "lr": []}
        report["lr"].append(self.param_groups[0]["lr"])
        file.write_text(json.dumps(report))
        return super().step(closure)
