"""The comparison of stored outputs with fresh ones: what may differ, and what never may."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outputs import band, close, difference, numbers, printed

REASON = "five seeds differed by less"


def cell(text, *directives):
    "A code cell that printed `text`."
    source = "".join(f"#| {line}\n" for line in directives) + "show()"
    outputs = [{"output_type": "stream", "name": "stdout", "text": text}]
    return {"cell_type": "code", "source": source, "outputs": outputs}


def differs(stored, fresh, *directives):
    return difference(cell(stored, *directives), cell(fresh, *directives)) is not None


class TestWithoutADirective:
    def test_is_compared_as_text(self):
        assert not differs("loss 0.51", "loss 0.51")
        assert differs("loss 0.51", "loss 0.52")
        assert differs("loss 0.51", "loss  0.51")

    def test_blanks_at_the_end_of_an_output_are_no_difference(self):
        assert not differs("loss 0.51\n", "loss 0.51")

    def test_addresses_are_no_difference(self):
        assert not differs("<Model at 0x7f00aa12>", "<Model at 0x7fbb0000>")

    def test_other_directives_do_not_excuse(self):
        assert differs("1", "2", "vllm", "export")

    def test_volatile_is_not_compared(self):
        assert not differs("took 3 s", "lasted 4 s", "volatile")


class TestBand:
    @pytest.mark.parametrize(
        "terms, expected",
        [
            ("5%", [("share", 5.0)]),
            ("0.02", [("distance", 0.02)]),
            ("1e-6", [("distance", 1e-6)]),
            ("x3", [("factor", 3.0)]),
            ("0.02, 10%", [("distance", 0.02), ("share", 10.0)]),
            ("2.5%,x1.5", [("share", 2.5), ("factor", 1.5)]),
        ],
    )
    def test_is_read(self, terms, expected):
        assert band(cell("", f"within {terms}: {REASON}")) == expected

    def test_none_without_the_directive(self):
        assert band(cell("", "volatile")) is None
        assert band(cell("", "withinside 5%")) is None

    @pytest.mark.parametrize(
        "line, said",
        [
            ("within 5%", "reason"),
            ("within 5%:", "reason"),
            ("within 5%: just because", "reason"),
            (f"within: {REASON}", "no band"),
            (f"within five percent: {REASON}", "no band"),
            (f"within -5%: {REASON}", "no band"),
            (f"within 5 %: {REASON}", "no band"),
            (f"within 5%,: {REASON}", "no band"),
            (f"within x0.5: {REASON}", "at least 1"),
        ],
    )
    def test_misspelt_or_without_a_reason_is_an_error(self, line, said):
        with pytest.raises(ValueError, match=said):
            differs("1", "2", line)

    def test_a_second_band_is_an_error(self):
        with pytest.raises(ValueError, match="second"):
            band(cell("", f"within 5%: {REASON}", f"within 0.1: {REASON}"))


class TestWithinABand:
    def test_numbers_may_move_within_and_no_further(self):
        assert not differs("loss 1.00", "loss 1.04", f"within 5%: {REASON}")
        assert differs("loss 1.00", "loss 1.06", f"within 5%: {REASON}")
        assert not differs("loss 1.00", "loss 1.02", f"within 0.02: {REASON}")
        assert differs("loss 1.00", "loss 1.03", f"within 0.02: {REASON}")
        assert not differs("error 2e-9", "error 5e-9", f"within x3: {REASON}")
        assert differs("error 2e-9", "error 7e-9", f"within x3: {REASON}")

    def test_one_of_several_terms_is_enough(self):
        both = f"within 0.02, 10%: {REASON}"
        assert not differs("0.01 5.0", "0.03 5.4", both)
        assert differs("0.01 5.0", "0.04 5.4", both)

    def test_one_wrong_number_among_many_fails_and_is_named(self):
        stored = cell("1.00 2.00 3.00", f"within 5%: {REASON}")
        said = difference(stored, cell("1.01 2.50 3.01"))
        assert "2 became 2.5" in said and "became 1.01" not in said

    def test_a_sign_is_no_rounding(self):
        for terms in ("5%", "x3"):
            assert differs("gain 0.5", "gain -0.5", f"within {terms}: {REASON}")

    def test_zero_lies_in_no_share_and_no_factor(self):
        assert differs("0", "1e-9", f"within 50%, x10: {REASON}")
        assert not differs("0", "1e-9", f"within 1e-8: {REASON}")

    def test_words_must_stay(self):
        allowed = f"within 50%: {REASON}"
        assert differs("accuracy 0.5", "accurracy 0.5", allowed)
        assert differs("True 0.5", "False 0.5", allowed)
        assert differs("0.5", "0.5 0.5", allowed)
        assert differs("0.5 0.6", "0.5", allowed)

    def test_digits_of_names_are_words(self):
        allowed = f"within 50%: {REASON}"
        for name, other in [("fp8", "fp9"), ("k3", "k4"), ("R2", "R3"), ("layer_1", "layer_2")]:
            assert differs(f"{name} 0.5", f"{other} 0.5", allowed)

    def test_white_space_and_rules_follow_the_widest_number(self):
        allowed = f"within 20%: {REASON}"
        table = "step   loss\n-----------\n   1   9.9"
        assert not differs(table, "step   loss\n------------\n   1   10.1", allowed)

    def test_nan_and_infinity_are_only_themselves(self):
        allowed = f"within 50%, 1e9: {REASON}"
        assert not differs("nan inf -inf", "nan inf -inf", allowed)
        for stored, fresh in [("nan", "1"), ("1", "nan"), ("inf", "1e300"), ("inf", "-inf")]:
            assert differs(stored, fresh, allowed)

    def test_words_that_hold_nan_or_inf_are_words(self):
        assert numbers("nano info inform") == ("nano info inform", [])

    def test_a_sign_that_stands_for_a_number_cannot_be_forged(self):
        assert differs("# 1.0", "1.0 #", f"within 5%: {REASON}")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,234,567 tokens", [1234567.0]),
        ("[1,2]", [1.0, 2.0]),
        ("-1.5e-3, +2, .5", [-0.0015, 2.0, 0.5]),
        ("tensor([1., 2.5])", [1.0, 2.5]),
        ("It ends at 0.52.", [0.52]),
        ("12% of 3.4GB, 2x", [12.0, 3.4, 2.0]),
        ("fp8 k3 R2 x3 step_4 v1.2", []),
    ],
)
def test_numbers_of_a_text(text, expected):
    assert numbers(text)[1] == expected


def test_a_point_behind_a_number_is_no_word():
    assert numbers("[1., 2.5]")[0] == numbers("[1.2, 3.]")[0]
    assert numbers("It is 3.")[0] == numbers("It is 3.5.")[0]


def test_pictures_and_stderr_are_not_printed():
    picture = {"output_type": "display_data", "data": {"image/png": "x", "text/plain": "<Figure>"}}
    warning = {"output_type": "stream", "name": "stderr", "text": "careful"}
    value = {"output_type": "execute_result", "data": {"text/plain": "3"}}
    shown = {"cell_type": "code", "source": "", "outputs": [picture, warning, value]}
    assert printed(shown) == "3"


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 100))
def test_every_number_lies_in_a_band_around_itself(x, share):
    assert close(x, x, [("share", share)])


@given(st.floats(1e-6, 1e6), st.floats(1.01, 100))
def test_a_factor_is_the_same_upwards_and_downwards(x, factor):
    inside, outside = 1 + (factor - 1) * 0.9, factor * 1.1
    for other in (x * inside, x / inside):
        assert close(x, other, [("factor", factor)])
    for other in (x * outside, x / outside):
        assert not close(x, other, [("factor", factor)])
