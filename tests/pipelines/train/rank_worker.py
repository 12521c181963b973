"""One rank of a training process group: `rank_worker.py JOB.pickle RANK WORLD_SIZE RENDEZVOUS EVENTS.pickle [KILL_AT_STEP]`.

With KILL_AT_STEP the process is killed, as by the kernel, right after the checkpoint of that step or later.
"""

import logging
import os
import pickle
import signal
import sys
from pathlib import Path


def main() -> None:
    job_path, rank, world_size, rendezvous, events_path, *kill_at = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    logging.basicConfig(level=logging.INFO)
    import torch.distributed as dist

    from pipelines.report import QueuedReport
    from pipelines.train import step
    from pipelines.train.loop import train_worker

    job = pickle.loads(Path(job_path).read_bytes())
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world_size))
    events = []
    if kill_at:
        kill_in_step(step, int(kill_at[0]))
    train_worker(job, QueuedReport(events.append))
    dist.destroy_process_group()
    if rank == "0":
        Path(events_path).write_bytes(pickle.dumps(events))


def kill_in_step(step_module, kill_at: int) -> None:
    """Ends this process in the middle of a step: between its backward pass and its update."""
    from infra.engine import Engine

    original = Engine.backward
    calls = []

    def backward(engine, loss):
        original(engine, loss)
        calls.append(1)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Engine.backward = backward


if __name__ == "__main__":
    main()
