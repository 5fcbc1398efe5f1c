"""Objects of DeepSpeed in its files, by the names of their classes, which are not imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FragmentAddress:
    """Where a Parameter is in a flat tensor of ZeRO 1 or 2."""

    numel: int
    start: int


class LossScaler:
    """The scale of the loss where it needs none. ZeRO 3 takes it from the checkpoint."""

    def __init__(self) -> None:
        self.cur_scale = 1.0
        self.dynamic = False


WRITTEN: dict[str, type] = {
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
}
