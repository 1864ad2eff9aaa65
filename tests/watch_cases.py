"""Programs that hang or die: ``python -m torch.distributed.run … tests/watch_cases.py CASE [TIMEOUT]``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.groups import Groups, LauncherRanks, build_groups
from parallel.watch import watching
from tests.cases import here
from trainer.failure import told_clearly


def step(groups: Groups) -> None:
    """A collective that all ranks come to."""
    dist.all_reduce(torch.ones(3))


def sleeper(groups: Groups) -> None:
    """The last rank sleeps outside any collective."""
    step(groups)
    if groups.rank == groups.world - 1:
        time.sleep(999)
    step(groups)


def killed(groups: Groups) -> None:
    """Rank 1 is killed while the others wait for it."""
    step(groups)
    if groups.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1000))


def killed_first(groups: Groups) -> None:
    """Rank 0 is killed while the others are in no collective."""
    step(groups)
    time.sleep(0.5)
    if groups.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)  # nobody waits


def killed_host(groups: Groups) -> None:
    """Rank 0 is killed, and with it the store if no launcher keeps it."""
    step(groups)
    if groups.rank == 0:
        time.sleep(3.5)  # by then the others know its process
        os.kill(os.getpid(), signal.SIGKILL)
    step(groups)


def stopped(groups: Groups) -> None:
    """Rank 1 is stopped from outside: its process is there, but nothing in it goes on."""
    step(groups)
    if groups.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    step(groups)


def different(groups: Groups) -> None:
    """Rank 0 waits in tp, rank 1 in dp: each for a rank that waits elsewhere."""
    step(groups)
    if groups.rank in (0, 3):
        dist.all_reduce(torch.ones(5), group=groups.tp.group)
    else:
        parts = [torch.empty(7) for _ in range(2)]
        dist.all_gather(parts, torch.ones(7), group=groups.dp.group)


def kinds(groups: Groups) -> None:
    """The same group and number, but not the same collective."""
    step(groups)
    if groups.rank == 0:
        dist.all_reduce(torch.ones(5), group=groups.tp.group)
    elif groups.rank == 1:
        dist.broadcast(torch.ones(5), 0, group=groups.tp.group)
        time.sleep(1000)


def message(groups: Groups) -> None:
    """Rank 1 waits for a message that rank 0 never sends."""
    step(groups)
    if groups.rank == 1:
        ops = [dist.P2POp(dist.irecv, torch.empty(4, 8), 0)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    time.sleep(1000)


def receive(groups: Groups) -> None:
    """The same with the plain function."""
    step(groups)
    if groups.rank == 1:
        dist.recv(torch.empty(4, 8), 0)
    time.sleep(1000)


def overlapped(groups: Groups) -> None:
    """Rank 0 waits for a collective it had started before."""
    step(groups)
    if groups.rank == 0:
        work = dist.all_reduce(torch.ones(11), async_op=True)
        assert work is not None
        work.wait()  # for the one started before
    time.sleep(1000)


def fails(groups: Groups) -> None:
    """Rank 1 fails with a message of its own."""
    step(groups)
    if groups.rank == 1:
        raise ValueError("the disk of this rank is gone")
    step(groups)


def busy(groups: Groups) -> None:
    """Nothing is wrong: each rank works alone for longer than the timeout, then they meet."""
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        sum(range(1000))
    step(groups)


def slow_but_alive(groups: Groups) -> None:
    """Nothing is wrong: rank 0 waits again and again, never too long."""
    for _ in range(6):
        if groups.rank:
            time.sleep(0.6)
        step(groups)
    dist.barrier()


def entered_and_left() -> tuple[set[str], set[str], set[str], int]:
    """In a pool: names of the threads before, in and after a watch, and how a forked child ends that gets SIGTERM.

    Python itself may lose a signal that comes to a child before it has taken its first breath, so that the first child
    is only there to be mistaken for this process.
    """
    groups = here()

    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    before = threads()
    for _ in range(2):
        with watching(groups, 60.0):
            inside = threads()
            codes = []
            for seconds in (0.0, 0.3):
                child = os.fork()
                if not child:
                    time.sleep(3)
                    os._exit(0)
                time.sleep(seconds)
                os.kill(child, signal.SIGTERM)
                time.sleep(0.2)  # what the child's signal may have woken in this process
                codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    groups.barrier()
    return before, inside, threads(), codes[1]


def say(line: str) -> None:
    """A line in one piece: all ranks write into the same pipe."""
    os.write(1, f"{line}\n".encode())


def main() -> None:
    """Run the case of the command line on groups of two by two where there are four ranks."""
    ranks = LauncherRanks.read()
    torch.set_num_threads(1)
    layout = ParallelConfig(tp=2) if ranks.world % 2 == 0 else ParallelConfig()
    with told_clearly(ranks.rank):
        groups = build_groups(ranks, 60, layout)
        dist.barrier()
        say(f"rank {ranks.rank} begins")
        with watching(groups, float(sys.argv[2])):
            globals()[sys.argv[1]](groups)
        say(f"rank {ranks.rank} is done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
