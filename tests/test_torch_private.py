"""One module has all private names of torch, and the installed torch has them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import private_names

PRIVATE = "tp_embed/_torch_private.py"
TREES = dict(
    private_names.sources("tp_embed", "integrations/deepspeed", "integrations/transformers")
)

OF_MODULES = set(dir(nn.Linear(1, 1)))
OF_OTHERS = set(dir(nn.Parameter(torch.zeros(1)))) | set(dir(dist.ProcessGroup)) | {"_metadata"}


def of_functions(path: str) -> set[str]:
    """Returns private names that are attributes of torch's modules and classes."""
    names = private_names.names_of(TREES[path], "torch")
    return {n for n in names if any(map(private_names.is_private, n.split(".")))}


def of_objects(path: str) -> set[str]:
    """Returns private names that are attributes of modules and tensors."""
    known = OF_MODULES | OF_OTHERS
    return set(
        private_names.attributes(
            TREES[path], lambda name: private_names.is_private(name) and name in known
        )
    )


def module_names() -> tuple[str, ...]:
    """Reads names without an import, which would fail on a missing one."""
    return private_names.constant(TREES[PRIVATE], "MODULE_NAMES")


@pytest.mark.parametrize("name", sorted(of_functions(PRIVATE)))
def test_torch_has_the_private_name(name):
    assert private_names.exists(name), f"torch {torch.__version__} has no `{name}`: see {PRIVATE}"


@pytest.mark.parametrize("name", module_names())
def test_modules_have_the_private_name(name):
    assert name in OF_MODULES, f"`nn.Module` of torch {torch.__version__} has no `{name}`"


@pytest.mark.parametrize(
    "name",
    [
        "_backward_hooks",
        "_coalesced_",
        "_indices",
        "_post_accumulate_grad_hooks",
        "_values",
        "_version",
    ],
)
def test_tensors_have_the_private_name(name):
    assert name in of_objects(PRIVATE), "Take it out of this test."
    assert hasattr(nn.Parameter(torch.zeros(1)), name)


def test_process_groups_and_state_dicts_have_the_private_names():
    state_dict: Any = nn.Linear(1, 1).state_dict()
    assert state_dict._metadata.keys() == {""}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert isinstance(backend.options._timeout, timedelta)
    finally:
        dist.destroy_process_group()


def test_private_names_stand_in_one_module():
    shared = set(module_names())
    found = {path: of_functions(path) | (of_objects(path) - shared) for path in TREES}
    del found[PRIVATE]
    assert not {path: names for path, names in found.items() if names}, f"Put them into {PRIVATE}."


def test_versions_of_torch_that_are_allowed_are_those_that_are_tested():
    private_names.check_bounds("torch", parts=2)
