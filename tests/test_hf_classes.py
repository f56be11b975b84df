"""Exchange with transformers' NanoChat, Llama and Qwen3: equal logits, equal text, and what is refused.

The logits are compared with transformers' own modules in float64.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from conftest import ROOT, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from model_options import configs, random_params, reference_logits
from safetensors.numpy import save_file

from trialgpt_jax import UserError, cli, convert
from trialgpt_jax.data import hf_tokenizer, tokenizer
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model import hf, hf_folder
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.schema import specs
from trialgpt_jax.training import start
from trialgpt_jax.training.program import gpt_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")  # before `double`, because it has a table of torch's dtypes

TINY = {"vocab_size": 101, "block_size": 12, "n_layer": 2, "n_head": 4, "n_embd": 16, "position": "rope"}
TINY |= {"norm": "rmsnorm", "bias": False, "dtype": "float64", "param_dtype": "float64"}
NANOCHAT = GPTConfig(
    **TINY, activation="relu2", qk_norm=True, embed_norm=True, norm_scale=False, tie_embeddings=False, logit_softcap=1.5
)
LLAMA = GPTConfig(**TINY, activation="swiglu", mlp_width=24)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, qk_norm_scale=True)
GPT2 = {"vocab_size": 101, "block_size": 12, "n_layer": 2, "n_head": 4, "n_embd": 16}
GPT2 |= {"dtype": "float64", "param_dtype": "float64"}
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 12))


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def double(monkeypatch):
    """transformers computes norms, angles and softmax in float32 always; here in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def their_model(theirs, tensors):
    """The class that a config.json names, with exactly these tensors."""
    kind = getattr(transformers, theirs["architectures"][0])
    model = kind(kind.config_class(**json.loads(json.dumps(theirs)))).double().eval()
    result = model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, strict=False)
    tied = {"lm_head.weight"} if theirs["tie_word_embeddings"] else set()
    assert not result.unexpected_keys and set(result.missing_keys) <= tied, result
    return model


def their_logits(theirs, tensors, tokens=TOKENS):
    with torch.no_grad():
        return their_model(theirs, tensors)(torch.from_numpy(tokens)).logits.numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def read(folder, theirs, **changes):
    """The model that a config.json describes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(theirs | changes))
    return GPTConfig(**hf.read_config(str(folder)), dtype="float64", param_dtype="float64")


def exchange(config, params, folder, tokens=TOKENS):
    """Ours -> theirs -> ours; the logits are equal in each place. Returns the name of the class."""
    theirs, tensors = hf.hf_config(config, None), hf.to_hf(params, config)
    expected = reference_logits(params, config, tokens)
    assert_close(their_logits(theirs, tensors, tokens), expected)
    back = read(folder, theirs)
    assert_close(reference_logits(hf.from_hf(tensors, back), back, tokens), expected)
    return theirs["architectures"][0]


# ---- equal logits

OTHER = {"n_kv_head": 2, "head_dim": 6, "mlp_width": 37, "rope_base": 50.0, "norm_eps": 0.03, "vocab_size": 128}


@pytest.mark.parametrize("base", [NANOCHAT, LLAMA, QWEN3], ids=["nanochat", "llama", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 1, "head_dim": 6, "vocab_size": 129},
        {"tie_embeddings": True},
        {"tie_embeddings": False, **OTHER},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(double, tmp_path, base, changes):
    config = dataclasses.replace(base, **changes)
    name = {NANOCHAT: "NanoChatForCausalLM", LLAMA: "LlamaForCausalLM", QWEN3: "Qwen3ForCausalLM"}[base]
    assert exchange(config, random_params(config), tmp_path, TOKENS % config.vocab_size) == name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (dataclasses.replace(NANOCHAT, logit_softcap=0.0), "NanoChatForCausalLM"),
        (dataclasses.replace(NANOCHAT, activation="gelu"), "NanoChatForCausalLM"),
        (dataclasses.replace(LLAMA, bias=True), "LlamaForCausalLM"),
        (dataclasses.replace(LLAMA, norm_scale=False), "LlamaForCausalLM"),
        (dataclasses.replace(LLAMA, bias=True, tie_embeddings=False), "LlamaForCausalLM"),
        (dataclasses.replace(QWEN3, qk_norm_scale=False), "Qwen3ForCausalLM"),
        (dataclasses.replace(QWEN3, norm_scale=False), "Qwen3ForCausalLM"),
        (dataclasses.replace(QWEN3, n_head=3, n_kv_head=1, head_dim=6), "Qwen3ForCausalLM"),  # 3 does not divide 16
        (dataclasses.replace(NANOCHAT, n_head=3, n_kv_head=1, head_dim=6), "NanoChatForCausalLM"),
        (GPTConfig(**GPT2), "GPT2LMHeadModel"),
        (GPTConfig(**GPT2, activation="relu2", mlp_width=37, norm_eps=0.03), "GPT2LMHeadModel"),
        (GPTConfig(**GPT2, norm_scale=False, bias=False, rope_base=50.0), "GPT2LMHeadModel"),  # no rope
    ],
)
def test_each_option_of_a_class(double, tmp_path, config, name):
    assert exchange(config, random_params(config), tmp_path) == name


@pytest.mark.parametrize("tied", [True, False])
def test_scales_are_multiplied_into_the_next_matrices_where_the_class_has_none(double, tmp_path, tied):
    """The scale of the embedding's norm, and that of the last norm before a tied head, have no next matrix."""
    config = dataclasses.replace(NANOCHAT, norm_scale=True, tie_embeddings=tied)
    params = random_params(config)
    with pytest.raises(UserError, match="NanoChatForCausalLM, cannot express model.norm_scale=True, .* ln_e/scale"):
        hf.check_expressible(config, params)
    params["ln_e"]["scale"][:] = 1
    if tied:
        with pytest.raises(UserError, match="model.norm_scale=True, because it has nothing for ln_f/scale, whose"):
            hf.to_hf(params, config)
        params["ln_f"]["scale"][:] = 1
    assert exchange(config, params, tmp_path) == "NanoChatForCausalLM"


