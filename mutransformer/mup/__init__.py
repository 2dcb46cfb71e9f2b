"""The parametrization: how a weight is initialized and trained, given its role and the size of the model.

Imports nothing of the rest of the package. What it needs of a weight is in `Parameter`, of the model in `Scaling`.
"""

from mutransformer.mup.init import init_weights
from mutransformer.mup.rules import (
    RULES,
    Init,
    LrFactors,
    Parameter,
    Role,
    Scaling,
    betas,
    decay_multiplier,
    eps_multiplier,
    forward_multiplier,
    init_std,
    lr_multiplier,
    uses_muon,
)
