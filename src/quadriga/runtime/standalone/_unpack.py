"""Decode a packed file: model files whose weights were cut out and entropy-coded. It is copied beside `load.py`.

The file is MAGIC, the length of the head and the head, compressed; the words of one stream; and stored bytes. The head
holds the entry of runtime.json, what is left of the model files ("skeletons"), and the tables of the columns. A column is
a sequence of symbols with one table of values; a unit is one column of whole numbers, or one for each of their bytes.
"""

from __future__ import annotations

import json
import lzma
import zlib
from typing import Any

import numpy as np

MAGIC = b"QDZ1"
LOWEST = 1 << 16  # of a coder's state, which takes and gives words of 16 bits
CHUNK = 4096  # symbols of a lane, at most
FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]
LEAST, TIMES = 1 << 26, 256  # bytes that any file may hold, and how many times its own
Head = tuple[dict[str, Any], bytes, int]


def inflate(data: bytes, most: int) -> bytes:
    """Undo the smallest of three ways to store bytes; the first byte says which.

    Raises:
        ValueError: there would be more than `most` bytes, or the data break off.
    """
    if data[:1] == b"L":
        lzma_ = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
        found = lzma_.decompress(data[1:], most + 1)
        whole = lzma_.eof
    elif data[:1] == b"Z":
        zlib_ = zlib.decompressobj(-15)
        found = zlib_.decompress(data[1:], most + 1)
        whole = zlib_.eof
    else:
        found, whole = data[1:], True
    if len(found) > most:
        raise ValueError(f"it would take more than {most:,} bytes")
    if not whole:
        raise ValueError("its compressed data break off")
    return found


def bound(data: bytes) -> int:
    """Bytes that a packed file may hold: many times its own, for weights that are nearly all zero, and never without limit."""
    return LEAST + TIMES * len(data)


def read_head(data: bytes) -> Head:
    """The head's JSON, its bytes behind the JSON, and where in the file it ends.

    Raises:
        ValueError: this is no packed file.
    """
    if data[:4] != MAGIC:
        raise ValueError("it does not begin as a packed file")
    end = 8 + int.from_bytes(data[4:8], "little")
    text, _, rest = inflate(data[8:end], bound(data)).partition(b"\n")
    return json.loads(text), rest, end


def unpack(data: bytes, number: int) -> bytes:
    """One of the packed model files, exactly as it was.

    Args:
        data: the packed file.
        number: of the model file, from 0.

    Raises:
        ValueError, lzma.LZMAError, zlib.error: the file is damaged.
    """
    head, rest, end = read_head(data)
    content = _joined(data, head, rest, end, number)
    if zlib.crc32(content) != head["crc"][number]:
        raise ValueError("what it holds is not what was packed")
    return content


def _joined(data: bytes, head: dict[str, Any], rest: bytes, end: int, number: int) -> bytes:
    sizes = [file[0] for file in head["files"]]
    start = sum(sizes[:number])
    skeleton, cuts = rest[start : start + sizes[number]], head["files"][number][1:]
    if not cuts:
        return skeleton
    pools = units(head, rest[sum(sizes) :], data[end:], bound(data))
    cursors = [0] * len(pools)
    for earlier in head["files"][:number]:
        for unit, size in zip(earlier[2::3], earlier[3::3], strict=True):
            cursors[unit] += size
    parts, place = [], 0
    for gap, unit, size in zip(cuts[::3], cuts[1::3], cuts[2::3], strict=True):
        parts += [skeleton[place : place + gap], pools[unit][cursors[unit] : cursors[unit] + size]]
        place, cursors[unit] = place + gap, cursors[unit] + size
    return b"".join([*parts, skeleton[place:]])


def _check(head: dict[str, Any], most: int) -> None:
    """See that what the head announces can be, before memory is taken for it."""
    numbers = [number for unit in head["units"] for number in unit] + [head["words"], head["bits"]]
    if not all(type(number) is int and number >= 0 for number in numbers) or head["bits"] > 16:
        raise ValueError("its head holds impossible numbers")
    if any(width not in (1, 2, 4, 8) or max(kinds, default=0) > 1 << 16 for width, _, *kinds in head["units"]):
        raise ValueError("its head holds impossible widths")
    if sum(width * count for width, count, *_ in head["units"]) > most:
        raise ValueError(f"it would take more than {most:,} bytes")


