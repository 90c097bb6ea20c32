"""How the files beside this one were made, once: `python make.py FASHION_MNIST WORDNET SHAKESPEARE`.

The arguments are the folders of the unpacked packages that README.md names. Nothing imports this file.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import struct
import sys
from pathlib import Path

HERE = Path(__file__).parent
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")


def fashion(folder: Path, count: int = 12_000) -> dict[str, bytes]:
    """The first `count` training examples and all test examples, as idx files."""
    images, labels = (
        gzip.decompress((folder / f"train-{k}.gz").read_bytes()) for k in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    return {
        "fashion-mnist-train-images-idx3-ubyte.xz": images[:4] + struct.pack(">i", count) + images[8 : 16 + count * 784],
        "fashion-mnist-train-labels-idx1-ubyte.xz": labels[:4] + struct.pack(">i", count) + labels[8 : 8 + count],
        **{
            f"fashion-mnist-t10k-{k}.xz": gzip.decompress((folder / f"t10k-{k}.gz").read_bytes())
            for k in ("images-idx3-ubyte", "labels-idx1-ubyte")
        },
    }


def glosses(folder: Path) -> dict[str, bytes]:
    """One line a synset: lexicographer file number, tab, definition without its usage examples."""
    rows = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if not line.startswith(" "):
                fields, gloss = line.split(" | ", 1)
                rows.append(f"{int(fields.split()[1])}\t{definition(gloss)}\n")
    return {"wordnet-glosses.tsv.xz": "".join(rows).encode()}


def definition(gloss: str) -> str:
    """What stands before the first usage example."""
    return gloss.split('; "')[0].strip()


def plays(folder: Path) -> dict[str, bytes]:
    """Each play after a line of form feed and its name; without the poems and the First Folio spellings (`_gut_f`)."""
    texts = {p.name.removesuffix("_gut.txt"): p.read_text("ascii") for p in sorted(folder.glob("*_gut.txt"))}
    return {"shakespeare-plays.txt.xz": "".join(f"\f{n}\n{t.strip()}\n" for n, t in texts.items() if n not in POEMS).encode()}


def main() -> None:
    """Write the files and SHA256SUMS."""
    made = {**fashion(Path(sys.argv[1])), **glosses(Path(sys.argv[2])), **plays(Path(sys.argv[3]))}
    for name, raw in made.items():
        (HERE / name).write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    files = sorted(p for p in HERE.iterdir() if p.suffix == ".xz" or p.name.startswith("LICENSE"))
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    (HERE / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
