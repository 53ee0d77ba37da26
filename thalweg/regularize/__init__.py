"""Regularization that knows of micro-batches, skipped steps and averages."""

from thalweg.regularize.averages import WindowAverage, swa_shares
from thalweg.regularize.batchnorm import PooledStatistics
from thalweg.regularize.changes import Change
from thalweg.regularize.check_batch import check_batch, watch_batch
from thalweg.regularize.convert import convert_dropout, not_converted
from thalweg.regularize.convert_batchnorm import convert_batchnorm, freeze_batchnorm
from thalweg.regularize.drop_connect import DropConnect, drop_connect
from thalweg.regularize.dropout import (
    AlphaDropout,
    DropBlock,
    Dropout,
    FeatureAlphaDropout,
    SpatialDropout,
    StochasticDepth,
)
from thalweg.regularize.ghost import GhostBatchNorm
from thalweg.regularize.insert import add_dropout, add_stochastic_depth
from thalweg.regularize.labels import checking, soft_targets
from thalweg.regularize.losses import accuracy, cross_entropy, distillation, r_drop
from thalweg.regularize.mixing import Mixing, soft_target_error
from thalweg.regularize.penalties import PENALTIES, penalised
from thalweg.regularize.policies import pipeline
from thalweg.regularize.precise import PreciseStatistics, reestimate
from thalweg.regularize.streams import Streams, connect, set_factors
from thalweg.regularize.synced import SyncedBatchNorm
from thalweg.regularize.tracking import FrozenBatchNorm
from thalweg.regularize.transforms import TRANSFORMS

__all__ = [
    "AlphaDropout",
    "DropBlock",
    "DropConnect",
    "Dropout",
    "FeatureAlphaDropout",
    "SpatialDropout",
    "StochasticDepth",
    "Streams",
    "accuracy",
    "add_dropout",
    "add_stochastic_depth",
    "connect",
    "convert_dropout",
    "drop_connect",
    "not_converted",
    "set_factors",
    "WindowAverage",
    "swa_shares",
    "Change",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "Mixing",
    "PENALTIES",
    "PooledStatistics",
    "PreciseStatistics",
    "SyncedBatchNorm",
    "TRANSFORMS",
    "check_batch",
    "checking",
    "convert_batchnorm",
    "cross_entropy",
    "distillation",
    "freeze_batchnorm",
    "penalised",
    "pipeline",
    "r_drop",
    "reestimate",
    "soft_target_error",
    "soft_targets",
    "watch_batch",
]
