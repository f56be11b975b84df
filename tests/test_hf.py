"""Exchange of weights, configuration and tokenizer with transformers' GPT-2, both ways, and what is refused.

`test_hf_classes.py` has the other classes.
"""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_options import random_params
from safetensors.numpy import load_file, save_file

from trialgpt_jax import UserError
from trialgpt_jax.data import hf_tokenizer, tokenizer
from trialgpt_jax.model import hf, hf_folder
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.schema import field, specs

CONFIG = GPTConfig(vocab_size=101, block_size=16, n_layer=3, n_head=2, n_embd=16)
WPE, LN_F = "transformer.wpe.weight", "transformer.ln_f.bias"


def exported(folder, config=CONFIG, **theirs):
    """Exports random parameters into `folder` and returns them; `theirs` replaces fields of its config.json."""
    params = random_params(config)
    for table in {"wte", "lm_head"} & params.keys():
        params[table]["embedding"][config.vocab_size :] = 0
    folder.mkdir(exist_ok=True)
    hf.write(str(folder), params, config, 100)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | theirs))
    return params


def imported(folder, config=CONFIG):
    return hf.from_hf(hf_folder.SafetensorsFolder(str(folder)), config)


def assert_equal(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for mine, want in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
        assert mine.dtype == want.dtype
        np.testing.assert_array_equal(mine, want)


def edited(folder, edit):
    """Rewrites the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_every_tensor_and_we_read_back_what_it_saves(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = exported(tmp_path / "ours", config)
    model, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.vocab_size == 101 and model.generation_config.eos_token_id == 100
    model.save_pretrained(tmp_path / "theirs")
    assert_equal(imported(tmp_path / "theirs", config), params)
    fields = hf.read_config(str(tmp_path / "theirs"))
    assert GPTConfig(**fields) == config


def test_sharded_files_and_names_without_prefix_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    params = exported(tmp_path / "ours")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    assert_equal(imported(tmp_path / "sharded"), params)
    # OpenAI's weights on the hub have this form: no prefix, and the causal masks as tensors
    model.transformer.save_pretrained(tmp_path / "bare")

    def add_masks(tensors):
        assert "wte.weight" in tensors
        for i in range(3):
            tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
            tensors[f"h.{i}.attn.masked_bias"] = np.float32(-1e4).reshape(1)

    edited(tmp_path / "bare", add_masks)
    assert_equal(imported(tmp_path / "bare"), params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_are_read_as_float32(tmp_path, dtype):
    params = exported(tmp_path)
    edited(tmp_path, lambda tensors: tensors.update({k: v.astype(jax.numpy.dtype(dtype)) for k, v in tensors.items()}))
    rounded = jax.tree.map(lambda p: p.astype(jax.numpy.dtype(dtype)).astype(np.float32), params)
    assert_equal(imported(tmp_path), rounded)


def test_a_model_without_biases_is_exported_as_one_with_zeros(tmp_path):
    config = dataclasses.replace(CONFIG, bias=False)
    params = exported(tmp_path, config)
    read = imported(tmp_path)
    assert_equal(read["blocks"]["mlp"]["c_fc"]["kernel"], params["blocks"]["mlp"]["c_fc"]["kernel"])
    biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(read) if path[-1].key == "bias"]
    assert len(biases) == 9 and not any(map(np.any, biases))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": "rope"}, ["model.position=rope"]),
        ({"norm": "rmsnorm", "activation": "swiglu"}, ["model.position=learned (only rope)"]),  # a Llama otherwise
        ({"qk_norm": True, "embed_norm": True}, ["model.qk_norm=True", "model.embed_norm=True"]),
        ({"logit_softcap": 15.0}, ["model.logit_softcap=15.0"]),
        ({"n_kv_head": 1}, ["model.n_kv_head=1 (n_head is 2)"]),
        ({"head_dim": 4}, ["model.head_dim=4 (n_embd / n_head is 8)"]),
    ],
)
def test_what_gpt2_cannot_express_is_refused_by_name(changes, words):
    with pytest.raises(UserError) as error:
        hf.to_hf({}, dataclasses.replace(CONFIG, **changes))
    assert all(word in str(error.value) for word in words), error.value


# Every option that the export as a GPT-2 accepts, with a value that is not the default. All other options are refused.
EXPORTED = {
    "vocab_size": 101,
    "block_size": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 16,
    "mlp_width": 37,
    "bias": False,
    "dropout": 0.1,
    "tie_embeddings": False,
    "activation": "relu2",
    "norm_scale": False,
    "norm_eps": 1e-6,
    "zero_init_proj": True,  # acts on initial values only
    "rope_base": 500.0,  # changes nothing without rope
    "qk_norm_scale": False,  # needs qk_norm, which is refused
}


def another(default, spec):
    """A value other than the default for an option of the model."""
    if spec.choices:
        return next(choice for choice in spec.choices if choice != default)
    if isinstance(default, bool):
        return not default
    return default + 0.5 if isinstance(default, float) else default + 1


def test_gpt2s_options_are_exported():
    theirs = hf.hf_config(GPTConfig(**EXPORTED), None)
    assert (theirs["n_layer"], theirs["attn_pdrop"], theirs["tie_word_embeddings"]) == (3, 0.1, False)
    assert (theirs["n_inner"], theirs["layer_norm_epsilon"], theirs["activation_function"]) == (37, 1e-6, "relu2")


@pytest.mark.parametrize("name", [name for name in specs(GPTConfig) if name not in EXPORTED])
def test_every_other_option_is_refused(name):
    config = GPTConfig(**{name: another(*specs(GPTConfig)[name])})
    for export in (lambda: hf.to_hf({}, config), lambda: hf.hf_config(config, None)):
        with pytest.raises(UserError, match=f"cannot express model.{name}={getattr(config, name)}"):
            export()


def test_an_option_that_the_export_does_not_know_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Extended(GPTConfig):
        post_norm: bool = field(False, "an option of a later version")

    hf.check_expressible(Extended())
    with pytest.raises(UserError, match="cannot express model.post_norm=True"):
        hf.check_expressible(Extended(post_norm=True))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), r"has no tensor `h.1.mlp.c_fc.bias`"),
        (
            lambda t: [t.pop(k) for k in list(t) if ".h.2." in k],
            r"has no tensor `h.2.attn.c_attn.bias` \(and 11 more\)",
        ),
        (lambda t: t.update({"transformer.h.3.ln_1.bias": t[LN_F]}), "unknown tensor `h.3.ln_1.bias`"),
        (lambda t: t.update({"score.weight": t[LN_F]}), "unknown tensor `score.weight`"),
        (
            lambda t: t.update({"transformer.h.0.attn.c_attn.weight": t["transformer.h.0.attn.c_proj.weight"]}),
            r"`transformer.h.0.attn.c_attn.weight` has shape \(16, 16\), but config.json asks for \(16, 48\)",
        ),
        (lambda t: t.update({WPE: t[WPE][:8].copy()}), r"`transformer.wpe.weight` has shape \(8, 16\).*\(16, 16\)"),
        (lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}), "set tie_word_embeddings=false"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, edit, message):
    exported(tmp_path)
    edited(tmp_path, edit)
    with pytest.raises(UserError, match=message):
        imported(tmp_path)


def test_a_copy_of_the_tied_head_is_accepted(tmp_path):
    params = exported(tmp_path)
    edited(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].copy()}))
    assert_equal(imported(tmp_path), params)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        # sizes that would take all memory, with the limit
        ({"n_layer": 10**9}, "n_layer is 1000000000, but must be at least 1 and at most 10000$"),
        ({"n_embd": 10**7}, "n_embd is 10000000, but must be at least 1 and at most 131072$"),
        ({"vocab_size": 2**31 - 1}, "vocab_size is 2147483647, but must be at least 1 and at most 16777216$"),
        ({"n_positions": 2**40}, "n_positions is 1099511627776, but must be at least 1 and at most 16777216$"),
        ({"n_head": 0}, "n_head is 0, but must be at least 1"),
        ({"n_layer": -(10**30)}, "n_layer is -1000"),
        # other types
        ({"n_layer": 3.0}, "n_layer: Expected int, got float"),
        ({"n_layer": None}, "n_layer: Expected int, got null"),
        ({"vocab_size": True}, "vocab_size: Expected int, got bool"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: Expected bool | null, got str"),
        ({"scale_attn_weights": "true"}, "scale_attn_weights: Expected bool, got str"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon: Expected float, got str"),
        ({"n_inner": "64"}, r"n_inner: Expected int | null, got str"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised .quantization_config 'bitsandbytes'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', but only 'gelu_new' or 'gelu_py"),  # by erf
        ({"model_type": None}, "model_type is None, but only 'gpt2' or 'nanochat' or 'llama' or 'qwen3' can be"),
        ({"model_type": "mistral", "n_head": None}, "model_type is 'mistral'"),
        ({"model_type": ["gpt2"]}, r"model_type is \['gpt2'\]"),
        ({"activation_function": "relu"}, "activation_function is 'relu', but only 'gelu_new'"),
        ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon is -1e-06, but only 1e-12 or more, up to 1, can"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, but only False can"),
        ({"n_inner": 0}, "n_inner is 0, but must be at least 1 and at most 1048576$"),
        ({"n_layer": "3"}, "n_layer: Expected int, got str"),
        ({"n_head": 3}, "n_embd=16 is not divisible by n_head=3"),
    ],
)
def test_configurations_that_are_not_gpt2_are_refused(tmp_path, theirs, message):
    exported(tmp_path, **theirs)
    with pytest.raises(UserError, match=message):
        hf.read_config(str(tmp_path))


def test_the_other_names_of_sizes_that_transformers_accepts(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "max_position_embeddings": 99}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    found = hf.read_config(str(tmp_path))
    names = "n_embd", "n_layer", "n_head", "block_size"
    assert [found[name] for name in names] == [32, 5, 4, 99]
    assert transformers_sizes(str(tmp_path)) == [32, 5, 4, 99]


def transformers_sizes(folder):
    config = pytest.importorskip("transformers").GPT2Config.from_pretrained(folder)
    return [config.n_embd, config.n_layer, config.n_head, config.n_positions]


@pytest.mark.parametrize("tied", [None, True, False])
def test_ties_that_are_null_are_those_of_the_tensors(tmp_path, tied):
    """null is read as if it were left out; a head that differs is then refused instead of dropped."""
    exported(tmp_path, tie_word_embeddings=tied)
    assert hf.read_config(str(tmp_path))["tie_embeddings"] is (tied is not False)


def test_sizes_that_a_configuration_leaves_out_are_those_of_gpt2(tmp_path):
    """transformers' defaults, for which it writes no line: the smallest GPT-2."""
    (tmp_path / "config.json").write_text("{}")
    found = hf.read_config(str(tmp_path))
    assert {name: found[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")} == {
        "vocab_size": 50257,
        "block_size": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
    }
    assert found["tie_embeddings"] and found["bias"] and found["dropout"] == 0


def test_damaged_files_and_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(UserError, match=r"no model.safetensors; pytorch_model.bin is a pickle.*save_pretrained"):
        hf_folder.SafetensorsFolder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="model.safetensors cannot be read as safetensors"):
        hf_folder.SafetensorsFolder(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../outside.safetensors"}}))
    with pytest.raises(UserError, match="not a plain file name"):
        hf_folder.SafetensorsFolder(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="names the shard model-00001-of-00002.safetensors, which is not there"):
        hf_folder.SafetensorsFolder(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(
        UserError, match="config.json cannot be read as the configuration of a model: it: Expected object"
    ):
        hf.read_config(str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        hf.read_config(str(tmp_path / "nowhere"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 548105171\n" % (b"0" * 64)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_named_and_the_file_in_its_place_is_read(tmp_path, name):
    # follows: is a pointer of Git LFS, not the file; run `git lfs pull` in
    params = exported(tmp_path)
    if name == hf_folder.INDEX:
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(
            load_file(tmp_path / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors"
        )
        (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    file = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(
        UserError, match=f"{name} is a pointer of Git LFS, not the file; run `git lfs pull` in {tmp_path}"
    ):
        hf.read_config(str(tmp_path))
        imported(tmp_path)
    (tmp_path / name).write_bytes(file)  # what `git lfs pull` does
    hf.read_config(str(tmp_path))
    assert_equal(imported(tmp_path), params)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_prefixes_of_wrappers_are_understood(tmp_path, prefix, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = exported(tmp_path, config)
    save_file(
        {prefix + k: v for k, v in load_file(tmp_path / "model.safetensors").items()}, tmp_path / "model.safetensors"
    )
    assert_equal(imported(tmp_path, config), params)


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: "_orig_mod." + k if ".h.0." in k else k,
        lambda k: k.removeprefix("transformer.") if ".h.1." in k else k,
        lambda k: "module." + k if "lm_head" in k else k,
    ],
)
def test_names_with_and_without_a_prefix_are_refused(tmp_path, rename):
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    exported(tmp_path, config)
    save_file(
        {rename(k): v for k, v in load_file(tmp_path / "model.safetensors").items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError, match="^tensors `.*` and `.*` have different prefixes$"):
        imported(tmp_path, config)


def test_an_unknown_prefix_is_an_unknown_tensor(tmp_path):
    exported(tmp_path)
    save_file(
        {"net." + k: v for k, v in load_file(tmp_path / "model.safetensors").items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError, match=f"^{tmp_path}: the model has no tensor"):
        imported(tmp_path)


def test_quantised_tensors_are_refused_by_name(tmp_path):
    exported(tmp_path)
    edited(tmp_path, lambda t: t.update({WPE: t[WPE].astype(np.int8)}))
    with pytest.raises(UserError, match=f"tensor `{WPE}` is of I8, as quantised weights are; only the floats F64, F32"):
        imported(tmp_path)


def test_weights_of_nn_linear_are_said_to_be_transposed(tmp_path):
    exported(tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    edited(tmp_path, lambda t: t.update({name: t[name].T.copy()}))
    with pytest.raises(UserError, match=r"\(48, 16\), but config.json asks for \(16, 48\); it is transposed"):
        imported(tmp_path)


def test_shapes_are_compared_before_a_tensor_is_read(tmp_path, monkeypatch):
    exported(tmp_path)
    edited(tmp_path, lambda t: t.update({WPE: np.zeros((1, 1), np.float32)}))

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(hf_folder.SafetensorsFolder, "__getitem__", read)
    with pytest.raises(UserError, match=r"has shape \(1, 1\), but config.json asks for \(16, 16\)"):
        imported(tmp_path)


def header(tensors):
    data = json.dumps(tensors).encode()
    return len(data).to_bytes(8, "little") + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header({"wte.weight": {"dtype": "F32", "shape": [50000, 50000], "data_offsets": [0, 10**10]}}), "metadata"),
        ((2**60).to_bytes(8, "little") + b"{}", "header too large"),
        (header({"wte.weight": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}) + bytes(16), "verflow"),
        (header({}) + b"x", "cannot be read as safetensors"),
        (b"", "cannot be read as safetensors"),
        (
            (17 << 20).to_bytes(8, "little") + b"{" * (18 << 20),
            "header has 17825792 bytes, but must have at most 16777216",
        ),
    ],
)
def test_files_that_claim_more_than_they_hold_are_refused(tmp_path, data, message):
    exported(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=f"^{tmp_path}/model.safetensors.*{message}"):
        imported(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.gguf"], "model.gguf is in llama.cpp's format, and only safetensors are read"),
        (["flax_model.msgpack"], "flax_model.msgpack is in flax's format"),
        (["tf_model.h5"], "tf_model.h5 is in TensorFlow's format"),
        (["model.onnx"], "model.onnx is in ONNX"),
        (["ckpt.pt"], "ckpt.pt is a pickle and is not read"),
        (["pytorch_model-00001-of-00002.bin"], "is a pickle and is not read, because unpickling executes code. If"),
        (["training_args.bin", "optimizer.pt"], "optimizer.pt is a pickle"),
        ([], "has no model.safetensors$"),
    ],
)
def test_weights_in_another_format_are_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{tmp_path} has no model.safetensors.*{message}|{message}"):
        hf_folder.SafetensorsFolder(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "no config.json but adapter_config.json .a PEFT adapter",
        ),
        (["tokenizer.json", "vocab.json"], "no config.json, only a tokenizer"),
        (["ckpt.pt"], "no config.json .ckpt.pt is a pickle and is not read"),
        (["manifest.json", "train_00000.bin"], "no config.json .it is a token store"),
        ([], "no config.json; a Hugging Face model is config.json and model.safetensors"),
    ],
)
def test_a_folder_without_a_configuration_says_what_it_is(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"^{tmp_path} has {message}"):
        hf.read_config(str(tmp_path))


def test_a_pickle_is_converted_as_the_message_says(tmp_path, monkeypatch):
    # does as the message says: . If you trust it, convert it with transformers
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = exported(tmp_path)
    tensors = {k: torch.from_numpy(v) for k, v in load_file(tmp_path / "model.safetensors").items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        imported(tmp_path)
    advice = str(error.value).split("convert it with transformers: ")[1]
    new = str(tmp_path / "new")
    eval(advice, {"AutoModelForCausalLM": transformers.AutoModelForCausalLM, "NEW_FOLDER": new})
    assert_equal(imported(tmp_path / "new"), params)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="with transformers: GPT2LMHeadModel.from_pretrained"):
        imported(tmp_path)


def test_one_file_is_read_rather_than_shards(tmp_path, capsys):
    params = exported(tmp_path)
    (tmp_path / hf_folder.INDEX).write_text("{}")
    assert_equal(imported(tmp_path), params)
    assert "the first is read" in capsys.readouterr().err


def test_a_head_that_differs_is_read_as_the_message_says(tmp_path):
    # follows: set tie_word_embeddings=false
    exported(tmp_path)
    edited(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))
    with pytest.raises(UserError, match="set tie_word_embeddings=false"):
        imported(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    config = GPTConfig(**hf.read_config(str(tmp_path)))
    read = imported(tmp_path, config)
    np.testing.assert_array_equal(read["lm_head"]["embedding"][:101], read["wte"]["embedding"][:101] + 1)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_exported_files_have_the_same_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        exported(tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


# ---- tokenizers

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\ttabs ",
    "don't we'll I'M 's",
    "1234 x=5;",
    "naïve café 日本語 🙂🏽",
    "\x00\x7f\u200b",
    "aaaaaaaa bbbbbb",
    "",
    " ",
    "\n",
]


@pytest.fixture(scope="module", params=["gpt2", "bpe:512"])
def pair(request, store, tmp_path_factory):
    """One of our tokenizers, the tokenizer that transformers loads from its files, and their folder."""
    transformers = pytest.importorskip("transformers")
    ours = tokenizer.load(request.param, str(store))
    folder = tmp_path_factory.mktemp("tokenizer")
    hf_tokenizer.write(ours, str(folder), 64)
    return ours, transformers.GPT2TokenizerFast.from_pretrained(folder), folder


def test_exported_tokenizer_encodes_identically(pair, store):
    ours, theirs, folder = pair
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eot_id and theirs.model_max_length == 64
    document = pathlib.Path(next((store.parent / "texts").glob("*.txt"))).read_text()
    for text in [*TEXTS, document]:
        assert theirs(text, truncation=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text

    @settings(max_examples=300)
    @given(st.text() | st.text(alphabet="ab 'sthe\n1é"))
    @example("a<|endoftext|>b")
    def same(text):  # without split_special_tokens theirs would encode `<|endoftext|>` in a text as the special id
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)

    same()
    assert (folder / "merges.txt").read_text().count("\n") == ours.vocab_size - 257 + 1


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_tokenizers_are_read_back_from_either_set_of_files(pair, tmp_path, files):
    ours, _, folder = pair
    for name in files:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    read = hf_tokenizer.read(str(tmp_path))
    assert read.id == ours.id


def test_tokenizers_saved_by_transformers_are_read_back(pair, tmp_path):
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    read = hf_tokenizer.read(str(tmp_path))
    assert read.id == ours.id


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["model"].update(type="Unigram"), "it is Unigram after ByteLevel"),
        (lambda t: t["added_tokens"].append({"id": 512, "content": "<pad>"}), "missing field `single_word`"),
        (lambda t: t["model"]["vocab"].update({"<|endoftext|>": 600}), "the ids of added tokens must follow"),
        (lambda t: t.pop("model"), "missing required field model"),
    ],
)
def test_tokenizers_that_are_damaged_or_of_another_kind_are_refused(store, tmp_path, edit, message):
    hf_tokenizer.write(tokenizer.load("bpe:512", str(store)), str(tmp_path), 64)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    edit(whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError) as error:
        hf_tokenizer.read(str(tmp_path))
    assert message in str(error.value), error.value


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert hf_tokenizer.read(str(tmp_path)) is None
