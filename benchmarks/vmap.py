"""Training throughput of several seeds as one vmapped program against one seed at a time.

    python benchmarks/vmap.py [--config configs/rope_ablation.py] [--members 8] [--rounds 5] [--steps 5]

Medians of steps that take turns, on the last cell of the study; tokens per second of all members together.
"""

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lab import runtime

runtime.tune_allocator()

import stepping  # noqa: E402

from lab import command  # noqa: E402


def stepper(config, texts, mesh, members: int):
    """A function that makes one step of so many seeds and waits for it; and its tokens."""
    from lab.model import mesh as lab_mesh
    from lab.train.workload import Member, Workload

    configs = [config.copy_and_resolve_references() for _ in range(members)]
    for seed, each in enumerate(configs):
        each.seed = each.model_seed = seed
    workload = Workload([Member(each, texts) for each in configs])
    state, numbers = workload.initial_state(mesh), workload.numbers(0)
    batch, infos = next(iter(workload.batches(0)))
    placed = lab_mesh.place(batch, mesh)
    run = workload.compile(state, numbers, placed, mesh)

    return stepping.stepper(run, state, numbers, placed), sum(info.tokens for info in infos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/rope_ablation.py")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    flags = parser.parse_args()
    config = command.load_config(flags.config)
    runtime.start(config)

    from lab import data
    from lab.model import mesh as lab_mesh
    from lab.study.define import resolve

    config = resolve.resolve(config)[-1].config
    mesh, texts = lab_mesh.make(config.run.mesh), data.open(config).train
    peers = {members: stepper(config, texts, mesh, members) for members in (1, flags.members)}
    times = {members: [] for members in peers}
    for turn in range(flags.rounds + 1):
        for members, (one, _) in peers.items():
            for _ in range(flags.steps):
                start = time.perf_counter()
                one()
                if turn:  # the first turn warms up
                    times[members].append(time.perf_counter() - start)
    rates = {members: peers[members][1] / statistics.median(seconds) for members, seconds in times.items()}
    for members, rate in rates.items():
        print(f"{members:3d} seeds at once: {rate:12,.0f} tokens/s")
    print(f"gain: {rates[flags.members] / rates[1]:.2f}x")


if __name__ == "__main__":
    main()
