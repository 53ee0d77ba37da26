"""Data: order as a pure function, sources in memory or not, windows of micro-batches."""

from thalweg.data.changed import ChangedFeed, SharedFeed, image_size, resized, sequence_length, shortened
from thalweg.data.feeds import Augment, held_out, make_feed
from thalweg.data.order import Order, permute, uniforms
from thalweg.data.ragged import Ragged, lengths_of
from thalweg.data.share import WHOLE, Share, micro_batches
from thalweg.data.sources import Items, Source, Stream, Tensors, TokenWindows, as_source, told_of_loader
from thalweg.data.trees import batch_size, split, tensors, to_device, tree_map

__all__ = [
    "Augment",
    "ChangedFeed",
    "Items",
    "Order",
    "Ragged",
    "Share",
    "SharedFeed",
    "Source",
    "Stream",
    "Tensors",
    "TokenWindows",
    "WHOLE",
    "as_source",
    "batch_size",
    "held_out",
    "lengths_of",
    "make_feed",
    "micro_batches",
    "permute",
    "image_size",
    "resized",
    "sequence_length",
    "shortened",
    "split",
    "tensors",
    "to_device",
    "told_of_loader",
    "tree_map",
    "uniforms",
]
