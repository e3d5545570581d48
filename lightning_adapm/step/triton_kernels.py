"""Triton kernels of a step on CUDA, under the names by which they are launched.

Every launch works on ``b`` matrices of one shape that lie anywhere: their addresses are tables on the device, int64.
Arithmetic is float32 whatever is stored; products round their operands to ``FACTOR`` and add up in float32. What makes
a basis orthonormal is not here. ``flaws`` ``(b / each,)``, int32, is not zero where a gradient, of ``each`` matrices,
has an entry that is not finite. ``TRITON_INTERPRET=1`` runs them on a CPU.
"""

from lightning_adapm.step.triton_averages import advance as advance
from lightning_adapm.step.triton_averages import factor as factor
from lightning_adapm.step.triton_averages import weigh as weigh
from lightning_adapm.step.triton_bases import sketch as sketch
from lightning_adapm.step.triton_directions import bound as bound
from lightning_adapm.step.triton_directions import direct as direct
from lightning_adapm.step.triton_directions import norms as norms
from lightning_adapm.step.triton_directions import rescale as rescale
from lightning_adapm.step.triton_directions import scales as scales
from lightning_adapm.step.triton_moves import move as move
from lightning_adapm.step.triton_orthogonal import symmetric as symmetric
from lightning_adapm.step.triton_reading import combine as combine
from lightning_adapm.step.triton_reading import read as read
from lightning_adapm.step.triton_reading import relate as relate
from lightning_adapm.step.triton_reading import sum_squares as sum_squares
