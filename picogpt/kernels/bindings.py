"""The C structures of bindings.h as ctypes structures, and the check that both sides agree.

bindings.h says what each field holds and who writes it. Pointer fields hold data pointers of tensors, which the caller must
keep alive.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from enum import IntEnum

from picogpt.kernels.layout import compare_layouts, fields_of

__all__ = [
    "Activations",
    "Batch",
    "BatchGrads",
    "LayerWeights",
    "MatrixGrad",
    "MuonMatrix",
    "MuonSettings",
    "ParamGrads",
    "Save",
    "WeightGrads",
    "check_layout",
]


# The names are those of bindings.h, where each field has its shape. All pointers are untyped here: the element type is the
# library's, float or bfloat16.


class LayerWeights(Structure):
    """Weights of one block, with its matrices packed; `_back` is packed for the gradient of the input."""

    # Biases and the weights of norms are float32; matrices are in panels of the GEMM's element type.
    _fields_ = fields_of(
        c_void_p,
        "ln1_weight ln1_bias attn attn_back attn_bias proj proj_back proj_bias ln2_weight ln2_bias fc fc_back "
        "fc_bias out out_back out_bias",
    )


class Activations(Structure):
    """Activations of one block for one window; or of the final LayerNorm, as ln1 of a block that does not exist."""

    _fields_ = fields_of(
        c_void_p,
        "x ln1_stats ln1_out qkv att_out softmax_stats resid_mid ln2_stats ln2_out fc fc_gelu d_mlp_out "
        "d_attn_out qkv_scratch fc_scratch ln_scratch branch",
    )


class ParamGrads(Structure):
    """Gradients of one block's weights."""

    _fields_ = fields_of(c_void_p, "ln1 attn attn_bias proj ln2 fc fc_bias out")


class Save(IntEnum):
    """Activations that the forward pass saves for the backward pass: `enum save`."""

    NOTHING = 0  # inference
    INPUTS = 1  # each block's input; everything else is recomputed
    ACTIVATIONS = 2  # all that the backward pass reads


class WeightGrads(IntEnum):
    """When the gradients of the matrices are computed: `enum weight_grads`."""

    PER_WINDOW = 0  # accumulated by each window's backward pass
    DEFERRED = 1  # one GEMM after all windows


class Batch(Structure):
    """Arguments of forward and backward for a batch: all windows of all sequences, through the model without its head."""

    _fields_ = (
        ("weights", POINTER(LayerWeights)),
        ("activations", POINTER(Activations)),
        *fields_of(c_void_p, "wte wpe ids"),
        ("slots", POINTER(c_int32)),
        *fields_of(c_void_p, "hidden residual context"),
        *fields_of(c_int32, "layers sequences windows chars threads save"),
    )


class BatchGrads(Structure):
    """Outputs of the backward pass, and its workspace."""

    _fields_ = (
        ("params", POINTER(ParamGrads)),
        *fields_of(c_void_p, "wte wpe hidden workspace"),
        ("weight_grads", c_int32),
    )


class MatrixGrad(Structure):
    """Arguments of one deferred weight gradient over all windows: sums = left^T right."""

    _fields_ = (
        *fields_of(c_void_p, "sums left right"),
        *fields_of(c_int32, "outputs inputs rows threads"),
    )


class MuonMatrix(Structure):
    """A matrix that Muon updates, with its optimizer state."""

    _fields_ = fields_of(c_void_p, "weights gradient momentum mean_square")


class MuonSettings(Structure):
    """Settings of a Muon update, and the shape of its matrices."""

    _fields_ = (
        ("polynomials", POINTER(c_float)),
        ("gram_reuse", POINTER(c_int32)),
        *fields_of(c_float, "momentum beta2 decay step margin"),
        *fields_of(c_int32, "rows columns matrices threads"),
    )


# In the order of the table that the library exports.
_STRUCTURES: dict[str, type[Structure]] = {
    "layer_weights": LayerWeights,
    "activations": Activations,
    "param_grads": ParamGrads,
    "batch": Batch,
    "batch_grads": BatchGrads,
    "matrix_grad": MatrixGrad,
    "muon_matrix": MuonMatrix,
    "muon_settings": MuonSettings,
}
_CONSTANTS: dict[str, type[IntEnum]] = {"SAVE": Save, "GRADS": WeightGrads}


def check_layout(library: ctypes.CDLL) -> None:
    """Check that the library was compiled with the structures and constants of this module.

    Raises:
        AssertionError: bindings.h or this module was changed without the other.
    """
    # SAVE_NOTHING, SAVE_INPUTS, ..., GRADS_DEFERRED.
    constants = {f"{prefix}_{constant.name}": constant.value for prefix, enum in _CONSTANTS.items() for constant in enum}
    compare_layouts(library, _STRUCTURES, constants, sides="bindings.h and bindings.py")
