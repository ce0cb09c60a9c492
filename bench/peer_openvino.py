"""A peer as its users run it: optimum-intel's OVModelForFeatureExtraction on OpenVINO, answering `bench.peers`.

Runs in the environment that `make bench-peers` creates, and imports nothing of this project:
peer_openvino.py CHECKPOINT KIND THREADS. KIND is `int8` (8-bit weights, as `load_in_8bit` makes them; the CPU plugin
chooses the type it computes in) or `bf16`. Vectors are the last token's final hidden state, normalized.

One JSON object a line. It says {"ready": {...}} when the model is loaded. Then it is told {"batch": {"input_ids": ...,
"attention_mask": ...}}, and answers {"rows": n}; {"run": true}, and answers {"ms": time of one run}; {"vectors": true},
and answers {"vectors": base64 of float32, "dim": n}. It ends when its input does.
"""

import base64
import importlib
import importlib.metadata
import json
import os
import sys
import time
from typing import Any


def main(checkpoint: str, kind: str, threads: int) -> None:
    """Load the model, then answer line by line."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    import numpy as np

    intel = importlib.import_module("optimum.intel")  # not to be had in f2rt's own environment
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    if kind == "bf16":
        options["INFERENCE_PRECISION_HINT"] = "bf16"
    model = intel.OVModelForFeatureExtraction.from_pretrained(
        checkpoint, export=True, load_in_8bit=kind == "int8", ov_config=options
    )
    computes_in = str(model.request.get_property("INFERENCE_PRECISION_HINT").type_name)
    versions = {name: importlib.metadata.version(name) for name in ("openvino", "optimum-intel")}
    answer({"ready": {"versions": versions, "computes_in": computes_in}})

    batch: dict[str, Any] = {}

    def run() -> Any:
        states = model(**batch).last_hidden_state
        pooled = states[np.arange(len(states)), batch["attention_mask"].sum(axis=1) - 1].astype(np.float32)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    for line in sys.stdin:
        told = json.loads(line)
        if "batch" in told:
            batch = {name: np.array(values, np.int64) for name, values in told["batch"].items()}
            answer({"rows": len(batch["input_ids"])})
        elif "run" in told:
            start = time.perf_counter()
            run()
            answer({"ms": 1e3 * (time.perf_counter() - start)})
        else:
            vectors = run().astype("<f4")
            answer({"vectors": base64.b64encode(vectors.tobytes()).decode(), "dim": vectors.shape[1]})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
