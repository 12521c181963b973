"""Ranks of a training, forked from a process that has the imports behind it.

Reads requests as JSON lines from standard input: a list of ranks, each {"job", "events", "log", "rendezvous",
"kill_at"} with paths and a number or null. Answers each with the list of the ranks' exit codes. A rank that is to be
killed is ended as by the kernel, in the middle of its step of that number.
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
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imports torch's compiler when it is first needed
    from transformers import BertModel, BertTokenizer  # noqa: F401

    from pipelines.train import autoencoder, loop, text_to_image  # noqa: F401

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

    from pipelines.reporting import QueuedReport
    from pipelines.train.loop import train_worker

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    logging.basicConfig(level=logging.INFO, force=True)
    dist.init_process_group("gloo", init_method=f"file://{request['rendezvous']}", rank=rank, world_size=world_size)
    events: list = []
    if request["kill_at"] is not None:
        die_in_step(request["kill_at"])
    train_worker(pickle.loads(Path(request["job"]).read_bytes()), QueuedReport(events.append))
    if rank == 0:
        Path(request["events"]).write_bytes(pickle.dumps(events))
    dist.destroy_process_group()


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
