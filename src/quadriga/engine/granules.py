"""The service `Context.granules`: measured once for a machine, a runtime and a precision, and kept in the user's cache."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.files import read_json, write_json
from quadriga.core.granules import LEASTS, defaults, found, least
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.engine.decisions import digest
from quadriga.engine.staircases import Times, staircases
from quadriga.measure.machine import facts, fingerprint
from quadriga.workloads.shipped import cache_folder

log = logging.getLogger(__name__)
VERSION = 1  # of the measurement: what an older one kept is measured again
GIVEN = "QUADRIGA_GRANULE"  # a number that stands in for every measurement
Measure = Callable[[Collection[str], RuntimeSpec], Mapping[str, Times]]


class Granules:
    """Knows the granules of this machine.

    What was measured is a file `granules/<hash>.json` under the user's cache folder. A folder that cannot be written costs no
    more than the measurement in each process. Two processes do not measure at once.

    Args:
        folder: of the files; None is the cache's.
        measure: (sides, spec) → staircases.
    """

    def __init__(self, folder: Path | None = None, measure: Measure = staircases) -> None:
        self.folder, self.measure = folder, measure
        self.known: dict[str, dict[str, int]] = {}  # of this process

    def __call__(self, sides: Collection[str], spec: RuntimeSpec) -> dict[str, int]:
        """The granule of each side in a runtime and precision. Where nothing can be measured: the defaults."""
        if given := os.environ.get(GIVEN):
            return dict.fromkeys(sides, _number(given))
        plain = precision(spec)
        state = runtime.probe().get(plain.name)
        if plain.device != "cpu" or state is None or not state.ok:
            return defaults(sides, spec)
        about = _about(plain, state.version)
        name = digest(about)
        mine = self.known.setdefault(name, {})
        if missing := [side for side in sides if side not in mine]:
            mine.update(self._kept(name, about, missing, plain))
        return {side: mine[side] for side in sides}

    def _kept(self, name: str, about: dict[str, Any], sides: list[str], spec: RuntimeSpec) -> dict[str, int]:
        path = (self.folder or cache_folder() / "granules") / f"{name}.json"
        with _alone(path.with_suffix(".lock")):
            rows = _read(path)
            kinds = dict.fromkeys(side.partition("_")[0] for side in sides if side not in rows)
            for kind in kinds:  # what is known is kept at once: this process may run out of its time
                rows.update(self._measured([s for s in sides if s not in rows and s.partition("_")[0] == kind], spec))
                with suppress(BadInput):  # the folder cannot be written
                    write_json(path, {**about, "sides": {side: row for side, row in rows.items() if "times" in row}})
        return {side: rows[side]["granule"] for side in sides}

    def _measured(self, sides: list[str], spec: RuntimeSpec) -> dict[str, dict[str, Any]]:
        try:
            times = self.measure(sides, spec)
        except Exception as error:  # a runtime raises its own types; a layer that it does not take has no steps to find
            if len(sides) > 1 and not isinstance(error, NotApplicable):
                return {side: row for one in sides for side, row in self._measured([one], spec).items()}
            log.info("granules of %s are not measured: %s", spec.name, error)
            return {side: {"granule": n} for side, n in defaults(sides, spec).items()}
        read = {side: least if side in LEASTS else found for side in times}
        return {s: {"granule": read[s](row), "times": {str(w): t for w, t in row.items()}} for s, row in times.items()}


def precision(spec: RuntimeSpec) -> RuntimeSpec:
    """What of a specification decides granules, on one thread; weights that are stored in fewer bits are float products.

    Steps of width come from kernels and not from threads, and on one thread they are measured with less noise. Layers that are
    compiled one by one take too long: TorchInductor calls the same libraries for them as eager PyTorch.

    Example:
        >>> precision(RuntimeSpec("inductor", threads=4, storage="entropy")) == RuntimeSpec(threads=1)
        True
    """
    quant = spec.quant
    plain = None if quant is None or quant.activations == "none" else QuantSpec(activations=quant.activations)
    name = "eager" if spec.name == "inductor" and plain is None else spec.name
    weights = spec.weights if spec.by_torch or (spec.name, spec.weights) == ("openvino", "bf16") else "fp32"
    own = RuntimeSpec(name, threads=1, quant=plain, weights=weights, device=spec.device)
    return replace(own, channels_last=spec.channels_last, matmul=spec.matmul) if own.by_torch else own


def _about(spec: RuntimeSpec, version: str) -> dict[str, Any]:
    machine = {name: facts()[name] for name in ("processor", "instructions")}
    asked = {k: v for k, v in asdict(spec).items() if v != asdict(RuntimeSpec())[k]}
    return {
        "measurement": VERSION,
        "machine": machine,
        "kind": fingerprint(),
        "version": version,
        "spec": {**asked, "name": spec.name},
    }


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Sides that were measured; of a file that is missing or damaged, none."""
    try:
        rows = read_json(path)["sides"]
        return {side: row for side, row in rows.items() if isinstance(row["granule"], int) and row["granule"] >= 1}
    except (BadInput, OSError, KeyError, TypeError, AttributeError):
        return {}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While one process is here, others on this machine wait; where no lock can be made, they do not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115 (it may be impossible, and what follows has to run all the same)
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"{GIVEN} is {text!r}", "give a number of channels, at least 1, or unset it")
    return int(text)
