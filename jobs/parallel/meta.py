"""What a parameter of this rank is in terms of the whole model: the basis of plan-independent checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamMeta:
    """Place of a rank's parameter in the global model; stored on the parameter as ``param.phalanx``.

    Attributes:
        name: Global name; does not depend on the plan (``blocks.3.attn.q.weight``).
        shape: Global shape, without vocabulary padding.
        box: Per dimension, [start, stop) of the part this rank holds. The extents are the local shape. With
            vocabulary padding ``stop`` may lie beyond ``shape``: what lies beyond is never stored nor digested.
        primary: This rank's copy is the one that is saved (false on all but one of replicated copies: tensor-parallel
            replicas, the second copy of tied embeddings). Data-parallel replicas all say true.
    """

    name: str
    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    primary: bool = True
