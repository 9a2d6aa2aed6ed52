"""Blocks of the model in C, compiled on the machine that trains: see `compiled` for what there is, `block` for how it is used."""

from picogpt.kernels.block import FusedBlocks
from picogpt.kernels.compiled import Kernels, Use, addresses, choose_kernels, compile_kernels, kernels_name

__all__ = ["FusedBlocks", "Kernels", "Use", "addresses", "choose_kernels", "compile_kernels", "kernels_name"]