@pytest.mark.parametrize("base", [NANOCHAT, QWEN3], ids=["nanochat", "qwen3"])
def test_biases_of_attention_alone_are_read_and_written(double, tmp_path, base):
    """As the option attention_bias of a class whose MLP has no biases."""
    config = dataclasses.replace(base, bias=True)
    params = random_params(config)
    for module in params["blocks"]["mlp"].values():
        module["bias"][:] = 0
    assert exchange(config, params, tmp_path) == hf.family_of(base).architecture
    theirs, tensors = hf.hf_config(config, None), hf.to_hf(params, config)
    assert theirs["attention_bias"] and "model.layers.1.self_attn.o_proj.bias" in tensors
    params["blocks"]["mlp"]["c_proj"]["bias"][1, 2] = 1e-9
    with pytest.raises(UserError, match="cannot express model.bias=True, .* blocks/mlp/c_proj/bias, .* not all 0"):
        hf.to_hf(params, config)


@pytest.mark.parametrize("flags", [(True, False), (False, True), (True, True)])
def test_biases_are_those_that_the_configuration_declares(double, tmp_path, flags):
    """Of a Llama, whose two options are independent of each other."""
    attention, mlp = flags
    config = dataclasses.replace(LLAMA, bias=True)
    theirs = hf.hf_config(config, None) | {"attention_bias": attention, "mlp_bias": mlp}
    tensors = {
        name: value
        for name, value in hf.to_hf(random_params(config), config).items()
        if not name.endswith("bias") or (attention if "self_attn" in name else mlp)
    }
    ours = read(tmp_path, theirs)
    save_file(tensors, tmp_path / "model.safetensors")
    params = hf.from_hf(hf_folder.SafetensorsFolder(str(tmp_path)), ours)
    assert_close(reference_logits(params, ours, TOKENS), their_logits(theirs, tensors))
    lost = next(name for name in tensors if name.endswith("bias"))
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"the model has no tensor `{lost.removeprefix('model.')}`"):
        hf.from_hf(hf_folder.SafetensorsFolder(str(tmp_path)), ours)


