"""common/times.py: the forms in which dates are written, against datetime's own reading of them."""
from datetime import datetime, timezone

import pytest

from common.files import UserError
from common.times import Times

WHEN = datetime(2017, 7, 14, 2, 40, 5, tzinfo=timezone.utc)


def seconds_of(*texts):
    """What a column of texts is read as: seconds, clock."""
    times = Times()
    assert all(times.add(text) for text in texts)
    values, _, clock = times.in_seconds("t.csv")
    return values.tolist(), clock


@pytest.mark.parametrize("form", [
    "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S UTC", "%Y-%m-%d %H:%M:%S GMT",
    "%Y/%m/%d %H:%M:%S", "%Y.%m.%d %H:%M:%S", "%d.%m.%Y %H:%M:%S", "%d/%m/%Y %H:%M:%S",
    "%m/%d/%Y %I:%M:%S %p", "%d-%m-%Y %H:%M:%S", "%d %b %Y %H:%M:%S", "%d-%b-%Y %H:%M:%S",
    "%d. %B %Y %H:%M:%S",
    "%B %d, %Y %I:%M:%S %p", "%b %d, %Y, %H:%M:%S", "%a, %d %b %Y %H:%M:%S GMT",
    "%Y-%m-%d %H:%M:%S.000", "%Y-%m-%d %H:%M:%S,000", "%Y%m%d%H%M%S", " %Y-%m-%d %H:%M:%S ",
])
def test_usual_forms(form):
    assert seconds_of(WHEN.strftime(form)) == ([WHEN.timestamp()], "seconds")


@pytest.mark.parametrize("form", [
    "%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%Y%m%d", "%d %B %Y", "%b %d, %Y",
])
def test_dates_are_days(form):
    midnight = WHEN.replace(hour=0, minute=0, second=0)
    assert seconds_of(WHEN.strftime(form)) == ([midnight.timestamp()], "day")


@pytest.mark.parametrize("text, hours", [
    ("2017/07/14 02:40:05 +05:30", -5.5), ("2017/07/14 02:40:05-0800", 8),
    ("2017/07/14 02:40:05+02", -2),
])
def test_zones(text, hours):
    assert seconds_of(text)[0] == [WHEN.timestamp() + hours * 3600]


@pytest.mark.parametrize("half, hour", [
    ("12:00 AM", 0), ("1:00 AM", 1), ("12:00 PM", 12), ("1:00 p.m.", 13), ("11:59pm", 23),
])
def test_halves_of_the_day(half, hour):
    values, _ = seconds_of(f"July 14, 2017 {half}")
    assert datetime.fromtimestamp(values[0], timezone.utc).hour == hour


@pytest.mark.parametrize("texts, month", [
    (["01/02/2017", "25/02/2017"], 2),
    (["01/02/2017", "01/25/2017"], 1),
    (["25-02-2017 10:00", "01-02-2017 10:00"], 2),
])
def test_what_stands_first_is_told_by_the_whole_column(texts, month):
    values, _ = seconds_of(*texts)
    first = texts.index(next(text for text in texts if text.startswith("01")))
    assert datetime.fromtimestamp(values[first], timezone.utc).month == month


@pytest.mark.parametrize("texts", [
    ["01/02/2017", "03/04/2017"], ["25/02/2017", "02/25/2017"], ["31/02/2017"],
])
def test_dates_that_can_be_read_in_two_ways_or_in_none_are_one_sentence(texts):
    times = Times()
    assert all(map(times.add, texts))
    with pytest.raises(UserError, match=r"t.csv has .*: write times as seconds since 1970 or as"):
        times.in_seconds("t.csv")


def test_dates_that_are_resolved_later_stand_at_their_lines():
    days, clocks = [5, 25, 5, 1], [0, 600, 59, 0]
    times = Times()
    for day, clock in zip(days, clocks):
        assert times.add("1500000000.5")
        assert times.add(f"{day:02}/03/2017 00:{clock // 60:02}:{clock % 60:02}")
    values, _, clock = times.in_seconds("t.csv")
    march = datetime(2017, 3, 1, tzinfo=timezone.utc).timestamp()
    assert values[1::2].tolist() == [
        march + (day - 1) * 86_400 + clock for day, clock in zip(days, clocks)
    ]
    assert (values[::2] == 1500000000.5).all()
    assert len(times.dates.names) == 3    # a date is kept once, however many lines have it


@pytest.mark.parametrize("texts, wrong", [
    (["25/02/2017", "31/02/2017", "30/02/2017"], "31/02/2017"),
    (["25/02/2017", "01/01/1970", "01/01/1970 01:00 +05:30", "31/02/2017"], "01/01/1970"),
])
def test_the_first_date_that_does_not_exist_is_named(texts, wrong):
    times = Times()
    assert all(map(times.add, texts))
    with pytest.raises(UserError, match=f"t.csv has a date {wrong} that does not exist or lies"):
        times.in_seconds("t.csv")


@pytest.mark.parametrize("text", [
    "", "yesterday", "2017-02-30", "2017/13/01", "14.07.17", "2017-07-14 25:00", "14 Foo 2017",
    "2017/07/14 13:00 PM", "1969-07-20",
    "9999-12-31", "-4", "nan", "inf", "2017-07-14 02:40:00 CET",
])
def test_what_is_no_time(text):
    assert not Times().add(text)


def test_numbers_are_dates_only_if_all_of_them_are():
    assert seconds_of("20170714", "20170715")[1] == "day"
    assert seconds_of("20170714", "20171399")[0] == [20170714, 20171399]
    assert seconds_of("20170714", "20170714.5")[0] == [20170714, 20170714.5]
    assert seconds_of("201707140240") == ([WHEN.timestamp() - 5], "seconds")
    assert seconds_of("1500000000", "1500000001")[1] == "seconds"
    assert seconds_of("1", "2", "3")[1] == "order"


@pytest.mark.parametrize("texts", [
    ("2017-07-14", "20170715"), ("2017-07-14", "42930.5"), ("12", "14 Jul 2017"),
])
def test_dates_among_numbers_that_are_no_seconds_are_refused(texts):
    with pytest.raises(UserError, match="mixes written dates with numbers such as"):
        seconds_of(*texts)
    assert seconds_of("2017-07-14", "1500000000")[0] == [1499990400, 1500000000]
