"""Full-size proof that a bundle of the published files computes what MONAI's own networks compute from the same files.

    python -m benchmarks.published_weights --work SCRATCH

The published files are not needed: random weights of the same size and both key styles replace them. They are made by
MONAI core's networks and, when the package `monai-generative` can be imported, by the classes that wrote the published
files. Takes about ten CPU minutes, 12 GB of memory and 7 GB of disk below --work. Writes results/published-weights.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from torch import Tensor, nn

from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.spec import BundleSpec
from brainsynth.models.loading import load_models
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.stages.import_bundle import PAPER, import_bundle

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "published-weights.json"
AUTOENCODER = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 3,
    "num_res_blocks": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "attention_levels": (False,) * 4,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
DIFFUSION = {
    "spatial_dims": 3,
    "in_channels": 7,
    "out_channels": 3,
    "num_res_blocks": 2,
    "attention_levels": (False, True, True),
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "resblock_updown": True,
    "num_head_channels": (0, 512, 768),
    "with_conditioning": True,
    "transformer_num_layers": 1,
    "cross_attention_dim": 4,
    "upcast_attention": True,
}
OWN = ("CC0-1.0", "none: random weights")


def filled(network: nn.Module, seed: int) -> nn.Module:
    """Random weights that keep activations near one; fresh networks have zeros in their last layers and answer zero."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return network.requires_grad_(False).eval()


def core() -> tuple[nn.Module, nn.Module]:
    """MONAI core's networks with the arguments of the zoo's inference.json, on the meta device."""
    with torch.device("meta"):
        return AutoencoderKL(channels=(64, 128, 128, 128), **AUTOENCODER), DiffusionModelUNet(
            channels=(256, 512, 768), **DIFFUSION
        )


def old() -> tuple[nn.Module, nn.Module] | None:
    """The classes that wrote the published files, on the meta device; None where the package is missing."""
    try:
        from generative.networks import nets
    except ImportError:
        return None
    with torch.device("meta"):
        return nets.AutoencoderKL(num_channels=(64, 128, 128, 128), **AUTOENCODER), nets.DiffusionModelUNet(
            num_channels=(256, 512, 768), **DIFFUSION
        )


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Result and CPU seconds of this process."""
    began = time.process_time()
    result = run()
    return result, round(time.process_time() - began, 2)


def difference(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Largest difference, and root mean square of the difference over that of `wanted`."""
    error = (found - wanted).double()
    relative = float(error.square().mean().sqrt() / wanted.double().square().mean().sqrt())
    return {"largest": float(error.abs().max()), "relative_rms": relative, "rms": float(wanted.square().mean().sqrt())}


def save_files(work: Path) -> tuple[dict[str, tuple[str, str]], list[nn.Module]]:
    """Weight files of both key styles with the same numbers, and the networks that wrote the old style."""
    writers = old()
    networks = [filled(n.to_empty(device="cpu"), i) for i, n in enumerate(writers or core())]
    files = {style: (str(work / f"{style}-ae.pt"), str(work / f"{style}-unet.pt")) for style in ("old", "core")}
    style = "old" if writers else "core"
    for network, path in zip(networks, files[style], strict=True):
        torch.save(network.state_dict(), path)
    if not writers:
        del files["old"]
        return files, networks
    for network, source, path in zip(core(), files["old"], files["core"], strict=True):
        network.to_empty(device="cpu").load_old_state_dict(torch.load(source, weights_only=True, mmap=True))
        torch.save(network.state_dict(), path)
    return files, networks


