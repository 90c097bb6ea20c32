"""Run in NNCF's own environment: quantize an ONNX file with `nncf.quantize` and save it as OpenVINO's.

python hardware_nncf.py MODEL.onnx CALIBRATION.npz RESULT.xml transformer|plain
"""

import sys

sys.modules["openvino_telemetry"] = None  # it would send an event when it is imported

import nncf  # noqa: E402
import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402


def main(source: str, calibration: str, result: str, kind: str) -> None:
    """All of it."""
    kept, batches = np.load(calibration), {}
    for name in sorted(kept.files):
        batches.setdefault(name.partition("-")[0], []).append(kept[name])
    dataset = nncf.Dataset(list(batches.values()))
    model_type = nncf.ModelType.TRANSFORMER if kind == "transformer" else None
    ov.save_model(nncf.quantize(ov.Core().read_model(source), dataset, model_type=model_type), result, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
