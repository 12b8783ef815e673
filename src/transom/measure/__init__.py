"""Measuring: what a method costs (FLOPs, time, memory), what it keeps, and the report of both."""

from __future__ import annotations

from transom.measure.compare import compare
from transom.measure.comparison import Comparison
from transom.measure.cost import Timing, gflops, interleaved, peak_memory_mib
from transom.measure.data import ImageSet, load_images
from transom.measure.preprocessing import Preprocessing, classes_of, preprocessing_of
from transom.measure.report import Picture, Section
from transom.measure.row import Row

__all__ = [
    "Comparison",
    "ImageSet",
    "Picture",
    "Preprocessing",
    "Row",
    "Section",
    "Timing",
    "classes_of",
    "compare",
    "gflops",
    "interleaved",
    "load_images",
    "peak_memory_mib",
    "preprocessing_of",
]
