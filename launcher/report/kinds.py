"""The kinds of seconds and of bytes: their names for people, their colours and their order in every figure."""

from __future__ import annotations

from typing import NamedTuple

from launcher.render_estimate import LOST_WORDS, TIME_WORDS


class KindStyle(NamedTuple):
    """How a kind is shown.

    Attributes:
        label: For people.
        css: Class of its colour.
    """

    label: str
    css: str


_TIME_COLOURS = {
    "gemm": "blue",
    "attention": "blue",
    "memory_bound": "sky",
    "launch": "grey1",
    "bubble": "grey1",
    "optimizer": "green",
    "offload": "green",
}
TIME = {kind: KindStyle(words, _TIME_COLOURS.get(kind, "orange")) for kind, words in TIME_WORDS.items()}
MEMORY = {
    "weights": KindStyle("weights", "blue"),
    "gradients": KindStyle("gradients", "sky"),
    "optimizer": KindStyle("optimizer", "green"),
    "activations": KindStyle("activations", "orange"),
    "logits": KindStyle("logits", "red"),
    "gathered": KindStyle("gathered parameters", "rose"),
    "buffers": KindStyle("communication buffers", "grey1"),
    "context": KindStyle("device context", "grey2"),
    "fragmentation": KindStyle("fragmentation", "grey3"),
}
LOST = {kind: KindStyle(words, "grey2") for kind, words in LOST_WORDS.items()}


def style(table: dict[str, KindStyle], kind: str) -> KindStyle:
    """The style of a kind; one that nobody has drawn before is grey under its own name."""
    return table.get(kind, KindStyle(kind.replace("_", " "), "grey1"))