@st.composite
def near_a_class(draw):
    """A random model, most of whose options are those of a class."""
    config = draw(configs(n_layer=2))
    base = draw(st.sampled_from([None, NANOCHAT, LLAMA, QWEN3]))
    if base:
        kept = draw(st.sets(st.sampled_from(["position", "norm", "activation", "qk_norm", "embed_norm"]), max_size=1))
        names = {"position", "norm", "activation", "qk_norm", "embed_norm", "logit_softcap"} - kept
        changes = {name: getattr(base, name) for name in names}
        changes["qk_norm_scale"] = changes.get("qk_norm", config.qk_norm) and base.qk_norm_scale
        config = dataclasses.replace(config, **changes)
    return config


def test_any_model_is_refused_by_its_options_or_has_equal_logits(double, tmp_path):
    found = set()

    @settings(max_examples=25)
    @given(near_a_class())
    def refused_or_equal(config):
        params = random_params(config)
        tokens = TOKENS[:1, : config.block_size] % config.vocab_size
        try:
            hf.to_hf(params, config)
        except UserError as error:
            assert "\n" not in str(error)
            named = dict(re.findall(r"model\.(\w+)=([\w.]+)", str(error)))
            assert named and all(str(getattr(config, name)) == value for name, value in named.items()), error
        else:
            found.add(exchange(config, params, tmp_path, tokens))

    refused_or_equal()
    assert len(found) >= 3


# ---- refused


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            NANOCHAT,
            {"activation": "swiglu"},
            r"NanoChatForCausalLM, cannot express model.activation=swiglu \(only relu2",
        ),
        (
            NANOCHAT,
            {"norm": "layernorm"},
            r"NanoChatForCausalLM, cannot express model.norm=layernorm \(only rmsnorm\)$",
        ),
        (NANOCHAT, {"embed_norm": False}, r"cannot express model.embed_norm=False \(only True\)$"),
        (NANOCHAT, {"qk_norm_scale": True}, "NanoChatForCausalLM, cannot express model.qk_norm_scale=True"),
        (LLAMA, {"logit_softcap": 15.0}, "LlamaForCausalLM, cannot express model.logit_softcap=15.0"),
        (LLAMA, {"embed_norm": True}, "LlamaForCausalLM, cannot express model.embed_norm=True"),
        (LLAMA, {"n_head": 3, "n_kv_head": 3, "head_dim": 6}, "cannot express model.n_head=3 .n_embd=16 is not divis"),
        (QWEN3, {"norm": "layernorm"}, "Qwen3ForCausalLM, cannot express model.norm=layernorm"),
        (QWEN3, {"position": "learned"}, "Qwen3ForCausalLM, cannot express model.position=learned .only rope.$"),
    ],
)
def test_the_options_that_stop_the_nearest_class_are_named(base, changes, message):
    with pytest.raises(UserError, match=message):
        hf.check_expressible(dataclasses.replace(base, **changes))


