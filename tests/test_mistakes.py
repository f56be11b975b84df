"""A hundred mistakes of users, as whole commands: status 2 and one line that names what is wrong; no traceback.

The table has the command, its arguments and a word of the message. {x} in an argument is a folder or file of `places`.
"""

import gzip
import json
import pathlib
import shutil

import pytest
from conftest import ROOT, call, refused, small_config

CORPUS = ("preprocess", "--config.data.source=files --config.data.tokenizer=bpe:300 --config.data.dir={new}/tokens ")
TRAIN = ("train", "--config={tiny} --workdir={new}/run ")
RUN = "--workdir={run} "

MISTAKES = [
    # preprocess: what is given
    (*CORPUS, "--config.data.source_options.path={files}/nowhere.txt", "nowhere.txt"),
    (*CORPUS, "--config.data.source_options.path={files}/*.tx", "*.tx"),
    (*CORPUS, "--config.data.source_options.path={files}/empty", "empty"),
    (*CORPUS, "--config.data.source_options.path={files}/sheet.csv", "sheet.csv"),
    (*CORPUS, "--config.data.source_options.path={files}/pictures", "pictures"),
    (*CORPUS, "--config.data.source_options.path={files}/nothing.txt", "nothing.txt is empty"),
    (*CORPUS, "--config.data.source_options.path={files}/numbers.jsonl", "numbers.jsonl, line 2"),
    (*CORPUS, "--config.data.source_options.path={files}/broken.jsonl", "broken.jsonl, line 2"),
    (*CORPUS, "--config.data.source_options.path={files}/other.jsonl", "text_field"),
    (*CORPUS, "--config.data.source_options.path={files}/cut.jsonl.gz", "cut.jsonl.gz"),
    (*CORPUS, "--config.data.source_options.path={files}/text.gz.txt.gz", "text.gz.txt.gz"),
    (*CORPUS, "--config.data.source_options.path={files}/text.parquet", "text.parquet"),
    (*CORPUS, "--config.data.source_options.path={files}/latin1.txt", "latin1.txt"),
    (*CORPUS, "--config.data.source_options.path=", "data.source_options.path"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.split=nanogpt", "parquet"),
    # preprocess: how
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.tokenizer=bpe:100", "bpe:100"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.tokenizer=BPE:512", "BPE:512"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.tokenizer=cl100k_base", "cl100k_base"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.tokenizer=bpe:100000", "bpe:100000"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.val_fraction=1", "data.val_fraction"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.val_fraction=nan", "data.val_fraction"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.shard_tokens=0", "data.shard_tokens"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.num_workers=-2", "data.num_workers"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.split=random", "data.split"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.encoder=fast", "data.encoder"),
    (*CORPUS, "--config.data.source_options.on_error=ignore", "data.source_options.on_error"),
    ("preprocess", "--config.data.dir={new}/t", "--config.data.source=wikipedia", "data.source"),
    ("preprocess", "--config.data.dir={new}/t", "--config.data.source=hf:nobody", "data.source"),
    # preprocess: where
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.dir={files}/sheet.csv", "sheet.csv"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.dir={files}/sheet.csv/x", "sheet.csv"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.dir=/proc/tokens", "/proc/tokens"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.dir=gs://bucket/x", "gs://bucket/x"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.dir={store}", "data.tokenizer"),
    (*CORPUS, "--config.data.source_options.path={files}/good --config.data.dir={files}/bins", "data.dir"),
    (*CORPUS, "--config.data.dir=a:0.5,b:0.5", "mixture"),
    # preprocess: flags
    (*CORPUS, "--worker=4/4", "--worker=4/4"),
    (*CORPUS, "--worker=2", "--worker=2"),
    (*CORPUS, "--merge", "no shares"),
    (*CORPUS, "--verify", "does not exist"),
    (*CORPUS, "--show=1", "does not exist"),
    ("preprocess", "", "", "--config=FILE"),
    ("preprocess", "--config.data.dir={files}/good ", "--show=2", "good"),
    # train: the command
    ("train", "--workdir={new}/run", "", "config.json"),
    ("train", "--config={configs}/gpt2.py:124m --workdir={new}/run", "", "data/openwebtext"),
    ("train", "--config={tiny}", "", "--workdir"),
    ("train", "--config=configs/gpt3.py --workdir={new}/run", "", "configs/gpt3.py"),
    ("train", "--config=configs/gpt2.py:99m --workdir={new}/run", "", "99m"),
    (*TRAIN, "--config.train.step=5", "train.steps"),
    (*TRAIN, "--resume", "resume"),
    (*TRAIN, "now", "now"),
    (*TRAIN, "--config.train.steps=many", "train.steps"),
    (*TRAIN, "--config.model.bias=maybe", "model.bias"),
    # train: values
    (*TRAIN, "--config.train.steps=0", "train.steps"),
    (*TRAIN, "--config.train.batch_size=0", "train.batch_size"),
    (*TRAIN, "--config.train.accumulate_steps=3", "train.accumulate_steps"),
    (*TRAIN, "--config.optim.learning_rate=-1", "optim.learning_rate"),
    (*TRAIN, "--config.optim.learning_rate=inf", "optim.learning_rate"),
    (*TRAIN, "--config.optim.warmup_steps=100", "optim.warmup_steps"),
    (*TRAIN, "--config.optim.schedule=exponential", "optim.schedule"),
    (*TRAIN, "--config.optim.name=sgd", "optim.name"),
    (*TRAIN, "--config.optim.b1=1", "optim.b1"),
    (*TRAIN, "--config.model.n_head=5", "model.n_head"),
    (*TRAIN, "--config.model.n_kv_head=3", "model.n_kv_head"),
    (*TRAIN, "--config.model.n_embd=0", "model.n_embd"),
    (*TRAIN, "--config.model.dropout=1", "model.dropout"),
    (*TRAIN, "--config.model.activation=swish", "swiglu"),
    (*TRAIN, "--config.model.vocab_size=100", "model.vocab_size"),
    (*TRAIN, "--config.model.block_size=1000000", "model.block_size"),
    (*TRAIN, "--config.train.dtype=float16", "train.dtype"),
    (*TRAIN, "--config.train.dtype=float64", "train.param_dtype"),
    (*TRAIN, "--config.train.attention=flash", "train.attention"),
    (*TRAIN, "--config.train.attention=cudnn", "train.attention=xla"),
    (*TRAIN, "--config.train.remat=full", "train.remat"),
    (*TRAIN, "--config.train.remat=offload", "train.remat"),
    (*TRAIN, "--config.mesh.data=3", "mesh.data=3"),
    (*TRAIN, "--config.mesh.fsdp=0", "mesh.fsdp"),
    (*TRAIN, "--config.mesh.data=-1 --config.mesh.fsdp=-1", "mesh"),
    (*TRAIN, "--config.checkpoint.keep_last=0", "checkpoint.keep_last"),
    (*TRAIN, "--config.eval.batches=-1", "eval.batches"),
    (*TRAIN, "--config.log.every_steps=0", "log.every_steps"),
    (*TRAIN, "--config.seed=-1", "seed"),
    (*TRAIN, "--config.train.max_seconds=-1", "train.max_seconds"),
    # train: folders
    (*TRAIN, "--config.data.dir={files}/good", "good"),
    (*TRAIN, "--config.data.dir={files}/sheet.csv", "sheet.csv"),
    (*TRAIN, "--config.data.dir={store}:0.5,{store}", "FOLDER:WEIGHT"),
    (*TRAIN, "--config.data.dir={store}:0.5,{new}/b:0.5", "{new}/b"),
    (*TRAIN, "--config.train.init_from={new}/nothing", "{new}/nothing"),
    (*TRAIN, "--config.train.init_from={files}/good", "good"),
    ("train", "--config={tiny} ", "--workdir={files}/sheet.csv", "sheet.csv"),
    ("train", "--config={tiny} ", "--workdir=ftp://host/run", "ftp://"),
    ("train", "--config={tiny} " + RUN, "--config.model.n_layer=3", "model.n_layer"),
    ("train", "--config={tiny} " + RUN, "--config.optim.learning_rate=0.5", "optim.learning_rate"),
    ("train", "--config={tiny} " + RUN, "--config.data.dir={files}/rebuilt", "data.dir"),
    # evaluate
    ("evaluate", "", "", "--workdir"),
    ("evaluate", "--workdir={new}/run", "", "config.json does not exist"),
    ("evaluate", RUN, "--split=test", "--split=test"),
    ("evaluate", RUN, "--batches=-1", "--batches=-1"),
    ("evaluate", RUN, "--checkpoint_step=99", "99"),
    ("evaluate", RUN, "--config.data.dir={new}/tokens", "{new}/tokens"),
    ("evaluate", RUN, "--config.model.n_embd=64", "another model"),
    ("evaluate", "--workdir={files}/untrained", "", "no checkpoints"),
    ("evaluate", "--workdir={files}/nojson", "", "config.json"),
    # infer
    ("infer", RUN, "--temperature=-1", "temperature"),
    ("infer", RUN, "--temperature=nan", "temperature"),
    ("infer", RUN, "--temperature=hot", "temperature"),
    ("infer", RUN, "--top_k=-1", "top_k"),
    ("infer", RUN, "--top_p=0", "top_p"),
    ("infer", RUN, "--num_samples=0", "num_samples"),
    ("infer", RUN, "--max_new_tokens=-1", "max_new_tokens"),
    ("infer", RUN, "--prompt=", "--prompt"),
    ("infer", RUN, "--prompt=FILE:{files}/none.txt", "none.txt"),
    ("infer", RUN, "--prompt=FILE:{files}/good", "good"),
    ("infer", RUN, "--prompt=FILE:{files}/latin1.txt", "latin1.txt"),
    ("infer", RUN, "--checkpoint_step=7", "7"),
    ("infer", RUN, "--seed=1.5", "seed"),
    # convert
    ("convert", RUN, "", "--to_hf"),
    ("convert", RUN, "--to_hf={new}/a --verify", "--verify"),
    ("convert", RUN, "--to_hf={files}/good", "good"),
    ("convert", RUN, "--to_hf={new}/a --step=9", "9"),
    ("convert", "--workdir={new}/a ", "--from_hf={new}/nothing", "{new}/nothing"),
    ("convert", "--workdir={new}/a ", "--from_hf={files}/good", "config.json"),
    ("convert", "--workdir={new}/a ", "--from_hf={files}/mamba", "model_type"),
    ("convert", "--workdir={new}/a ", "--from_hf={files}/pickle", "pickle"),
    ("convert", "--workdir={files}/good ", "--from_hf={files}/pickle", "--workdir"),
    ("convert", "--workdir={new}/nothing ", "--verify", "config.json"),
]


