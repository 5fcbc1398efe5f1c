"""What operations of torch do to a shard, by their names. An unknown one is refused."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Read no values of the table, or work on each item alone.
PASSED = _names(
    """
    __dir__ __format__ __hash__ __repr__ __setstate__ _has_compatible_shallow_copy_type
    _is_view _typed_storage allclose as_subclass backward can_cast chunk data_ptr dim dim_order
    element_size empty_like equal flatten_dense_tensors full_like get_device grad is_complex
    is_conj is_contiguous is_floating_point is_inference is_neg is_pinned is_same_size is_set_to
    is_shared is_signed module_load ndimension nelement new new_empty new_empty_strided new_full
    new_ones new_tensor new_zeros numel ones_like record_stream register_hook
    register_post_accumulate_grad_hook requires_grad_ result_type retain_grad share_memory_ size
    storage storage_offset storage_type stride unflatten_dense_tensors untyped_storage zeros_like
    """
)

# Return a tensor of the shape of the shard, which is a shard as well.
KEPT = _names(
    """
    __add__ __and__ __div__ __eq__ __ge__ __gt__ __invert__ __le__ __lt__ __mul__ __ne__ __neg__
    __or__ __pos__ __pow__ __radd__ __rdiv__ __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__
    __truediv__ abs add addcdiv addcmul alias bfloat16 ceil clamp clamp_max clamp_min clip clone
    contiguous copysign cpu cuda detach div divide double eq exp expm1 float float_power floor
    fmod frac ge greater greater_equal gt half isclose isfinite isinf isnan le lerp less
    less_equal log log1p log2 logical_and logical_not logical_or lt masked_fill maximum minimum
    mul multiply nan_to_num ne neg negative not_equal pin_memory positive pow reciprocal
    remainder reshape_as round rsqrt rsub sgn sigmoid sign sqrt square sub subtract tanh to
    true_divide trunc type type_as view_as where xpu
    """
)

# Modify the shard in place, item by item.
IN_PLACE = _names(
    """
    __iadd__ __idiv__ __imul__ __ipow__ __isub__ __itruediv__ abs_ add_ addcdiv_ addcmul_ clamp_
    clamp_max_ clamp_min_ clip_ constant_ copy_ detach_ div_ divide_ exp_ fill_ float_power_
    lerp_ masked_fill_ mul_ multiply_ nan_to_num_ neg_ ones_ pow_ reciprocal_ resize_as_ round_
    rsqrt_ set_ sign_ sqrt_ square_ sub_ subtract_ true_divide_ zero_ zeros_
    """
)

# Return a view of another shape, for flat buffers.
FLAT = _names("flatten ravel reshape view")

# Split a flat view into plain tensors, or concatenate it to a vector of Parameters.
PIECES = _names("__getitem__ narrow reshape reshape_as split unflatten view view_as")
VECTOR = _names("cat concat concatenate")

# For sparse gradients: operations that read no items, and ones that return the items.
SPARSE = _names("_coalesced_ _indices _nnz dense_dim indices is_coalesced sparse_dim sparse_mask")
VALUES = _names("_values coalesce to_dense values")

TRANSPOSED = _names("H T mH mT")

# Operators of a graph, which was checked when traced. Others may be custom, as a fused loss.
OF_GRAPHS = _names("aten higher_order prim prims tp_embed")
FOREACH_REDUCTIONS = _names("_foreach_max _foreach_norm _foreach_powsum")
