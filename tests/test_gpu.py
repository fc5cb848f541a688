"""What only a GPU can show; skipped without one. At most five minutes: python -m pytest -s tests/test_gpu.py"""
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, log
from torch.nn.attention import SDPBackend

import common
import ddae
import deepmim
import sdae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = dict(embed_dim=192, num_heads=3, depth=4)
DECODER = dict(decoder_dim=128, decoder_heads=4, decoder_depth=1)
METHODS = {
    "DDAE": lambda **o: ddae.DDAE(ddae.Config(**o)), "DeepMIM": lambda **o: deepmim.DeepMIM(deepmim.Config(**o)),
    "MAE": lambda **o: ddae.DDAE(ddae.Config(pixel="plain", feature="none", **dict(decoder_depth=8) | o)),
    "HOG": lambda **o: deepmim.DeepMIM(deepmim.Config(target="hog", **o)),
    "SdAE": lambda **o: sdae.SdAE(sdae.Config(drop_path=0.0, **o)),
}


@pytest.mark.parametrize("tokens, heads, width", [(50, 12, 64), (197, 12, 64), (197, 16, 32)])
def test_attention_is_fused(tokens, heads, width):
    q, k, v = torch.randn(8, tokens, 3, heads, width, device="cuda", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    backend = SDPBackend(torch._fused_sdp_choice(q, k, v))
    assert backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION), backend
    exact = F.scaled_dot_product_attention(*(x.double().cpu() for x in (q, k, v)))
    assert (F.scaled_dot_product_attention(q, k, v).double().cpu() - exact).abs().max() < 0.02


def batch(B):
    cfg = ddae.Config()
    ids = [ddae.draw_mask(np.random.default_rng(i), cfg) for i in range(8)]
    return torch.randint(0, 256, (B, 3, 224, 224), dtype=torch.uint8), torch.from_numpy(np.stack(ids)).repeat(B // 8, 1)


def loss_and_gradient(name, device, bf16=False, compiled=False):
    torch.manual_seed(0)
    model = METHODS[name](**SMALL, **DECODER).to(device)
    common.wrap_blocks(model, dataclasses.replace(model.cfg, compile=compiled))
    imgs, ids = common.to_device(*batch(8), torch.device(device))
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss, _ = model(imgs, ids)
    loss.backward()
    grads = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_agree(name):
    cpu, fp32, bf16 = (loss_and_gradient(name, *how) for how in (("cpu",), ("cuda",), ("cuda", True)))
    compiled = loss_and_gradient(name, "cuda", True, True) if name in ("DDAE", "SdAE") else bf16
    for a, b, tolerance, cosine in ((fp32, cpu, 1e-4, 0.9999), (bf16, fp32, 0.02, 0.99), (compiled, bf16, 0.02, 0.99)):
        assert a[0] == pytest.approx(b[0], rel=tolerance) and F.cosine_similarity(a[1], b[1], 0) > cosine


def test_crops_cut_on_the_gpu_are_the_loaders():
    cfg = ddae.Config(img_size=32, patch_size=4, data="shapes", num_workers=4)
    samples = common.Samples(common.open_data(cfg, "train"), cfg, ddae.draw_mask)
    keys = [[(epoch, i) for i in range(300)] for epoch in range(3)]
    cpu, gpu = (common.feed(samples, common.resident(samples, torch.device(*d)), torch.device(*d), keys)
                for d in (("cpu",), ("cuda", 0)))
    for (a, mask, _), (b, same, _) in zip(cpu, gpu, strict=True):
        difference = (a.int() - b.cpu().int()).abs()
        assert b.is_cuda and torch.equal(mask, same.cpu()) and difference.max() <= 2 and difference.any()


def step(model, optimizer, imgs, ids):
    """One step of `common.train`, without its data."""
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = model(*common.to_device(imgs, ids, torch.device("cuda", 0)))
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item() < torch.inf  # the wait
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(1, 10)


@pytest.mark.parametrize("name, B, compiled, floor", [  # images/s on an H200
    ("DDAE", 512, False, 1400), ("DDAE", 512, True, 1800), ("MAE", 512, False, 3800), ("MAE", 512, True, 4800),
    ("SdAE", 96, False, 2300), ("DeepMIM", 512, False, 2300)])
def test_one_wait_per_step_and_speed(name, B, compiled, floor):
    torch.cuda.reset_peak_memory_stats()
    model = METHODS[name]().cuda()
    optimizer, data = common.adamw(model, model.cfg), [x.pin_memory() for x in batch(B)]
    common.wrap_blocks(model, dataclasses.replace(model.cfg, compile=compiled))
    for _ in range(3):
        step(model, optimizer, *data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step(model, optimizer, *data)
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing" in str(w.message) for w in caught)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        step(model, optimizer, *data)
    torch.cuda.synchronize()
    rate, peak = 10 * B / (time.perf_counter() - began), torch.cuda.max_memory_allocated() / 2 ** 30
    device = torch.cuda.get_device_name()
    print(f"\n{device}: {name}, {B} images, compiled {compiled}: {rate:.0f} images/s, peak {peak:.1f} GiB")
    torch.compiler.reset()
    assert waits == 1 and (rate > floor or "H200" not in device)


def launch(script, flags, **how):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return subprocess.Popen([sys.executable, "-m", *script.split(), *flags.split()], cwd=ROOT, text=True, **how,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limit)))


def test_a_run_stops_resumes_and_is_evaluated(tmp_path):
    flags = f"--preset quick --epochs 1 --warmup_epochs 0.1 --out_dir {tmp_path} --log_every 1 --num_workers 10"
    job = launch("ddae", flags)
    while not log(tmp_path):
        time.sleep(0.1)
        assert job.poll() is None, job.communicate()
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(60) == 128 + signal.SIGTERM
    job = launch("ddae", flags)
    out, _ = job.communicate(timeout=200)
    done = [line["step"] for line in log(tmp_path) if "loss" in line]
    assert job.returncode == 0 and done == list(range(1, 313)) and (tmp_path / "preview.png").exists(), out
    for script in ("finetune", "finetune --mode knn", "transfer.segment", "transfer.detect"):
        limit = "" if "knn" in script else "--max_steps 4"
        job = launch(script, f"--preset quick --init {tmp_path}/encoder.pt --out_dir {tmp_path / script[-8:]} {limit}")
        out, _ = job.communicate(timeout=200)
        assert job.returncode == 0, f"{script}\n{out}"


def test_out_of_memory_is_one_line(tmp_path):
    job = launch("ddae", f"--data shapes --batch_size 8192 --num_workers 16 --out_dir {tmp_path} --preset large")
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 1 and "--micro_batch" in out and "Traceback" not in out
