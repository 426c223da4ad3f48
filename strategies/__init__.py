"""What runs where: specs, the plan, its rules, its topology, its sizes and its DeepSpeed config. Pure arithmetic.

Estimates and the search are in :mod:`strategies.estimate` and :mod:`strategies.search`: most users need neither.
"""

from strategies.codec import from_json, to_json
from strategies.deepspeed_config import deepspeed_config, learning_rate
from strategies.errors import PhalanxError, PlanInfeasible, Violation
from strategies.hardware import Hardware
from strategies.memory import model_state_bytes, rank_parameters, stage_parameters
from strategies.plan import ParallelPlan, accumulation, split_layers
from strategies.resolve import largest_plan, resolve_plan
from strategies.rules import RULES, check, require
from strategies.schedule import BatchChange, SampleSchedule, Skip
from strategies.specs import BatchSpec, ClusterSpec, LatentAttention, ModelSpec, MoeSpec
from strategies.topology import Coordinates, NodeRanks, Placement, Topology, draw, nodes_needed, place
from strategies.workload import Workload

__all__ = [
    "RULES",
    "BatchChange",
    "BatchSpec",
    "ClusterSpec",
    "Coordinates",
    "Hardware",
    "LatentAttention",
    "ModelSpec",
    "MoeSpec",
    "NodeRanks",
    "ParallelPlan",
    "PhalanxError",
    "Placement",
    "PlanInfeasible",
    "SampleSchedule",
    "Skip",
    "Topology",
    "Violation",
    "Workload",
    "accumulation",
    "check",
    "deepspeed_config",
    "draw",
    "from_json",
    "largest_plan",
    "learning_rate",
    "model_state_bytes",
    "nodes_needed",
    "place",
    "rank_parameters",
    "require",
    "resolve_plan",
    "split_layers",
    "stage_parameters",
    "to_json",
]
