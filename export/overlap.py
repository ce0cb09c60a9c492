"""Which texts of a comparison also shaped an engine's ranges: texts that ranges are chosen on verify nothing.

A bundle keeps a digest of every calibration text in the form in which two texts count as the same, so that the texts
themselves need not travel with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from calibration.texts import Text, calibration_texts, texts_sha256
from export.calibrated import read_calibration, text_digest
from runtime.bundle import Bundle, EngineRecord


def calibration_overlap(bundle: Bundle, record: EngineRecord, texts: Sequence[Text]) -> int | None:
    """Return how many of `texts` the engine was calibrated on; None when the bundle does not say on what it was.

    0 for an engine without calibration. Raises BundleError for a damaged calibration file.
    """
    if record.calibration_sha256 is None:
        return 0
    known = _digests(bundle, record)
    return None if known is None else sum(text_digest(text) in known for text in texts)


def _digests(bundle: Bundle, record: EngineRecord) -> frozenset[str] | None:
    found = read_calibration(bundle, bundle.graph(record.precision))
    if found is not None:
        return frozenset(found.digests)
    shipped = calibration_texts()
    if record.calibration_sha256 == texts_sha256(shipped):
        return frozenset(map(text_digest, shipped))
    return None
