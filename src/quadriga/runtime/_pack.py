"""Pack model files into one: weights are cut out and entropy-coded, the rest is compressed. `_unpack.py` is the inverse."""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quadriga.runtime._cuts import Cut, cuts_of
from quadriga.runtime.standalone._unpack import FILTERS, LOWEST, MAGIC, inflate, lanes, unpack

Array = np.ndarray[Any, Any]
DISTINCT = 4096  # values of a table, at most
SMALL = 1024  # bytes of a tensor that shares its tables with others of its width
SLOW = 1 << 22  # bytes from which on lzma is asked about a sample only


@dataclass(frozen=True)
class Column:
    """Symbols with one table, or stored bytes.

    Args:
        raw: [symbols, width] uint8.
        values: [k, width] uint8, in ascending order; k = 0 where the column is stored.
        symbols: places in `values`, or None.
    """

    raw: Array
    values: Array
    symbols: Array | None = None


def pack(files: Mapping[str, bytes], entry: Mapping[str, Any]) -> bytes:
    """One file that holds model files and the entry of runtime.json.

    Every tensor takes the smallest of three forms: one table of its values, a table for each of its bytes, or stored
    bytes under lzma. The inverse is run here, so what is written can be read.

    Args:
        files: name → content, in the order in which `load.py` numbers them.
        entry: plain data.
    """
    found = [cuts_of(name, data) for name, data in files.items()]
    groups = grouped([cut for cuts in found for cut in cuts])
    homes = {cut: number for number, group in enumerate(groups) for cut in group}
    columns = [
        columns_of(np.frombuffer(b"".join(c.data for c in group), np.uint8).reshape(-1, group[0].width)) for group in groups
    ]
    flat = [column for unit in columns for column in unit]
    coded = [c for c in flat if len(c.values) > 1]
    bits = 12 if all(len(c.values) <= 256 for c in coded) else 14
    counts = [frequencies(np.bincount(c.symbols, minlength=len(c.values)), bits) for c in coded if c.symbols is not None]
    words = encode([c.symbols for c in coded if c.symbols is not None], counts, bits)
    units = [
        [g[0].width, sum(len(c.data) for c in g) // g[0].width, *(len(c.values) for c in u)]
        for g, u in zip(groups, columns, strict=True)
    ]
    rows, skeletons = zip(
        *(_skeleton(data, cuts, homes) for data, cuts in zip(files.values(), found, strict=True)), strict=True
    )
    head = {"entry": dict(entry), "files": rows, "units": units, "words": len(words), "bits": bits}
    head["crc"] = [zlib.crc32(content) for content in files.values()]
    packed = [json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode(), b"\n", *skeletons, *_tables(flat, counts)]
    small = deflate(b"".join(packed))
    stored = b"".join(c.raw.tobytes() for c in flat if not len(c.values))
    data = b"".join([MAGIC, len(small).to_bytes(4, "little"), small, words.astype("<u2").tobytes(), deflate(stored)])
    for number, content in enumerate(files.values()):
        assert unpack(data, number) == content, "what was packed does not come back"
    return data


def _skeleton(data: bytes, cuts: Sequence[Cut], homes: Mapping[Cut, int]) -> tuple[list[int], bytes]:
    """What is left of a file, and its row in the head: the length, then (bytes before, unit, bytes) of each cut."""
    parts, row, place = [], [], 0
    for cut in cuts:
        parts.append(data[place : cut.start])
        row += [cut.start - place, homes[cut], len(cut.data)]
        place = cut.start + len(cut.data)
    left = b"".join([*parts, data[place:]])
    return [len(left), *row], left


def _tables(columns: Sequence[Column], counts: Sequence[Array]) -> list[bytes]:
    """Values of all columns, byte by byte, then the frequencies less one."""
    iterator = iter(counts)
    rates = [next(iterator) if len(c.values) > 1 else np.ones(len(c.values), np.int64) for c in columns]
    pairs = [np.stack([(f - 1) % 256, (f - 1) // 256]).astype(np.uint8).tobytes() for f in rates]
    return [*(np.ascontiguousarray(c.values.T).tobytes() for c in columns), *pairs]


def grouped(cuts: Sequence[Cut]) -> list[list[Cut]]:
    """Units: small tensors of one width share their tables, others have their own."""
    groups: dict[Any, list[Cut]] = {}
    for number, cut in enumerate(cuts):
        alone = len(cut.data) > SMALL or len(set(_numbers(cut.data, cut.width))) * 4 < len(cut.data) // cut.width
        groups.setdefault(number if alone else ("small", cut.width), []).append(cut)
    return list(groups.values())


def _numbers(data: bytes, width: int) -> list[int]:
    return np.frombuffer(data, f"<u{width}").tolist()


def columns_of(raw: Array) -> list[Column]:
    """The smallest form of a tensor's bytes.

    Args:
        raw: [elements, width] uint8.
    """
    stored = [Column(raw, raw[:0])]
    forms = [(stored_size(raw), stored)]
    whole = tabled(raw)
    if whole is not None:
        forms.append((coded_size(whole), [whole]))
    if raw.shape[1] > 1:
        planes = [plane(np.ascontiguousarray(raw[:, k : k + 1])) for k in range(raw.shape[1])]
        forms.append((sum(size for size, _ in planes), [column for _, column in planes]))
    return min(forms, key=lambda form: form[0])[1]


def plane(raw: Array) -> tuple[float, Column]:
    """The smaller form of one byte of every element, and its bytes."""
    table, stored = tabled(raw), Column(raw, raw[:0])
    assert table is not None, "a byte has 256 values"
    return min((coded_size(table), table), (stored_size(raw), stored), key=lambda form: form[0])


def tabled(raw: Array) -> Column | None:
    """With a table of its values, or None where it has too many."""
    numbers = raw.view(f"<u{raw.shape[1]}").ravel()
    if len(np.unique(numbers[: 8 * DISTINCT])) > DISTINCT:
        return None
    values, symbols = np.unique(numbers, return_inverse=True)
    if len(values) > DISTINCT:
        return None
    return Column(raw, values.view(np.uint8).reshape(-1, raw.shape[1]), symbols.astype(np.uint16))


def coded_size(column: Column) -> float:
    """Bytes of a coded column: its entropy, its table, and the states of its lanes."""
    assert column.symbols is not None
    count = np.bincount(column.symbols, minlength=len(column.values))
    entropy = float(-(count * np.log2(count / count.sum())).sum() / 8) if len(count) > 1 else -4.0
    return entropy + column.values.size + 1.5 * len(count) + 4 * len(lanes([len(column.symbols)])[0])


def stored_size(raw: Array) -> float:
    """Bytes that stored bytes will take, going by a sample where they are many."""
    sample = raw.reshape(-1)[:SLOW].tobytes()
    return len(deflate(sample)) * raw.size / max(1, len(sample))


def deflate(data: bytes) -> bytes:
    """The smallest of lzma, zlib and the bytes themselves, behind a byte that says which. `inflate` is the inverse."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    forms = [b"-" + data, b"Z" + packer.compress(data) + packer.flush()]
    if len(forms[1]) < 0.98 * len(data) or len(data) < SLOW:
        forms.append(b"L" + lzma.compress(data, lzma.FORMAT_RAW, filters=FILTERS))
    return min(forms, key=len)


def frequencies(counts: Array, bits: int) -> Array:
    """Whole frequencies ≥ 1 that sum to 2**bits, near the counts: rounding is settled where it costs least.

    Args:
        counts: of the values, each ≥ 1, at most 2**bits of them.

    Example:
        >>> frequencies(np.array([1, 999, 3000]), 4).tolist()
        [1, 3, 12]
    """
    total = 1 << bits
    share = counts / counts.sum() * total
    found = np.maximum(1, np.floor(share)).astype(np.int64)
    while (rest := total - int(found.sum())) != 0:
        step = 1 if rest > 0 else -1
        able = np.ones(len(found), bool) if step > 0 else found > 1
        gain = counts * np.log2(np.maximum(found + step, 0.5) / found)  # bits saved, or lost, by one more or one less
        best = np.argsort(np.where(able, -gain, np.inf), kind="stable")[: max(1, min(abs(rest), int(able.sum())) // 4)]
        found[best] += step
    return found


def encode(columns: Sequence[Array], counts: Sequence[Array], bits: int) -> Array:
    """The words that `_unpack.decode` reads.

    Args:
        columns: symbols of each column.
        counts: frequencies of each column's values, which sum to 2**bits.
    """
    size, owner = lanes([len(c) for c in columns])
    total, steps = 1 << bits, int(size.max(initial=0))
    told = np.zeros((len(size), steps), np.uint16)
    places = [0] * len(columns)
    for lane, (length, column) in enumerate(zip(size.tolist(), owner.tolist(), strict=True)):
        told[lane, :length] = columns[column][places[column] : places[column] + length]
        places[column] += length
    offsets = np.cumsum([0, *(len(c) for c in counts)])[:-1][owner] if len(size) else owner
    share = np.concatenate([*counts, np.zeros(0, np.int64)]).astype(np.uint64)
    below = np.concatenate([*(np.cumsum(c) - c for c in counts), np.zeros(0, np.int64)]).astype(np.uint64)
    state, blocks = np.full(len(size), LOWEST, np.uint64), []
    active = np.searchsorted(-size, -np.arange(steps), side="left")
    told = np.ascontiguousarray(told.T)
    for step in range(steps - 1, -1, -1):
        n = int(active[step])
        x, slot = state[:n], offsets[:n] + told[step, :n]
        f = share[slot]
        full = np.flatnonzero(x >= f << np.uint64(32 - bits))
        blocks.append((x[full] & np.uint64(0xFFFF)).astype(np.uint16))
        x[full] >>= np.uint64(16)
        state[:n] = (x // f) * np.uint64(total) + x % f + below[slot]
    ends = np.stack([state & np.uint64(0xFFFF), state >> np.uint64(16)], 1).astype(np.uint16).ravel()
    return np.concatenate([ends, *blocks[::-1]])


__all__ = ["deflate", "encode", "frequencies", "inflate", "pack"]
