"""All measurements that need a GPU, in one call of under ten minutes. Writes one JSON file.

    python -m benchmarks.h200 --out h200.json        # on the GPU machine
    python -m benchmarks.h200 --dry-run              # the same sections on a CPU at toy size: does everything run?

Sections, each in its own process with a share of the time: `facts` (device, versions, the rate of large matrix products),
`ladder` (the zoo's loop against ours, rung by rung, at the paper's size with random weights, and the ratios), `memory`
(real peaks of training steps, validations and figures), `decoding` (four together against one by one, layouts, cuDNN's
search, autocast against all bfloat16), `pipeline` (a real generation through Ray, written and committed, with a gate and
without: how busy is the device), `shipped` (the bundled model), `batch` (denoiser and decoder by micro-batch, until memory
runs out) and `training` (steps against MONAI's tutorial). Anything that fails, hangs or lacks a package is recorded with its
reason, and the rest continues. This file imports only the standard library until a section needs more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
ITSELF = ("-m", "benchmarks.h200")

BUDGET_S = {"facts": 30.0, "ladder": 150.0, "memory": 80.0, "decoding": 50.0, "pipeline": 130.0, "shipped": 30.0,
            "batch": 40.0, "training": 70.0}  # fmt: skip
"""Seconds of each section; what one leaves over goes to those after it."""
PATIENCE = 6
"""A dry run may take so much longer than a section's share: the machine may be busy with other things."""
NEEDS = {
    "facts": ("torch",),
    "ladder": ("torch", "monai"),
    "memory": ("torch", "monai", "zarr"),
    "decoding": ("torch", "monai"),
    "shipped": ("torch", "monai", "zarr"),
    "batch": ("torch", "monai"),
    "training": ("torch", "monai"),
    "pipeline": ("torch", "monai", "ray", "zarr", "obstore"),
}


class Notes:
    """What a section finds, one line a rung, so that nothing is lost when its process ends early."""

    def __init__(self, path: Path, until: float) -> None:
        self.path, self.until = path, until

    def rung(self, name: str, run: Callable[[], Any]) -> Any:
        """Run one measurement and note its result, or why there is none (None is returned then)."""
        if time.time() > self.until:
            self._write(name, {"skipped": "the section's time was over"})
            return None
        self._write(name, {"begun": True})
        began = time.monotonic()
        try:
            found = run()
        except Exception as error:  # the next rung may work
            self._write(name, {"error": f"{type(error).__name__}: {str(error)[:300]}"})
            _free()
            return None
        self._write(name, {"result": found, "took_s": round(time.monotonic() - began, 2)})
        return found

    def _write(self, name: str, what: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"rung": name, **what}) + "\n")


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def the_device(dry: bool) -> Any:
    """The GPU, or for a dry run the CPU with one thread."""
    import torch

    if dry:
        torch.set_num_threads(1)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU is visible to torch; --dry-run runs on the CPU")
    return torch.device("cuda", 0)


def now(device: Any) -> float:
    """Seconds at which all work of the device is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def seconds(run: Callable[[], Any], device: Any, times: int) -> list[float]:
    """Wall seconds of each run after one that warms up."""
    run()
    found = []
    for _ in range(times):
        began = now(device)
        run()
        found.append(now(device) - began)
    return found


def peak_memory(device: Any) -> float:
    """GB allocated at most since the last call (of a CPU: by the process, ever)."""
    import resource

    import torch

    if device.type == "cuda":
        found = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def size_of(dry: bool) -> Any:
    """The paper's networks, or toys of the same structure."""
    from benchmarks import ladder
    from brainsynth.bundle.spec import LatentSpec
    from brainsynth.config.architectures import AutoencoderArchitecture, DecoderArchitecture

    if not dry:
        return ladder.FULL
    spec = dataclasses.replace(
        ladder.PAPER,
        autoencoder=AutoencoderArchitecture(channels=(4, 4, 4, 4), latent_channels=3, num_res_blocks=1, norm_groups=2),
        diffusion=dataclasses.replace(ladder.PAPER.diffusion, channels=(8, 16, 16), norm_groups=4, num_res_blocks=1),
        latents=LatentSpec(shape_cxyz=(3, 4, 8, 4), shift=(0.0,) * 3, scale=(1.0,) * 3),
    )
    return ladder.Size(spec, DecoderArchitecture(channels=(8, 8, 8), blocks=(1, 1, 1), norm_groups=4))


