"""Deep prompts: trained tokens at the input of every LM block (paper, appendix A and table 15)."""

import torch
from torch import nn

from epalm.model.soft_prompt import make_mlp


class DeepPrompt(nn.Module):
    """`length` tokens of the LM's width H for each of its L layers, optionally behind one MLP.

    The paper says that "new soft prompts" are injected in all blocks, and the official option for
    it crashes (bug 11). Read as VPT-deep (arXiv 2203.12119): they stand where the soft prompt
    stands, and before each block those that left the block below are replaced by its own. So their
    number stays `length`, and nothing passes through them from one block to the next. They go into
    block 0 as they are, without OPT-350M's project_in.

    N(0, 1) as the soft prompt. That the MLP is shared by all blocks fits table 15's 0.93 % of
    trained parameters. All its parameters are trained.
    """

    def __init__(self, layers: int, length: int, width: int, mlp: bool):
        super().__init__()
        self.length = length
        self.embedding = nn.Parameter(torch.randn(layers, length, width))
        self.mlp = make_mlp(width) if mlp else nn.Identity()

    def forward(self) -> torch.Tensor:
        """The prompts (L, P, H)."""
        return self.mlp(self.embedding)
