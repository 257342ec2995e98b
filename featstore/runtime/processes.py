"""Several processes on one extraction, as `torchrun` or `accelerate launch` start them.

Nothing about them enters the store: shards are divided among the processes by the plan alone, and every process
computes whole planned batches, so the bytes are the same for one process and for ten.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta

#: How long one process waits for the others, who may be extracting for days.
_PATIENCE = timedelta(days=60)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Attributes:
        rank: Number of this process; 0 opens and completes the store.
        world: How many there are.
        local_rank: Number of this process on its machine; chooses the GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read what the launcher set; one process where there is none."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world < 2:
            return cls()
        return cls(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def first(self) -> bool:
        """Whether this is the process that opens and completes the store, and talks to the user."""
        return self.rank == 0

    def share(self, shards: int) -> range | None:
        """The shards this process writes: neighbours, so that few batches straddle two processes.

        Args:
            shards: Number of shards.

        Returns:
            Shard numbers, or None where there is one process only.
        """
        if self.world == 1:
            return None
        return range(shards * self.rank // self.world, shards * (self.rank + 1) // self.world)

    def device(self, name: str) -> str:
        """The device of this process: with ``auto`` or ``cuda``, one GPU each.

        Args:
            name: Value of ``--device``.
        """
        if self.world == 1 or name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"

    def wait(self) -> None:
        """Wait until every process has come this far; at once where there is one."""
        if self.world == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            # Only barriers pass between the processes, so the CPU's transport is enough on any machine.
            dist.init_process_group("gloo", timeout=_PATIENCE)
        dist.barrier()


def leave_group() -> None:
    """Leave torch's process group, if this process is in one; for the end of a command.

    Its threads must not outlive the interpreter: C++ ends such a process by SIGABRT, after all its work is done.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
