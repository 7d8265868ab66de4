"""The tables of docs/experts.md are those of the committed results."""

import experts


def test_the_tables_are_current(pytestconfig):
    made = experts.page(experts.PAGE.read_text(), experts.load())
    if pytestconfig.getoption("update_golden"):
        experts.PAGE.write_text(made)
    assert experts.PAGE.read_text() == made


def test_a_row_by_hand():
    entries = experts.load()
    entry = entries["experts-qwen3-1/stream"]
    figures = {
        "decode_tok_per_s": 12.34,
        "experts_per_layer": 8.04,
        "expert_hit_rate": 0.255,
        "tpot_p50_s": 0.1,
        "decode_prediction_error": -0.0512,
        "prefill_fraction_of_bound": 0.876,
    }
    targets = [
        {"what": "tok/s", "at_least": 17, "achieved": 12.34, "met": False},
        {"what": "× whole layers", "at_least": 5, "achieved": 6.0, "met": True},
        {"what": "error of the predicted decode", "at_most": 0.1, "achieved": 0.2, "met": False},
    ]
    whole = {"streamed_bytes_per_pass": 60e9}
    made = {
        **entry,
        "metrics": entry["metrics"] | figures,
        "targets": targets,
        "plan": entry["plan"] | whole,
        "ceilings": {"link_bytes_per_s": 50e9},
    }

    row = experts.tables({"experts-qwen3-1/stream": made}).splitlines()[3]

    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:9] == ["qwen3-30b-a3b", "host", "1 × 128", "", "12.3", "8.0", "26 %", "12.00", "0.88"]
    assert cells[9] == "-5.1 %"
    assert cells[11] == "12.34 tok/s, not 17"


def test_whole_layers_have_no_rate_of_hits():
    entries = {name: entry for name, entry in experts.load().items() if name == "experts-mixtral-8/stream"}

    cells = [cell.strip() for cell in experts.tables(entries).splitlines()[3].strip("|").split("|")]

    assert cells[5:7] == ["all", ""]