def units(head: dict[str, Any], tables: bytes, body: bytes, most: int) -> list[bytes]:
    """The bytes of every unit: its columns side by side, `most` bytes in all at most."""
    _check(head, most)
    columns, values, counts = [], [], []  # a column: (width of a value, symbols, number of values; 0 where it is stored)
    for width, count, *kinds in head["units"]:
        columns += [(width if len(kinds) == 1 else 1, count, kind) for kind in kinds]
    place = 0
    for width, _, kind in columns:
        values.append(np.frombuffer(tables, np.uint8, kind * width, place).reshape(width, kind).T)
        place += kind * width
    for _, _, kind in columns:
        low, high = np.frombuffer(tables, np.uint8, 2 * kind, place).reshape(2, kind).astype(np.uint32)
        counts.append(low + 256 * high + 1)
        place += 2 * kind
    words = np.frombuffer(body, "<u2", head["words"])
    coded = [(count, number) for (_, count, kind), number in zip(columns, counts, strict=True) if kind > 1]
    symbols = iter(decode(words, coded, head["bits"]))
    stored, place, made = inflate(body[2 * head["words"] :], most), 0, []
    for (width, count, kind), table in zip(columns, values, strict=True):
        if kind:
            one = np.ascontiguousarray(table).view(f"<u{width}").ravel()
            made.append((one[next(symbols)] if kind > 1 else np.repeat(one, count)).view(np.uint8).reshape(count, width))
        else:
            made.append(np.frombuffer(stored, np.uint8, count * width, place).reshape(count, width))
            place += count * width
    joined = iter(made)
    return [np.concatenate([next(joined) for _ in kinds], 1).tobytes() for _, _, *kinds in head["units"]]


def lanes(counts: list[int]) -> tuple[Any, Any]:
    """Columns cut into lanes of almost equal length, at most CHUNK: (symbols, column) of each lane, the longest first."""
    sizes, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for column, count in enumerate(counts):
        number = -(-count // CHUNK)
        sizes.append(np.full(number, count // number) + (np.arange(number) < count % number))
        owners.append(np.full(number, column))
    size, owner = np.concatenate(sizes), np.concatenate(owners)
    order = np.argsort(-size, kind="stable")
    return size[order], owner[order]


def decode(words: Any, columns: list[tuple[int, Any]], bits: int) -> list[Any]:
    """Decode interleaved range asymmetric numeral systems (Duda 2013, arXiv:1311.2540), all lanes in step.

    Args:
        words: uint16; the lanes' states first (low word, high word), then what they read, in order of time and lane.
        columns: of each column the number of symbols, and the frequencies of its values, which sum to 2**bits.
        bits: of the frequencies.

    Returns:
        of each column its symbols, as places in its table.

    Raises:
        ValueError: the stream does not end as it began.
    """
    size, owner = lanes([count for count, _ in columns])
    total, steps = 1 << bits, int(size.max(initial=0))
    symbol = np.concatenate([np.repeat(np.arange(len(f), dtype=np.uint16), f) for _, f in columns] or [np.zeros(0)])
    if len(symbol) != total * len(columns) or len(words) < 2 * len(size):
        raise ValueError("its tables do not fit")
    share = np.concatenate([np.repeat(f, f) for _, f in columns] or [np.zeros(0)]).astype(np.uint32)
    below = np.concatenate([np.arange(total) - np.repeat(np.cumsum(f) - f, f) for _, f in columns] or [np.zeros(0)])
    below, base = below.astype(np.uint32), owner * total
    state = words[: 2 * len(size) : 2].astype(np.uint32) + (words[1 : 2 * len(size) : 2].astype(np.uint32) << 16)
    found, place = np.zeros((steps, len(size)), np.uint16), 2 * len(size)
    active = np.searchsorted(-size, -np.arange(steps), side="left")  # lanes with more symbols than the step's number
    for step, n in enumerate(active.tolist()):
        x = state[:n]
        slot = base[:n] + (x & (total - 1))
        found[step, :n] = symbol[slot]
        x = share[slot] * (x >> bits) + below[slot]
        short = np.flatnonzero(x < LOWEST)
        x[short] = (x[short] << 16) | words[place : place + len(short)]
        place += len(short)
        state[:n] = x
    if place != len(words) or (state != LOWEST).any():
        raise ValueError("its stream is damaged")
    joined: list[list[Any]] = [[] for _ in columns]
    for row, length, column in zip(np.ascontiguousarray(found.T), size.tolist(), owner.tolist(), strict=True):
        joined[column].append(row[:length])
    return [np.concatenate(parts) for parts in joined]
