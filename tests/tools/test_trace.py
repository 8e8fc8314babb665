import json

from fxstream.tools.trace import to_trace


def test_the_counter_reaches_the_peak_and_spans_nest(nested):
    plan = nested.compiled.plan
    events = json.loads(to_trace(nested.compiled.graph_module, "nested"))["traceEvents"]
    counted = [event["args"]["bytes"] for event in events if event["ph"] == "C"]
    assert max(counted) == plan.after.peak_bytes
    assert counted[-1] == 0
    spans = [event for event in events if event["ph"] == "X"]
    outer = next(group for group in plan.groups if group.depth == 0)
    (loop,) = (span for span in spans if span["name"] == outer.name)
    slices = [span for span in spans if span["name"].startswith(f"{outer.name}, slice ")]
    assert len(slices) == outer.slices
    for span in slices:
        assert loop["ts"] <= span["ts"] and span["ts"] + span["dur"] <= loop["ts"] + loop["dur"] + 0.01
    inner = next(group for group in plan.groups if group.depth == 1)
    assert len([span for span in spans if span["name"] == inner.name]) == outer.slices


def test_time_goes_on(nested):
    events = json.loads(to_trace(nested.compiled.graph_module, "nested"))["traceEvents"]
    times = [event["ts"] for event in events if event["ph"] == "C"]
    assert times == sorted(times)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
