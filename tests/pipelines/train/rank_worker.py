"""Ranks of a training, forked from a process that has the imports behind it.

Reads requests as JSON lines from standard input: a list of ranks, each {"job", "out", "log", "rendezvous", "kill_at",
"do"} with paths, a number or null, and "train" or "gradients". Answers each with the list of the ranks' exit codes. A
rank that is to be killed is ended as by the kernel, after so many backward passes.
"""

import json
import logging
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path

TIMEOUT_S = 120


def serve() -> None:
    import open_clip.loss  # noqa: F401
    from transformers import BertModel, BertTokenizer  # noqa: F401

    from infra.engine import _import_deepspeed
    from pipelines.train import autoencoder, clip, loop, text_to_image  # noqa: F401

    _import_deepspeed("cpu")
    for line in sys.stdin:
        requests = json.loads(line)
        pids = [fork(request, rank, len(requests)) for rank, request in enumerate(requests)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), file=sys.__stdout__, flush=True)


def fork(request: dict, rank: int, world_size: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(TIMEOUT_S)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run_rank(request, rank, world_size)
    except BaseException:  # noqa: BLE001 - what is below must not run in a fork
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_rank(request: dict, rank: int, world_size: int) -> None:
    import torch.distributed as dist

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    logging.basicConfig(level=logging.INFO, force=True)
    dist.init_process_group("gloo", init_method=f"file://{request['rendezvous']}", rank=rank, world_size=world_size)
    if request["kill_at"] is not None:
        die_in_step(request["kill_at"])
    job = pickle.loads(Path(request["job"]).read_bytes())
    {"train": train, "gradients": gradients}[request["do"]](job, Path(request["out"]), rank, world_size)
    dist.destroy_process_group()


def train(job, out: Path, rank: int, world_size: int) -> None:
    """Leaves rank 0's events at `out`."""
    from pipelines.reporting import QueuedReport
    from pipelines.train.loop import train_worker

    events: list = []
    train_worker(job, QueuedReport(events.append))
    if rank == 0:
        out.write_bytes(pickle.dumps(events))


def gradients(job, out: Path, rank: int, world_size: int) -> None:
    """Leaves each rank's loss and gradients of its share of the first global batch, at `out` with its number."""
    import torch
    import torch.distributed as dist

    from pipelines.train.kinds import build_trainable
    from pipelines.train.order import Sample

    torch.set_num_threads(1)
    trainable = build_trainable(job, torch.device("cpu"), previews=False)
    share = job.model.train.global_batch_size // world_size
    samples = [Sample(row, 0) for row in range(rank * share, (rank + 1) * share)]
    loss, _ = trainable.loss(trainable.module, trainable.batch(samples))
    loss.backward()
    parameters = trainable.module.named_parameters()
    found = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    torch.save({"loss": loss.detach(), "gradients": found}, f"{out}{rank}")
    dist.barrier()


def die_in_step(number: int) -> None:
    """Ends this process between the backward pass and the update of its step `number`, counted from 1."""
    from infra.engine import Engine

    backward, calls = Engine.backward, []

    def backward_and_die(engine: Engine, loss) -> None:
        backward(engine, loss)
        calls.append(loss)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Engine.backward = backward_and_die


if __name__ == "__main__":
    serve()
