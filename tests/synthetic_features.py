"""Statistics and encoders whose answer is known."""

import torch

from terratorch_simpler.criteria import Statistics


def random_statistics(blocks: int, seed: int) -> Statistics:
    generator = torch.Generator().manual_seed(seed)

    def symmetric():
        a = torch.rand(blocks + 1, blocks + 1, generator=generator, dtype=torch.float64)
        return (a + a.T) / 2

    hsic, cosine, angle = symmetric(), symmetric(), symmetric()
    hsic.fill_diagonal_(1.0)
    cosine.fill_diagonal_(1.0)
    return Statistics(hsic, cosine, angle.fill_diagonal_(0.0))


def make_identity(block):
    """A block whose residual branches add nothing."""
    with torch.no_grad():
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()


def idle(build, blocks, seed=0):
    """An encoder whose given blocks add nothing."""
    torch.manual_seed(seed)
    backbone = build()
    with torch.no_grad():
        for number, block in enumerate(backbone.blocks):
            if number in blocks:
                make_identity(block)
            else:
                block.mlp.fc2.weight.mul_(0.3)
                block.attn.proj.weight.mul_(0.3)
    return backbone
