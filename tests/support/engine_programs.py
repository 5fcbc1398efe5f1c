"""Random programs of a DeepSpeed engine, as :mod:`programs` has for a table.

A :class:`Machine` runs a program on our engine over gangs of `tp_size` ranks. Another one runs it
on DeepSpeed's engine, where every rank has the whole model and the batches of its gang.
"""

from __future__ import annotations

import gc
import os
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional

from engines_job import mpu_over
from launch import environment
from programs import OPTIMIZERS, Op, Seen, Spec, in_place, make_ids, noise, term
from tp_embed import OutputHead
from tp_embed.integrations.deepspeed import initialize

# The states of optimizers other than Adams.
MOMENTS: dict[str, tuple[str, ...]] = {
    "SGD": (),
    "momentum": ("momentum_buffer",),
    "Adagrad": ("sum",),
    "RMSprop": ("square_avg",),
}


@dataclass(frozen=True)
class EngineSpec(Spec):
    """``by`` says what cuts the rest of the model: nothing ("mpu") or AutoTP."""

    tp_size: int = 2
    neighbours: bool = True
    by: str = "mpu"
    stage: int = 1
    accumulated: int = 1
    clipping: float = 0.0
    given: str = "made"  # The optimizer: "made", by a "function", or by the "config".
    zero: tuple[tuple[str, Any], ...] = ()
    frozen: bool = False

    @property
    def exact(self) -> bool:
        return False  # Data-parallel ranks and AutoTP sum in another order.

    @property
    def confuses_state(self) -> bool:
        """Whether DeepSpeed looks for state on other ranks than hold it, and hangs."""
        return "round_robin_gradients" in dict(self.zero) and self.stage in (1, 2)

    @property
    def config(self) -> dict[str, Any]:
        adam = {"type": "AdamW", "params": {"lr": 0.1, "eps": 1e-3, "torch_adam": True}}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulated,
            "gradient_clipping": self.clipping,
            "zero_optimization": {
                "stage": self.stage,
                "stage3_gather_16bit_weights_on_model_save": True,
                **dict(self.zero),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.dtype == "bfloat16"},
            **({"optimizer": adam} if self.given == "config" else {}),
        }


class Model(nn.Module):
    def __init__(self, spec: EngineSpec) -> None:
        super().__init__()
        rows, dim = spec.rows, spec.dim
        table = (noise(0, rows, dim) - 0.75).float()
        self.embed = nn.Embedding(rows, dim, spec.pad_idx, sparse=spec.sparse, _weight=table)
        self.embed.weight.requires_grad_(not spec.frozen)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.head: Any = None
        if spec.head is not None:
            self.head = nn.Linear(dim, rows, bias=spec.head == "biased")
        for i, parameter in enumerate(self.parameters()):
            if parameter is not self.embed.weight:
                parameter.data.copy_(noise(i, *parameter.shape) - 0.75)
        if self.head is not None and spec.head != "untied":
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, hows: list[Any], loss: str, arrives: str, inplace: str, *of: Tensor) -> Any:
        """Returns the loss, and logits or outputs; ``of`` alternates ids and factors."""
        terms, seen = [], []
        for how, ids, factors in zip(hows, of[::2], of[1::2], strict=True):
            output = in_place(how["inplace"], self.embed(ids), factors.to(self.embed.weight.dtype))
            if how["hook"] and output.requires_grad:
                output.register_hook(lambda grad: grad * 2)
            output = output + self.down(self.up(output).tanh())
            seen.append(output.detach().clone())
            if self.head is None:
                terms.append(term(arrives, output, factors.to(output.dtype)))
            elif loss == "of the head" and isinstance(self.head, OutputHead):
                terms.append(self.head.loss(output, ids))
            elif loss == "term":
                logits = self.head(output)
                seen.append(logits.detach().clone())
                logits = in_place(inplace, logits, noise(3, *logits.shape).to(logits.dtype))
                terms.append(term(arrives, logits, noise(4, *logits.shape).to(logits.dtype)))
            else:
                logits = self.head(output).flatten(0, -2)
                terms.append(functional.cross_entropy(logits.float(), ids.flatten().long()))
        return torch.stack([t.float() for t in terms]).sum(), seen


