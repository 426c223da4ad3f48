"""A model that only computes: this rank's layers under TP x PP, weights read from anywhere, no optimizer, no gradient.

Stages hand their activations on one after the other; as a stage is free once it has sent, several micro-batches in a
row fill the pipeline. Only the last stage has a result; :meth:`Forward.share` gives it to the others.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from jobs.checkpoint.slices import clip
from jobs.distributed import Grid
from jobs.models.gpt import Recipe, TokenEmbedding, layer_specs, stage_bounds
from jobs.models.packing import Documents
from jobs.models.past import Past
from jobs.parallel.meta import ParamMeta
from jobs.parallel.region import TensorRegion
from jobs.parallel.vocabulary import VocabParallelProjection, vocab_parallel_cross_entropy
from jobs.weights import WeightSource
from strategies.specs import ModelSpec

_HEAD_LAYERS = 2  # the final norm and the projection: they look at each position alone


class Forward:
    """One rank's part of a model.

    Args:
        model: The model.
        source: Where its weights are.
        grid: The rank's place; the default is a gang of one.
        stages: Blocks per pipeline stage.
        device: Where to compute.
        dtype: In which type.
        documents: What keeps the documents in a row apart, as in the training of the model; None where a row is one.

    Raises:
        CorruptCheckpoint: The weights are damaged.
        StorageError: They cannot be read.
    """

    def __init__(
        self,
        model: ModelSpec,
        source: WeightSource,
        grid: Grid | None = None,
        *,
        stages: tuple[int, ...] = (),
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        documents: Documents | None = None,
    ) -> None:
        self.model = model
        self.grid = grid or Grid()
        self.device = device or torch.device("cpu")
        self._dtype = dtype
        bounds = stage_bounds(model, stages or (model.layers,))
        self._documents = documents
        self._past = Past()
        recipe = Recipe.of(model, self.grid, seed=0, documents=documents, past=self._past)
        self._layers = nn.ModuleList()
        for spec in layer_specs(recipe)[bounds[self.grid.pipe] : bounds[self.grid.pipe + 1]]:
            first = self._layers[0] if len(self._layers) else None
            if spec.run is None:
                layer = spec.build(*spec.args)
            else:  # the projection of tied weights: the embedding's here, or a copy of it
                embedding = first if isinstance(first, TokenEmbedding) else spec.build(*spec.args)
                layer = VocabParallelProjection(*_of(cast(TokenEmbedding, embedding)))
            self._layers.append(layer)
        self._fill(source)
        self._layers.to(device=self.device, dtype=dtype).eval()

    def _fill(self, source: WeightSource) -> None:
        with torch.no_grad():
            for parameter in self._layers.parameters():
                meta = cast(ParamMeta, parameter.phalanx)  # type: ignore[attr-defined]
                piece = clip(meta.name, meta.shape, meta.box, 0, parameter.numel())
                values = np.empty(piece.elements, dtype=np.float32)
                source.read_slice(piece, values)
                parameter.view(-1)[: piece.elements].copy_(torch.from_numpy(values))

    def losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
        """Cross entropy per token, ``[b, s]`` in fp32, 0 where the target is ignored; None before the last stage.

        Args:
            tokens: ``[b, s]``, equal on all ranks of a replica.
            targets: ``[b, s]``.
        """
        self._past.begin(0)
        logits = self._run(tokens)
        if logits is None:
            return None
        return vocab_parallel_cross_entropy(
            logits,
            targets.to(self.device),
            vocab=self.model.vocab,
            rank=self.grid.model,
            group=self.grid.model_group,
        )

    @property
    def remembers(self) -> bool:
        """Whether :meth:`logits_after` is there: not where a token's way depends on what comes with it.

        Experts with a capacity count the tokens of a sequence, and sequences that are split have one for every rank.
        """
        capacity = self.model.moe.capacity_factor if self.model.moe is not None else 0.0
        return not capacity and not self.grid.split and self.grid.sp == 1

    def logits_at(self, tokens: torch.Tensor, positions: torch.Tensor, *, room: int = 0) -> torch.Tensor | None:
        """Logits over the whole vocabulary at one position of each row, ``[b, vocab]``; None before the last stage.

        Args:
            tokens: ``[b, s]``, equal on all ranks of a replica; what follows a row's position does not matter.
            positions: ``[b]``.
            room: Tokens of each row that are kept for :meth:`logits_after`, those to come included; 0 for none.
        """
        self._past.begin(room)
        local = self._run(tokens, positions)
        return None if local is None else self._whole(local)[:, 0]

    def logits_after(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor | None:
        """The same at the newest token of each row, of which nothing else has changed since the last call.

        Args:
            tokens: ``[b, s]``, whole rows, equal on all ranks of a replica.
            places: Where the newest token of each row is, ``[b]``.
        """
        rows = torch.arange(len(places))
        positions = places if self._documents is None else self._documents.positions(tokens)[rows, places]
        self._past.go_on(places.to(self.device), positions.to(self.device))
        local = self._run(tokens[rows, places][:, None])
        return None if local is None else self._whole(local)[:, 0]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The same at every position, ``[b, s, vocab]``."""
        self._past.begin(0)
        local = self._run(tokens)
        return None if local is None else self._whole(local)

    def _whole(self, local: torch.Tensor) -> torch.Tensor:
        if self.grid.model_group is not None:
            local = local.contiguous()
            parts = [torch.empty_like(local) for _ in range(self.grid.tp)]
            dist.all_gather(parts, local, group=self.grid.model_group)
            local = torch.cat(parts, dim=-1)
        return local[..., : self.model.vocab].float()

    def share(self, value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """The last stage's ``value``, of the shape and type of ``like``, on every stage of the replica. Collective."""
        group = self.grid.pipe_group
        if group is None:
            assert value is not None
            return value
        shared = torch.empty_like(like, device=self.device) if value is None else value.to(self.device).contiguous()
        dist.broadcast(shared, dist.get_global_rank(group, self.grid.pp - 1), group=group)
        return shared

    @torch.no_grad()
    def _run(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor | None:
        """Local logits on the last stage; at one position of each row, if positions are given."""
        grid, group = self.grid, self.grid.pipe_group
        if self._documents is not None and self._past.next is None:
            self._documents.show(tokens.to(self.device))
        if grid.first_stage:
            x = tokens.to(self.device)
        else:
            x = torch.empty((*tokens.shape, self.model.hidden), dtype=self._dtype, device=self.device)
            dist.recv(x, _peer(group, grid.pipe - 1), group=group)
        layers = list(self._layers)
        cut = len(layers) - _HEAD_LAYERS if grid.last_stage else len(layers)
        for layer in layers[:cut]:
            x = layer(x)
        if not grid.last_stage:
            dist.send(x.contiguous(), _peer(group, grid.pipe + 1), group=group)
            return None
        if positions is not None:
            x = x[torch.arange(len(positions), device=self.device), positions.to(self.device)].unsqueeze(1)
        for layer in layers[cut:]:
            x = layer(x)
        return x


def _of(embedding: TokenEmbedding) -> tuple[nn.Parameter, TensorRegion]:
    return embedding.weight, embedding.region


def _peer(group: dist.ProcessGroup | None, stage: int) -> int:
    assert group is not None, "a pipeline has a group"
    return dist.get_global_rank(group, stage)
