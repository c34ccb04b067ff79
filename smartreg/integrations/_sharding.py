"""What a Trainer may be told to shard, and a teacher or a perturbation could not follow."""

from __future__ import annotations

from typing import Any


def refuse_sharding(trainer: Any) -> None:
    """Raises a `RuntimeError` where a Trainer shards the model, or an example, between its processes."""
    sharded = [name for name in ("deepspeed", "fsdp") if getattr(trainer, f"is_{name}_enabled", False)]
    if sharded:
        raise RuntimeError(
            f"SMART has not been made to work with {sharded[0]} inside of the Trainer, which shards the model "
            f"before a teacher can be copied: use DistributedDataParallel, or fully_shard in a loop of your own"
        )
    plan = getattr(trainer.accelerator, "parallelism_config", None)
    split = [kind for kind in ("tp", "cp", "sp") if getattr(plan, f"{kind}_enabled", False)]
    if split:
        raise RuntimeError(
            f"SMART has not been made to work with {split[0]}_size > 1 of a ParallelismConfig, where a process "
            f"sees a part of each example or layer: use DistributedDataParallel"
        )
