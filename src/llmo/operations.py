"""The built-in operations, described for the control plane; their code is imported only inside workers."""

from __future__ import annotations

from llmo.plugins import Operation
from llmo.types import Kind, Needs

_GIB = 1 << 30

PIPELINE = Operation("pipeline", "llmo.pipeline:run", cached=False, needs=Needs(cores=0, cores_max=0, memory=_GIB // 8))
CHECK = Operation("check", "llmo.preflight:run", needs=Needs(cores=0, cores_max=0, memory=_GIB // 2))
IMPORT = Operation("import", "llmo.data.operation:run", produces=Kind.DATASET, needs=Needs(memory=_GIB))
BASE_MODEL = Operation("base-model", "llmo.training.base:run", produces=Kind.MODEL, needs=Needs(memory=_GIB))
SCRATCH_MODEL = Operation(
    "scratch-model", "llmo.training.scratch:run", produces=Kind.MODEL, needs=Needs(memory=2 * _GIB)
)
PLAIN = Operation("plain", "llmo.training.plain:run", produces=Kind.MODEL, needs=Needs(memory=2 * _GIB))
ADAPTER = Operation("adapter", "llmo.training.adapter:run", produces=Kind.MODEL, needs=Needs(memory=_GIB))
TRAIN = Operation("train", "llmo.training.operation:run", produces=Kind.MODEL, needs=Needs(memory=3 * _GIB), revision=4)
PART = Operation("part", "llmo.training.part:run", produces=Kind.MODEL, needs=Needs(memory=2 * _GIB))
EXPLAIN = Operation(
    "explain", "llmo.training.explain:run", produces=Kind.REPORT, cached=False, needs=Needs(memory=3 * _GIB)
)
TRIAL = Operation("trial", "llmo.training.trial:run", needs=Needs(memory=3 * _GIB))
TUNE = Operation(
    "tune",
    "llmo.tuning.operation:run",
    produces=Kind.REPORT,
    needs=Needs(cores=0, cores_max=0, memory=_GIB // 2),
)
EVALUATE = Operation(
    "evaluate", "llmo.training.evaluate:run", produces=Kind.REPORT, needs=Needs(memory=2 * _GIB), revision=3
)
COMPRESS = Operation(
    "compress",
    "llmo.compression.operation:run",
    produces=Kind.MODEL,
    needs=Needs(memory=3 * _GIB),
    revision=6,
    measured=True,
)
EXPORT = Operation("export", "llmo.compression.edge.operation:run", cached=False, needs=Needs(memory=2 * _GIB))
VERIFY = Operation(
    "verify", "llmo.verify.operation:run", produces=Kind.REPORT, needs=Needs(memory=2 * _GIB), makes_room=True
)
SERVE = Operation("serve", "llmo.serve.replica:run", service=True, needs=Needs(memory=_GIB))