def facts(notes: Notes, dry: bool) -> None:
    """Device, versions, and the rate of large matrix products: what this device can do at most."""
    import torch

    device = the_device(dry)

    def versions() -> dict[str, Any]:
        cuda = device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
            "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_in_products": torch.backends.cuda.matmul.allow_tf32,
            "cpus": os.cpu_count(),
        }

    def convolutions() -> str:
        from benchmarks.ladder import NO_BFLOAT16
        from brainsynth.models.device import has_bfloat16
        from brainsynth.models.loading import _convolution_shapes
        from brainsynth.models.selfcheck import check_bfloat16

        if dry and not has_bfloat16(device):
            raise RuntimeError(NO_BFLOAT16)
        check_bfloat16(_convolution_shapes(size_of(dry).spec, True), device)
        return "each different convolution agrees with float32"

    notes.rung("versions", versions)
    for precision in ("bfloat16", "float32"):
        notes.rung(f"tflop_per_s {precision}", functools.partial(_rate, device, dry, precision))
    notes.rung("bfloat16 convolutions", convolutions)


def ladder(notes: Notes, dry: bool) -> None:
    """Whole loops, rung by rung: seconds and peak memory per volume, the decoder's share, the share of the counted floor."""
    import torch

    from benchmarks import ladder as cpu_ladder
    from brainsynth.models.device import has_bfloat16

    device, size = the_device(dry), size_of(dry)
    rate = notes.rung("tflop_per_s", lambda: _rate(device, dry))
    rung, batch = cpu_ladder.Rung, 4
    counts: dict[tuple[bool, bool], dict[str, float]] = {}
    bf16 = functools.partial(rung, precision="bfloat16")
    table: list[tuple[Any, tuple[str, ...]]] = [
        (rung("the zoo's loop: one volume at a time, MONAI's DDIM", "monai", 50, rewrites=False), ()),
        (rung("+ exact rewrites, decoder channels last", "ddim", 50), ()),
        (bf16("+ bfloat16", "ddim", 50), ()),
        (bf16("+ denoiser channels last", "ddim", 50), ("channels_last",)),
        (bf16("+ UniPC, 12 steps", "unipc", 12), ()),
        (bf16(f"+ micro-batch of {batch}, decoded one by one", "unipc", 12, batch=batch, decode_batch=1), ()),
        (bf16(f"+ micro-batch of {batch}, decoded together", "unipc", 12, batch=batch), ()),
        (bf16("8 steps in place of 12", "unipc", 8, batch=batch, decode_batch=1), ()),
        (bf16("+ distilled decoder", "unipc", 8, batch=batch, distilled=True), ()),
        # A capture that fails may leave the device unusable for what follows.
        (bf16("+ CUDA graph of a step", "unipc", 8, batch=batch, distilled=True), ("graph",)),
        (bf16("+ compiled in place of the graph", "unipc", 8, batch=batch, distilled=True), ("compile",)),
    ]

    @torch.no_grad()
    def one(rung: Any, how: tuple[str, ...]) -> dict[str, Any]:
        peak_memory(device)
        networks = cpu_ladder.arranged(cpu_ladder.build(size, device), rung, size)
        networks = _modified(networks, how, rung, size, device, dry)
        run = functools.partial(cpu_ladder.volumes, networks, rung, size, device)
        taken = seconds(run, device, 1 if dry else 3)
        z = cpu_ladder.inputs(size, rung.batch, device)[0]
        decoding = seconds(functools.partial(cpu_ladder.decoded, networks, z, rung), device, 1 if dry else 3)
        kind = (rung.rewrites, rung.distilled)
        counts[kind] = counts.get(kind) or cpu_ladder.counted(size, rung)
        tflop = rung.steps * counts[kind]["step"] + counts[kind]["decode"]
        each = statistics.median(taken) / rung.batch
        found = {
            "s_per_volume": each,
            "all_s": taken,
            "decoder_share": statistics.median(decoding) / statistics.median(taken),
        }
        found |= {"tflop_per_volume": tflop, "tflop_per_s": tflop / each, "peak_memory_gb": peak_memory(device)}
        return found | ({"share_of_floor": tflop / rate / each} if rate else {})

    results: list[tuple[str, Any]] = []
    for rung_, how in table:
        if dry:
            precision = rung_.precision if has_bfloat16(device) else "float32"
            rung_ = dataclasses.replace(rung_, steps=rung_.steps // 4, precision=precision)
        results.append((rung_.name, notes.rung(rung_.name, functools.partial(one, rung_, how))))
        _free()
    taken = {name: result["s_per_volume"] for name, result in results if result}
    notes.rung(
        "times as fast as the zoo's loop", lambda: {name: taken[table[0][0].name] / s for name, s in taken.items()}
    )
    notes.rung("copy to the host", lambda: _copy(device, dry))


def _rate(device: Any, dry: bool, precision: str = "bfloat16") -> float:
    """TFLOP/s of a large matrix product."""
    import torch

    n = 256 if dry else 8192
    a = torch.randn(n, n, device=device, dtype=getattr(torch, precision))
    return 2 * n**3 / min(seconds(lambda: a @ a, device, 2 if dry else 10)) / 1e12


def _copy(device: Any, dry: bool) -> dict[str, float]:
    import torch

    images = torch.rand(4, *((32, 32, 32) if dry else (160, 224, 160)), device=device)
    return {"s_per_volume": statistics.median(seconds(images.cpu, device, 3)) / 4}


def _modified(networks: Any, how: tuple[str, ...], rung: Any, size: Any, device: Any, dry: bool) -> Any:
    """The networks with what only a GPU is given."""
    import torch

    autoencoder, denoiser = networks
    if "channels_last" in how:
        denoiser.to(memory_format=torch.channels_last_3d)
    if "graph" in how:
        denoiser = Graphed(denoiser, rung, size, device)
    if "compile" in how:
        backend = "eager" if dry else "inductor"  # a dry run compiles nothing
        denoiser = torch.compile(denoiser, backend=backend)
        autoencoder.distilled = torch.compile(autoencoder.distilled, backend=backend)
    return autoencoder, denoiser


class Graphed:
    """A denoiser whose evaluation was captured as a CUDA graph for one shape; the CPU launches it as one."""

    def __init__(self, denoiser: Any, rung: Any, size: Any, device: Any) -> None:
        import torch

        from benchmarks.ladder import inputs
        from brainsynth.models.device import autocast

        if device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        z, context = inputs(size, rung.batch, device)
        self.inputs = (z, torch.zeros(rung.batch, device=device), context)
        with torch.no_grad(), autocast(device, rung.precision):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    denoiser(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Weights that autocast would cache inside the capture must not outlive it.
            with torch.cuda.graph(self.graph), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                self.output = denoiser(*self.inputs)

    def __call__(self, *inputs: Any) -> Any:
        """Prediction for inputs of the captured shapes."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output.clone()


def batch(notes: Notes, dry: bool) -> None:
    """Denoiser and decoder by micro-batch, in bfloat16 with the rewrites, until memory ends."""
    import torch

    from benchmarks import ladder as cpu_ladder
    from brainsynth.models.device import autocast, has_bfloat16

    device, size = the_device(dry), size_of(dry)
    precision = "bfloat16" if not dry or has_bfloat16(device) else "float32"

    @torch.no_grad()
    def run(network: Callable[..., Any], *given: Any) -> dict[str, float]:
        peak_memory(device)
        with autocast(device, precision):
            taken = seconds(lambda: network(*given), device, 1 if dry else 3)
        return {"s_per_volume": statistics.median(taken) / len(given[0]), "peak_memory_gb": peak_memory(device)}

    for distilled in (False, True):
        how = cpu_ladder.Rung("", "unipc", 8, precision, distilled=distilled)
        autoencoder, denoiser = cpu_ladder.arranged(cpu_ladder.build(size, device), how, size)
        for count in (1, 2, 4, 8) if not dry else (1, 2):
            z, _ = cpu_ladder.inputs(size, count, device)
            name = f"decode {'distilled ' if distilled else ''}{count}"
            if notes.rung(name, functools.partial(run, autoencoder.decode, z)) is None:
                break
    for count in (1, 2, 4, 8, 16, 32, 64) if not dry else (1, 2):
        z, context = cpu_ladder.inputs(size, count, device)
        step = functools.partial(run, denoiser, z, torch.full((count,), 979.0, device=device), context)
        if notes.rung(f"step {count}", step) is None:
            break


def training(notes: Notes, dry: bool) -> None:
    """Training steps against MONAI's tutorial, one kind after the other."""
    from benchmarks import training_speed

    device, size = the_device(dry), size_of(dry)
    notes.rung("tflop", lambda: training_speed.counted_steps(size))
    kinds, much = training_speed.kinds_here(device), (1 if dry else 4, 1 if dry else 5, device)
    notes.rung("steps", lambda: training_speed.measure(size, *much, [kind for kind in kinds if not kind.compiled]))
    if not dry:  # minutes on a CPU
        notes.rung("compiled steps", lambda: training_speed.measure(size, *much, [k for k in kinds if k.compiled]))


def pipeline(notes: Notes, dry: bool) -> None:
    """A generation through Ray, written and committed: volumes per second, and how busy the device is."""
    from benchmarks import overhead
    from benchmarks.timed_shards import add_gate, head
    from recipes.random_bundle import TINY, Size, make_random_bundle

    the_device(dry)
    paper = size_of(False).spec
    size = TINY if dry else Size(paper.autoencoder, paper.diffusion)
    shape = (32, 40, 32) if dry else paper.volume.shape_xyz
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        notes.rung("bundle", lambda: make_random_bundle(root / "bundle", size, shape, 4.0 if dry else 1.0))
        notes.rung("gate", lambda: add_gate(root / "bundle", head(shape)))
        notes.rung("Ray starts, seconds", lambda: stack.enter_context(overhead.session()))
        for steps, shards, gated in ((8, 4, True), (8, 4, False), (50, 2, False)) if not dry else ((2, 3, True),):
            load = overhead.Load(
                shape,
                size,
                16 if not dry else 2,
                shards,
                steps,
                use_gpu=not dry,
                threads=0 if not dry else 1,
                precision="float32" if dry else "bfloat16",
                gated=gated,
            )

            def one(load: overhead.Load = load, output: Path = root / f"data-{steps}-{gated}") -> dict[str, Any]:
                work, runtime = overhead.prepared(load, root / "bundle", output, 1, overhead.TimedShards)
                found = overhead.executed(work, runtime)
                return {**found, "device_s_per_volume": found["device_s_per_shard"] / load.per_shard}

            notes.rung(f"{steps} steps{', gate' if gated else ''}", one)


def further(section: str, notes: Notes, dry: bool) -> None:
    """A section of gpu_sections.py, which needs torch."""
    getattr(importlib.import_module("benchmarks.gpu_sections"), section)(notes, dry)


SECTIONS: dict[str, Callable[[Notes, bool], None]] = {
    "facts": facts,
    "ladder": ladder,
    "memory": functools.partial(further, "memory"),
    "decoding": functools.partial(further, "decoding"),
    "pipeline": pipeline,
    "shipped": functools.partial(further, "shipped"),
    "batch": batch,
    "training": training,
}


def in_a_process(section: str, dry: bool, limit_s: float, folder: Path) -> dict[str, Any]:
    """Run a section; whatever happens to it, what it had found comes back."""
    missing = [name for name in NEEDS[section] if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    notes = folder / f"{section}.jsonl"
    command = [sys.executable, *ITSELF, "--section", section, "--notes", str(notes), "--limit-s", str(limit_s)]
    began = time.monotonic()
    with (folder / f"{section}.log").open("w+") as log:
        # A group of its own, so that what the section started ends with it.
        child = subprocess.Popen(
            [*command, *(["--dry-run"] if dry else [])], cwd=REPO, stdout=log, stderr=log, start_new_session=True
        )
        ended = ""
        try:
            if child.wait(limit_s):
                ended = f"ended with exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"ran past its {limit_s:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        log.seek(0)
        tail = log.read()[-600:]
    rungs: dict[str, Any] = {}
    for line in notes.read_text().splitlines() if notes.exists() else ():
        entry = json.loads(line)
        name = entry.pop("rung")
        rungs[name] = {"error": ended} if entry.pop("begun", False) else entry
    problem = {"error": ended, "log": tail} if ended else {}
    return {"took_s": round(time.monotonic() - began, 1), **problem, "rungs": rungs}


def main() -> None:
    """Run every section, or as a child one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("h200.json"))
    parser.add_argument("--dry-run", action="store_true", help="toy size on the CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit-s", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        # Rungs stop early enough for the section to end by itself.
        SECTIONS[arguments.section](Notes(arguments.notes, time.time() + 0.9 * arguments.limit_s), arguments.dry_run)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a section never outlives this
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "dry_run": arguments.dry_run,
        "sections": {},
    }
    spare = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for section in arguments.only:
            limit_s = (BUDGET_S[section] + spare) * (PATIENCE if arguments.dry_run else 1)
            entry = in_a_process(section, arguments.dry_run, limit_s, Path(folder))
            spare = 0.0 if arguments.dry_run else max(0.0, limit_s - entry.get("took_s", 0.0))
            found["sections"][section] = entry
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")  # after each: a call may be cut off
            print(section, json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
