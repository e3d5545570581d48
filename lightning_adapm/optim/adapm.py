"""AdaPM: AdamW whose momentum depends on a parameter's role in the transformer."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_adapm.moments import policy
from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.optim import options
from lightning_adapm.optim.base import RoleOptimizer
from lightning_adapm.roles.assign import check_heads
from lightning_adapm.roles.context import Named
from lightning_adapm.roles.piece import Piece


class AdaPM(RoleOptimizer):
    """AdamW with partial momentum (AdaPM, arXiv 2510.09103).

    MLPs, which are most of a transformer, keep low-rank momentum with the paper's residual correction. Everything else
    keeps full momentum, in eight bits. In the paper, queries and keys have low-rank momentum, too, and embeddings and
    attention outputs have none; its settings are ``AdaPM(momentum="paper", rank=0.05, state_dtype=None)``.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()`` (names and head counts are then read from the
            module), an iterable of ``(name, tensor)``, or parameter groups whose ``params`` are one of these, or
            which state a ``role``. Where only names are given, a group may also state ``n_head``, ``n_query_groups``
            and ``head_size``.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Constant added to the denominator, outside the root.
        weight_decay: Decoupled weight decay, as in AdamW.
        rank: Rank of the low-rank momentum: an int, or a float in (0, 1] for a share of the smaller dimension of the
            unfused matrix. A piece whose factors would not be smaller keeps full momentum.
        update_proj_gap: Steps between two refreshes of a subspace. Transformer blocks take turns: half of them refresh
            together, or a quarter where matrices are large.
        debias: Whether the residual correction is added to the low-rank momentum.
        second_moment: ``"elementwise"`` (AdamW), ``"factored"`` (Adafactor) or ``"block"`` (Adam-mini). Where memory is
            short, choose factored: on tokens it ended 0.014 +- 0.011 nats below AdamW's best, at AdamW's learning rate
            (three seeds; ``benchmarks/results/tokens_llama_60m.md``). With the compact table on 86 million parameters
            it ended 0.0188 below, and block, which keeps as much, 0.034 above (``benchmarks/results/at_size.md``).
        momentum: Policies that differ from the default, by role, such as ``{"mlp": "full", "lm_head": "none"}``; or
            one policy for every role. The policies are ``"none"``, ``"low_rank"`` and ``"full"``. There are two
            presets: ``"paper"`` is the published table, in which embeddings and attention outputs keep no momentum,
            and ``"compact"`` has low-rank momentum for everything but values and vectors.
        roles: Roles for names, ``{regular expression: role or policy}``, searched in order before any built-in rule.
        unmatched: Policy of matrices without a known role. ``"error"`` refuses and lists them.
        no_decay: Roles exempt from weight decay, for instance ``("norm", "bias")``.
        state_dtype: Dtype of the momentum, or dtypes by policy. The default is ``{"full": "int8", "low_rank":
            "bfloat16"}``, and with a preset or one policy for every role ``{"low_rank": "bfloat16"}``, so that
            ``momentum="full"`` is AdamW. None means float32 (float64 for float64 parameters), and so does a policy
            that is left out. ``"int8"`` stores codes with a scale for each 256 values of a row, and bases in
            bfloat16; norms, biases, adapters and rows of fewer than 8 values stay in float32. The second moment is
            never kept below float32.
        basis: How processes that share the rows of a matrix keep the basis of its low-rank momentum.
            ``"replicate"`` keeps the whole basis on each process. ``"shard"`` keeps a part on each, and gathers the
            basis in every step. ``"auto"`` replicates on up to two processes. Without sharding it has no effect.
        clip_threshold: Bound on each entry of the update in units of ``lr``, for parameters without full momentum: a
            low-rank average mixes columns, so that entries can exceed AdamW's by orders of magnitude. The bound of
            embeddings without momentum is ``1 / (1 - beta1)`` times as large, because a rare token moves in one step,
            where AdamW spreads the move over as many. None means no bound.
        maximize: Whether the objective is maximized.
        rounding: How bfloat16 and float16 parameters are rounded after their update in float32: ``"stochastic"``, up
            or down at random with the right mean, so that updates below half a unit in the last place are not lost;
            or ``"nearest"``.
        update_in_backward: Whether ``step(closure)`` moves parameters and frees their gradients while backward still
            runs. Gradients that wait for others take no more memory than those of the largest transformer block or
            parameter. With several processes, or a backward pass outside of ``step`` (accumulation, a gradient
            scaler), the step is an ordinary one, with a warning.

    Raises:
        ValueError: An option is out of range, or a matrix has no role.
        TypeError: Parameters lack names and roles, or are complex.

    State of a parameter whose matrix is ``(m, n)``, made in the first step for every parameter that requires a
    gradient; "float32" is float64 for float64 parameters. A fused weight has the entries per piece, for instance
    ``query.exp_avg_l``; a stack of matrices ``(b, m, n)`` has ``b`` in front of every shape.

    - ``step``: number of steps, a float32 scalar on the CPU.
    - ``exp_avg`` ``(m, n)``: full momentum, in ``state_dtype``; float32 for vectors.
    - ``exp_avg_l`` ``(m, rank)``, ``exp_avg_r`` ``(rank, n)``, in ``state_dtype``, by default bfloat16, and the int
      ``seeded``: low-rank momentum, its orthonormal basis, and whether every matrix has a basis yet.
    - ``exp_avg_codes`` in int8 and ``exp_avg_scale`` ``(m, n / 256)`` instead of ``exp_avg`` where ``state_dtype`` is
      int8, by default for full momentum of matrices, and the same of ``exp_avg_l``.
    - ``exp_avg_sq``, float32: second moment, ``(m, n)`` elementwise, ``(m, 1)`` or ``(heads, 1)`` by block.
    - ``exp_avg_sq_row`` ``(m, 1)`` and ``exp_avg_sq_col`` ``(1, n)``, float32: factored second moment.

    Numerics: arithmetic is in float32, or float64 for float64 parameters, whatever the dtype of parameters and state.
    Bases are made orthonormal in float64, never in TF32. Kernels of a CUDA step read gradients in their own dtype and
    multiply bases in bfloat16 with float32 sums; the gradient itself is added in float32.

    A gradient with an infinity or a NaN counts as zero for the whole piece; :meth:`nonfinite_gradients` counts these.

    Example::

        optimizer = AdaPM(model.named_parameters(), lr=1e-3, second_moment="factored")
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    """

    structure = ("rank", "second_moment", "momentum", "state_dtype", "basis")
    automatic: ClassVar[options.Automatic] = {"state_dtype": policy.state_dtype_of}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float = policy.DEFAULT_RANK,
        update_proj_gap: int = 10,
        debias: bool = True,
        second_moment: str = "elementwise",
        momentum: Mapping[str, str] | str | None = None,
        roles: Mapping[str, str] | None = None,
        unmatched: str = "error",
        no_decay: Iterable[str] = (),
        state_dtype: options.StateDtype = options.AUTO,
        basis: str = "auto",
        clip_threshold: float | None = 1.0,
        maximize: bool = False,
        rounding: str = "stochastic",
        update_in_backward: bool = False,
        **left_over: Any,
    ) -> None:
        options.check_roles(roles, unmatched)
        table = policy.momentum_table(momentum, unmatched)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "debias": debias,
                "second_moment": second_moment,
                "momentum": table,
                "no_decay": no_decay,
                "state_dtype": state_dtype,
                "basis": basis,
                "clip_threshold": clip_threshold,
                "maximize": maximize,
                "rounding": rounding,
            },
            roles=roles,
            unmatched=unmatched,
            update_in_backward=update_in_backward,
            left_over=left_over,
            roles_matter=len(set(table.values())) > 1,
        )

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        """Choose the momentum of a piece by the table of roles."""
        return policy.momentum_for(piece, shape, group)

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        """Choose the second moment of a piece by the option ``second_moment``."""
        return policy.second_moment_for(piece, shape, group)

    def check_pieces(self, item: Named, pieces: tuple[Piece, ...], group: Mapping[str, Any]) -> None:
        """Refuse block second moments where it is not known which rows are a head's."""
        if group["second_moment"] == "block":
            check_heads(item, pieces)
