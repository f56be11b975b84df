"""More than 200 malformed inputs: each is refused in one line with status 2, and no file changes.

Hypothesis draws configs, manifests, shards, checkpoints, prompts and foreign models. Most commands run in this process,
a few in their own.
"""

import ast
import contextlib
import hashlib
import json
import os
import shutil
import signal

import pytest
from conftest import ROOT, call, overrides, refused, run, small_config, tree
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trialgpt_jax.config import default_config, fields

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES_THAT_LEAVE = st.sampled_from(  # file names that lead out of the folder, or name no file in it
    [
        "../train_00000.bin",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../x",
        "sub/x.bin",
        "..",
        ".",
        "",
        "\0",
        "x\n",
        "~/x",
    ]
)


def hostile(examples):
    """Settings for tests of whole commands: failing examples are reported as drawn, because shrinking takes minutes."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    chosen = settings(max_examples=examples, suppress_health_check=checks, phases=[Phase.generate])
    return lambda test: chosen(given(data=st.data())(test))


COUNT = 0


def assert_refused(folder, module, *arguments, status=2):
    """Asserts that a command refuses its input as a user's mistake within a minute and leaves `folder` unchanged."""
    global COUNT
    COUNT += 1

    def hang(*_):
        raise AssertionError(f"{module} {arguments} hangs")

    before = untouched(folder)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        result = call(module, *arguments)
    finally:
        signal.alarm(0)
    refused(result)
    assert result.returncode == status
    after = untouched(folder)
    assert after == before, set(after.items()) ^ set(before.items())
    return result


def untouched(folder):
    """`tree` without the workdir's lock, which names its last holder, and its log, which has the error."""
    return {path: what for path, what in tree(folder).items() if not path.endswith(("/run/lock", "/run/log.txt"))}


@contextlib.contextmanager
def replaced(path, contents):
    """Replaces a file's contents, or removes it (None), and restores it and the modification times at the end."""
    kept, times = path.read_bytes(), os.stat(path)
    folder = os.stat(path.parent)
    if contents is None:
        path.unlink()
    else:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode("utf-8", "surrogatepass"))
    try:
        yield
    finally:
        path.write_bytes(kept)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        os.utime(path.parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))


