"""The optimizers, and the engine that they share."""

from lightning_adapm.optim.adam_mini import AdamMini
from lightning_adapm.optim.adapm import AdaPM
from lightning_adapm.optim.base import RoleOptimizer
from lightning_adapm.optim.lomo import AdaLomo, Lomo
from lightning_adapm.optim.lora_pre import LoRAPre
from lightning_adapm.optim.partial_muon import PartialMuon

__all__ = ["AdaLomo", "AdaPM", "AdamMini", "LoRAPre", "Lomo", "PartialMuon", "RoleOptimizer"]
