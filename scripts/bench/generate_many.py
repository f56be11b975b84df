"""Measures the continuation of many prompts that differ in length: GPT-2 124M with random weights, greedy.

    python scripts/bench/generate_many.py --peer    # writes scripts/bench/results/generate_many.json

1,000 prompts of 5 to 200 ids, drawn uniformly, 64 new ones each, float32 on CPU. Ours is `LanguageModel.samples`, from
ids to text. --peer runs Hugging Face `generate` (torch) on the same weights with left padding, in the order of the file
and at each of --peer_batches; the best of them counts. The two run in turns, and the script fails unless both produce
the same ids; where float32 makes two ids equally likely to rounding, both may be right, so a first difference whose
logits are closer than 1e-4 is counted instead. A time is that of a whole run; ours runs once before, to compile.

--layers, --width, --prompts and --new make it small enough to try.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import report
from flax import linen as nn

from trialgpt_jax.data.tokenizer import load
from trialgpt_jax.generation.samples import Options
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model import hf
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.accelerators import compute_dtype
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.training.train_step import init_params

SHORTEST, LONGEST = 5, 200
Run = Callable[[Sequence[list[int]]], list[list[int]]]  # prompts -> new ids of each, up to end-of-text


def ours(model: LanguageModel, new: int, batch_size: int) -> Run:
    options = Options(new, batch_size=batch_size)

    def run(prompts: Sequence[list[int]]) -> list[list[int]]:
        return [samples[0].tokens for samples in model.samples(prompts, options)]

    return run


def hugging_face(model: LanguageModel, new: int, batch_size: int) -> Run:
    import torch
    import transformers

    eot_id, config = model.tokenizer.eot_id, model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf.hf_config(config, eot_id=eot_id)))
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in hf.to_hf(model.params, config).items()}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    theirs.tie_weights()
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    theirs = theirs.eval().to(device, getattr(torch, str(config.dtype)))

    def run(prompts: Sequence[list[int]]) -> list[list[int]]:
        found = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            longest = max(map(len, batch))
            ids = torch.tensor([[eot_id] * (longest - len(each)) + each for each in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in batch], device=device)
            with torch.inference_mode():
                out = theirs.generate(
                    ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=eot_id
                )
            rows = out[:, longest:].tolist()
            found += [row[: row.index(eot_id)] if eot_id in row else row for row in rows]
        return found

    return run


def near_ties(model: LanguageModel, prompts: Sequence[list[int]], a: list[list[int]], b: list[list[int]]) -> int:
    """The number of prompts that differ, from an id on whose logit is the other's to 1e-4; fails for any other."""
    count = 0
    for prompt, left, right in zip(prompts, a, b, strict=True):
        if left == right:
            continue
        place = next(i for i, pair in enumerate(zip([*left, 0], [*right, 0], strict=False)) if len(set(pair)) > 1)
        row = model.logits([*prompt, *left[:place]])[-1]
        pair = [each[place] if place < len(each) else model.tokenizer.eot_id for each in (left, right)]
        assert abs(row[pair[0]] - row[pair[1]]) < 1e-4, (prompt, left, right, row[pair])
        count += 1
    return count


def main() -> None:
    parser = report.parser(__doc__, "generate_many", rounds=3)
    parser.add_argument("--peer", action="store_true", help="measure Hugging Face generate too")
    parser.add_argument("--peer_batches", default="8,16,32", help="batch sizes of which its best counts")
    parser.add_argument("--batch_size", type=int, default=Options().batch_size, help="of ours")
    for name, default in (("prompts", 1000), ("new", 64), ("layers", 12), ("width", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if jax.config.jax_platforms == "cpu":  # as the commands do
        jax.config.update("jax_cpu_enable_async_dispatch", False)

    dtype = compute_dtype("auto", jax.default_backend())
    config = GPTConfig(dtype=dtype, n_layer=given.layers, n_embd=given.width)
    params = nn.unbox(jax.jit(init_params, static_argnums=(0, 1))(config, 0))
    model = LanguageModel(params, config, load("gpt2"), single_device())
    model.shows_progress = False
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, given.prompts)
    prompts = [rng.integers(0, config.vocab_size - 1, n).tolist() for n in lengths]

    programs = {"ours": ours(model, given.new, given.batch_size)}
    if given.peer:
        for size in map(int, given.peer_batches.split(",")):
            programs[f"hugging_face, batch {size}"] = hugging_face(model, given.new, size)
    report.say("ours, once to compile")
    programs["ours"](prompts)
    tokens: dict[str, list[list[int]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(given.rounds):
        for name, run in programs.items():
            report.say(f"{name}, run {len(seconds[name]) + 1} of {given.rounds}")
            started = time.perf_counter()
            tokens[name] = run(prompts)
            seconds[name].append(time.perf_counter() - started)
    ties = {name: near_ties(model, prompts, tokens["ours"], found) for name, found in tokens.items() if name != "ours"}

    n_new = sum(map(len, tokens["ours"]))
    rates = {name: round(n_new / statistics.median(each), 1) for name, each in seconds.items()}
    packages = ("jax", "jaxlib", "flax", "numpy", *(("torch", "transformers") if given.peer else ()))
    figures = {
        "what": f"new tokens a second, {given.layers} layers of {given.width}, {dtype}, {given.prompts} prompts of "
        f"{SHORTEST} to {LONGEST} ids, {given.new} new ones each, greedy; prompts included",
        "machine": f"{report.machine()}, {jax.devices()[0].device_kind}",
        "versions": report.versions(*packages),
        "batch_size": given.batch_size,
        "tokens": n_new,
        "distinct_tokens": len({i for each in tokens["ours"] for i in each}),
        "rates": rates,
        "seconds": {name: [round(each, 2) for each in times] for name, times in seconds.items()},
        "note": given.note,
    }
    if given.peer:
        best = max(rate for name, rate in rates.items() if name != "ours")
        figures |= {"ratio_to_the_best": round(rates["ours"] / best, 2), "prompts_with_a_near_tie": ties}
    report.write(figures, given.output)


if __name__ == "__main__":
    main()
