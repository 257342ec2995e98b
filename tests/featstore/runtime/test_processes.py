"""This process among several: what it leaves behind when a command ends."""

from __future__ import annotations

from pathlib import Path

import torch.distributed

from featstore.runtime.processes import leave_group


def test_a_group_is_left_once_and_leaving_none_is_nothing(tmp_path: Path) -> None:
    leave_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    assert torch.distributed.is_initialized()
    leave_group()
    assert not torch.distributed.is_initialized()
    leave_group()
