"""Real processes for tests: a function is run in several at once, as torchrun would start them, without its seconds."""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import traceback

from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.nn.parallel", "epochal", "epochal.plan"])


def run(function, size, *given, seconds=60):
    """What ``function(rank, *given)`` gives in each of ``size`` processes, by rank; what one raises is raised here."""
    outcomes = outcomes_of(function, size, *given, seconds=seconds)
    if errors := [error for _, error in outcomes if error]:
        raise AssertionError(min(errors, key=lambda error: "ProcessError" in error))  # the cause, not who waited
    return [value for value, _ in outcomes]


def outcomes_of(function, size, *given, seconds=60):
    """Of each process, by rank, what the function gives and the traceback of what it raises; one of them is None."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds it
    port, answers = store.port, [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        CONTEXT.Process(target=_work, args=(function, rank, size, port, os.getcwd(), writer, given))
        for rank, (_, writer) in enumerate(answers)
    ]
    for process in processes:
        process.start()
    for _, writer in answers:
        writer.close()  # theirs is open, until they end
    try:
        found = [_answer(reader, seconds) for reader, _ in answers]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return found


def _answer(reader, seconds):
    if not reader.poll(seconds):
        return None, f"no answer in {seconds} seconds"
    try:
        return reader.recv()
    except EOFError:
        return None, "the process is gone"


def _work(function, rank, size, port, folder, writer, given):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    with tempfile.TemporaryFile("w+") as told, contextlib.redirect_stderr(told):
        try:
            answer = function(rank, *given), None
        except BaseException:
            answer = None, f"process {rank}: {traceback.format_exc()}"
    writer.send(answer)
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
