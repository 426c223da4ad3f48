"""What the kernel's files say of the memory of a process, for both versions of cgroups and inside of containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.cgroup import MemoryGroup, memory_group, oom_kills_of_machine, usable_memory
from tests.support.cgroups import Tree

GB = 10**9
INSTALLED = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
VERSIONS = pytest.mark.parametrize("version", [1, 2])


def found(tree: Tree, pid: int | str = 7) -> MemoryGroup:
    group = memory_group(pid, tree.proc)
    assert group is not None
    return group


@VERSIONS
def test_the_tightest_limit_holds(version: int, tmp_path: Path) -> None:
    tree = Tree(tmp_path, version)
    for path, limit in (("", None), ("pods", 9 * GB), ("pods/a", 4 * GB), ("pods/a/rank", None), ("pods/b", GB)):
        tree.group(path, limit=limit)
    for pid, path in ((7, "/pods/a/rank"), (8, "/pods"), (9, "/")):
        tree.put(pid, path)
    assert [found(tree, pid).limit_bytes() for pid in (7, 8, 9)] == [4 * GB, 9 * GB, None]


@VERSIONS
def test_memory_is_that_of_the_group_or_of_the_machine(version: int, tmp_path: Path) -> None:
    tree = Tree(tmp_path, version)
    tree.put("self", "/pods/a")
    assert usable_memory(tree.proc) == INSTALLED, "nothing is known of the group"
    tree.group("pods", limit=INSTALLED // 4)
    tree.group("pods/a", limit=2 * INSTALLED)
    assert usable_memory(tree.proc) == INSTALLED // 4
    tree.group("pods")
    assert usable_memory(tree.proc) == INSTALLED


@VERSIONS
def test_a_group_counts_its_own_victims_only(version: int, tmp_path: Path) -> None:
    tree = Tree(tmp_path, version)
    tree.group("pods", kills=1, below=5)
    tree.group("pods/a", kills=3)
    for pid, path in ((7, "/pods"), (8, "/pods/a")):
        tree.put(pid, path)
    assert [found(tree, pid).oom_kills() for pid in (7, 8)] == [1, 3]


def test_an_older_kernel_counts_with_those_below_or_not_at_all(tmp_path: Path) -> None:
    tree = Tree(tmp_path, 2)
    tree.group("pods", kills=1, below=5)
    tree.put(7, "/pods")
    (tree.top / "pods" / "memory.events.local").unlink()
    assert found(tree).oom_kills() == 6
    (tree.top / "pods" / "memory.events").write_text("low 0\nhigh 0\n")
    assert found(tree).oom_kills() is None


def test_a_group_without_the_controller_is_charged_above(tmp_path: Path) -> None:
    tree = Tree(tmp_path, 2)
    tree.group("user", limit=GB, kills=2)
    (tree.top / "user" / "shell").mkdir()
    tree.put(7, "/user/shell")
    assert (found(tree).limit_bytes(), found(tree).oom_kills()) == (GB, 2)


@VERSIONS
def test_a_container_sees_its_own_group_at_the_top(version: int, tmp_path: Path) -> None:
    """Without a namespace of cgroups the kernel names the group as the host does, and mounts only that."""
    tree = Tree(tmp_path, version, mounted="/docker/abc")
    tree.group("", limit=GB, kills=4)
    tree.group("inner", kills=1)
    for pid, path in ((7, "/docker/abc"), (8, "/docker/abc/inner"), (9, "/docker/other"), (10, "/../other")):
        tree.put(pid, path)
    assert [(found(tree, pid).limit_bytes(), found(tree, pid).oom_kills()) for pid in (7, 8)] == [(GB, 4), (GB, 1)]
    assert memory_group(9, tree.proc) is None
    assert memory_group(10, tree.proc) is None


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    tree = Tree(tmp_path, 2)
    assert memory_group(7, tree.proc) is None
    assert oom_kills_of_machine(tree.proc) is None
    tree.machine(3)
    assert oom_kills_of_machine(tree.proc) == 3


def test_the_kernel_of_this_machine_is_understood() -> None:
    group = memory_group()
    if group is None:
        pytest.skip("there is no memory cgroup here that can be seen")
    assert group.folder.is_dir()
    assert group.folder.is_relative_to(group.top)
    assert 0 < usable_memory() <= INSTALLED
    assert group.oom_kills() is not None or oom_kills_of_machine() is not None
