"""Reading ranges across the slices of any plan, and never a wrong byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.checkpoint import CorruptCheckpoint, read_manifest
from jobs.checkpoint.digest import combine_digests, partial_digest, weights_digest
from jobs.checkpoint.layout import place_of
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.shardfile import BLOCK_ELEMENTS, KINDS, Slice
from jobs.checkpoint.slices import whole
from tests.support.checkpoints import flip_and_sign_again, flip_bit, values, write_checkpoint

SHAPES = {"a.weight": (40, 12), "b.weight": (12, 40), "c.bias": (7,)}


def tensor_parallel(name: str, dim: int, ranks: int, replicas: int) -> list[list[Slice]]:
    """Slices of a tensor cut along ``dim`` over ranks, each cut flat over replicas: one list per rank of the gang."""
    shape = SHAPES[name]
    width = shape[dim] // ranks
    out = []
    for replica in range(replicas):
        for rank in range(ranks):
            box = tuple((rank * width, (rank + 1) * width) if d == dim else (0, s) for d, s in enumerate(shape))
            count = shape[0] * shape[1] // ranks
            low, high = count * replica // replicas, count * (replica + 1) // replicas
            out.append([Slice(name=name, shape=shape, box=box, start=low, stop=high)])
    return out


def gang(tp: int, dp: int) -> list[list[Slice]]:
    """A column-parallel, a row-parallel and a replicated tensor."""
    columns, rows = tensor_parallel("a.weight", 0, tp, dp), tensor_parallel("b.weight", 1, tp, dp)
    ranks = [a + b for a, b in zip(columns, rows, strict=True)]
    ranks[0].append(whole("c.bias", SHAPES["c.bias"]))
    return ranks


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (1, 3), (2, 2), (4, 3)])
def test_any_range_of_any_tensor_comes_back(tmp_path: Path, tp: int, dp: int) -> None:
    path = write_checkpoint(tmp_path, ranks=gang(tp, dp))
    rng = np.random.default_rng(tp * 10 + dp)
    for reader in (Reader(path), Reader(path, rank=tp * dp + 1)):
        assert reader.names == sorted(SHAPES)
        for name, shape in SHAPES.items():
            assert reader.shape(name) == shape
            for kind in KINDS:
                expected = values(shape, kind)
                for _ in range(5):
                    low, high = sorted(rng.integers(0, len(expected) + 1, 2).tolist())
                    assert (reader.read_flat(name, kind, low, high) == expected[low:high]).all()


def test_the_digest_does_not_depend_on_the_cut(tmp_path: Path) -> None:
    paths = [
        write_checkpoint(tmp_path / f"{tp}{dp}", ranks=gang(tp, dp)) for tp, dp in [(1, 1), (2, 1), (1, 3), (4, 2)]
    ]
    digests = {weights_digest(path) for path in paths}
    assert len(digests) == 1
    for world in (1, 2, 5):
        shares = [partial_digest(paths[3], rank, world) for rank in range(world)]
        assert {combine_digests(read_manifest(paths[3]), shares)} == digests


def test_the_digest_needs_all_shares(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, ranks=gang(1, 1))
    with pytest.raises(ValueError, match="2 block digests for 3 blocks"):
        combine_digests(read_manifest(path), [partial_digest(path, 0, 1)[:2]])


def test_the_digest_sees_one_bit_but_not_the_moments(tmp_path: Path) -> None:
    plain, changed = (write_checkpoint(tmp_path / name, ranks=gang(2, 1)) for name in ("plain", "changed"))
    flip_and_sign_again(changed, 1, "b.weight", 0)
    assert weights_digest(plain) != weights_digest(changed)


def test_tensors_longer_than_a_block(tmp_path: Path) -> None:
    """Ranges and runs that cross the borders of blocks, in a row-parallel tensor."""
    shape = (1500, 1600)
    boxes = [((0, 1500), (0, 700)), ((0, 1500), (700, 1600))]
    ranks = [[Slice(name="w", shape=shape, box=b, start=0, stop=1500 * (b[1][1] - b[1][0]))] for b in boxes]
    path = write_checkpoint(tmp_path, ranks=ranks)
    expected = values(shape, "master")
    assert len(expected) > 2 * BLOCK_ELEMENTS
    reader = Reader(path)
    for low, high in [(0, len(expected)), (BLOCK_ELEMENTS - 3, BLOCK_ELEMENTS + 5), (2_000_001, 2_000_002)]:
        assert (reader.read_flat("w", "master", low, high) == expected[low:high]).all()
    flat = write_checkpoint(tmp_path / "flat", ranks=[[whole("w", shape)]])
    assert weights_digest(flat) == weights_digest(path)


def test_damage_is_found_only_where_one_reads(tmp_path: Path) -> None:
    """A reader verifies what it touches; what it does not touch may be damaged (deep verification is for that)."""
    path = write_checkpoint(tmp_path)
    flip_bit(place_of(path).shard(1), -1)
    reader = Reader(path)
    assert reader.read_flat("w", "master", 0, 300).shape == (300,)
    with pytest.raises(CorruptCheckpoint, match="damaged") as raised:
        reader.read_flat("w", "exp_avg_sq", 119, 121)
    assert raised.value.path == str(path)
    assert "exp_avg_sq/w" in raised.value.reason


@pytest.mark.parametrize("damage", ["missing", "truncated", "header"])
def test_a_damaged_shard_is_never_read(tmp_path: Path, damage: str) -> None:
    path = write_checkpoint(tmp_path)
    shard = place_of(path).shard(1)
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-4])
    else:
        flip_bit(shard, 20)
    reader = Reader(path)
    assert (reader.read_flat("w", "master", 0, 120) == values((30, 10), "master")[:120]).all()
    with pytest.raises(CorruptCheckpoint, match="damaged"):
        reader.read_flat("w", "master", 0, 121)


def test_what_no_shard_has_is_an_error(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, ranks=[[whole("w", (30, 10), 0, 120)], [whole("w", (30, 10), 121, 300)]])
    with pytest.raises(CorruptCheckpoint) as raised:
        Reader(path).read_flat("w", "master", 0, 300)
    assert raised.value.reason == "1 elements of w are in no shard"


def test_what_two_shards_have_is_an_error(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, ranks=[[whole("w", (30, 10), 0, 160)], [whole("w", (30, 10), 150, 300)]])
    with pytest.raises(CorruptCheckpoint) as raised:
        Reader(path).read_flat("w", "master", 0, 300)
    assert raised.value.reason == "w is stored more than once"


def test_each_rank_finds_its_own_state(tmp_path: Path) -> None:
    reader = Reader(write_checkpoint(tmp_path, ranks=gang(2, 2)), rank=2)
    assert [reader.rank_state(rank) for rank in range(5)] == [{"rank": rank} for rank in range(4)] + [None]
