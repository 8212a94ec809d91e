"""A linear layer by oneDNN, on a CPU in bfloat16, as torch's own compiler calls it."""

import torch


def linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool = False
) -> torch.Tensor:
    """(…, I) to (…, O), with weights (O, I) in any order of oneDNN's; no graph is made.

    Args:
        relu: of it, too.
    """
    then = "relu" if relu else "none"
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, then, [], "")
    return out
