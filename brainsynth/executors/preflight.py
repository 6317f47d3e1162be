"""Refuse a layout that cannot run, before anything is started for it."""

from __future__ import annotations

import logging
import os

from brainsynth.config.schema import RuntimeConfig
from brainsynth.config.training import TrainRuntimeConfig
from brainsynth.errors import UserError
from brainsynth.models.cpus import usable_cpus

log = logging.getLogger(__name__)
_MEND = "lower runtime.workers or what each worker asks for"


def check_layout(runtime: RuntimeConfig | TrainRuntimeConfig) -> None:
    """Refuse a layout that this machine cannot hold; the first thing that a job does, before torch is imported."""
    gpus = float(runtime.use_gpu) if isinstance(runtime, TrainRuntimeConfig) else runtime.gpus_per_worker
    check_this_machine(runtime.workers, runtime.cpus_per_worker, gpus)


def check_this_machine(workers: int, cpus: float, gpus: float) -> None:
    """Refuse at once what a private session on this machine cannot hold. Does not check a cluster that is to be joined."""
    joins = bool(workers and os.environ.get("RAY_ADDRESS"))
    if joins or not (workers or gpus):
        return
    node, reason = {"CPU": float(os.cpu_count() or 1)}, ""  # as Ray counts them
    if gpus:
        from brainsynth.models.device import count_accelerators, why_no_gpu  # torch, which few need here

        node["GPU"] = float(count_accelerators())
        reason = "" if node["GPU"] else f", where {why_no_gpu()}"
        if not workers and reason:
            raise UserError(f"runtime: a GPU is asked for on this machine{reason}; fix that, or ask for none")
    if not workers:
        return
    problem = _problem(workers, {"CPU": cpus, "GPU": gpus}, [node])
    if problem:
        raise UserError(f"runtime: {problem} on this machine{reason}; {_MEND}")


def check_cluster(workers: int, cpus: float, gpus: float, wait_for_nodes: bool) -> None:
    """Refuse what the joined cluster cannot hold; if nodes are still to come, log it and continue."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    problem = _problem(workers, {"CPU": cpus, "GPU": gpus}, nodes)
    if problem and wait_for_nodes:
        log.warning("runtime: %s; waiting for nodes to join (runtime.wait_for_nodes)", problem)
    elif problem:
        raise UserError(
            f"runtime: {problem} on {len(nodes)} node(s); {_MEND}, or set runtime.wait_for_nodes where the cluster will grow"
        )


def check_gpu() -> None:
    """Refuse, in a worker, a GPU that Ray counts and torch cannot use: before the networks' libraries are imported."""
    from brainsynth.models.device import choose_device, count_accelerators

    if not count_accelerators():
        choose_device(use_gpu=True)


def cpus_of_worker(workers: int, cpus: float) -> float:
    """The CPUs of each worker's threads: on a cluster those that Ray reserves, on one machine an even share of all."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return cpus if len(nodes) > 1 else max(cpus, usable_cpus() / max(1, workers))


def _problem(workers: int, wanted: dict[str, float], nodes: list[dict[str, float]]) -> str:
    """Why the nodes cannot hold that many workers, each on one node; empty when they can."""
    fit = 0
    for node in nodes:
        fit += min((int(node.get(k, 0.0) / v + 1e-9) for k, v in wanted.items() if v > 0), default=workers)
    if fit >= workers:
        return ""
    each = " and ".join(f"{v:g} {k}" for k, v in wanted.items() if v > 0)
    there = ", ".join(f"{sum(node.get(k, 0.0) for node in nodes):g} {k}" for k, v in wanted.items() if v > 0)
    return f"{workers} workers with {each} each do not fit: {fit} fit ({there} there)"


def resource_table() -> str:
    """What the cluster has, what is free, and which nodes are alive."""
    import ray

    if not ray.is_initialized():
        return "no Ray in this process"
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    lines = ["resource                     total      free"]
    lines += [f"{name:<25} {have[name]:>9.6g} {free.get(name, 0.0):>9.6g}" for name in sorted(have)]
    lines += [
        f"node {node['NodeID'][:8]} {node['NodeManagerAddress']}: {'alive' if node['Alive'] else 'DEAD'}"
        for node in ray.nodes()  # type: ignore[no-untyped-call]
    ]
    return "\n".join(lines)
