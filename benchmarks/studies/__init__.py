"""The studies, as data: what is asked, which variants answer it, and at which learning rates."""

from benchmarks.studies import ablation, at_size, comparison, defaults, finetuning, large, muon, on_tokens, precision
from benchmarks.studies.base import BESIDE, BEST, SIZES, Study, adamw, adapm

STUDIES: dict[str, Study] = {
    make.__name__: make()
    for make in (
        defaults.main,
        defaults.refresh,
        defaults.clamp,
        defaults.leaving,
        defaults.rank,
        defaults.roles,
        defaults.second,
        defaults.beta1,
        defaults.llama,
        defaults.text,
        defaults.longer,
        defaults.finetune,
        defaults.rounding,
        large.gpt2,
        large.update_size,
        at_size.at_size,
        at_size.at_size_llama,
        muon.partial_muon,
        muon.partial_muon_llama,
        on_tokens.tokens_gpt2,
        on_tokens.tokens_llama_60m,
        on_tokens.tokens_llama_130m,
        finetuning.finetune_at_size,
        finetuning.small_card,
        comparison.convergence,
        comparison.instructions,
        comparison.recurrent,
        comparison.images,
        ablation.debias,
        ablation.grid,
        ablation.factoriser,
        ablation.lr_change,
        ablation.each_option,
        precision.state_dtype,
    )
}

GROUPS = {
    "ablation": (
        "debias",
        "factoriser",
        "leaving",
        "lr_change",
        "roles",
        "beta1",
        "clamp",
        "second",
        "recurrent",
        "images",
        "grid",
    ),
}
"""Studies that one command runs, in this order."""

__all__ = ["BESIDE", "BEST", "GROUPS", "SIZES", "STUDIES", "Study", "adamw", "adapm"]
