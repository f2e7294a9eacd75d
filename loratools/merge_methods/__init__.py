"""Ways of making one change of a layer out of several; ``METHODS`` is the table of them.

Importing this package imports neither torch nor any method: a row names the function that does the
work, and ``load_function`` imports it.

Every method works layer by layer on ΔW₁ ... ΔW_T and weights w₁ ... w_T. A layer that an adapter
lacks counts as zero. All weights times c gives c times the result, unless the row says that the
weights are shares, which sum to 1 before anything else happens.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from loratools.errors import OptionError
from loratools.merge_methods.method import Method
from loratools.suggest import did_you_mean

_HERE = "loratools.merge_methods"
_SPAN, _SPECTRAL = f"{_HERE}.span", f"{_HERE}.spectral"
_ELEMENTS, _FACTORS, _PEFT = f"{_HERE}.elementwise", f"{_HERE}.factors", f"{_HERE}.peft"

_TASK_ARITHMETIC = "arXiv:2212.04089"
_TIES, _DARE, _DELLA = "arXiv:2306.01708", "arXiv:2311.03099", "arXiv:2406.11617"
_BREADCRUMBS, _SCE, _HAN = "arXiv:2312.06795", "arXiv:2408.07990", "arXiv:1506.02626"
_CORE = "arXiv:2509.17786"
_PEFT_DOCS = "https://huggingface.co/docs/peft/developer_guides/model_merging"

METHODS: tuple[Method, ...] = (
    Method("linear", "the sum Σ wᵢΔWᵢ, exact at rank Σrᵢ", _TASK_ARITHMETIC, "span",
           f"{_SPAN}:linear", identity=True),
    Method("svd", "the sum, in the fewest ranks; best approximation of it with --rank",
           "doi:10.1007/BF02288367", "span", f"{_SPAN}:linear", identity=True, reduces=True),
    Method("slerp", "great circle between two changes", "doi:10.1145/325165.325242", "span",
           f"{_SPAN}:slerp", identity=True, shares=True, inputs=2),
    Method("nuslerp", "the same as mergekit's NuSLERP does it: linear only where parallel",
           "doi:10.1145/325165.325242", "span", f"{_SPAN}:nuslerp", identity=True, shares=True,
           inputs=2),
    Method("karcher", "mean of directions on the sphere, times the mean length",
           "doi:10.1002/cpa.3160300502", "span", f"{_SPAN}:karcher", identity=True, shares=True),
    Method("tsv-m", "task singular vectors, made orthogonal to each other", "arXiv:2412.00081",
           "rotation", f"{_SPECTRAL}:tsv_m", identity=True),
    Method("iso-c", "the sum with all its singular values set to their mean", "arXiv:2502.04959",
           "rotation", f"{_SPECTRAL}:iso_c"),
    Method("knots-ties", "TIES in the common basis of all changes", "arXiv:2410.19735", "factors",
           f"{_FACTORS}:knots_ties", density=0.2, identity_at_full_density=True),
    Method("knots-dare-ties", "DARE, then TIES, in the common basis of all changes",
           "arXiv:2410.19735", "factors", f"{_FACTORS}:knots_dare_ties", density=0.5, seeded=True,
           identity_at_full_density=True),
    Method("ties", "trim, elect a sign, average those that agree", _TIES, "dense",
           f"{_ELEMENTS}:ties", density=0.2, identity_at_full_density=True),
    Method("dare-linear", "drop elements at random, rescale, sum", _DARE, "dense",
           f"{_ELEMENTS}:dare_linear", density=0.5, seeded=True, identity_at_full_density=True),
    Method("dare-ties", "drop elements at random, rescale, elect a sign, average", _DARE, "dense",
           f"{_ELEMENTS}:dare_ties", density=0.5, seeded=True, identity_at_full_density=True),
    Method("della", "drop small elements more often, rescale, elect a sign, average", _DELLA,
           "dense", f"{_ELEMENTS}:della", density=0.5, seeded=True,
           identity_at_full_density=True),
    Method("della-linear", "drop small elements more often, rescale, sum", _DELLA, "dense",
           f"{_ELEMENTS}:della_linear", density=0.5, seeded=True,
           identity_at_full_density=True),
    Method("breadcrumbs", "drop the largest and the smallest elements, sum", _BREADCRUMBS, "dense",
           f"{_ELEMENTS}:breadcrumbs", density=0.15, identity_at_full_density=True),
    Method("sce", "elements that vary most, weighted by energy, minority signs erased", _SCE,
           "dense", f"{_ELEMENTS}:sce", density=0.1),
    Method("magnitude-prune", "drop the smallest elements, sum", _HAN, "dense",
           f"{_ELEMENTS}:magnitude_prune", density=0.5, identity_at_full_density=True),
    Method("core-ties", "ties on the R×R cores", _CORE, "core", f"{_ELEMENTS}:ties", density=0.2,
           identity_at_full_density=True),
    Method("core-dare-linear", "dare-linear on the R×R cores", _CORE, "core",
           f"{_ELEMENTS}:dare_linear", density=0.5, seeded=True, identity_at_full_density=True),
    Method("core-dare-ties", "dare-ties on the R×R cores", _CORE, "core",
           f"{_ELEMENTS}:dare_ties", density=0.5, seeded=True, identity_at_full_density=True),
    Method("core-della", "della on the R×R cores", _CORE, "core", f"{_ELEMENTS}:della",
           density=0.5, seeded=True, identity_at_full_density=True),
    Method("core-della-linear", "della-linear on the R×R cores", _CORE, "core",
           f"{_ELEMENTS}:della_linear", density=0.5, seeded=True,
           identity_at_full_density=True),
    Method("core-breadcrumbs", "breadcrumbs on the R×R cores", _CORE, "core",
           f"{_ELEMENTS}:breadcrumbs", density=0.15, identity_at_full_density=True),
    Method("core-sce", "sce on the R×R cores", _CORE, "core", f"{_ELEMENTS}:sce", density=0.1),
    Method("core-magnitude-prune", "magnitude-prune on the R×R cores", _CORE, "core",
           f"{_ELEMENTS}:magnitude_prune", density=0.5, identity_at_full_density=True),
    Method("robust", "factors pruned, rows rescaled, scales normalised across adapters",
           "arXiv:2502.17159", "factors", f"{_FACTORS}:robust", density=0.8, equal_ranks=True,
           identity_at_full_density=True),
    Method("peft-cat", "PEFT's cat: the exact sum", _PEFT_DOCS, "factors", f"{_PEFT}:cat",
           identity=True),
    Method("peft-svd", "PEFT's svd: the exact sum, truncated", _PEFT_DOCS, "span",
           f"{_SPAN}:linear", identity=True, reduces=True),
    Method("peft-linear", "PEFT's linear: (Σ√wᵢBᵢ)(Σ√wᵢAᵢ), with cross terms", _PEFT_DOCS,
           "factors", f"{_PEFT}:linear", equal_ranks=True, identity=True),
    Method("peft-ties", "PEFT's ties, on each factor", _PEFT_DOCS, "factors", f"{_PEFT}:ties",
           density=0.5, equal_ranks=True, identity_at_full_density=True),
    Method("peft-dare-linear", "PEFT's dare_linear, on each factor", _PEFT_DOCS, "factors",
           f"{_PEFT}:dare_linear", density=0.5, seeded=True, equal_ranks=True,
           identity_at_full_density=True),
    Method("peft-dare-ties", "PEFT's dare_ties, on each factor", _PEFT_DOCS, "factors",
           f"{_PEFT}:dare_ties", density=0.5, seeded=True, equal_ranks=True,
           identity_at_full_density=True),
    Method("peft-magnitude-prune", "PEFT's magnitude_prune, on each factor", _PEFT_DOCS,
           "factors", f"{_PEFT}:magnitude_prune", density=0.5, equal_ranks=True,
           identity_at_full_density=True),
    Method("peft-ties-svd", "PEFT's ties_svd, on ΔW", _PEFT_DOCS, "dense", f"{_PEFT}:ties_svd",
           density=0.5, identity_at_full_density=True),
    Method("peft-dare-linear-svd", "PEFT's dare_linear_svd, on ΔW", _PEFT_DOCS, "dense",
           f"{_PEFT}:dare_linear_svd", density=0.5, seeded=True, identity_at_full_density=True),
    Method("peft-dare-ties-svd", "PEFT's dare_ties_svd, on ΔW", _PEFT_DOCS, "dense",
           f"{_PEFT}:dare_ties_svd", density=0.5, seeded=True, identity_at_full_density=True),
    Method("peft-magnitude-prune-svd", "PEFT's magnitude_prune_svd, on ΔW", _PEFT_DOCS, "dense",
           f"{_PEFT}:magnitude_prune_svd", density=0.5, identity_at_full_density=True),
)  # fmt: skip


def get_method(name: str) -> Method:
    """Return the method called ``name``; raises OptionError with the nearest names."""
    for row in METHODS:
        if row.name == name:
            return row
    raise OptionError(
        f"unknown method {name!r}",
        hint=did_you_mean(name, [row.name for row in METHODS])
        + " (`loratools methods` lists them)",
    )


def load_function(method: Method) -> Callable[..., Any]:
    """Import the function of a row; what it takes depends on the row's ``space``."""
    module, _, name = method.function.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
