"""A small causal language model: pre-norm blocks of attention and the FFN that is compared.

Shapes: B windows, S symbols, C width, H heads, D head width, V symbols of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from arms import RELU2_HIDDEN, SWIGLU_HIDDEN
from torch import Tensor, nn

from tiny_onn.config.schema_24 import ActSparse24Config
from tiny_onn.model.ffn import ActSparse24MLP, SquaredReLU, SwiGLU


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn = ffn

    def forward(self, x_BSC: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norms[0](x_BSC)).chunk(3, dim=-1)
        )
        attended_BHSD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSC = x_BSC + self.out(attended_BHSD.transpose(1, 2).flatten(2))
        # 2:4 groups flattened tokens, those of all windows.
        update = self.ffn(self.norms[1](x_BSC).flatten(0, 1))
        return x_BSC + update.view_as(x_BSC)


class CharLM(nn.Module):
    """(B, S) symbols -> (B, S, V) logits; learned positions up to ``context``."""

    def __init__(
        self,
        vocab_size: int,
        ffn: str,
        act24: ActSparse24Config,
        *,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context: int = 128,
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            Layer(width, heads, make_ffn(ffn, width, act24)) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
                if deep:
                    p.data /= (2 * layers) ** 0.5
        nn.init.normal_(self.symbols.weight)  # small ones learn far slower in so few steps
        nn.init.normal_(self.positions.weight, std=0.3)
        nn.init.zeros_(self.head.weight)

    def forward(self, symbols_BS: Tensor) -> Tensor:
        places_S = torch.arange(symbols_BS.shape[1], device=symbols_BS.device)
        x_BSC = self.symbols(symbols_BS) + self.positions(places_S)
        for layer in self.layers:
            x_BSC = layer(x_BSC)
        return self.head(self.norm(x_BSC))


def make_ffn(name: str, width: int, act24: ActSparse24Config) -> nn.Module:
    """One FFN by its name, all of about the same size."""
    if name == "swiglu":
        return SwiGLU(width, SWIGLU_HIDDEN)
    if name == "relu2":
        return SquaredReLU(width, RELU2_HIDDEN)
    if name == "relu2_act24":
        return ActSparse24MLP(width, RELU2_HIDDEN, act24)
    raise ValueError(f"got ffn={name}; expected swiglu, relu2 or relu2_act24; change the arm")