@pytest.mark.parametrize(
    ("base", "theirs", "message"),
    [
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling is .*'llama3'.* only one rope of",
        ),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*'linear'"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is .*'yarn'"),
        (QWEN3, {"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "rope_parameters is .*full_attention"),
        (LLAMA, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only 1.0"),
        (
            LLAMA,
            {"rope_parameters": None, "rope_theta": 0.5},
            "rope_theta is 0.5, but only 1 or more can be converted$",
        ),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu' or 'swish' can be converted"),
        (NANOCHAT, {"hidden_act": "silu"}, "hidden_act is 'silu', but only 'relu2' or"),
        (LLAMA, {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, but only 1e-12 or more, up to 1, can be converted$"),
        (LLAMA, {"rms_norm_eps": "1e-6"}, "configuration of a LlamaForCausalLM: rms_norm_eps: Expected float, got str"),
        (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        (
            LLAMA,
            {"num_attention_heads": 3, "head_dim": None},
            "hidden_size=16 is not divisible by num_attention_heads=3",
        ),
        (NANOCHAT, {"head_dim": None, "hidden_size": 12}, "head_dim is 3, but only an even number"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (LLAMA, {"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta is inf"),
        (LLAMA, {"head_dim": 5}, "head_dim is 5, but only an even number can be converted"),
        (LLAMA, {"intermediate_size": 0}, "intermediate_size is 0, but must be at least 1 and at most 1048576$"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but must be at least 1 and at most"),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "fp8"}},
            "the weights are quantised .quantization_config 'fp8'",
        ),
        (
            NANOCHAT,
            {"final_logit_softcapping": 0.0},
            "final_logit_softcapping is 0.0, but only a number above 0, or null",
        ),
        (
            QWEN3,
            {"use_sliding_window": True, "max_window_layers": 1},
            "sliding_window is 4096, but only attention with",
        ),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .'full_attention', 'slid"),
        (
            LLAMA,
            {"model_type": "mistral"},
            "model_type is 'mistral', but only 'gpt2' or 'nanochat' or 'llama' or 'qwen3'",
        ),
    ],
)
def test_what_our_gpt_does_not_have_is_refused_by_its_name_in_their_file(tmp_path, base, theirs, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, hf.hf_config(base, None), **theirs)
    assert str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


# ---- their files


@pytest.mark.parametrize("name", ["quickstart", "modern"])
def test_the_options_in_the_document_on_serving_make_a_model_of_a_class_that_llama_cpp_reads(name):
    text = (ROOT / "docs" / "serving.md").read_text()
    for options, expected in (([], "NanoChat"), (re.findall(r"--config\.model\.\w+=\w+", text), "Qwen3")):
        _, config = cli.parse(["train", f"--config={name}", *options], "", {})
        assert hf.family_of(gpt_config(config, "cpu")).architecture == f"{expected}ForCausalLM"


def their_defaults(kind, **sizes):
    """What a configuration of transformers itself says, which is not written by us."""
    return getattr(transformers, kind)(vocab_size=101, hidden_size=16, num_hidden_layers=2, **sizes).to_dict()


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        (
            "LlamaConfig",
            {
                "num_attention_heads": 4,
                "intermediate_size": 24,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            {
                "n_kv_head": 4,
                "head_dim": 4,
                "norm_eps": 1e-6,
                "rope_base": 5e5,
                "tie_embeddings": False,
                "block_size": 2048,
            },
        ),
        (
            "Qwen3Config",
            {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "tie_word_embeddings": True},
            {"n_kv_head": 2, "head_dim": 128, "qk_norm_scale": True, "tie_embeddings": True, "block_size": 32768},
        ),
        (
            "NanoChatConfig",
            {"num_attention_heads": 2, "intermediate_size": 64},
            {"n_kv_head": 2, "head_dim": 8, "norm_scale": False, "logit_softcap": 15.0, "activation": "relu2"},
        ),
    ],
)
@pytest.mark.parametrize("left_out", [False, True])
def test_configurations_of_transformers_itself(tmp_path, kind, sizes, expected, left_out):
    """Whole, and without the fields that have the default of the class."""
    theirs = their_defaults(kind, **sizes)
    if left_out:
        default = getattr(transformers, kind)().to_dict()
        theirs = {name: value for name, value in theirs.items() if name == "model_type" or value != default.get(name)}
    config = read(tmp_path, theirs)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"rope_parameters": None, "rope_theta": 500_000}, 5e5),  # as transformers 4 writes it
        ({"rope_parameters": None, "rope_theta": None}, 1e4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "rope_theta": 7.0}, 1e6),
        ({"rope_parameters": None, "rope_scaling": {"type": "default"}, "rope_theta": 7.0}, 7.0),
    ],
)
def test_the_base_of_rope_is_read_where_transformers_reads_it(tmp_path, theirs, expected):
    whole = {k: v for k, v in (hf.hf_config(LLAMA, None) | theirs).items() if v is not None}
    found = read(tmp_path, whole).rope_base
    assert found == expected == transformers.LlamaConfig(**whole).rope_parameters["rope_theta"]


