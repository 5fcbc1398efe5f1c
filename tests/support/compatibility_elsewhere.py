"""Rows of the page of :mod:`compatibility_page` for other tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """``test`` is a file and the name of a test, such as ``test_x.py::test_y``."""

    users_do: str
    happens: str
    sizes: str
    test: str


ELSEWHERE = [
    Row(
        "Train behind `DistributedDataParallel` or FSDP2",
        "Same",
        "2",
        "test_data_parallel.py::test_dense_gradients_train_as_one_process",
    ),
    Row(
        "Train `sparse=True` behind `DistributedDataParallel`",
        "*Refused*: `sparse` must be False for a table behind `DistributedDataParallel`; engines "
        "of DeepSpeed at ZeRO 0 take them",
        "2",
        "test_data_parallel.py::test_sparse_gradients_behind_ddp_are_those_of_torch_or_refused",
    ),
    Row(
        "Train `sparse=True` behind FSDP2",
        "*Refused* by torch, as `torch.nn.Embedding` is; pass `sparse=False`",
        "2",
        "test_data_parallel.py::test_sparse_gradients_end_in_an_error_of_torch",
    ),
    Row(
        "Compile steps of optimizers: `torch.compile(optimizer.step)`",
        "Same as a compiled step on the whole table",
        "1, 2, 3",
        "test_compiled_optimizers.py::test_compiled_steps_are_those_of_whole_tables",
    ),
    Row(
        "Take several gradients at once: `torch.autograd.grad(..., is_grads_batched=True)`",
        "Same",
        "1, 2, 3",
        "test_batched_gradients.py::test_batched_gradients_are_those_one_by_one",
    ),
    Row(
        'Take them of heads, or of the output "sequence"',
        "P = 1: same; P > 1: *refused*: `is_grads_batched` must be False where the backward of a "
        "sharded layer sends gradients",
        "1, 2, 3",
        "test_batched_gradients.py::test_heads_are_right_or_refused",
    ),
    Row(
        "Make a layer of the weight: `nn.Parameter(embed.weight)`, "
        "`nn.Embedding.from_pretrained(embed.weight)`",
        "P = 1: same; P > 1: *refused*: `torch.nn.Parameter` must be given the whole table",
        "1, 2, 3",
        "test_parameter_of_a_shard.py::test_layers_of_a_shard_are_refused",
    ),
    Row(
        "Train engines of DeepSpeed, ZeRO 0 to 3, with AutoTP or an mpu",
        "Same; see [parity](parity.md)",
        "2",
        "test_engines.py::test_matrix_of_engines",
    ),
    Row(
        "Add data-parallel ranks to engines",
        "Same",
        "2",
        "test_engines.py::test_tensor_and_data_parallel",
    ),
    Row(
        "Use hpZ, qgZ, ZenFlow, AutoSP, sequence parallelism or the hybrid engine with TP",
        "*Refused*: `zero_optimization.zero_hpz_partition_size` must be 1 with tensor "
        "parallelism, and so on",
        "2",
        "test_mixing.py::test_options_that_mix_shards_up_are_refused",
    ),
    Row(
        "Train a T5 under AutoTP, which cuts its table of biases over the heads",
        "Same: that table is left to AutoTP",
        "2",
        "test_mixing.py::test_tables_with_a_column_for_each_head_are_left_to_autotp",
    ),
    Row(
        "Read and set `safe_get_full_*`, `safe_set_full_*` of DeepSpeed",
        "Same: the whole table",
        "2",
        "test_mixing.py::test_full_values_of_a_table_are_set_and_got",
    ),
    Row(
        "Train a table with an empty shard on some rank, at ZeRO 3",
        "*Refused* on all ranks: The table must have a row on each tensor-parallel rank",
        "2, 3",
        "test_checks.py::test_empty_shards_are_refused_at_zero3",
    ),
    Row(
        "Train some rows only: `train_rows=`",
        "Same as with a hook that masks the gradient",
        "1, 2, 3",
        "test_train_rows.py::test_trains_as_with_a_masked_gradient",
    ),
    Row(
        "Train some rows only in engines",
        "Same",
        "2",
        "test_train_rows_engines.py::test_trains_as_with_a_masked_gradient",
    ),
    Row(
        "Mark hooks of the weight that work item by item: `tp_embed.shardwise`",
        "Same",
        "1, 2, 3",
        "test_carry.py::test_marked_hooks_go_over",
    ),
    Row(
        "Set attributes of modules",
        "Same",
        "1, 3",
        "test_carry.py::test_attributes_of_modules_go_over",
    ),
    Row(
        "Call a module that was replaced, kept in a list",
        "*Refused*: This `Embedding` must not be called any more: `shard_embeddings()` "
        "replaced it by a `ShardedEmbedding`",
        "1, 3",
        "test_carry.py::test_a_replaced_module_raises_when_it_is_called",
    ),
    Row(
        "Give one rank other ids",
        "*Refused* on all ranks: All ranks of the gang must look up the same ids",
        "2, 3",
        "test_same_ids.py::test_other_ids_of_one_rank_are_refused_on_all",
    ),
    Row(
        "Give one rank an id out of range",
        "*Refused* on all ranks: the message names the id, its position and the rank",
        "3",
        "test_same_ids.py::test_an_id_out_of_range_on_one_rank_ends_all",
    ),
    Row(
        "Clip in gangs of several sizes, in data parallelism: `tp_embed.clip_grad_norm_`",
        "Same",
        "2, 4",
        "test_norms.py::test_gangs_of_several_sizes_in_data_parallelism",
    ),
    Row(
        "Clip by `torch.nn.utils.clip_grad_norm_`, heads tied or not",
        "Same",
        "1, 2, 3",
        "test_sharded_grads.py::test_clipping_by_torch",
    ),
    Row(
        "Train by optimizers that treat each item by itself",
        "Same",
        "1, 2, 3",
        "test_optimizers.py::test_elementwise",
    ),
    Row(
        "Train by Adafactor, LAMB, LBFGS, Muon, which look at a whole matrix",
        "*Refused*: The optimizer of a sharded table must treat each item by itself",
        "3",
        "test_optimizers.py::test_refused_at_the_first_step",
    ),
    Row(
        "Take second derivatives of losses and heads, with every option",
        "Same",
        "1, 2, 3",
        "test_derivatives.py::test_second_derivatives_are_those_of_torch",
    ),
    Row(
        "Take `torch.func` transforms of heads and losses",
        "Same",
        "1, 2, 3",
        "test_derivatives.py::test_transforms_of_torch_func",
    ),
    Row(
        "Run losses under other default dtypes and devices",
        "Same",
        "1",
        "test_loss_modes.py::test_defaults_of_torch_change_nothing",
    ),
    Row(
        "Load DTensors over any mesh",
        "Same rows, or one error on all ranks",
        "1, 2, 3, 4",
        "test_dtensor_meshes.py::test_mesh_over_the_ranks_of_the_gang",
    ),
    Row(
        "Save and load models and optimizers by torch's distributed checkpoints, at another P",
        "Same",
        "1, 2, 3",
        "test_optimizer_state.py::test_resharding",
    ),
    Row(
        "Save and load with `full_state_dict=True`",
        "Same",
        "1, 2, 3, 4",
        "test_optimizer_state.py::test_full_state_dict_option",
    ),
    Row(
        "Use PEFT: LoRA, DoRA, prompts, IA3, `modules_to_save`; `trainable_token_indices`",
        "Same; *refused*: `trainable_token_indices` must name tables that are whole",
        "2, 3",
        "test_hf_peft.py::test_methods_train_as_on_whole_tables_or_are_refused",
    ),
    Row(
        "Tie weights or exchange tables after they were sharded",
        "Same, or *refused*: `weight` must hold this rank's shard",
        "1, 2, 3",
        "test_ties.py::test_ties_after_sharding_are_right_or_refused",
    ),
    Row(
        "Patch the `forward` of a model to multiply by `lm_head.weight`, as TRL and Liger do",
        "*Refused* by `shard_embeddings()`, and by the read of the weight",
        "2",
        "test_hf_forward.py::test_a_forward_that_reads_the_head_is_refused",
    ),
    Row(
        "Train by TRL's `RewardTrainer`, `DPOTrainer`, `KTOTrainer`, `GRPOTrainer`, `RLOOTrainer`",
        "Same: losses, rewards, samples and gradient norms",
        "2",
        "test_trl_trainers.py::test_trainer_computes_what_it_does_alone",
    ),
    Row(
        "The same where AutoTP cuts the head of a reference model, with `scale_rewards='batch'` "
        "and other statistics of all processes, or with a group of completions over several ranks",
        "*Refused*: the error names the option, and its value with tensor parallelism",
        "2",
        "test_trl_trainers.py::test_what_would_train_otherwise_is_refused",
    ),
    Row(
        'Read `outputs.logits` of a fused loss, or pass them to `compute_metrics` with "always"',
        "*Refused*: `...` needs the values of logits, which were not computed",
        "3",
        "test_deferred.py::test_what_needs_values_is_refused",
    ),
    Row(
        "Train models of transformers",
        "Same, some by the `rules` that the error names; else *refused*",
        "2",
        "test_model_matrix.py::test_every_family_trains_as_it_does_whole",
    ),
    Row(
        "Write any program of lookups, hooks, in-place work, optimizers and copies",
        "Same, or *refused*, in 2,000 random ones",
        "1, 2, 3",
        "test_programs.py::test_thousands_of_programs_come_to_the_same_or_are_refused",
    ),
]
