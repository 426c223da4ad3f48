"""Of every layout of a folder only its documents to train on come out, parsed, or it is refused with what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.sources import default_name, held_out, units
from jobs.data.work import texts
from jobs.spec import SourceSpec
from strategies.errors import ConfigError


def make(root: Path, names: list[str], **contents: str) -> None:
    """Files whose one document is their own name, if they are no others that lie in such folders."""
    for name in [*names, *contents]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"id": 1, "text": name}) + "\n"
        if name in contents:
            path.write_text(contents[name])
        elif path.suffix == ".parquet":
            pq.write_table(pa.table({"id": [1], "text": [name]}), path)
        elif path.suffix == ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as out:
                out.write_table(pa.table({"text": [name]}))
        elif path.name.endswith((".json.gz", ".jsonl.gz")):
            path.write_bytes(gzip.compress(line.encode()))
        elif path.suffix in (".jsonl", ".json"):
            path.write_text(line)
        else:
            path.write_text(name)


def documents(source: SourceSpec) -> list[str]:
    """Every document that is trained on."""
    return [piece.text for unit in units(source) for piece in texts(unit)]


def refusal(source: SourceSpec) -> str:
    with pytest.raises(ConfigError) as caught:
        units(source)
    with pytest.raises(ConfigError):
        held_out(source)
    return caught.value.what


def card(*configs: str, head: str = "license: mit\n") -> str:
    """A dataset card that names configurations, each a line of YAML."""
    listed = "configs:\n" + "".join(f"- {one}\n" for one in configs) if configs else ""
    return f"---\n{head}{listed}---\n# A dataset\n\nIts text is no document.\n"


PARQUET = ["data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0.parquet", "data/validation-0.parquet"]
WIKITEXT = [
    f"wikitext-{size}-v1/{split}-00000-of-00001.parquet"
    for size in (103, 2)
    for split in ("train", "validation", "test")
]


@pytest.mark.parametrize(
    ("names", "taken", "told"),
    [
        (PARQUET, PARQUET[:2], "test (1 file) and validation (1 file) left out"),
        ([*PARQUET, "README.md"], PARQUET[:2], "test (1 file), validation (1 file) and README.md left out"),
        ([*PARQUET, "README.md", "LICENSE", "dataset_infos.json"], PARQUET[:2], "LICENSE, README.md and dataset_infos"),
        (["a.parquet", "README.md"], ["a.parquet"], "everything else is taken, README.md left out"),
        (["train.json", "test.json", "README.md"], ["train.json"], "the split train is taken, test (1 file) and READ"),
        (["a.json", "README.md"], ["a.json"], "README.md left out"),
        (["train.txt", "test.txt", "README.md"], ["train.txt"], "test (1 file) and README.md left out"),
        (["wiki.train.tokens", "wiki.test.tokens"], ["wiki.train.tokens"], "test (1 file) left out"),
        (["w-train.arrow", "w-test.arrow", "dataset_info.json"], ["w-train.arrow"], "test (1 file) and dataset_info.j"),
        (["squad-train-v1.1.json", "squad-dev-v1.1.json"], ["squad-train-v1.1.json"], "validation (1 file) left out"),
        (["en/c4-train.0-of-2.parquet", "en/c4-validation.0-of-1.parquet"], ["en/c4-train.0-of-2.parquet"], "valid"),
        (["c4-train.00000-of-2.json.gz", "c4-validation.0-of-1.json.gz"], ["c4-train.00000-of-2.json.gz"], "valid"),
        (["Train/a.jsonl", "dev/a.jsonl", "dev/b.jsonl"], ["Train/a.jsonl"], "validation (2 files) left out"),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], "test (1 file) left out"),
        (["train/a.txt", "test/a.txt"], ["train/a.txt"], "test (1 file) left out"),
        (["train/a/x.jsonl", "train/b/x.jsonl", "test/x.jsonl"], ["train/a/x.jsonl", "train/b/x.jsonl"], "test (1"),
        (["tests/a.txt", "test/b.txt", "train.py"], ["test/b.txt", "tests/a.txt", "train.py"], ""),
        (["train.py", "test.py"], ["test.py", "train.py"], ""),
        (["train.py", "eval.py", "model.py", "conf/train.yaml", "conf/test.yaml"], None, ""),
        (["train/a.py", "test/a.py", "setup.py"], None, ""),
        (["train/a.py", "test/a.py"], ["train/a.py"], "test (1 file) left out"),
        (["README.md", "a.md", "LICENSE"], ["LICENSE", "README.md", "a.md"], ""),
        (["README.md"], ["README.md"], ""),
        (["test-0.parquet", "test-1.parquet"], ["test-0.parquet", "test-1.parquet"], ""),
        (["trainers.jsonl", "contest.jsonl"], ["contest.jsonl", "trainers.jsonl"], ""),
    ],
)
def test_only_the_split_to_train_on_is_taken(
    names: list[str], taken: list[str] | None, told: str, tmp_path: Path
) -> None:
    """Of a dataset as it lies on the Hugging Face hub; a folder of source code or of notes is none."""
    make(tmp_path, names)
    taken = taken or sorted(names, key=lambda one: Path(one).parts)
    source = SourceSpec(path=str(tmp_path))
    assert documents(source) == taken
    assert (told in held_out(source)) if told else held_out(source) == ""
    if taken != sorted(names):
        source = SourceSpec(path=str(tmp_path), kind="text")  # a folder of any texts, asked for as such
        assert units(source)[0].parts[0].path == str(tmp_path / min(names, key=lambda one: Path(one).parts))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["validation-0.jsonl", "test-0.jsonl"], "is not clear (1 validation, 1 test). Name one, split: test"),
        (["train-0.jsonl", "test-0.jsonl", "more.jsonl"], "(1 train, 1 test, 1 of no split). Name one, split: train,"),
        (["a.jsonl", "test-0.jsonl"], "is not clear (1 test, 1 of no split)"),
        (["train/a.txt", "test/a.txt", "vocab.txt"], "(1 train, 1 test, 1 of no split). Name one, split: train, or"),
        (
            ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
            "split: train_sft,",
        ),
        (WIKITEXT, "has 2 configurations (wikitext-103-v1, wikitext-2-v1), and which is meant is not clear"),
        (["a/train.txt", "b/train.txt"], "has 2 configurations (a, b)"),
        (["a.csv", "README.md"], "tables of text (csv, tsv) are not read. Make JSON lines"),
        (["a.csv", "a.parquet"], "more than one kind (1 parquet, 1 csv or tsv). Say which is meant, kind: parquet"),
        (["train.csv", "test.csv"], "Make JSON lines or Parquet of them; kind: text, split: train trains on them"),
        (
            ["a.txt", "metadata.json"],
            "more than one kind (1 jsonl, 1 text). Say which is meant, kind: jsonl or",
        ),
        (["train.txt", "test.txt", "m.json"], "Say which is meant, kind: jsonl or kind: text, split: train, or give"),
        (
            ["a.txt", "test.txt", "m.json"],
            "more than one kind (1 jsonl, 2 text). Say which is meant, kind: jsonl,",
        ),
        (["a.parquet", "load.py", "README.md"], "more than one kind (1 parquet, 1 text). Say which is meant"),
    ],
)
def test_what_nobody_can_choose_from_is_refused(names: list[str], told: str, tmp_path: Path) -> None:
    make(tmp_path, names)
    assert told in refusal(SourceSpec(path=str(tmp_path)))


def test_no_hint_leads_to_what_is_kept_for_tests(tmp_path: Path) -> None:
    """Whoever does as a refusal says trains on the split to train on; whoever asks for all is told what that is."""
    make(tmp_path, ["train.txt", "test.txt", "LICENSE"], **{"metadata.json": "metadata.json"})
    assert documents(SourceSpec(path=str(tmp_path), kind="text", split="train")) == ["train.txt"]
    everything = SourceSpec(path=str(tmp_path), kind="text")
    assert documents(everything) == ["LICENSE", "metadata.json", "test.txt", "train.txt"]
    assert held_out(everything) == (
        f"of {tmp_path} every file is taken, as kind: text says, test (1 file) and LICENSE too; "
        "split: train takes only what is named so"
    )
    make(tmp_path / "csv", ["train.csv", "test.csv", "README.md"])
    assert documents(SourceSpec(path=str(tmp_path / "csv"), kind="text", split="train")) == ["train.csv"]
    make(tmp_path / "notes", ["a.md", "train.md"])
    assert held_out(SourceSpec(path=str(tmp_path / "notes"), kind="text")) == ""


def test_what_is_refused_can_be_named(tmp_path: Path) -> None:
    make(tmp_path / "w", [*WIKITEXT, "README.md"])
    for source in (
        SourceSpec(path=str(tmp_path / "w"), config="wikitext-2-v1"),
        SourceSpec(path=str(tmp_path / "w" / "wikitext-2-v1")),
    ):
        assert [one[-len(WIKITEXT[3]) :] for one in documents(source)] == [WIKITEXT[3]]
        assert "test (1 file)" in held_out(source)
    assert "path: " + str(tmp_path / "w" / "wikitext-2-v1") + ", or config: wikitext-2-v1" in refusal(
        SourceSpec(path=str(tmp_path / "w"))
    )
    wrong = refusal(SourceSpec(path=str(tmp_path / "w"), config="wikitext-v2"))
    assert "has no configuration 'wikitext-v2'. Did you mean 'wikitext-2-v1'?" in wrong
    called = {default_name(SourceSpec(path=str(tmp_path / "w"), config=one)) for one in ("", "a", "data/b")}
    assert called == {"w", "w-a", "w-data-b"}, "two configurations of a dataset have two names"
    make(tmp_path / "d", names := ["train-0.jsonl", "test-0.jsonl", "more.jsonl"])
    for split, taken in (("train", names[:1]), ("validation", []), ("test", names[1:2]), ("all", sorted(names))):
        source = SourceSpec(path=str(tmp_path / "d"), split=split)
        if taken:
            assert documents(source) == taken
        else:
            assert "is not clear" in refusal(source)
    sft = ["data/train_gen-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"]
    make(tmp_path / "s", sft)
    assert documents(SourceSpec(path=str(tmp_path / "s"), split="train_sft")) == sft[1:]
    assert "is one file" in refusal(SourceSpec(path=str(tmp_path / "s" / sft[0]), split="train"))


CONFIGS = (
    "{config_name: big, data_files: [{split: train, path: big/*}, {split: dev, path: [big-dev/*.jsonl]}]}",
    "{config_name: small, default: true, data_files: {train: small/p*, test: small/x*}}",
    "{config_name: plain, data_dir: plain}",
    "{config_name: every, data_files: '**/*.jsonl'}",
    "{config_name: gone, data_files: {train: gone/*}}",
)
CLONE = ["big/a.jsonl", "big-dev/b.jsonl", "small/p1.jsonl", "small/p2.jsonl", "small/x.jsonl"]
CLONE += ["plain/train.jsonl", "plain/test.jsonl", "load.py", "pictures/a.txt", "dataset_infos.json"]


@pytest.mark.parametrize(
    ("asked", "taken", "told"),
    [
        (
            {},
            ["small/p1.jsonl", "small/p2.jsonl"],
            "the split train of the configuration small is taken, test (1",
        ),
        ({"split": "test"}, ["small/x.jsonl"], "the split test of the configuration small is taken, train (2 files)"),
        ({"split": "all"}, ["small/p1.jsonl", "small/p2.jsonl", "small/x.jsonl"], "all of small is taken"),
        ({"config": "big"}, ["big/a.jsonl"], "dev (1 file), the configuration small,"),
        ({"config": "big", "kind": "jsonl"}, ["big/a.jsonl"], "dev (1 file)"),
        ({"config": "big", "split": "dev"}, ["big-dev/b.jsonl"], "the split dev of the configuration big"),
        ({"config": "plain"}, ["plain/train.jsonl"], "the split train is taken, test (1 file) left out; of"),
        (
            {"config": "every"},
            [one for one in CLONE if one.endswith(".jsonl")],
            "the configuration plain",
        ),
    ],
)
def test_a_card_says_what_is_trained_on(asked: dict[str, Any], taken: list[str], told: str, tmp_path: Path) -> None:
    make(tmp_path, CLONE, **{"README.md": card(*CONFIGS)})
    source = SourceSpec(path=str(tmp_path), **asked)
    assert sorted(documents(source)) == sorted(taken)
    assert told in held_out(source)
    assert "big" in held_out(source)


@pytest.mark.parametrize(
    ("text", "asked", "told"),
    [
        (card(CONFIGS[0], CONFIGS[2]), {}, "has 2 configurations (big, plain), and which is meant is not clear. Name "),
        (card(*CONFIGS), {"config": "smal"}, "has no configuration 'smal'. Did you mean 'small'? Known: big, every, "),
        (card(*CONFIGS), {"split": "dev"}, "has no split 'dev'. Name one, split: train or test, or split: all"),
        (
            card(*CONFIGS),
            {"config": "gone"},
            "its card names for the split train (gone/*)",
        ),
        (card(CONFIGS[0], CONFIGS[0]), {}, "names a configuration twice"),
        (card("{data_files: '**.jsonl'}"), {}, "a pattern of its data_files is none"),
        (card("{data_files: [{split: train}]}"), {}, "are no list of split and path"),
        (
            card("{data_files: [{split: train, path: small/p1*}, {split: train, path: small/p2*}]}"),
            {},
            "its data_files name the split train twice",
        ),
        (card("{data_files: {train: small/p1*, train: small/p2*}}"), {}, "its head names train twice in one place"),
        (card("{data_files: [3]}"), {}, "its data_files are no patterns"),
        (card("3"), {}, "its configs are no list of mappings"),
        (card("{config_name: [}"), {}, "its head is no YAML"),
        (card("!!map 3"), {}, "its head is no YAML"),
        (card("{data_files: &a [*a]}"), {}, "its data_files are no patterns"),
        (card(CONFIGS[0]), {"kind": "parquet"}, "holds no files of kind parquet"),
        (card("{data_files: [small/*, pictures/*]}"), {}, "more than one kind (3 jsonl, 1 text)"),
    ],
)
def test_a_card_that_does_not_say_it_is_refused(text: str, asked: dict[str, Any], told: str, tmp_path: Path) -> None:
    make(tmp_path, CLONE, **{"README.md": text})
    assert told in refusal(SourceSpec(path=str(tmp_path), **asked))


def test_a_card_without_configurations_leaves_it_to_the_names(tmp_path: Path) -> None:
    make(tmp_path / "a", ["one.txt", "two.txt"], **{"README.md": card()})
    source = SourceSpec(path=str(tmp_path / "a"))
    assert documents(source) == ["one.txt", "two.txt"], "a card is no document, even beside texts"
    assert "README.md left out" in held_out(source)
    make(tmp_path / "bare", ["LICENSE"], **{"README.md": card()})
    assert "holds no files of kind text (2 files were found)" in refusal(SourceSpec(path=str(tmp_path / "bare")))
    make(tmp_path / "twice", ["one.txt"], **{"README.md": card(head="license: mit\nlicense: mit\n")})
    assert documents(SourceSpec(path=str(tmp_path / "twice"))) == ["one.txt"]
    make(tmp_path / "b", ["one.md"], **{"README.md": "---\na rule: of: a text\n---\n"})
    assert len(documents(SourceSpec(path=str(tmp_path / "b")))) == 2
    make(tmp_path / "code", ["train.py", "test.py"], **{"README.md": card()})
    make(tmp_path / "asked", ["train.py", "test.py"])
    for source in (SourceSpec(path=str(tmp_path / "code")), SourceSpec(path=str(tmp_path / "asked"), split="train")):
        assert documents(source) == ["train.py"], "a dataset may be of programs"
    make(tmp_path / "c", ["data/train-0.jsonl", "data/test-0.jsonl"], **{"README.md": card("{config_name: default}")})
    assert documents(SourceSpec(path=str(tmp_path / "c"))) == ["data/train-0.jsonl"]


def test_folders_below_a_card_with_configurations_are_none(tmp_path: Path) -> None:
    """Nothing is proposed that would be refused."""
    make(tmp_path, ["a/train.jsonl", "b/train.jsonl"], **{"README.md": card("{config_name: default}")})
    told = refusal(SourceSpec(path=str(tmp_path)))
    assert f"Name one, path: {tmp_path / 'b'}; for more of them" in told
    assert "has no configuration 'b'" in refusal(SourceSpec(path=str(tmp_path), config="b"))
    assert documents(SourceSpec(path=str(tmp_path / "b"))) == ["b/train.jsonl"]


def test_what_is_left_out_is_told_of_any_kind_and_shortly(tmp_path: Path) -> None:
    make(tmp_path / "a", ["a.jsonl", "config.json", "state.json", "README.md"])
    source = SourceSpec(path=str(tmp_path / "a"), kind="jsonl")
    assert documents(source) == ["a.jsonl"]
    assert held_out(source).endswith(" everything else is taken, config.json and state.json left out")
    make(tmp_path / "t", ["train.txt", "test.txt", "LICENSE"])
    source = SourceSpec(path=str(tmp_path / "t"), kind="text", split="train")
    assert held_out(source).endswith("test (1 file) and LICENSE left out")
    make(tmp_path / "m", [f"{number}/{name}" for number in range(40) for name in ("a.jsonl", "README.md", "LICENSE")])
    for kind, told in (("auto", " and 72 more left out"), ("text", " and 72 more too")):
        note = held_out(SourceSpec(path=str(tmp_path / "m"), kind=kind))
        assert note.endswith(told)
        assert note.count("README.md") + note.count("LICENSE") == 8


def test_what_was_saved_tells_which_splits_are_left_out(tmp_path: Path) -> None:
    for split in ("train", "test", "extra"):
        folder = tmp_path / split
        make(folder, ["data-0.arrow"], **{"dataset_info.json": "{}"})
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test", "extra"]}')
    source = SourceSpec(path=str(tmp_path))
    assert [part.path for unit in units(source) for part in unit.parts] == [str(tmp_path / "train" / "data-0.arrow")]
    assert held_out(source) == f"of {tmp_path} the split train is taken, extra (1 file) and test (1 file) left out"
    source = SourceSpec(path=str(tmp_path), split="test")
    assert [part.path for unit in units(source) for part in unit.parts] == [str(tmp_path / "test" / "data-0.arrow")]
    source = SourceSpec(path=str(tmp_path), split="all")
    assert len(documents(source)) == 3
    assert held_out(source) == held_out(SourceSpec(path=str(tmp_path / "test"))) == ""
    assert "has no split 'dev'; give the folder of one of train, test, extra" in refusal(
        SourceSpec(path=str(tmp_path), split="dev")
    )
    for split in ("", "test"):
        assert "has no configurations" in refusal(SourceSpec(path=str(tmp_path), config="x", split=split))
    assert "neither splits nor" in refusal(SourceSpec(path=str(tmp_path / "test"), split="test"))


def test_pointers_of_git_lfs_are_no_documents(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    make(tmp_path, ["train-0.txt"], **{"train-1.txt": pointer, ".gitattributes": "*.txt filter=lfs\n"})
    told = refusal(SourceSpec(path=str(tmp_path)))
    assert "1 of its files are only pointers, train-1.txt is one. Fetch them: git lfs pull" in told


def test_nothing_of_a_folder_is_left_out_unasked(tmp_path: Path) -> None:
    """Of a folder with files of several kinds phalanx does not choose one."""
    make(tmp_path, ["0.txt", "1.txt", "2.txt", "metadata.json", "a.jsonl", "b.jsonl.gz", "c.parquet"])
    told = refusal(SourceSpec(path=str(tmp_path)))
    assert "more than one kind (3 jsonl, 1 parquet, 3 text)" in told
    assert "kind: jsonl or parquet or kind: text, or give" in told
    assert documents(SourceSpec(path=str(tmp_path), kind="parquet")) == ["c.parquet"]
    (tmp_path / "c.parquet").unlink()
    for path in tmp_path.glob("*.jsonl*"):
        path.unlink()
    assert "more than one kind (1 jsonl, 3 text)" in refusal(SourceSpec(path=str(tmp_path))), "JSON is no plain text"
    assert len(documents(SourceSpec(path=str(tmp_path), kind="text"))) == 4
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    assert documents(SourceSpec(path=str(tmp_path))) == ["metadata.json"], "some call their JSON lines so"