def test_names_with_the_prefixes_of_wrappers_and_old_buffers(tmp_path):
    params = random_params(dataclasses.replace(LLAMA, tie_embeddings=False))
    config = dataclasses.replace(LLAMA, tie_embeddings=False)
    tensors = hf.to_hf(params, config)
    expected = hf.from_hf(tensors, config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    for prefix, named in (
        ("_orig_mod.", tensors),
        ("module.", tensors),
        ("model.", tensors),
        ("", tensors),
        ("", bare),
    ):
        found = hf.from_hf({prefix + name: value for name, value in named.items()}, config)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    tensors["module.lm_head.weight"] = tensors.pop("lm_head.weight")
    with pytest.raises(UserError, match="different prefixes"):
        hf.from_hf(tensors, config)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "has no tensor `layers.1.mlp.up_proj.weight`, for a Llama",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(4)}),
            "unknown tensor `layers.0.self_attn",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((16, 24))}),
            r"has shape \(16, 24\), but config.json asks for \(24, 16\); it is transposed",
        ),
        (lambda t: t.update({"lm_head.weight": np.ones((101, 16))}), "set tie_word_embeddings=false"),
    ],
)
def test_wrong_tensors_are_named(edit, message):
    tensors = hf.to_hf(random_params(LLAMA), LLAMA)
    edit(tensors)
    with pytest.raises(UserError, match=message):
        hf.from_hf(tensors, LLAMA)


# ---- whole folders


# Generation takes seconds to compile for each model.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(NANOCHAT, id="nanochat"),
        pytest.param(QWEN3, id="qwen3", marks=pytest.mark.slow),
        pytest.param(LLAMA, id="llama", marks=pytest.mark.slow),
    ],
)
def exported(request, store, tmp_path_factory):
    """A model as an object, and the folder that is exported from it."""
    changes = {"vocab_size": 512, "block_size": 32, "n_kv_head": 2, "dtype": "float32", "param_dtype": "float32"}
    config = dataclasses.replace(request.param, **changes)
    folder, words = tmp_path_factory.mktemp("exported"), tokenizer.load("bpe:512", str(store))
    params = random_params(config)
    hf_tokenizer.write(words, str(folder), config.block_size)
    hf.write(str(folder), params, config, words.eot_id)
    model = LanguageModel(jax.tree.map(jax.numpy.asarray, params), config, words, single_device())
    model.shows_progress = False
    return model, folder


def test_transformers_generates_the_same_text_from_the_folder(exported, tmp_path):
    model, folder = exported
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == hf.family_of(model.config).architecture
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.eos_token_id == words.eos_token_id == model.tokenizer.eot_id
    ids = words("The people of", return_tensors="pt")
    out = theirs.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0][ids["input_ids"].shape[1] :]
    text = words.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert model.generate(["The people of"], max_new_tokens=12) == [text]
    # and what transformers saves of it, in shards, is read back
    theirs.save_pretrained(tmp_path, max_shard_size="10kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config = GPTConfig(**hf.read_config(str(tmp_path)))
    back = hf.from_hf(hf_folder.SafetensorsFolder(str(tmp_path)), config)
    tensors = hf.to_hf(back, config)
    for name, value in hf.to_hf(model.params, model.config).items():
        np.testing.assert_array_equal(tensors[name], value)


def test_a_workdir_is_made_of_the_folder_and_training_starts_from_it(exported, store, tmp_path):
    model, folder = exported
    config = convert.from_hf(small_config(store), str(folder), str(tmp_path / "run"))
    assert hf.family_of(GPTConfig(**config.model)) is hf.family_of(model.config)
    config = small_config(store)
    config.model.update({name: default for name, (default, _) in specs(GPTConfig).items()})
    config.train.init_from = str(folder)
    config = start.adopt_model(config, str(tmp_path / "new"), frozenset())
    start.check_weights(str(folder), config, open_store(str(store)))
    gpt = gpt_config(config, "cpu")
    params = start.load_weights(str(folder), gpt, single_device())
    prompt = np.arange(20)[None]
    expected = reference_logits(model.params, dataclasses.replace(model.config, dtype="float64"), prompt)
    np.testing.assert_allclose(reference_logits(params, gpt, prompt), expected, rtol=0, atol=1e-5)