@pytest.fixture(scope="module")
def places(store, tmp_path_factory):
    """Name -> path: a token store, a trained workdir, a config file, and a folder of wrong files."""
    folder = tmp_path_factory.mktemp("mistakes")
    config = small_config(store)
    config.train.steps = 2
    config.optim.warmup_steps = 0
    config.eval.every_steps = 0
    tiny = folder / "tiny.py"
    tiny.write_text(
        "from trialgpt_jax.config import default_config, update\n\n\n"
        "def get_config():\n"
        f"    c = default_config()\n    update(c, {config.to_dict()!r}, __file__)\n    return c\n"
    )
    assert call("train", f"--config={tiny}", f"--workdir={folder / 'run'}").returncode == 0
    files = folder / "files"
    for name in ("good", "empty", "pictures", "bins", "mamba", "pickle", "nojson"):
        (files / name).mkdir(parents=True)
    (files / "good" / "a.txt").write_text("some words, and more words\n" * 40)
    (files / "good" / "b.txt").write_text("other words, and again others\n" * 40)
    (files / "pictures" / "cat.png").write_bytes(b"\x89PNG")
    (files / "bins" / "train_00000.bin").write_bytes(bytes(64))
    (files / "sheet.csv").write_text("a,b\n1,2\n")
    (files / "nothing.txt").write_bytes(b"")
    (files / "numbers.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (files / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    (files / "other.jsonl").write_text('{"content": "a"}\n')
    (files / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 1000)[:-20])
    (files / "text.gz.txt.gz").write_text("this is not gzip\n")
    (files / "text.parquet").write_text("this is not parquet\n")
    (files / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    (files / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    (files / "pickle" / "config.json").write_text('{"model_type": "gpt2"}')
    (files / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (files / "nojson" / "config.json").write_text("{")
    (files / "untrained").mkdir()
    shutil.copy(folder / "run" / "config.json", files / "untrained")
    rebuilt = pathlib.Path(shutil.copytree(store, files / "rebuilt"))
    manifest = json.loads((rebuilt / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (rebuilt / "manifest.json").write_text(json.dumps(manifest))
    return {"store": store, "run": folder / "run", "tiny": tiny, "files": files, "configs": ROOT / "configs"}


def test_there_are_a_hundred():
    assert len(MISTAKES) >= 100 and len({mistake[:3] for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize(("command", "first", "rest", "word"), MISTAKES)
def test_a_mistake_is_one_line(places, command, first, rest, word, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where there is no data/openwebtext
    place = places | {"new": tmp_path / "new"}
    result = call(command, *(first + " " + rest).format(**place).split())
    refused(result, word.format(**place))
    assert not list(tmp_path.rglob("*.bin"))
