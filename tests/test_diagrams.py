import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import ImageFont

from covidmask import diagrams
from covidmask.config import PRESETS, ClassifierConfig
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn

SVG = "{http://www.w3.org/2000/svg}"
CHAPTERS = Path(__file__).parents[1] / "book" / "_static" / "chapters.svg"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu, wider than most


def model_of(preset):
    with torch.device("meta"):  # shapes without memory
        detector = lesion_mask_rcnn(PRESETS[preset].detector)
        return covid_ct_mask_net(detector, PRESETS[preset].classifier)


@pytest.fixture(scope="module")
def pictures():
    found = {name: diagrams.model_diagram(model_of(name)) for name in PRESETS}
    return {**found, "chapters": CHAPTERS.read_text(encoding="utf-8")}


def texts(picture):
    return [element.text for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", [*PRESETS, "chapters"])
class TestPicture:
    def test_is_xml_and_says_what_it_shows(self, pictures, name):
        root = ElementTree.fromstring(pictures[name])
        assert root.tag == f"{SVG}svg" and root.get("role") == "img"
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert root[0] is title and title.text == root.get("aria-label")
        assert len(description.text) > 100

    def test_needs_nothing_from_elsewhere_and_no_ids(self, pictures, name):
        root = ElementTree.fromstring(pictures[name])
        names = {key for element in root.iter() for key in element.attrib}
        assert not {key for key in names if key == "id" or "href" in key}
        assert "url(" not in pictures[name] and "<script" not in pictures[name]

    def test_letters_are_readable_on_a_telephone(self, pictures, name):
        root = ElementTree.fromstring(pictures[name])
        width = float(root.get("viewBox").split()[2])
        sizes = [float(e.get("font-size")) for e in root.iter() if e.get("font-size")]
        assert min(sizes) * 350 / width >= 10  # pixels, where a page of 390 leaves 350

    def test_text_stays_in_its_box_and_boxes_in_the_picture(self, pictures, name):
        root = ElementTree.fromstring(pictures[name])
        width, height = map(float, root.get("viewBox").split()[2:])
        frames = [tuple(float(e.get(k, 0)) for k in ("x", "y", "width", "height"))
                  for e in root.iter(f"{SVG}rect") if e.get("fill") == "#ffffff"]  # fmt: skip
        assert frames
        for x, y, wide, high in frames:
            assert x >= 0 and y >= 0 and x + wide <= width and y + high <= height
        for element in root.iter(f"{SVG}text"):
            if element.get("transform"):
                continue
            bold = element.get("font-weight") == "bold"
            size = float(element.get("font-size", root.get("font-size")))
            font = ImageFont.truetype(FONTS / f"DejaVuSans{'-Bold' * bold}.ttf", 100)
            length = font.getlength(element.text) * size / 100
            x, y = float(element.get("x")), float(element.get("y"))
            left = x - length * {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor")]
            assert left >= 0 and left + length <= width, element.text
            for bx, by, wide, high in frames:
                if bx <= x <= bx + wide and by <= y <= by + high:
                    assert left >= bx and left + length <= bx + wide, element.text


def test_shapes_are_those_of_the_model(pictures):
    paper = texts(pictures["paper"])
    for line in (
        "3 × 512 × 512",
        "ResNet-50 and FPN",
        "256 channels, strides 4, 8, 16, 32",
        "30 anchors per cell, P = 1000",
        "P × 256 × 7 × 7",
        "12544 → 128 → 128",
        "P × 12",
        "keep the N = 256 best",
        "Flatten: 5N = 1280",
        "Linear, ReLU: 1280 → 1024",
        "Linear: 1024 → 3 logits",
        "Common pneumonia",
    ):
        assert line in paper
    assert "64 channels, stride 8" in texts(pictures["quick"])
    assert "256 channels, stride 16" in texts(pictures["colab"])
    assert "64 channels, strides 4, 8, 16" in texts(pictures["semiseg"])


def test_another_n_gives_another_picture_and_the_same_model_the_same():
    with torch.device("meta"):
        detector = lesion_mask_rcnn(PRESETS["quick"].detector)
        few, again, many = (
            diagrams.model_diagram(covid_ct_mask_net(detector, ClassifierConfig(n, 64)))
            for n in (16, 16, 48)
        )
    assert few == again
    assert "Flatten: 5N = 80" in texts(few) and "Flatten: 5N = 240" in texts(many)


def test_the_mask_branch_is_dashed(pictures):
    root = ElementTree.fromstring(pictures["quick"])
    elements = list(root)
    masks = next(i for i, e in enumerate(elements) if e.text == "Masks")
    assert elements[masks - 1].tag == f"{SVG}rect" and elements[masks - 1].get("stroke-dasharray")


def test_other_classes_and_modules():
    names = ("a < b & c", "d", "e", "f")
    with torch.device("meta"):
        detector = lesion_mask_rcnn(PRESETS["quick"].detector)
        model = covid_ct_mask_net(detector, ClassifierConfig(16, 64, classes=names))
    picture = diagrams.model_diagram(model)
    assert "a &lt; b &amp; c" in picture and set(names) < set(texts(picture))
    assert "Linear: 64 → 4 logits" in texts(picture) and "into 4 logits" in picture
    model.s = torch.nn.Linear(80, 4)
    with pytest.raises(ValueError, match="three linear layers"):
        diagrams.model_diagram(model)


def test_the_graph_has_every_chapter(pictures):
    titles = [text for text in texts(pictures["chapters"]) if text[0].isdigit()]
    chapters = sorted((CHAPTERS.parents[1] / "py").glob("[0-9]*.py"))
    assert sorted(int(text.split()[0]) for text in titles) == [*range(len(chapters))]


def test_importing_it_does_not_import_torch():
    code = "import sys, covidmask.diagrams; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
