"""Measured latency, in milliseconds: medians of interleaved rounds, drift cancelled through the teacher's ratio.

Every number here is the median at a stated batch size, thread count, dtype, device and runtime. FLOPs are never
taken for speed.
"""

from mixerzoo.latency.conditions import (
    DTYPES,
    Conditions,
    check_device,
    default_threads,
    environment,
    threads,
)
from mixerzoo.latency.in_place import (
    TABLE,
    InPlace,
    LatencyTable,
    by_shape,
    measure_in_place,
    measure_table,
    place_many,
)
from mixerzoo.latency.rounds import REFERENCE, Rounds, Timing, measure
from mixerzoo.latency.stopwatch import Stopwatch
from mixerzoo.runtimes import Run

__all__ = [
    "DTYPES",
    "REFERENCE",
    "TABLE",
    "Conditions",
    "InPlace",
    "LatencyTable",
    "Rounds",
    "Run",
    "Stopwatch",
    "Timing",
    "by_shape",
    "check_device",
    "default_threads",
    "environment",
    "measure",
    "measure_in_place",
    "measure_table",
    "place_many",
    "threads",
]