@torch.no_grad()
def compare_denoiser(writer: nn.Module, file: str, bundle: Path, spec: BundleSpec) -> dict[str, Any]:
    """One denoising step of DDIM-50, by the writer's network, MONAI core's with its own converter, and ours."""
    torch.manual_seed(7)
    z, context = torch.randn(1, 3, 20, 28, 20), torch.tensor([[0.0, 0.1, 0.2, 0.4]])
    t = torch.tensor([979.0])
    planes = context[:, :, None, None, None].expand(-1, -1, *z.shape[2:])
    inputs = (torch.cat([z, planes], dim=1), t, context[:, None])
    result: dict[str, Any] = {}
    written, result["writer_cpu_s"] = timed(functools.partial(writer, *inputs))
    network = core()[1].to_empty(device="cpu")
    network.load_old_state_dict(torch.load(file, weights_only=True, mmap=True))
    network.requires_grad_(False).eval()
    wanted, result["monai_cpu_s"] = timed(functools.partial(network, *inputs))
    result["monai_against_writer"] = difference(wanted, written)
    del network
    gc.collect()
    for name, rewrites in (("plain", False), ("rewritten", True)):
        _, denoiser = load_models(bundle, spec, torch.device("cpu"), rewrites=rewrites)
        found, result[f"{name}_cpu_s"] = timed(lambda denoiser=denoiser: denoiser(z, t, context))
        result[f"{name}_against_monai"] = difference(found, wanted)
        scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0205, schedule="scaled_linear_beta", clip_sample=False)
        scheduler.set_timesteps(50)
        _, peer_x0 = scheduler.step(wanted, 979, z)
        x0, _ = NoiseSchedule(spec.schedule).denoised(found, z, 979)
        result[f"{name}_denoised_against_monai"] = difference(x0, peer_x0)
        del denoiser
        gc.collect()
    return result


@torch.no_grad()
def compare_decoder(file: str, bundle: Path, latents_xyz: tuple[int, int, int]) -> dict[str, Any]:
    """One decode by MONAI core's network with its own converter, and by ours, rewritten, in RAS+."""
    torch.manual_seed(8)
    z = torch.randn(1, 3, *latents_xyz)
    peer = core()[0].to_empty(device="cpu")
    peer.load_old_state_dict(torch.load(file, weights_only=True))
    peer.requires_grad_(False).eval()
    wanted, peer_s = timed(lambda: peer.decode(z))
    spec = read_bundle(bundle)
    autoencoder, _ = load_models(bundle, spec, torch.device("cpu"), rewrites=True)
    raw: list[Tensor] = []
    autoencoder.network.decoder.register_forward_hook(lambda _module, _inputs, output: raw.append(output))
    found, own_s = timed(lambda: autoencoder.decode(z))
    return {
        "latents_xyz": latents_xyz,
        "monai_cpu_s": peer_s,
        "rewritten_cpu_s": own_s,
        "rewritten_against_monai": difference(raw[0], wanted),
        "as_stored_against_monai": difference(found, wanted.clamp(0, 1).flip(2)),
    }


def main() -> None:
    """Everything in one thread, so that CPU seconds mean something on a busy machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="a scratch folder, emptied first; kept for --decoder-only"
    )
    parser.add_argument("--decoder-only", action="store_true", help="with the files of an earlier run")
    parser.add_argument("--latents-xyz", type=int, nargs=3, default=PAPER.latents.shape_cxyz[1:], help="decoder's grid")
    arguments = parser.parse_args()
    work = arguments.work
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__}
    if arguments.decoder_only:
        result = json.loads(RESULT.read_text())
    else:
        make_and_import(work, result)
    style = result["styles"][-1]
    result["decoder"] = compare_decoder(str(work / f"{style}-ae.pt"), work / f"bundle-{style}", arguments.latents_xyz)
    result["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def make_and_import(work: Path, result: dict[str, Any]) -> None:
    """Weight files, bundles and the denoiser's comparison, into `work` and `result`."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    files, (_, unet) = save_files(work)
    result["styles"] = sorted(files)
    bundles = {}
    for style, (a, d) in files.items():
        bundles[style], result[f"import_{style}_cpu_s"] = timed(
            lambda a=a, d=d, style=style: import_bundle(a, d, str(work / f"bundle-{style}"), own=OWN, model=PAPER)
        )
    result["same_weights_from_both_styles"] = len({tuple(s.weights.items()) for s in bundles.values()}) == 1
    style = result["styles"][-1]
    result["denoiser"] = compare_denoiser(unet, files[style][1], work / f"bundle-{style}", bundles[style])
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
