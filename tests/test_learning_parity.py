"""`train` against a plain torch loop with the same initial weights, batches and hyperparameters."""

import math

import numpy as np
import pytest
from conftest import metrics, small_config

from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.model import hf
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.train import train
from trialgpt_jax.training.program import Program

pytestmark = pytest.mark.slow
STEPS, WARMUP, PEAK = 100, 10, 3e-3


def config_of(store, accumulate_steps=1):
    config = small_config(store)
    config.data.shuffle = False
    config.model.dropout = 0.0
    config.optim.update({"learning_rate": PEAK, "warmup_steps": WARMUP, "weight_decay": 0.1, "clip_norm": 1.0})
    config.train.update({"steps": STEPS, "accumulate_steps": accumulate_steps, "dtype": "float32"})
    config.checkpoint.every_steps = 0
    config.eval.every_steps = 0
    return config


@pytest.fixture(scope="module")
def curve(store, tmp_path_factory):
    """A function: number of microbatches -> the metrics of such a run, which is run once."""
    runs = {}

    def run(accumulate_steps):
        if accumulate_steps not in runs:
            workdir = tmp_path_factory.mktemp(f"accumulate_{accumulate_steps}")
            assert train(config_of(store, accumulate_steps), str(workdir)) == 0
            runs[accumulate_steps] = metrics(workdir)
        return runs[accumulate_steps]

    return run


def torch_losses(config):
    """Losses and gradient norms of the same run as a torch loop in the style of nanoGPT's train.py."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    program = Program(config, mesh=single_device())
    params = program.init_state().params
    settings = transformers.GPT2Config(**hf.hf_config(program.gpt, 0), attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(settings).train()
    state = {name: torch.from_numpy(value.copy()) for name, value in hf.to_hf(params, program.gpt).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
    ids = np.fromfile(f"{config.data.dir}/train_00000.bin", np.uint16).astype(np.int64)
    B, T = config.train.batch_size, config.model.block_size
    losses, norms = [], []
    for step in range(STEPS):
        if step < WARMUP:
            rate = PEAK * (step + 1) / (WARMUP + 1)
        else:
            rate = PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        first = step * B
        windows = torch.from_numpy(np.stack([ids[i * T : i * T + T + 1] for i in range(first, first + B)]))
        logits = model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), np.array(norms)


def test_a_hundred_steps_equal_those_of_a_torch_loop(curve, store):
    lines = curve(1)
    assert open_store(str(store)).split("train").n_windows(32) >= STEPS * 8, (
        "less than an epoch, so batch k is the k-th part of the file"
    )
    losses, norms = torch_losses(config_of(store))
    ours = np.array([line["loss"] for line in lines])
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert losses[0] - losses[-1] > 1, "the model must learn, otherwise equal curves prove nothing"
    assert (norms > 1).any() and (norms < 1).any(), "clipping must act in some steps and not in others"
    assert np.abs(ours - losses).max() < 2e-3
    assert np.abs(np.array([line["grad_norm"] for line in lines]) / norms - 1).max() < 2e-2


@pytest.mark.parametrize("accumulate_steps", [2, 4])
def test_microbatches_give_the_same_curve(curve, accumulate_steps):
    whole = np.array([line["loss"] for line in curve(1)])
    parts = np.array([line["loss"] for line in curve(accumulate_steps)])
    assert np.abs(parts[0] - whole[0]) < 1e-6
    assert np.abs(parts - whole).max() < 1e-4  # rounding errors, amplified by a hundred steps
