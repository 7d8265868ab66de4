"""The picture of the README is what the report draws of the committed results."""

from places import ROOT

from zi_experiments.report import picture, reading

PICTURE = ROOT / "docs" / "decode.svg"


def test_the_picture_is_current(pytestconfig):
    drawn = picture.draw(reading.read([ROOT / "docs" / "results" / "bench-h200.json"]).runs)

    if pytestconfig.getoption("--update-golden"):
        PICTURE.write_text(drawn)
    assert PICTURE.read_text() == drawn