_mpus: dict[tuple[int, bool], Any] = {}


def _mpu(tp_size: int, neighbours: bool) -> Any:
    """Makes an mpu once per process, since groups stay."""
    if (tp_size, neighbours) not in _mpus:
        ranks = torch.arange(dist.get_world_size())
        gangs = ranks.view(-1, tp_size) if neighbours else ranks.view(tp_size, -1).T
        _mpus[tp_size, neighbours] = mpu_over(gangs.tolist())
    return _mpus[tp_size, neighbours]


def start_deepspeed() -> None:
    """Sets up a process as a launcher does. Disables DeepSpeed's own collectives, which are built
    on first use: a pool may end its processes at any time."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({**environment(), **address, **ranks})
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    deepspeed.utils.logger.setLevel("ERROR")


class Machine:
    """Runs the operations of a program. Each returns its observations, gathered over the gang."""

    def __init__(self, spec: EngineSpec, is_ours: bool) -> None:
        self.spec, self.is_ours = spec, is_ours
        self.mpu = _mpu(spec.tp_size, spec.neighbours)
        self.engine: Any = None
        # State that all data-parallel ranks have; reading other state hangs in DeepSpeed.
        self.reduced = self.stepped = False
        self.directory = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
        dist.broadcast_object_list(self.directory)

    def run(self, op: Op) -> Seen:
        name, arguments = op
        seen: Seen = getattr(self, name)(**arguments)
        return seen

    @property
    def weight(self) -> Any:
        return self.engine.module.embed.weight

    @property
    def moments(self) -> tuple[str, ...]:
        adam = "exp_avg", "exp_avg_sq"
        name = "Adam" if self.spec.given == "config" else self.spec.optimizer
        return MOMENTS.get(name, adam) if self.stepped else ()

    def initialize(self) -> Seen:
        model, spec = Model(self.spec), self.spec
        options: dict[str, Any] = {"model": model}
        if spec.given == "made":
            trained = [p for p in model.parameters() if p.requires_grad]
            options["optimizer"] = OPTIMIZERS[spec.optimizer](trained)
        elif spec.given == "function":
            options["optimizer"] = OPTIMIZERS[spec.optimizer]
        config = spec.config
        if not self.is_ours:
            alone = _mpu(1, True)
            self.engine = deepspeed.initialize(config=config, mpu=alone, **options)[0]
            return self._table()
        config["tp_embed"] = {
            "strategy": spec.kind,
            "dedup": spec.dedup,
            "reuse_grad": spec.reuse_grad or None,
        }
        if spec.by == "mpu":
            options["mpu"] = self.mpu
        else:
            specs = [("up", "column"), ("down", "row")]
            config["tensor_parallel"] = {
                "autotp_size": spec.tp_size,
                "partition_config": {
                    "use_default_specs": False,
                    "layer_specs": [
                        {"patterns": [rf"{name}\.weight$"], "partition_type": how}
                        for name, how in specs
                    ],
                },
            }
        self.engine = initialize(config=config, **options)[0]
        return self._table()

    def _table(self) -> Seen:
        """Returns all Parameters that AutoTP does not cut."""
        cut = ("up.weight", "up.bias", "down.weight") if self.spec.by == "AutoTP" else ()
        seen: Seen = {}
        for name, parameter in self.engine.module.named_parameters():
            if name not in cut:
                gathered = deepspeed.zero.GatheredParameters([parameter])
                with gathered if self.spec.stage == 3 else nullcontext():
                    seen[name] = _whole(parameter)
        return seen

    def train(
        self,
        looked_up: tuple[dict[str, Any], ...],
        loss: str = "term",
        arrives: str = "plain",
        inplace: str = "none",
        mode: str = "backward",
    ) -> Seen:
        """Runs a forward and its backward."""
        spec, dp_rank = self.spec, self.mpu.get_data_parallel_rank()
        hows, of = [], []
        for how in looked_up:
            how = {"ids": "int64", "layout": "contiguous", "inplace": "none", "hook": False, **how}
            seed = how["seed"] + 10 * dp_rank
            ids = make_ids(spec, how["shape"], how["ids"], how["layout"], seed)
            ids = ids if self.is_ours or how["ids"] == "int32" else ids.long()
            hows.append(how)
            of += [ids, noise(seed + 1, *how["shape"], spec.dim)]
        engine = self.engine
        if mode == "eval":
            engine.eval()
        with torch.no_grad() if mode == "eval" else nullcontext():
            total, outputs = engine(hows, loss, arrives, inplace, *of)
        engine.train()
        seen: Seen = {"loss": total.detach()}
        seen |= {f"output {i}": output for i, output in enumerate(outputs)}
        if mode == "backward" or (mode == "no_sync" and spec.stage > 1):
            engine.backward(total)
        elif mode == "no_sync":
            with engine.no_sync():
                engine.backward(total)
        elif mode == "of torch":
            engine.scale(total).backward()
        elif mode == "retained":
            engine.backward(total, retain_graph=True)
        with_hooks = mode in ("backward", "of torch", "retained") or spec.stage > 1
        self.reduced |= mode != "eval" and with_hooks and engine.is_gradient_accumulation_boundary()
        return seen

    def step(self) -> Seen:
        self.engine.step()
        self.stepped |= self.reduced
        self.reduced = False
        norm = self.engine.get_global_grad_norm()
        seen = {} if norm is None else {"norm": torch.as_tensor(float(norm))}
        return {**seen, **self._table()}

    def read(self) -> Seen:
        """Reads the table through DeepSpeed."""
        if self.spec.confuses_state:
            return {}
        seen = {"fp32": safe_get_full_fp32_param(self.weight)}
        if self.reduced:
            seen["gradient"] = safe_get_full_grad(self.weight)
        for name in self.moments:
            seen[name] = safe_get_full_optimizer_state(self.weight, name)
        return {name: _whole(value) for name, value in seen.items()}

    def write(self, moments: bool = False) -> Seen:
        """Sets the values of ``read``."""
        spec = self.spec
        # DeepSpeed raises on one rank alone if a partition of ZeRO 3 is padded.
        is_padded = spec.rows % spec.tp_size or spec.dim % spec.tp_size
        is_padded = is_padded or spec.rows * spec.dim % dist.get_world_size()
        if spec.confuses_state or (spec.stage == 3 and is_padded):
            return {}
        table = noise(5, spec.rows, spec.dim).float()
        if moments:
            for name in self.moments:
                safe_set_full_optimizer_state(self.weight, table, name)
        else:
            safe_set_full_fp32_param(self.weight, table)
        return self._table()

    def save(self, anew: bool = False, changed: bool = True) -> Seen:
        """Saves a checkpoint, and loads it after a change, or into a new engine."""
        [directory] = self.directory
        self.engine.save_checkpoint(directory)
        if anew:
            self.engine.destroy()
            self.initialize()
            self.stepped = self.reduced = False
        elif changed:
            self.write()
        self.engine.load_checkpoint(directory)
        return self._table()

    def save_whole(self) -> Seen:
        [directory] = self.directory
        self.engine.save_16bit_model(directory, "whole.bin")
        if dist.get_rank():
            return {}
        whole: Seen = torch.load(f"{directory}/whole.bin", weights_only=True)
        return whole

    def consolidate(self) -> Seen:
        by_autotp = self.spec.by == "AutoTP" and self.spec.tp_size > 1 and self.spec.stage < 3
        if by_autotp and not self.is_ours:  # The whole model is not partitioned.
            state = self.engine.module.state_dict() if dist.get_rank() == 0 else None
        else:
            state = self.engine._consolidated_16bit_state_dict()
        if state is None:
            return {}
        return {name: value.detach().clone() for name, value in state.items()}

    def rate(self, factor: float = 0.5) -> Seen:
        for group in self.engine.optimizer.param_groups:
            group["lr"] *= factor
        return {}

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
        self.engine = None
        gc.collect()


def _whole(value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().clone()