@pytest.fixture(scope="module")
def made(store, tmp_path_factory):
    """A folder with a trained workdir `run`, its token store `tokens`, its export `hf`; and flags for the config."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "default.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
    shutil.copytree(store, folder / "tokens")
    c = small_config(folder / "tokens")
    c.train.steps, c.optim.warmup_steps = 6, 2
    c.eval.every_steps = 0
    flags = [f"--config={folder}/default.py", *overrides(c)]
    assert call("train", *flags, f"--workdir={folder}/run").returncode == 0
    shutil.rmtree(folder / "run" / "checkpoints" / "6")  # `train` has one step left to do
    assert call("convert", f"--workdir={folder}/run", f"--to_hf={folder}/hf").returncode == 0
    return folder, flags


def broken_text(draw, original):
    """Contents for a JSON file that are not JSON, or not an object."""
    return draw(
        st.one_of(
            st.integers(0, max(0, len(original.rstrip()) - 1)).map(lambda end: original[:end]),
            st.binary(min_size=1, max_size=40).map(lambda junk: b"\xff\xfe" + junk),
            st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "null", "[]", '"text"', "1e999", "{}" * 2, "NaN"]),
            ANYTHING.filter(lambda value: not isinstance(value, dict)).map(json.dumps),
        )
    )


# ---- configs


@hostile(40)
def test_wrong_fields_on_the_command_line(made, data):
    folder, flags = made
    known = fields(default_config())
    bad = {
        int: st.sampled_from(["x", "1.5", "", "-9", "1e-3", "nan", "0x", "9" * 30, "None", "\u0663\u0663\u0663x"]),
        float: st.sampled_from(["x", "", "nan", "inf", "-inf", "-1e-3", "1e999", "0..1", "None"]),
        bool: st.sampled_from(["maybe", "2", "", "None", "[]"]),
    }
    name = data.draw(st.sampled_from(sorted(name for name in known if type(known[name]) in bad)))
    value = data.draw(bad[type(known[name])])
    if name.startswith("mesh.") and value == "-9":
        value = "0"
    argument = f"--config.{name}={value}"
    if data.draw(st.booleans()):
        unknown = data.draw(st.text(st.characters(codec="ascii", categories=["L", "P"]), min_size=1, max_size=12))
        argument = f"--config.{unknown.replace('=', '')}.x=1"
    assert_refused(folder, "train", *flags, argument, f"--workdir={folder}/new")


@hostile(40)
def test_a_config_json_that_is_not_one(made, data):
    folder, flags = made
    path = folder / "run" / "config.json"
    saved = json.loads(path.read_text())
    if data.draw(st.booleans()):
        text = broken_text(data.draw, path.read_text())
    else:
        name = data.draw(st.sampled_from(sorted(fields(default_config()))))
        *groups, leaf = name.split(".")
        inner = saved
        for group in groups:
            inner = inner[group]
        kind = type(inner[leaf])
        wrong = ANYTHING.filter(lambda value: type(value) is not kind and not (kind is float and type(value) is int))
        if kind in (int, float):
            wrong |= st.sampled_from([-(10**40), 10**40, float("nan"), float("-inf")] if kind is float else [10**40])
        inner[data.draw(st.sampled_from([leaf, leaf, leaf + "x"]))] = data.draw(wrong)
        text = json.dumps(saved)
    with replaced(path, text):
        command = data.draw(st.sampled_from(["infer", "evaluate", "train", "convert"]))
        extra = {"train": flags, "convert": [f"--to_hf={folder}/out"]}.get(command, [])
        assert_refused(folder, command, f"--workdir={folder}/run", *extra)


# ---- token stores


@hostile(40)
def test_a_manifest_that_is_not_one(made, data):
    folder, flags = made
    path = folder / "tokens" / "manifest.json"
    saved = json.loads(path.read_text())
    how = data.draw(st.sampled_from(["text", "name", "shard", "top"]))
    if how == "text":
        text = broken_text(data.draw, path.read_text())
    else:
        shard = data.draw(st.sampled_from(saved["shards"]))
        if how == "name":
            shard["file"] = data.draw(NAMES_THAT_LEAVE)
        elif how == "shard":
            name = data.draw(st.sampled_from(["file", "split", "tokens", "bytes", "max_id", "sha256", "documents"]))
            kind = type(shard[name])
            shard[name] = data.draw(
                ANYTHING.filter(lambda value: type(value) is not kind)
                | st.sampled_from([10**30, -1, 2**70] if name in ("tokens", "max_id") else [-1])
            )
        else:
            name = data.draw(
                st.sampled_from(["format_version", "vocab_size", "eot_id", "dtype", "tokenizer", "shards"])
            )
            saved[name] = data.draw(ANYTHING.filter(lambda value: value != saved[name] and value not in (1, [], {})))
        text = json.dumps(saved)
    with replaced(path, text):
        if data.draw(st.booleans()):
            assert_refused(folder, "preprocess", *flags, "--verify")
        else:
            assert_refused(folder, "train", *flags, f"--workdir={folder}/new")


@hostile(20)
def test_a_shard_that_is_not_what_the_manifest_says(made, data):
    folder, flags = made
    path = data.draw(st.sampled_from(sorted((folder / "tokens").glob("*.bin"))))
    kept = path.read_bytes()
    how = data.draw(st.sampled_from(["missing", "short", "long", "changed"]))
    contents = {
        "missing": None,
        "short": kept[: data.draw(st.integers(0, len(kept) - 1))],
        "long": kept + data.draw(st.binary(min_size=1, max_size=9)),
        "changed": bytes([kept[0] ^ data.draw(st.integers(1, 255))]) + kept[1:],
    }[how]
    with replaced(path, contents):
        result = assert_refused(folder, "preprocess", *flags, "--verify")
        assert path.name in result.stderr
        if how != "changed":
            assert path.name in assert_refused(folder, "train", *flags, f"--workdir={folder}/new").stderr


# ---- workdirs


def test_names_in_checksums_do_not_lead_out_of_the_folder(made):
    """A foreign list of checksums cannot be used to test the contents of files outside the checkpoint."""
    folder, flags = made
    path = folder / "run" / "checkpoints" / "5" / "checksums.json"
    secret = folder / "secret"
    secret.write_text("secret")
    for name in ("../../../secret", str(secret)):
        record = json.loads(path.read_text())
        record["files"][name] = [6, hashlib.sha256(b"secret").hexdigest()]
        record["sha256"] = digest_of(record)
        with replaced(path, json.dumps(record)):
            assert "missing" in assert_refused(folder, "train", *flags, f"--workdir={folder}/run").stderr
    secret.unlink()


def digest_of(record):
    inner = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(inner, sort_keys=True).encode()).hexdigest()


@hostile(50)
def test_a_checkpoints_json_that_is_not_what_was_written(made, data):
    """Also with matching checksums: then orbax must refuse the file, and the command report it in one line."""
    folder, flags = made
    step = folder / "run" / "checkpoints" / "5"
    listed = step / "checksums.json"
    arrays = step / "state" / "array_metadatas" / "process_0"
    path = data.draw(st.sampled_from([listed, step / "_CHECKPOINT_METADATA", step / "state" / "_METADATA", arrays]))
    original = path.read_text()
    saved = json.loads(original)
    if data.draw(st.booleans()):
        text = broken_text(data.draw, original)
    else:
        key = data.draw(st.sampled_from(sorted(saved)))
        saved[key] = data.draw(ANYTHING.filter(lambda value: value != saved[key]))
        text = json.dumps(saved)
    command = data.draw(st.sampled_from(["infer", "evaluate", "train", "convert"]))
    extra = {"train": flags, "convert": [f"--to_hf={folder}/out"]}.get(command, [])
    with replaced(path, text):
        assert_refused(folder, command, f"--workdir={folder}/run", *extra)
        assert call("convert", f"--workdir={folder}/run", "--verify").returncode == 1
    if path != listed and path.name == "_METADATA":
        with replaced(path, text):
            record = json.loads(listed.read_text())
            contents = path.read_bytes()
            record["files"][str(path.relative_to(step))] = [len(contents), hashlib.sha256(contents).hexdigest()]
            record["sha256"] = digest_of(record)
            with replaced(listed, json.dumps(record)):
                short = ["--max_new_tokens=1"] if command == "infer" else []
                result = call(command, f"--workdir={folder}/run", *extra, *short)
                assert result.returncode in (0, 2), result.stderr  # 0: orbax did not read what was changed
                assert "Traceback" not in result.stderr
                for made_by_success in (folder / "run" / "checkpoints" / "6", folder / "out"):
                    shutil.rmtree(made_by_success, ignore_errors=True)


@hostile(25)
def test_the_small_files_of_a_workdir(made, data):
    folder, flags = made
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer.tiktoken", "metrics.jsonl"]))
    path = folder / "run" / name
    if name == "tokenizer.json":
        text = broken_text(data.draw, path.read_text())
    elif name == "tokenizer.tiktoken":
        lines = path.read_text().splitlines()
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at] = data.draw(
            st.sampled_from(["", "x", "AA== -1", "AA==", "!!! 3", "AA== 3 4", "AA== 99999999", "\xe9 3"])
        )
        text = "\n".join(lines)
    else:
        lines = path.read_text().splitlines()
        wrong = ['{"step": "x"}', '{"step": NaN}', '{"step": 1, "seconds": "x"}', "[" * 100_000]
        lines[0] = data.draw(st.sampled_from(["[", "{}", "[]", "3", *wrong]))
        text = "\n".join(lines)
    command = {"metrics.jsonl": "train", "tokenizer.json": data.draw(st.sampled_from(["train", "evaluate"]))}.get(
        name, "infer"
    )
    with replaced(path, text):
        assert_refused(folder, command, f"--workdir={folder}/run", *(flags if command == "train" else []))


# ---- prompts and foreign models


@hostile(40)
def test_prompts_and_numbers_of_infer(made, data):
    folder, _ = made
    junk = folder / "junk.txt"
    junk.write_bytes(b"text \xff" + data.draw(st.binary(max_size=10)))
    number = st.sampled_from(["nan", "-1", "x", "", "1e999", "-inf", "9" * 25])
    argument = data.draw(
        st.one_of(
            st.sampled_from([f"FILE:{junk}", f"FILE:{folder}", "FILE:", "FILE:\0", "FILE:/nowhere/\udcff", ""]).map(
                lambda prompt: f"--prompt={prompt}"
            ),
            st.tuples(st.sampled_from(["temperature", "top_p"]), number.filter(lambda x: x[0:1] != "9")).map(
                lambda pair: f"--{pair[0]}={pair[1]}"
            ),
            st.tuples(st.sampled_from(["top_k", "num_samples", "max_new_tokens", "seed"]), number).map(
                lambda pair: f"--{pair[0]}={pair[1]}"
            ),
            st.sampled_from(["4", "-3", "x"]).map(lambda step: f"--checkpoint_step={step}"),
            st.sampled_from(["--top_p=1.5", "--top_p=0"]),
        )
    )
    assert_refused(folder, "infer", f"--workdir={folder}/run", argument)


@hostile(30)
def test_a_model_of_others_that_is_not_one(made, data):
    folder, _ = made
    hf = folder / "hf"
    name = data.draw(st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "index"]))
    with contextlib.ExitStack() as stack:
        if name == "index":
            stack.enter_context(replaced(hf / "model.safetensors", None))
            index = hf / "model.safetensors.index.json"
            shard = data.draw(NAMES_THAT_LEAVE | ANYTHING)
            index.write_text(json.dumps(data.draw(st.sampled_from([{"weight_map": {"wte.weight": shard}}, shard, {}]))))
            stack.callback(index.unlink)
        elif name == "model.safetensors":
            kept = (hf / name).read_bytes()
            end = data.draw(st.integers(0, len(kept) - 1))
            junk = data.draw(st.binary(min_size=8, max_size=8))
            stack.enter_context(replaced(hf / name, data.draw(st.sampled_from([kept[:end], junk + kept[8:]]))))
        else:
            stack.enter_context(replaced(hf / name, broken_text(data.draw, (hf / name).read_text())))
        assert_refused(folder, "convert", f"--from_hf={hf}", f"--workdir={folder}/new")


def test_there_were_two_hundred():
    assert COUNT == 0 or COUNT >= 200


@pytest.mark.slow
def test_a_few_in_their_own_processes(made):
    folder, flags = made
    before = untouched(folder)
    refused(run("train", *flags, "--config.train.steps=nan", f"--workdir={folder}/new"), "train.steps")
    refused(run("train", *flags, "--config.model.n_layer=" + "9" * 30, f"--workdir={folder}/new"), "model.n_layer")
    refused(run("infer", f"--workdir={folder}/run", "--prompt=FILE:/nowhere/\udcff"), "cannot be read")
    with replaced(folder / "run" / "config.json", "[" * 100_000):
        refused(run("evaluate", f"--workdir={folder}/run"), "config.json", "nested")
    assert untouched(folder) == before


# ---- data is never executed


def test_nothing_executes_what_it_reads():
    """No pickle, eval, exec, numpy object files, unsafe yaml or shell in the package.

    What is executed are `.py` configs and, by lm-eval, the functions of its tasks.
    """
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "runpy", "code"}
    for path in sorted((ROOT / "trialgpt_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            assert not forbidden & set(names), (path, names)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
                assert node.attr == "safe_load" or node.attr.endswith("Error"), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "os.system", "np.load", "numpy.load"), (
                    path
                )
                assert not any(word.arg in ("allow_pickle", "shell") for word in node.keywords), path
    readme = (ROOT / "README.md").read_text()
    assert "A config file is Python code and is executed" in readme and "`config.json` in a workdir is data" in readme
