"""The first samples of the data, compared with what a checkpoint remembers of its training."""

from __future__ import annotations

from ckpt_tools.contract import InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.data.stream import BatchStream
from ckpt_tools.diagnosis.data_check import DataVerdict, check_data
from ckpt_tools.identify.key_matching import has_counters
from ckpt_tools.results import Walk

_BATCH_SIZE = 64


def open_first_samples(source: Source, spec: InputSpec | None) -> BatchStream:
    """Open a stream for ``check_first_samples``, which reads the first batches only."""
    return source.batches(spec, Reading(_BATCH_SIZE, workers=0, cached=True))


def check_first_samples(
    loaded: LoadedModel, batches: BatchStream, walk: Walk, source: Source, spec: InputSpec | None
) -> DataVerdict:
    """Check whether this is the training data. Raises DataError, ModelError."""
    assert loaded.checkpoint is not None
    return check_data(
        loaded.model,
        batches,
        walk,
        spec,
        preprocessed=source.is_preprocessed,
        rates_known=loaded.rates != "unknown",
        counted=has_counters(loaded.checkpoint),
        usual_size=loaded.input_spec.shape if loaded.input_spec else None,
    )
