"""Which training data mattered for what, and when: influence as a function of training time.

The public names are loaded when they are first used, so that the command line starts without PyTorch. Datasets of
xarray have ``.sw.plot()`` from the beginning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stagewise import notebook as notebook

if TYPE_CHECKING:
    from stagewise import losses as losses
    from stagewise import sharded as sharded
    from stagewise.baselines.source import source as source
    from stagewise.baselines.tracin import tracin as tracin
    from stagewise.checkpoint import Checkpoint as Checkpoint
    from stagewise.checkpoint import Optimizer as Optimizer
    from stagewise.checkpoints.directory import write_checkpoint as write_checkpoint
    from stagewise.checkpoints.huggingface import RecorderCallback as RecorderCallback
    from stagewise.checkpoints.recorder import Recorder as Recorder
    from stagewise.checkpoints.snapshot import snapshot as snapshot
    from stagewise.checkpoints.trajectory import Trajectory as Trajectory
    from stagewise.checkpoints.when import linear as linear
    from stagewise.checkpoints.when import log_spaced as log_spaced
    from stagewise.dynamics.alignment import alignment as alignment
    from stagewise.dynamics.branches import separations as separations
    from stagewise.dynamics.branches import squared_distances as squared_distances
    from stagewise.dynamics.curves import curves as curves
    from stagewise.dynamics.events import Event as Event
    from stagewise.dynamics.events import events as events
    from stagewise.dynamics.kernel_map import influence_map as influence_map
    from stagewise.dynamics.spectrum import top_eigenvalue_share as top_eigenvalue_share
    from stagewise.dynamics.stages import Transition as Transition
    from stagewise.dynamics.stages import extrema as extrema
    from stagewise.dynamics.stages import rise as rise
    from stagewise.dynamics.stages import transition_table as transition_table
    from stagewise.foreign.read import read_scores as read_scores
    from stagewise.influence.bif import bif as bif
    from stagewise.influence.damped import damped_influence as damped_influence
    from stagewise.influence.gradients import gradient_product as gradient_product
    from stagewise.influence.llc import llc as llc
    from stagewise.influence.loss_kernel import loss_kernel as loss_kernel
    from stagewise.influence.phases import phase_decomposition as phase_decomposition
    from stagewise.influence.response import response_influence as response_influence
    from stagewise.influence.strongest import strongest as strongest
    from stagewise.influence.susceptibility import susceptibilities as susceptibilities
    from stagewise.influence.trusted import TracesInMemory as TracesInMemory
    from stagewise.retraining.ablation import window_ablation as window_ablation
    from stagewise.retraining.curriculum import curriculum as curriculum
    from stagewise.retraining.extremes import extremes_ablation as extremes_ablation
    from stagewise.retraining.halves import window_halves as window_halves
    from stagewise.retraining.lds import lds as lds
    from stagewise.retraining.lds import window_lds as window_lds
    from stagewise.retraining.leave_out import leave_out as leave_out
    from stagewise.retraining.leave_out import retrain as retrain
    from stagewise.retraining.replay import replay as replay
    from stagewise.retraining.schedule import BatchOrder as BatchOrder
    from stagewise.retraining.schedule import RecordedOrder as RecordedOrder
    from stagewise.retraining.schedule import Schedule as Schedule
    from stagewise.retraining.scores import agreement as agreement
    from stagewise.retraining.scores import measured_influence as measured_influence
    from stagewise.retraining.scores import predicted_effect as predicted_effect
    from stagewise.retraining.two_times import influence_in_time as influence_in_time
    from stagewise.retraining.unrolling import unroll as unroll
    from stagewise.retraining.unrolling import unrolled_influence as unrolled_influence
    from stagewise.retraining.window_influence import window_influence as window_influence
    from stagewise.run.engine import sample as sample
    from stagewise.run.executors.local import Local as Local
    from stagewise.run.executors.on_ray import Ray as Ray
    from stagewise.run.executors.on_slurm import Slurm as Slurm
    from stagewise.run.imported import import_scores as import_scores
    from stagewise.run.jsonl import read_jsonl as read_jsonl
    from stagewise.run.jsonl import write_jsonl as write_jsonl
    from stagewise.run.pipeline import report as report
    from stagewise.sampling.chains import Chains as Chains
    from stagewise.sampling.estimated import estimated_second_moment as estimated_second_moment
    from stagewise.sampling.posterior import LocalPosterior as LocalPosterior
    from stagewise.task import Task as Task
    from stagewise.text import token_kinds as token_kinds
    from stagewise.text import token_labels as token_labels
    from stagewise.traces.diagnostics import diagnose_run as diagnose_run
    from stagewise.traces.store import TraceStore as TraceStore

_ROOMS = {
    "stagewise.baselines.source": ("source",),
    "stagewise.baselines.tracin": ("tracin",),
    "stagewise.checkpoints.directory": ("write_checkpoint",),
    "stagewise.checkpoints.huggingface": ("RecorderCallback",),
    "stagewise.checkpoints.recorder": ("Recorder",),
    "stagewise.checkpoints.snapshot": ("snapshot",),
    "stagewise.checkpoint": ("Checkpoint", "Optimizer"),
    "stagewise.checkpoints.trajectory": ("Trajectory",),
    "stagewise.checkpoints.when": ("linear", "log_spaced"),
    "stagewise.dynamics.alignment": ("alignment",),
    "stagewise.dynamics.branches": ("separations", "squared_distances"),
    "stagewise.dynamics.curves": ("curves",),
    "stagewise.dynamics.events": ("Event", "events"),
    "stagewise.dynamics.kernel_map": ("influence_map",),
    "stagewise.dynamics.spectrum": ("top_eigenvalue_share",),
    "stagewise.dynamics.stages": ("Transition", "extrema", "rise", "transition_table"),
    "stagewise.foreign.read": ("read_scores",),
    "stagewise.influence.bif": ("bif",),
    "stagewise.influence.damped": ("damped_influence",),
    "stagewise.influence.gradients": ("gradient_product",),
    "stagewise.influence.llc": ("llc",),
    "stagewise.influence.loss_kernel": ("loss_kernel",),
    "stagewise.influence.phases": ("phase_decomposition",),
    "stagewise.influence.response": ("response_influence",),
    "stagewise.influence.strongest": ("strongest",),
    "stagewise.influence.susceptibility": ("susceptibilities",),
    "stagewise.influence.trusted": ("TracesInMemory",),
    "stagewise.retraining.ablation": ("window_ablation",),
    "stagewise.retraining.curriculum": ("curriculum",),
    "stagewise.retraining.extremes": ("extremes_ablation",),
    "stagewise.retraining.halves": ("window_halves",),
    "stagewise.retraining.lds": ("lds", "window_lds"),
    "stagewise.retraining.leave_out": ("leave_out", "retrain"),
    "stagewise.retraining.replay": ("replay",),
    "stagewise.retraining.schedule": ("BatchOrder", "RecordedOrder", "Schedule"),
    "stagewise.retraining.scores": ("agreement", "measured_influence", "predicted_effect"),
    "stagewise.retraining.two_times": ("influence_in_time",),
    "stagewise.retraining.unrolling": ("unroll", "unrolled_influence"),
    "stagewise.retraining.window_influence": ("window_influence",),
    "stagewise.run.engine": ("sample",),
    "stagewise.run.executors.local": ("Local",),
    "stagewise.run.executors.on_ray": ("Ray",),
    "stagewise.run.executors.on_slurm": ("Slurm",),
    "stagewise.run.imported": ("import_scores",),
    "stagewise.run.jsonl": ("read_jsonl", "write_jsonl"),
    "stagewise.run.pipeline": ("report",),
    "stagewise.sampling.chains": ("Chains",),
    "stagewise.sampling.estimated": ("estimated_second_moment",),
    "stagewise.sampling.posterior": ("LocalPosterior",),
    "stagewise.task": ("Task",),
    "stagewise.text": ("token_kinds", "token_labels"),
    "stagewise.traces.diagnostics": ("diagnose_run",),
    "stagewise.traces.store": ("TraceStore",),
}
_MODULES = ("losses", "sharded")
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"stagewise.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'stagewise' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
