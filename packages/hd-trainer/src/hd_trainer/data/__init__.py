"""Data sets: images in [-1, 1] with integer labels, and the order in which training sees them."""

from hd_trainer.data.dataset import ImageData, batch_at, load_data
from hd_trainer.data.digits import load_digits

__all__ = ["ImageData", "batch_at", "load_data", "load_digits"]
