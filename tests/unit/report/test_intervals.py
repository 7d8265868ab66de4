"""How sure a ratio is: the bootstrap over passes, ranges of few passes, and figures with one value."""

import made_up
import pytest

from zi_experiments.report import intervals, runs


def run(**changes):
    return runs.from_record(made_up.record(**changes), "")


def of(name, before, after):
    return intervals.of_ratio(name, before, after, after.row[name] / before.row[name])


def test_the_same_passes_differ_by_nothing():
    one = run(passes=5, noise=0.1)

    interval = of("decode_tok_per_s", one, one)

    assert interval.low < 1 < interval.high
    assert interval.differs is False


@pytest.mark.parametrize("name", ["decode_tok_per_s", "prefill_tok_per_s", "total_tok_per_s", "fraction_of_bound"])
def test_a_rate_that_is_twice_as_high_differs(name):
    interval = of(name, run(passes=5, noise=0.1, seed=1), run(passes=5, noise=0.1, seed=2, step_s=0.05))

    assert 1.8 < interval.low < interval.high < 2.2
    assert interval.differs is True


def test_a_time_that_is_half_differs():
    interval = of("tpot_p50_s", run(passes=6, noise=0.1, seed=1), run(passes=6, noise=0.1, seed=2, step_s=0.05))

    assert 0.45 < interval.low <= interval.high < 0.55


def test_noise_is_no_difference():
    """Passes that scatter by half, and medians that are a few percent apart."""
    before, after = (
        run(passes=5, noise=0.5, steps=1, seed=seed, step_s=step_s) for seed, step_s in ((1, 0.1), (2, 0.101))
    )

    assert of("decode_tok_per_s", before, after).differs is False


def test_more_passes_make_an_interval_smaller():
    few, many = (
        of("decode_tok_per_s", run(passes=n, noise=0.5, steps=1), run(passes=n, noise=0.5, steps=1, seed=9))
        for n in (5, 60)
    )

    assert many.high - many.low < (few.high - few.low) / 2


def test_the_interval_of_most_repetitions_has_the_true_ratio():
    """Of 40 pairs without a difference, a 95 % interval may miss a few: with five passes a bootstrap is a little too sure."""
    pairs = [
        (run(passes=8, noise=0.3, steps=2, seed=2 * i), run(passes=8, noise=0.3, steps=2, seed=2 * i + 1))
        for i in range(40)
    ]

    assert sum(of("decode_tok_per_s", *pair).differs for pair in pairs) <= 6


def test_the_interval_is_about_the_ratio_of_the_figures_also_with_other_batches():
    """Eight sequences at the pace of two are four times the tokens."""
    interval = of("decode_tok_per_s", run(passes=5, noise=0.01), run(passes=5, noise=0.01, batch_size=8))

    assert 3.9 < interval.low <= interval.high < 4.1


def test_few_passes_have_a_range_and_no_verdict():
    before, after = run(passes=4, noise=0.1, seed=1), run(passes=5, noise=0.1, seed=2, step_s=0.05)

    interval = of("decode_tok_per_s", before, after)

    first, second = before.row, after.row
    assert interval.is_range
    assert interval.differs is None
    assert interval.low == pytest.approx(second["decode_tok_per_s_min"] / first["decode_tok_per_s_max"])
    assert interval.high == pytest.approx(second["decode_tok_per_s_max"] / first["decode_tok_per_s_min"])


def test_single_passes_have_no_range():
    assert of("decode_tok_per_s", run(), run(seed=1)) is None


def test_a_figure_with_one_value_has_no_interval():
    assert of("load_s", run(passes=9), run(passes=9)) is None


def test_without_samples_the_extremes_of_the_record_are_the_range():
    before, after = (run(passes=3, noise=0.2, seed=seed, samples=None) for seed in (1, 2))

    interval = of("decode_tok_per_s", before, after)

    assert interval.is_range
    assert interval.low == pytest.approx(after.row["decode_tok_per_s_min"] / before.row["decode_tok_per_s_max"])
    assert of("ttft_s", before, after) is None


@pytest.mark.parametrize("step_s", [[[0.1], [0.1, 0.2]], [[0.0]], [[]], [[-1.0]]])
def test_times_that_cannot_be_have_no_interval(step_s):
    record = made_up.record(passes=5)
    record["samples"]["step_s"] = step_s

    assert of("tpot_p50_s", runs.from_record(record, ""), run(passes=5)) is None


def test_the_same_records_give_the_same_interval():
    pair = run(passes=9, noise=0.3, steps=7), run(passes=9, noise=0.3, steps=7, seed=3)

    assert of("tpot_p90_s", *pair) == of("tpot_p90_s", *pair)
