from tiny_onn.clock import clock_text


def test_times_read_like_a_clock():
    times = {
        0: "0:00",
        59.6: "1:00",
        61: "1:01",
        3599: "59:59",
        3600: "1:00:00",
        3661: "1:01:01",
        -5: "0:00",
        None: "-:--",
    }
    assert {seconds: clock_text(seconds) for seconds in times} == times
