"""Messages or text -> token ids and loss masks -> packs -> Batch."""

from xtuner.data.dataset import DataStats, Pack, PackedDataset, build_dataset
from xtuner.data.loader import Loader, collate
from xtuner.data.preview import preview
from xtuner.data.tokenize import load_tokenizer

__all__ = [
    "DataStats",
    "Loader",
    "Pack",
    "PackedDataset",
    "build_dataset",
    "collate",
    "load_tokenizer",
    "preview",
]
