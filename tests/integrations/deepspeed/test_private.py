"""One module has all private names of DeepSpeed, and the installed DeepSpeed has them."""

from __future__ import annotations

import inspect
from importlib import import_module

import deepspeed
import pytest

import private_names

PRIVATE = "integrations/deepspeed/private.py"
TREES = dict(private_names.sources("tp_embed", "integrations"))

# The modules with documented names.
DOCUMENTED = {
    "deepspeed",
    "deepspeed.accelerator",
    "deepspeed.comm",
    "deepspeed.pipe",
    "deepspeed.utils",
    "deepspeed.zero",
}

# Attributes of objects, and the modules of DeepSpeed that set or read them.
ATTRIBUTES = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "deepspeed.utils.groups",
    "_config": "deepspeed.runtime.engine",
    "_consolidated_16bit_state_dict": "deepspeed.runtime.engine",
    "_dp_group": "deepspeed.utils.mixed_precision_linkage",
    "_get_buffer_names": "deepspeed.runtime.engine",
    "_get_gradients_for_reduction": "deepspeed.runtime.engine",
    "_get_norm_groups": "deepspeed.runtime.zero.stage3",
    "_get_optimizer_loss_scale": "deepspeed.runtime.engine",
    "_hp_mapping": "deepspeed.utils.mixed_precision_linkage",
    "_index_in_param_group": "deepspeed.utils.mixed_precision_linkage",
    "_layer_specs": "deepspeed.runtime.pipe.module",
    "_link_all_hp_params": "deepspeed.runtime.zero.stage_1_and_2 deepspeed.runtime.zero.stage3 "
    "deepspeed.runtime.bf16_optimizer",
    "_load_checkpoint": "deepspeed.runtime.engine",
    "_take_model_step": "deepspeed.runtime.engine deepspeed.runtime.pipe.engine",
    "_tp_partition": "deepspeed.module_inject.layers",
    "_z3_optimizer": "deepspeed.runtime.zero.stage3 deepspeed.utils.tensor_fragment",
    "_zero3_consolidated_16bit_state_dict": "deepspeed.runtime.engine",
    "clip_fp32_gradients": "deepspeed.runtime.engine",
    "ds_id": "deepspeed.runtime.zero.partition_parameters",
    "ds_optim_param": "deepspeed.runtime.engine",
    "ds_process_group": "deepspeed.runtime.zero.partition_parameters",
    "gather_params": "deepspeed.module_inject.layers",
    "get_local_fp32_grad_for_param": "deepspeed.runtime.zero.stage3",
    "get_lp_grad_fragment": "deepspeed.utils.tensor_fragment",
    "load_universal_checkpoint": "deepspeed.runtime.config",
    "lp_fragment_address": "deepspeed.utils.tensor_fragment",
    "scaled_global_norm": "deepspeed.runtime.zero.stage_1_and_2",
    "torch_autocast_z0_gradscaler": "deepspeed.runtime.engine",
}


def undocumented(path: str) -> set[str]:
    names = private_names.names_of(TREES[path], "deepspeed")
    return {n for n in names if n not in DOCUMENTED and n.rpartition(".")[0] not in DOCUMENTED}


@pytest.mark.parametrize("name", sorted(undocumented(PRIVATE)))
def test_deepspeed_has_the_private_name(name):
    version = deepspeed.__version__
    assert private_names.exists(name), f"DeepSpeed {version} has no `{name}`: see {PRIVATE}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_deepspeed_has_the_private_attribute(name):
    for module in ATTRIBUTES[name].split():
        source = inspect.getsource(import_module(module))
        assert name in private_names.words(source), (
            f"DeepSpeed {deepspeed.__version__} has no `{name}` in `{module}`: see {PRIVATE}"
        )


def test_the_private_attributes_are_those_that_are_used():
    tree = TREES[PRIVATE]
    of_modules = {name.rpartition(".")[2] for name in private_names.names_of(tree, "deepspeed")}
    used = set(private_names.attributes(tree, private_names.is_private)) - of_modules
    text = private_names.words((private_names.ROOT / PRIVATE).read_text())
    assert used <= ATTRIBUTES.keys() <= text


def test_private_names_stand_in_one_module():
    private = {name for name in ATTRIBUTES if private_names.is_private(name)}
    found = {}
    for path, tree in TREES.items():
        used = set(private_names.attributes(tree, private.__contains__))
        found[path] = undocumented(path) | used
    del found[PRIVATE]
    assert not {path: names for path, names in found.items() if names}, f"Put them into {PRIVATE}."


def test_versions_of_deepspeed_that_are_allowed_are_those_that_are_tested():
    private_names.check_bounds("deepspeed", parts=3)
