"""Which device a rank computes on, and the groups of a process alone; of several ranks, see `test_engine.py`."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from infra.ranks import DeviceUnavailable, choose_device, join_process_group, objects_group


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("wanted", "gpus", "ranks", "device"),
    [
        ("auto", 0, 2, "cpu"),
        ("auto", 1, 2, "cpu"),  # one rank on a GPU and one beside it would not be one group
        ("auto", 2, 2, "cuda:1"),
        ("auto", 8, 2, "cuda:1"),
        ("cuda", 2, 2, "cuda:1"),
        ("cpu", 8, 2, "cpu"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own_or_none_has(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: int, ranks: int, device: str
) -> None:
    with_gpus(monkeypatch, gpus)
    assert choose_device(wanted, local_rank=1, local_world_size=ranks) == torch.device(device)


@pytest.mark.parametrize("gpus", [0, 1])
def test_too_few_gpus_are_an_error_that_says_how_many(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    with_gpus(monkeypatch, gpus)
    message = f"device is 'cuda' and 2 ranks train on this node, which has {gpus} GPUs .* set the device to auto or cpu"
    with pytest.raises(DeviceUnavailable, match=message):
        choose_device("cuda", local_rank=0, local_world_size=2)


def test_a_process_alone_is_a_group_as_often_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for word in ("one", "two"):
        with join_process_group("cpu"):
            assert os.environ["LOCAL_RANK"] == "0"
            assert objects_group() is objects_group()
            said = [word]
            dist.broadcast_object_list(said, group=objects_group())
            dist.barrier(group=objects_group())
            assert said == [word]
        assert not dist.is_initialized()
    with pytest.raises(ValueError, match="join one first"):
        objects_group()


@pytest.mark.gpu
def test_objects_and_waits_stay_out_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with join_process_group("cuda"):
        assert dist.get_backend_config() == "cpu:gloo,cuda:nccl"
        assert dist.get_backend(objects_group()) == "gloo"
        said = ["word"]
        dist.broadcast_object_list(said, group=objects_group())
        dist.barrier()
        dist.barrier(group=objects_group())
        on_gpu = torch.ones(3, device="cuda")
        dist.all_reduce(on_gpu)
        assert on_gpu.tolist() == [1.0, 1.0, 1.0]
