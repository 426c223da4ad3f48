"""Models that exist, in the configuration: sizes from config.json, weights checked, every problem at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.weights import find, tokenizer_of
from launcher import build
from launcher.config import compose, recompose, to_yaml
from launcher.store import RunStore
from strategies.errors import ConfigError
from tests.support import hf_models
from tests.support.checkpoints import write_model_checkpoint
from tests.support.fakes import tiny_request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models") / "tiny-llama"
    hf_models.make(root, "llama")
    hf_models.tokenizer(root / "tokenizer.json", 300)
    return root


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    return str(caught.value)


def test_the_model_follows_from_the_folder(folder: Path) -> None:
    config = compose(["model=gpt_tiny", f"model.from_hf={folder}", "model.seq=16"])
    model = build.model_spec(config)
    assert (model.name, model.flavour, model.layers, model.kv_heads) == ("tiny-llama", "llama", 3, 2)
    assert (model.vocab, model.seq, model.rope_theta, model.tied) == (97, 16, 777.0, False)


def test_shorter_sequences_keep_the_learned_positions(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "gpt2", "gpt2")
    hf_models.tokenizer(tmp_path / "gpt2" / "tokenizer.json", 97)
    words = [f"model.from_hf={tmp_path / 'gpt2'}", f"train.init_from={tmp_path / 'gpt2'}"]
    model = build.model_spec(compose(["model=gpt_tiny", *words, "model.seq=16"]))
    assert (model.seq, model.position_rows, model.learned_positions) == (16, 48, 48)
    whole = build.model_spec(compose(["model=gpt_tiny", *words]))
    assert (whole.seq, whole.position_rows) == (48, None), "as a model is that was never anything else"
    assert whole.parameters == model.parameters
    assert build.model_spec(compose(["model=gpt_tiny", *words, "model.seq=16", "model.position_rows=48"])) == model
    told = refused("model=gpt_tiny", *words, "model.seq=16", "model.position_rows=16")
    assert "learned_positions 48 in the folder, 16 here" in told
    assert "model.position_rows=48 keeps the positions" in told


def test_heads_of_their_own_width_come_along(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "mistral", sliding_window=None, head_dim=12)
    model = build.model_spec(compose(["model=gpt_tiny", f"model.from_hf={tmp_path / 'hf'}"]))
    assert (model.flavour, model.head_dim, model.hidden // model.heads) == ("llama", 12, 8)


def test_nothing_is_left_of_the_experts_of_the_model_that_was_chosen(tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "mixtral")
    config = compose(["model=deepseek_v3", f"model.from_hf={tmp_path / 'hf'}", "model.moe.balance_weight=0.01"])
    moe = build.model_spec(config).moe
    assert moe is not None
    assert (moe.experts, moe.top_k, moe.ffn, moe.shared_ffn, moe.dense_layers) == (4, 2, 40, 0, 0)
    assert (moe.routing, moe.balance_weight) == ("softmax", 0.01)
    assert build.model_spec(config).latent is None


def test_a_stored_configuration_needs_the_folder_no_more(folder: Path, tmp_path: Path) -> None:
    config = compose([f"model.from_hf={folder}", f"train.init_from={folder}"])
    moved = build.settle(config, name="run", cwd=tmp_path)
    text = to_yaml(moved).replace(str(folder), str(tmp_path / "gone"))
    (tmp_path / "config.yaml").write_text(text)
    again = recompose(tmp_path / "config.yaml", ["train.steps=7"])
    assert build.model_spec(again) == build.model_spec(config)
    assert again.train.init_from == str(tmp_path / "gone")


def test_weights_become_part_of_the_request(folder: Path, tmp_path: Path) -> None:
    words = [f"model.from_hf={folder}", f"train.init_from=hf:{folder}", "cluster=process"]
    config = build.settle(compose(words), name="run", cwd=tmp_path)
    request = build.build_request(config, words)
    assert request.job.initial is not None
    assert (request.job.initial.kind, request.job.initial.path) == ("hf", str(folder))


def test_training_reads_text_as_the_weights_that_it_begins_with(folder: Path, tmp_path: Path) -> None:
    """With a tokenizer trained here every token would have another number than the weights know."""
    words = [f"model.from_hf={folder}", f"train.init_from={folder}"]
    assert compose(words).data.tokenizer == str(folder / "tokenizer.json")
    assert compose([*words, "data.tokenizer=mine.json"]).data.tokenizer == "mine.json"
    assert compose([words[0]]).data.tokenizer is None, "weights drawn from the seed know no tokens"
    bare = tmp_path / "bare"
    hf_models.make(bare, "llama")
    told = refused(f"model.from_hf={bare}", f"train.init_from={bare}")
    assert f"data.tokenizer: missing: there is no tokenizer.json in {bare}" in told
    assert "data.tokenizer=FILE" in told


def test_a_second_stage_reads_text_as_the_first(tmp_path: Path) -> None:
    request = tiny_request(tmp_path)
    store = tmp_path / "store"
    data = replace(request.job.data, store=str(store))
    run = RunStore.create(replace(request, job=replace(request.job, data=data)))
    write_model_checkpoint(run.paths.checkpoint_dir, request.job.model)
    weights = find(str(run.paths.root))
    assert tokenizer_of(weights) is None
    told = refused("train.init_from=" + str(run.paths.root))
    assert f"data.tokenizer: missing: there is no tokenizer.json with the data of the run of {weights.path}" in told
    assert "data.tokenizer" not in refused(f"train.init_from={run.paths.root}", "data.tokenizer=mine.json")
    store.mkdir()
    (store / "tokenizer.json").write_text("{}")
    assert tokenizer_of(weights) == store / "tokenizer.json"
    assert tokenizer_of(find(weights.path)) == store / "tokenizer.json", "a manifest lies in its run"
    run.paths.checkpoint_dir.rename(tmp_path / "elsewhere")
    run.paths.pointer.write_text(str(tmp_path / "elsewhere"))
    assert tokenizer_of(find(str(run.paths.root))) == store / "tokenizer.json", "or apart from it"


def test_weights_of_another_model_are_refused_with_all_other_problems(folder: Path) -> None:
    told = refused(f"train.init_from={folder}", "model=llama_tiny")
    assert "it holds another model: layers 3 in the folder" in told
    assert "model.from_hf=FOLDER takes the model from there" in told
    assert "tensors are missing" in told
    assert "of another shape" in told
    assert "There are no weights at /nowhere" in refused("train.init_from=/nowhere")


def test_a_folder_that_is_no_model_of_ours_is_refused(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "config.json").read_text()) | {"model_type": "lama", "hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert "Did you mean 'llama'?" in refused(f"model.from_hf={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(document | {"model_type": "llama", "attention_bias": True}))
    told = refused(f"model.from_hf={tmp_path}", "train.steps=0")
    assert "3 problems" in told
    assert "hidden_act" in told
    assert "attention_bias" in told
    assert "train.steps" in told


def test_an_evaluation_takes_its_model_from_the_weights(folder: Path, tmp_path: Path) -> None:
    words = ["job=evaluate", f"job.weights={folder}", "job.text=t.txt", "cluster=process", "strategy.dp=2"]
    config = build.settle(compose(words), name="run", cwd=tmp_path)
    job = build.build_request(config, words).job
    assert (job.kind, job.model.name, job.plan.dp, job.deepspeed) == ("evaluate", "tiny-llama", 2, {})
    assert job.inference is not None
    assert job.inference.text == str(tmp_path / "t.txt")
    assert job.checkpoint.memory_every == 0


def test_everything_that_is_wrong_with_an_evaluation_is_told_at_once() -> None:
    told = refused("job=evaluate", "strategy.cp=2", "train.init_from=x", "checkpoint.url=/somewhere")
    assert "5 problems" in told
    for key in ("job.weights: missing", "job.text: missing", "strategy.cp", "train.init_from", "checkpoint.url"):
        assert key in told
    assert "job.prompt: missing" in refused("job=generate", "job.weights=x")
    assert "at most 1" in refused("job=generate", "job.weights=x", "job.prompt=y", "job.top_p=1.5")
