"""Gradients of one global batch by one rank and by two, for `test_clip.py`.

Run as `clip_worker.py JOB FOLDER`: forks the ranks from a process that has the imports behind it, and leaves in FOLDER
`WORLD_SIZE_RANK.pt` with the loss and the gradients of each.
"""

import os
import pickle
import sys
import traceback
from pathlib import Path

GLOBAL_BATCH = 8


def main(job: Path, folder: Path) -> int:
    import open_clip  # noqa: F401
    import torch

    from pipelines.train import clip  # noqa: F401

    torch.set_num_threads(1)
    pids = [fork(job, folder, rank, world_size) for world_size in (1, 2) for rank in range(world_size)]
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


def fork(job: Path, folder: Path, rank: int, world_size: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        run(job, folder, rank, world_size)
    except BaseException:  # noqa: BLE001 - what is below must not run in a fork
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run(job: Path, folder: Path, rank: int, world_size: int) -> None:
    import torch
    import torch.distributed as dist

    from pipelines.train.clip import ClipTraining
    from pipelines.train.order import Sample

    rendezvous = f"file://{folder / f'rendezvous_{world_size}'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    trainable = ClipTraining(pickle.loads(job.read_bytes()), torch.device("cpu"))
    share = GLOBAL_BATCH // world_size
    samples = [Sample(row, 0) for row in range(rank * share, (rank + 1) * share)]
    loss, _ = trainable.loss(trainable.module, trainable.batch(samples))
    loss.backward()
    parameters = trainable.module.named_parameters()
    gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    torch.save({"loss": loss.detach(), "gradients": gradients}, folder / f"{world_size}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
