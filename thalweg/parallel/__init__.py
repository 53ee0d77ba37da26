"""Ranks: several processes that train one model. Data-parallel: each computes its share of the micro-batches of every step."""

from thalweg.parallel.elastic import Agent, Left, here, left_to
from thalweg.parallel.feeds import Feeds
from thalweg.parallel.joined import TIMEOUT, Joined, join
from thalweg.parallel.launch import launch
from thalweg.parallel.mesh import Grid, ranks_on_each
from thalweg.parallel.ranks import ALONE, Alone, Ranks, Talk, check_equal, on_first

__all__ = [
    "ALONE",
    "Agent",
    "Alone",
    "Feeds",
    "Grid",
    "Joined",
    "Left",
    "Ranks",
    "TIMEOUT",
    "Talk",
    "check_equal",
    "here",
    "left_to",
    "on_first",
    "join",
    "launch",
    "ranks_on_each",
]
