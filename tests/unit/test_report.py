"""The report: nothing leaves it, nothing breaks out of it, and its three forms say the same."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from quadriga.core.errors import BadInput
from quadriga.core.roofline import bounds, least_seconds
from quadriga.report import markdown, write
from quadriga.report.document import Figure, Table
from quadriga.report.layers import COLUMNS
from quadriga.report.profiled import write as write_profile
from quadriga.report.schema import complete, empty_result
from quadriga.report.sections import document

HOSTILE = "</script><script>alert(1)</script>\"'\n<img src=x onerror=alert(1)>|`![a](b)\u2028&amp;"


class Page(HTMLParser):
    """What a browser would see: elements, attributes, the text of scripts and styles, and all other text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.inside = {"script": "", "style": ""}
        self.shown, self._open = "", ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        self._open = tag if tag in self.inside else self._open

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside[self._open] += data
        else:
            self.shown += data


def page(records: dict[str, Any], folder: Path) -> Page:
    write(records, folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def hostile(value: Any) -> Any:
    """The same data with an attack behind every text, except those that the report understands."""
    known = {"verified", "infeasible", "failed", "faster", "structure", "training", "optimizer", "hardware", "pt"}
    if isinstance(value, dict):
        return {k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return value + HOSTILE if isinstance(value, str) and value not in known else value


def test_no_request_leaves_the_page(records, tmp_path):
    seen = page(records, tmp_path)
    assert "http" not in (tmp_path / "report.html").read_text(encoding="utf-8").replace("http-equiv", "")
    assert all(value.startswith("#") for _, key, value in seen.attributes if key in ("href", "src", "action", "xlink:href"))
    assert not {"link", "img", "iframe", "object", "embed", "form", "base"} & set(seen.tags)
    assert "@import" not in seen.inside["style"] and "url(" not in seen.inside["style"]


def test_the_policy_allows_this_style_sheet_and_nothing_else(records, tmp_path):
    seen = page(records, tmp_path)
    digest = base64.b64encode(hashlib.sha256(seen.inside["style"].encode()).digest()).decode()
    policy = next(value for tag, key, value in seen.attributes if tag == "meta" and key == "content" and "default-src" in value)
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not [key for _, key, _ in seen.attributes if key == "style" or key.startswith("on")]


def test_hostile_names_are_shown_as_text(records, tmp_path):
    clean, dirty = page(records, tmp_path / "a"), page(hostile(records), tmp_path / "b")
    assert dirty.tags == clean.tags, "a name became an element"
    assert [(t, k) for t, k, _ in dirty.attributes] == [(t, k) for t, k, _ in clean.attributes], "a name became an attribute"
    assert dirty.tags.count("script") == 1
    assert json.loads(dirty.inside["script"]) == complete(hostile(records))
    assert "lenet_fashion</script><script>alert(1)</script>" in dirty.shown


def test_hostile_names_make_no_html_link_or_cell_in_markdown(records, tmp_path):
    write(hostile(records), tmp_path)
    fenced = re.compile(r"^(`{3,})\w+\n.*?^\1$", re.S | re.M)
    text = fenced.sub("", (tmp_path / "report.md").read_text(encoding="utf-8"))
    assert "<" not in text
    assert re.findall(r"(?<!\\)\]\(", re.sub(r"\\\[[^\]]*\]\(", "", text)) == ["]("], (
        "the only link is the report's own picture"
    )
    clean = markdown.render(document(complete(records)))
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    assert cells == [len(re.findall(r"(?<!\\)\|", line)) for line in clean.splitlines() if line.startswith("|")]


def test_the_three_forms_say_the_same(records, tmp_path):
    """Every cell of every table stands, in the same order, in the page, in the Markdown and in the JSON."""
    seen = page(records, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["document"]
    assert stored == json.loads(json.dumps(document(complete(records)).plain()))
    spots = {"html": 0, "md": 0}
    for section in document(complete(records)).sections:
        for block in section.blocks:
            for cell in (c for row in block.rows for c in row) if isinstance(block, Table) else ():
                for form, where, what in (("html", seen.shown, cell), ("md", text, markdown.escape(cell))):
                    spots[form] = where.find(what, spots[form])
                    assert spots[form] >= 0, f"{cell!r} is missing in {form}"
    assert seen.shown.count(stored["verdict"]) == 1


@pytest.mark.parametrize("status", ["infeasible", "failed", "interrupted"])
def test_a_study_without_a_winner_has_a_report(records, tmp_path, status):
    records["result"] = {**empty_result(status, "lenet_fashion"), "baseline": records["result"]["baseline"]}
    miss = {"recipe": [{"method": "shrink", "kernel": 3}], "why": "it loses 0.62 pt", "quality": {"low": -0.62}}
    records["result"] |= {"nearest_miss": miss, "error": {"message": "the disk is full", "remedy": "free space"}}
    shown = page(records, tmp_path).shown
    words = {
        "infeasible": "it loses 0.62 pt",
        "failed": "the disk is full; free space",
        "interrupted": "the same command goes on",
    }
    assert words[status] in shown and "shrink" in shown


def test_the_barest_records_have_a_report(tmp_path):
    assert "failed" in page({"result": {"status": "failed"}}, tmp_path).shown
    assert not (tmp_path / "pareto.svg").exists()


def test_numbers_that_json_lacks_become_missing(records, tmp_path):
    records["trials"][0]["values"]["quality"] = float("nan")
    records["pareto"][0]["latency_ratio"] = float("inf")
    records["result"]["winner"]["train_cost_ratio"] = float("inf")
    write(records, tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert stored["records"]["trials"][0]["values"]["quality"] is None


def test_the_same_records_give_the_same_bytes_and_stay_as_they_were(records, tmp_path):
    before = copy.deepcopy(records)
    first = [path.read_bytes() for path in write(records, tmp_path)]
    assert [path.read_bytes() for path in write(records, tmp_path)] == first
    assert records == before


@pytest.mark.parametrize("bad", [[], {}, {"result": None}, {"result": {}, "version": 99}])
def test_what_is_no_record_is_refused(bad, tmp_path):
    with pytest.raises(BadInput):
        write(bad, tmp_path)
    assert not list(tmp_path.iterdir())


def test_verdict_tells_the_claim_with_its_bounds(records):
    verdict = document(complete(records)).verdict
    speeds = "1.46× at batch 1 [1.42, 1.50] and 1.62× at batch 64 [1.54, 1.70] as fast as the best lossless export"
    for part in (speeds, "10,000 unseen", "at least +0.06 pt", "-0.5pt"):
        assert part in verdict
    assert html.escape(verdict, quote=False) == verdict


def test_a_ratio_that_was_not_measured_well_enough_is_quoted_nowhere(records, tmp_path):
    """`at least 4.74× as fast [4.74, 87775.15]` once stood as the result of a busy machine."""
    wild = {"value": 643.0, "low": 4.74, "high": 87775.15, "verdict": "unmeasured"}
    records["result"]["winner"]["latency_ratio"]["lossless_export"]["1"] = wild
    for opponent in records["opponents"]:
        if opponent["name"] == "lossless_export":
            opponent["latency"]["1"] = wild
    made = document(complete(records))
    told = (
        "1.62× at batch 64 [1.54, 1.70] as fast as the best lossless export, not measured well enough against the best lossless"
    )
    assert told in made.verdict
    assert made.figures[0][0] == "not measured well enough"
    figure = next(b for s in made.sections for b in s.blocks if isinstance(b, Figure) and b.name == "forest")
    assert "643" not in made.verdict + figure.svg
    assert "87,775" not in figure.svg


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tried": {"costed": 40, "trained": 0, "scored": 0}}, "Undecided: 40 candidates were costed and the quality of none"),
        (
            {"tried": {"costed": 40, "trained": 3, "scored": 3}},
            "Infeasible: nothing beat the baseline above the floor of -0.5pt",
        ),
        ({"reason": "no runtime can execute it", "remedy": "return tensors"}, "no runtime can execute it; return tensors"),
        (
            {"status": "unmeasured", "nearest_miss": {"why": "others kept 63 % busy"}},
            "Others kept 63 % busy. There is no artifact.",
        ),
        ({"artifact": "artifact"}, "The unchanged baseline is handed back."),
        ({"no_artifact": "it holds a script object"}, "There is no artifact: it holds a script object."),
    ],
)
def test_a_study_without_a_winner_says_why(records, changes, words):
    records["result"] = {**empty_result("infeasible", "lenet_fashion"), **changes}
    assert words in document(complete(records)).verdict


def test_the_profile_adds_up_and_says_what_there_is_to_gain(records):
    """The rows' shares are the whole, the layers that have no room too; a layer's gain is Amdahl's."""
    given = records["profile"]["batches"][1]
    small = {**given["layers"][1], "seconds": 0.0, "share": 0.0}
    given["layers"] += [{**small, "layer": f"tail.{i}"} for i in range(20)]
    section = next(s for s in document(complete(records)).sections if s.key == "profile")
    tables = [b for b in section.blocks if isinstance(b, Table) and b.columns == COLUMNS]
    assert [t.title.split(":")[0] for t in tables] == ["Batch 64", "Batch 1"] and len(tables[0].rows) == 13
    assert tables[0].rows[-1][0] == "(12 more)"
    for table in tables:
        shares = [float(row[3].removesuffix(" %")) for row in table.rows]
        assert sum(shares) == pytest.approx(100, abs=1)
        for share, row in zip(shares, table.rows, strict=True):
            assert float(row[-1].removesuffix("×")) == pytest.approx(1 / (1 - share / 100), abs=0.02)


def test_the_bounds_are_those_of_the_arithmetic_and_older_ceilings_bound_float32_alone(records):
    """Two numbers, as older records have them, still give bounds and plots; types that were not measured say so."""

    def found():
        section = next(s for s in document(complete(records)).sections if s.key == "profile")
        titled = {b.title: b for b in section.blocks if isinstance(b, Table)}
        return titled, [b for b in section.blocks if isinstance(b, Figure)]

    older, figures = found()
    limits, batch = records["profile"]["ceilings"], records["profile"]["batches"][0]
    table = older["Batch 1: what there is to gain at most"]
    assert "What this machine reaches" not in older and len(figures) == 2
    assert [row[1:] for row in table.rows if "not measured" in row[1]] == [
        (f"{k}: not measured", "–", "–") for k in ("bf16", "int8")
    ]
    gain = batch["seconds"] / least_seconds(batch["layers"], limits)
    assert [float(row[-1].removesuffix("×")) for row in table.rows if "fp32" in row[1]] == [pytest.approx(gain, abs=0.006)]
    limits["products"] = {"default": 85e9, "fp32": 85e9, "bf16": 2e9, "int8": None}
    limits |= {"copies": [[512_000, 60e9], [256_000_000, 25e9]], "missing": {"int8": "no product here: none"}}
    newer, figures = found()
    assert [row[1] for row in newer["What this machine reaches"].rows][2:] == ["2 GFLOP", "–", "60 GB", "25 GB"]
    assert 'class="roof bf16"' in figures[0].svg and 'class="roof int8"' not in figures[0].svg


def test_training_at_the_float32_ceiling_is_its_operations_over_it(records):
    base = records["baseline"]
    told = str(document(complete(records)).plain())
    assert f"{base['train_seconds'] / (base['train_flops'] / records['profile']['ceilings']['flops']):.2f}× is the most" in told
    del base["train_flops"]
    assert "is the most that executing the same training" not in str(document(complete(records)).plain())


def test_a_profile_is_a_page_of_its_own_that_nothing_breaks_out_of(records, tmp_path):
    given = records["profile"]
    batch = given["batches"][0]
    batch["layers"][0]["layer"] = HOSTILE
    found = {"workload": HOSTILE, "threads": 1, "ceilings": given["ceilings"], **batch}
    found["bounds"] = bounds(batch["layers"], given["ceilings"])
    files = {path.name: path.read_text(encoding="utf-8") for path in write_profile(found, tmp_path)}
    assert list(files) == ["profile.html", "profile.md", "profile.json", "roofline.svg"]
    seen = Page(files["profile.html"])
    assert json.loads(seen.inside["script"]) == json.loads(files["profile.json"]) == json.loads(json.dumps(found))
    assert seen.tags.count("script") == 1 and "img" not in seen.tags and not [k for _, k, _ in seen.attributes if k[:2] == "on"]
    assert "](roofline.svg)" in files["profile.md"]
    root = ElementTree.fromstring(files["roofline.svg"])
    assert {e.tag.rpartition("}")[2] for e in root.iter()} <= {"svg", "style", "line", "text", "circle", "title"}
    no_plot = {**found, "layers": [{**row, "flops": 0} for row in batch["layers"]]}
    assert [p.name for p in write_profile(no_plot, tmp_path / "flat")] == list(files)[:3]


def test_a_study_without_a_profile_has_no_section_for_it(records):
    del records["profile"]
    assert "profile" not in [s.key for s in document(complete(records)).sections]


def test_older_records_show_the_one_training_ratio(records):
    best = records["result"]["winner"]
    new = str(document(complete(records)).plain())
    for key in ("train_cost", "memory_ratio"):
        del best[key]
    del best["quality"]["certificate"]
    old = str(document(complete(records)).plain())
    for words in ("training, FLOPs", "peak memory beyond PyTorch", "without labels"):
        assert words in new and words not in old
    assert "training time" in old


def test_rendering_imports_no_torch(tmp_path):
    code = "import sys, quadriga.report.sections, quadriga.report.page; assert not {'torch', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
